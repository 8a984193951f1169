"""Frames of video files."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from shared.errors import ToolError
from shared.images import Pixels


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    import cv2

    capture = cv2.VideoCapture(str(path.absolute()))
    try:
        yield capture
    finally:
        capture.release()


def read_frames(path: Path, count: int) -> Iterator[Pixels]:
    """Yield `count` frames spread evenly over a video, all of them where it has fewer; uint8 (H, W, 3) RGB.

    The file is decoded from its beginning, twice: seeking and the count of frames are not exact in every container.

    Raises:
        ToolError: The file is missing, no video, or has no frame that can be decoded.
    """
    import cv2

    if not path.is_file():
        raise ToolError("no such video file", where=path)  # also keeps addresses from being fetched
    if count < 1:
        raise ToolError("too few frames asked for", where=path, got=count, expected="at least 1")
    total = 0
    with _opened(path) as capture:  # containers tell wrong counts, or none
        while capture.grab():
            total += 1
    wanted = set(np.linspace(0, max(total - 1, 0), min(count, total)).round().astype(int).tolist())
    yielded = 0
    with _opened(path) as capture:
        for number in range(total):
            if capture.grab() and number in wanted:
                found, frame = capture.retrieve()
                if found:
                    yielded += 1
                    yield np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), np.uint8)  # OpenCV decodes to BGR
    if not yielded:
        raise ToolError("not a video that can be decoded", where=path, expected="a file with at least one frame")
