"""Take one component's weights out of a full training checkpoint.

Example:
    python -m tools.extract_weights checkpoint.pth --model chunkyseal --output-dir models/out

A training checkpoint holds the embedder, the discriminator and the optimizer besides the detector: 13 GB, of which a phone needs
2.9. The file is memory-mapped and copied tensor by tensor, so memory does not grow with its size.

Source: layout of the checkpoints published with Video Seal, https://github.com/facebookresearch/videoseal
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table

from shared.command.cli import step
from shared.command.errors import ToolError
from shared.command.options import DryRunOption, OutputDir, Overwrite, Refresh, Reproducible, collect, output_path
from shared.command.resources import MIB, ResourceEstimate, size_text
from shared.files import artifacts
from shared.files.atomic import new_folder
from shared.files.file_type import regular_size
from shared.files.plan import Plan, Product, require_place
from shared.files.provenance import provenance_path
from shared.networks.card import PRODUCTS, Card, load_card
from shared.networks.checkpoint import Checkpoint, open_checkpoint, require_match, require_sound
from tools.extract_weights.download import download as download_file
from tools.extract_weights.weights import (
    Contents,
    MissingComponentError,
    choose_weights,
    describe_contents,
    detector_shapes,
    size_bytes,
    write_weights,
)

if TYPE_CHECKING:
    from torch import Tensor

    Opened = tuple[Checkpoint, dict[str, Tensor]]

PACKAGES = ("torch", "safetensors")
HEADER_BYTES = MIB  # of a .safetensors file, at most; names and shapes
MEMORY_BYTES = 500 * MIB  # torch and one tensor; the checkpoint stays on disk
FORMATS = (".safetensors", ".pth")


class Component(StrEnum):
    """Components with a name."""

    DETECTOR = "detector"
    EMBEDDER = "embedder"


CheckpointFile = Annotated[
    Path | None, typer.Argument(help="Full or partial checkpoint, .pth or .safetensors; with --model it may be left out.")
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="File to write, .safetensors or .pth.")]
CardName = Annotated[str | None, typer.Option("--model", help="Model card the weights must fit; also finds the checkpoint.")]
ComponentOption = Annotated[Component, typer.Option("--component", help="Network to take out.")]
Prefix = Annotated[str | None, typer.Option(help="Take out every key that starts with this, instead of a component.")]
Download = Annotated[bool, typer.Option("--download", help="Fetch the published checkpoint if it is not here.")]
Sha256 = Annotated[str | None, typer.Option(help="Hash that the downloaded file must have; default: the hash in its card.")]
AllowMissing = Annotated[
    bool, typer.Option("--allow-missing", help="Succeed, writing nothing, if the checkpoint or the component is missing.")
]


@dataclass(frozen=True)
class Extraction:
    """Result of extract_weights; without a product when no checkpoint was found and none was required."""

    checkpoint: Path | None
    product: Product | None
    contents: Contents | None
    message: str

    def __rich__(self) -> RenderableType:
        if self.product is None or self.contents is None:
            return self.message
        table = Table("group", "tensors", "size", "", title=f"{self.checkpoint} -> {self.product.path}")
        for groups, word in ((self.contents.kept, "kept"), (self.contents.dropped, "dropped")):
            for group in groups:
                table.add_row(group.name, f"{group.tensors}", size_text(group.size_bytes), word)
        return Lines(table, self.message)


@dataclass(frozen=True)
class ExtractRequest:
    """Parameters of extract_weights that decide the checkpoint and the component."""

    component: Component
    download: bool
    allow_missing: bool
    dry_run: bool
    checkpoint: Path | None = None
    output: Path | None = None
    output_dir: Path | None = None
    model: str | None = None
    prefix: str | None = None
    sha256: str | None = None

    @cached_property
    def card(self) -> Card | None:
        """The model card, if a model was named."""
        return None if self.model is None else load_card(self.model)

    @property
    def is_detector(self) -> bool:
        """Whether the component is the detector."""
        return self.prefix is None and self.component is Component.DETECTOR

    @property
    def key_prefix(self) -> str:
        """The prefix of the keys to keep."""
        if self.prefix is not None:
            return self.prefix
        return self.card.checkpoint.prefix if self.card is not None and self.is_detector else f"{self.component.value}."

    @property
    def target(self) -> Path:
        """The file to write."""
        kind = self.component.value if self.prefix is None else self.prefix.rstrip(".").replace("/", "_")
        if self.checkpoint is not None:
            default = self.checkpoint.with_name(f"{self.checkpoint.stem}_{kind}.safetensors")
        else:
            assert self.card is not None
            default = PRODUCTS / f"{self.card.name}_{kind}.safetensors"
        return output_path(self.output, self.output_dir, default, makes_folder=False)

    def find_checkpoint(self) -> Path | None:
        """Return the checkpoint: the named file, or the file of the card, downloaded if requested; None where there is none."""
        if self.checkpoint is not None or self.card is None:
            return self.checkpoint
        return _locate(self.card, downloads=self.download, sha256=self.sha256, dry_run=self.dry_run)

    def open_component(self, source: Path) -> "Opened":
        """Return the opened checkpoint and the tensors to keep."""
        with step(f"open {source}"):
            opened = open_checkpoint(source, self.card.checkpoint.container) if self.card else open_checkpoint(source)
            kept = choose_weights(opened, self.key_prefix, is_detector=self.is_detector)
        if self.card is not None and self.is_detector:
            require_match(kept, detector_shapes(self.card), source)
        return opened, kept


def extract_weights(
    checkpoint: CheckpointFile = None,
    *,
    output: Output = None,
    output_dir: OutputDir = None,
    model: CardName = None,
    component: ComponentOption = Component.DETECTOR,
    prefix: Prefix = None,
    download: Download = False,
    sha256: Sha256 = None,
    allow_missing: AllowMissing = False,
    reproducible: Reproducible = False,
    dry_run: DryRunOption = False,
    overwrite: Overwrite = False,
    refresh: Refresh = False,
) -> Extraction:
    """Take one component's weights out of a full training checkpoint.

    Keys stay as they are (`detector.convnext...`). A .pth output is `{"model": state dict}`, which the published code loads.

    Raises:
        ToolError: No checkpoint, no such component, unusable or (with `model`) unfitting weights, or no place to write.
    """
    request = collect(ExtractRequest, locals())
    _require_sense(request)
    target, source = request.target, request.find_checkpoint()
    if source is None:
        return _without_checkpoint(request, target)
    regular_size(source, "checkpoint")
    open_once = cache(partial(request.open_component, source))
    plan = _plan(request, source, target, open_once)
    plan = replace(plan, overwrite=overwrite, refresh=refresh, reproducible=reproducible, dry_run=dry_run)
    try:
        if dry_run:
            artifacts.end_dry_run(plan)
        require_place(plan)  # before its folder is made
        with new_folder(target.parent):
            product, contents = artifacts.build(plan, Contents, partial(_extract, request, target, open_once))
    except MissingComponentError as error:
        if not allow_missing:
            raise
        if target.exists() and not dry_run:  # ours, and replaceable: that was checked before
            target.unlink()
            provenance_path(target).unlink(missing_ok=True)
        return Extraction(source, None, None, f"{error}; nothing extracted")
    return Extraction(source, product, contents, _message(source, product, contents))


def _require_sense(request: ExtractRequest) -> None:
    """Raise ToolError for options that contradict each other or have no effect, and where neither checkpoint nor model is named."""
    sha256, output = request.sha256, request.output
    if sha256 is not None and not (request.download and re.fullmatch("[0-9a-f]{64}", sha256)):
        what, remedy = "--sha256 is 64 hexadecimal digits, and goes with --download", "correct it, or leave it out"
        raise ToolError(what, got=sha256, remedy=remedy)
    if output is not None and output.suffix not in FORMATS:
        got, expected = output.suffix or "no suffix", " or ".join(FORMATS)
        raise ToolError("unknown output format", where=output, got=got, expected=expected, remedy="choose another name with -o")
    if request.card is None and request.checkpoint is None:
        remedy = "name a checkpoint, or a model with --model"
        raise ToolError("nothing to extract from", expected="a CHECKPOINT file, or --model", remedy=remedy)


def _locate(card: Card, *, downloads: bool, sha256: str | None, dry_run: bool) -> Path | None:
    """Return the checkpoint of a card in the usual folders, downloaded if requested and missing."""
    found, source = card.find_checkpoint(), card.checkpoint
    if found is not None or not downloads or dry_run:
        return found
    if source.url is None:
        raise ToolError("the card names no address to download from", got=source.file, remedy="leave out --download")
    target = card.checkpoint_places()[0]
    with step(f"download {source.url}"):
        download_file(source.url, target, sha256=sha256 or source.sha256, check=open_checkpoint)
    return target


def _without_checkpoint(request: ExtractRequest, target: Path) -> Extraction:
    """Return the result without a checkpoint: weights extracted earlier, or none; raise ToolError where one is required."""
    card = request.card
    assert card is not None
    if request.download:  # in a dry run; else it would have been downloaded
        return Extraction(None, None, None, f"would download {card.checkpoint.where}; nothing was written")
    places = ", ".join(str(place) for place in card.checkpoint_places())
    if request.allow_missing and target.is_file():
        return Extraction(None, None, None, f"no checkpoint found; using {target}, extracted earlier")
    if request.allow_missing:
        return Extraction(None, None, None, f"no checkpoint of {card.title} found (searched {places}); nothing extracted")
    remedy = f"use --download, or get {card.checkpoint.url}" if card.checkpoint.url else "its card names that file"
    raise ToolError(f"no checkpoint of {card.title} found", got=f"none of {places}", remedy=remedy)


def _plan(request: ExtractRequest, source: Path, target: Path, open_once: "Callable[[], Opened]") -> Plan:
    """Return the file to write, and everything that decides it."""

    def needs() -> ResourceEstimate:
        size = size_bytes(open_once()[1]) + HEADER_BYTES
        return ResourceEstimate("write the weights", size, size, MEMORY_BYTES)

    arguments = {
        "component": request.component.value,
        "prefix": request.prefix,
        "format": target.suffix,
        "card": request.card and request.card.as_arguments(),
    }
    makes_folder = request.output is None
    return Plan(target, "extract_weights", arguments, [source], PACKAGES, needs=needs, makes_folder=makes_folder)


def _extract(request: ExtractRequest, target: Path, open_once: "Callable[[], Opened]", draft: Path) -> Contents:
    """Write the component's weights to `draft`."""
    opened, kept = open_once()
    with step("check the weights"):
        blank = require_sound(kept, opened.path, integers=not request.is_detector)
    with step(f"write {target}"):
        write_weights(draft, target.suffix, kept, opened.notes)
    return describe_contents(opened, kept, blank)


def _message(source: Path, product: Product, contents: Contents) -> str:
    """Return the sizes before and after, the model if known, and a warning of weights that are all zero."""
    text = f"{size_text(product.size_bytes)} kept of {size_text(source.stat().st_size)} in {source}"
    text += f"; the detector of {contents.card}" if contents.card else ""
    if contents.blank:
        text += f"; {len(contents.blank)} of its weights are ZERO throughout, such as {contents.blank[0]}: is it trained?"
    return f"up to date: {text}" if product.up_to_date else f"{text}; {product.seconds:.1f} s"
