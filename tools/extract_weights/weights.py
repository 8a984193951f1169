"""The tensors of one component: chosen from a checkpoint, counted by group, and written to a file of their own."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shared.command.errors import ToolError
from shared.networks.card import Card, card_names, load_card
from shared.networks.checkpoint import BARE_DETECTOR, Checkpoint, open_checkpoint, write_safetensors

BARE_EMBEDDER, EMBEDDER = ("unet.",), "embedder."

if TYPE_CHECKING:
    from torch import Tensor

    Weights = Mapping[str, Tensor]


class MissingComponentError(ToolError):
    """A checkpoint does not hold the component."""


@dataclass(frozen=True)
class Group:
    """Tensors that share the first part of their keys."""

    name: str
    tensors: int
    size_bytes: int


@dataclass(frozen=True)
class Contents:
    """Contents of a checkpoint.

    Args:
        kept: Groups that were written.
        dropped: Groups that were not written.
        card: The model that the detector belongs to, if known.
        blank: Keys of weights that are zero throughout.
    """

    kept: list[Group]
    dropped: list[Group]
    card: str | None
    blank: list[str]


def is_bare(checkpoint: Checkpoint, prefix: str, *, is_detector: bool) -> bool:
    """Return whether a checkpoint is the component alone, its keys without a prefix."""
    starts = BARE_DETECTOR if is_detector else BARE_EMBEDDER if prefix == EMBEDDER else ()
    return any(key.startswith(starts) for key in checkpoint.state) if starts else False


def choose_weights(checkpoint: Checkpoint, prefix: str, *, is_detector: bool) -> "dict[str, Tensor]":
    """Return the tensors to keep under the keys that the published code loads.

    Args:
        checkpoint: The opened checkpoint.
        prefix: The keys to keep start with it.
        is_detector: Whether the component is the detector. It, and the embedder, may also lie bare, without a prefix.

    Raises:
        MissingComponentError: No key starts with the prefix.
    """
    chosen = {key: tensor for key, tensor in checkpoint.state.items() if key.startswith(prefix)}
    if not chosen and is_bare(checkpoint, prefix, is_detector=is_detector):
        chosen = {prefix + key: tensor for key, tensor in checkpoint.state.items()}
    if not chosen:
        groups = ", ".join(sorted({key.partition(".")[0] for key in checkpoint.state}))
        what = f"no key starts with '{prefix}'"
        raise MissingComponentError(what, where=checkpoint.path, got=f"groups {groups}", remedy="use --prefix")
    return chosen


def describe_contents(checkpoint: Checkpoint, kept: "Weights", blank: list[str]) -> Contents:
    """Return the contents of a checkpoint of which `kept` was written; `blank` are keys of weights that are all zero."""
    rest = {key: tensor for key, tensor in checkpoint.state.items() if key not in kept}
    dropped = [*_groups(rest), *(_group(name, tensors) for name, tensors in checkpoint.beside.items())]
    return Contents(_groups(kept), dropped, _find_card(kept), blank)


def size_bytes(weights: "Weights") -> int:
    """Return the size of all tensors."""
    return sum(map(_size, weights.values()))


def _groups(state: "Weights") -> list[Group]:
    groups: dict[str, list[Tensor]] = {}
    for key, tensor in state.items():
        groups.setdefault(key.partition(".")[0], []).append(tensor)
    return [_group(name, tensors) for name, tensors in groups.items()]


def _group(name: str, tensors: "list[Tensor]") -> Group:
    return Group(name, len(tensors), sum(map(_size, tensors)))


def _size(tensor: "Tensor") -> int:
    return int(tensor.numel() * tensor.element_size())  # sparse tensors, refused later, have no nbytes


def detector_shapes(card: Card) -> dict[str, tuple[int, ...]]:
    """Return keys, with the checkpoint's prefix, and shapes of a card's detector."""
    from shared.networks import detector

    return {card.checkpoint.prefix + key: shape for key, shape in detector.detector_shapes(card).items()}


def _find_card(weights: "Weights") -> str | None:
    """Return the name of the first card whose detector has exactly these keys and shapes."""
    shapes = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    return next((name for name in card_names() if detector_shapes(load_card(name)) == shapes), None)


def write_weights(draft: Path, suffix: str, weights: "Weights", notes: Mapping[str, str]) -> None:
    """Write the tensors straight from the mapped checkpoint, then read the copy back and compare every value.

    Raises:
        ToolError: The copy differs.
    """
    import torch

    if suffix == ".pth":
        with draft.open("wb") as file:
            torch.save({"model": dict(weights), **notes}, file)
    else:
        order = sorted(weights, key=lambda key: -weights[key].dtype.itemsize)
        write_safetensors(
            draft,
            {key: weights[key].shape for key in order},
            ((key, weights[key]) for key in order),
            {"format": "pt", **notes},
            {key: weights[key].dtype for key in order},
        )
    copy = open_checkpoint(draft).state
    wrong = [key for key, tensor in weights.items() if key not in copy or not torch.equal(copy[key], tensor)]
    if wrong or len(copy) != len(weights):
        remedy = "check the disk for errors"
        raise ToolError("the copy differs from the checkpoint", where=draft, got=", ".join(wrong), remedy=remedy)
