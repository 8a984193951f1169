"""What a quantizer did to the ops of an ONNX model, and why it left the rest."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from shared.formats.onnx_file import Model
from shared.formats.onnx_graph import OnnxOp
from shared.quantize.coverage import OpLeft, OpTypeCoverage
from tools.quantize_onnx.settings import Settings


def measure_coverage(
    before: Sequence[OnnxOp], product: Model, wanted: Settings, reasons: Mapping[str, str]
) -> tuple[list[OpTypeCoverage], list[OpLeft]]:
    """Compare a model's ops with the product's weights: one row per op type, largest weights first, and each op that was left.

    A weight W is quantized where the product holds W_quantized in its place, or W itself in float16.

    Args:
        before: Ops of the repaired model.
        product: The quantized model.
        wanted: What was asked for.
        reasons: Name of a node that stays in float -> why.
    """
    after = {tensor.name: tensor for tensor in product.graph.initializer}
    rows, left = [], []
    for op_type in dict.fromkeys(op.op_type for op in before):
        ops = [op for op in before if op.op_type == op_type and op.weight is not None]
        if not ops:
            continue
        now = {op.name: _now(op, after) for op in ops}
        done = [op for op in ops if now[op.name][0] != op.dtype and now[op.name][1] < op.weight_bytes]
        kept = [op for op in ops if op not in done]
        why = {op.name: _why_left(op, wanted, reasons) for op in kept}
        left += [OpLeft(op.op_type, op.name, op.weight_bytes, why[op.name]) for op in kept]
        rows.append(
            OpTypeCoverage(
                op_type=op_type,
                ops=len(ops),
                quantized=len(done),
                weight_bytes=sum(op.weight_bytes for op in ops),
                quantized_weight_bytes=sum(op.weight_bytes for op in done),
                bytes_after=sum(now[op.name][1] for op in ops),
                dtypes=sorted({now[op.name][0] for op in ops}),
                reason="; ".join(f"{count} x {reason}" for reason, count in Counter(why.values()).most_common()),
            )
        )
    return sorted(rows, key=lambda row: -row.weight_bytes), sorted(left, key=lambda op: -op.weight_bytes)


def _now(op: OnnxOp, after: Mapping[str, Any]) -> tuple[str, int]:
    """Return type and bytes of an op's largest constant in the product."""
    import onnx

    from shared.formats.onnx_file import tensor_bytes

    name = str(op.weight)
    if op.is_inner:
        return op.dtype, op.weight_bytes
    tensor = after.get(f"{name}_quantized") if name not in after else after[name]
    if tensor is None:
        return op.dtype, op.weight_bytes
    return onnx.TensorProto.DataType.Name(tensor.data_type), tensor_bytes(tensor)


def _why_left(op: OnnxOp, wanted: Settings, reasons: Mapping[str, str]) -> str:
    inner = {op.name: "inside a branch or loop, which the quantizer does not enter"} if op.is_inner else {}
    if known := {**reasons, **inner}.get(op.name):
        return known
    if op.dtype not in ("FLOAT", "DOUBLE"):
        return f"weights are {op.dtype} already"
    if op.op_type in wanted.kept_op_types:
        return "excluded"
    if wanted.mode == "fp16":
        return "float16 is not safe or not known for this op"
    if op.op_type not in wanted.op_types:
        return "not among the op types to quantize, see --op-type"
    return "ONNX Runtime's quantizer left it"
