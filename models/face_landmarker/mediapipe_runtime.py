"""The real MediaPipe face landmarker, as its users run it.

Source: MediaPipe 1.2 Tasks; the constants below from https://github.com/google-ai-edge/mediapipe/tree/v0.10.21/mediapipe/tasks/cc/vision
    (face_detector/face_detector_graph.cc, face_landmarker/face_landmarker_graph.cc, face_landmarker/face_blendshapes_graph.cc)
"""

import contextlib
import ctypes
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.command.errors import ToolError, first_line
from shared.media.images import Pixels
from tools.quantize_tflite.bundle import models_of, unpack_bundle

LIBRARIES = ("libEGL.so.1", "libGLESv2.so.2")
MAX_FACES = 10
C_STDERR = 2  # where C++ code writes
DETECTOR_SIZE, LANDMARKS_SIZE = 128, 256  # pixels; the inner models' square inputs
CROP_SCALE = 1.5  # the landmarks model sees this times the box that the detector draws
DETECTOR = "face_detector.tflite"  # its name in the bundle
CHEEKS = (234, 454)  # the face's width
# The landmarks that the blendshape model reads (kLandmarksSubsetIdxs).
BLENDSHAPE_LANDMARKS = (
    *(0, 1, 4, 5, 6, 7, 8, 10, 13, 14, 17, 21, 33, 37, 39, 40, 46, 52, 53, 54, 55, 58, 61, 63, 65, 66, 67, 70, 78, 80, 81, 82),
    *(84, 87, 88, 91, 93, 95, 103, 105, 107, 109, 127, 132, 133, 136, 144, 145, 146, 148, 149, 150, 152, 153, 154, 155, 157),
    *(158, 159, 160, 161, 162, 163, 168, 172, 173, 176, 178, 181, 185, 191, 195, 197, 234, 246, 249, 251, 263, 267, 269, 270),
    *(276, 282, 283, 284, 285, 288, 291, 293, 295, 296, 297, 300, 308, 310, 311, 312, 314, 317, 318, 321, 323, 324, 332, 334),
    *(336, 338, 356, 361, 362, 365, 373, 374, 375, 377, 378, 379, 380, 381, 382, 384, 385, 386, 387, 388, 389, 390, 397, 398),
    *(400, 402, 405, 409, 415, 454, 466, 468, 469, 470, 471, 472, 473, 474, 475, 476, 477),
)


@dataclass(frozen=True, eq=False)
class Face:
    """What MediaPipe says of one face.

    Args:
        landmarks: float64 (478, 3), x to the right, y down, z away from the camera, all in pixels of the image.
        blendshapes: float64 (52,), scores in [0, 1].
    """

    landmarks: NDArray[np.float64]
    blendshapes: NDArray[np.float64]

    @property
    def width(self) -> float:
        """Distance of the cheeks in pixels."""
        return float(np.linalg.norm(self.landmarks[CHEEKS[0], :2] - self.landmarks[CHEEKS[1], :2]))


@dataclass(frozen=True, eq=False)
class Box:
    """Where the detector sees a face.

    Args:
        center: float64 (2,), x and y in pixels.
        size: float64 (2,), width and height in pixels.
        angle: By how much the line between the eyes falls to the right, in radians.
    """

    center: NDArray[np.float64]
    size: NDArray[np.float64]
    angle: float


class FaceLandmarker:
    """A loaded bundle; use through `open_landmarker`."""

    def __init__(self, task: Any) -> None:
        self._task = task

    def detect(self, pixels: Pixels) -> tuple[list[Face], float]:
        """Return the faces in uint8 (H, W, 3) RGB, and the milliseconds it took."""
        image = _as_mediapipe(pixels)
        scale = np.array([pixels.shape[1], pixels.shape[0], pixels.shape[1]])
        start = time.perf_counter()
        found = self._task.detect(image)
        took_ms = (time.perf_counter() - start) * 1e3
        faces = [
            Face(np.array([(p.x, p.y, p.z) for p in points]) * scale, np.array([category.score for category in shapes]))
            for points, shapes in zip(found.face_landmarks, found.face_blendshapes, strict=True)
        ]
        return faces, took_ms


class FaceDetector:
    """The detector of a bundle on its own; use through `open_detector`."""

    def __init__(self, task: Any) -> None:
        self._task = task

    def detect(self, pixels: Pixels) -> list[Box]:
        """Return where faces are in uint8 (H, W, 3) RGB."""
        scale = np.array([pixels.shape[1], pixels.shape[0]])
        boxes = []
        for found in self._task.detect(_as_mediapipe(pixels)).detections:
            box, eyes = found.bounding_box, [np.array([k.x, k.y]) * scale for k in found.keypoints[:2]]
            size = np.array([box.width, box.height], dtype=np.float64)
            across = eyes[1] - eyes[0]
            boxes.append(Box(np.array([box.origin_x, box.origin_y]) + size / 2, size, float(np.arctan2(across[1], across[0]))))
        return boxes


def _as_mediapipe(pixels: Pixels) -> Any:
    import mediapipe

    return mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=np.ascontiguousarray(pixels))


def require_mediapipe() -> None:
    """Raise ToolError unless MediaPipe's system libraries are here; its own error would be a traceback."""
    missing = [name for name in LIBRARIES if not _loads(name)]
    if missing:
        remedy = "install them, on Debian: apt-get install libgles2 libegl1"
        raise ToolError("MediaPipe needs system libraries that are not here", got=f"no {', '.join(missing)}", remedy=remedy)
    if sys.stderr.fileno() == C_STDERR:  # once: MediaPipe's threads log whenever they like, our own lines go another way
        sys.stderr = os.fdopen(os.dup(C_STDERR), "w", buffering=1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), C_STDERR)


@contextlib.contextmanager
def open_detector(bundle: Path) -> Iterator[FaceDetector]:
    """Load the detector inside a bundle into MediaPipe.

    Raises:
        ToolError: As `open_landmarker`; or the bundle holds no detector of that name.
    """
    require_mediapipe()
    from mediapipe.tasks.python import BaseOptions, vision

    with tempfile.TemporaryDirectory() as folder:
        models = dict(models_of(unpack_bundle(bundle, Path(folder) / "bundle")))
        if DETECTOR not in models:
            raise ToolError("no face landmarker", where=bundle, got=", ".join(models), expected=f"a bundle with {DETECTOR}")
        options = vision.FaceDetectorOptions(base_options=BaseOptions(model_asset_path=str(models[DETECTOR].path)))
        with _loaded(bundle, lambda: vision.FaceDetector.create_from_options(options)) as task:
            yield FaceDetector(task)


@contextlib.contextmanager
def open_landmarker(bundle: Path) -> Iterator[FaceLandmarker]:
    """Load a bundle into MediaPipe.

    Raises:
        ToolError: MediaPipe, or a system library it needs, is not here; or it does not accept the bundle.
    """
    require_mediapipe()
    if not bundle.is_file():
        raise ToolError("no such bundle", where=bundle, remedy="check the path")
    from mediapipe.tasks.python import BaseOptions, vision

    options = vision.FaceLandmarkerOptions(
        base_options=BaseOptions(model_asset_path=str(bundle)), output_face_blendshapes=True, num_faces=MAX_FACES
    )
    with _loaded(bundle, lambda: vision.FaceLandmarker.create_from_options(options)) as task:
        yield FaceLandmarker(task)


@contextlib.contextmanager
def _loaded(bundle: Path, create: Callable[[], Any]) -> Iterator[Any]:
    try:
        task = create()
    except (RuntimeError, ValueError, OSError) as error:
        raise ToolError("MediaPipe does not accept the bundle", where=bundle, got=first_line(error)) from None
    try:
        yield task
    finally:
        task.close()


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
