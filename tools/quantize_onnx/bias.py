"""Bias correction for ONNX models: take back what quantized weights shift a layer's outputs by on average.

Source: as `tools.quantize_tflite.graph.bias`, Nagel et al. 2019, section 4.2; mean inputs come from samples in the float model.
    Border padding counts as further input, an error that is small in layers with little padding.

Letters in shapes: O outputs, I inputs of a group, G groups, K inputs.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.formats.onnx_file import Model
from tools.quantize_onnx.ranges import insert_after, open_session

Array = NDArray[Any]
LAYERS = ("Conv", "MatMul", "Gemm")
ROUNDING = 1.01  # scales that a weight can be off: half by rounding, a whole one at the end of its range


def mean_inputs(model: Path, augmented: Path, samples: Iterable[Mapping[str, Array]]) -> dict[str, Array]:
    """Return node name -> mean input per channel, float32 (I * G,) of a Conv, (K,) of a MatMul or Gemm, for layers with weights.

    Args:
        model: The repaired float32 model.
        augmented: A file to write a copy to that gives the means out; in the same folder, as weights may lie next to it.
        samples: Inputs by name.
    """
    import onnx

    proto = onnx.load(str(model.absolute()), load_external_data=False)
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    nodes: dict[str, str] = {}
    added: dict[str, list[Any]] = {}
    opset = next(entry.version for entry in proto.opset_import if not entry.domain)
    for node in proto.graph.node:
        if node.op_type in LAYERS and node.input[1] in constants and node.input[0] not in constants:
            lengths = list(constants[node.input[1]].dims)
            if node.op_type == "MatMul" and len(lengths) != 2:
                continue
            name = f"edgepress_mean_{len(nodes)}"
            rows = lengths[0] if node.op_type == "MatMul" else None
            added.setdefault(node.input[0], []).extend(_mean_nodes(node.input[0], name, _axes(node, len(lengths)), opset, rows))
            proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
            nodes[name] = node.name
    insert_after(proto.graph, added)
    onnx.save_model(proto, str(augmented))
    if not nodes:
        return {}
    session = open_session(augmented)
    sums: dict[str, Array] = {}
    count = 0
    for feed in samples:
        for name, values in zip(nodes, session.run(list(nodes), dict(feed)), strict=True):
            sums[nodes[name]] = sums.get(nodes[name], 0.0) + values.astype(np.float64).ravel()
        count += 1
    return {name: total / max(count, 1) for name, total in sums.items() if np.isfinite(total).all()}


def _axes(node: Any, rank: int) -> list[int]:
    """Return the axes of an input to average over; that of a MatMul is made one of rows first."""
    if node.op_type == "Conv":
        return [0, *range(2, rank)]
    return [1] if node.op_type == "Gemm" and _integer(node, "transA", 0) else [0]


def _mean_nodes(tensor: str, name: str, axes: list[int], opset: int, rows: int | None) -> list[Any]:
    """Return the nodes that average a tensor; one with rows of K values, whatever its leading axes, where `rows` is K."""
    import onnx

    made = []
    if rows is not None:  # (..., K) -> (M, K)
        shape = onnx.numpy_helper.from_array(np.array([-1, rows], np.int64))
        made += [
            onnx.helper.make_node("Constant", [], [f"{name}_to"], value=shape),
            onnx.helper.make_node("Reshape", [tensor, f"{name}_to"], [f"{name}_flat"]),
        ]
        tensor = f"{name}_flat"
    if opset < 18:
        return [*made, onnx.helper.make_node("ReduceMean", [tensor], [name], axes=axes, keepdims=0)]
    value = onnx.numpy_helper.from_array(np.array(axes, np.int64))
    made.append(onnx.helper.make_node("Constant", [], [f"{name}_axes"], value=value))
    return [*made, onnx.helper.make_node("ReduceMean", [tensor, f"{name}_axes"], [name], keepdims=0)]


def correct(model: Path, product: Model, means: Mapping[str, Array]) -> int:
    """Take off a quantized model's biases, in place, what its weights shift outputs by on average; return how many were changed.

    A MatMul's bias is the constant of the Add that alone reads it. Biases in int32 move by whole steps of their scale. Layers
    without a bias of their own stay as they are.

    Args:
        model: The repaired float32 model.
        product: The same model quantized by onnxruntime.quantization, which keeps a tensor T as T_quantized, T_scale and
            T_zero_point, or T_quantized_scale where it is a bias.
        means: Of `mean_inputs`.
    """
    import onnx
    from onnx import numpy_helper

    proto = onnx.load(str(model.absolute()), load_external_data=False)
    folder = str(model.absolute().parent)
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    small = {tensor.name: tensor for tensor in product.graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in proto.graph.output}
    count = 0
    for node in proto.graph.node:
        if node.name not in means or f"{node.input[1]}_quantized" not in small:
            continue
        bias = _bias(node, readers, outputs)
        if bias not in constants or len(readers[bias]) != 1:
            continue
        weight = numpy_helper.to_array(constants[node.input[1]], folder).astype(np.float64)
        error = _weight_error(small, node.input[1], weight, _channel_axis(node))
        shift = np.zeros(0) if error is None else _expected(node, error, means[node.name])
        if shift.any() and list(constants[bias].dims) == list(shift.shape):
            count += _moved(small, bias, shift)
    return count


def _bias(node: Any, readers: Mapping[str, list[Any]], outputs: set[str]) -> str:
    """Return the name of a layer's bias, empty where it has none."""
    if node.op_type == "MatMul":
        behind = readers.get(node.output[0], [])
        if len(behind) != 1 or behind[0].op_type != "Add" or node.output[0] in outputs:
            return ""
        return str(next((name for name in behind[0].input if name != node.output[0]), ""))
    scaled = node.op_type == "Gemm" and _float(node, "beta", 1.0) != 1.0
    return str(node.input[2]) if len(node.input) > 2 and not scaled else ""


def _moved(small: Mapping[str, Any], bias: str, shift: Array) -> bool:
    """Subtract a shift from a bias of the product, float32 or int32; return whether it has it in either form."""
    from onnx import TensorProto, numpy_helper

    if bias in small and small[bias].data_type == TensorProto.FLOAT:
        values = numpy_helper.to_array(small[bias])
        small[bias].CopyFrom(numpy_helper.from_array((values - shift).astype(np.float32), bias))
        return True
    name, scale_name = f"{bias}_quantized", f"{bias}_quantized_scale"
    if name in small and scale_name in small and small[name].data_type == TensorProto.INT32:
        scale = numpy_helper.to_array(small[scale_name]).astype(np.float64)
        steps = numpy_helper.to_array(small[name]).astype(np.float64) - shift / scale
        limits = np.iinfo(np.int32)
        small[name].CopyFrom(numpy_helper.from_array(np.clip(np.rint(steps), limits.min, limits.max).astype(np.int32), name))
        return True
    return False


def _channel_axis(node: Any) -> int:
    return 0 if node.op_type == "Conv" or (node.op_type == "Gemm" and _integer(node, "transB", 0)) else -1


def _weight_error(small: Mapping[str, Any], name: str, weight: Array, axis: int) -> Array | None:
    """Return what rounding added to a weight, in its own shape; None where the product holds it in a form not known here.

    The library transposes some matrices. A square one does not show that by its shape, but every form but the right one is
    further off than rounding can be.
    """
    from onnx import numpy_helper

    values, scale, zero = (
        numpy_helper.to_array(small[f"{name}_{part}"]).astype(np.float64) for part in ("quantized", "scale", "zero_point")
    )
    for stored, place in ((weight, axis), (weight.T, -1 - axis if weight.ndim == 2 else axis)):
        if values.shape != stored.shape or (scale.size > 1 and scale.size != stored.shape[place]):
            continue
        wide = [1] * stored.ndim
        wide[place] = -1
        steps = scale.reshape(wide)
        error = (values - zero.reshape(wide)) * steps - stored
        if (np.abs(error) <= ROUNDING * steps).all():
            return error if stored is weight else error.T
    return None


def _expected(node: Any, error: Array, mean: Array) -> Array:
    """Return the mean shift of each output channel."""
    if node.op_type == "Conv":  # (O, I, ...) with O in G groups
        groups = _integer(node, "group", 1)
        per_input = error.reshape(*error.shape[:2], -1).sum(axis=2).reshape(groups, -1, error.shape[1])  # (G, O / G, I)
        return np.asarray(np.einsum("goi,gi->go", per_input, mean.reshape(groups, -1)).ravel())
    alpha = _float(node, "alpha", 1.0) if node.op_type == "Gemm" else 1.0
    return np.asarray(alpha * (error @ mean if _channel_axis(node) == 0 else mean @ error))  # (O, K) or (K, O)


def _integer(node: Any, name: str, default: int) -> int:
    return int(next((attribute.i for attribute in node.attribute if attribute.name == name), default))


def _float(node: Any, name: str, default: float) -> float:
    return float(next((attribute.f for attribute in node.attribute if attribute.name == name), default))
