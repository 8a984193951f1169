"""Cut small and large versions of the same places out of photos, to calibrate minisr with and to measure it on.

Example:
    python -m models.minisr.make_samples --output models/minisr/samples
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import RenderableType
from rich.text import Text

from models.minisr.train import FOLDER
from shared.command.cli import run
from shared.command.errors import ToolError
from shared.media.images import Pixels

SIDE = 176  # pixels of a large image
MEASURED = 3  # places of each photo that training never saw
CALIBRATED = 4  # places of each photo to calibrate with
CALIBRATION_PHOTOS = (
    "astronaut",
    "hubble_deep_field",
    "moon",
    "retina",
    "stereo_motorcycle",
)  # of scikit-image, in the public domain or CC0


@dataclass(frozen=True)
class Samples:
    """Result of make_samples."""

    folder: Path
    pairs: int
    calibration: int
    size_bytes: int

    def __rich__(self) -> RenderableType:
        size = f"{self.size_bytes / 2**20:.2f} MiB"
        return Text(f"{self.folder}: {self.pairs} pairs to measure on, {self.calibration} small images to calibrate with, {size}")


def cut_out(photo: Pixels, rng: np.random.Generator) -> Pixels:
    """Return a random place of a photo as uint8 (SIDE, SIDE, 3) RGB, unscaled."""
    height, width = photo.shape[:2]
    left, top = int(rng.integers(width - SIDE + 1)), int(rng.integers(height - SIDE + 1))
    return np.ascontiguousarray(photo[top : top + SIDE, left : left + SIDE])


def make_samples(
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")] = FOLDER / "samples",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the places.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the samples there.")] = False,
) -> Samples:
    """Cut small and large versions of the same places out of photos, to calibrate minisr with and to measure it on.

    Raises:
        ToolError: The folder has samples already.
    """
    from models.miniseal.make_samples import write_png
    from models.miniseal.pictures import HELD_OUT_PHOTOS, photo
    from models.minisr.pictures import halved

    if output.exists() and any(output.iterdir()) and not overwrite:
        raise ToolError("the folder is not empty", where=output, remedy="use --overwrite, or choose another folder with -o")
    rng = np.random.default_rng(seed)
    size = pairs = calibration = 0
    for name in HELD_OUT_PHOTOS:
        for _ in range(MEASURED):
            large = cut_out(photo(name), rng)
            file = f"{pairs:02d}_{name}.png"
            size += write_png(output / "large" / file, large) + write_png(output / "small" / file, halved(large))
            pairs += 1
    for name in CALIBRATION_PHOTOS:
        for _ in range(CALIBRATED):
            size += write_png(output / "calibration" / f"{calibration:02d}_{name}.png", halved(cut_out(photo(name), rng)))
            calibration += 1
    return Samples(output, pairs, calibration, size)


if __name__ == "__main__":
    run(make_samples, dependencies="train-minisr")
