"""Convert a watermark detector to TFLite or ONNX, checked against torch before the file gets its name.

Example:
    python -m tools.convert_detector --model videoseal --rehearsal --quantize int8

Source: network and checkpoints, https://github.com/facebookresearch/videoseal; converters, litert-torch 0.10
    and torch.onnx of torch 2.13
"""

import itertools
import time
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table

from shared.command.cli import step, warn
from shared.command.errors import ToolError
from shared.command.options import DryRunOption, ModelName, Overwrite, Refresh, Reproducible, Seed
from shared.command.resources import GIB, ResourceEstimate, size_text
from shared.files import artifacts
from shared.files.atomic import draft_beside
from shared.files.plan import Plan, Product, require_output_free
from shared.formats.model_file import ModelFile
from shared.formats.onnx_file import name_weights
from shared.formats.tflite_metadata import append_metadata
from shared.metrics.metrics import cosine, max_abs_error, relative_error
from shared.networks.card import PRODUCTS, Card, InputForm, load_card
from shared.quantize.result import QuantizationResult
from shared.runtime.model import DetectorCheckpoint, Kernels, open_model
from shared.runtime.processes import Child, ChildError, Message
from shared.runtime.samples import sample_inputs
from tools.convert_detector import export
from tools.quantize_tflite import quantize_tflite

ONNX_PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime")
PACKAGES = ("litert-torch", "litert-converter", "ai-edge-litert", "torch")
CONVERT_TIMEOUT_S = 3600.0
BYTES_PER_PARAMETER = 4
# Measured at 33.4 M and 773.7 M parameters: libraries, and four times the largest convolution while it is transposed.
BASE_MEMORY = int(0.9 * GIB)
MEMORY_PER_BYTE = 0.3
MAX_RELATIVE_ERROR = 1e-4  # float32 rounding in another order gives 1e-6; a wrong layer gives 1e-1
CHECK_SEED = 1
SCALES_SHARE, GRAPH_BYTES = 0.03, 2**19  # of a product beside its weights, at most: norms and the like; tables and names
STEM_KERNEL = 4  # pixels
TOTAL_HALVING = 8  # of the three downsamplings behind the stem


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


@dataclass(frozen=True)
class Agreement:
    """How far the float32 model is from torch on one image, and what the check took."""

    relative_error: float
    max_abs_error: float
    cosine: float
    kernels: Kernels
    seconds: float
    peak_rss_bytes: int


@dataclass(frozen=True)
class FloatModel:
    """What was found out about the float32 model."""

    parameters: int
    convert_seconds: float
    agreement: Agreement
    casts: list[str]
    peak_rss_bytes: int


@dataclass(frozen=True)
class Rehearsal:
    """Seed of the weights that stand in for trained ones."""

    seed: int
    peak_rss_bytes: int


@dataclass(frozen=True)
class Conversion:
    """Result of convert_detector: the float32 model, and the quantized one if asked for."""

    model: str
    rehearsal: bool
    float_model: FloatModel
    float_product: Product
    quantized_product: Product | None
    coverage: QuantizationResult | None
    message: str

    def __rich__(self) -> RenderableType:
        table = Table(
            "product", "size", "smaller by", "time", "", title=f"{self.model}, {self.float_model.parameters / 1e6:.1f} M parameters"
        )
        for product in (self.float_product, self.quantized_product):
            if product is not None:
                saved = 1 - product.size_bytes / self.float_product.size_bytes
                state = "up to date" if product.up_to_date else "written"
                table.add_row(str(product.path), size_text(product.size_bytes), f"{saved:.1%}", f"{product.seconds:.1f} s", state)
        return Lines(table, self.message)


def file_name(
    card: Card, form: InputForm, precision: Precision, *, rehearsal: bool, model_format: ModelFormat = ModelFormat.TFLITE
) -> str:
    """Return the guides' name of a product, such as chunkyseal_detector_chunkyseal_256_int8.tflite."""
    parts = [
        card.output_prefix,
        "rehearsal" if rehearsal else "",
        str(form.size),
        form.layout if form.layout == "nhwc" else "",
        "resize" if form.resize else "",
        "" if precision is Precision.NONE else precision.value,
    ]
    return "_".join(part for part in parts if part) + f".{model_format.value}"


def _rehearsal_path(card: Card, folder: Path, seed: int) -> Path:
    return folder / f"{card.output_prefix}_rehearsal_seed{seed}.safetensors"


def _write_rehearsal(card: Card, output: Path, seed: int, *, overwrite: bool) -> None:
    """Write the seeded weights of a card, unless they are up to date."""

    def make(draft: Path) -> Rehearsal:
        with step(f"write seeded weights to {output.name}"):
            reply = _in_child({"task": "rehearse", "card": asdict(card), "seed": seed, "draft": str(draft)}, output)
        return Rehearsal(seed, reply["peak_rss_bytes"])

    arguments = {"card": card.as_arguments(), "seed": seed}
    plan = Plan(output, "convert_detector", arguments, [], ("torch",), overwrite=overwrite, refresh=True)
    artifacts.build(plan, Rehearsal, make)


def _in_child(message: Message, where: Path) -> Message:
    """Let `tools.convert_detector.export` do a task in a process of its own."""
    try:
        with Child(export, CONVERT_TIMEOUT_S) as child:
            return child.ask(message)[0]
    except ChildError as error:
        raise ToolError(f"could not {message['task']} the network", where=where, got=error) from None


@dataclass(frozen=True)
class _Job:
    """What is converted, and into what.

    Args:
        weights: The checkpoint.
        card: Its model card.
        form: How the product takes its image.
        rehearsal: Whether the weights are seeded.
        model_format: Of the product.
        dynamic_batch: Whether an ONNX product takes any number of images at once.
    """

    weights: Path
    card: Card
    form: InputForm
    rehearsal: bool
    model_format: ModelFormat
    dynamic_batch: bool

    def metadata(self) -> dict[str, object]:
        """Return what the product says of itself."""
        metadata = {"model": self.card.name, "nbits": self.card.nbits, "image_size": self.form.size}
        return {**metadata, "input_layout": self.form.layout, "resize": self.form.resize, "rehearsal": self.rehearsal}


def _convert(job: _Job, draft: Path, folded: Path, output: Path) -> FloatModel:
    """Write the float32 model to `draft`, by way of `folded`, and check it; weights of a large ONNX model go beside `output`."""
    start = time.monotonic()
    message = {"task": "convert", "card": asdict(job.card), "form": asdict(job.form), "rehearsal": job.rehearsal}
    message |= {"format": job.model_format.value, "dynamic_batch": job.dynamic_batch, "metadata": job.metadata()}
    with step(f"convert to float32 {job.model_format.value}"):
        reply = _in_child({**message, "weights": str(job.weights), "folded": str(folded), "draft": str(draft)}, job.weights)
        folded.unlink()
    if job.model_format is ModelFormat.TFLITE:
        append_metadata(draft, job.metadata())
    seconds = round(time.monotonic() - start, 3)
    with step("check against torch"):
        agreement = _check(DetectorCheckpoint(job.weights, job.card, job.form), ModelFile(draft))
    if job.model_format is ModelFormat.ONNX:
        name_weights(draft, output)
    peak = max(reply["peak_rss_bytes"], agreement.peak_rss_bytes)
    return FloatModel(reply["parameters"], seconds, agreement, reply["casts"], peak)


def _check(torch_model: DetectorCheckpoint, converted: ModelFile) -> Agreement:
    """Run both on one image, one after the other, and raise ToolError unless they agree."""
    start = time.monotonic()
    try:
        with open_model(torch_model) as model:
            image = sample_inputs(model.inputs, CHECK_SEED)
            reference = next(iter(model.run(image)[0].values()))
            torch_peak = model.peak_rss_bytes
        with open_model(converted) as model:
            candidate = next(iter(model.run(image)[0].values()))
            peak, kernels = max(torch_peak, model.peak_rss_bytes), model.kernels
        error = relative_error(reference, candidate)
    except (ChildError, ValueError) as problem:
        raise ToolError("the converted model could not be checked against torch; nothing was kept", got=problem) from None
    if error > MAX_RELATIVE_ERROR:
        raise ToolError(
            "the converted model disagrees with torch; nothing was kept",
            got=f"relative error {error:.2g}",
            expected=f"at most {MAX_RELATIVE_ERROR:g}",
        )
    seconds = round(time.monotonic() - start, 3)
    return Agreement(error, max_abs_error(reference, candidate), cosine(reference, candidate), kernels, seconds, peak)


def convert_detector(
    *,
    model: ModelName,
    checkpoint: Annotated[Path | None, typer.Option(help="Full or detector-only checkpoint, .pth or .safetensors.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; default: the guides' name in models/.")
    ] = None,
    model_format: Annotated[
        ModelFormat | None, typer.Option("--format", help="Default: as the output's name ends, else tflite.")
    ] = None,
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch", help="An ONNX model that takes any number of images.")] = False,
    quantize: Annotated[
        Precision, typer.Option(help="Precision of the product; the float32 model is kept beside it.")
    ] = Precision.NONE,
    image_size: Annotated[int | None, typer.Option(min=32, max=8192, help="Pixels; default: the network's own size.")] = None,
    input_layout: Annotated[InputLayout, typer.Option(help="nchw: (1, 3, S, S); nhwc: (1, S, S, 3).")] = InputLayout.NCHW,
    simple: Annotated[bool, typer.Option("--simple/--no-simple", help="--no-simple resizes inside the graph.")] = True,
    rehearsal: Annotated[bool, typer.Option("--rehearsal", help="Use seeded, untrained weights instead of a checkpoint.")] = False,
    seed: Seed = 0,
    reproducible: Reproducible = False,
    dry_run: DryRunOption = False,
    overwrite: Overwrite = False,
    refresh: Refresh = False,
) -> Conversion:
    """Convert a watermark detector to TFLite or ONNX, checked against torch before the file gets its name.

    Input `image`: float32, RGB in [0, 1]. Output `output_0`: float32 (1, 1 + nbits), the confidence, then one logit per bit.

    Raises:
        ToolError: Unusable checkpoint or card, too little memory or disk, or a model that disagrees with torch.
    """
    card = load_card(model)
    if (checkpoint is None) != rehearsal:
        raise ToolError("give either --checkpoint FILE or --rehearsal", remedy=f"the published checkpoint: {card.checkpoint.where}")
    model_format = _format(model_format, output, quantize, dynamic_batch=dynamic_batch)
    form = InputForm(image_size or card.image_size, input_layout.value, resize=not simple)
    _require_size(card, form)
    wants_float = quantize is Precision.NONE
    output = output or PRODUCTS / file_name(card, form, quantize, rehearsal=rehearsal, model_format=model_format)
    float_path = output if wants_float else output.with_name(file_name(card, form, Precision.NONE, rehearsal=rehearsal))
    weights = checkpoint or _rehearsal_path(card, float_path.parent, seed)
    _require_outputs({float_path, output}, weights, wants_float=wants_float, overwrite=overwrite)
    weights_bytes = _weights_bytes(card)
    is_new = rehearsal and not weights.exists()
    disk = (3 if is_new else 2) * weights_bytes
    largest = int(weights_bytes * (1 + SCALES_SHARE)) + GRAPH_BYTES
    needs = ResourceEstimate("convert this model", largest, disk + GRAPH_BYTES, BASE_MEMORY + int(weights_bytes * MEMORY_PER_BYTE))

    def make(draft: Path) -> FloatModel:
        if rehearsal:
            warn(f"REHEARSAL: {card.title} with seeded, untrained weights; size, speed and memory are real, messages are not")
        with draft_beside(float_path.with_suffix(".folded")) as folded:
            return _convert(_Job(weights, card, form, rehearsal, model_format, dynamic_batch), draft, folded, float_path)

    arguments: dict[str, object] = {"card": card.as_arguments(), "form": asdict(form), "rehearsal": rehearsal}
    arguments |= {"format": model_format.value, "dynamic_batch": dynamic_batch}
    is_onnx = model_format is ModelFormat.ONNX
    plan = Plan(
        float_path,
        "convert_detector",
        arguments,
        [] if is_new else [weights],
        ONNX_PACKAGES if is_onnx else PACKAGES,
        overwrite=overwrite,
        refresh=refresh,
        reproducible=reproducible,
        needs=lambda: needs,
        reopen=lambda draft: ModelFile(draft).files[1:],
    )
    if dry_run:
        pressed = ResourceEstimate(
            "quantize this model", int(largest * SHARES[quantize]) + GRAPH_BYTES, 2 * largest, needs.memory_bytes
        )
        further = Plan(output, "quantize_tflite", {}, overwrite=overwrite, refresh=refresh, needs=lambda: pressed)
        artifacts.foresee(*[plan] if wants_float else [plan, further])
    if is_new:
        needs.require(float_path.parent)
    if rehearsal:
        _write_rehearsal(card, weights, seed, overwrite=overwrite)
        plan = replace(plan, inputs=[weights])
    float_product, found = artifacts.build(plan, FloatModel, make)
    remarks = _remarks(card, form, found, rehearsal=rehearsal, up_to_date=float_product.up_to_date)
    if wants_float:
        return Conversion(card.title, rehearsal, found, float_product, None, None, remarks)
    quantized = quantize_tflite(
        float_path,
        output=output,
        recipe=quantize.value,
        reproducible=reproducible,
        overwrite=overwrite,
        refresh=refresh,
    )
    message = f"{quantized.message}\n{remarks}"
    return Conversion(card.title, rehearsal, found, float_product, quantized.product, quantized.result, message)


def _format(asked: ModelFormat | None, output: Path | None, quantize: Precision, *, dynamic_batch: bool) -> ModelFormat:
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


def _require_size(card: Card, form: InputForm) -> None:
    """Raise ToolError unless enough pixels reach the decoder, which pads by reflection: 2 by 2 after all strides."""
    smallest = STEM_KERNEL + card.stem_stride * (2 * TOTAL_HALVING - 1)
    if not form.resize and form.size < smallest:
        raise ToolError("the image is too small for the network", got=f"{form.size} pixels", expected=f"at least {smallest}")


def _require_outputs(outputs: set[Path], weights: Path, *, wants_float: bool, overwrite: bool) -> None:
    """Raise ToolError now for what a later step would be refused."""
    if len(outputs) == 1 and not wants_float:
        raise ToolError("the quantized model would replace its float32 model", where=outputs.pop(), remedy="choose another -o")
    for output in outputs:
        if output.exists() and weights.exists() and output.samefile(weights):
            raise ToolError("the output is the checkpoint", where=output, remedy="choose another file with -o")
        require_output_free(output, overwrite=overwrite)


def _remarks(card: Card, form: InputForm, found: FloatModel, *, rehearsal: bool, up_to_date: bool) -> str:
    """Say what a user must know of the float32 model, a line each."""
    check = found.agreement
    took = "" if up_to_date else f"; converted in {found.convert_seconds:.1f} s, checked in {check.seconds:.1f} s"
    lines = [f"float32 agrees with torch to {check.relative_error:.1g} (relative; {check.kernels} kernels){took}"]
    if found.casts:
        lines.append(f"the weights were {', '.join(found.casts)} and became float32")
    if form.size != card.image_size and not form.resize:
        lines.append(f"trained at {card.image_size} pixels: at {form.size} the accuracy is unknown; --no-simple resizes")
    if rehearsal:
        lines.append("REHEARSAL: seeded, untrained weights; size, speed and memory are real, messages are not")
    return "\n".join(lines)


def _weights_bytes(card: Card) -> int:
    """Return the bytes of a card's float32 weights, from its sizes: 8 dim^2 per block, and the convolutions between."""
    widths = list(card.dims)
    blocks = sum(depth * (8 * dim * dim + 62 * dim) for depth, dim in zip(card.depths, widths, strict=True))
    halvings = sum(4 * a * b for a, b in itertools.pairwise(widths))
    decoder = 9 * widths[3] ** 2 + widths[3] * (1 + card.nbits)
    return BYTES_PER_PARAMETER * (blocks + halvings + decoder)
