"""Ranges found before are taken for the same model and samples only."""

from pathlib import Path

import pytest

from shared.calibration.dataset import CalibrationSet
from shared.command.errors import ToolError
from tools.quantize_onnx.range_cache import RangeCache, key_of


def test_what_is_kept_is_found_again_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    RangeCache(path).put("one", {"data": 1})
    RangeCache(path).put("other", {"data": 2})
    assert RangeCache(path).get("one") == {"data": 1}
    assert RangeCache(path).get("third") is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"kind": "notes", "entries": {}}', "\xff"])
def test_a_file_of_another_kind_is_kept(tmp_path: Path, content: str) -> None:
    path = tmp_path / "ranges.json"
    path.write_text(content)
    with pytest.raises(ToolError, match="the range cache holds something else"):
        RangeCache(path)
    assert path.read_text() == content


def test_the_key_tells_models_samples_and_methods_apart(tmp_path: Path) -> None:
    samples = tmp_path / "a.npz"
    samples.write_bytes(b"one")
    models = [tmp_path / "a.tflite", tmp_path / "b.tflite"]
    for number, model in enumerate(models):
        model.write_bytes(bytes([number]))
    given = CalibrationSet(samples)
    keys = {key_of(model, given, method, ["Conv"]) for model in models for method in ("minmax", "entropy")}
    keys.add(key_of(models[0], given, "minmax", ["Gemm"]))
    samples.write_bytes(b"other")
    keys.add(key_of(models[0], given, "minmax", ["Conv"]))
    assert len(keys) == 6
