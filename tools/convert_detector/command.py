"""Convert a watermark detector to TFLite or ONNX, checked against torch before the file gets its name.

Example:
    python -m tools.convert_detector --model videoseal --rehearsal --quantize int8

Source: network and checkpoints, https://github.com/facebookresearch/videoseal; converters, litert-torch 0.10
    and torch.onnx of torch 2.13
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from shared.command.errors import ToolError
from shared.command.options import DryRunOption, ModelName, OutputDir, Overwrite, Refresh, Reproducible, Seed, collect, output_path
from shared.networks.card import PRODUCTS, Card, InputForm, load_card
from shared.runtime.model import DetectorCheckpoint
from tools.convert_detector import export
from tools.convert_detector.conversion import rehearsal_path
from tools.convert_detector.job import Conversion, convert_network
from tools.convert_detector.network import Network, Writing, run_in_torch
from tools.convert_detector.request import (
    InputLayout,
    ModelFormat,
    Precision,
    choose_format,
    file_name,
    require_image_size,
    weights_bytes,
)

MEMORY_PER_BYTE = 0.3  # of weights: four times the largest convolution while it is transposed; measured as `BASE_MEMORY`

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
    weights = checkpoint or rehearsal_path(card.output_prefix, float_path.parent, seed)
    network = Network(
        tool="convert_detector",
        card=card,
        weights=weights,
        seed=seed if rehearsal else None,
        model_format=model_format,
        weights_bytes=weights_bytes(card),
        memory_per_byte=MEMORY_PER_BYTE,
        reference=lambda: run_in_torch(DetectorCheckpoint(weights, card, form)),
        exporter=export,
        details={"form": asdict(form), "dynamic_batch": dynamic_batch},
        metadata=_metadata(card, form, is_rehearsal=rehearsal),
        arguments={"card": card.as_arguments(), "form": asdict(form), "dynamic_batch": dynamic_batch},
        remarks=_remarks(card, form),
    )
    return convert_network(network, float_path, target, quantize, writing)


def _metadata(card: Card, form: InputForm, *, is_rehearsal: bool) -> dict[str, object]:
    """Return what the product says of itself."""
    metadata = {"model": card.name, "nbits": card.nbits, "image_size": form.size}
    return {**metadata, "input_layout": form.layout, "resize": form.resize, "rehearsal": is_rehearsal}


def _remarks(card: Card, form: InputForm) -> list[str]:
    """Say what a user must know of the product's form."""
    if form.size == card.image_size or form.resize:
        return []
    return [f"trained at {card.image_size} pixels: at {form.size} the accuracy is unknown; --no-simple resizes"]
