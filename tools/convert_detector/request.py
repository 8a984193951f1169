"""What convert_detector's options mean: form and format of the product, and the guides' names of products."""

import itertools
import math
from enum import StrEnum
from pathlib import Path

from shared.command.errors import ToolError
from shared.files.plan import require_output_free
from shared.networks.card import Card, InputForm, Vit

BYTES_PER_PARAMETER = 4
STEM_KERNEL = 4  # pixels
TOTAL_HALVING = 8  # of the three downsamplings after the stem


class Precision(StrEnum):
    """What the product computes with; the names of quantize_tflite's aliases."""

    NONE = "none"
    FP16 = "fp16"
    INT8 = "int8"
    INT8_WEIGHT_ONLY = "int8-weight-only"
    INT4 = "int4"


SHARES = {  # of the float32 weights' bytes, at most
    Precision.NONE: 1.0,
    Precision.FP16: 0.52,
    Precision.INT8: 0.3,
    Precision.INT8_WEIGHT_ONLY: 0.3,
    Precision.INT4: 0.4,
}


class ModelFormat(StrEnum):
    """What the product is for: LiteRT, or ONNX Runtime."""

    TFLITE = "tflite"
    ONNX = "onnx"


class InputLayout(StrEnum):
    """Order of the axes of the image."""

    NCHW = "nchw"
    NHWC = "nhwc"


def file_name(
    card: Card, form: InputForm, precision: Precision, *, rehearsal: bool, model_format: ModelFormat = ModelFormat.TFLITE
) -> str:
    """Return the guides' name of a detector, such as chunkyseal_detector_chunkyseal_256_int8.tflite."""
    marks = ("rehearsal" * rehearsal, str(form.size), "nhwc" * (form.layout == "nhwc"), "resize" * form.resize)
    return joined(card.output_prefix, *marks, "" if precision is Precision.NONE else precision.value, suffix=model_format)


def joined(*parts: str, suffix: ModelFormat) -> str:
    """Return a file name of all parts that are not empty."""
    return "_".join(part for part in parts if part) + f".{suffix.value}"


def choose_format(asked: ModelFormat | None, output: Path | None, quantize: Precision, *, dynamic_batch: bool) -> ModelFormat:
    """Return the product's format; raise ToolError for options that don't go with it."""
    suffix = output.suffix.lstrip(".") if output is not None else ""
    chosen = asked or (ModelFormat.ONNX if suffix == ModelFormat.ONNX else ModelFormat.TFLITE)
    if suffix in set(ModelFormat) and suffix != chosen:
        raise ToolError("--format differs from the output's name", where=output, got=chosen.value)
    if chosen is ModelFormat.ONNX and suffix not in ("", "onnx"):
        raise ToolError("an ONNX model's name must end in .onnx", where=output)
    if chosen is ModelFormat.ONNX and quantize is not Precision.NONE:
        remedy = "convert without --quantize, then run quantize_onnx, which needs samples for what is fast"
        raise ToolError("--quantize is for TFLite", got=f"--format onnx --quantize {quantize.value}", remedy=remedy)
    if chosen is ModelFormat.TFLITE and dynamic_batch:
        raise ToolError("--dynamic-batch is for ONNX", remedy="add --format onnx, or leave it out")
    return chosen


def require_image_size(card: Card, form: InputForm) -> None:
    """Raise ToolError unless enough pixels reach the decoder, which pads by reflection: 2 by 2 after all strides.

    A transformer takes its own size alone: its positions are a table for it.
    """
    encoder = card.encoder
    if isinstance(encoder, Vit):
        if not form.resize and form.size != card.image_size:
            remedy = "leave out --image-size, or add --no-simple"
            raise ToolError("this network takes images of one size", got=form.size, expected=card.image_size, remedy=remedy)
        return
    smallest = STEM_KERNEL + encoder.stem_stride * (2 * TOTAL_HALVING - 1)
    if not form.resize and form.size < smallest:
        raise ToolError("the image is too small for the network", got=f"{form.size} pixels", expected=f"at least {smallest}")


def require_outputs_free(outputs: set[Path], weights: Path, *, wants_float: bool, overwrite: bool, makes_folder: bool) -> None:
    """Raise ToolError now for what a later step would be refused."""
    if len(outputs) == 1 and not wants_float:
        raise ToolError("the quantized model would replace its float32 model", where=outputs.pop(), remedy="choose another -o")
    for output in outputs:
        if output.exists() and weights.exists() and output.samefile(weights):
            raise ToolError("the output is the checkpoint", where=output, remedy="choose another file with -o")
        require_output_free(output, overwrite=overwrite, makes_folder=makes_folder)


def weights_bytes(card: Card) -> int:
    """Return the bytes of a card's float32 weights, from its sizes: 8 or 12 dim^2 per block, and the convolutions around."""
    encoder = card.encoder
    if isinstance(encoder, Vit):
        channels, tokens = encoder.channels, (card.image_size // encoder.patch) ** 2
        blocks = encoder.blocks * (12 * channels**2 + 13 * channels + 4 * math.isqrt(tokens) * channels // encoder.heads)
        ends = channels * (3 * encoder.patch**2 + tokens + encoder.features) + 18 * encoder.features**2
        return BYTES_PER_PARAMETER * (blocks + ends + encoder.features * (1 + card.nbits))
    widths = list(encoder.dims)
    blocks = sum(depth * (8 * dim * dim + 62 * dim) for depth, dim in zip(encoder.depths, widths, strict=True))
    halvings = sum(4 * a * b for a, b in itertools.pairwise(widths))
    decoder = 9 * widths[3] ** 2 + widths[3] * (1 + card.nbits)
    return BYTES_PER_PARAMETER * (blocks + halvings + decoder)
