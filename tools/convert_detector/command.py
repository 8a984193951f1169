"""Convert a watermark detector to TFLite or ONNX, checked against torch before the file gets its name.

Example:
    python -m tools.convert_detector --model videoseal --rehearsal --quantize int8

Source: network and checkpoints, https://github.com/facebookresearch/videoseal; converters, litert-torch 0.10
    and torch.onnx of torch 2.13
"""

import contextlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table

from shared.command.cli import warn
from shared.command.errors import ToolError
from shared.command.options import DryRunOption, ModelName, OutputDir, Overwrite, Refresh, Reproducible, Seed, collect, output_path
from shared.command.resources import GIB, ResourceEstimate, size_text
from shared.files import artifacts
from shared.files.atomic import draft_beside, new_folder
from shared.files.plan import Plan, Product
from shared.formats.model_file import ModelFile
from shared.networks.card import PRODUCTS, InputForm, load_card
from shared.quantize.result import QuantizationResult
from tools.convert_detector.conversion import FloatModel, convert, rehearsal_path, write_rehearsal
from tools.convert_detector.request import (
    ConvertRequest,
    InputLayout,
    ModelFormat,
    Precision,
    choose_format,
    file_name,
    require_image_size,
    require_outputs_free,
    weights_bytes,
)
from tools.quantize_tflite import quantize_tflite

ONNX_PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime")
PACKAGES = ("litert-torch", "litert-converter", "ai-edge-litert", "torch")
# Measured at 33.4 M and 773.7 M parameters: libraries, and four times the largest convolution while it is transposed.
BASE_MEMORY = int(0.9 * GIB)
MEMORY_PER_BYTE = 0.3
SCALES_SHARE, GRAPH_BYTES = 0.03, 2**19  # of a product next to its weights, at most: norms and the like; tables and names
SHARES = {  # of the float32 weights' bytes, at most
    Precision.NONE: 1.0,
    Precision.FP16: 0.52,
    Precision.INT8: 0.3,
    Precision.INT8_WEIGHT_ONLY: 0.3,
    Precision.INT4: 0.4,
}

CheckpointFile = Annotated[
    Path | None, typer.Option("--checkpoint", help="Full or detector-only checkpoint, .pth or .safetensors.")
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="File to write; default: the guides' name in models/out/.")]
Format = Annotated[ModelFormat | None, typer.Option("--format", help="Default: as the output's name ends, else tflite.")]
DynamicBatch = Annotated[bool, typer.Option("--dynamic-batch", help="An ONNX model that takes any number of images.")]
Quantize = Annotated[Precision, typer.Option(help="Precision of the product; the float32 model is kept next to it.")]
ImageSize = Annotated[int | None, typer.Option(min=32, max=8192, help="Pixels; default: the network's own size.")]
Layout = Annotated[InputLayout, typer.Option("--input-layout", help="nchw: (1, 3, S, S); nhwc: (1, S, S, 3).")]
Simple = Annotated[bool, typer.Option("--simple/--no-simple", help="--no-simple resizes inside the graph.")]
UseRehearsal = Annotated[bool, typer.Option("--rehearsal", help="Use seeded, untrained weights instead of a checkpoint.")]


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


@dataclass(frozen=True)
class Writing:
    """How to treat the files to write; fields are named as the options."""

    reproducible: bool = False
    dry_run: bool = False
    overwrite: bool = False
    refresh: bool = False
    makes_folder: bool = False  # for products under their default names


def convert_detector(
    *,
    model: ModelName,
    checkpoint: CheckpointFile = None,
    output: Output = None,
    output_dir: OutputDir = None,
    model_format: Format = None,
    dynamic_batch: DynamicBatch = False,
    quantize: Quantize = Precision.NONE,
    image_size: ImageSize = None,
    input_layout: Layout = InputLayout.NCHW,
    simple: Simple = True,
    rehearsal: UseRehearsal = False,
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
    writing, quantize = collect(Writing, {**locals(), "makes_folder": output is None}), Precision(quantize)
    card = load_card(model)
    if (checkpoint is None) != rehearsal:
        raise ToolError("give either --checkpoint FILE or --rehearsal", remedy=f"the published checkpoint: {card.checkpoint.where}")
    model_format = choose_format(model_format, output, quantize, dynamic_batch=dynamic_batch)
    form = InputForm(image_size or card.image_size, input_layout.value, resize=not simple)
    require_image_size(card, form)
    name = file_name(card, form, quantize, rehearsal=rehearsal, model_format=model_format)
    target = output_path(output, output_dir, PRODUCTS / name, makes_folder=False)
    wants_float = quantize is Precision.NONE
    float_path = target if wants_float else target.with_name(file_name(card, form, Precision.NONE, rehearsal=rehearsal))
    weights = checkpoint or rehearsal_path(card, float_path.parent, seed)
    require_outputs_free(
        {float_path, target}, weights, wants_float=wants_float, overwrite=overwrite, makes_folder=writing.makes_folder
    )
    request = ConvertRequest(weights, card, form, rehearsal, model_format, dynamic_batch)
    if dry_run:
        _forecast(request, float_path, target, quantize, writing)
    with new_folder(target.parent) if writing.makes_folder else contextlib.nullcontext():
        float_product, found = _make_float(request, float_path, seed, writing)
    remarks = _remarks(request, found, up_to_date=float_product.up_to_date)
    if wants_float:
        return Conversion(card.title, rehearsal, found, float_product, None, None, remarks)
    quantized = quantize_tflite(
        float_path, output=target, recipe=quantize.value, reproducible=reproducible, overwrite=overwrite, refresh=refresh
    )
    message = f"{quantized.message}\n{remarks}"
    return Conversion(card.title, rehearsal, found, float_product, quantized.product, quantized.result, message)


def _needs(request: ConvertRequest) -> ResourceEstimate:
    """Return what making the float32 model takes, at most; the seeded weights of a rehearsal included."""
    size = weights_bytes(request.card)
    disk = (3 if request.rehearsal and not request.weights.exists() else 2) * size + GRAPH_BYTES
    return ResourceEstimate("convert this model", _float_bytes(request), disk, BASE_MEMORY + int(size * MEMORY_PER_BYTE))


def _float_bytes(request: ConvertRequest) -> int:
    return int(weights_bytes(request.card) * (1 + SCALES_SHARE)) + GRAPH_BYTES


def _plan(request: ConvertRequest, output: Path, writing: Writing) -> Plan:
    """Return what decides the bytes of the float32 model."""
    is_onnx = request.model_format is ModelFormat.ONNX
    return Plan(
        output,
        "convert_detector",
        {
            "card": request.card.as_arguments(),
            "form": asdict(request.form),
            "rehearsal": request.rehearsal,
            "format": request.model_format.value,
            "dynamic_batch": request.dynamic_batch,
        },
        [request.weights] if request.weights.exists() or not request.rehearsal else [],
        ONNX_PACKAGES if is_onnx else PACKAGES,
        overwrite=writing.overwrite,
        refresh=writing.refresh,
        reproducible=writing.reproducible,
        needs=lambda: _needs(request),
        reopen=lambda draft: ModelFile(draft).files[1:],
        makes_folder=writing.makes_folder,
    )


def _forecast(request: ConvertRequest, float_path: Path, target: Path, quantize: Precision, writing: Writing) -> NoReturn:
    """End a dry run with what would be written."""
    plans = [_plan(request, float_path, writing)]
    if quantize is not Precision.NONE:
        largest, memory = _float_bytes(request), _needs(request).memory_bytes
        size = int(largest * SHARES[quantize]) + GRAPH_BYTES
        needs = ResourceEstimate("quantize this model", size, 2 * largest, memory)
        overwrite, refresh = writing.overwrite, writing.refresh
        plans.append(
            Plan(
                target,
                "quantize_tflite",
                {},
                overwrite=overwrite,
                refresh=refresh,
                needs=lambda: needs,
                makes_folder=writing.makes_folder,
            )
        )
    artifacts.end_dry_run(*plans)


def _make_float(request: ConvertRequest, output: Path, seed: int, writing: Writing) -> tuple[Product, FloatModel]:
    """Write the float32 model, of a rehearsal its weights first, or find both up to date."""
    if request.rehearsal:
        if not request.weights.exists():
            _needs(request).require(output.parent)
        write_rehearsal(request.card, request.weights, seed, overwrite=writing.overwrite)

    def make(draft: Path) -> FloatModel:
        if request.rehearsal:
            title = request.card.title
            warn(f"REHEARSAL: {title} with seeded, untrained weights; size, speed and memory are real, messages are not")
        with draft_beside(output.with_suffix(".folded")) as folded:
            return convert(request, draft, folded, output)

    return artifacts.build(_plan(request, output, writing), FloatModel, make)


def _remarks(request: ConvertRequest, found: FloatModel, *, up_to_date: bool) -> str:
    """Say what a user must know of the float32 model, a line each."""
    check, card, form = found.agreement, request.card, request.form
    took = "" if up_to_date else f"; converted in {found.convert_seconds:.1f} s, checked in {check.seconds:.1f} s"
    lines = [f"float32 agrees with torch to {check.relative_error:.1g} (relative; {check.kernels} kernels){took}"]
    if found.casts:
        lines.append(f"the weights were {', '.join(found.casts)} and became float32")
    if form.size != card.image_size and not form.resize:
        lines.append(f"trained at {card.image_size} pixels: at {form.size} the accuracy is unknown; --no-simple resizes")
    if request.rehearsal:
        lines.append("REHEARSAL: seeded, untrained weights; size, speed and memory are real, messages are not")
    return "\n".join(lines)
