"""Convert a watermark embedder to TFLite or ONNX, checked against torch before the file gets its name.

Example:
    python -m tools.convert_embedder --model videoseal --rehearsal --quantize int8

Source: network and checkpoints, https://github.com/facebookresearch/videoseal; converters, litert-torch 0.10
    and torch.onnx of torch 2.13
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from shared.command.errors import ToolError
from shared.command.options import DryRunOption, ModelName, OutputDir, Overwrite, Refresh, Reproducible, Seed, collect, output_path
from shared.formats.tensors import MESSAGE_INPUT, TensorSpec
from shared.networks.card import PRODUCTS, Card, load_card
from shared.runtime.model import EmbedderCheckpoint
from shared.runtime.samples import sample_inputs
from shared.runtime.worker import IMAGE_INPUT
from shared.watermark import WatermarkEmbedder
from tools.convert_detector import (
    CHECK_SEED,
    Conversion,
    Format,
    Network,
    Output,
    Precision,
    Quantize,
    Reference,
    UseRehearsal,
    Writing,
    choose_format,
    convert_network,
    rehearsal_path,
    run_in_torch,
)
from tools.convert_embedder import export
from tools.convert_embedder.request import (
    EmbedderForm,
    choose_size,
    file_name,
    metadata_of,
    prefix_of,
    require_embedder,
    weights_bytes,
)

MEMORY_PER_BYTE = 0.3  # of weights, which stay mapped; measured at 1,022.7 M parameters in a group of 6 GB
# Convolutions at full size, and the map of attenuation: 8 bits there cost most of a watermark of a few levels, and save nothing.
FLOAT_LAYERS = (r"ResidualBlock_inc/", r"Down_0/[^/]*Conv2d_down", r"Up_2/", r"Conv2d_outc")
ATTENUATION = "Attenuation_attenuation"

CheckpointFile = Annotated[
    Path | None, typer.Option("--checkpoint", help="Full or embedder-only checkpoint, .pth or .safetensors.")
]
Form = Annotated[EmbedderForm, typer.Option(help="residual: the network alone, for images of any size; image: all at one size.")]
ImageSize = Annotated[int | None, typer.Option(min=32, max=8192, help="Pixels of --form image; default: the network's own size.")]


def convert_embedder(
    *,
    model: ModelName,
    checkpoint: CheckpointFile = None,
    output: Output = None,
    output_dir: OutputDir = None,
    form: Form = EmbedderForm.RESIDUAL,
    model_format: Format = None,
    quantize: Quantize = Precision.NONE,
    image_size: ImageSize = None,
    rehearsal: UseRehearsal = False,
    seed: Seed = 0,
    reproducible: Reproducible = False,
    dry_run: DryRunOption = False,
    overwrite: Overwrite = False,
    refresh: Refresh = False,
) -> Conversion:
    """Convert a watermark embedder to TFLite or ONNX, checked against torch before the file gets its name.

    Inputs `image`, float32 in [0, 1], and `message`, float32 (1, nbits), 0 or 1. Output `output_0`, float32: of the residual form
    the watermark (1, C, S, S) in (-1, 1), as large as its image, luma (C = 1) or RGB; of the image form the marked image.

    Raises:
        ToolError: Unusable checkpoint or card, too little memory or disk, or a model that disagrees with torch.
    """
    writing, quantize = collect(Writing, {**locals(), "makes_folder": output is None}), Precision(quantize)
    card, form = load_card(model), EmbedderForm(form)
    require_embedder(card)
    if (checkpoint is None) != rehearsal:
        raise ToolError("give either --checkpoint FILE or --rehearsal", remedy=f"the published checkpoint: {card.checkpoint.where}")
    model_format = choose_format(model_format, output, quantize, dynamic_batch=False)
    size = choose_size(card, form, image_size)
    name = file_name(card, form, size, quantize, rehearsal=rehearsal, model_format=model_format)
    target = output_path(output, output_dir, PRODUCTS / name, makes_folder=False)
    plain = file_name(card, form, size, Precision.NONE, rehearsal=rehearsal, model_format=model_format)
    float_path = target if quantize is Precision.NONE else target.with_name(plain)
    weights = checkpoint or rehearsal_path(prefix_of(card), float_path.parent, seed)
    network = Network(
        tool="convert_embedder",
        card=card,
        weights=weights,
        seed=seed if rehearsal else None,
        model_format=model_format,
        weights_bytes=weights_bytes(card),
        memory_per_byte=MEMORY_PER_BYTE,
        reference=partial(_reference, weights, model, form, size),
        exporter=export,
        details={"form": form.value, "image_size": size},
        metadata=metadata_of(card, form, size, is_rehearsal=rehearsal),
        arguments={"card": _decisive(card), "form": form.value, "image_size": size},
        exclude=_float_layers(card, form, quantize),
        remarks=_remarks(form, size),
    )
    return convert_network(network, float_path, target, quantize, writing)


def _reference(weights: Path, model: str, form: EmbedderForm, size: int) -> Reference:
    """Return torch's answer to a made-up sample: of the image form inside the pipeline for any size, in numpy."""
    card = load_card(model)
    reference = run_in_torch(EmbedderCheckpoint(weights, card))
    if form is EmbedderForm.RESIDUAL:
        return reference
    image = TensorSpec(IMAGE_INPUT, (1, 3, size, size), "float32")
    sample = {**reference.sample, **sample_inputs([image], CHECK_SEED)}
    with WatermarkEmbedder(weights, card=model) as embedder:
        marked = embedder.embed_float(sample[IMAGE_INPUT], sample[MESSAGE_INPUT][0])
    return Reference(sample, marked, reference.peak_rss_bytes)


def _float_layers(card: Card, form: EmbedderForm, quantize: Precision) -> list[str]:
    """Return the selectors of the layers that stay in float."""
    if quantize in {Precision.NONE, Precision.FP16}:
        return []
    is_attenuated = form is EmbedderForm.IMAGE and card.pipeline is not None and card.pipeline.attenuation == "jnd"
    return [*FLOAT_LAYERS, *([ATTENUATION] if is_attenuated else [])]


def _decisive(card: Card) -> dict[str, object]:
    """Return the fields of a card that decide the bytes of an embedder."""
    content = asdict(card)
    return {key: content[key] for key in ("name", "nbits", "image_size", "embedder", "pipeline")}


def _remarks(form: EmbedderForm, size: int) -> list[str]:
    """Say how the product is used."""
    if form is EmbedderForm.IMAGE:
        return [f"takes images of {size}x{size} and gives them back marked; --form residual is for any size, and for videos"]
    return ["gives the watermark at the network's size: tools.mark and WatermarkEmbedder stretch, attenuate and add it"]
