"""Calibration samples are what the model takes, or an error: never a guess, never code, never a set's whole size in memory."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from shared.calibration.dataset import RANGES, CalibrationSet, choose_range
from shared.command.errors import ToolError
from shared.command.options import InputRange
from shared.formats.tensors import TensorSpec
from tests.conftest import REALDATA

IMAGE = [TensorSpec("image", (1, 4, 4, 3), "float32")]
CHANNELS_FIRST = [TensorSpec("image", (1, 3, 4, 4), "float32")]
POINTS = [TensorSpec("points", (1, 146, 2), "float32")]
TWO = [TensorSpec("image", (1, 4, 4, 3), "float32"), TensorSpec("scale", (1, 1), "float32")]
SHAPE = (6, 4, 4, 3)


def values(shape: tuple[int, ...] = SHAPE) -> NDArray[np.float32]:
    return np.random.default_rng(0).random(shape, np.float32)


def npz(folder: Path, **arrays: object) -> Path:
    np.savez(folder / "set.npz", **arrays)  # type: ignore[arg-type]
    return folder / "set.npz"


def pictures(folder: Path, count: int = 6) -> Path:
    """Write pictures of one grey each: 0, 10, 20, ..."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        Image.new("RGB", (8, 8), (number * 10,) * 3).save(folder / f"{number}.png")
    return folder


def greys(samples: CalibrationSet) -> list[int]:
    return [round(float(sample["image"].mean())) for sample in samples.samples(IMAGE)]


def test_a_folder_of_images_is_read_sorted_and_stretched_to_the_models_size(tmp_path: Path) -> None:
    (sample, *rest) = CalibrationSet(pictures(tmp_path), "0..255").samples(IMAGE)
    assert (sample["image"].shape, sample["image"].dtype, len(rest)) == ((1, 4, 4, 3), np.float32, 5)
    assert greys(CalibrationSet(tmp_path, "0..255")) == [0, 10, 20, 30, 40, 50]


def test_an_embedders_images_come_with_a_message_each(tmp_path: Path) -> None:
    inputs = [TensorSpec("message", (1, 64), "float32"), TensorSpec("image", (1, 1, 32, 32), "float32")]
    samples = list(CalibrationSet(pictures(tmp_path), "0..1").samples(inputs))
    assert [sample["image"].shape for sample in samples] == [(1, 1, 32, 32)] * 6
    messages = np.concatenate([sample["message"] for sample in samples])
    assert set(messages.ravel()) == {0, 1}
    assert len(np.unique(messages, axis=0)) == 6
    again = next(CalibrationSet(tmp_path, "0..1").samples(inputs))
    np.testing.assert_array_equal(again["message"], samples[0]["message"])


@pytest.mark.parametrize(("name", "expected"), [("0..1", [0, 0.2, 1]), ("-1..1", [-1, -0.6, 1]), ("0..255", [0, 51, 255])])
@pytest.mark.parametrize(("inputs", "axis"), [(IMAGE, 3), (CHANNELS_FIRST, 1)])
def test_pixels_become_the_inputs_range_in_its_layout(
    tmp_path: Path, name: InputRange, expected: list[float], inputs: list[TensorSpec], axis: int
) -> None:
    Image.new("RGB", (9, 5), (0, 51, 255)).save(tmp_path / "a.png")
    (sample,) = CalibrationSet(tmp_path, name).samples(inputs)
    assert sample["image"].shape == inputs[0].shape
    np.testing.assert_allclose(np.moveaxis(sample["image"], axis, -1)[0, 1, 2], expected, atol=1e-5)


@pytest.mark.parametrize("key", ["samples", "tiles"])
def test_a_manifest_names_the_images_beside_it_and_their_order(tmp_path: Path, key: str) -> None:
    pictures(tmp_path / "sub")
    entries = [{"file": f"sub/{number}.png", "message": "ab"} for number in (4, 1)]
    for name in ("mine.json", "manifest.json"):
        (tmp_path / name).write_text(json.dumps({"title": "t", key: entries}))
    assert greys(CalibrationSet(tmp_path / "mine.json", "0..255")) == [40, 10]
    assert greys(CalibrationSet(tmp_path, "0..255")) == [40, 10]  # manifest.json comes before what lies around
    files = [tmp_path / "mine.json", tmp_path / "sub/4.png", tmp_path / "sub/1.png"]
    assert CalibrationSet(tmp_path / "mine.json").files() == files


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"samples": [{"file": "../0.png"}]}, r"names no files beside it.*\.\./0\.png"),
        ({"samples": [{"file": "0.png"}, {"file": "a/../../0.png"}]}, "names no files beside it"),
        ({"samples": [{"file": "/etc/hostname"}]}, "names no files beside it.*/etc/hostname"),
        ({"samples": []}, "names no files beside it; got none"),
        ({"samples": [{"file": "absent.png"}]}, "names files that are not there"),
        ({"samples": [{"file": "a\0b.png"}]}, "names no files beside it"),
        ({"samples": [{"file": "."}]}, "names files that are not there"),
        ({"samples": [{"file": 3}]}, "no calibration manifest"),
        ({"samples": [{"path": "0.png"}]}, "no calibration manifest"),
        ({"samples": ["0.png"]}, "no calibration manifest"),
        ({"samples": {"file": "0.png"}}, "no calibration manifest"),
        ({"samples": None}, "no calibration manifest"),
        ({"images": []}, "no calibration manifest"),
        ([], "no calibration manifest"),
        ("samples", "no calibration manifest"),
        (3, "no calibration manifest"),
        (None, "no calibration manifest"),
    ],
)
def test_a_manifest_that_leads_elsewhere_or_nowhere_is_refused_in_one_line(tmp_path: Path, content: object, says: str) -> None:
    pictures(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ToolError, match=says) as caught:
        CalibrationSet(tmp_path, "0..255").check(IMAGE, None)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff"])
def test_a_manifest_that_is_no_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "set.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ToolError, match=r"set\.json: (no calibration manifest|the manifest file is empty)"):
        CalibrationSet(tmp_path / "set.json", "0..1").check(IMAGE, None)


@pytest.mark.parametrize("name", ["absent", "absent.npz", "absent.json", "folder.npz"])
def test_no_set_at_all_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(ToolError, match=rf"{name}: no such calibration set"):
        CalibrationSet(tmp_path / name).files()
    with pytest.raises(ToolError, match=name):
        CalibrationSet(tmp_path / name).check(IMAGE, None)


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="no images in this folder"):
        CalibrationSet(tmp_path, "0..1").check(IMAGE, None)


@pytest.mark.parametrize("inputs", [POINTS, TWO, [TensorSpec("image", (1, 4, 4, 3), "int8")], []])
def test_images_are_no_samples_for_a_model_that_takes_something_else(tmp_path: Path, inputs: list[TensorSpec]) -> None:
    with pytest.raises(ToolError, match=r"images don't fit.*give an \.npz"):
        CalibrationSet(pictures(tmp_path), "0..1").check(inputs, None)


def test_images_need_the_range_of_the_input(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match=r"say --input-range 0\.\.1, -1\.\.1 or 0\.\.255"):
        CalibrationSet(pictures(tmp_path)).check(IMAGE, None)


@pytest.mark.parametrize(
    ("most", "taken"),
    [(None, [0, 10, 20, 30, 40, 50]), (6, [0, 10, 20, 30, 40, 50]), (99, [0, 10, 20, 30, 40, 50]), (3, [0, 20, 40]), (1, [0])],
)
def test_a_part_of_a_set_is_spread_evenly_over_it(tmp_path: Path, most: int | None, taken: list[int]) -> None:
    assert greys(CalibrationSet(pictures(tmp_path), "0..255", most)) == taken
    array = np.stack([np.full((4, 4, 3), number * 10.0) for number in range(6)])
    path = npz(tmp_path, image=array)
    assert greys(CalibrationSet(path, None, most)) == taken
    assert CalibrationSet(path, None, most).check(IMAGE, None) == len(taken)


def test_a_part_is_as_large_as_asked_for_whatever_the_lengths(tmp_path: Path) -> None:
    path = npz(tmp_path, image=np.arange(23.0).repeat(48).reshape(23, 4, 4, 3))
    for most in range(1, 24):
        taken = greys(CalibrationSet(path, None, most))
        assert len(taken) == most
        assert set(np.diff(taken)) <= {23 // most, -(-23 // most)}


@pytest.mark.parametrize(
    ("name", "declared", "chosen"),
    [
        (None, None, None),
        ("0..1", None, "0..1"),
        ("-1..1", (-1.0, 1.0), "-1..1"),
        (None, (-1.0, 1.0), "-1..1"),
        (None, (-0.9922, 1.0), "-1..1"),  # mean 127.5 and std 128
        (None, (0.0, 255.0), "0..255"),
        (None, (0.0, 0.996), "0..1"),
        (None, (-2.1, 2.6), None),
        ("0..1", (-2.1, 2.6), "0..1"),
    ],
)
def test_the_range_is_the_users_or_else_the_metadatas(
    name: InputRange | None, declared: tuple[float, float] | None, chosen: str | None
) -> None:
    assert choose_range(name, declared, Path("m.tflite")) == chosen


@pytest.mark.parametrize(("name", "declared"), [("0..1", (-1.0, 1.0)), ("-1..1", (0.0, 255.0)), ("0..255", (0.0, 1.0))])
def test_a_range_that_the_metadata_denies_is_refused(name: str, declared: tuple[float, float]) -> None:
    with pytest.raises(ToolError, match=rf"m\.tflite: --input-range differs.*got {name}"):
        choose_range(name, declared, Path("m.tflite"))


@pytest.mark.parametrize("known", RANGES)
@pytest.mark.parametrize("found", RANGES)
def test_samples_of_another_range_are_refused(tmp_path: Path, found: str, known: InputRange) -> None:
    low, high = RANGES[found]
    path = npz(tmp_path, image=values() * (high - low) + low)
    for samples, declared in ((CalibrationSet(path, known), None), (CalibrationSet(path), RANGES[known])):
        if found == known:
            assert samples.check(IMAGE, declared) == 6
        elif (found, known) == ("0..1", "-1..1"):
            pass  # half of a range is no proof of another
        else:
            with pytest.raises(ToolError, match=r"of another range than the model's input.*correct --input-range"):
                samples.check(IMAGE, declared)


def test_what_images_become_passes_the_check_of_the_range_they_were_brought_to(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / "a.png")
    for name, limits in RANGES.items():
        assert CalibrationSet(tmp_path, name).check(IMAGE, limits) == 1  # type: ignore[arg-type]


def test_the_hash_changes_with_whatever_decides_the_samples(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures")
    hashes = [CalibrationSet(folder, name, most).sha256() for name in (None, "0..1", "-1..1") for most in (None, 2)]  # type: ignore[arg-type]
    assert CalibrationSet(folder).sha256() == hashes[0]
    Image.new("RGB", (8, 8), (255,) * 3).save(folder / "3.png")
    hashes.append(CalibrationSet(folder).sha256())
    (folder / "5.png").unlink()
    hashes.append(CalibrationSet(folder).sha256())
    for names in (["1.png", "2.png"], ["2.png", "1.png"]):
        (folder / "manifest.json").write_text(json.dumps({"samples": [{"file": name} for name in names]}))
        hashes.append(CalibrationSet(folder).sha256())
    hashes += [CalibrationSet(npz(tmp_path, image=values() + seed)).sha256() for seed in (0, 1)]
    assert len(set(hashes)) == len(hashes)


def test_what_lies_beside_the_images_does_not_change_the_hash(tmp_path: Path) -> None:
    before = CalibrationSet(pictures(tmp_path)).sha256()
    (tmp_path / "notes.txt").write_text("sunny")
    assert CalibrationSet(tmp_path).sha256() == before


def split_manifest(folder: Path) -> Path:
    """Write a manifest of six pictures that holds the last two out."""
    pictures(folder)
    parts = {"samples": range(4), "holdout": (4, 5)}
    content = {part: [{"file": f"{number}.png"} for number in numbers] for part, numbers in parts.items()}
    (folder / "manifest.json").write_text(json.dumps(content))
    return folder / "manifest.json"


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_manifest_holds_samples_out_of_calibration(tmp_path: Path, is_folder: bool) -> None:
    path = split_manifest(tmp_path)
    path = path.parent if is_folder else path
    assert CalibrationSet(path).has_holdout()
    assert greys(CalibrationSet(path, "0..255")) == [0, 10, 20, 30]
    held = CalibrationSet(path, "0..255", part="holdout")
    assert greys(held) == [40, 50]
    assert [file.name for file in held.files()] == ["manifest.json", "4.png", "5.png"]
    assert held.sha256() != CalibrationSet(path, "0..255").sha256()


@pytest.mark.parametrize("content", [{"samples": [{"file": "0.png"}]}, {"samples": [{"file": "0.png"}], "holdout": []}, [], "text"])
def test_a_manifest_without_a_part_of_that_name_holds_nothing_out(tmp_path: Path, content: object) -> None:
    pictures(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    assert not CalibrationSet(tmp_path).has_holdout()
    with pytest.raises(ToolError, match=r"no calibration manifest|names no files beside it; got none"):
        CalibrationSet(tmp_path, "0..1", part="holdout").check(IMAGE, None)


def test_folders_arrays_and_damaged_manifests_hold_nothing_out(tmp_path: Path) -> None:
    assert not CalibrationSet(npz(tmp_path, image=values())).has_holdout()
    assert not CalibrationSet(pictures(tmp_path / "pictures")).has_holdout()
    assert not CalibrationSet(tmp_path / "absent.json").has_holdout()
    for text in ("", "{", "[" * 100_000, "\xff"):
        (tmp_path / "set.json").write_bytes(text.encode("latin-1"))
        assert not CalibrationSet(tmp_path / "set.json").has_holdout()


def test_a_free_axis_takes_the_length_that_the_samples_have(tmp_path: Path) -> None:
    free = [TensorSpec("image", (-1, 3, -1, -1), "float32")]
    Image.new("RGB", (9, 5)).save(tmp_path / "a.png")
    (sample,) = CalibrationSet(tmp_path, "0..1").samples(free)
    assert sample["image"].shape == (1, 3, 5, 9)
    for shape in ((6, 3, 8, 10), (6, 1, 3, 8, 10)):
        for row in CalibrationSet(npz(tmp_path, image=values(shape))).samples(free):
            assert row["image"].shape == (1, 3, 8, 10)
    with pytest.raises(ToolError, match="does not fit input 'image'"):
        CalibrationSet(npz(tmp_path, image=values((6, 4, 8, 10)))).check(free, None)


def test_a_model_of_one_channel_gets_luma(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "red.png")
    (sample,) = CalibrationSet(tmp_path, "0..1").samples([TensorSpec("y", (-1, 1, 8, 8), "float32")])
    np.testing.assert_allclose(sample["y"], np.full((1, 1, 8, 8), 76 / 255), atol=1e-6)


@pytest.mark.realdata
def test_real_photographs_are_samples(tmp_path: Path) -> None:
    inputs = [TensorSpec("image", (1, 192, 192, 3), "float32")]
    samples = CalibrationSet(REALDATA / "images", "-1..1", 5)
    assert samples.check(inputs, (-1, 1)) == 5
    np.savez(tmp_path / "set.npz", images=np.concatenate([sample["image"] for sample in samples.samples(inputs)]))
    for one, other in zip(samples.samples(inputs), CalibrationSet(tmp_path / "set.npz").samples(inputs), strict=True):
        np.testing.assert_array_equal(one["image"], other["image"])


BATCH = [TensorSpec("image", (4, 4, 4, 3), "float32")]


def test_single_samples_are_joined_to_a_fixed_batch_and_the_last_one_is_filled_up(tmp_path: Path) -> None:
    expected = [[0, 10, 20, 30], [40, 50, 50, 50]]
    folder = CalibrationSet(pictures(tmp_path / "folder"), "0..255")
    single = np.concatenate([sample["image"] for sample in folder.samples(IMAGE)])
    for given in (folder, CalibrationSet(npz(tmp_path, image=single))):
        batches = [sample["image"] for sample in given.samples(BATCH)]
        assert [batch.shape for batch in batches] == [(4, 4, 4, 3)] * 2
        assert [[round(float(one.mean())) for one in batch] for batch in batches] == expected


def test_samples_that_are_batches_already_stay_as_they_are(tmp_path: Path) -> None:
    given = values((2, *BATCH[0].shape))
    found = [sample["image"] for sample in CalibrationSet(npz(tmp_path, image=given)).samples(BATCH)]
    np.testing.assert_array_equal(np.stack(found), given)


@pytest.mark.parametrize(
    ("size", "shape", "expected"),
    [
        ((700, 300), (1, 3, -1, -1), (256, 256)),
        ((100, 40), (1, 3, -1, -1), (32, 96)),
        ((10, 9), (1, 3, -1, -1), (9, 10)),
        ((700, 300), (1, 3, 64, -1), (64, 256)),
    ],
)
def test_a_model_of_free_size_gets_the_middle_of_an_image_in_a_bounded_size(
    tmp_path: Path, size: tuple[int, int], shape: tuple[int, ...], expected: tuple[int, int]
) -> None:
    Image.new("RGB", size).save(tmp_path / "a.png")
    (sample,) = CalibrationSet(tmp_path, "0..1").samples([TensorSpec("image", shape, "float32")])
    assert sample["image"].shape == (1, 3, *expected)


@pytest.mark.parametrize(("dtype", "value"), [("uint8", 51), ("float16", np.float16(0.2))])
def test_inputs_of_other_types_get_their_pixels(tmp_path: Path, dtype: str, value: float) -> None:
    Image.new("RGB", (4, 4), (51, 51, 51)).save(tmp_path / "a.png")
    given = CalibrationSet(tmp_path, None if dtype == "uint8" else "0..1")
    (sample,) = given.samples([TensorSpec("image", (1, 4, 4, 3), dtype)])
    assert sample["image"].dtype.name == dtype
    assert (sample["image"] == value).all()
