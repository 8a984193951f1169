"""A dry run promises no less than what a product takes."""

from pathlib import Path

import pytest

from shared.command.dry_run import DryRun
from tests.conftest import Miniseal, Small
from tests.support.small_onnx import save_picture_model
from tools.convert_detector import convert_detector
from tools.extract_weights import extract_weights
from tools.prepare_calibration import prepare_calibration
from tools.quantize_onnx import quantize_onnx
from tools.quantize_tflite import quantize_tflite


def promised(tool: object, *arguments: object, **options: object) -> list[int]:
    assert callable(tool)
    with pytest.raises(DryRun) as caught:
        tool(*arguments, **options, dry_run=True)
    assert caught.value.result.ok
    assert all(one.needs.disk_bytes >= one.needs.product_bytes for one in caught.value.result.forecasts)
    return [one.needs.product_bytes for one in caught.value.result.forecasts]


@pytest.mark.parametrize("recipe", ["int8", "int8-weight-only", "fp16", "int4"])
def test_a_quantized_model_is_no_larger_than_promised(miniseal: Miniseal, tmp_path: Path, recipe: str) -> None:
    output = tmp_path / "q.tflite"
    (most,) = promised(quantize_tflite, miniseal.float_model, output=output, recipe=recipe)
    assert not list(tmp_path.iterdir())
    quantize_tflite(miniseal.float_model, output=output, recipe=recipe)
    assert 0.5 * most < output.stat().st_size <= most


def test_extracted_and_converted_weights_are_no_larger_than_promised(videoseal_small: Small, tmp_path: Path) -> None:
    weights, model, quantized = (tmp_path / name for name in ("w.safetensors", "m.tflite", "m_int8.tflite"))
    (most,) = promised(extract_weights, videoseal_small.checkpoint, output=weights)
    extract_weights(videoseal_small.checkpoint, output=weights)
    assert weights.stat().st_size <= most
    made = {"model": str(videoseal_small.card), "checkpoint": weights}
    (most,) = promised(convert_detector, **made, output=model)
    both = promised(convert_detector, **made, output=quantized, quantize="int8")
    assert len(both) == 2
    convert_detector(**made, output=model)  # type: ignore[arg-type]
    assert model.stat().st_size <= most


@pytest.mark.parametrize("recipe", ["int8", "fp16"])
def test_a_quantized_onnx_model_is_no_larger_than_promised(tmp_path: Path, recipe: str) -> None:
    model = save_picture_model(tmp_path / "m.onnx", widths=(64, 64))
    (most,) = promised(quantize_onnx, model, output=tmp_path / "q.onnx", recipe=recipe)
    quantize_onnx(model, output=tmp_path / "q.onnx", recipe=recipe)  # type: ignore[arg-type]
    assert (tmp_path / "q.onnx").stat().st_size <= most


def test_a_calibration_set_is_foreseen_without_a_folder(tmp_path: Path) -> None:
    (most,) = promised(prepare_calibration, output=tmp_path / "deep" / "set", synthetic=8, tile_size=32)
    assert not list(tmp_path.iterdir())
    prepare_calibration(output=tmp_path / "set", synthetic=8, tile_size=32, min_samples=1)
    assert sum(file.stat().st_size for file in (tmp_path / "set").glob("*.png") if file.name[0] in "sh") <= most
