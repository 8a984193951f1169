"""Run two face landmarkers in the real MediaPipe on the same photos, and say how far their answers are apart.

Example:
    python -m models.face_landmarker.check face_landmarker.task face_landmarker_int8.task photos --max-landmark-error 0.85
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table

from models.face_landmarker.mediapipe_runtime import Face, open_landmarker
from models.face_landmarker.photos import read_photos
from shared.command.cli import run, step, to_json
from shared.command.options import Overwrite, Refresh
from shared.command.resources import size_text
from shared.files import artifacts
from shared.files.plan import Plan
from shared.media.images import image_files

RUNS = 30  # timed, in turns, over the photos with a face
PACKAGES = ("mediapipe", "numpy")


@dataclass(frozen=True)
class PhotoChecked:
    """What both bundles say of one photo.

    Args:
        name: The photo.
        faces_before: Faces the original finds.
        faces_after: Faces the candidate finds.
        landmark_error_percent: Mean distance of the 478 landmarks in the picture plane, in per cent of the face's width from cheek
            to cheek; the worst face. None where the numbers of faces differ, or are 0.
        blendshape_error: Mean difference of the 52 scores; the worst face.
    """

    name: str
    faces_before: int
    faces_after: int
    landmark_error_percent: float | None = None
    blendshape_error: float | None = None


@dataclass(frozen=True)
class FaceLandmarkerChecked:
    """Result of check."""

    original: str
    candidate: str
    size_before_bytes: int
    size_after_bytes: int
    photos: list[PhotoChecked]
    before_ms: float
    after_ms: float
    broken: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every limit was kept."""
        return not self.broken

    def __rich__(self) -> RenderableType:
        table = Table("photo", "faces before", "after", "landmarks moved, % of the face", "blendshapes moved")
        for photo in self.photos:
            moved = "-" if photo.landmark_error_percent is None else f"{photo.landmark_error_percent:.3f}"
            scores = "-" if photo.blendshape_error is None else f"{photo.blendshape_error:.4f}"
            table.add_row(photo.name, str(photo.faces_before), str(photo.faces_after), moved, scores)
        size = f"{self.size_before_bytes} -> {self.size_after_bytes} bytes ({size_text(self.size_after_bytes)})"
        speed = f"{self.before_ms:.2f} -> {self.after_ms:.2f} ms a face photo in MediaPipe"
        verdict = f"FAILED: {'; '.join(self.broken)}" if self.broken else "every limit kept"
        return Lines(table, f"{self.candidate}: {size}, {speed}", verdict)


def compare_faces(name: str, before: Sequence[Face], after: Sequence[Face]) -> PhotoChecked:
    """Compare the faces two bundles find in one photo, each with the nearest of the other side."""
    if not before or len(before) != len(after):
        return PhotoChecked(name, len(before), len(after))
    errors, scores, free = [], [], list(after)
    for face in before:
        center = face.landmarks.mean(axis=0)
        other = min(free, key=lambda other: float(np.linalg.norm(other.landmarks.mean(axis=0) - center)))
        free.remove(other)
        apart = np.linalg.norm(other.landmarks[:, :2] - face.landmarks[:, :2], axis=1)
        errors.append(100 * float(apart.mean()) / face.width)
        scores.append(float(np.abs(other.blendshapes - face.blendshapes).mean()))
    return PhotoChecked(name, len(before), len(after), max(errors), max(scores))


def _broken(photos: Sequence[PhotoChecked], slowdown: float, limits: dict[str, float]) -> list[str]:
    broken = [f"{p.name}: {p.faces_before} faces before, {p.faces_after} after" for p in photos if p.faces_before != p.faces_after]
    for photo in photos:
        if photo.landmark_error_percent is not None and photo.landmark_error_percent > limits["landmark"]:
            broken.append(f"{photo.name}: landmarks moved {photo.landmark_error_percent:.3f} %, limit {limits['landmark']:g} %")
        if photo.blendshape_error is not None and photo.blendshape_error > limits["blendshape"]:
            broken.append(f"{photo.name}: blendshapes moved {photo.blendshape_error:.4f}, limit {limits['blendshape']:g}")
    if not any(photo.faces_before for photo in photos):
        broken.append("the original finds no face in any photo")
    if slowdown > limits["slowdown"]:
        broken.append(f"{slowdown:.2f} times the original's latency, limit {limits['slowdown']:g}")
    return broken


def check(
    original: Annotated[Path, typer.Argument(help="The face landmarker, .task.")],
    candidate: Annotated[Path, typer.Argument(help="The quantized bundle, .task.")],
    photos: Annotated[Path | None, typer.Argument(help="Folder of photos with faces, or one; default: scikit-image's.")] = None,
    *,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the result as JSON.")] = None,
    max_landmark_error: Annotated[float, typer.Option(min=0, help="Gate: per cent of the face's width.")] = 0.85,
    max_blendshape_error: Annotated[float, typer.Option(min=0, help="Gate: mean difference of the scores.")] = 0.026,
    max_slowdown: Annotated[float, typer.Option(min=0, help="Gate: times the original's latency.")] = 1.1,
    overwrite: Overwrite = False,
    refresh: Refresh = False,
) -> FaceLandmarkerChecked:
    """Run two face landmarkers in the real MediaPipe on the same photos, and say how far their answers are apart.

    Raises:
        ToolError: MediaPipe is not here, or does not accept a bundle.
    """
    limits = {"landmark": max_landmark_error, "blendshape": max_blendshape_error, "slowdown": max_slowdown}

    def find() -> FaceLandmarkerChecked:
        read = read_photos(photos)
        times: tuple[list[float], list[float]] = ([], [])
        with open_landmarker(original) as before, open_landmarker(candidate) as after, step(f"run both on {len(read)} photos"):
            found = [(name, before.detect(pixels)[0], after.detect(pixels)[0]) for name, pixels in read]
            with_face = [pixels for (_, pixels), (_, faces, _) in zip(read, found, strict=True) if faces]
            timed = with_face or [pixels for _, pixels in read]  # without a face only the detector runs
            for number in range(max(RUNS, len(timed))):
                for side, of_side in ((before, times[0]), (after, times[1])):
                    of_side.append(side.detect(timed[number % len(timed)])[1])
        checked = [compare_faces(*entry) for entry in found]
        medians = statistics.median(times[0]), statistics.median(times[1])
        broken = _broken(checked, medians[1] / medians[0], limits)
        sizes = original.stat().st_size, candidate.stat().st_size
        return FaceLandmarkerChecked(original.name, candidate.name, *sizes, checked, *medians, broken)

    if output is None:
        return find()

    def make(draft: Path) -> FaceLandmarkerChecked:
        result = find()
        draft.write_text(to_json(result) + "\n", encoding="utf-8")
        return result

    given = [] if photos is None else [photos] if photos.is_file() else image_files(photos)
    plan = Plan(
        output,
        "models.face_landmarker.check",
        {"limits": limits},
        [original, candidate, *given],
        PACKAGES,
        overwrite=overwrite,
        refresh=refresh,
        is_report=True,
    )
    return artifacts.build(plan, FaceLandmarkerChecked, make)[1]


if __name__ == "__main__":
    run(check, dependencies="face-landmarker")
