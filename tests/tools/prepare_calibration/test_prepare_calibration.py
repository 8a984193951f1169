"""Samples are boxes of their sources, spread, repeatable, apart from what is held out; what gave none is named."""

import hashlib
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shared.calibration.dataset import CalibrationSet
from shared.command.errors import ToolError
from shared.files.provenance import provenance_path
from shared.formats.tensors import TensorSpec
from shared.media.images import read_pixels, seeded_image, stretch
from shared.media.video import frames_at
from tests.conftest import REALDATA, ROOT, Run
from tests.shared.media.test_video import write_video
from tools.prepare_calibration import command as module
from tools.prepare_calibration import prepare_calibration
from tools.prepare_calibration.command import CalibrationSamples
from tools.prepare_calibration.sampling import MOST_OVERLAP, look_at

TILE = 32
SMALL: dict[str, Any] = {"tile_size": TILE, "max_samples": 12}
BROKEN = {"cut.jpg", "empty.png", "page.jpg", "tiny.png"}


def picture(seed: int, width: int = 90, height: int = 70) -> Image.Image:
    waves = seeded_image(max(width, height), np.random.default_rng(seed))[0].transpose(1, 2, 0)
    return Image.fromarray(np.rint(waves * 255).astype(np.uint8)[:height, :width])


def write_photos(folder: Path, count: int = 8) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture(number).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eight photographs of 90x70 pixels."""
    return write_photos(tmp_path / "photos")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as it comes: every format and mode, a turned photograph, folders below, and four files that give nothing."""
    folder = tmp_path_factory.mktemp("mixed") / "photos"
    (folder / "sub").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # upright after a quarter turn
    for number, name in enumerate(("a.jpg", "b.jpeg", "c.JPEG", "d.png", "e.webp", "sub/f.bmp")):
        picture(number).save(folder / name)
    picture(7, 120, 40).save(folder / "turned.jpg", exif=exif)
    picture(8).convert("L").save(folder / "grey.png")
    picture(9).convert("RGBA").save(folder / "alpha.png")
    deep = np.asarray(picture(10).convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(folder / "deep.png")
    picture(11).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:900])
    (folder / "empty.png").touch()
    (folder / "page.jpg").write_text("<!doctype html><title>404</title>")
    picture(12, TILE - 1, 200).save(folder / "tiny.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def manifest(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return content


def entries(folder: Path, part: str = "samples") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = manifest(folder)[part]
    return found


def everything(folder: Path) -> dict[str, str]:
    """Return name -> sha256 of all files but the provenance, which tells when and where."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    return {name: sha256(path) for name, path in files.items() if name != "manifest.json.json"}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sources(found: Iterable[dict[str, Any]]) -> set[str]:
    return {entry["source"] for entry in found}


def test_every_sample_is_exactly_its_box_of_its_upright_source(mixed: Path, tmp_path: Path) -> None:
    result = prepare_calibration([mixed], output=tmp_path / "tiles", **SMALL | {"max_samples": 30})
    samples = entries(tmp_path / "tiles")
    assert len(samples) == result.found.samples == 30
    assert sources(samples) == {
        f"photos/{path.relative_to(mixed).as_posix()}"
        for path in mixed.rglob("*")
        if path.name not in {*BROKEN, "notes.txt"} and path.is_file()
    }
    for entry in samples:
        file, source = tmp_path / "tiles" / entry["file"], mixed.parent / entry["source"]
        assert (sha256(file), sha256(source)) == (entry["sha256"], entry["source_sha256"])
        assert entry["sha256"][:8] in file.name
        pixels = read_pixels(source)
        left, top, right, bottom = entry["box"]
        assert (right - left, bottom - top) == (TILE, TILE)
        assert 0 <= left < right <= pixels.shape[1]
        assert 0 <= top < bottom <= pixels.shape[0]
        np.testing.assert_array_equal(read_pixels(file), pixels[top:bottom, left:right])
        look = look_at(read_pixels(file))
        assert [entry[name] for name in ("brightness", "contrast", "detail")] == pytest.approx(
            [look.brightness, look.contrast, look.detail], abs=1e-3
        )
        assert not entry["synthetic"]
    assert any(entry["box"][3] > 40 for entry in samples if "turned" in entry["source"]), "below where it lies unturned"


def test_sources_that_give_nothing_are_named_and_counted(mixed: Path, tmp_path: Path) -> None:
    result = prepare_calibration([mixed], output=tmp_path / "tiles", **SMALL)
    reasons = {one.source.removeprefix("photos/"): one.reason for one in result.found.skipped}
    assert set(reasons) == BROKEN
    assert reasons["tiny.png"] == f"smaller than a tile of {TILE} pixels"
    for name in BROKEN - {"tiny.png"}:
        assert reasons[name].startswith(("unreadable image; ", "the image file is empty; ")), name
    assert manifest(tmp_path / "tiles")["skipped"] == [{"source": s.source, "reason": s.reason} for s in result.found.skipped]
    assert "4 sources SKIPPED" in result.message
    assert manifest(tmp_path / "tiles")["sources"] == result.found.sources == 14


def test_the_manifest_tells_settings_versions_and_further_files(photos: Path, tmp_path: Path) -> None:
    prepare_calibration([photos], output=tmp_path / "tiles", seed=5, npz=True, holdout=2, **SMALL)
    content = manifest(tmp_path / "tiles")
    assert content["tool"] == "prepare_calibration"
    assert (content["settings"]["seed"], content["settings"]["tile_size"]) == (5, TILE)
    assert content["versions"]["numpy"] == np.__version__
    assert content["files"] == ["contact_sheet.png", "coverage.png", "samples.npz", "holdout.npz"]
    named = {entry["file"] for entry in (*content["samples"], *content["holdout"])}
    assert set(everything(tmp_path / "tiles")) == {*named, *content["files"], "manifest.json"}
    assert str(tmp_path) not in (tmp_path / "tiles" / "manifest.json").read_text()


def test_what_is_held_out_comes_from_other_sources(photos: Path, tmp_path: Path) -> None:
    for seed in range(5):
        result = prepare_calibration([photos], output=tmp_path / f"{seed}", seed=seed, holdout=5, **SMALL)
        samples, held = entries(tmp_path / f"{seed}"), entries(tmp_path / f"{seed}", "holdout")
        assert (len(samples), len(held)) == (result.found.samples, result.found.holdout) == (12, 5)
        assert not sources(samples) & sources(held)
        assert not {entry["source_sha256"] for entry in samples} & {entry["source_sha256"] for entry in held}


def test_a_copy_of_a_sampled_source_is_not_held_out(photos: Path, tmp_path: Path) -> None:
    for file in list(photos.iterdir()):
        shutil.copy(file, photos / f"copy_of_{file.name}")
    prepare_calibration([photos], output=tmp_path / "tiles", holdout=8, **SMALL)
    samples, held = entries(tmp_path / "tiles"), entries(tmp_path / "tiles", "holdout")
    assert not {entry["source_sha256"] for entry in samples} & {entry["source_sha256"] for entry in held}


def test_a_frame_is_not_held_out_because_it_is_named_twice(tmp_path: Path) -> None:
    given = []
    for name in ("a", "b"):
        write_video(tmp_path / f"{name}.avi", [np.asarray(picture(10 * ord(name) + number)) for number in range(10)])
        (tmp_path / f"{name}.csv").write_text(f"file,frame\n{name}.avi,1\n{name}.avi,5\n")
        given += [tmp_path / f"{name}.avi", tmp_path / f"{name}.csv"]
    for seed in range(10):
        folder = tmp_path / f"{seed}"
        prepare_calibration(given, output=folder, seed=seed, holdout=8, frames_per_video=10, **SMALL)
        samples, held = ({(one["source"], one["frame"]) for one in entries(folder, part)} for part in ("samples", "holdout"))
        assert not samples & held


def test_of_few_sources_other_pictures_are_held_out(tmp_path: Path) -> None:
    frames = [np.asarray(picture(number)) for number in range(10)]
    video = write_video(tmp_path / "v.avi", frames)
    prepare_calibration([video], output=tmp_path / "tiles", holdout=4, **SMALL)
    samples, held = ({entry["frame"] for entry in entries(tmp_path / "tiles", part)} for part in ("samples", "holdout"))
    assert samples
    assert held
    assert not samples & held


def test_of_one_picture_nothing_can_be_held_out(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="nothing can be held out; got all samples come from one picture; give more"):
        prepare_calibration([photos / "0.png"], output=tmp_path / "tiles", holdout=1, min_samples=1, **SMALL)
    assert not (tmp_path / "tiles").exists()


def test_the_same_seed_gives_the_same_bytes_from_another_folder_too(photos: Path, tmp_path: Path) -> None:
    write_video(photos / "v.avi", [np.asarray(picture(number)) for number in range(5)])
    elsewhere = shutil.copytree(photos, tmp_path / "elsewhere" / "photos")
    options = {**SMALL, "holdout": 4, "npz": True, "synthetic": 3}
    for given, name in ((photos, "one"), (elsewhere, "again")):
        prepare_calibration([given], output=tmp_path / name, seed=7, **options)
    prepare_calibration([photos], output=tmp_path / "other", seed=8, **options)
    assert everything(tmp_path / "one") == everything(tmp_path / "again")
    other = {entry["sha256"] for entry in entries(tmp_path / "other")}
    assert len(other & {entry["sha256"] for entry in entries(tmp_path / "one")}) < len(other) / 2


def test_tiles_of_one_picture_are_few_and_overlap_by_half_at_most(photos: Path, tmp_path: Path) -> None:
    result = prepare_calibration([photos], output=tmp_path / "tiles", tile_size=48, tiles_per_image=3, max_samples=99)
    samples = entries(tmp_path / "tiles")
    most = 0.0
    for name in sources(samples):
        boxes = [entry["box"] for entry in samples if entry["source"] == name]
        assert len(boxes) <= 3
        for one, other in itertools.combinations(boxes, 2):
            shared = [max(min(one[n + 2], other[n + 2]) - max(one[n], other[n]), 0) for n in (0, 1)]
            most = max(most, shared[0] * shared[1] / 48**2)
    assert 0 < most <= MOST_OVERLAP
    assert result.found.duplicates > 0
    assert f"{result.found.duplicates} near-duplicates passed over" in result.message
    assert f"fewer than the {99} asked for" in result.message


def test_near_duplicates_are_taken_once(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 9)
    for number in range(9):
        for quality in (95, 85):
            picture(number).save(tmp_path / "photos" / f"{number}_{quality}.jpg", quality=quality)
    result = prepare_calibration([tmp_path / "photos"], output=tmp_path / "whole", resize="64", max_samples=27)
    assert (result.found.samples, result.found.duplicates) == (9, 18)
    assert {entry["source"].removeprefix("photos/")[0] for entry in entries(tmp_path / "whole")} == set("012345678")


def test_few_bright_pictures_among_many_dark_ones_are_not_missed(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(96):
        rng = np.random.default_rng(number)
        base, spread = (180, 70) if number < 4 else (30, 12)
        pixels = np.clip(rng.normal(base, spread, (8, 8, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).resize((48, 48), Image.Resampling.NEAREST).save(tmp_path / "photos" / f"{number:02d}.png")
    for seed in range(10):
        folder = tmp_path / f"{seed}"
        prepare_calibration([tmp_path / "photos"], output=folder, resize="48", max_samples=12, seed=seed)
        brightness = [entry["brightness"] for entry in entries(folder)]
        assert min(brightness) < 60
        assert max(brightness) > 120


@pytest.mark.parametrize(("text", "height", "width"), [("64", 64, 64), ("80x60", 60, 80), ("90x70", 70, 90)])
def test_whole_images_are_stretched_to_width_x_height(photos: Path, tmp_path: Path, text: str, height: int, width: int) -> None:
    prepare_calibration([photos], output=tmp_path / "whole", resize=text)
    samples = entries(tmp_path / "whole")
    assert len(sources(samples)) == len(samples) == 8
    for entry in samples:
        whole = stretch(read_pixels(photos.parent / entry["source"]), height, width)
        assert whole.shape == (height, width, 3)
        np.testing.assert_array_equal(read_pixels(tmp_path / "whole" / entry["file"]), whole)
        assert "box" not in entry


def scenes(path: Path) -> Path:
    """Write a video of 30 frames of 64x48 at 10 a second, with another scene from frame 17 on."""
    one, other = (np.asarray(picture(seed, 64, 48)) for seed in (1, 2))
    return write_video(path, [np.roll(one if number < 17 else other, number, axis=1) for number in range(30)])


def test_frames_come_evenly_or_at_scene_changes_and_are_told(tmp_path: Path) -> None:
    video = scenes(tmp_path / "v.avi")
    options = {**SMALL, "tiles_per_image": 9, "min_samples": 2}
    prepare_calibration([video], output=tmp_path / "even", frames_per_video=4, **options)
    prepare_calibration([video], output=tmp_path / "changes", frames_per_video=2, scene_changes=True, **options)
    assert {entry["frame"] for entry in entries(tmp_path / "even")} == {0, 10, 19, 29}
    assert {entry["frame"] for entry in entries(tmp_path / "changes")} == {0, 17}
    for folder in ("even", "changes"):
        for entry in entries(tmp_path / folder):
            ((number, pixels),) = frames_at(video, {entry["frame"]})
            assert entry["time_s"] == number / 10
            left, top, right, bottom = entry["box"]
            np.testing.assert_array_equal(read_pixels(tmp_path / folder / entry["file"]), pixels[top:bottom, left:right])


def test_a_csv_says_which_frames(tmp_path: Path) -> None:
    scenes(tmp_path / "v.avi")
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "list.csv").write_text("clip,no,at\nv.avi,3,\nv.avi,,2.5\na.png,,\n")
    columns = {"file_column": "clip", "frame_column": "no", "time_column": "at"}
    prepare_calibration([tmp_path / "list.csv"], output=tmp_path / "tiles", **columns, **SMALL)
    samples = entries(tmp_path / "tiles")
    assert {(entry["source"], entry.get("frame")) for entry in samples} == {("v.avi", 3), ("v.avi", 25), ("a.png", None)}


def test_a_frame_that_is_not_there_skips_its_video(photos: Path, tmp_path: Path) -> None:
    scenes(photos / "v.avi")
    (photos / "list.csv").write_text("file,frame\nv.avi,30\n" + "".join(f"{number}.png,\n" for number in range(8)))
    result = prepare_calibration([photos / "list.csv"], output=tmp_path / "tiles", **SMALL)
    (skipped,) = result.found.skipped
    assert (skipped.source, skipped.reason.partition(";")[0]) == ("v.avi", "the video has no such frame")
    assert "expected 0 to 29" in skipped.reason


def test_a_missing_file_of_a_csv_is_named_as_skipped(photos: Path, tmp_path: Path) -> None:
    (photos / "list.csv").write_text("file\nabsent.png\nabsent.mp4\n" + "".join(f"{number}.png\n" for number in range(8)))
    result = prepare_calibration([photos / "list.csv"], output=tmp_path / "tiles", **SMALL)
    assert {one.source for one in result.found.skipped} == {"absent.png", "absent.mp4"}
    assert result.found.samples == 12


def test_made_up_samples_are_labelled_in_manifest_and_message(photos: Path, tmp_path: Path) -> None:
    result = prepare_calibration([photos], output=tmp_path / "tiles", synthetic=8, **SMALL | {"max_samples": 40})
    samples = entries(tmp_path / "tiles")
    made_up = [entry for entry in samples if entry["synthetic"]]
    assert made_up == [entry for entry in samples if entry["source"].startswith("synthetic:")]
    assert not any("source_sha256" in entry for entry in made_up)
    assert 0 < len(made_up) == result.found.synthetic < len(samples)
    assert f"{len(made_up)} samples are MADE UP" in result.message
    alone = prepare_calibration(output=tmp_path / "alone", synthetic=20, min_samples=4, **SMALL)
    assert alone.found.synthetic == alone.found.samples


@pytest.mark.parametrize(
    ("layout", "channels", "input_range", "scale", "offset"),
    [("nchw", "3", "0..1", 1 / 255, 0), ("nhwc", "3", "0..255", 1, 0), ("nchw", "1", "-1..1", 2 / 255, -1)],
)
def test_arrays_hold_the_samples_in_the_form_asked_for(
    photos: Path, tmp_path: Path, layout: str, channels: str, input_range: str, scale: float, offset: float
) -> None:
    options: dict[str, Any] = {"layout": layout, "channels": channels, "input_range": input_range, "input_name": "x"}
    prepare_calibration([photos], output=tmp_path / "tiles", npz=True, holdout=3, **options, **SMALL)
    for name, part in (("samples.npz", "samples"), ("holdout.npz", "holdout")):
        with np.load(tmp_path / "tiles" / name) as arrays:
            assert arrays.files == ["x"]
            array = arrays["x"]
        files = [tmp_path / "tiles" / entry["file"] for entry in entries(tmp_path / "tiles", part)]
        mode = "L" if channels == "1" else "RGB"
        pixels = np.stack([np.asarray(Image.fromarray(read_pixels(file)).convert(mode)).reshape(TILE, TILE, -1) for file in files])
        expected = pixels.astype(np.float64) * scale + offset
        assert array.dtype == np.float32
        np.testing.assert_allclose(array if layout == "nhwc" else array.transpose(0, 2, 3, 1), expected, atol=1e-4)


def test_the_set_is_read_as_calibration_samples(photos: Path, tmp_path: Path) -> None:
    prepare_calibration([photos], output=tmp_path / "tiles", npz=True, holdout=3, **SMALL)
    inputs = [TensorSpec("image", (1, 3, TILE, TILE), "float32")]
    folder = CalibrationSet(tmp_path / "tiles", "0..1")
    assert folder.has_holdout()
    for one, other in (
        (folder, CalibrationSet(tmp_path / "tiles" / "samples.npz")),
        (CalibrationSet(tmp_path / "tiles", "0..1", part="holdout"), CalibrationSet(tmp_path / "tiles" / "holdout.npz")),
    ):
        pairs = list(zip(one.samples(inputs), other.samples(inputs), strict=True))
        assert len(pairs) == (12 if one is folder else 3)
        for sample, same in pairs:
            np.testing.assert_array_equal(sample["image"], same["image"])
    assert folder.check(inputs, None) == 12


def test_too_few_samples_are_an_error_that_says_what_to_do(mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="too few samples; got 0 of 14 sources") as caught:
        prepare_calibration([mixed], output=tmp_path / "tiles", tile_size=500)
    reasons = "11 smaller than a tile of 500 pixels, 2 unreadable image, 1 the image file is empty, 0 near-duplicates"
    assert reasons in str(caught.value)
    assert "expected at least 8; give more or larger images" in str(caught.value)
    assert not (tmp_path / "tiles").exists()
    with pytest.raises(ToolError, match="too few samples; got 10 of 14"):
        prepare_calibration([mixed], output=tmp_path / "tiles", tile_size=TILE, tiles_per_image=1, min_samples=11)
    assert not (tmp_path / "tiles").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(ToolError, match="too few samples"):
        prepare_calibration([mixed], output=tmp_path / "mine", tile_size=500)
    assert list((tmp_path / "mine").iterdir()) == []


def test_fewer_samples_than_the_least_may_be_asked_for(photos: Path, tmp_path: Path) -> None:
    assert prepare_calibration([photos], output=tmp_path / "tiles", tile_size=TILE, max_samples=3).found.samples == 3


def test_a_folder_with_other_files_is_refused_unless_told(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ToolError, match="the folder holds other files; use --overwrite"):
        prepare_calibration([photos], output=tmp_path / "mine", **SMALL)
    with pytest.raises(ToolError, match="the folder holds other files"):
        prepare_calibration([photos], output=tmp_path / "mine", refresh=True, **SMALL)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    prepare_calibration([photos], output=tmp_path / "mine", overwrite=True, **SMALL)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    assert len(entries(tmp_path / "mine")) == 12
    with pytest.raises(ToolError, match="the output is no folder"):
        prepare_calibration([photos], output=photos / "0.png", overwrite=True, **SMALL)


def test_somebody_elses_manifest_is_kept(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.json").write_text("{}")
    with pytest.raises(ToolError, match="the output exists"):
        prepare_calibration([photos], output=tmp_path / "mine", refresh=True, **SMALL)
    assert [path.read_text() for path in (tmp_path / "mine").iterdir()] == ["{}"]


def test_a_set_is_up_to_date_until_something_of_it_changes(photos: Path, tmp_path: Path) -> None:
    def again(**changes: Any) -> CalibrationSamples:
        return prepare_calibration([photos], output=tmp_path / "tiles", **SMALL | changes)

    first, before = again(), everything(tmp_path / "tiles")
    second = again()
    assert (first.manifest.up_to_date, second.manifest.up_to_date) == (False, True)
    assert second.message.startswith("up to date: ")
    assert second.found == first.found
    with pytest.raises(ToolError, match="the output exists and is out of date"):
        again(seed=1)
    (tmp_path / "tiles" / entries(tmp_path / "tiles")[0]["file"]).unlink()
    with pytest.raises(ToolError, match="out of date"):
        again()
    assert not again(refresh=True).manifest.up_to_date
    assert everything(tmp_path / "tiles") == before
    picture(99).save(photos / "0.png")
    with pytest.raises(ToolError, match="out of date"):
        again()
    picture(0).save(photos / "0.png")
    assert again().manifest.up_to_date
    picture(99).save(photos / "new.png")
    with pytest.raises(ToolError, match="out of date"):
        again()


def test_refresh_replaces_the_tiles_and_removes_the_former_ones(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiles"
    prepare_calibration([photos], output=folder, holdout=3, npz=True, **SMALL)
    former = set(everything(folder))
    (folder / "notes.txt").write_text("mine")
    prepare_calibration([photos], output=folder, refresh=True, seed=3, **SMALL)
    content = manifest(folder)
    now = {*content["files"], *(entry["file"] for entry in content["samples"]), "manifest.json", "notes.txt"}
    assert set(everything(folder)) == now
    assert {"samples.npz", "holdout.npz"} <= former - now


def test_tiles_inside_a_source_folder_are_no_sources(photos: Path) -> None:
    for _ in range(2):
        result = prepare_calibration([photos], output=photos / "tiles", **SMALL)
        assert result.found.sources == 8
    assert result.manifest.up_to_date


def test_work_that_fails_leaves_no_samples_behind(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_calibration([photos], output=tmp_path / "old", **SMALL)
    before = everything(tmp_path / "old")
    monkeypatch.setattr(module, "write_sheet", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    for folder, options in (("new", {}), ("old", {"refresh": True, "seed": 3})):
        with pytest.raises(OSError, match="no space left"):
            prepare_calibration([photos], output=tmp_path / folder, **options, **SMALL)
    assert everything(tmp_path / "old") == before
    assert not (tmp_path / "new").exists()


def test_of_many_sources_some_are_looked_at_and_that_is_told(photos: Path, tmp_path: Path) -> None:
    result = prepare_calibration([photos], output=tmp_path / "one", tile_size=TILE, max_samples=1)
    assert (result.found.considered, result.found.sources) == (8, 8)
    for number in range(8, 20):
        picture(number).save(photos / f"{number}.png")
    result = prepare_calibration([photos], output=tmp_path / "two", tile_size=TILE, max_samples=1)
    assert (result.found.considered, result.found.sources) == (module.CONSIDERED, 20)
    assert f"1 samples from {module.CONSIDERED} of 20 sources" in result.message
    content = manifest(tmp_path / "two")
    assert (content["considered"], content["sources"]) == (module.CONSIDERED, 20)


def test_only_some_skipped_sources_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    from rich.console import Console

    write_photos(tmp_path / "photos", 8)
    for number in range(module.SHOWN + 3):
        (tmp_path / "photos" / f"broken{number:02d}.png").write_text(f"no image {number}")
    result = prepare_calibration([tmp_path / "photos"], output=tmp_path / "tiles", **SMALL)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(result)
    assert capture.get().count("unreadable image") == module.SHOWN
    assert "and 3 more; manifest.json has all" in capture.get()
    assert len(manifest(tmp_path / "tiles")["skipped"]) == module.SHOWN + 3


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"resize": "64", "tile_size": 32}, "--resize takes whole images, --tile-size cuts them; give one of them"),
        ({"resize": "big"}, "--resize is no size; got big; expected pixels, such as 256 or 320x240"),
        ({"resize": "x240"}, "--resize is no size"),
        ({"resize": "320x-1"}, "--resize is no size"),
        ({"resize": "0"}, "--resize is out of range"),
        ({"resize": "99999x8"}, "--resize is out of range"),
    ],
)
def test_options_that_make_no_sense_are_errors(photos: Path, tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ToolError, match=reason):
        prepare_calibration([photos], output=tmp_path / "tiles", **options)
    assert not (tmp_path / "tiles").exists()


def test_nothing_to_take_samples_from_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="there is nothing to take samples from; name images"):
        prepare_calibration(output=tmp_path / "tiles")


def test_thousands_of_images_take_little_memory(tmp_path: Path) -> None:
    """The decoded pictures together would take 400 MB."""
    (tmp_path / "photos").mkdir()
    for number, block in enumerate(np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), np.uint8)):
        file = io.BytesIO()
        Image.fromarray(block).resize((256, 256), Image.Resampling.NEAREST).save(file, "JPEG")
        for copy in range(40):  # whose contents differ behind the picture's end
            (tmp_path / "photos" / f"{number}_{copy}.jpg").write_bytes(file.getvalue() + bytes([copy]))
    lines = (
        "import sys; from pathlib import Path; from shared.command.resources import peak_rss_bytes",
        "from tools.prepare_calibration import prepare_calibration as prepare",
        "found = prepare([Path(sys.argv[1])], output=Path(sys.argv[2]), tile_size=64, tiles_per_image=1, max_samples=250).found",
        "print(found.considered, found.samples, peak_rss_bytes() // 2**20)",  # getrusage would count what the tests had
    )
    command = [sys.executable, "-c", "\n".join(lines), str(tmp_path / "photos"), str(tmp_path / "tiles")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    considered, samples, peak_mb = map(int, done.stdout.split())
    assert considered == 2000
    assert samples >= 50
    assert peak_mb < 300


def test_exit_codes_of_the_command(mixed: Path, tmp_path: Path, run_tool: Run) -> None:
    fine = run_tool("prepare_calibration", mixed, "-o", tmp_path / "tiles", "--tile-size", TILE, "--max-samples", "9", "--json")
    assert (fine.returncode, fine.stderr) == (0, "")
    told = json.loads(fine.stdout)
    assert (told["found"]["samples"], len(told["found"]["skipped"])) == (9, 4)
    assert provenance_path(tmp_path / "tiles" / "manifest.json").is_file()
    for wrong in (
        [tmp_path / "absent", "-o", tmp_path / "no"],
        [mixed / "notes.txt", "-o", tmp_path / "no"],
        [mixed, "-o", tmp_path / "no", "--tile-size", "500"],
        [mixed, "-o", tmp_path / "no", "--resize", "big"],
        [mixed, "-o", tmp_path / "no", "--layout", "hwc"],
        [mixed],
    ):
        done = run_tool("prepare_calibration", *wrong)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert done.stderr.startswith("error: ")
    assert not (tmp_path / "no").exists()


@pytest.mark.realdata
def test_real_photographs_and_a_real_video_give_full_sets(tmp_path: Path) -> None:
    given = [REALDATA / "images", REALDATA / "video" / "videoseal_1.mp4"]
    result = prepare_calibration(given, output=tmp_path / "tiles", tile_size=96, max_samples=40, holdout=10, frames_per_video=4)
    assert (result.found.samples, result.found.holdout, result.found.skipped) == (40, 10, [])
    assert not sources(entries(tmp_path / "tiles")) & sources(entries(tmp_path / "tiles", "holdout"))


def test_a_users_file_with_one_of_our_names_is_kept(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiles"
    prepare_calibration([photos], output=folder, **SMALL)
    (folder / "samples.npz").write_text("mine")
    with pytest.raises(ToolError, match=r"samples\.npz: this file would be replaced; use --overwrite"):
        prepare_calibration([photos], output=folder, npz=True, refresh=True, **SMALL)
    assert (folder / "samples.npz").read_text() == "mine"
