"""The samples of a quantization fit the model, their range is settled, and a note says where outputs are measured."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shared.calibration.dataset import CalibrationSet
from shared.calibration.samples import HeldSamples, KnownRange, Samples, settle_samples
from shared.command.errors import ToolError
from shared.formats.input_hints import InputHints
from shared.formats.tensors import TensorSpec
from shared.runtime.benchmark import LARGE_BYTES
from shared.runtime.samples import Guess, sample_inputs

PICTURE = [TensorSpec("image", (1, 3, 8, 8), "float32")]
LOGITS = [TensorSpec("logits", (1, 33), "float32")]


def settle(inputs: list[TensorSpec] = PICTURE, outputs: list[TensorSpec] = PICTURE, **changes: Any) -> Samples:
    given: dict[str, Any] = {
        "size_bytes": 1000,
        "where": Path("model.onnx"),
        "calibration": None,
        "holdout": None,
    }
    names = {"input_range": "given", "declared": "declared", "assumed": "assumed", "hints": "hints"}
    known = KnownRange(**{names[name]: value for name, value in changes.items() if name in names})
    rest = {name: value for name, value in changes.items() if name not in names}
    return settle_samples(inputs, outputs, known=known, **given | rest)


def pictures(folder: Path, count: int = 20, *, held_out: int = 0) -> CalibrationSet:
    """Write pictures of all greys, with a manifest where some are held out."""
    folder.mkdir()
    for number in range(count):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{number:02}.png")
    names = [{"file": f"{number:02}.png"} for number in range(count)]
    if held_out:
        content = {"samples": names[held_out:], "holdout": names[:held_out]}
        (folder / "manifest.json").write_text(json.dumps(content))
    return CalibrationSet(folder)


def arrays(path: Path, low: float, high: float, count: int = 4) -> CalibrationSet:
    values = np.linspace(low, high, 3 * 8 * 8, dtype=np.float32).reshape(1, 3, 8, 8)
    np.savez(path, image=np.repeat(values, count, axis=0))
    return CalibrationSet(path)


def test_without_real_inputs_outputs_are_measured_on_seeded_samples() -> None:
    found = settle(declared=(-1.0, 1.0))
    assert (found.calibration, found.count, found.note, found.peaks) == (None, 0, "8 seeded samples", [2.0])
    assert found.held == HeldSamples(None, 8, Guess(pixel_range=(-1.0, 1.0)))
    (first, *rest) = found.held.load(PICTURE)
    np.testing.assert_array_equal(first["image"], sample_inputs(PICTURE, 0, Guess(pixel_range=(-1.0, 1.0)))["image"])
    assert len(rest) == 7
    assert settle(size_bytes=LARGE_BYTES + 1).held.count == 2


def test_held_out_samples_are_measured_on_and_not_calibrated_with(tmp_path: Path) -> None:
    found = settle(calibration=pictures(tmp_path / "set", held_out=5), declared=(0.0, 1.0))
    assert found.calibration is not None
    assert (found.count, found.calibration.part, found.calibration.input_range) == (15, "samples", "0..1")
    assert (found.held.count, found.note) == (5, "5 samples that were not calibrated with")
    assert found.held.dataset is not None
    assert [path.name for path in found.held.dataset.images()] == [f"{number:02}.png" for number in range(5)]
    assert len(found.held.load(PICTURE)) == 5


def test_samples_that_are_calibrated_with_are_named_so_and_no_more_than_sixteen(tmp_path: Path) -> None:
    calibration = pictures(tmp_path / "set")
    found = settle(calibration=calibration, input_range="0..255")
    assert (found.count, found.held.count) == (20, 16)
    assert found.note == "16 samples that were calibrated with, too"
    assert (found.held.guess.pixel_range, found.peaks) == ((0.0, 255.0), [255.0])
    assert settle(calibration=calibration, input_range="0..255", size_bytes=LARGE_BYTES + 1).held.count == 3
    few = CalibrationSet(calibration.path, most=2)
    assert (settle(calibration=few, input_range="0..1").count, settle(calibration=few, input_range="0..1").held.count) == (2, 2)


def test_samples_of_ones_own_to_measure_on_come_first(tmp_path: Path) -> None:
    calibration, holdout = pictures(tmp_path / "set", held_out=5), pictures(tmp_path / "other", 3)
    found = settle(calibration=calibration, holdout=holdout, input_range="0..1")
    assert (found.count, found.note) == (15, "3 samples that were not calibrated with")
    same = settle(calibration=CalibrationSet(tmp_path / "other"), holdout=holdout, input_range="0..1")
    assert same.note == "3 samples that were calibrated with, too"
    alone = settle(holdout=CalibrationSet(tmp_path / "set"), input_range="0..1")
    assert (alone.calibration, alone.note) == (None, "5 samples that were not calibrated with")


def test_images_need_a_range_and_one_that_is_assumed_is_noted(tmp_path: Path) -> None:
    calibration = pictures(tmp_path / "set", 3)
    with pytest.raises(ToolError, match="the model does not tell the range of its input"):
        settle(calibration=calibration)
    with pytest.raises(ToolError, match="--input-range differs from the model's own metadata"):
        settle(calibration=calibration, input_range="0..255", declared=(0.0, 1.0))
    found = settle(calibration=calibration, assumed="0..1")
    assert found.note.endswith("; pixels taken as 0..1, say --input-range if the model wants another range")
    assert "pixels taken" not in settle(calibration=calibration, assumed="0..1", declared=(0.0, 1.0)).note


def test_a_range_that_nobody_says_leaves_the_peak_to_the_outputs(tmp_path: Path) -> None:
    found = settle(calibration=arrays(tmp_path / "set.npz", 0, 1), assumed="0..1")
    assert (found.peaks, "pixels taken" in found.note) == ([0.0], False)
    hinted = settle(calibration=pictures(tmp_path / "set"), assumed="0..1", hints=InputHints((0.0, 255.0)))
    assert hinted.peaks == [0.0]  # what divides bytes by 255 may well make images from 0 to 1
    assert settle(calibration=arrays(tmp_path / "set.npz", 0, 1), input_range="0..1").peaks == [1.0]


@pytest.mark.parametrize(("outputs", "peaks"), [(LOGITS, [None]), ([*PICTURE, *LOGITS], [1.0, None]), ([], [])])
def test_only_images_made_of_images_have_a_psnr(outputs: list[TensorSpec], peaks: list[float | None]) -> None:
    assert settle(outputs=outputs, declared=(0.0, 1.0)).peaks == peaks
    vector = [TensorSpec("vector", (1, 8), "float32")]
    assert settle(vector, outputs, declared=(0.0, 1.0)).peaks == [None] * len(outputs)


def test_samples_that_do_not_fit_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="of another range than the model's input"):
        settle(calibration=arrays(tmp_path / "set.npz", 0, 255), declared=(0.0, 1.0))


def test_the_hash_of_held_samples_changes_with_whatever_decides_them(tmp_path: Path) -> None:
    seeded = [HeldSamples(None, 8), HeldSamples(None, 2), HeldSamples(None, 8, Guess(pixel_range=(-1.0, 1.0)))]
    real = [HeldSamples(pictures(tmp_path / name, count), 16) for name, count in (("a", 3), ("b", 4))]
    assert len({held.sha256() for held in (*seeded, *real)}) == 5


def test_what_the_first_ops_tell_comes_before_an_assumption(tmp_path: Path) -> None:
    given = pictures(tmp_path / "set")
    assert settle(calibration=given, assumed="0..1").calibration.input_range == "0..1"  # type: ignore[union-attr]
    found = settle(calibration=given, assumed="0..1", hints=InputHints((0.0, 255.0)))
    assert found.calibration is not None
    assert found.calibration.input_range == "0..255"
    assert "pixels taken as 0..255" in found.note
