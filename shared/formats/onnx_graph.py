"""Read what an .onnx file says of itself, without loading its weights: ops, weights, inputs, metadata, files it refers to.

Letters in shapes: see the ops' own documentation, https://onnx.ai/onnx/operators.
"""

import collections
import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.formats.input_hints import GraphInput, InputHints, Step, find_hints
from shared.formats.onnx_file import Model, inner_graphs, read_checked, tensor_bytes
from shared.media.images import image_form

METADATA_KEY = "edgepress"  # of metadata_props
MAX_METADATA_BYTES = 2**16
SIZES = ("Resize", "Upsample")  # ops whose constant operands say how large, and are no weights
FLOAT_TYPES = {"FLOAT", "FLOAT16", "DOUBLE", "BFLOAT16"}


@dataclass(frozen=True)
class OnnxOp:
    """One node, and its constant operands.

    Args:
        name: The node's name; one made up where it has none of its own, see `node_names`.
        op_type: Operator, such as Conv; of another domain than ONNX's with that before it.
        weights: Name of each constant operand that is a tensor of floats or of 8 bits -> bytes.
        dtype: Type of the largest of them, such as FLOAT or INT8; empty where there is none.
        inputs: Names of all inputs.
        outputs: Names of all outputs.
        is_inner: Whether it stands in a graph inside of a node, such as a branch of If, which quantizers do not enter.
    """

    name: str
    op_type: str
    weights: Mapping[str, int] = field(default_factory=dict)
    dtype: str = ""
    inputs: Sequence[str] = ()
    outputs: Sequence[str] = ()
    is_inner: bool = False

    @property
    def output(self) -> str:
        """Name of its first output."""
        return next(iter(self.outputs), "")

    @property
    def weight_bytes(self) -> int:
        """Bytes of its largest constant operand."""
        return max(self.weights.values(), default=0)

    @property
    def weight(self) -> str | None:
        """Name of its largest constant operand."""
        return max(self.weights, key=lambda name: self.weights[name], default=None)


@dataclass(frozen=True)
class OnnxContent:
    """What an .onnx file holds, its weights left out.

    Args:
        ops: Its nodes in their order, those of graphs inside of nodes last.
        constants: Name of each initializer -> type, such as FLOAT, and bytes.
        files: The files next to the model that hold its weights.
        metadata: Metadata of one of our models; empty for others.
        input_range: Range of the image input, as that metadata gives it.
        hints: What its first ops tell about its inputs.
    """

    ops: list[OnnxOp]
    constants: dict[str, tuple[str, int]] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    input_range: tuple[float, float] | None = None
    hints: InputHints = field(default_factory=InputHints)


def read_onnx(path: Path) -> OnnxContent:
    """Return what an .onnx file holds; parses the file once and loads no weights of external files.

    Raises:
        ToolError: No ONNX model, or one whose external files are not there.
    """
    model, files = read_checked(path)
    return content_of(model, files)


def content_of(model: Model, files: Sequence[Path]) -> OnnxContent:
    """Return what a model holds that is in memory already; `files` hold its external weights."""
    import onnx

    name_of = onnx.TensorProto.DataType.Name
    metadata = metadata_of(model)
    constants = {tensor.name: (name_of(tensor.data_type), tensor_bytes(tensor)) for tensor in model.graph.initializer}
    return OnnxContent(read_ops(model), constants, list(files), metadata, declared_range(metadata), _hints_of(model.graph))


def read_ops(model: Model) -> list[OnnxOp]:
    """Return the nodes of a model in their order, those of graphs inside of nodes after the main ones."""
    return _ops_of(model.graph, {}, prefix="")


def _hints_of(graph: Any) -> InputHints:
    from onnx import TensorProto, numpy_helper

    constants = {**{tensor.name: tensor for tensor in graph.initializer}, **_constant_nodes(graph)}
    axes = [next((a.i for a in node.attribute if a.name == "axis"), 0) for node in graph.node]
    steps = [Step(n.op_type.upper(), list(n.input), list(n.output), axis) for n, axis in zip(graph.node, axes, strict=True)]
    given = [value for value in graph.input if value.name not in constants]
    inputs = [GraphInput(value.name, value.name, _is_image(value.type.tensor_type)) for value in given]
    inside = {name: tensor for name, tensor in constants.items() if tensor.data_location != TensorProto.EXTERNAL}
    shapes = {name: list(tensor.dims) for name, tensor in constants.items()}
    with contextlib.suppress(ValueError, TypeError, LookupError, RuntimeError):  # a damaged constant is named by `check_constants`
        return find_hints(inputs, steps, shapes, lambda name: numpy_helper.to_array(inside[name]) if name in inside else None)
    return InputHints()


def _is_image(kind: Any) -> bool:
    """Return whether a tensor's type is that of an image of floats."""
    from onnx import TensorProto

    shape = tuple(dim.dim_value or -1 for dim in kind.shape.dim)
    return kind.elem_type in (TensorProto.FLOAT, TensorProto.FLOAT16) and image_form(shape) is not None


def _constant_nodes(graph: Any) -> dict[str, Any]:
    """Return the tensors that nodes named Constant hold, by output."""
    found = {}
    for node in graph.node:
        if node.op_type == "Constant" and node.output and (held := [a.t for a in node.attribute if a.name == "value"]):
            found[node.output[0]] = held[0]
    return found


def _ops_of(graph: Any, outer: Mapping[str, Any], prefix: str) -> list[OnnxOp]:
    import onnx

    constants = {**outer, **{tensor.name: tensor for tensor in graph.initializer}, **_constant_nodes(graph)}
    ops: list[OnnxOp] = []
    inner: list[OnnxOp] = []
    for name, node in zip(node_names(graph), graph.node, strict=True):
        held = [(read, constants[read]) for read in node.input if read in constants and node.op_type not in SIZES]
        weights = {read: tensor for read, tensor in held if is_weight(tensor)}
        largest = max(weights.values(), key=tensor_bytes, default=None)
        ops.append(
            OnnxOp(
                name=f"{prefix}{name}",
                op_type=f"{node.domain}.{node.op_type}" if node.domain else node.op_type,
                weights={read: tensor_bytes(tensor) for read, tensor in weights.items()},
                dtype="" if largest is None else onnx.TensorProto.DataType.Name(largest.data_type),
                inputs=list(node.input),
                outputs=list(node.output),
                is_inner=bool(prefix),
            )
        )
        for below in inner_graphs(node):
            inner += _ops_of(below, constants, f"{prefix}{name}/")
    return [*ops, *inner]


def node_names(graph: Any) -> list[str]:
    """Return a name of its own for each node: as it is, or made of its op type and place where it has none or shares it."""
    taken = collections.Counter(node.name for node in graph.node)
    used = {name for name, count in taken.items() if name and count == 1}
    names = []
    for number, node in enumerate(graph.node):
        name = str(node.name)
        if not name or taken[name] > 1:
            stem = name or f"{node.op_type}_{number}"
            name = stem if stem not in used else f"{stem}_{number}"
            while name in used:
                name += "_"
            used.add(name)
        names.append(name)
    return names


def readers_of(graph: Any) -> "collections.Counter[str]":
    """Return tensor name -> how often it is read: by nodes, in graphs inside of nodes, and as an output."""
    found = collections.Counter(value.name for value in graph.output)
    for node in graph.node:
        found.update(node.input)
        for inner in inner_graphs(node):
            found.update(readers_of(inner))
    return found


def is_weight(tensor: Any) -> bool:
    """Return whether a constant holds several numbers that could be made smaller: floats, or 8 bits and fewer already."""
    import onnx

    kind = onnx.TensorProto.DataType.Name(tensor.data_type)
    return kind in (*FLOAT_TYPES, "INT8", "UINT8", "INT4", "UINT4") and math.prod(tensor.dims) > 1


def metadata_of(model: Model) -> dict[str, Any]:
    """Return the metadata of one of our models, empty where the model has none."""
    text = next((entry.value for entry in model.metadata_props if entry.key == METADATA_KEY), "{}")
    try:
        content = json.loads(text[:MAX_METADATA_BYTES])
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def declared_range(metadata: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the range of a model's image input, as the metadata of our own models gives it, or None."""
    low, dots, high = str(metadata.get("input_range", "0..1" if "nbits" in metadata else "")).partition("..")
    try:
        return (float(low), float(high)) if dots else None
    except ValueError:
        return None


def write_metadata(model: Model, content: Mapping[str, object]) -> None:
    """Put our metadata into a model, whatever else it holds."""
    kept = [entry for entry in model.metadata_props if entry.key != METADATA_KEY]
    text = json.dumps(content, sort_keys=True)
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    model.metadata_props.add(key=METADATA_KEY, value=text)


def without_traces(model: Model) -> None:
    """Take out what exporters note about the source code they came from: paths and stack traces."""
    del model.graph.metadata_props[:]
    model.graph.doc_string = ""
    for item in (*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info, *model.graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""
