"""Read the message of images and videos with a detector.

Example:
    python -m tools.read marked.png --detector videoseal_detector_videoseal_256_int8.tflite
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Column, Table

from shared.command.cli import run, step_progress
from shared.command.errors import ToolError
from shared.command.options import Threads
from shared.media.images import SUFFIXES, image_files
from shared.media.video import VIDEO_SUFFIXES, is_video
from shared.runtime.processes import ChildError
from shared.watermark import Aggregation, Detection, WatermarkDetector

LARGEST_CHANCE = 1e-6  # that a random message agrees as well: above it nothing was read
SHOWN = 20  # rows of the table; the JSON has all

Detector = Annotated[Path, typer.Option(help="A .tflite or .onnx detector, or a checkpoint with --card.")]
CardName = Annotated[str | None, typer.Option(help="Model card of a checkpoint: videoseal, pixelseal, or a path to a .toml.")]
Expected = Annotated[str | None, typer.Option(help="The message that should be there; exit code 1 where it is not.")]
Frames = Annotated[int, typer.Option(min=1, max=10_000, help="Frames of a video, spread evenly.")]
Means = Annotated[Aggregation, typer.Option(help="How the frames of a video are put together.")]


@dataclass(frozen=True)
class Reading:
    """What was read in one file.

    Args:
        file: The file.
        is_marked: Whether the detector holds it for marked.
        confidence: From 0 to 1.
        message: Hexadecimal digits.
        bits: Binary digits.
        bit_accuracy: Share of the bits that are as expected; None where nothing is.
        p_value: Probability that a random message agrees as well; None likewise.
        frames: Frames that were read; 0 of an image.
    """

    file: str
    is_marked: bool
    confidence: float
    message: str
    bits: str
    bit_accuracy: float | None = None
    p_value: float | None = None
    frames: int = 0


@dataclass(frozen=True)
class Readings:
    """Result of read."""

    detector: Path
    nbits: int
    readings: list[Reading]
    message: str

    @property
    def ok(self) -> bool:
        """Whether the expected message, if there is one, was read in every file."""
        return all(one.p_value is None or one.p_value <= LARGEST_CHANCE for one in self.readings)

    def __rich__(self) -> RenderableType:
        has_expected = any(one.bit_accuracy is not None for one in self.readings)
        table = Table(
            "file", "marked", "confidence", Column("message", overflow="fold"), *(("bits right",) if has_expected else ())
        )
        for one in self.readings[:SHOWN]:
            right = (f"{one.bit_accuracy:.1%} (p {one.p_value:.1g})",) if one.bit_accuracy is not None else ()
            table.add_row(one.file, "yes" if one.is_marked else "no", f"{one.confidence:.3f}", one.message, *right)
        rest = len(self.readings) - SHOWN
        return Lines(table, *([f"and {rest} more; --json has all"] if rest > 0 else []), self.message)


def _reading(file: str, found: Detection) -> Reading:
    agreement = found.agreement
    return Reading(
        file=file,
        is_marked=found.is_marked,
        confidence=found.confidence,
        message=found.hex,
        bits=found.bit_string,
        bit_accuracy=None if agreement is None else agreement.bit_accuracy,
        p_value=None if agreement is None else agreement.p_value,
        frames=len(found.frames),
    )


@contextmanager
def _opened(detector: Path, card: str | None, threads: int | None) -> Iterator[WatermarkDetector]:
    try:
        with WatermarkDetector(detector, card=card, threads=threads) as opened:
            yield opened
    except ChildError as error:
        raise ToolError("the detector does not run", where=detector, got=error, remedy="see what verify says of it") from None


def read(
    source: Annotated[Path, typer.Argument(help="An image, a folder of images, or a video.")],
    *,
    detector: Detector,
    card: CardName = None,
    expected: Expected = None,
    frames: Frames = 16,
    aggregation: Means = "avg",
    threads: Threads = None,
) -> Readings:
    """Read the message of images and videos with a detector.

    Raises:
        ToolError: No image or video, no detector, or an expected message of another length.
    """
    files = image_files(source) if source.is_dir() else [source]
    if not source.is_dir() and not is_video(source) and source.suffix.lower() not in SUFFIXES:
        endings = ", ".join((*SUFFIXES, *VIDEO_SUFFIXES))
        raise ToolError("no image or video by its name", where=source, expected=f"a name ending in one of {endings}")
    readings = []
    steps = frames if is_video(source) else len(files)
    with _opened(detector, card, threads) as opened, step_progress(f"read {source.name}", steps) as advance:
        nbits = opened.nbits
        for file in files:
            name = str(file.relative_to(source)) if source.is_dir() else file.name
            if is_video(source):
                found = opened.detect_video(file, frames=frames, expected=expected, aggregation=aggregation, on_frame=advance)
            else:
                found = opened.detect(file, expected=expected)
                advance("")
            readings.append(_reading(name, found))
    marked = sum(one.is_marked for one in readings)
    text = f"{marked} of {len(readings)} held for marked; {nbits} bits each"
    missed = [one.file for one in readings if one.p_value is not None and one.p_value > LARGEST_CHANCE]
    if missed:
        text += f"; FAILED: the expected message is not in {', '.join(missed[:SHOWN])}"
    return Readings(detector, nbits, readings, text)


if __name__ == "__main__":
    run(read)
