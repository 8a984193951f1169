"""How much memory the activations of a model take, known before a sample of full size runs, and samples that keep it bounded."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from shared.calibration.dataset import TILE_SIZE, CalibrationSet
from shared.command.errors import ToolError
from shared.command.resources import available_memory_bytes, size_text
from shared.formats.onnx_file import inner_graphs
from shared.formats.onnx_graph import readers_of
from shared.formats.tensors import TensorSpec, image_input
from shared.runtime.samples import Guess, sample_inputs
from tools.quantize_onnx.ranges import insert_after, open_session

OVERHEAD = 3  # ONNX Runtime takes memory in steps that double, and kernels want some; measured on SCUNet and NAFNet
LARGEST_SHARE = 0.5  # of the free memory that activations may take
LEAST_TILE = 64  # pixels of a side, at which models of free size are tried
Sizes = dict[str, int]  # tensor -> bytes


def activation_bytes(model: Path, scratch: Path, inputs: Sequence[TensorSpec]) -> int:
    """Return the most memory that activations take at once when every node runs as soon as its inputs are there.

    Images of free size count with LEAST_TILE pixels a side. 0 where it is not known beforehand: other inputs of free length, and
    models that don't run at that size.

    Args:
        model: A repaired model.
        scratch: A file to write a copy to; in the same folder, as weights may lie next to it.
        inputs: Its inputs.
    """
    import onnx

    proto = onnx.load(str(model.absolute()), load_external_data=False)
    if all(-1 not in spec.shape[1:] for spec in inputs):
        sizes = _inferred(proto)
    elif image_input(list(inputs)) is None:
        return 0
    else:
        sizes = _seen(proto, scratch, inputs)
    return int(_most_at_once(proto.graph, sizes) * OVERHEAD)


def _inferred(proto: Any) -> Sizes:
    """Return the bytes of tensors whose shape follows from the inputs' shapes; the first axis is one where it is free."""
    import onnx

    for value in proto.graph.input:
        for dim in value.type.tensor_type.shape.dim[:1]:
            dim.dim_value = dim.dim_value or 1
    graph = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    values = {value.name: value.type.tensor_type for value in (*graph.input, *graph.value_info, *graph.output)}
    shapes = {name: [dim.dim_value for dim in kind.shape.dim] for name, kind in values.items() if kind.elem_type}
    return {name: math.prod(shape) * _width(values[name].elem_type) for name, shape in shapes.items()}


def _seen(proto: Any, scratch: Path, inputs: Sequence[TensorSpec]) -> Sizes:
    """Return the bytes of tensors in a run on a small image; the shapes are made inside the graph."""
    import onnx

    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    values = (*proto.graph.input, *proto.graph.value_info, *proto.graph.output)
    kinds = {value.name: value.type.tensor_type.elem_type for value in values}
    names = [name for node in proto.graph.node for name in node.output if kinds.get(name)]
    added = {}
    for number, name in enumerate(names):
        output = f"edgepress_shape_{number}"
        added[name] = [onnx.helper.make_node("Shape", [name], [output], name=output)]
        copied.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.INT64, None))
    insert_after(copied.graph, added)
    onnx.save_model(copied, str(scratch))
    feed = sample_inputs(list(inputs), 0, Guess(side=LEAST_TILE))
    try:
        shapes = open_session(scratch).run([nodes[0].output[0] for nodes in added.values()], feed)
    except Exception:  # noqa: BLE001 - ONNX Runtime's errors have no class in common; samples of another size may run
        return {}
    found = {name: math.prod(map(int, shape)) * _width(kinds[name]) for name, shape in zip(added, shapes, strict=True)}
    return found | {name: values.nbytes for name, values in feed.items()}


def _width(kind: int) -> int:
    """Return the bytes of an element; texts count nothing."""
    import onnx

    return 0 if kind == onnx.TensorProto.STRING else onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize


def _most_at_once(graph: Any, sizes: Mapping[str, int]) -> int:
    """Return the most bytes of tensors that live at the same time."""
    left = readers_of(graph)
    live = most = sum(sizes.get(value.name, 0) for value in graph.input)
    for node in graph.node:
        live += sum(sizes.get(name, 0) for name in node.output)
        most = max(most, live)
        read = Counter(node.input)
        for inner in inner_graphs(node):
            read.update(readers_of(inner))
        left.subtract(read)
        gone = {name for name in (*read, *node.output) if not left[name]}
        live -= sum(sizes.get(name, 0) for name in gone)
    return most


def bound_samples(samples: CalibrationSet, inputs: Sequence[TensorSpec], needed: int, where: str) -> CalibrationSet:
    """Return a set whose samples take at most LARGEST_SHARE of the free memory: images of free size are cut into smaller tiles.

    Args:
        samples: The set.
        inputs: The model's inputs.
        needed: Memory of activations, as `activation_bytes` gives it.
        where: The model, for messages.

    Raises:
        ToolError: No tile is small enough, or samples of another kind are too large.
    """
    free = available_memory_bytes()
    if free is None or not needed:
        return samples
    allowed = int(free * LARGEST_SHARE)
    is_free = any(-1 in spec.shape[1:] for spec in inputs)
    if is_free and samples.path.suffix != ".npz":
        tile = TILE_SIZE
        while tile > LEAST_TILE and needed * (tile / LEAST_TILE) ** 2 > allowed:
            tile //= 2
        samples, needed = replace(samples, tile=tile), int(needed * (tile / LEAST_TILE) ** 2)
    elif is_free:
        sample = next(samples.samples(list(inputs)), {})
        pixels = max((values.size for values in sample.values()), default=0)
        smallest = max(values.size for values in sample_inputs(list(inputs), 0, Guess(side=LEAST_TILE)).values())
        needed = int(needed * pixels / smallest)
    if needed > allowed:
        raise ToolError(
            "one sample takes more than half of the free memory",
            where=where,
            got=f"about {size_text(needed)} for the activations, {size_text(free)} free",
            remedy="give smaller samples, export the model for a smaller input, or free memory",
        )
    return samples
