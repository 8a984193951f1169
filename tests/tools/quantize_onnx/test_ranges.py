"""Ranges of activations are numpy's, for any order of samples and any memory; ranges in a cache hold for one model and set."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from shared.calibration.dataset import CalibrationSet
from shared.command.errors import ToolError
from shared.formats.model_file import ModelFile
from tests.support.small_onnx import Array, answer, save, save_picture_model, save_vector_model, seeded, with_external_weights
from tools.quantize_onnx import ranges as module
from tools.quantize_onnx.options import LAYERS, PASSING
from tools.quantize_onnx.ranges import Feed, RangeCache, activations, cache_key, find_ranges

KINDS = (*LAYERS, *PASSING)
NAMES = ["image", "c0", "r0", "c1", "r1", "made"]
METHODS: tuple[module.CalibrationMethod, ...] = ("minmax", "entropy", "percentile")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small model whose inner tensors have known shapes, as after a repair."""
    path = save_picture_model(tmp_path / "m.onnx")
    onnx.save(onnx.shape_inference.infer_shapes(onnx.load(str(path))), str(path))
    return path


@pytest.fixture
def samples() -> list[Feed]:
    return [{"image": seeded(1, 3, 16, 16, seed=number)} for number in range(5)]


def ranges(
    model: Path, samples: Sequence[Feed], method: module.CalibrationMethod = "minmax", op_types: Sequence[str] = KINDS
) -> dict[str, tuple[float, float]]:
    found = find_ranges(model, model.with_name("augmented.onnx"), op_types, samples, method)
    return {name: tuple(float(value) for value in data.range_value) for name, data in found.data.items()}


def values_of(model: Path, samples: Sequence[Feed], name: str) -> Array:
    """Return all values that a tensor takes, from a copy of the model in which it is an output."""
    content = onnx.load(str(model))
    content.graph.output.insert(0, helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    path = model.with_name("showing.onnx")
    onnx.save(content, str(path))
    return np.stack([answer(path, **feed)[0] for feed in samples])


def test_activations_are_inputs_and_outputs_of_the_ops_that_count(model: Path) -> None:
    assert activations(model, KINDS) == NAMES
    assert activations(model, ["Relu"]) == ["c0", "r0", "c1", "r1"]
    assert activations(model, ["LSTM"]) == []


def test_integers_and_weights_are_no_activations(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["vector"], ["shape"]),
        helper.make_node("Reshape", ["vector", "shape"], ["same"]),
        helper.make_node("Add", ["same", "weight"], ["out"]),
    ]
    noted: dict[str, Any] = {"same": (1, 8)}
    path = save(tmp_path / "m.onnx", nodes, {"vector": (1, 8)}, {"out": (1, 8)}, {"weight": seeded(8)}, noted=noted)
    assert activations(path, ["Reshape", "Add"]) == ["vector", "same", "out"]


def test_minmax_is_numpys(model: Path, samples: list[Feed]) -> None:
    found = ranges(model, samples)
    assert list(found) == NAMES
    for name in NAMES[1:-1]:
        expected = values_of(model, samples, name)
        np.testing.assert_allclose(found[name], (expected.min(), expected.max()), rtol=1e-5, atol=1e-6)
    pixels = np.stack([feed["image"] for feed in samples])
    assert found["image"] == (pixels.min(), pixels.max())


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_samples_does_not_matter(model: Path, samples: list[Feed], method: module.CalibrationMethod) -> None:
    samples[3]["image"] *= 7  # what comes late is wider than what came before
    assert ranges(model, samples, method) == ranges(model, samples[::-1], method)


@pytest.mark.parametrize("method", METHODS)
def test_ranges_are_the_same_in_parts_of_one_tensor(
    model: Path, samples: list[Feed], monkeypatch: pytest.MonkeyPatch, method: module.CalibrationMethod
) -> None:
    whole = ranges(model, samples, method)
    monkeypatch.setattr(module, "FETCHED_BYTES", 1)
    monkeypatch.setattr(module, "PROBED", 1)
    assert ranges(model, samples, method) == whole


def test_no_more_is_fetched_at_a_time_than_the_bound(model: Path, samples: list[Feed], monkeypatch: pytest.MonkeyPatch) -> None:
    large = 16 * 16 * 16 * 4  # bytes of each inner tensor
    monkeypatch.setattr(module, "FETCHED_BYTES", 2 * large)
    monkeypatch.setattr(module, "PROBED", 2)
    session = module._giving_out(model, model.with_name("augmented.onnx"), NAMES)
    parts = list(module._activations(session, NAMES, samples))
    assert max(sum(values.nbytes for values in part.values()) for part in parts) <= 2 * large
    assert sum(len(part) for part in parts) == len(NAMES) * len(samples)


def test_parts_are_as_large_as_the_bound_allows_and_hold_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FETCHED_BYTES", 10)
    sizes = {"a": 4, "b": 6, "c": 1, "d": 50, "e": 1}
    assert module._parts(list(sizes), sizes) == [["a", "b"], ["c"], ["d"], ["e"]]


def test_percentile_cuts_an_outlier_off_and_minmax_does_not(model: Path, samples: list[Feed]) -> None:
    samples = [{"image": np.tile(feed["image"], (80, 1, 1, 1))} for feed in samples]
    path = save_picture_model(model, shape=("n", 3, 16, 16))
    onnx.save(onnx.shape_inference.infer_shapes(onnx.load(str(path))), str(path))
    samples[2]["image"][0, 0, 0, 0] = 1000
    pixels = np.stack([feed["image"] for feed in samples])
    assert pixels.size > 2e5  # one of them is less than what the percentile leaves on either side
    assert ranges(path, samples)["image"][1] == 1000
    assert ranges(path, samples, "percentile")["image"][1] < 10
    assert ranges(path, samples, "percentile")["image"][0] == pytest.approx(pixels.min(), abs=1)


def test_the_fast_histogram_is_numpys() -> None:
    values = seeded(100_000)
    threshold = np.float32(np.abs(values).max())
    edges = np.linspace(-threshold, threshold, 65, dtype=np.float32)
    counts = np.zeros(64, np.int64)
    module._count((counts, edges, values.min(), values.max(), threshold), values)
    expected, _ = np.histogram(values, 64, (-threshold, threshold))
    assert counts.sum() == values.size
    assert np.abs(counts - expected).max() <= 2  # values on an edge may fall to either side


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_that_never_changes_has_a_range(tmp_path: Path, method: module.CalibrationMethod) -> None:
    path = save(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])], {"x": (1, 8)}, {"y": (1, 8)})
    low, high = ranges(path, [{"x": np.full((1, 8), -1, np.float32)}] * 2, method)["y"]
    assert np.isfinite([low, high]).all()
    assert low <= 0 <= high


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_activation_that_is_not_finite_has_no_range(tmp_path: Path, value: float, method: module.CalibrationMethod) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Mul", ["r", "by"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, {"x": (1, 8)}, {"y": (1, 8)}, {"by": np.float32(value)}, noted={"r": (1, 8)})
    assert ranges(path, [{"x": np.ones((1, 8), np.float32)}] * 2, method, op_types=["Relu", "Mul"]).keys() == {"x", "r"}


def test_no_samples_are_an_error(model: Path) -> None:
    with pytest.raises(ToolError, match="the calibration set is empty"):
        ranges(model, [])


def test_weights_beside_the_model_and_newer_opsets_are_read(tmp_path: Path) -> None:
    path = with_external_weights(save_vector_model(tmp_path / "m.onnx", opset=20))
    onnx.save(onnx.shape_inference.infer_shapes(onnx.load(str(path), load_external_data=False)), str(path))
    vectors = [{"vector": seeded(2, 8, seed=number)} for number in range(3)]
    outputs = np.stack([answer(path, **feed)[0] for feed in vectors])
    np.testing.assert_allclose(ranges(path, vectors)["out"], (outputs.min(), outputs.max()), rtol=1e-5)


def test_what_is_kept_is_found_again_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    RangeCache(path).put("one", {"data": 1})
    RangeCache(path).put("other", {"data": 2})
    assert RangeCache(path).get("one") == {"data": 1}
    assert RangeCache(path).get("third") is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"kind": "notes", "entries": {}}', "\xff"])
def test_a_file_of_another_kind_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "ranges.json"
    path.write_text(content)
    with pytest.raises(ToolError, match="the range cache holds something else"):
        RangeCache(path)
    assert path.read_text() == content


def test_the_key_depends_on_model_samples_method_and_op_types(tmp_path: Path) -> None:
    samples = tmp_path / "a.npz"
    samples.write_bytes(b"one")
    models = [ModelFile(save_picture_model(tmp_path / f"{width}.onnx", widths=[width])) for width in (4, 8)]
    given = CalibrationSet(samples)
    keys = {cache_key(model, given, method, ["Conv"]) for model in models for method in ("minmax", "entropy")}
    keys.add(cache_key(models[0], given, "minmax", ["Gemm"]))
    samples.write_bytes(b"other")
    keys.add(cache_key(models[0], given, "minmax", ["Conv"]))
    assert len(keys) == 6
