"""Take one component's weights out of a full training checkpoint.

Example:
    python -m tools.extract_weights checkpoint.pth --model chunkyseal -o models/chunkyseal_detector.safetensors

A training checkpoint holds embedder, discriminator and optimizer beside the detector: 13 GB, of which a phone needs 2.9. The
file is memory-mapped and copied tensor by tensor, so memory does not grow with it.

Source: layout of the checkpoints published with Video Seal, https://github.com/facebookresearch/videoseal
"""

import functools
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table

from shared.command.cli import step
from shared.command.errors import ToolError
from shared.command.options import DryRunOption, Overwrite, Refresh, Reproducible
from shared.command.resources import MIB, ResourceEstimate, size_text
from shared.files import artifacts
from shared.files.file_type import regular_size
from shared.files.plan import Plan, Product
from shared.networks.card import PRODUCTS, Card, card_names, load_card
from shared.networks.checkpoint import Checkpoint, open_checkpoint, require_match, require_sound, select_detector, write_safetensors
from tools.extract_weights.download import download as download_file

if TYPE_CHECKING:
    from torch import Tensor

PACKAGES = ("torch", "safetensors")
HEADER_BYTES = MIB  # of a .safetensors file, at most; names and shapes
MEMORY_BYTES = 500 * MIB  # torch and one tensor; the checkpoint stays on disk
FORMATS = (".safetensors", ".pth")


class Component(StrEnum):
    """What can be taken out by name."""

    DETECTOR = "detector"
    EMBEDDER = "embedder"


@dataclass(frozen=True)
class Group:
    """Tensors that share the first part of their keys."""

    name: str
    tensors: int
    size_bytes: int


@dataclass(frozen=True)
class Contents:
    """What the checkpoint held.

    Args:
        kept: What was written.
        dropped: What was not.
        card: The model whose detector it is, if known.
        blank: Keys of weights that are zero throughout.
    """

    kept: list[Group]
    dropped: list[Group]
    card: str | None
    blank: list[str]


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


def _locate(card: Card, *, downloads: bool, sha256: str | None, dry_run: bool) -> Path | None:
    """Return the checkpoint of a card in the usual folders, downloaded if asked for and not there."""
    found, source = card.find_checkpoint(), card.checkpoint
    if found is not None or not downloads or dry_run:
        return found
    if source.url is None:
        raise ToolError("the card names no address to download from", got=source.file, remedy="leave out --download")
    target = card.checkpoint_places()[0]
    with step(f"download {source.url}"):
        download_file(source.url, target, sha256=sha256 or source.sha256, check=open_checkpoint)
    return target


def _choose(checkpoint: Checkpoint, prefix: str, *, is_detector: bool) -> "dict[str, Tensor]":
    """Return the tensors to keep under the keys the published code loads."""
    chosen = {key: tensor for key, tensor in checkpoint.state.items() if key.startswith(prefix)}
    if not chosen and is_detector:
        chosen = {prefix + key: tensor for key, tensor in select_detector(checkpoint, prefix).items()}
    if not chosen:
        groups = ", ".join(sorted({key.partition(".")[0] for key in checkpoint.state}))
        raise ToolError(f"no key starts with '{prefix}'", where=checkpoint.path, got=f"groups {groups}", remedy="use --prefix")
    return chosen


def _groups(state: "dict[str, Tensor]") -> list[Group]:
    groups: dict[str, list[Tensor]] = {}
    for key, tensor in state.items():
        groups.setdefault(key.partition(".")[0], []).append(tensor)
    return [_group(name, tensors) for name, tensors in groups.items()]


def _group(name: str, tensors: "list[Tensor]") -> Group:
    return Group(name, len(tensors), sum(map(_size, tensors)))


def _size(tensor: "Tensor") -> int:
    return int(tensor.numel() * tensor.element_size())  # sparse ones, which are refused later, have no nbytes


def _detector_shapes(card: Card) -> dict[str, tuple[int, ...]]:
    from shared.networks.detector import detector_shapes

    return {card.checkpoint.prefix + key: shape for key, shape in detector_shapes(card).items()}


def _recognise(chosen: "dict[str, Tensor]") -> str | None:
    """Return the name of the first card whose detector has just these keys and shapes."""
    shapes = {key: tuple(tensor.shape) for key, tensor in chosen.items()}
    return next((name for name in card_names() if _detector_shapes(load_card(name)) == shapes), None)


def _write(draft: Path, suffix: str, chosen: "dict[str, Tensor]", notes: dict[str, str]) -> None:
    """Write the tensors straight from the mapped checkpoint, then read the copy back and compare every value."""
    import torch

    if suffix == ".pth":
        with draft.open("wb") as file:
            torch.save({"model": chosen, **notes}, file)
    else:
        order = sorted(chosen, key=lambda key: -chosen[key].dtype.itemsize)
        write_safetensors(
            draft,
            {key: chosen[key].shape for key in order},
            ((key, chosen[key]) for key in order),
            {"format": "pt", **notes},
            {key: chosen[key].dtype for key in order},
        )
    copy = open_checkpoint(draft).state
    wrong = [key for key, tensor in chosen.items() if key not in copy or not torch.equal(copy[key], tensor)]
    if wrong or len(copy) != len(chosen):
        raise ToolError("the copy differs from the checkpoint", where=draft, got=", ".join(wrong), remedy="is the disk sound?")


def extract_weights(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="Full or partial checkpoint, .pth or .safetensors; with --model it may be left out.")
    ] = None,
    *,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write, .safetensors or .pth.")] = None,
    model: Annotated[str | None, typer.Option(help="Model card the weights must fit; also finds the checkpoint.")] = None,
    component: Annotated[Component, typer.Option(help="Which network to take out.")] = Component.DETECTOR,
    prefix: Annotated[str | None, typer.Option(help="Take out every key that starts with this, instead of a component.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch the published checkpoint if it is not here.")] = False,
    sha256: Annotated[str | None, typer.Option(help="What the downloaded file must have; default: as its card says.")] = None,
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="Succeed, writing nothing, if there is none.")] = False,
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
    _require_sense(sha256, output, download=download)
    card = None if model is None else load_card(model)
    kind = prefix.rstrip(".").replace("/", "_") if prefix is not None else component.value
    if checkpoint is None:
        if card is None:
            remedy = "name a checkpoint, or a model with --model"
            raise ToolError("nothing to extract from", expected="a CHECKPOINT file, or --model", remedy=remedy)
        output = output or PRODUCTS / f"{card.name}_{kind}.safetensors"
        checkpoint = _locate(card, downloads=download, sha256=sha256, dry_run=dry_run)
        if checkpoint is None:
            return _without_checkpoint(card, output, allow_missing=allow_missing, would_download=download)
    regular_size(checkpoint, "checkpoint")
    output = output or checkpoint.with_name(f"{checkpoint.stem}_{kind}.safetensors")
    source = checkpoint
    is_detector = prefix is None and component is Component.DETECTOR
    layout = card.checkpoint if card is not None else None

    @functools.cache
    def chosen() -> "tuple[Checkpoint, dict[str, Tensor]]":
        with step(f"open {source}"):
            opened = open_checkpoint(source, layout.container) if layout else open_checkpoint(source)
            named = layout.prefix if layout and is_detector else f"{component.value}."
            kept = _choose(opened, named if prefix is None else prefix, is_detector=is_detector)
        if card is not None and is_detector:
            require_match(kept, _detector_shapes(card), source)
        return opened, kept

    def needs() -> ResourceEstimate:
        size = sum(map(_size, chosen()[1].values())) + HEADER_BYTES
        return ResourceEstimate("write the weights", size, size, MEMORY_BYTES)

    def make(draft: Path) -> Contents:
        opened, kept = chosen()
        with step("check the weights"):
            blank = require_sound(kept, source, integers=not is_detector)
        with step(f"write {output}"):
            _write(draft, output.suffix, kept, opened.notes)
        rest = {key: tensor for key, tensor in opened.state.items() if key not in kept}
        beside = [_group(name, tensors) for name, tensors in opened.beside.items()]
        return Contents(_groups(kept), _groups(rest) + beside, _recognise(kept), blank)

    arguments = {"component": component.value, "prefix": prefix, "format": output.suffix, "card": card and card.as_arguments()}
    plan = Plan(
        output,
        "extract_weights",
        arguments,
        [checkpoint],
        PACKAGES,
        overwrite=overwrite,
        refresh=refresh,
        reproducible=reproducible,
        dry_run=dry_run,
        needs=needs,
    )
    product, contents = artifacts.build(plan, Contents, make)
    kept = f"{size_text(product.size_bytes)} kept of {size_text(checkpoint.stat().st_size)} in {checkpoint}"
    known = f"; the detector of {contents.card}" if contents.card else ""
    if contents.blank:
        known += f"; {len(contents.blank)} of its weights are ZERO throughout, such as {contents.blank[0]}: is it trained?"
    message = f"up to date: {kept}{known}" if product.up_to_date else f"{kept}{known}; {product.seconds:.1f} s"
    return Extraction(checkpoint, product, contents, message)


def _require_sense(sha256: str | None, output: Path | None, *, download: bool) -> None:
    """Raise ToolError for options that lead nowhere."""
    if sha256 is not None and not (download and re.fullmatch("[0-9a-f]{64}", sha256)):
        what, remedy = "--sha256 is 64 hexadecimal digits, and goes with --download", "correct it, or leave it out"
        raise ToolError(what, got=sha256, remedy=remedy)
    if output is not None and output.suffix not in FORMATS:
        got, expected = output.suffix or "no suffix", " or ".join(FORMATS)
        raise ToolError("unknown output format", where=output, got=got, expected=expected, remedy="choose another name with -o")


def _without_checkpoint(card: Card, output: Path, *, allow_missing: bool, would_download: bool) -> Extraction:
    """Fall back on weights extracted earlier; else say where a checkpoint was looked for."""
    if would_download:  # in a dry run, else it is there
        return Extraction(None, None, None, f"would download {card.checkpoint.where}; nothing was written")
    places = ", ".join(str(place) for place in card.checkpoint_places())
    if allow_missing and output.is_file():
        return Extraction(None, None, None, f"no checkpoint found; using {output}, extracted earlier")
    if allow_missing:
        return Extraction(None, None, None, f"no checkpoint of {card.title} found (looked for {places}); nothing extracted")
    remedy = f"use --download, or get {card.checkpoint.url}" if card.checkpoint.url else "its card names that file"
    raise ToolError(f"no checkpoint of {card.title} found", got=f"none of {places}", remedy=remedy)
