"""What ONNX Runtime's quantizer is asked for: the choices that decide a product's bytes."""

from dataclasses import dataclass
from typing import Literal

from tools.quantize_onnx.ranges import CalibrationMethod

Mode = Literal["dynamic", "static", "fp16"]
IntegerType = Literal["int8", "uint8", "int16", "uint16"]
Form = Literal["qdq", "qoperator"]

LAYERS = ("Conv", "MatMul", "Gemm")  # where weights and time are
# Ops between layers that pass 8 bits through: left in float they would cost a conversion on either side.
PASSING = ("Relu", "Clip", "MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "Gather")
RECURRENT = ("LSTM", "Attention", "EmbedLayerNormalization")  # known to dynamic quantization only


@dataclass(frozen=True)
class Settings:
    """How to quantize a model.

    Args:
        mode: `dynamic` measures activations at run time, `static` on samples beforehand, `fp16` halves floats.
        op_types: What is quantized.
        form: `qdq` puts pairs of QuantizeLinear and DequantizeLinear around float ops, `qoperator` integer ops in their place.
        activation_type: Of static models.
        weight_type: Of dynamic and static models.
        per_channel: Whether each output channel of a weight has a scale of its own.
        reduce_range: Whether weights take 7 bits, for x86 CPUs before VNNI, whose 8-bit sums overflow.
        symmetric_activations: Whether zero is the middle of an activation's range.
        symmetric_weights: The same for weights; None as their type wants it.
        method: How the ranges of activations are found.
        kept: Names of nodes that stay in float.
        kept_op_types: Op types that stay in float.
    """

    mode: Mode
    op_types: tuple[str, ...] = (*LAYERS, *PASSING, *RECURRENT)
    form: Form = "qdq"
    activation_type: IntegerType = "uint8"
    weight_type: Literal["int8", "uint8"] = "int8"
    per_channel: bool = True
    reduce_range: bool = False
    symmetric_activations: bool = False
    symmetric_weights: bool | None = None
    method: CalibrationMethod = "minmax"
    kept: tuple[str, ...] = ()
    kept_op_types: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.mode == "fp16":
            return "weights and activations float16, inputs and outputs float32"
        weights = f"weights {self.weight_type} {'per channel' if self.per_channel else 'per tensor'}"
        if self.reduce_range:
            weights += ", 7 bits"
        if self.mode == "dynamic":
            return f"{weights}, activations uint8 with ranges found at run time"
        form = "QDQ" if self.form == "qdq" else "QOperator"
        return f"{form}, {weights}, activations {self.activation_type} with ranges found beforehand ({self.method})"
