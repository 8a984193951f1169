"""Both ends of a watermark: what each detector reads of what each embedder marked, and how good the marked images are.

Letters in shapes: K message bits.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Column, Table

from shared.command.cli import step
from shared.command.errors import ToolError
from shared.files.atomic import write_whole
from shared.media.attacks import Attack
from shared.media.images import Pixels, read_pixels, to_png
from shared.metrics.gates import GateResult, check_gate
from shared.metrics.metrics import psnr_db
from shared.metrics.output_error import MOST_DB
from shared.runtime.processes import ChildError
from shared.watermark import WatermarkEmbedder
from shared.watermark.embedding import is_model
from shared.watermark.message import Labelled
from tools.compare.accuracy import Accuracy, Condition, largest_drop, read_accuracy
from tools.compare.image_quality import score

PEAK, MESSAGE_SEED = 255.0, 1
MARKING_GATES = ("max_marking_drop", "min_marked_psnr", "min_marking_psnr")


@dataclass(frozen=True)
class Marking:
    """What an embedder made of all photos.

    Args:
        embedder: The model or checkpoint.
        psnr_db: Of the marked images to their originals, all together.
        worst_psnr_db: Of the worst image.
        ssim: Structural similarity to the originals, mean; None where an image is too small.
        to_first_db: PSNR to what the first embedder made, all together; None for the first.
    """

    embedder: Path
    psnr_db: float
    worst_psnr_db: float
    ssim: float | None
    to_first_db: float | None


@dataclass(frozen=True)
class Cell:
    """What a detector read of what an embedder marked.

    Args:
        embedder: Number of the embedder, counted from 0.
        detector: Number of the detector; 0 is the reference.
        conditions: Without attack first, then under each attack.
        drop: Largest loss of bit accuracy under any attack, to the first embedder and the reference; None where nothing counts.
    """

    embedder: int
    detector: int
    conditions: list[Condition]
    drop: float | None


@dataclass(frozen=True)
class Matrix:
    """All embedders and detectors.

    Args:
        markings: Of each embedder.
        detectors: The models, the reference first.
        cells: For each embedder, then each detector that ran.
        photos: The originals.
        marked: What each embedder made of them.
        gates: Gates of the matrix, and whether they were kept.
    """

    markings: list[Marking]
    detectors: list[Path]
    cells: list[Cell]
    photos: list[Path]
    marked: list[list[Path]]
    gates: list[GateResult] = field(default_factory=list)

    def label(self, cell: Cell) -> str:
        """Return a cell's embedder, by its number, and its detector."""
        return f"{cell.embedder + 1}, {self.detectors[cell.detector].stem}"

    @property
    def ok(self) -> bool:
        """Whether every gate was kept."""
        return all(gate.ok for gate in self.gates)

    def checked(self, limits: Mapping[str, float], alternatives: int = 0) -> "Matrix":
        """Return the matrix with its gates: `max_marking_drop` of all cells, the others of all embedders.

        The last `alternatives` detectors may break theirs.
        """
        gated = len(self.detectors) - alternatives
        drops = [cell.drop for cell in self.cells if cell.drop is not None and cell.detector < gated]
        nearness = [marking.to_first_db for marking in self.markings if marking.to_first_db is not None]
        values = {
            "max_marking_drop": max(drops, default=0.0),  # where the references read nothing, compare says so
            "min_marked_psnr": min(marking.worst_psnr_db for marking in self.markings),
            "min_marking_psnr": min(nearness, default=None),
        }
        return replace(
            self, gates=[check_gate(name, values[name], limit) for name, limit in limits.items() if name in MARKING_GATES]
        )


@dataclass(frozen=True)
class MarkedPhotos:
    """What embedders made of photos, in files.

    Args:
        markings: Of each embedder.
        photos: The originals.
        labelled: Marked photos and their messages, all of an embedder in a row.
    """

    markings: list[Marking]
    photos: list[Path]
    labelled: list[Labelled]

    def of(self, number: int) -> list[Labelled]:
        """Return what the embedder of that number marked."""
        count = len(self.photos)
        return self.labelled[number * count : (number + 1) * count]

    def read(self, answers: Sequence[NDArray[Any]], attacks: Sequence[Attack | None]) -> list[Accuracy]:
        """Return what a detector read on what each embedder marked.

        Args:
            answers: Outputs float32 (1, 1 + K), attack by attack, embedder by embedder, photo by photo.
            attacks: None first, then the attacks.
        """
        rows, count = len(self.markings), len(self.photos)
        starts = [[(number * rows + row) * count for number in range(len(attacks))] for row in range(rows)]
        own = [[answer for start in of_row for answer in answers[start : start + count]] for of_row in starts]
        return [read_accuracy(self.of(row), attacks, own[row]) for row in range(rows)]

    def matrix(self, detectors: Sequence[Path], answers: Sequence[list[Accuracy] | None]) -> Matrix:
        """Return what each detector read: for each one its accuracy on what each embedder marked, None where it does not run."""
        first = answers[0]
        assert first is not None
        cells = [
            Cell(row, column, accuracies[row].conditions, largest_drop(first[0], accuracies[row]))
            for row in range(len(self.markings))
            for column, accuracies in enumerate(answers)
            if accuracies is not None
        ]
        marked = [[one.file for one in self.of(row)] for row in range(len(self.markings))]
        return Matrix(self.markings, list(detectors), cells, self.photos, marked)


def require_place_for_marks(output: Path, *, replaces: bool) -> None:
    """Raise ToolError now for what writing the report would fail on after the photos were marked."""
    if output.exists() and not replaces:
        raise ToolError("the report exists", where=output, remedy="use --overwrite to replace it, or choose another file with -o")
    if not output.parent.is_dir():
        raise ToolError("no such folder", where=output.parent, remedy="create it, or choose another file with -o")


def mark_photos(embedders: Sequence[Path], card: str | None, photos: Sequence[Path], folder: Path, threads: int) -> MarkedPhotos:
    """Mark photos with all embedders, each photo with the same message by all of them, and write them as PNG files.

    Args:
        embedders: Models of convert_embedder, or checkpoints.
        card: Card of the checkpoints.
        photos: The originals.
        folder: Where a folder for each embedder is made.
        threads: Threads of the runtime.

    Raises:
        ToolError: An embedder does not run, has another message length, or a photo can't be read.
    """
    markings: list[Marking] = []
    labelled: list[Labelled] = []
    first: list[Pixels] = []
    for number, path in enumerate(embedders):
        place = folder / f"{number}_{path.stem}"
        place.mkdir(parents=True, exist_ok=True)
        made = _marked(path, None if is_model(path) else card, photos, place, threads)
        nbits = [len(one.message) for one in (*labelled[:1], *made[:1]) if one.message is not None]
        if len(set(nbits)) > 1:
            what, remedy = "the embedders have messages of different lengths", "compare embedders of one model"
            raise ToolError(what, where=path, got=f"{nbits[1]} bits", expected=f"{nbits[0]} bits", remedy=remedy)
        pixels = [read_pixels(one.file) for one in made]
        markings.append(_judged(path, [read_pixels(photo) for photo in photos], pixels, first))
        first = first or pixels
        labelled += made
    return MarkedPhotos(markings, list(photos), labelled)


def _marked(path: Path, card: str | None, photos: Sequence[Path], folder: Path, threads: int) -> list[Labelled]:
    """Mark photos with one embedder."""
    made = []
    try:
        with step(f"mark {len(photos)} photos with {path.name}"), WatermarkEmbedder(path, card=card, threads=threads) as embedder:
            messages = np.random.default_rng(MESSAGE_SEED).random((len(photos), embedder.nbits)) < 0.5
            for number, (photo, message) in enumerate(zip(photos, messages, strict=True)):
                target = folder / f"{number:02d}_{photo.stem}.png"
                write_whole(target, to_png(embedder.embed(photo, message)))
                made.append(Labelled(target, message, photo))
    except ChildError as error:
        raise ToolError("the embedder does not run", where=path, got=error, remedy="see what verify says of it") from None
    return made


def _judged(path: Path, originals: Sequence[Pixels], marked: Sequence[Pixels], first: Sequence[Pixels]) -> Marking:
    """Return how good marked images are, and how near to the first embedder's."""
    scores = [score(one, other, PEAK) for one, other in zip(originals, marked, strict=True)]
    similarities = [one.ssim for one in scores if one.ssim is not None]
    return Marking(
        embedder=path,
        psnr_db=_psnr(originals, marked),
        worst_psnr_db=min(one.psnr_db for one in scores),
        ssim=float(np.mean(similarities)) if len(similarities) == len(scores) else None,
        to_first_db=_psnr(first, marked) if first else None,
    )


def _psnr(ones: Sequence[Pixels], others: Sequence[Pixels]) -> float:
    """Return the PSNR over all values of all images."""
    flat = [np.concatenate([pixels.ravel() for pixels in images]).astype(np.float64) for images in (ones, others)]
    return min(psnr_db(flat[0], flat[1], PEAK), MOST_DB)


def matrix_tables(matrix: Matrix) -> Iterator[Table]:
    """Yield the tables of a matrix for a terminal: the marked images, what was read of them, and the gates."""
    images = Table("embedder", "PSNR to the originals", "worst", "SSIM", "PSNR to the first embedder's", title="marked photos")
    for marking in matrix.markings:
        similarity = "-" if marking.ssim is None else f"{marking.ssim:.4f}"
        nearness = "-" if marking.to_first_db is None else f"{marking.to_first_db:.1f} dB"
        worst = f"{marking.worst_psnr_db:.1f} dB"
        images.add_row(marking.embedder.name, f"{marking.psnr_db:.1f} dB", worst, similarity, nearness)
    yield images
    title = "bits read right: embedder (row of the table above), detector"
    read = Table("attack", *(Column(matrix.label(cell), overflow="fold") for cell in matrix.cells), title=title)
    for number, condition in enumerate(matrix.cells[0].conditions):
        read.add_row(condition.attack, *(f"{cell.conditions[number].bit_accuracy:.2%}" for cell in matrix.cells))
    read.add_row("largest loss", *("-" if cell.drop is None else f"{100 * cell.drop:.2f} points" for cell in matrix.cells))
    yield read
    if matrix.gates:
        gates = Table("gate of the embedders", "value", "limit", "")
        for gate in matrix.gates:
            value = "none" if gate.value is None else f"{gate.value:.6g}"
            gates.add_row(gate.name, value, f"{gate.limit:g}", "ok" if gate.ok else "FAILED")
        yield gates
