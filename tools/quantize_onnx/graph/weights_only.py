"""Quantize the weights of layers that onnxruntime.quantization 1.31 has no kernel for, and compute with them in float32."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.formats.onnx_file import Model
from tools.quantize_onnx.graph.mends import attribute_of, drop_unread

Array = NDArray[Any]


def weights_only(model: Model) -> dict[str, tuple[int, int | None]]:
    """Return layer -> place of its weight, and axis of its scales (None: one scale), for layers whose weights alone are quantized.

    They are computed in float32: the library knows no kernel for ConvTranspose, and none for these matrix products.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == tensor.FLOAT}
    found: dict[str, tuple[int, int | None]] = {}
    for node in model.graph.node:
        if node.op_type == "ConvTranspose" and node.input[1] in constants:
            found[node.name] = 1, 1
        if node.op_type == "MatMul":
            left, right = (name in constants for name in node.input)
            if right and not left and len(constants[node.input[1]].dims) > 2:
                found[node.name] = 1, None
            if left and not right and len(constants[node.input[0]].dims) > 1:
                found[node.name] = 0, None
    return found


def quantize_weights_only(product: Model, layers: Mapping[str, tuple[int, int | None]], floats: Collection[str]) -> int:
    """Quantize, in place, the weights of the layers that `weights_only` found to int8; return how many.

    Args:
        product: The model.
        layers: Layer -> place of its weight and axis of its scales.
        floats: Layers that stay in float.
    """
    from onnx import numpy_helper

    graph = product.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[Any] = []
    done: dict[str, list[Any]] = {}
    for node in graph.node:
        place, axis = layers.get(node.name, (0, None))
        if node.name not in layers or node.name in floats or node.input[place] not in constants:
            nodes.append(node)
            continue
        name = node.input[place]
        if name not in done:
            values = numpy_helper.to_array(constants[name])
            groups = attribute_of(node, "group", 1) if axis is not None else 1
            small, scale, restore = _quantized(name, values, axis, groups)
            graph.initializer.extend([small, *scale])
            done[name] = restore
            nodes += restore
        node.input[place] = done[name][-1].output[0]
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unread(graph)
    return len(done)


def _quantized(name: str, values: Array, axis: int | None, groups: int) -> tuple[Any, list[Any], list[Any]]:
    """Return a weight in int8, its scale and other constants, and the nodes that restore the weight.

    A grouped ConvTranspose has a weight of shape (I, O / groups, ...). It is kept as (O, I / groups, ...), with one scale for each
    output, and turned back.
    """
    from onnx import helper, numpy_helper

    parts = [values.shape[0] // groups, *values.shape[1:]]
    turned = values.reshape(groups, *parts).swapaxes(1, 2) if groups > 1 else values
    flat = turned.reshape(groups * parts[1], parts[0], *parts[2:]) if groups > 1 else values
    place = axis if groups == 1 else 0
    others = tuple(number for number in range(flat.ndim) if number != place)
    scale = np.abs(flat).max(axis=others if place is not None else None, keepdims=True) / np.float32(127)
    scale = np.where(scale > 0, scale, 1).astype(np.float32)
    small = np.clip(np.rint(flat / scale), -127, 127).astype(np.int8)
    settled = scale.ravel() if place is not None else scale.reshape(())
    tensors = [numpy_helper.from_array(settled, f"{name}_scale")]
    restored = f"{name}_restored"
    attributes: dict[str, Any] = {} if place is None else {"axis": place}
    restore = [
        helper.make_node("DequantizeLinear", [f"{name}_quantized", f"{name}_scale"], [restored], name=restored, **attributes)
    ]
    if groups > 1:
        for step, lengths in (("split", [groups, parts[1], parts[0], *parts[2:]]), ("joined", list(values.shape))):
            tensors.append(numpy_helper.from_array(np.array(lengths, np.int64), f"{name}_{step}_shape"))
        order = [0, 2, 1, *range(3, len(parts) + 1)]
        restore += [
            helper.make_node("Reshape", [restored, f"{name}_split_shape"], [f"{name}_split"], name=f"{name}_split"),
            helper.make_node("Transpose", [f"{name}_split"], [f"{name}_turned"], name=f"{name}_turned", perm=order),
            helper.make_node("Reshape", [f"{name}_turned", f"{name}_joined_shape"], [f"{name}_joined"], name=f"{name}_joined"),
        ]
    return numpy_helper.from_array(small, f"{name}_quantized"), tensors, restore
