"""Model cards: the name of a model, the sizes of its network, its gates, and the place of its checkpoint."""

import difflib
import os
import re
import tomllib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from shared.command.errors import ToolError, first_line
from shared.files.file_type import is_regular, read_head

CARDS = Path(__file__).resolve().parent.parent.parent / "models"
PRODUCTS = Path("models/out")  # where products go by default, seen from where the command runs: the project's root
USER_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
CHECKPOINT_FOLDERS = (Path("models/checkpoints"), USER_CACHE / "edgepress", Path.home() / ".cache" / "videoseal")

Positive = Annotated[int, Field(ge=1, le=65536, strict=True)]
Four = tuple[Positive, Positive, Positive, Positive]
FileStem = Annotated[str, StringConstraints(pattern=re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$"))]
Layout = Literal["nchw", "nhwc"]
Norm = Literal["batch", "rms"]
Activation = Literal["relu", "silu"]
Fraction = Annotated[float, Field(ge=0, le=1)]
AGAIN = "correct it; models/miniseal.toml shows the form"
STRICT = ConfigDict(extra="forbid")  # a misspelt field is an error, never ignored


@dataclass(frozen=True)
class InputForm:
    """Form of a deployed detector's image input.

    Args:
        size: Height and width in pixels.
        layout: 'nchw' is float32 (1, 3, size, size), 'nhwc' is float32 (1, size, size, 3).
        resize: Whether the graph resizes the image to the network's own size.
    """

    size: int
    layout: Layout = "nchw"
    resize: bool = False


@dataclass(frozen=True)
class Source:
    """Place and form of the checkpoint.

    Args:
        url: Address of the published file.
        sha256: Hash of the published file, where it is known; a download must have it.
        file: Path of a file relative to the card's folder; instead of an address.
        container: Key of the checkpoint's dict that holds the flat state dict.
        prefix: Prefix of the detector's keys.
    """

    __pydantic_config__ = STRICT
    url: Annotated[str, StringConstraints(pattern=re.compile(r"^https?://[!-.0-~]+/[!-~]*[!-.0-~]$"))] | None = None
    sha256: Annotated[str, StringConstraints(pattern=re.compile(r"^[0-9a-f]{64}$"))] | None = None
    file: Annotated[str, StringConstraints(pattern=re.compile(r"^[A-Za-z0-9][A-Za-z0-9._/-]*$"))] | None = None
    container: str = "model"
    prefix: str = "detector."

    def __post_init__(self) -> None:
        if (self.url is None) == (self.file is None):
            raise ValueError("give either url or file")
        if self.file is not None and ".." in Path(self.file).parts:
            raise ValueError("the file must lie in the card's folder, or below")

    @property
    def where(self) -> str:
        """The address or the file."""
        return self.url or str(self.file)


@dataclass(frozen=True)
class Gates:
    """Limits that a product must keep, named as the options of compare; None is no limit. MB are 2^20 bytes."""

    __pydantic_config__ = STRICT
    max_size_mb: Annotated[float, Field(gt=0)] | None = None
    min_cosine: Fraction | None = None
    min_bit_agreement: Fraction | None = None
    min_speedup: Annotated[float, Field(gt=0)] | None = None
    max_latency_ms: Annotated[float, Field(gt=0)] | None = None
    min_bit_accuracy: Fraction | None = None
    max_accuracy_drop: Fraction | None = None
    min_accuracy_under: dict[str, Fraction] = field(default_factory=dict)  # attack, such as jpeg-50 -> bit accuracy
    min_auc: Fraction | None = None


@dataclass(frozen=True)
class ConvNeXt:
    """Sizes of a ConvNeXt V2 encoder: blocks and channels of its four stages, stride of its stem."""

    depths: Four
    dims: Four
    stem_stride: Literal[2, 4]


@dataclass(frozen=True)
class Vit:
    """Sizes of a vision transformer.

    Args:
        patch: Side of a patch; pixels.
        window: Side of a window; tokens.
        channels: Of a token.
        features: Channels that the decoder reads.
        blocks: How many there are.
        heads: Of each attention.
        global_blocks: Numbers of the blocks, from 0, without windows.
    """

    __pydantic_config__ = STRICT
    patch: Positive
    window: Positive
    channels: Positive
    features: Positive
    blocks: Positive
    heads: Positive
    global_blocks: tuple[Annotated[int, Field(ge=0, strict=True)], ...]


@dataclass(frozen=True)
class EmbedderSizes:
    """Sizes of an embedder.

    Args:
        channels: Of the image it takes and the watermark it gives: 1 is luma, 3 RGB.
        widths: Channels of the four levels.
        hidden: Channels of the message.
        norm: Batch norm, or root mean square over channels.
        activation: Of all layers.
        blocks: Residual blocks of the bottleneck.
    """

    __pydantic_config__ = STRICT
    channels: Literal[1, 3]
    widths: Four
    hidden: Positive
    norm: Norm
    activation: Activation
    blocks: Positive = 8


@dataclass(frozen=True)
class Pipeline:
    """What is done with an embedder's output.

    Args:
        attenuation: `jnd` multiplies it with the just-noticeable-difference map.
        scaling: Factor before it is added to the image.
        step_size: Frames of a video that share a watermark.
        chunk_size: Key frames that the published code takes at once; a watermark never reaches beyond its chunk.
        video_mode: What the frames between key frames get: the same watermark, none, or a mean of both sides.
    """

    __pydantic_config__ = STRICT
    attenuation: Literal["jnd", "none"]
    scaling: Annotated[float, Field(gt=0, le=10)]
    step_size: Positive = 4
    chunk_size: Positive = 32
    video_mode: Literal["repeat", "alternate", "interpolate"] = "repeat"


@dataclass(frozen=True)
class Card:
    """A detector model: with the sizes of a ConvNeXt encoder, or with a table [vit]."""

    __pydantic_config__ = STRICT
    name: FileStem
    title: str
    nbits: Positive
    image_size: Annotated[int, Field(ge=32, le=8192, strict=True)]  # of the training images; pixels, square
    output_prefix: FileStem
    checkpoint: Source
    folder: str  # where the card lies
    depths: Four | None = None
    dims: Four | None = None
    stem_stride: Literal[2, 4] | None = None
    vit: Vit | None = None
    embedder: EmbedderSizes | None = None
    pipeline: Pipeline | None = None
    gates: dict[str, Gates] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = [value is not None for value in (self.depths, self.dims, self.stem_stride)]
        if not (all(given) and self.vit is None) and not (self.vit is not None and not any(given)):
            raise ValueError("give depths, dims and stem_stride, or else a table [vit]")
        if (self.embedder is None) != (self.pipeline is None):
            raise ValueError("the tables [embedder] and [pipeline] go together")
        vit = self.vit
        if vit is not None and (self.image_size % (vit.patch * vit.window) or vit.channels % vit.heads):
            raise ValueError("windows of patches do not fill the image, or heads do not share the channels")

    @property
    def encoder(self) -> ConvNeXt | Vit:
        """Sizes of the encoder."""
        if self.vit is not None:
            return self.vit
        assert self.depths is not None and self.dims is not None and self.stem_stride is not None
        return ConvNeXt(self.depths, self.dims, self.stem_stride)

    def find_checkpoint(self) -> Path | None:
        """Return the checkpoint's file in the usual folders, or None."""
        return next((path for path in self.checkpoint_places() if is_regular(path)), None)

    def checkpoint_places(self) -> list[Path]:
        """Return the possible places of the checkpoint, in the order of the search."""
        if self.checkpoint.file is not None:
            return [Path(self.folder) / self.checkpoint.file]
        published = (self.checkpoint.url or "").rpartition("/")[2]
        names = [f"{self.name}.pth", f"{self.name}.safetensors", f"{self.name}/{published}"]
        if published != "checkpoint.pth":  # the name is shared by two models
            names.append(published)
        return [folder / name for folder in CHECKPOINT_FOLDERS for name in names]

    def as_arguments(self) -> dict[str, object]:
        """Return the fields that decide the bytes of a product."""
        content = asdict(self)
        layout = {key: content["checkpoint"][key] for key in ("container", "prefix")}
        sizes = ("vit",) if self.vit is not None else ("depths", "dims", "stem_stride")
        return layout | {key: content[key] for key in ("name", "nbits", *sizes, "image_size")}


def card_names() -> list[str]:
    """Return the names of the cards in models/."""
    return sorted(path.stem for path in CARDS.glob("*.toml"))


def load_card(name: str) -> Card:
    """Return the card of a model name, or of a path that ends in .toml.

    Raises:
        ToolError: The card is missing, or has a wrong field; the message names field and file.
    """
    path = Path(name) if name.endswith(".toml") else CARDS / f"{name}.toml"
    if not name.endswith(".toml") and not path.is_file():
        near = difflib.get_close_matches(name.lower(), card_names(), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else "name one of them, or a path to your own card (.toml)"
        raise ToolError(f"unknown model '{name}'", expected="one of " + ", ".join(card_names()), remedy=hint)
    read_head(path, "model card", limit="text-mb", again=AGAIN)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        card = TypeAdapter(Card).validate_python({"name": path.stem, **content, "folder": str(path.parent)})
    except ValidationError as error:
        faults = [f"field {'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise ToolError("bad model card: " + "; ".join(faults), where=path, remedy=AGAIN) from None
    except (ValueError, RecursionError) as error:  # tomllib raises ValueErrors, also for numbers of 5000 digits
        raise ToolError("model card is not valid TOML", where=path, got=first_line(error), remedy=AGAIN) from None
    return card
