"""What convert_embedder's options mean: form of the product, its metadata, and the guides' names of products."""

import itertools
from enum import StrEnum

from shared.command.errors import ToolError
from shared.networks.card import Card, EmbedderSizes
from tools.convert_detector import ModelFormat, Precision, joined

BYTES_PER_PARAMETER = 4


class EmbedderForm(StrEnum):
    """What the product does of the pipeline around the network."""

    RESIDUAL = "residual"
    IMAGE = "image"


def prefix_of(card: Card) -> str:
    """Return the beginning of the names of an embedder's products, such as videoseal_embedder_videoseal."""
    prefix = card.output_prefix
    return prefix.replace("_detector_", "_embedder_") if "_detector_" in prefix else f"{prefix}_embedder"


def file_name(
    card: Card, form: EmbedderForm, size: int, precision: Precision, *, rehearsal: bool, model_format: ModelFormat
) -> str:
    """Return the guides' name of an embedder, such as videoseal_embedder_videoseal_256_int8.tflite."""
    marks = ("rehearsal" * rehearsal, str(size), "" if form is EmbedderForm.RESIDUAL else form.value)
    return joined(prefix_of(card), *marks, "" if precision is Precision.NONE else precision.value, suffix=model_format)


def require_embedder(card: Card) -> EmbedderSizes:
    """Return the sizes of a card's embedder.

    Raises:
        ToolError: The card has no table [embedder].
    """
    if card.embedder is None:
        raise ToolError("this model's card has no embedder", where=card.name, remedy="add the tables [embedder] and [pipeline]")
    return card.embedder


def choose_size(card: Card, form: EmbedderForm, asked: int | None) -> int:
    """Return the side of the product's image, pixels; the residual form takes the network's alone.

    Raises:
        ToolError: Another size for the residual form.
    """
    if form is EmbedderForm.RESIDUAL and asked not in (None, card.image_size):
        remedy = "leave it out: an app resizes around this form; or add --form image"
        raise ToolError("--image-size is for --form image", got=asked, expected=card.image_size, remedy=remedy)
    return asked or card.image_size


def metadata_of(card: Card, form: EmbedderForm, size: int, *, is_rehearsal: bool) -> dict[str, object]:
    """Return what the product says of itself: all that `shared.watermark.embedding.WatermarkEmbedder` needs to know."""
    pipeline, sizes = card.pipeline, require_embedder(card)
    assert pipeline is not None
    return {
        "component": "embedder",
        "model": card.name,
        "nbits": card.nbits,
        "form": form.value,
        "image_size": size,
        "channels": 3 if form is EmbedderForm.IMAGE else sizes.channels,
        "attenuation": pipeline.attenuation,
        "scaling": pipeline.scaling,
        "step_size": pipeline.step_size,
        "chunk_size": pipeline.chunk_size,
        "video_mode": pipeline.video_mode,
        "rehearsal": is_rehearsal,
    }


def weights_bytes(card: Card) -> int:
    """Return the bytes of a card's float32 weights, from its sizes; norms and biases count for little and are left out."""
    sizes = require_embedder(card)
    z, inner = sizes.widths, sizes.widths[3] + sizes.hidden

    def block(channels: int, made: int) -> int:
        return 9 * channels * made + 9 * made * made + channels * made

    down = sum(9 * a * b + block(b, b) for a, b in itertools.pairwise(z))
    up = sum(18 * a * b + block(b, b) for a, b in ((inner, z[2]), (z[2], z[1]), (z[1], z[0])))
    bottleneck = sizes.blocks * block(inner, inner)
    return BYTES_PER_PARAMETER * (block(sizes.channels, z[0]) + down + bottleneck + up + 2 * card.nbits * sizes.hidden)
