"""Frames of video files."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from shared.command.errors import ToolError
from shared.command.limits import limit
from shared.command.watchdog import reading
from shared.files.file_type import name_kind, read_head
from shared.media.images import Pixels

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # quiet; a damaged file is reported in one line
os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = "protocol_whitelist;file"  # a container may refer to addresses
AGAIN = "play it to see, and save it again as MP4, or leave it out"
CONTAINERS = (  # offset and bytes: MP4 and MOV, Matroska and WebM, AVI
    *((4, kind) for kind in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")),
    (0, b"\x1a\x45\xdf\xa3"),
    (8, b"AVI "),
)
MISCOUNTED = 0.05  # share of its frames by which a sound container may be wrong about their number
FEW_FRAMES = 2
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v")
THUMBNAIL = 16  # pixels a side, to compare scenes
APART = 8  # frames between two scene changes, at least


def is_video(path: Path) -> bool:
    """Return whether a file's name is that of a video."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def require_container(path: Path) -> None:
    """Raise ToolError unless a file is a video by its first bytes."""
    head = read_head(path, "video", limit="video-gb", again=AGAIN)
    if not any(head[place : place + len(magic)] == magic for place, magic in CONTAINERS):
        raise no_video(path, name_kind(head))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Callable[[], bool]]]:
    """Yield a video, and a function that advances to its next frame and returns False after the last.

    Raises:
        ToolError: No regular file, or no video by its first bytes. Playlists, which FFmpeg would follow, are no videos.
    """
    import cv2

    require_container(path)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # a damaged file is reported in one line
    with reading(path) as goes_on:
        capture = cv2.VideoCapture(str(path.absolute()), cv2.CAP_FFMPEG)

        def advance() -> bool:
            goes_on()
            return bool(capture.grab())

        try:
            if capture.get(cv2.CAP_PROP_FRAME_WIDTH) * capture.get(cv2.CAP_PROP_FRAME_HEIGHT) > limit("megapixels") * 1e6:
                raise ToolError(
                    "the frames have too many pixels", where=path, remedy="raise the limit with --limit megapixels=VALUE"
                )
            yield capture, advance
        finally:
            capture.release()


def no_video(path: Path, got: str = "no frame") -> ToolError:
    """Return the error for a file that can't be decoded."""
    expected = "a file with at least one frame"
    return ToolError("not a video that can be decoded", where=path, got=got, expected=expected, remedy=AGAIN)


def frame_times(path: Path, *, of_whole: bool = True) -> list[float]:
    """Return when each frame that can be decoded is shown, in seconds; at equal distances where the file has no times.

    Args:
        path: The file.
        of_whole: Whether a cut-off or damaged file, with fewer frames than it announces, is an error.

    Raises:
        ToolError: The file is missing, no video, has no frame that can be decoded, or is not whole.
    """
    import cv2

    times: list[float] = []
    with _opened(path) as (capture, advance):
        rate = float(capture.get(cv2.CAP_PROP_FPS) or 0.0)
        announced = float(capture.get(cv2.CAP_PROP_FRAME_COUNT) or 0.0)
        while advance():
            times.append(float(capture.get(cv2.CAP_PROP_POS_MSEC)) / 1000)
    total = len(times)
    if not total:
        raise no_video(path)
    if of_whole:
        require_whole(path, total, announced)
    has_times = all(one < other for one, other in itertools.pairwise(times))
    return times if has_times else [number / rate if rate else 0.0 for number in range(total)]


def require_whole(path: Path, total: int, announced: float) -> None:
    """Raise ToolError where far fewer frames were decoded than announced; containers announce slightly wrong counts, or none."""
    if total < (1 - MISCOUNTED) * announced - FEW_FRAMES:
        raise ToolError("the video is cut off or damaged", where=path, got=f"{total} of {announced:.0f} frames", remedy=AGAIN)


def frames_at(path: Path, wanted: set[int]) -> Iterator[tuple[int, Pixels]]:
    """Yield number and pixels, uint8 (H, W, 3) RGB, of the frames with these numbers; decoded from the beginning, not sought.

    Raises:
        ToolError: The file is missing, or none of the frames can be decoded.
    """
    import cv2

    yielded = 0
    with _opened(path) as (capture, advance):
        for number in range(max(wanted, default=-1) + 1):
            if not advance():
                break
            if number in wanted:
                found, frame = capture.retrieve()
                if found:
                    yielded += 1
                    yield number, np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), np.uint8)  # OpenCV decodes to BGR
    if not yielded:
        raise no_video(path)


def scene_changes(path: Path, count: int) -> list[int]:
    """Return the numbers of up to `count` frames, sorted: the first, and the frames that differ most from their predecessors.

    A frame closer than APART frames to a frame with a larger difference is left out.
    """
    import cv2

    jumps: list[float] = []
    before = None
    with _opened(path) as (capture, advance):
        while advance():
            found, frame = capture.retrieve()
            small = cv2.resize(frame, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA).astype(np.float32) if found else before
            jumps.append(float("inf") if before is None or small is None else float(np.abs(small - before).mean()))
            before = small
    if not jumps:
        raise no_video(path)
    chosen: list[int] = []
    for number in sorted(range(len(jumps)), key=lambda number: (-jumps[number], number)):
        if len(chosen) < count and all(abs(number - near) >= APART for near in chosen):
            chosen.append(number)
    return sorted(chosen)


def read_frames(path: Path, count: int) -> Iterator[Pixels]:
    """Yield `count` frames spread evenly over a video, all frames where it has fewer; uint8 (H, W, 3) RGB.

    The file is decoded from its beginning, twice: seeking and the count of frames are not exact in every container.

    Raises:
        ToolError: The file is missing, no video, or has no frame that can be decoded.
    """
    if count < 1:
        raise ToolError("too few frames asked for", where=path, got=count, expected="at least 1", remedy="ask for more")
    total = len(frame_times(path, of_whole=False))
    wanted = set(np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist())
    for _, pixels in frames_at(path, wanted):
        yield pixels
