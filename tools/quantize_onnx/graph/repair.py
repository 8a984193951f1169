"""Make an ONNX model of unknown origin one that quantizers can read, with the same answers.

Such models have, and ONNX Runtime 1.31 makes of it otherwise: opsets before 13 (per-channel scales that do not load), weights
listed as inputs (nothing is folded, and the float32 model itself is several times slower), nameless nodes (excluding one excludes
all), shapes noted by exporters that contradict inference, weights in Constant nodes, functions, sparse tensors or computed from
other constants (not seen), weights in float16 (several failures), batch normalization after convolutions (stays between them in
float), outputs that are constants (renamed).
"""

import collections
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.command.errors import ToolError, plain_reason
from shared.formats.onnx_file import AGAIN, MAX_PROTOBUF_BYTES, Model, external_files, read_model
from shared.formats.onnx_graph import is_weight, node_names
from tools.quantize_onnx.graph.folding import fold_batchnorms, fold_constants
from tools.quantize_onnx.graph.forms import densify, inline_functions, separate_constant_outputs, unlist_weights, widen_halves
from tools.quantize_onnx.graph.mends import copy_shared_constants, settle_gemms

LEAST_OPSET = 13  # DequantizeLinear has an axis from here on
OPSET = 17  # what older models become; runtimes of 2022 and later read it
LAST_PLAIN_RESIZE = 10  # up to this opset Resize and Upsample knew one way only
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
        functions: Functions of its own whose bodies took the place of the calls.
        sparse: Sparse constants written out.
        halves: Constants widened from float16 or bfloat16 to float32.
        outputs: Constants that are outputs, given out by a node of their own.
        folded: Nodes whose results are constants, or that change nothing.
        constants: Weights moved out of Constant nodes.
        batchnorms: Batch normalizations folded into the layers before them.
        gemms: Gemms whose factors went into their constants, or whose bias was given another shape.
        copies: Copies of constants that layers shared and read in different ways.
        shapes: Shapes that contradicted inference.
    """

    opset: int = 0
    listed_weights: int = 0
    nameless: int = 0
    functions: int = 0
    sparse: int = 0
    halves: int = 0
    outputs: int = 0
    folded: int = 0
    constants: int = 0
    batchnorms: int = 0
    gemms: int = 0
    copies: int = 0
    shapes: int = 0

    def __str__(self) -> str:
        counted = [
            (self.opset, f"opset {self.opset} upgraded to {OPSET}"),
            (self.listed_weights, f"{self.listed_weights} weights taken out of the inputs"),
            (self.nameless, f"{self.nameless} nodes named"),
            (self.functions, f"{self.functions} functions inlined"),
            (self.sparse, f"{self.sparse} sparse constants written out"),
            (self.halves, f"{self.halves} constants widened to float32"),
            (self.outputs, f"{self.outputs} constant outputs given out by a node"),
            (self.folded, f"{self.folded} nodes folded into constants"),
            (self.constants, f"{self.constants} weights taken out of Constant nodes"),
            (self.batchnorms, f"{self.batchnorms} batch normalizations folded"),
            (self.gemms, f"{self.gemms} factors of Gemms folded"),
            (self.copies, f"{self.copies} shared constants copied"),
            (self.shapes, f"{self.shapes} stale shapes inferred anew"),
        ]
        return ", ".join(text for count, text in counted if count)


def repair(source: Path, target: Path, *, keeps_halves: bool = False) -> Repairs:
    """Write the repaired model to `target`, the weights of a large one next to it, and return what was repaired.

    Args:
        source: The model.
        target: The file to write; its folder holds intermediate files for a while.
        keeps_halves: Whether weights in float16 stay so.

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
    functions, model = inline_functions(model, source)
    listed = unlist_weights(model)
    sparse = halves = folded = 0
    if not is_large:
        sparse, halves = densify(model), 0 if keeps_halves else widen_halves(model)
        folded, model = fold_constants(model, target.parent)
    opset, model = _upgrade(model, source, is_large=is_large)
    constants = _hoist_constants(model)
    batchnorms = 0 if is_large else fold_batchnorms(model)
    outputs = separate_constant_outputs(model)
    _name_nodes(model)  # what inlining and upgrading have added
    gemms, copies = settle_gemms(model, source.parent), copy_shared_constants(model)
    shapes = _infer_shapes(model, source)
    write(model, target, weights_of=source if is_large else None)
    return Repairs(
        opset, listed, nameless, functions, sparse, halves, outputs, folded, constants, batchnorms, gemms, copies, shapes
    )


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
        raise ToolError(f"opset {opset} can't be upgraded", where=source, got=plain_reason(error), remedy=remedy) from None
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
        raise ToolError("the model's shapes can't be inferred", where=source, got=plain_reason(error), remedy=AGAIN) from None
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
