"""Frames of video files."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from shared.errors import ToolError
from shared.images import Pixels

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # quiet; what is wrong with a file is told in one line
THUMBNAIL = 16  # pixels a side, for telling scenes apart
APART = 8  # frames between two scene changes, at least


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    import cv2

    capture = cv2.VideoCapture(str(path.absolute()))
    try:
        yield capture
    finally:
        capture.release()


def count_frames(path: Path) -> tuple[int, float]:
    """Return the number of frames that can be decoded, and how many there are in a second (0 where the file does not tell).

    Raises:
        ToolError: The file is missing, no video, or has no frame that can be decoded.
    """
    import cv2

    _require_file(path)
    total = 0
    with _opened(path) as capture:  # containers tell wrong counts, or none
        rate = float(capture.get(cv2.CAP_PROP_FPS) or 0.0)
        while capture.grab():
            total += 1
    if not total:
        raise ToolError("not a video that can be decoded", where=path, expected="a file with at least one frame")
    return total, rate


def frames_at(path: Path, wanted: set[int]) -> Iterator[tuple[int, Pixels]]:
    """Yield number and pixels, uint8 (H, W, 3) RGB, of the frames with these numbers; decoded from the beginning, not sought.

    Raises:
        ToolError: The file is missing, or none of the frames can be decoded.
    """
    import cv2

    _require_file(path)
    yielded = 0
    with _opened(path) as capture:
        for number in range(max(wanted, default=-1) + 1):
            if not capture.grab():
                break
            if number in wanted:
                found, frame = capture.retrieve()
                if found:
                    yielded += 1
                    yield number, np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), np.uint8)  # OpenCV decodes to BGR
    if not yielded:
        raise ToolError("not a video that can be decoded", where=path, expected="a file with at least one frame")


def scene_changes(path: Path, count: int) -> list[int]:
    """Return the numbers of up to `count` frames, sorted: the first, and those that differ most from the one before.

    A frame closer than APART frames to one that differs more is left out.
    """
    import cv2

    _require_file(path)
    jumps: list[float] = []
    before = None
    with _opened(path) as capture:
        while capture.grab():
            found, frame = capture.retrieve()
            small = cv2.resize(frame, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA).astype(np.float32) if found else before
            jumps.append(float("inf") if before is None or small is None else float(np.abs(small - before).mean()))
            before = small
    if not jumps:
        raise ToolError("not a video that can be decoded", where=path, expected="a file with at least one frame")
    chosen: list[int] = []
    for number in sorted(range(len(jumps)), key=lambda number: (-jumps[number], number)):
        if len(chosen) < count and all(abs(number - other) >= APART for other in chosen):
            chosen.append(number)
    return sorted(chosen)


def read_frames(path: Path, count: int) -> Iterator[Pixels]:
    """Yield `count` frames spread evenly over a video, all of them where it has fewer; uint8 (H, W, 3) RGB.

    The file is decoded from its beginning, twice: seeking and the count of frames are not exact in every container.

    Raises:
        ToolError: The file is missing, no video, or has no frame that can be decoded.
    """
    _require_file(path)
    if count < 1:
        raise ToolError("too few frames asked for", where=path, got=count, expected="at least 1")
    total, _ = count_frames(path)
    wanted = set(np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist())
    for _, pixels in frames_at(path, wanted):
        yield pixels


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise ToolError("no such video file", where=path)  # also keeps addresses from being fetched
