"""Make the inputs that a face landmarker's three models see on your photos, for `quantize_tflite --calibration`.

Example:
    python -m models.face_landmarker.make_samples face_landmarker.task photos -o models/face_landmarker/samples

Each photo is moved, turned and scaled a little, several times over; MediaPipe says where the face is, and the inputs are cut out
the way its graph does: the whole picture for the detector, the turned square around the face for the landmarks, 146 of the
landmarks for the blendshapes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from models.face_landmarker.mediapipe_runtime import (
    BLENDSHAPE_LANDMARKS,
    CROP_SCALE,
    DETECTOR_SIZE,
    LANDMARKS_SIZE,
    Box,
    open_detector,
    open_landmarker,
)
from models.face_landmarker.photos import read_photos
from shared.command.cli import run, step
from shared.command.errors import ToolError
from shared.command.options import Overwrite, Seed
from shared.files.atomic import draft_beside
from shared.media.images import Pixels

# How far a photo is moved: in parts of its size, degrees, and a factor.
SHIFT, TURN, SCALE = 0.06, 12.0, 0.15
Array = NDArray[Any]


@dataclass(frozen=True)
class FaceSamples:
    """Result of make_samples."""

    folder: Path
    photos: int
    photos_with_face: int
    samples: int

    def __rich__(self) -> str:
        faceless = self.photos - self.photos_with_face
        return f"{self.folder}: {self.samples} samples from {self.photos_with_face} photos; no face in {faceless} others"


def _views(pixels: Pixels, count: int, rng: np.random.Generator) -> list[Pixels]:
    """Return the photo itself and moved, turned and scaled copies of it."""
    import cv2

    height, width = pixels.shape[:2]
    views = [pixels]
    for _ in range(count - 1):
        angle, scale = rng.uniform(-TURN, TURN), 1 + rng.uniform(-SCALE, SCALE)
        matrix = np.asarray(cv2.getRotationMatrix2D((width / 2, height / 2), angle, scale), dtype=np.float64)
        matrix[:, 2] += rng.uniform(-SHIFT, SHIFT, 2) * np.array([width, height])
        views.append(np.asarray(cv2.warpAffine(pixels, matrix, (width, height), borderMode=cv2.BORDER_REFLECT), dtype=np.uint8))
    return views


def detector_input(pixels: Pixels) -> Array:
    """Return the whole picture inside a black square, float32 (128, 128, 3) in [-1, 1]."""
    import cv2

    height, width = pixels.shape[:2]
    scale = DETECTOR_SIZE / max(height, width)
    margin = [(DETECTOR_SIZE - width * scale) / 2, (DETECTOR_SIZE - height * scale) / 2]
    matrix = np.array([[scale, 0, margin[0]], [0, scale, margin[1]]])
    square = cv2.warpAffine(pixels, matrix, (DETECTOR_SIZE, DETECTOR_SIZE), flags=cv2.INTER_AREA)
    return square.astype(np.float32) / 127.5 - 1


def landmarks_input(pixels: Pixels, box: Box) -> Array:
    """Return the square around a detected face, turned until the eyes are level, float32 (256, 256, 3) in [0, 1]."""
    import cv2

    cos, sin = np.cos(box.angle), np.sin(box.angle)
    level = np.diag(LANDMARKS_SIZE / (CROP_SCALE * box.size)) @ np.array([[cos, sin], [-sin, cos]])
    matrix = np.hstack([level, (LANDMARKS_SIZE / 2 - level @ box.center)[:, np.newaxis]])
    crop = cv2.warpAffine(pixels, matrix, (LANDMARKS_SIZE, LANDMARKS_SIZE), flags=cv2.INTER_LINEAR)
    return crop.astype(np.float32) / 255


def make_samples(
    bundle: Annotated[Path, typer.Argument(help="The face landmarker, .task.")],
    photos: Annotated[
        Path | None, typer.Argument(help="Folder of photos with faces, or one photo; default: scikit-image's.")
    ] = None,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for one .npz per inner model.")],
    views: Annotated[int, typer.Option(min=1, max=1000, help="Views of each photo, itself included.")] = 8,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> FaceSamples:
    """Make the inputs that a face landmarker's three models see on your photos.

    Raises:
        ToolError: No face in any photo, MediaPipe is not here, or the folder holds samples already.
    """
    found_photos = read_photos(photos)
    samples: dict[str, list[Array]] = {"face_detector": [], "face_landmarks_detector": [], "face_blendshapes": []}
    targets = {name: output / f"{name}.npz" for name in samples}
    if not overwrite and any(path.exists() for path in targets.values()):
        raise ToolError("the folder holds samples", where=output, remedy="use --overwrite to replace them")
    rng = np.random.default_rng(seed)
    with_face = 0
    with (
        open_landmarker(bundle) as landmarker,
        open_detector(bundle) as detector,
        step(f"find faces in {len(found_photos)} photos"),
    ):
        for _, pixels in found_photos:
            found = 0
            for view in _views(pixels, views, rng):
                faces, _ = landmarker.detect(view)
                boxes = detector.detect(view)
                if len(boxes) != len(faces):  # some of what the detector takes for a face is none
                    continue
                samples["face_landmarks_detector"] += [landmarks_input(view, box) for box in boxes]
                for face in faces:
                    samples["face_blendshapes"].append(face.landmarks[BLENDSHAPE_LANDMARKS, :2].astype(np.float32))
                if faces:
                    samples["face_detector"].append(detector_input(view))
                found += len(faces)
            with_face += found > 0
    if not with_face:
        raise ToolError("no face in any photo", where=photos or "photos", remedy="give photos with faces of at least 100 pixels")
    output.mkdir(parents=True, exist_ok=True)
    for name, arrays in samples.items():
        with draft_beside(targets[name]) as draft:
            with draft.open("wb") as stream:
                np.savez(stream, images=np.stack(arrays))
            draft.replace(targets[name])
    return FaceSamples(output, len(found_photos), with_face, len(samples["face_landmarks_detector"]))


if __name__ == "__main__":
    run(make_samples, dependencies="face-landmarker")
