"""A product outside its limits or gates is not written, recipe auto takes the fastest inside them, on samples that are named."""

import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from shared.command.errors import ToolError
from tests.conftest import Run
from tests.support.small_onnx import PICTURE, save_picture_model, save_vector_model, seeded, weights_of
from tests.tools.quantize_onnx.conftest import COUNT, names, only, psnr_of, save_manifest
from tools.quantize_onnx import quantize_onnx
from tools.quantize_onnx.options import Recipe

# Limits and gates.


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        ({"gate": ["min_coverage=0.99"]}, r"min_coverage 0\.\d+, limit 0.99"),
        ({"gate": ["min_speedup=1000"]}, r"min_speedup .*, limit 1000"),
        ({"gate": ["max_latency_ms=0.00001"]}, r"max_latency_ms .*, limit 1e-05"),
        ({"gate": ["max_size_mb=0.001"]}, r"max_size_mb 0\.\d+, limit 0.001"),
        ({"gate": ["max_error:made=1e-7"]}, r"max_error:made \S+, limit 1e-07"),
        ({"gate": ["max_error:nobody=1"]}, r"max_error:nobody not measured, limit 1"),
        ({"min_psnr": 150.0}, r"min_psnr \d+\.?\d*, limit 150"),
        ({"min_psnr": 20.0, "gate": ["min_psnr=150"]}, r"min_psnr \d+\.?\d*, limit 150"),
        ({"min_cosine": 1.0}, r"min_cosine (1|0\.9+\d*), limit 1"),
        ({"max_error": ["1e-7"]}, r"max_error \S+, limit 1e-07"),
        ({"max_error": ["0.5", "made=1e-7"]}, r"^FAILED: max_error:made \S+, limit 1e-07; nothing"),
    ],
)
def test_a_broken_limit_is_reported_and_nothing_is_written(model: Path, limit: dict[str, object], says: str) -> None:
    quantized = quantize_onnx(model, recipe="int8", exclude=["conv0"], **limit)  # type: ignore[arg-type]
    assert (quantized.ok, quantized.product) == (False, None)
    assert re.search(says, quantized.message)
    assert quantized.message.endswith("nothing was written")
    assert names(model.parent) == {"model.onnx"}


def test_a_broken_limit_exits_1_with_the_table_and_writes_nothing(model: Path, run_tool: Run) -> None:
    done = run_tool("quantize_onnx", model, "--recipe", "int8", "--exclude", "conv0", "--gate", "min_coverage=0.99")
    assert (done.returncode, done.stderr) == (1, "")
    assert "FAILED: min_coverage 0." in done.stdout
    assert "conv0" in done.stdout
    assert names(model.parent) == {"model.onnx"}


def test_limits_that_are_kept_are_reported(model: Path, tiles: Path) -> None:
    gates = ["min_coverage=1", "min_speedup=0"]
    quantized = quantize_onnx(model, calibration=tiles, gate=gates, min_psnr=30, min_cosine=0.9, max_error=["0.5"])
    result = only(quantized)
    assert quantized.ok
    assert [gate.name for gate in quantized.result.gates] == ["min_coverage", "min_speedup", "min_psnr", "min_cosine", "max_error"]
    assert result.search is not None
    assert (result.float_layers, result.search.measured) == ([], 2)  # in float, and quantized as a whole


def test_the_product_of_a_search_is_checked_itself(model: Path, tiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search runs candidates on one thread, the product runs on all: outputs may differ, and the limit is the product's."""
    from shared.quantize import pipeline

    compared = pipeline.measure_errors

    def worse(*arguments: object) -> object:
        return [type(error)(error.output, 1.0, 0.98, 1.0, 1.0, 28.0, 28.0) for error in compared(*arguments)]  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "measure_errors", worse)
    quantized = quantize_onnx(model, calibration=tiles, min_psnr=30)
    assert quantized.message == "FAILED: min_psnr 28, limit 30; nothing was written"
    assert names(model.parent) == {"model.onnx", "model_int8-static_search.jsonl"}


def test_psnr_of_what_is_no_image_is_refused(tmp_path: Path, vectors: Path) -> None:
    with pytest.raises(ToolError, match="--min-psnr is for models that make images; use --min-cosine"):
        quantize_onnx(save_vector_model(tmp_path / "m.onnx"), calibration=vectors, min_psnr=30)


# Recipe auto.


def test_auto_takes_the_fastest_inside_the_limits(model: Path, tiles: Path) -> None:
    result = only(quantize_onnx(model, recipe="auto", calibration=tiles, min_psnr=30))
    assert [candidate.label for candidate in result.candidates] == ["float32", "int8", "fp16", "int8-static"]
    times = {one.label: one.measurement.median_ms for one in result.candidates[1:] if one.measurement}
    assert result.product is not None
    assert result.recipe == result.product.label == min(times, key=lambda label: times[label])


def test_auto_takes_none_that_is_outside_the_limits(model: Path) -> None:
    result = only(quantize_onnx(model, recipe="auto", min_psnr=80))
    found = {one.label: one.errors[0].psnr_db for one in result.candidates if one.errors}
    assert {label: psnr_db > 80 for label, psnr_db in found.items() if psnr_db} == {"int8": False, "fp16": True}
    assert "needs a calibration set" in result.candidates[-1].problem
    assert result.recipe == "fp16"


def test_auto_takes_another_recipe_where_no_static_model_keeps_the_limit(tmp_path: Path, tiles: Path) -> None:
    model = save_picture_model(tmp_path / "model.onnx", widths=[32])
    assert only(quantize_onnx(model, recipe="auto", calibration=tiles, min_psnr=85)).recipe == "fp16"


def test_auto_is_an_error_where_nothing_keeps_the_limits(model: Path) -> None:
    says = r"no recipe keeps the limits; got int8: made: .*PSNR .*fp16: made: .*PSNR .*give --calibration"
    with pytest.raises(ToolError, match=says):
        quantize_onnx(model, recipe="auto", min_psnr=150)
    assert names(model.parent) == {"model.onnx"}


# Samples.


def test_what_a_manifest_holds_out_is_what_is_measured_on(model: Path, tmp_path: Path) -> None:
    """Dark pictures are calibrated with, so bright ones come out clipped."""
    held = save_manifest(tmp_path / "held")
    quantized = quantize_onnx(model, calibration=held, input_range="0..1")
    result = only(quantized)
    assert (result.samples, result.measured_on) == (4, "2 samples that were not calibrated with")
    shutil.rmtree(held)
    plain = quantize_onnx(
        model,
        output=tmp_path / "plain.onnx",
        calibration=save_manifest(held, holds_out=False),
        input_range="0..1",
    )
    assert (only(plain).samples, only(plain).measured_on) == (4, "4 samples that were calibrated with, too")
    assert psnr_of(quantized) < psnr_of(plain) - 10


def test_a_held_out_picture_that_changed_makes_the_product_out_of_date(model: Path, tmp_path: Path) -> None:
    held = save_manifest(tmp_path / "held")
    quantize_onnx(model, calibration=held, input_range="0..1", min_cosine=0.1)
    Image.new("RGB", (16, 16), (255, 0, 0)).save(held / "bright1.png")
    with pytest.raises(ToolError, match="out of date"):
        quantize_onnx(model, calibration=held, input_range="0..1", min_cosine=0.1)


def test_a_holdout_of_its_own_is_measured_on(model: Path, tmp_path: Path, tiles: Path) -> None:
    folder = save_manifest(tmp_path / "held", holds_out=False)
    result = only(quantize_onnx(model, calibration=tiles, holdout=folder, input_range="0..1"))
    assert (result.samples, result.measured_on) == (COUNT, "4 samples that were not calibrated with")


def test_without_samples_seeded_ones_are_measured_on_and_that_is_reported(model: Path) -> None:
    assert only(quantize_onnx(model, recipe="fp16")).measured_on == "8 seeded samples"


def test_a_range_that_was_assumed_is_reported(model: Path, tmp_path: Path) -> None:
    folder = save_manifest(tmp_path / "held")
    assert "pixels taken as 0..1, say --input-range" in only(quantize_onnx(model, calibration=folder)).measured_on


def test_pixels_become_the_range_that_the_model_takes(model: Path, tmp_path: Path) -> None:
    folder = save_manifest(tmp_path / "held", holds_out=False)
    spans = []
    for chosen in ("0..1", "0..255"):
        output = tmp_path / f"{chosen}.onnx"
        quantize_onnx(model, output=output, calibration=folder, input_range=chosen)  # type: ignore[arg-type]
        spans.append(float(weights_of(output)["image_scale"]))
    assert spans[1] == pytest.approx(255 * spans[0], rel=1e-3)


def test_samples_of_another_range_are_refused(model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "wide.npz", image=np.linspace(0, 255, 2 * 768, dtype=np.float32).reshape(2, *PICTURE[1:]))
    with pytest.raises(ToolError, match="of another range than the model's input"):
        quantize_onnx(model, calibration=tmp_path / "wide.npz", input_range="0..1")


def test_vectors_of_any_range_are_samples(tmp_path: Path) -> None:
    """Only pictures have a range that is known beforehand."""
    np.savez(tmp_path / "set.npz", vector=seeded(COUNT, 1, 8) * 5)
    assert only(quantize_onnx(save_vector_model(tmp_path / "m.onnx"), calibration=tmp_path / "set.npz")).samples == COUNT


def test_a_model_that_makes_nan_of_the_samples_is_an_error(tmp_path: Path, tiles: Path) -> None:
    model = onnx.load(str(save_picture_model(tmp_path / "m.onnx")))
    model.graph.node[1].op_type = "Log"
    model.graph.node[1].name = "logarithm"
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ToolError, match="made: an output holds NaN or infinite values"):
        quantize_onnx(tmp_path / "m.onnx", calibration=tiles)


@pytest.mark.parametrize("recipe", ["int8-static", "int8"])
def test_a_product_of_no_use_is_written_only_where_the_user_allows_it(recipe: Recipe, tmp_path: Path) -> None:
    """One scale for a whole weight, which one huge value for an input that is always zero makes coarse."""
    path = save_vector_model(tmp_path / "bad.onnx")
    model = onnx.load(str(path))
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor).copy()
        if tensor.name == "m":
            values[0, 0] = 1e5
        if tensor.name in ("mb", "gb"):
            values *= 0
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save_model(model, str(path))
    vectors = np.random.default_rng(0).random((COUNT, 1, 8), np.float32)
    vectors[..., 0] = 0
    np.savez(tmp_path / "set.npz", vector=vectors)
    given = {"recipe": recipe, "calibration": tmp_path / "set.npz", "set_options": ["per_channel=no"], "correct_bias": False}
    ruined = quantize_onnx(path, output=tmp_path / "q.onnx", **given)  # type: ignore[arg-type]
    assert (ruined.ok, ruined.product) == (False, None)
    assert ruined.message.startswith("FAILED: min_cosine:out 0, limit 0.95; nothing was written")
    assert any("LARGE ERROR" in str(line) and "--exclude for product" in str(line) for line in ruined.result.tables())
    assert not (tmp_path / "q.onnx").exists()
    allowed = quantize_onnx(path, output=tmp_path / "q.onnx", allow_large_error=True, **given)  # type: ignore[arg-type]
    assert allowed.ok and (tmp_path / "q.onnx").exists()
    assert any("LARGE ERROR" in str(line) for line in allowed.result.tables())
