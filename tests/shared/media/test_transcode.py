"""A video written again: every frame in its place, upright, unbiased, and its sound untouched."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from shared.command.errors import ToolError
from shared.media.images import Pixels
from shared.media.transcode import frame_count, transcode
from shared.metrics.metrics import psnr_db

FRAMES = 24


def pictures(height: int = 96, width: int = 128) -> list[Pixels]:
    """Return frames of a smooth picture that moves; the first row's brightness counts them."""
    y, x = np.mgrid[:height, :width]
    made = []
    for number in range(FRAMES):
        waves = [120 + 80 * np.sin((x + 2 * number + 30 * channel) / 17) * np.cos(y / 23) for channel in range(3)]
        made.append(np.rint(np.stack(waves, axis=2)).astype(np.uint8))
        made[-1][:16] = 10 * number
    return made


def write_film(path: Path, frames: list[Pixels], times: list[int] | None = None) -> Path:
    """Write a film with a tone, 24 frames a second."""
    with av.open(str(path), "w") as film:
        video = film.add_stream("libx264", rate=24, options={"crf": "4"})
        video.height, video.width = frames[0].shape[:2]
        video.pix_fmt = "yuv444p" if video.height % 2 or video.width % 2 else "yuv420p"
        sound = film.add_stream("aac", rate=44100)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = (times or range(len(frames)))[number], Fraction(1, 24)
            film.mux(video.encode(frame))
        film.mux(video.encode(None))
        tone = np.sin(np.arange(44100) / 16).astype(np.float32)[np.newaxis]
        for start in range(0, 44100 - 1024, 1024):
            piece = av.AudioFrame.from_ndarray(np.ascontiguousarray(tone[:, start : start + 1024]), format="fltp", layout="mono")
            piece.sample_rate, piece.pts = 44100, start
            film.mux(sound.encode(piece))
        film.mux(sound.encode(None))
    return path


def read_film(path: Path) -> tuple[list[Pixels], list[float], list[bytes]]:
    """Return frames, their times in seconds, and the packets of sound."""
    with av.open(str(path)) as film:
        sound = [bytes(packet) for packet in film.demux(audio=0) if packet.dts is not None]
    with av.open(str(path)) as film:
        frames = [*film.decode(video=0)]
    return [frame.to_ndarray(format="rgb24") for frame in frames], [float(frame.time or 0) for frame in frames], sound


def unchanged(frames: Iterator[Pixels]) -> Iterator[Pixels]:
    yield from frames


@pytest.mark.parametrize("kind", [".mp4", ".mkv", ".mov"])
def test_frames_times_and_sound_stay(tmp_path: Path, kind: str) -> None:
    times = [*range(12), *range(20, 32)]  # a gap, as recorders leave when they are late
    film, output = write_film(tmp_path / "film.mp4", pictures(), times), tmp_path / "draft"
    assert frame_count(film) == FRAMES
    assert transcode(film, output, kind, unchanged, crf=8) == FRAMES
    before, after = read_film(film), read_film(output)
    assert after[2] == before[2]
    assert len(before[2]) > 30
    np.testing.assert_allclose(np.subtract(after[1], after[1][0]), before[1], atol=2e-3)  # .mkv moves sound and frames alike
    for one, other in zip(before[0], after[0], strict=True):
        assert psnr_db(one.astype(np.float64), other.astype(np.float64), 255.0) > 42
        assert (
            np.abs(one.astype(float).mean(axis=(0, 1)) - other.astype(float).mean(axis=(0, 1))).max() < 0.5
        )  # no shift of colours


def test_what_is_changed_is_written(tmp_path: Path) -> None:
    film, output = write_film(tmp_path / "film.mp4", pictures()), tmp_path / "changed.mp4"

    def brighter(frames: Iterator[Pixels]) -> Iterator[Pixels]:
        for frame in frames:
            yield np.clip(frame.astype(int) + 20, 0, 255).astype(np.uint8)

    transcode(film, output, ".mp4", brighter, crf=8)
    before, after = read_film(film)[0], read_film(output)[0]
    assert float(after[5][40:].astype(float).mean() - before[5][40:].astype(float).mean()) == pytest.approx(20, abs=1)


def test_odd_sizes_are_kept(tmp_path: Path) -> None:
    film = write_film(tmp_path / "film.mp4", pictures(95, 127))
    transcode(film, tmp_path / "draft", ".mp4", unchanged, crf=8)
    assert read_film(tmp_path / "draft")[0][0].shape == (95, 127, 3)


def test_sound_that_a_container_does_not_take_is_named(tmp_path: Path) -> None:
    film = tmp_path / "film.mkv"
    with av.open(str(film), "w") as made:
        video, sound = made.add_stream("libx264", rate=24), made.add_stream("pcm_s16le", rate=44100)
        video.height, video.width, video.pix_fmt = 96, 128, "yuv420p"
        for pixels in pictures():
            made.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        piece = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.int16), format="s16", layout="mono")
        piece.sample_rate = 44100
        made.mux(sound.encode(piece))
        made.mux(video.encode(None))
    assert transcode(film, tmp_path / "draft", ".mkv", unchanged, crf=8) == FRAMES
    with pytest.raises(ToolError, match=r"\.mkv, which takes any sound"):
        transcode(film, tmp_path / "draft", ".mp4", unchanged, crf=8)


def test_pixels_that_are_not_square_stay_so(tmp_path: Path) -> None:
    film, output = tmp_path / "film.mp4", tmp_path / "draft"
    with av.open(str(film), "w") as made:
        video = made.add_stream("libx264", rate=24)
        video.height, video.width, video.pix_fmt = 96, 128, "yuv420p"
        video.codec_context.sample_aspect_ratio = Fraction(16, 11)
        for pixels in pictures():
            made.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        made.mux(video.encode(None))
    transcode(film, output, ".mp4", unchanged, crf=8)
    with av.open(str(output)) as opened:
        assert opened.streams.video[0].sample_aspect_ratio == Fraction(16, 11)


@pytest.mark.parametrize(("kind", "encoder"), [("avi", "mpeg4"), ("mov", "png")])
def test_files_without_times_and_files_of_rgb_keep_length_and_colours(tmp_path: Path, kind: str, encoder: str) -> None:
    film, output = tmp_path / f"film.{kind}", tmp_path / "draft"
    with av.open(str(film), "w") as made:
        video = made.add_stream(encoder, rate=24)
        video.height, video.width = 96, 128
        video.pix_fmt = "rgb24" if encoder == "png" else "yuv420p"
        if encoder == "mpeg4":
            video.codec_context.max_b_frames = 2
            video.bit_rate = 4_000_000
        for pixels in pictures():
            made.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        made.mux(video.encode(None))
    assert transcode(film, output, ".mp4", unchanged, crf=4) == FRAMES
    with av.open(str(output)) as opened:
        frames = [*opened.decode(video=0)]
    assert float(frames[-1].time or 0) - float(frames[0].time or 0) == pytest.approx((FRAMES - 1) / 24, abs=0.05)
    for one, frame in zip(pictures(), frames, strict=True):
        found = frame.to_ndarray(format="rgb24").astype(np.float64)
        assert np.abs(found.mean(axis=(0, 1)) - one.mean(axis=(0, 1))).max() < 2
        assert psnr_db(one.astype(np.float64), found, 255.0) > 28


def test_a_file_cut_off_is_an_error_and_not_a_shorter_film(tmp_path: Path) -> None:
    content = write_film(tmp_path / "film.mkv", pictures()).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(content[: len(content) // 2])
    with pytest.raises(ToolError, match=r"cut off or damaged; got \d+ of 2[45] frames"):
        transcode(tmp_path / "cut.mkv", tmp_path / "draft", ".mkv", unchanged, crf=8)


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    text, sound = tmp_path / "text.mp4", tmp_path / "sound.mp4"
    text.write_text("no film")
    with av.open(str(sound), "w") as film:
        stream = film.add_stream("aac", rate=44100)
        piece = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        piece.sample_rate = 44100
        film.mux(stream.encode(piece))
        film.mux(stream.encode(None))
    for path in (text, sound, tmp_path / "missing.mp4"):
        with pytest.raises(ToolError):
            frame_count(path)
    with pytest.raises(ToolError, match=r"no ending of a video; got \.gif"):
        transcode(text, tmp_path / "draft", ".gif", unchanged, crf=8)


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_films_that_are_turned_by_their_header_come_upright(tmp_path: Path, turn: int) -> None:
    film = write_film(tmp_path / "film.mp4", pictures())
    turned = with_turn(film.read_bytes(), turn)
    (tmp_path / "turned.mp4").write_bytes(turned)
    transcode(tmp_path / "turned.mp4", tmp_path / "draft", ".mp4", unchanged, crf=8)
    with av.open(str(tmp_path / "turned.mp4")) as opened:
        first = next(opened.decode(video=0))
        assert first.rotation % 360 in {turn, 360 - turn}
    expected, found = np.rot90(read_film(film)[0][3], first.rotation // 90), read_film(tmp_path / "draft")[0][3]
    assert found.shape == expected.shape
    assert psnr_db(expected.astype(np.float64), found.astype(np.float64), 255.0) > 40


def with_turn(content: bytes, degrees: int) -> bytes:
    """Return an MP4 file whose video track's matrix turns it, as phones write it (ISO 14496-12, track header box)."""
    one = 1 << 16
    rows = {90: (0, one, -one, 0), 180: (-one, 0, 0, -one), 270: (0, -one, one, 0)}[degrees]
    place = content.index(b"tkhd") + 4 + 40  # version and flags, times, layer and volume before the matrix
    values = [rows[0], rows[1], 0, rows[2], rows[3], 0, 0, 0, 1 << 30]
    matrix = b"".join(value.to_bytes(4, "big", signed=True) for value in values)
    return content[:place] + matrix + content[place + 36 :]
