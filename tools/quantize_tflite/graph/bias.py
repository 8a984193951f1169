"""Bias correction: take back what quantized weights shift a layer's outputs by on average.

Rounding moves each weight a little. Over real inputs the moves do not cancel: each output channel shifts by the weights' change
times the mean input, which is known beforehand and can be taken off the layer's bias. Costs no byte and no time in the runtime.

Source: Nagel et al., Data-free quantization through weight equalization and bias correction, ICCV 2019, section 4.2; we take the
    mean inputs from samples in the float model, border padding included, instead of deriving them from batch normalization.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.formats.tflite import constant_span, enum_names, tensor_name

Array = NDArray[Any]
Patches = dict[str, Array]  # op scope -> mean input patch: (height, width, channels) of the kernel, (channels,) of a matrix


@dataclass(frozen=True)
class Layer:
    """A layer with weights and a bias, in one model file.

    Args:
        scope: The op's scope.
        kind: CONV_2D, DEPTHWISE_CONV_2D or FULLY_CONNECTED.
        input: Name of its input tensor.
        weights: float32; (out, height, width, in), depthwise (1, height, width, out), fully connected (out, in).
        stored: Type the weights are stored in.
        bias: Where its float32 bias lies in the file: start and end; None where it has none of its own.
        options: The op's table of options.
    """

    scope: str
    kind: str
    input: str
    weights: Array
    stored: str
    bias: tuple[int, int] | None
    options: Any


def layers(content: Any) -> Iterator[Layer]:
    """Yield the layers of a model's bytes."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.Model.GetRootAs(content)
    graphs = [model.Subgraphs(g) for g in range(model.SubgraphsLength())]
    uses = Counter(graph.Tensors(t).Buffer() for graph in graphs for t in range(graph.TensorsLength()))
    for graph in graphs:
        yield from _graph_layers(content, model, graph, uses)


def _graph_layers(content: Any, model: Any, graph: Any, uses: Mapping[int, int]) -> Iterator[Layer]:
    """Yield the layers of a subgraph; `uses` counts the tensors of each buffer in all of them."""
    from ai_edge_litert import schema_py_generated as schema

    ops = [graph.Operators(i) for i in range(graph.OperatorsLength())]
    kinds = [enum_names("BuiltinOperator")[model.OperatorCodes(op.OpcodeIndex()).BuiltinCode()] for op in ops]
    behind = {op.Outputs(0): op.Inputs(0) for op, kind in zip(ops, kinds, strict=True) if kind == "DEQUANTIZE"}
    readers = [op.Inputs(k) for op in ops for k in range(op.InputsLength())]
    tables = {"CONV_2D": schema.Conv2DOptions, "DEPTHWISE_CONV_2D": schema.DepthwiseConv2DOptions, "FULLY_CONNECTED": None}
    for op, kind in zip(ops, kinds, strict=True):
        if kind not in tables or op.InputsLength() < 3 or op.Inputs(2) < 0:
            continue
        place = behind.get(op.Inputs(1), op.Inputs(1))
        weights = _float_values(content, model, graph.Tensors(place))
        if weights is None:
            continue
        bias = graph.Tensors(op.Inputs(2))
        is_own = readers.count(op.Inputs(2)) == 1 and uses[bias.Buffer()] == 1
        is_float = enum_names("TensorType")[bias.Type()] == "FLOAT32"
        span = constant_span(model, bias) if is_own and is_float else None
        stored = enum_names("TensorType")[graph.Tensors(place).Type()]
        options = None
        if (table := tables[kind]) is not None:
            options = table()
            options.Init(op.BuiltinOptions().Bytes, op.BuiltinOptions().Pos)
        scope = "".join(f"{tensor_name(graph.Tensors(op.Outputs(k)))};" for k in range(op.OutputsLength()))
        given = tensor_name(graph.Tensors(op.Inputs(0)))
        yield Layer(scope, kind, given, weights, stored, span, options)


def _float_values(content: Any, model: Any, tensor: Any) -> Array | None:
    """Return a stored constant as float32 in its own shape; None where it is not stored."""
    span = constant_span(model, tensor)
    if span is None:
        return None
    raw = np.frombuffer(content, np.uint8, span[1] - span[0], span[0])
    shape = tensor.ShapeAsNumpy()
    kind = enum_names("TensorType")[tensor.Type()]
    if kind in ("FLOAT32", "FLOAT16"):
        floats: Array = raw.view(kind.lower()).astype(np.float32, copy=False).reshape(shape)
        return floats
    if kind == "INT8":
        values = raw.view(np.int8)
    elif kind == "INT4":  # two in a byte, the lower half first
        values = np.stack([raw.view(np.int8) << 4 >> 4, raw.view(np.int8) >> 4], axis=-1).ravel()[: int(np.prod(shape))]
    else:
        return None
    scales = tensor.Quantization()
    if scales is None or not scales.ScaleLength():  # in blocks: another table
        return None
    along = [1] * len(shape)
    along[scales.QuantizedDimension()] = -1
    scale, zero = scales.ScaleAsNumpy().reshape(along), scales.ZeroPointAsNumpy().reshape(along)
    exact: Array = ((values.reshape(shape) - zero) * scale).astype(np.float32)
    return exact


def mean_patches(content: Any, inputs: Mapping[str, Sequence[tuple[Array, int]]]) -> Patches:
    """Return for each layer the input under its kernel, averaged over samples and positions.

    Args:
        content: The float model's bytes.
        inputs: Tensor name -> for each shape that it has in the samples, the sum over these samples, float, and their number.
    """
    return {layer.scope: _mean_over(layer, inputs[layer.input]) for layer in layers(content) if layer.input in inputs}


def _mean_over(layer: Layer, sums: Sequence[tuple[Array, int]]) -> Array:
    patches = [_mean_patch(layer, total / count) for total, count in sums]
    return np.average(patches, axis=0, weights=[count for _, count in sums])


def _mean_patch(layer: Layer, mean: Array) -> Array:
    if layer.kind == "FULLY_CONNECTED":
        rows: Array = mean.reshape(-1, layer.weights.shape[-1])
        return np.asarray(rows.mean(axis=0))
    kernel = layer.weights.shape[1:3]
    strides = layer.options.StrideH(), layer.options.StrideW()
    dilations = layer.options.DilationHFactor(), layer.options.DilationWFactor()
    is_same = layer.options.Padding() == 0
    image = mean.mean(axis=0)
    places = []
    for axis in range(2):
        size, reach = image.shape[axis], (kernel[axis] - 1) * dilations[axis] + 1
        count = -(-size // strides[axis]) if is_same else (size - reach) // strides[axis] + 1
        before = max((count - 1) * strides[axis] + reach - size, 0) // 2 if is_same else 0
        # For each kernel row (column): the image rows under it, one for each output row; outside lies the padding, zeros.
        places.append(np.arange(kernel[axis])[:, None] * dilations[axis] + np.arange(count) * strides[axis] - before)
    patch = np.zeros((*kernel, image.shape[2]))
    for y, rows in enumerate(places[0]):
        for x, columns in enumerate(places[1]):
            inside = image[rows[(rows >= 0) & (rows < image.shape[0])]][:, columns[(columns >= 0) & (columns < image.shape[1])]]
            patch[y, x] = inside.sum(axis=(0, 1)) / (len(rows) * len(columns))
    return patch


def correct_biases(float_model: Any, quantized: Any, patches: Patches) -> int:
    """Change the biases inside a quantized model's bytes; return of how many layers.

    Args:
        float_model: Bytes of the float model.
        quantized: Writable bytes of the quantized model: a bytearray or a memory-mapped file.
        patches: From `mean_patches` of the float model.
    """
    exact = {layer.scope: layer.weights for layer in layers(float_model) if layer.scope in patches}
    corrected = 0
    for layer in layers(quantized):
        if layer.scope not in exact or layer.bias is None or layer.stored == "FLOAT32":
            continue
        start, end = layer.bias
        bias = np.frombuffer(bytes(quantized[start:end]), np.float32)
        shift = _shift(layer.kind, layer.weights - exact[layer.scope], patches[layer.scope])
        quantized[start:end] = (bias - shift).astype(np.float32).tobytes()
        corrected += 1
    return corrected


def _shift(kind: str, change: Array, patch: Array) -> Array:
    """Return the mean change of each output channel."""
    if kind == "FULLY_CONNECTED":
        return np.asarray(change @ patch)
    if kind == "DEPTHWISE_CONV_2D":
        per_channel: Array = change[0] * np.repeat(patch, change.shape[3] // patch.shape[2], axis=2)
        return np.asarray(per_channel.sum(axis=(0, 1)))
    groups = patch.shape[2] // change.shape[3]
    parts = zip(np.split(change, groups), np.split(patch, groups, axis=2), strict=True)
    return np.concatenate([np.tensordot(of_group, part, axes=3) for of_group, part in parts])
