"""Frames come evenly spread, in RGB, from video files only."""

import struct
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from shared.command.errors import ToolError
from shared.media.video import APART, frame_times, frames_at, read_frames, scene_changes
from tests.conftest import REALDATA


def write_video(path: Path, frames: list[np.ndarray]) -> Path:
    """Write uint8 (H, W, 3) RGB frames as Motion JPEG."""
    height, width = frames[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (width, height))
    for frame in frames:
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven frames of 32x48; frame i has red 20 * i, no green, no blue."""
    frames = [np.zeros((32, 48, 3), np.uint8) for _ in range(11)]
    for number, frame in enumerate(frames):
        frame[..., 0] = 20 * number
    return write_video(tmp_path_factory.mktemp("video") / "a.avi", frames)


@pytest.mark.parametrize(("count", "numbers"), [(1, [0]), (3, [0, 5, 10]), (11, list(range(11))), (99, list(range(11)))])
def test_frames_are_spread_evenly(video: Path, count: int, numbers: list[int]) -> None:
    frames = list(read_frames(video, count))
    assert all((frame.shape, frame.dtype) == ((32, 48, 3), np.uint8) for frame in frames)
    assert [round(float(frame[..., 0].mean()) / 20) for frame in frames] == numbers
    assert max(frame[..., 2].mean() for frame in frames) < 8


def test_a_cut_off_video_gives_its_remaining_frames_evenly(video: Path, tmp_path: Path) -> None:
    content = video.read_bytes()
    (tmp_path / "cut.avi").write_bytes(content[: int(0.9 * len(content))])
    everything = list(read_frames(tmp_path / "cut.avi", 99))
    assert 2 <= len(everything) < 11
    first, last = read_frames(tmp_path / "cut.avi", 2)
    np.testing.assert_array_equal(first, everything[0])
    np.testing.assert_array_equal(last, everything[-1])


@pytest.mark.parametrize(
    "read",
    [
        lambda path: list(read_frames(path, 3)),
        frame_times,
        lambda path: scene_changes(path, 3),
        lambda path: list(frames_at(path, {0})),
    ],
    ids=["read_frames", "frame_times", "scene_changes", "frames_at"],
)
def test_a_damaged_or_missing_video_is_an_error(video: Path, tmp_path: Path, read: Callable[[Path], object]) -> None:
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "cut.avi").write_bytes(video.read_bytes()[:300])
    for name in ("text.mp4", "empty.mp4", "cut.avi"):
        with pytest.raises(ToolError, match=r"not a video that can be decoded|the video file is empty"):
            read(tmp_path / name)
    for path in (tmp_path / "absent.mp4", Path("http://localhost/video.mp4")):
        with pytest.raises(ToolError, match="no such video file"):
            read(path)


def test_at_least_one_frame_must_be_requested(video: Path) -> None:
    with pytest.raises(ToolError, match="too few frames"):
        list(read_frames(video, 0))


def test_every_frame_has_its_time(video: Path, tmp_path: Path) -> None:
    assert frame_times(video) == pytest.approx([number / 10 for number in range(11)])
    content = video.read_bytes()
    (tmp_path / "cut.avi").write_bytes(content[: int(0.9 * len(content))])
    with pytest.raises(ToolError, match=r"cut off or damaged; got \d of 11 frames"):
        frame_times(tmp_path / "cut.avi")
    total = len(frame_times(tmp_path / "cut.avi", of_whole=False))
    assert total == len(list(read_frames(tmp_path / "cut.avi", 99))) < 11, (
        "the number of decoded frames, not the number in the container"
    )


def test_frames_come_by_their_numbers(video: Path) -> None:
    found = list(frames_at(video, {7, 2, 3}))
    assert [number for number, _ in found] == [2, 3, 7]
    assert [round(float(frame[..., 0].mean()) / 20) for _, frame in found] == [2, 3, 7]
    everything = list(read_frames(video, 11))
    for number, frame in found:
        np.testing.assert_array_equal(frame, everything[number])
    assert [number for number, _ in frames_at(video, {9, 10, 11, 5000})] == [9, 10]
    for none in ({11}, set[int]()):
        with pytest.raises(ToolError, match="not a video that can be decoded"):
            list(frames_at(video, none))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty frames: dark up to 19, bright up to 44, with a flash of a single frame at 24, then middling."""
    levels = [20] * 20 + [200] * 25 + [110] * 15
    levels[24] = 150
    frames = [np.full((32, 48, 3), level + number % 3, np.uint8) for number, level in enumerate(levels)]
    return write_video(tmp_path_factory.mktemp("scenes") / "a.avi", frames)


@pytest.mark.parametrize(("count", "numbers"), [(1, [0]), (2, [0, 20]), (3, [0, 20, 45])])
def test_the_hardest_scene_changes_come_first(scenes: Path, count: int, numbers: list[int]) -> None:
    assert scene_changes(scenes, count) == numbers


def test_scene_changes_keep_a_distance(scenes: Path) -> None:
    found = scene_changes(scenes, 99)
    assert {0, 20, 45} <= set(found)
    assert not {24, 25} & set(found), "the flash is too near the scene change at 20"
    assert min(np.diff(found)) >= APART
    assert found == sorted(found)


@pytest.mark.realdata
def test_a_real_video_is_read() -> None:
    frames = list(read_frames(REALDATA / "video" / "videoseal_1.mp4", 5))
    assert len(frames) == 5
    assert len({frame.tobytes() for frame in frames}) == 5


def boxes(content: bytes) -> list[tuple[bytes, bytes]]:
    """Return the kinds and contents of MP4's boxes."""
    found, at = [], 0
    while at < len(content):
        size, kind = struct.unpack(">I4s", content[at : at + 8])
        found.append((kind, content[at + 8 : at + size]))
        at += size
    return found


def with_times(content: bytes, parts: list[tuple[int, int]]) -> bytes:
    """Return an MP4 in which so many frames after each other are shown for so many times the usual duration."""
    longer = sum(count * times for count, times in parts) / sum(count for count, _ in parts)
    durations = {b"mvhd": 16, b"tkhd": 20, b"mdhd": 16, b"elst": 8}  # place of the whole duration in a box
    made = b""
    for kind, body in boxes(content):
        changed = body
        if kind in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts"):
            changed = with_times(body, parts)
        elif kind == b"stts":
            (usual,) = struct.unpack(">I", body[12:16])
            changed = struct.pack(">II", 0, len(parts)) + b"".join(struct.pack(">II", n, times * usual) for n, times in parts)
        elif place := durations.get(kind, 0):
            (whole,) = struct.unpack(">I", body[place : place + 4])
            changed = body[:place] + struct.pack(">I", int(whole * longer)) + body[place + 4 :]
        made += struct.pack(">I4s", 8 + len(changed), kind) + changed
    return made


def test_frames_of_a_variable_rate_have_the_times_of_the_file(tmp_path: Path) -> None:
    writer = cv2.VideoWriter(str(tmp_path / "a.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 30, (48, 32))
    for number in range(20):
        writer.write(np.full((32, 48, 3), 10 * number, np.uint8))
    writer.release()
    (tmp_path / "v.mp4").write_bytes(with_times((tmp_path / "a.mp4").read_bytes(), [(5, 1), (10, 6), (5, 1)]))
    expected = np.cumsum([0, *[1 / 30] * 5, *[6 / 30] * 10, *[1 / 30] * 4])
    assert frame_times(tmp_path / "v.mp4") == pytest.approx(expected, abs=1e-3)
