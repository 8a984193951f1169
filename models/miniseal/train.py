"""Train miniseal, detector and embedder together, from scratch.

Example:
    python -m models.miniseal.train --steps 300 --output trial.safetensors

A step takes a batch of marked and unmarked crops through attacks and asks the detector for the messages and for which are marked.
Whatever is random comes from the seed and the number of the step, so an interrupted run goes on as if nothing had happened.

Source: Video Seal, Fernandez et al. 2024, arXiv:2412.09492 (detector, joint training, attacks as identity for the gradient).
"""

import json
import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import RenderableType
from rich.text import Text

from shared.command.cli import run, step_progress
from shared.command.errors import ToolError, first_line
from shared.files.atomic import draft_beside
from shared.files.code_version import code_version
from shared.media.attacks import Attack
from shared.media.images import Pixels, stretch
from shared.networks.card import CARDS, PRODUCTS, Card, ConvNeXt, load_card

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from models.miniseal.embedder import Embedder
    from shared.networks.detector import Detector

FOLDER = CARDS / "miniseal"
RETRAINED = PRODUCTS / "miniseal_retrained" / "checkpoint.safetensors"  # next to the shipped one
STEPS = 9000
MARKED, UNMARKED = 12, 4  # images of a batch
SAVE_EVERY = 250  # steps
DETECTOR_RATE, PATTERN_RATE = 1.5e-3, 1e-2
WEIGHT_DECAY = 0.01
LARGEST_GRADIENT = 1.0
WARM_UP = 0.02  # of all steps; the rates rise to their full height
FIRST_STRENGTH = 0.06  # loud enough to be found by an untrained detector
QUIET_AFTER = 0.2  # of all steps; the watermark has its final strength from here on
ATTACKS_FROM, ATTACKS_FULL = 0.06, 0.25  # of all steps; attacks come in and are all there
CONFIDENCE_WEIGHT = 0.3  # of the loss

# kind, strength from, to, how often
ATTACKS = (
    ("jpeg", 40, 95, 0.34),
    ("resize", 0.45, 0.95, 0.14),
    ("crop", 0.85, 1.0, 0.12),
    ("brightness", 0.65, 1.35, 0.07),
    ("contrast", 0.65, 1.35, 0.07),
    ("blur", 0.2, 1.3, 0.09),
    ("noise", 0.0, 0.04, 0.09),
)  # the rest meets none
GEOMETRIC = ("crop",)  # these move pixels: no gradient can go through them as if nothing had happened


@dataclass(frozen=True)
class Training:
    """Result of train. Losses and accuracy are means over the last 100 steps, on attacked images."""

    checkpoint: Path
    steps: int
    resumed_at: int
    seconds: float
    bit_loss: float
    bit_accuracy: float
    confidence_loss: float
    finished: bool

    def __rich__(self) -> RenderableType:
        made = f"{self.checkpoint}: " if self.finished else "stopped, no checkpoint yet; run again to go on: "
        return Text(
            f"{made}{self.steps} steps in {self.seconds:.0f} s; on the last attacked batches: "
            f"bit accuracy {self.bit_accuracy:.4f}, bit loss {self.bit_loss:.4f}, confidence loss {self.confidence_loss:.4f}"
        )


def _ramp(progress: float, start: float, end: float) -> float:
    """Return 0 before `start`, 1 after `end`, and a straight line between."""
    return min(1.0, max(0.0, (progress - start) / (end - start)))


def _rate(progress: float) -> float:
    """Return the share of the learning rates: a short rise, then half a cosine down to 0."""
    return _ramp(progress, 0, WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * progress))


def _draw_attack(rng: np.random.Generator, presence: float) -> Attack | None:
    """Return a random attack, or None; `presence` is how many of all attacks are in already."""
    kinds, low, high, shares = zip(*ATTACKS, strict=True)
    index = int(rng.choice(len(kinds) + 1, p=[*shares, 1 - sum(shares)]))
    if index == len(kinds) or rng.random() > presence:
        return None
    return Attack(kinds[index], float(rng.uniform(low[index], high[index])), seed=int(rng.integers(2**32)))


def _to_pixels(images: "Tensor") -> list[Pixels]:
    """Return float32 (N, 3, S, S) in [0, 1] as N times uint8 (S, S, 3)."""
    array = images.detach().mul(255).round().byte().permute(0, 2, 3, 1)  # (N, 3, S, S) -> (N, S, S, 3)
    return list(array.numpy())


def _from_pixels(pixels: list[Pixels]) -> "Tensor":
    """Return N times uint8 (S, S, 3) as float32 (N, 3, S, S) in [0, 1]."""
    import torch

    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float().div(255)  # (N, S, S, 3) -> (N, 3, S, S)


def _attacked(images: "Tensor", attacks: list[Attack | None]) -> "Tensor":
    """Return the images after 8 bits and their attacks; gradients pass as if nothing had happened, or stop where pixels moved."""
    import torch

    pairs = zip(_to_pixels(images), attacks, strict=True)
    met = [pixels if attack is None else stretch(attack(pixels), images.shape[-1]) for pixels, attack in pairs]
    moved = torch.tensor([attack is not None and attack.kind in GEOMETRIC for attack in attacks])[:, None, None, None]
    values = _from_pixels(met)
    return torch.where(moved, values, images + (values - images).detach())


@dataclass
class _Learner:
    """What training changes."""

    detector: "Detector"
    embedder: "Embedder"
    optimizer: "torch.optim.Optimizer"

    @classmethod
    def untrained(cls, card: Card, seed: int) -> "_Learner":
        import torch

        from models.miniseal.embedder import Embedder
        from shared.networks.detector import Detector

        torch.manual_seed(seed)
        sizes = card.encoder
        assert isinstance(sizes, ConvNeXt)
        detector, embedder = Detector(sizes, card.nbits), Embedder(card.nbits)
        groups: list[dict[str, Any]] = [
            {"params": detector.parameters(), "rate": DETECTOR_RATE},
            {"params": embedder.parameters(), "rate": PATTERN_RATE},
        ]
        return cls(detector, embedder, torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY))

    def state(self) -> dict[str, "Tensor"]:
        parts = {"detector": self.detector, "embedder": self.embedder}
        return {f"{part}.{key}": value for part, module in parts.items() for key, value in module.state_dict().items()}

    def learn(self, pictures: list[Any], rng: np.random.Generator, progress: float) -> tuple[float, float, float]:
        """Take one step; return the loss of the bits, the accuracy of the bits, and the loss of the confidence."""
        import torch
        from torch.nn import functional as F

        from models.miniseal.embedder import STRENGTH, embed
        from models.miniseal.pictures import random_crop

        crops = _from_pixels([random_crop(pictures[rng.integers(len(pictures))], rng) for _ in range(MARKED + UNMARKED)])
        message = torch.from_numpy(rng.random((MARKED, self.embedder.patterns.shape[0])) < 0.5)
        strength = FIRST_STRENGTH * (STRENGTH / FIRST_STRENGTH) ** _ramp(progress, WARM_UP, QUIET_AFTER)
        images = torch.cat([embed(self.embedder, crops[:MARKED], message, strength), crops[MARKED:]])
        presence = _ramp(progress, ATTACKS_FROM, ATTACKS_FULL)
        output = self.detector(_attacked(images, [_draw_attack(rng, presence) for _ in images]))

        truth = message.float()
        bit_loss = F.binary_cross_entropy_with_logits(output[:MARKED, 1:], truth)
        marked = (torch.arange(len(images)) < MARKED).float()
        confidence_loss = F.binary_cross_entropy_with_logits(output[:, 0], marked)

        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * _rate(progress)
        self.optimizer.zero_grad()
        torch.autograd.backward(bit_loss + CONFIDENCE_WEIGHT * confidence_loss)
        for group in self.optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], LARGEST_GRADIENT, error_if_nonfinite=True)
        self.optimizer.step()
        accuracy = ((output[:MARKED, 1:] > 0) == message).float().mean()
        return bit_loss.item(), accuracy.item(), confidence_loss.item()


def _save_state(path: Path, learner: _Learner, progress: dict[str, Any]) -> None:
    import torch

    with draft_beside(path) as draft:
        torch.save({**progress, "learner": learner.state(), "optimizer": learner.optimizer.state_dict()}, draft)
        draft.replace(path)


def _load_state(path: Path, learner: _Learner, settings: dict[str, object]) -> tuple[int, float, list[tuple[float, float, float]]]:
    """Load an interrupted run into the learner; return steps done, seconds taken, and the losses of the last steps."""
    import torch

    try:
        content = torch.load(path, weights_only=True)
        before, learned, optimizer = content["settings"], content["learner"], content["optimizer"]
        progress = content["done"], content["seconds"], content["recent"]
    except Exception as error:  # noqa: BLE001 - a damaged file can raise anything here, and all of it means the same
        raise ToolError("the interrupted run is damaged", where=path, got=first_line(error), remedy="use --restart") from None
    if before != settings:
        raise ToolError("an interrupted run had other settings", where=path, got=before, expected=settings, remedy="use --restart")
    for part in ("detector", "embedder"):
        values = {key.removeprefix(f"{part}."): value for key, value in learned.items() if key.startswith(f"{part}.")}
        getattr(learner, part).load_state_dict(values)
    learner.optimizer.load_state_dict(optimizer)
    return progress


def _write_checkpoint(path: Path, learner: _Learner, args: dict[str, object]) -> None:
    """Write the checkpoint in the published full layout: detector, embedder, and the arguments next to them."""
    from shared.networks.checkpoint import write_safetensors

    state = learner.state()
    with draft_beside(path) as draft:
        write_safetensors(draft, {key: value.shape for key, value in state.items()}, state.items(), {"args": json.dumps(args)})
        draft.replace(path)


def _require_absent(output: Path, *, overwrite: bool) -> None:
    if output.is_dir():
        raise ToolError("the output is a folder", where=output, expected="a file name")
    if output.exists() and not overwrite:
        raise ToolError("the output exists", where=output, remedy="use --overwrite to replace it, or choose another file with -o")


def _means(recent: list[tuple[float, float, float]]) -> tuple[float, float, float]:
    bit_loss, bit_accuracy, confidence_loss = np.mean(recent, axis=0)
    return float(bit_loss), float(bit_accuracy), float(confidence_loss)


def train(
    *,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the whole training; fewer for a trial.")] = STEPS,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights, pictures, messages and attacks.")] = 0,
    threads: Annotated[int, typer.Option(min=1, max=256, help="Threads of torch; another number rounds differently.")] = 2,
    output: Annotated[Path, typer.Option("--output", "-o", help="The checkpoint to write.")] = RETRAINED,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Forget an interrupted run.")] = False,
    stop_after: Annotated[int | None, typer.Option(min=1, help="Stop after this many steps; run again to go on.")] = None,
) -> Training:
    """Train miniseal, detector and embedder together, from scratch; an interrupted run goes on where it was.

    Raises:
        ToolError: The checkpoint exists, or an interrupted run had other settings.
    """
    import torch

    from models.miniseal.pictures import training_pictures

    output.parent.mkdir(exist_ok=True)
    _require_absent(output, overwrite=overwrite)
    card = load_card("miniseal")
    torch.set_num_threads(threads)
    settings: dict[str, object] = {"steps": steps, "seed": seed, "threads": threads, "depths": card.depths, "dims": card.dims}
    # What an interrupted run must share with the one that goes on.
    guard: dict[str, object] = {**settings, "torch": str(torch.__version__), "code": code_version("models.miniseal.train")}
    learner = _Learner.untrained(card, seed)
    state_path = output.with_name(f"{output.stem}_interrupted.pth")
    recent: list[tuple[float, float, float]] = []
    done, seconds = 0, 0.0
    if restart:
        state_path.unlink(missing_ok=True)
    if state_path.exists():
        done, seconds, recent = _load_state(state_path, learner, guard)
    resumed_at, last = done, min(steps, stop_after or steps)
    pictures = training_pictures(seed)
    start = time.monotonic() - seconds
    with step_progress("train", steps, done) as advance:
        while done < last:
            recent = [*recent[-99:], learner.learn(pictures, np.random.default_rng([seed, done]), done / steps)]
            done += 1
            advance("bit loss {:.4f}, bit accuracy {:.4f}, confidence loss {:.4f}".format(*_means(recent)))
            if done % SAVE_EVERY == 0 or done == last:
                progress = {"settings": guard, "done": done, "seconds": time.monotonic() - start, "recent": recent}
                _save_state(state_path, learner, progress)
    seconds = time.monotonic() - start
    if done == steps:
        _require_absent(output, overwrite=overwrite)  # half an hour has passed
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        _write_checkpoint(output, learner, {"model": "miniseal", "nbits": card.nbits, **settings, **versions})
        state_path.unlink(missing_ok=True)
    return Training(output, done, resumed_at, round(seconds, 1), *_means(recent), finished=done == steps)


if __name__ == "__main__":
    run(train, dependencies="train-miniseal")
