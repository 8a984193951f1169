"""Make an ONNX model from the wild one that quantizers can read, with the same answers.

What is met there, and what ONNX Runtime 1.31 makes of it otherwise: opsets before 13 (per-channel scales that do not load), weights
listed as inputs (nothing is folded, and the float32 model itself is several times slower), nameless nodes (excluding one excludes
all), shapes noted by exporters that contradict inference, weights in Constant nodes (not seen), batch normalization after
convolutions (stays between them in float).
"""

import collections
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.command.errors import ToolError, first_line
from shared.formats.onnx_file import AGAIN, MAX_PROTOBUF_BYTES, Model, external_files, read_model
from shared.formats.onnx_graph import is_weight, node_names, readers_of

LEAST_OPSET = 13  # DequantizeLinear has an axis from here on
OPSET = 17  # what older models become; runtimes of 2022 and later read it
LAST_PLAIN_RESIZE = 10  # up to this opset Resize and Upsample knew one way only
LEAST_IR = 4  # initializers need not be inputs from here on
IR = 8  # belongs to OPSET
ONNX_DOMAINS = ("", "ai.onnx")
NARROW = 2**20  # bytes that the protobuf holds next to weights, at most a little more
DATA = ".data"  # suffix of the file that holds the weights of a large model


@dataclass(frozen=True)
class Repairs:
    """How many things of each kind were repaired.

    Args:
        opset: The opset it came with, where it was too old; else 0.
        listed_weights: Weights that were listed as inputs.
        nameless: Nodes without a name, or with one that another has.
        constants: Weights moved out of Constant nodes.
        batchnorms: Batch normalizations folded into the layers before them.
        shapes: Shapes that contradicted inference.
    """

    opset: int = 0
    listed_weights: int = 0
    nameless: int = 0
    constants: int = 0
    batchnorms: int = 0
    shapes: int = 0

    def __str__(self) -> str:
        counted = [
            (self.opset, f"opset {self.opset} upgraded to {OPSET}"),
            (self.listed_weights, f"{self.listed_weights} weights taken out of the inputs"),
            (self.nameless, f"{self.nameless} nodes named"),
            (self.constants, f"{self.constants} weights taken out of Constant nodes"),
            (self.batchnorms, f"{self.batchnorms} batch normalizations folded"),
            (self.shapes, f"{self.shapes} stale shapes inferred anew"),
        ]
        return ", ".join(text for count, text in counted if count)


def repair(source: Path, target: Path) -> Repairs:
    """Write the repaired model to `target`, the weights of a large one next to it, and return what was repaired.

    Raises:
        ToolError: The opset can't be upgraded, or the graph is inconsistent.
    """
    import onnx

    is_large = sum(file.stat().st_size for file in (source, *external_files(source))) > MAX_PROTOBUF_BYTES - NARROW
    model = read_model(source) if is_large else onnx.load(str(source.absolute()))
    for entry in [entry for entry in model.opset_import if entry.domain == "ai.onnx"]:
        entry.domain = ""
    if all(entry.domain for entry in model.opset_import):
        model.opset_import.add(domain="", version=OPSET)  # a model of custom ops alone; what quantizing adds needs it
    nameless = _name_nodes(model)  # first, so that places are those in the file
    listed = _unlist_weights(model)
    opset, model = _upgrade(model, source, is_large=is_large)
    constants = _hoist_constants(model)
    batchnorms = 0 if is_large else _fold_batchnorms(model)
    _name_nodes(model)  # what upgrading has added
    shapes = _infer_shapes(model, source)
    write(model, target, weights_of=source if is_large else None)
    return Repairs(opset, listed, nameless, constants, batchnorms, shapes)


def write(model: Model, target: Path, *, weights_of: Path | None = None, is_large: bool = False) -> None:
    """Write a model; weights of a large one into one file next to it.

    Args:
        model: The model.
        target: The file to write.
        weights_of: The model whose external weights this one refers to, not loaded.
        is_large: Whether to write weights next to the model although they are loaded.
    """
    import onnx

    if weights_of is not None:
        onnx.load_external_data_for_model(model, str(weights_of.absolute().parent))
    data = target.name + DATA
    (target.parent / data).unlink(missing_ok=True)  # onnx would append to it
    if is_large or weights_of is not None:
        onnx.save_model(model, str(target), save_as_external_data=True, location=data, all_tensors_to_one_file=True)
    else:
        onnx.save_model(model, str(target))


def _unlist_weights(model: Model) -> int:
    """Take initializers out of the graph's inputs, so that they are constants and not defaults."""
    names = {tensor.name for tensor in model.graph.initializer}
    kept = [value for value in model.graph.input if value.name not in names]
    count = len(model.graph.input) - len(kept)
    if count:
        del model.graph.input[:]
        model.graph.input.extend(kept)
    model.ir_version = max(model.ir_version, LEAST_IR)
    return count


def _upgrade(model: Model, source: Path, *, is_large: bool) -> tuple[int, Model]:
    """Return the opset the model came with, 0 where it is new enough, and the model upgraded."""
    from onnx import version_converter

    opset = next((entry.version for entry in model.opset_import if not entry.domain), OPSET)
    if opset >= LEAST_OPSET:
        return 0, model
    if is_large:
        what, expected = "a model this large can't be upgraded", f"at least {LEAST_OPSET}"
        raise ToolError(what, where=source, got=f"opset {opset}", expected=expected, remedy=AGAIN)
    try:
        upgraded = version_converter.convert_version(model, OPSET)
    except Exception as error:  # noqa: BLE001 - it raises whatever its C++ code throws
        remedy = f"export the model again with opset {OPSET} or newer"
        raise ToolError(f"opset {opset} can't be upgraded", where=source, got=first_line(error), remedy=remedy) from None
    upgraded.ir_version = max(upgraded.ir_version, IR)
    if opset <= LAST_PLAIN_RESIZE:
        _resize_as_before(upgraded)
    upgraded.metadata_props.MergeFrom(() if upgraded.metadata_props else model.metadata_props)
    return opset, upgraded


def _resize_as_before(model: Model) -> None:
    """Tell Resize how opsets up to 10 placed pixels, which the converter leaves to the new default."""
    from onnx import helper

    for node in model.graph.node:
        if node.op_type == "Resize":
            given = {attribute.name for attribute in node.attribute}
            for name, value in (("coordinate_transformation_mode", "asymmetric"), ("nearest_mode", "floor")):
                if name not in given:
                    node.attribute.append(helper.make_attribute(name, value))


def _hoist_constants(model: Model) -> int:
    """Make weights that stand in Constant nodes initializers; return how many."""
    kept, count = [], 0
    for node in model.graph.node:
        values = [attribute.t for attribute in node.attribute if attribute.name == "value"] if node.op_type == "Constant" else []
        if not values:
            kept.append(node)
            continue
        tensor = model.graph.initializer.add()
        tensor.CopyFrom(values[0])
        tensor.name = node.output[0]
        count += is_weight(tensor) and bool(tensor.dims)
    if len(kept) < len(model.graph.node):
        del model.graph.node[:]
        model.graph.node.extend(kept)
    return count


def _fold_batchnorms(model: Model) -> int:
    """Fold each BatchNormalization after a Conv that nothing else reads into that Conv's weights; return how many.

    y = (conv(x) - mean) / sqrt(variance + epsilon) * scale + bias, so weights and bias take one factor per output channel.
    """
    import numpy as np
    from onnx import numpy_helper

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    readers = readers_of(graph)
    makers = {name: node for node in graph.node for name in node.output}
    folded = []
    for norm in [node for node in graph.node if node.op_type == "BatchNormalization"]:
        conv = makers.get(norm.input[0])
        held = [constants[name] for name in norm.input[1:5] if name in constants]
        if conv is None or conv.op_type != "Conv" or readers[norm.input[0]] != 1 or len(held) < 4 or len(norm.output) != 1:
            continue
        own = [name for name in conv.input[1:] if name in constants]
        if len(own) != len(conv.input) - 1 or any(readers[name] != 1 for name in own):
            continue
        scale, shift, mean, variance = (numpy_helper.to_array(tensor).astype(np.float64) for tensor in held)
        epsilon = next((attribute.f for attribute in norm.attribute if attribute.name == "epsilon"), 1e-5)
        factor = scale / np.sqrt(variance + epsilon)
        weight = constants[own[0]]
        values = numpy_helper.to_array(weight)
        bias = numpy_helper.to_array(constants[own[1]]).astype(np.float64) if len(own) > 1 else 0.0
        scaled = (values * factor.reshape(-1, *[1] * (values.ndim - 1))).astype(values.dtype)
        moved = ((bias - mean) * factor + shift).astype(values.dtype)
        weight.CopyFrom(numpy_helper.from_array(scaled, weight.name))
        if len(own) > 1:
            constants[own[1]].CopyFrom(numpy_helper.from_array(moved, own[1]))
        else:
            name = f"{own[0]}_folded_bias"
            graph.initializer.append(numpy_helper.from_array(moved, name))
            conv.input.append(name)
        conv.output[0] = norm.output[0]
        folded.append(norm)
    for norm in folded:
        graph.node.remove(norm)
    return len(folded)


def _name_nodes(model: Model) -> int:
    """Give every node a name of its own; return how many got one."""
    taken = collections.Counter(node.name for node in model.graph.node)
    nameless = [node for node in model.graph.node if not node.name or taken[node.name] > 1]
    for name, node in zip(node_names(model.graph), list(model.graph.node), strict=True):
        node.name = name
    return len(nameless)


def _infer_shapes(model: Model, source: Path) -> int:
    """Drop the shapes of inner tensors and infer them anew; return how many of the old ones said something else."""
    from onnx import shape_inference

    noted = list(model.graph.value_info)
    before = {value.name: _lengths(value) for value in noted}
    del model.graph.value_info[:]
    custom = {name for node in model.graph.node if node.domain not in ONNX_DOMAINS for name in node.output}
    kept = [value for value in noted if value.name in custom]  # of ops that nobody else knows
    model.graph.value_info.extend(kept)
    try:
        inferred = shape_inference.infer_shapes(model, data_prop=True)  # weights of a large model are not loaded
    except Exception as error:  # noqa: BLE001 - it raises whatever its C++ code throws
        raise ToolError("the model's shapes can't be inferred", where=source, got=first_line(error), remedy=AGAIN) from None
    del model.graph.value_info[:]
    model.graph.value_info.extend(inferred.graph.value_info)
    after = {value.name: _lengths(value) for value in model.graph.value_info}
    return sum(_differ(shape, after[name]) for name, shape in before.items() if name in after)


def _lengths(value: Any) -> list[int]:
    """Return the lengths of a tensor's axes, 0 where they are free or unknown."""
    return [axis.dim_value for axis in value.type.tensor_type.shape.dim]


def _differ(noted: list[int], inferred: list[int]) -> bool:
    """Return whether two notes of a shape contradict each other."""
    return len(noted) != len(inferred) or any(a and b and a != b for a, b in zip(noted, inferred, strict=True))
