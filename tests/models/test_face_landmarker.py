"""What the face landmarker's samples and its check do, as far as it goes without MediaPipe."""

import re
from pathlib import Path

import numpy as np
import pytest

from models.face_landmarker import mediapipe_runtime
from models.face_landmarker.check import FaceLandmarkerChecked, _broken, compare_faces
from models.face_landmarker.make_samples import _views, detector_input, landmarks_input
from models.face_landmarker.mediapipe_runtime import BLENDSHAPE_LANDMARKS, CHEEKS, Box, Face, open_landmarker
from models.face_landmarker.photos import read_photos
from shared.command.errors import ToolError

LIMITS = {"landmark": 0.85, "blendshape": 0.026, "slowdown": 1.1}


def face(shift: float = 0.0, scores: float = 0.0, at: float = 100.0) -> Face:
    """A face 200 pixels wide."""
    landmarks = np.full((478, 3), float(at))
    landmarks[CHEEKS[0], 0], landmarks[CHEEKS[1], 0] = at - 100, at + 100
    landmarks[:, 0] += shift
    return Face(landmarks, np.full(52, scores))


def test_errors_are_in_per_cent_of_the_distance_of_the_cheeks() -> None:
    found = compare_faces("photo", [face()], [face(shift=1.0, scores=0.01)])
    assert (found.faces_before, found.faces_after) == (1, 1)
    assert found.landmark_error_percent == pytest.approx(0.5)
    assert found.blendshape_error == pytest.approx(0.01)


def test_each_face_meets_its_nearest_and_the_worst_counts() -> None:
    found = compare_faces("photo", [face(at=100), face(at=900)], [face(at=900, shift=2.0), face(at=100, shift=1.0)])
    assert found.landmark_error_percent == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("photos", "slowdown", "says"),
    [
        ([compare_faces("a", [face()], [])], 1.0, "a: 1 faces before, 0 after"),
        ([compare_faces("a", [face()], [face(shift=1.8)])], 1.0, "a: landmarks moved 0.900 %, limit 0.85 %"),
        ([compare_faces("a", [face()], [face(scores=0.03)])], 1.0, "a: blendshapes moved 0.0300, limit 0.026"),
        ([compare_faces("a", [face()], [face()])], 1.2, "1.20 times the original's latency, limit 1.1"),
        ([compare_faces("a", [], [])], 1.0, "the original finds no face in any photo"),
    ],
)
def test_every_limit_trips(photos: list[object], slowdown: float, says: str) -> None:
    assert _broken(photos, slowdown, LIMITS) == [says]  # type: ignore[arg-type]


def test_a_check_inside_its_limits_is_ok() -> None:
    photos = [compare_faces("a", [face()], [face(shift=0.1)]), compare_faces("b", [], [])]
    assert _broken(photos, 1.0, LIMITS) == []
    assert FaceLandmarkerChecked("a", "b", 1, 1, photos, 1.0, 1.0).ok
    assert not FaceLandmarkerChecked("a", "b", 1, 1, photos, 1.0, 1.0, ["x"]).ok


def test_the_detector_sees_the_whole_photo_in_a_black_square() -> None:
    pixels = np.full((100, 200, 3), 255, dtype=np.uint8)
    square = detector_input(pixels)
    assert (square.shape, square.dtype) == ((128, 128, 3), np.float32)
    assert np.all(square[40:88] > 0.9)
    assert np.all(square[:30] == -1)
    assert np.all(square[-30:] == -1)


def test_the_face_is_cut_out_upright_at_one_and_a_half_times_its_box() -> None:
    """A white square turned by 30 degrees comes out level, two thirds of the crop wide."""
    import cv2

    pixels = np.zeros((400, 400, 3), dtype=np.uint8)
    corners = cv2.boxPoints(((220.0, 180.0), (100.0, 100.0), 30.0)).astype(np.int32)
    cv2.fillPoly(pixels, [corners], (255, 255, 255))
    crop = landmarks_input(pixels, Box(np.array([220.0, 180.0]), np.array([100.0, 100.0]), np.deg2rad(30.0)))
    assert (crop.shape, crop.dtype) == ((256, 256, 3), np.float32)
    inside = crop[..., 0] > 0.5
    assert inside[48:208, 48:208].all()
    assert not inside[:36].any()
    assert not inside[:, :36].any()


def test_views_begin_with_the_photo_and_repeat_with_the_seed() -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    one, two = (_views(pixels, 3, np.random.default_rng(0)) for _ in range(2))
    assert one[0] is pixels
    assert [view.shape for view in one] == [(60, 80, 3)] * 3
    assert all((a == b).all() for a, b in zip(one, two, strict=True))
    assert not (one[1] == pixels).all()


def test_the_blendshape_model_reads_146_landmarks() -> None:
    assert len(BLENDSHAPE_LANDMARKS) == len(set(BLENDSHAPE_LANDMARKS)) == 146


def test_the_photo_without_a_folder_is_scikit_images() -> None:
    [(name, pixels)] = read_photos(None)
    assert (name, pixels.shape, pixels.dtype) == ("astronaut", (512, 512, 3), np.uint8)


def test_missing_system_libraries_are_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mediapipe_runtime, "LIBRARIES", ("libnobody.so.1",))
    says = re.escape("no libnobody.so.1; install them, on Debian: apt-get install libgles2 libegl1")
    with pytest.raises(ToolError, match=says), open_landmarker(tmp_path / "a.task"):
        pass
