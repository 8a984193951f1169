"""Frames of video files."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shared.errors import ToolError
from shared.images import Pixels


def read_frames(path: Path, count: int) -> Iterator[Pixels]:
    """Yield `count` frames spread evenly over a video, all of them where it has fewer; uint8 (H, W, 3) RGB.

    The file is decoded from its beginning: seeking is not exact in every container.

    Raises:
        ToolError: The file is missing, no video, or has no frame that can be decoded.
    """
    import cv2

    if not path.is_file():
        raise ToolError("no such video file", where=path)  # also keeps addresses from being fetched
    if count < 1:
        raise ToolError("too few frames asked for", where=path, got=count, expected="at least 1")
    capture = cv2.VideoCapture(str(path.absolute()))
    try:
        total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
        wanted = set(np.linspace(0, max(total - 1, 0), count).round().astype(int).tolist()) if total > count else None
        number = yielded = 0
        while capture.grab() and (wanted is None or number <= max(wanted)) and yielded < count:
            if wanted is None or number in wanted:
                found, frame = capture.retrieve()
                if found:
                    yielded += 1
                    yield np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), np.uint8)  # OpenCV decodes to BGR
            number += 1
    finally:
        capture.release()
    if not yielded:
        raise ToolError("not a video that can be decoded", where=path, expected="a file with at least one frame")
