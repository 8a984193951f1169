"""Faults of onnxruntime.quantization 1.31, mended in the model before it runs.

Each entry gives the symptom; a test shows that the plain library gives a wrong answer or none, and fails when it no longer does,
so that the mend can go.

- A Gemm's beta is dropped from its bias, and its bias of shape (1, N) ends in an exception: `settle_gemms`.
- A tensor that two layers read along different axes gets the scales of the first: `copy_shared_constants`.
- A bias that two layers share gets the scale of the first in QOperator form, and other ops that read a bias get its rounded values:
  `copy_shared_constants`.
- The conversion to float16 casts a tensor once for each float32 op that reads it, under one name: `drop_repeated_nodes`.
- The input of a Relu or Clip gets the range of its output, although it is an output of the model as well; in QOperator form a Clip
  is dropped although others read its input: `kept_activations`.
- The bias of a channel whose weights are next to nothing does not fit in int32: `raise_dead_channels`.
- MatMul with a weight of three axes, or on the left, and ConvTranspose get scales of a wrong shape or none: `weights_only`,
  in `tools.quantize_onnx.graph.weights_only`.
"""

import collections
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.formats.onnx_file import Model, inner_graphs
from shared.formats.onnx_graph import readers_of

Array = NDArray[Any]
BIASED = ("Conv", "ConvTranspose", "Gemm")  # op types whose third input is a bias
MOST_BIAS_STEPS = 2.0**29  # of its scale that a quantized bias may take; int32 holds four times that many
LEVELS = {"int8": 127, "uint8": 255}  # steps of a weight's scale that its largest value takes
INPUT_LEVELS = {"int8": 255, "uint8": 255, "int16": 65535, "uint16": 65535}


def settle_gemms(model: Model, folder: Path) -> int:
    """Give each Gemm factors of one and a bias of shape (N,), in place; return how many were changed.

    alpha goes into the weight, beta into the bias; a bias of a value per row becomes an Add of its own.

    Args:
        model: The model.
        folder: Where files of its weights lie.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    inputs = {value.name for value in graph.input}
    count = 0
    nodes: list[Any] = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type != "Gemm" or node.domain:
            continue
        alpha, beta = (attribute_of(node, name, 1.0) for name in ("alpha", "beta"))
        has_bias = len(node.input) > 2 and bool(node.input[2])
        weight = constants.get(node.input[1]) if node.input[1] not in inputs else None
        if weight is None or weight.data_type != weight.FLOAT:
            continue
        bias = constants.get(node.input[2]) if has_bias and node.input[2] not in inputs else None
        width = weight.dims[0 if attribute_of(node, "transB", 0) else 1]
        is_settled = alpha == 1 and (not has_bias or (beta == 1 and (bias is None or list(bias.dims) == [width])))
        if is_settled:
            continue
        count += 1
        if alpha != 1:
            node.input[1] = f"{node.name}_scaled_weight"
            scaled_weight = numpy_helper.to_array(weight, str(folder)) * np.float32(alpha)
            graph.initializer.append(numpy_helper.from_array(scaled_weight, node.input[1]))
        values = None if bias is None else numpy_helper.to_array(bias, str(folder)) * np.float32(beta)
        if values is not None and (values.size == 1 or values.shape in ((width,), (1, width))):
            node.input[2] = f"{node.name}_settled_bias"
            graph.initializer.append(numpy_helper.from_array(np.broadcast_to(values.ravel(), (width,)).copy(), node.input[2]))
        elif has_bias:
            product, scaled = f"{node.output[0]}_without_bias", node.input[2]
            if beta != 1:
                factor, scaled = f"{node.name}_beta", f"{node.name}_scaled_bias"
                graph.initializer.append(numpy_helper.from_array(np.array(beta, np.float32), factor))
                nodes.append(helper.make_node("Mul", [node.input[2], factor], [scaled], name=scaled))
            nodes.append(helper.make_node("Add", [product, scaled], [node.output[0]], name=f"{node.name}_bias"))
            node.output[0] = product
            del node.input[2:]
        kept = [attribute for attribute in node.attribute if attribute.name not in ("alpha", "beta")]
        del node.attribute[:]
        node.attribute.extend(kept)
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unread(graph)
    return count


def drop_unread(graph: Any) -> None:
    """Take out constants that nothing reads any more."""
    read = readers_of(graph) + collections.Counter(value.name for value in graph.input)
    kept = [tensor for tensor in graph.initializer if read[tensor.name]]
    if len(kept) < len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(kept)


def copy_shared_constants(model: Model) -> int:
    """Give nodes that read one constant in different ways a copy each, in place; return the copies made.

    Biases are always copied: their scale is that of the layer's input. Weights are where the axis of their scales differs, or where
    an op that is no layer reads them, too: it would read rounded values.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    uses: dict[str, dict[object, str]] = collections.defaultdict(dict)
    count = 0
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name not in constants:
                continue
            is_bias = node.op_type in BIASED and place == 2
            use: object = node.name if is_bias else _scale_axis(node, place)
            known = uses[name]
            if use in known:
                node.input[place] = known[use]
                continue
            if known:
                copy = graph.initializer.add()
                copy.CopyFrom(constants[name])
                copy.name = f"{name}_of_{node.name}"
                node.input[place] = copy.name
                count += 1
            known[use] = node.input[place]
    return count


def _scale_axis(node: Any, place: int) -> tuple[str, int] | None:
    """Return along which axis a layer's weight gets its scales; None, the same for all, where it is no weight of a layer."""
    if node.op_type == "Conv" and place == 1:
        return "Conv", 0
    if node.op_type == "ConvTranspose" and place == 1:
        return "ConvTranspose", attribute_of(node, "group", 1)
    if node.op_type == "Gemm" and place == 1:
        return "matrix", 0 if attribute_of(node, "transB", 0) else 1
    if node.op_type == "MatMul" and place < 2:
        return "matrix" if place else "left", 1
    return None


def kept_activations(model: Model, *, is_qdq: bool) -> Iterator[str]:
    """Yield the names of Relus and Clips that must stay in float, as something else reads their inputs, too.

    In QDQ form that is an output of the model or a branch; in QOperator form, where the library drops the op, any other reader.
    """
    graph = model.graph
    readers = readers_of(graph)
    outer = {value.name for value in graph.output}
    for node in graph.node:
        for inner in inner_graphs(node):
            outer |= set(readers_of(inner))
    for node in graph.node:
        if node.op_type in ("Relu", "Clip") and (node.input[0] in outer or (not is_qdq and readers[node.input[0]] > 1)):
            yield node.name


def raise_dead_channels(
    model: Model,
    folder: Path,
    ranges: Mapping[str, tuple[float, float]],
    weight_type: str,
    activation_type: str,
    *,
    per_channel: bool,
) -> int:
    """Raise one weight of each channel whose weights are too small for its bias, in place; return the number of channels.

    A bias is rounded to steps of input scale times weight scale. One weight of a channel is raised until the bias takes at most
    MOST_BIAS_STEPS of them; that changes the channel by less than a five-thousandth of its bias.

    Args:
        model: The model.
        folder: Where files of its weights lie.
        ranges: Smallest and largest value of each activation.
        weight_type: Type that weights get.
        activation_type: Type that activations get.
        per_channel: Whether each output channel has a scale of its own.
    """
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    count = 0
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm") or len(node.input) < 3 or node.input[0] not in ranges:
            continue
        weight, bias = constants.get(node.input[1]), constants.get(node.input[2])
        if weight is None or bias is None or weight.data_type != weight.FLOAT:
            continue
        low, high = ranges[node.input[0]]
        step = max(high, 0.0) - min(low, 0.0)
        if step <= 0:
            continue
        step /= INPUT_LEVELS[activation_type]
        axis = 0 if node.op_type == "Conv" or attribute_of(node, "transB", 0) else 1
        biases = np.abs(numpy_helper.to_array(bias, str(folder)).astype(np.float64)).ravel()
        values = np.moveaxis(numpy_helper.to_array(weight, str(folder)), axis, 0)
        largest = np.abs(values.reshape(len(values), -1)).max(axis=1).astype(np.float64)
        if not per_channel:
            biases, largest = np.full_like(biases, biases.max(initial=0)), np.full_like(largest, largest.max(initial=0))
        if len(biases) != len(values):
            continue
        least = LEVELS[weight_type] * biases / (MOST_BIAS_STEPS * step)
        dead = np.flatnonzero(largest < least)
        if len(dead):
            raised = values.copy()
            raised.reshape(len(values), -1)[dead[: None if per_channel else 1], 0] = least[dead[: None if per_channel else 1]]
            weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(np.moveaxis(raised, 0, axis)), weight.name))
            count += len(dead)
    return count


def drop_repeated_nodes(model: Model) -> int:
    """Take out, in place, nodes that make a tensor which an earlier node makes; return how many."""
    made: set[str] = set()
    kept = []
    for node in model.graph.node:
        if not set(node.output) & made:
            kept.append(node)
        made |= set(node.output)
    count = len(model.graph.node) - len(kept)
    if count:
        del model.graph.node[:]
        model.graph.node.extend(kept)
    return count


def attribute_of(node: Any, name: str, default: Any) -> Any:
    """Return the value of a node's attribute."""
    from onnx import helper

    return next((helper.get_attribute_value(attribute) for attribute in node.attribute if attribute.name == name), default)
