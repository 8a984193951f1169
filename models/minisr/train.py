"""Train minisr from scratch, and write it as an ONNX model.

Example:
    python -m models.minisr.train --steps 300 --output trial.onnx

A step takes a batch of patches at half size and asks the network for the patches. Whatever is random comes from the seed and the
number of the step.
"""

import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.console import RenderableType
from rich.text import Text

from shared.command.cli import run, step_progress
from shared.command.errors import ToolError
from shared.files.atomic import draft_beside
from shared.media.images import Pixels
from shared.networks.card import CARDS, PRODUCTS

if TYPE_CHECKING:
    from torch import Tensor

    from models.minisr.network import SuperResolution

FOLDER = CARDS / "minisr"
FILE_NAME = "minisr_x2.onnx"
RETRAINED = PRODUCTS / "minisr_retrained" / FILE_NAME  # next to the shipped one
STEPS = 10_000
BATCH = 16
RATE = 1.5e-3
LARGEST_GRADIENT = 0.1
WARM_UP = 0.02  # of all steps
OPSET = 18
EXAMPLE_SIZE = 32  # pixels of the image that export traces


@dataclass(frozen=True)
class Training:
    """Result of train; the loss is the mean absolute error over the last 100 steps, pixels in [0, 1]."""

    model: Path
    steps: int
    seconds: float
    loss: float
    parameters: int
    size_bytes: int

    def __rich__(self) -> RenderableType:
        return Text(
            f"{self.model}: {self.steps} steps in {self.seconds:.0f} s, {self.parameters} parameters, "
            f"{self.size_bytes} bytes; mean absolute error of the last patches {self.loss:.5f}"
        )


def _rate(progress: float) -> float:
    """Return the share of the learning rate: a short rise, then half a cosine down to 0."""
    return min(1.0, progress / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * progress))


def _tensor(batch: list[Pixels]) -> "Tensor":
    """Return N times uint8 (S, S, 3) as float32 (N, 3, S, S) in [0, 1]."""
    import torch

    return torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).float().div(255)  # (N, S, S, 3) -> (N, 3, S, S)


def _learned(steps: int, seed: int) -> tuple["SuperResolution", float]:
    """Return the trained network, and the mean loss of the last steps."""
    import torch
    from torch.nn import functional as F

    from models.minisr.network import SuperResolution
    from models.minisr.pictures import random_pair, training_pictures

    torch.manual_seed(seed)
    network, pictures = SuperResolution(), training_pictures(seed)
    optimizer = torch.optim.Adam(network.parameters())
    recent: list[float] = []
    with step_progress("train", steps) as advance:
        for number in range(steps):
            rng = np.random.default_rng([seed, number])
            pairs = [random_pair(pictures[rng.integers(len(pictures))], rng) for _ in range(BATCH)]
            small, large = (_tensor(list(side)) for side in zip(*pairs, strict=True))
            loss = F.l1_loss(network(small), large)
            for group in optimizer.param_groups:
                group["lr"] = RATE * _rate(number / steps)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(network.parameters(), LARGEST_GRADIENT, error_if_nonfinite=True)
            optimizer.step()
            recent = [*recent[-99:], loss.item()]
            advance(f"error {np.mean(recent):.5f}")
    return network, float(np.mean(recent))


def _export(network: "SuperResolution", draft: Path, notes: dict[str, object]) -> None:
    """Write the network as ONNX with free batch, height and width; input `image`, output `output_0`."""
    import torch

    from shared.formats.onnx_graph import without_traces, write_metadata

    example = torch.zeros(1, 3, EXAMPLE_SIZE, EXAMPLE_SIZE)
    free = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    program = torch.onnx.export(
        network.eval(),
        (example,),
        dynamo=True,
        input_names=["image"],
        output_names=["output_0"],
        dynamic_shapes=(free,),
        opset_version=OPSET,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    without_traces(model)
    write_metadata(model, notes)
    draft.write_bytes(model.SerializeToString(deterministic=True))


def train(
    *,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the whole training; fewer for a trial.")] = STEPS,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and patches.")] = 0,
    threads: Annotated[int, typer.Option(min=1, max=256, help="Threads of torch; another number rounds differently.")] = 2,
    output: Annotated[Path, typer.Option("--output", "-o", help="The ONNX model to write.")] = RETRAINED,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model.")] = False,
) -> Training:
    """Train minisr from scratch, and write it as an ONNX model.

    Raises:
        ToolError: The model exists, or its folder can't be written.
    """
    import torch

    output.parent.mkdir(parents=True, exist_ok=True)
    if output.exists() and not overwrite:
        raise ToolError("the output exists", where=output, remedy="use --overwrite to replace it, or choose another file with -o")
    torch.set_num_threads(threads)
    start = time.monotonic()
    network, loss = _learned(steps, seed)
    notes: dict[str, object] = {
        "model": "minisr",
        "scale": 2,
        "input_range": "0..1",
        "steps": steps,
        "seed": seed,
        "threads": threads,
    }
    notes |= {"python": platform.python_version(), "torch": str(torch.__version__)}
    with draft_beside(output) as draft:
        _export(network, draft, notes)
        size = draft.stat().st_size
        draft.replace(output)
    parameters = sum(value.numel() for value in network.parameters())
    return Training(output, steps, round(time.monotonic() - start, 1), loss, parameters, size)


if __name__ == "__main__":
    run(train, dependencies="train-minisr")
