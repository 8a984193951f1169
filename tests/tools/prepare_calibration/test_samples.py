"""Samples are boxes of their sources, spread, and separate from held-out samples; the manifest describes them."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shared.calibration.dataset import CalibrationSet
from shared.command.errors import ToolError
from shared.formats.tensors import TensorSpec
from shared.media.images import read_pixels, stretch
from shared.media.video import frames_at
from tests.conftest import REALDATA
from tests.shared.media.test_video import write_video
from tests.tools.prepare_calibration.conftest import (
    BROKEN,
    SMALL,
    TILE,
    entries,
    everything,
    manifest,
    picture,
    sha256,
    sources,
    write_photos,
)
from tools.prepare_calibration import prepare_calibration
from tools.prepare_calibration.sampling import MOST_OVERLAP, measure


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
        statistics = measure(read_pixels(file))
        assert [entry[name] for name in ("brightness", "contrast", "detail")] == pytest.approx(
            [statistics.brightness, statistics.contrast, statistics.detail], abs=1e-3
        )
        assert not entry["synthetic"]
    assert any(entry["box"][3] > 40 for entry in samples if "turned" in entry["source"]), "only the turned picture is that high"


def test_the_manifest_has_settings_versions_and_further_files(photos: Path, tmp_path: Path) -> None:
    prepare_calibration([photos], output=tmp_path / "tiles", seed=5, npz=True, holdout=2, **SMALL)
    content = manifest(tmp_path / "tiles")
    assert content["tool"] == "prepare_calibration"
    assert (content["settings"]["seed"], content["settings"]["tile_size"]) == (5, TILE)
    assert content["versions"]["numpy"] == np.__version__
    assert content["files"] == ["contact_sheet.png", "coverage.png", "samples.npz", "holdout.npz"]
    named = {entry["file"] for entry in (*content["samples"], *content["holdout"])}
    assert set(everything(tmp_path / "tiles")) == {*named, *content["files"], "manifest.json"}
    assert str(tmp_path) not in (tmp_path / "tiles" / "manifest.json").read_text()


def test_held_out_samples_come_from_separate_sources(photos: Path, tmp_path: Path) -> None:
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
        samples, held = ({(entry["source"], entry["frame"]) for entry in entries(folder, part)} for part in ("samples", "holdout"))
        assert not samples & held


def test_with_few_sources_separate_pictures_are_held_out(tmp_path: Path) -> None:
    frames = [np.asarray(picture(number)) for number in range(10)]
    video = write_video(tmp_path / "v.avi", frames)
    prepare_calibration([video], output=tmp_path / "tiles", holdout=4, **SMALL)
    samples, held = ({entry["frame"] for entry in entries(tmp_path / "tiles", part)} for part in ("samples", "holdout"))
    assert samples
    assert held
    assert not samples & held


def test_nothing_can_be_held_out_of_a_single_picture(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="nothing can be held out; got all samples come from one picture; give more"):
        prepare_calibration([photos / "0.png"], output=tmp_path / "tiles", holdout=1, min_samples=1, **SMALL)
    assert not (tmp_path / "tiles").exists()


def test_tiles_of_a_picture_are_few_and_overlap_by_half_at_most(photos: Path, tmp_path: Path) -> None:
    result = prepare_calibration([photos], output=tmp_path / "tiles", tile_size=48, tiles_per_image=3, max_samples=99)
    samples = entries(tmp_path / "tiles")
    most = 0.0
    for name in sources(samples):
        boxes = [entry["box"] for entry in samples if entry["source"] == name]
        assert len(boxes) <= 3
        for box, second in itertools.combinations(boxes, 2):
            shared = [max(min(box[n + 2], second[n + 2]) - max(box[n], second[n]), 0) for n in (0, 1)]
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


def test_few_bright_pictures_among_many_dark_pictures_are_sampled(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(96):
        rng = np.random.default_rng(number)
        base, spread = (180, 70) if number < 4 else (30, 12)
        pixels = np.clip(rng.normal(base, spread, (8, 8, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).resize((48, 48), Image.Resampling.NEAREST).save(tmp_path / "photos" / f"{number:02d}.png")
    for seed in range(3):
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
    """Write a video of 30 frames of 64x48 at 10 a second, with a scene change at frame 17."""
    before, after = (np.asarray(picture(seed, 64, 48)) for seed in (1, 2))
    return write_video(path, [np.roll(before if number < 17 else after, number, axis=1) for number in range(30)])


def test_frames_come_evenly_or_at_scene_changes_and_are_in_the_manifest(tmp_path: Path) -> None:
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


def test_a_csv_selects_frames(tmp_path: Path) -> None:
    scenes(tmp_path / "v.avi")
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "list.csv").write_text("clip,no,at\nv.avi,3,\nv.avi,,2.5\na.png,,\n")
    columns = {"file_column": "clip", "frame_column": "no", "time_column": "at"}
    prepare_calibration([tmp_path / "list.csv"], output=tmp_path / "tiles", **columns, **SMALL)
    samples = entries(tmp_path / "tiles")
    assert {(entry["source"], entry.get("frame")) for entry in samples} == {("v.avi", 3), ("v.avi", 25), ("a.png", None)}


def test_a_missing_frame_skips_its_video(photos: Path, tmp_path: Path) -> None:
    scenes(photos / "v.avi")
    (photos / "list.csv").write_text("file,frame\nv.avi,30\n" + "".join(f"{number}.png,\n" for number in range(8)))
    result = prepare_calibration([photos / "list.csv"], output=tmp_path / "tiles", **SMALL)
    (skipped,) = result.found.skipped
    assert (skipped.source, skipped.reason.partition(";")[0]) == ("v.avi", "the video has no such frame")
    assert "expected 0 to 29" in skipped.reason


def test_synthetic_samples_are_marked_in_manifest_and_message(photos: Path, tmp_path: Path) -> None:
    result = prepare_calibration([photos], output=tmp_path / "tiles", synthetic=8, **SMALL | {"max_samples": 40})
    samples = entries(tmp_path / "tiles")
    synthetic = [entry for entry in samples if entry["synthetic"]]
    assert synthetic == [entry for entry in samples if entry["source"].startswith("synthetic:")]
    assert not any("source_sha256" in entry for entry in synthetic)
    assert 0 < len(synthetic) == result.found.synthetic < len(samples)
    assert f"{len(synthetic)} samples are MADE UP" in result.message
    alone = prepare_calibration(output=tmp_path / "alone", synthetic=20, min_samples=4, **SMALL)
    assert alone.found.synthetic == alone.found.samples


@pytest.mark.parametrize(
    ("layout", "channels", "input_range", "scale", "offset"),
    [("nchw", "3", "0..1", 1 / 255, 0), ("nhwc", "3", "0..255", 1, 0), ("nchw", "1", "-1..1", 2 / 255, -1)],
)
def test_arrays_hold_the_samples_in_the_requested_form(
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
    for images, arrays in (
        (folder, CalibrationSet(tmp_path / "tiles" / "samples.npz")),
        (CalibrationSet(tmp_path / "tiles", "0..1", part="holdout"), CalibrationSet(tmp_path / "tiles" / "holdout.npz")),
    ):
        pairs = list(zip(images.samples(inputs), arrays.samples(inputs), strict=True))
        assert len(pairs) == (12 if images is folder else 3)
        for sample, same in pairs:
            np.testing.assert_array_equal(sample["image"], same["image"])
    assert folder.check(inputs, None) == 12


@pytest.mark.realdata
def test_real_photographs_and_a_real_video_give_full_sets(tmp_path: Path) -> None:
    given = [REALDATA / "images", REALDATA / "video" / "videoseal_1.mp4"]
    result = prepare_calibration(given, output=tmp_path / "tiles", tile_size=96, max_samples=40, holdout=10, frames_per_video=4)
    assert (result.found.samples, result.found.holdout, result.found.skipped) == (40, 10, [])
    assert not sources(entries(tmp_path / "tiles")) & sources(entries(tmp_path / "tiles", "holdout"))
