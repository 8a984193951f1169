"""Files, folders and CSVs give pictures with names; a wrong source or CSV is an error of a single line."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from shared.command.errors import ToolError
from shared.media.images import read_pixels
from tests.shared.media.test_video import write_video
from tools.prepare_calibration.sources import PATTERNS, Columns, Picture, Source, find_sources, read_pictures, synthetic_sources

FRAMES = 20
RATE = 10  # frames a second of `write_video`


def find(*given: Path, file: str | None = None, frame: str | None = None, time: str | None = None) -> list[Source]:
    return find_sources(given, Columns(file, frame, time))


def listed(folder: Path, text: str, name: str = "list.csv") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def pictures(source: Source, frames: int = 4, *, at_scene_changes: bool = False) -> list[Picture]:
    return list(read_pictures(source, frames=frames, at_scene_changes=at_scene_changes, size=32))


def numbers(source: Source, frames: int = 4, *, at_scene_changes: bool = False) -> Sequence[int | None]:
    return [picture.frame for picture in pictures(source, frames, at_scene_changes=at_scene_changes)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of every kind by name, two of them below, a video, a text and a GIF."""
    for name in ("b.jpg", "a.JPEG", "c.png", "d.webp", "sub/e.bmp", "sub/deep/f.jpeg", "notes.txt", "g.gif"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).touch()
    frames = [np.full((32, 48, 3), 5 * number + 100 * (number >= FRAMES // 2), np.uint8) for number in range(FRAMES)]
    write_video(tmp_path / "photos" / "v.avi", frames)
    return tmp_path / "photos"


def test_a_folder_gives_its_images_then_its_videos_named_from_the_folder_on(folder: Path) -> None:
    found = find(folder)
    names = ["a.JPEG", "b.jpg", "c.png", "d.webp", "sub/deep/f.jpeg", "sub/e.bmp", "v.avi"]
    assert [source.name for source in found] == [f"photos/{name}" for name in names]
    assert [source.kind for source in found] == ["image"] * 6 + ["video"]
    assert [source.path for source in found] == [folder / name for name in names]


def test_files_keep_their_names_and_order(folder: Path) -> None:
    assert [source.name for source in find(folder / "v.avi", folder / "c.png")] == ["v.avi", "c.png"]


def test_the_current_folder_has_a_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert find(Path())[0].name == "photos/a.JPEG"


def test_a_file_named_twice_counts_once(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to(folder / "c.png")
    assert len(find(folder, folder / "c.png", folder / "sub", tmp_path / "link.png")) == len(find(folder))


def test_a_folder_needs_an_image_or_a_video(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    with pytest.raises(ToolError, match="no images in this folder"):
        find(tmp_path / "videos")
    (folder / "v.avi").rename(tmp_path / "videos" / "v.AVI")
    assert [source.kind for source in find(tmp_path / "videos")] == ["video"]


@pytest.mark.parametrize(
    ("name", "reason"), [("absent.png", "no such source file"), ("notes.txt", "neither an image nor a video nor a CSV")]
)
def test_a_missing_or_unknown_source_is_an_error(folder: Path, name: str, reason: str) -> None:
    with pytest.raises(ToolError, match=reason):
        find(folder / name)


def test_a_csv_gives_images_and_the_frames_and_times_of_videos(folder: Path) -> None:
    text = "Path, Frame ,time\nc.png,,\nv.avi,3,\nv.avi,7,0.5\nv.avi,,1.2\nsub/e.bmp\n"
    found = find(listed(folder, text))
    assert [(source.name, source.kind, source.frames, source.times) for source in found] == [
        ("c.png", "image", None, ()),
        ("v.avi", "video", (3, 7), (1.2,)),  # a frame number is more exact than the time in its row
        ("sub/e.bmp", "image", None, ()),
    ]
    assert found[1].path == folder / "v.avi"
    assert numbers(found[1]) == [3, 7, 12]
    assert [picture.time_s for picture in pictures(found[1])] == [0.3, 0.7, 1.2]


def test_columns_are_found_by_the_users_names(folder: Path) -> None:
    path = listed(folder, "clip,file,no,at\nv.avi,wrong.png,4,\nv.avi,wrong.png,,0.9\n")
    (source,) = find(path, file="Clip", frame="NO", time=" at ")
    assert (source.name, source.frames, source.times) == ("v.avi", (4,), (0.9,))
    for option, columns in (("--file-column", {"file": "x"}), ("--frame-column", {"frame": "x"}), ("--time-column", {"time": "x"})):
        with pytest.raises(ToolError, match=rf"{option} x: no such column; got clip, file, no, at"):
            find(path, **columns)


def test_a_byte_order_mark_and_empty_lines_are_ignored(folder: Path) -> None:
    (folder / "list.csv").write_bytes(b"\xef\xbb\xbffile\r\n\r\nc.png\r\n\r\n")
    assert [source.name for source in find(folder / "list.csv")] == ["c.png"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("file;frame\nv.avi;3\n", "no column names files; got file;frame; expected one of file, path"),
        ("picture\nc.png\n", "no column names files; got picture; .*--file-column"),
        ("file,frame\nv.avi,three\n", "no frame number or time; got 'three' in line 2; expected a number, at least 0"),
        ("file,frame\nv.avi,-1\n", "no frame number or time; got '-1'"),
        ("file,frame\nv.avi,1.5\n", "a frame number is no whole number; got 1.5 in line 2"),
        ("file,time\nv.avi,nan\n", "no frame number or time; got 'nan'"),
        ("file,time\nv.avi,1e999\n", "no frame number or time; got '1e999'"),
        ("file,frame\nc.png,\n,4\n", "a row names no file; got line 3"),
        ("file,frame\nc.png,4\n", "a row gives an image a frame or a time; got c.png"),
        ("file\nnotes.txt\n", "a row names neither an image nor a video; got 'notes.txt'"),
        ("file\nhttp://localhost/\n", "a row names neither an image nor a video"),
        ('file\n"a\nb.png"\n', r"a row names neither an image nor a video; got 'a\\nb.png'"),
    ],
)
def test_a_wrong_csv_is_an_error_of_a_single_line(folder: Path, text: str, reason: str) -> None:
    with pytest.raises(ToolError, match=rf"list\.csv: {reason}") as caught:
        find(listed(folder, text))
    assert "\n" not in str(caught.value)


def test_a_csv_that_is_not_utf_8_is_an_error(folder: Path) -> None:
    (folder / "list.csv").write_bytes("file\nü.png\n".encode("latin-1"))
    with pytest.raises(ToolError, match="not a CSV in UTF-8"):
        find(folder / "list.csv")


def test_an_error_names_the_line_of_the_file(folder: Path) -> None:
    with pytest.raises(ToolError, match="in line 4"):
        find(listed(folder, "file,frame\n\nv.avi,3\nv.avi,three\n"))


@pytest.mark.parametrize(
    "row",
    [
        "v.avi,20,",
        "v.avi,,2.0",
        "v.avi,1000000000000,",
        "v.avi,,1e308",
    ],
)
def test_a_frame_after_the_end_is_an_error(folder: Path, row: str) -> None:
    (source,) = find(listed(folder, f"file,frame,time\n{row}\n"))
    with pytest.raises(ToolError, match=r"v\.avi: the video has no (such frame|frame at that time); .*expected 0 to (19|1\.9 s)"):
        pictures(source)


def test_frames_of_a_video_are_even_or_at_scene_changes(folder: Path) -> None:
    (source,) = find(folder / "v.avi")
    assert numbers(source, 3) == [0, 10, 19]
    assert numbers(source, 99) == list(range(FRAMES))
    assert numbers(source, 2, at_scene_changes=True) == [0, FRAMES // 2]
    assert pictures(source, 3)[1].time_s == 10 / RATE


def test_an_image_is_a_single_picture_without_frame_and_time(folder: Path) -> None:
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)).save(folder / "c.png")
    (picture,) = pictures(find(folder / "c.png")[0])
    np.testing.assert_array_equal(picture.pixels, read_pixels(folder / "c.png"))
    assert (picture.frame, picture.time_s) == (None, None)
    with pytest.raises(ToolError, match="the image file is empty"):
        pictures(find(folder / "b.jpg")[0])


def test_synthetic_pictures_are_named_differ_and_repeat() -> None:
    sources = synthetic_sources(2 * len(PATTERNS))
    assert [source.name for source in sources[:2]] == [f"synthetic:{PATTERNS[0]}:0", f"synthetic:{PATTERNS[1]}:1"]
    made = [pictures(source)[0].pixels for source in sources]
    assert all((pixels.shape, pixels.dtype) == ((32, 32, 3), np.uint8) for pixels in made)
    assert len({pixels.tobytes() for pixels in made}) == len(made)
    for source, pixels in zip(sources, made, strict=True):
        np.testing.assert_array_equal(pictures(source)[0].pixels, pixels)
        assert pixels.std() > 1
