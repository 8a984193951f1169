"""Sources of samples: image files, frames of videos, files and frames listed in a CSV, and synthetic pictures."""

import bisect
import csv
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.command.errors import ToolError, first_line
from shared.files.file_type import read_head, regular_size
from shared.media.images import CHANNELS, SUFFIXES, Image, Pixels, image_files, read_pixels, visible_files
from shared.media.video import VIDEO_SUFFIXES, frame_times, frames_at, scene_changes

FILE_COLUMNS = ("file", "path", "filename", "file_name", "filepath", "image", "video", "image_path", "video_path")
FRAME_COLUMNS = ("frame", "frame_number", "frame_index", "frame_id")
TIME_COLUMNS = ("time", "time_s", "seconds", "timestamp", "timestamp_s", "sec")
PATTERNS = ("waves", "checks", "gradient", "noise")
AGAIN = "correct it: a line of column names, such as file,frame, then a line for each file"
MAX_CSV_ROWS = 1_000_000
MAX_FIELD = 4096  # characters


@dataclass(frozen=True)
class Source:
    """An image file, a video file, or a synthetic picture.

    Args:
        name: Its name in the manifest: its path from the folder, file or CSV that the user gave, with '/'.
        path: The file; None for a synthetic picture.
        kind: Image, video, or synthetic.
        frames: Requested frame numbers of a video; None: spread evenly or at scene changes.
        times: Further requested frames, as times in seconds.
        seed: Seed of a synthetic picture.
    """

    name: str
    path: Path | None
    kind: str
    frames: tuple[int, ...] | None = None
    times: tuple[float, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Picture:
    """An image or a frame, uint8 (H, W, 3) RGB; only frames of videos have a frame number and a time."""

    pixels: Pixels
    frame: int | None = None
    time_s: float | None = None


@dataclass(frozen=True)
class Columns:
    """Names of a CSV's columns as the user gives them; None: found by their usual names."""

    file: str | None = None
    frame: str | None = None
    time: str | None = None


def find_sources(given: Sequence[Path], columns: Columns, exclude: Path | None = None) -> list[Source]:
    """Return the sources in files, folders and CSV files, in order; a file named twice counts once, files below `exclude` do not.

    Raises:
        ToolError: A file is missing or of an unknown kind, a folder has nothing in it, a CSV names no files.
    """
    found: dict[tuple[Path, str], Source] = {}
    for path in given:
        for source in _sources(path, columns):
            assert source.path is not None
            if exclude is not None and source.path.resolve().is_relative_to(exclude.resolve()):
                continue  # samples of an earlier run
            found.setdefault((source.path.resolve(), f"{source.frames} {source.times}"), source)
    return list(found.values())


def synthetic_sources(count: int) -> list[Source]:
    """Return synthetic pictures, patterns and noise in turn."""
    return [Source(f"synthetic:{PATTERNS[n % len(PATTERNS)]}:{n}", None, "synthetic", seed=n) for n in range(count)]


def read_pictures(source: Source, *, frames: int, at_scene_changes: bool, size: int) -> Iterator[Picture]:
    """Yield the pictures of a source: of a video its requested frames, else `frames` of them.

    Raises:
        ToolError: The file can't be read.
    """
    if source.path is None:
        yield Picture(_synthetic_pixels(source, size))
    elif source.kind == "image":
        yield Picture(read_pixels(source.path))
    else:
        yield from _frames(source.path, source, frames, at_scene_changes=at_scene_changes)


def _frames(path: Path, source: Source, count: int, *, at_scene_changes: bool) -> Iterator[Picture]:
    """Yield frames of a video: the requested frames, frames at scene changes, or frames spread evenly."""
    shown = frame_times(path)
    total = len(shown)
    if source.frames is not None or source.times:
        if outside := [number for number in source.frames or () if not 0 <= number < total]:
            what = "the video has no such frame"
            raise ToolError(what, where=path, got=outside[0], expected=f"0 to {total - 1}", remedy=AGAIN)
        longest = max((other - one for one, other in itertools.pairwise(shown)), default=0.0)
        if late := [time for time in source.times if time > shown[-1] + longest / 2]:
            what, expected = "the video has no frame at that time", f"0 to {shown[-1]:g} s"
            raise ToolError(what, where=path, got=f"{late[0]:g} s", expected=expected, remedy=AGAIN)
        wanted = [*(source.frames or ()), *(_nearest(shown, time) for time in source.times)]
    elif at_scene_changes:
        wanted = scene_changes(path, count)
    else:
        wanted = np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()
    for number, pixels in frames_at(path, set(wanted)):
        yield Picture(pixels, number, round(shown[number], 3) if shown[-1] else None)


def _nearest(shown: Sequence[float], time: float) -> int:
    """Return the number of the frame that is shown nearest to a time; of two the earlier."""
    later = bisect.bisect_left(shown, time)
    return min((number for number in (later - 1, later) if 0 <= number < len(shown)), key=lambda number: abs(shown[number] - time))


def _sources(path: Path, columns: Columns) -> list[Source]:
    if path.is_dir():
        videos = sorted(visible_files(path, VIDEO_SUFFIXES))
        try:
            images = image_files(path)
        except ToolError:
            if not videos:
                raise
            images = []
        files = [(file, "image") for file in images] + [(file, "video") for file in videos]
        return [Source(f"{path.resolve().name}/{file.relative_to(path).as_posix()}", file, kind) for file, kind in files]
    regular_size(path, "source")
    if path.suffix.lower() == ".csv":
        return _listed(path, columns)
    if (kind := _kind(path)) is None:
        expected = ", ".join((*SUFFIXES, *VIDEO_SUFFIXES, ".csv"))
        remedy = "leave it out, or rename it"
        raise ToolError(
            "neither an image nor a video nor a CSV", where=path, expected=f"a name ending in {expected}", remedy=remedy
        )
    return [Source(path.name, path, kind)]


def _kind(path: Path) -> str | None:
    suffix = path.suffix.lower()
    return "image" if suffix in SUFFIXES else "video" if suffix in VIDEO_SUFFIXES else None


def _listed(path: Path, columns: Columns) -> list[Source]:
    """Return the sources that a CSV lists: images, and videos with the frames and times of all their rows."""
    rows = _rows(path)
    header = {name.strip().lower(): place for place, name in enumerate(rows[0])}
    place_of_file = _column(path, header, columns.file, FILE_COLUMNS, "--file-column")
    place_of_frame = _column(path, header, columns.frame, FRAME_COLUMNS, "--frame-column")
    place_of_time = _column(path, header, columns.time, TIME_COLUMNS, "--time-column")
    if place_of_file is None:
        got = ", ".join(rows[0])
        raise ToolError(
            "no column names files", where=path, got=got, expected=f"one of {', '.join(FILE_COLUMNS)}", remedy="use --file-column"
        )
    wanted: dict[str, tuple[list[int], list[float]]] = {}
    for number, row in [(number, row) for number, row in enumerate(rows[1:], start=2) if any(row)]:
        name = row[place_of_file].strip() if place_of_file < len(row) else ""
        if not name:
            raise ToolError("a row names no file", where=path, got=f"line {number}", remedy=AGAIN)
        frames, times = wanted.setdefault(name, ([], []))
        frame, time = (_number(path, row, place, number) for place in (place_of_frame, place_of_time))
        if frame is not None:
            if frame != int(frame):
                raise ToolError("a frame number is no whole number", where=path, got=f"{frame:g} in line {number}", remedy=AGAIN)
            frames.append(int(frame))
        elif time is not None:
            times.append(time)
    found = []
    for name, (frames, times) in wanted.items():
        if not name.isprintable() or (kind := _kind(Path(name))) is None:
            raise ToolError("a row names neither an image nor a video", where=path, got=repr(name), remedy=AGAIN)
        file = path.parent / name
        if kind == "image" and (frames or times):
            raise ToolError("a row gives an image a frame or a time", where=path, got=name, remedy=AGAIN)
        found.append(Source(name, file, kind, tuple(frames) if frames else None, tuple(times)))
    return found


def _rows(path: Path) -> list[list[str]]:
    read_head(path, "CSV", limit="text-mb", again=AGAIN)
    csv.field_size_limit(MAX_FIELD)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = []
            for row in csv.reader(file):
                rows.append(row)
                if len(rows) > MAX_CSV_ROWS:
                    raise ToolError("the CSV has too many rows", where=path, expected=f"at most {MAX_CSV_ROWS}", remedy=AGAIN)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ToolError("not a CSV in UTF-8", where=path, got=first_line(error), remedy=AGAIN) from None
    if len(rows) < 2 or not any(map(any, rows[1:])):
        expected = "a line of column names, and a line for each file"
        raise ToolError("the CSV names no files", where=path, expected=expected, remedy=AGAIN)
    return rows


def _column(path: Path, header: dict[str, int], name: str | None, usual: Sequence[str], option: str) -> int | None:
    """Return the place of a column by the user's name for it, else by its usual names; None where there is no such column."""
    if name is not None:
        if name.strip().lower() not in header:
            remedy = "use a name from this list"
            raise ToolError(f"{option} {name}: no such column", where=path, got=", ".join(header), remedy=remedy)
        return header[name.strip().lower()]
    return next((header[known] for known in usual if known in header), None)


def _number(path: Path, row: list[str], place: int | None, line: int) -> float | None:
    text = row[place].strip() if place is not None and place < len(row) else ""
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        got = f"{text!r} in line {line}"
        raise ToolError("no frame number or time", where=path, got=got, expected="a number, at least 0", remedy=AGAIN)
    return value


def _synthetic_pixels(source: Source, size: int) -> Pixels:
    """Return a synthetic picture: waves with the spectrum of photographs, checks, a gradient, or noise."""
    rng = np.random.default_rng([source.seed, size])
    kind = source.name.split(":")[1]
    if kind == "waves":
        return np.asarray(np.rint(seeded_image(size, rng)[0].transpose(1, 2, 0) * 255), np.uint8)
    y, x = np.mgrid[0:size, 0:size]
    dark, bright = rng.uniform(0, 255, (2, 3))
    if kind == "checks":
        period = int(rng.integers(2, max(size // 4, 3)))
        share = ((x // period + y // period) % 2)[..., np.newaxis].astype(np.float64)
    elif kind == "gradient":
        angle = rng.uniform(0, 2 * np.pi)
        along = x * np.cos(angle) + y * np.sin(angle)
        share = ((along - along.min()) / max(np.ptp(along), 1))[..., np.newaxis]
    else:
        share = rng.uniform(0, 1, (size, size, 3))
    return np.asarray(np.rint(dark + (bright - dark) * share), np.uint8)


def seeded_image(size: int, rng: np.random.Generator) -> Image:
    """Return a synthetic picture as float32 (1, 3, size, size), RGB in [0, 1].

    Waves whose strength falls with frequency, as in photographs, plus a little noise: they give every layer activations of a
    natural range. Not for accuracy claims.
    """
    y, x = np.mgrid[0:size, 0:size] / size
    image = np.zeros((CHANNELS, size, size))
    for frequency in (1, 2, 4, 8, 16, 32):
        for channel in range(CHANNELS):
            angle, phase = rng.uniform(0, 2 * np.pi, 2)
            wave = np.cos(2 * np.pi * frequency * (x * np.cos(angle) + y * np.sin(angle)) + phase)
            image[channel] += wave / frequency
    image += image.mean(axis=0)  # channels of photographs move together
    image = (image - image.min()) / (image.max() - image.min())
    image = np.clip(image + rng.normal(0, 0.02, image.shape), 0, 1)
    pixels: Image = image.astype(np.float32)[np.newaxis]
    return pixels
