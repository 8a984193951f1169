"""Corrected biases take back what quantized weights shift a layer's outputs by on average."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization.calibrate import save_tensors_data

from tests.support.small_onnx import answer, save, save_vector_model, seeded, weights_of
from tools.quantize_onnx.bias import correct, mean_inputs
from tools.quantize_onnx.command import saturates
from tools.quantize_onnx.graph.repair import repair
from tools.quantize_onnx.graph.rewrite import write_rewritten
from tools.quantize_onnx.options import OnnxRequest, OnnxSettings, Recipe
from tools.quantize_onnx.quantizing import QuantizeTask, quantize
from tools.quantize_onnx.ranges import Feed, find_ranges

SAMPLES = 8
FLOAT, QUANTIZED = "float.onnx", "quantized.onnx"


def uniform(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, np.float32)


class Layer:
    """A layer, samples for it, and what becomes of its outputs on average when its weights are quantized."""

    def __init__(
        self, folder: Path, nodes: list[Any], shape: tuple[int, ...], weights: dict[str, np.ndarray], **changes: Any
    ) -> None:
        self.folder, self.source = folder, save(folder / "m.onnx", nodes, {"x": shape}, {"y": None}, weights, **changes)
        self.samples: list[Feed] = [{"x": uniform(*shape, seed=number)} for number in range(SAMPLES)]
        repair(self.source, folder / FLOAT)

    def quantize(self, recipe: Recipe = "int8-static", *, corrects: bool, excluded: tuple[str, ...] = (), **settings: Any) -> int:
        """Quantize the layer; return how many biases were corrected."""
        model, ranges, means = self.folder / FLOAT, self.folder / "ranges.json", self.folder / "means.npz"
        wanted = OnnxRequest(recipe, OnnxSettings(**settings), float_layers=excluded)
        if wanted.needs_ranges:
            changed, floats = write_rewritten(model, self.folder / "rewritten.onnx")
            model = self.folder / "rewritten.onnx" if changed else model
            wanted = replace(wanted, float_layers=(*excluded, *floats))
            kinds = wanted.settings.op_types
            save_tensors_data(find_ranges(model, self.folder / "a.onnx", kinds, self.samples, "minmax"), str(ranges))
        if corrects:
            found = mean_inputs(self.folder / FLOAT, self.folder / "a.onnx", self.samples)
            arrays: dict[str, Any] = {f"mean_{number}": values for number, values in enumerate(found.values())}
            np.savez(means, names=np.array(json.dumps(list(found))), **arrays)
        task = QuantizeTask(self.source, self.folder / FLOAT, model, wanted, ranges, means if corrects else None)
        return quantize(task, self.folder / QUANTIZED)

    def shift(self, axis: int) -> float:
        """Return how far the means of the output channels, along an axis, have moved on average."""
        moved = [answer(self.folder / QUANTIZED, **feed)[0] - answer(self.source, **feed)[0] for feed in self.samples]
        by_channel = np.moveaxis(np.concatenate(moved), axis, 0)
        return float(np.abs(by_channel.reshape(len(by_channel), -1).mean(axis=1)).mean())


def conv(folder: Path, groups: int = 1) -> Layer:
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], name="layer", group=groups)
    return Layer(folder, [node], (2, 6, 12, 12), {"w": seeded(4, 6 // groups, 3, 3), "b": seeded(4, seed=1)})


def dense(folder: Path, shape: tuple[int, ...] = (32, 8), *, bias_first: bool = False, opset: int = 17) -> Layer:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"], name="layer"),
        helper.make_node("Add", ["b", "p"] if bias_first else ["p", "b"], ["y"], name="plus"),
    ]
    return Layer(folder, nodes, shape, {"w": seeded(8, 4), "b": seeded(4, seed=1)}, opset=opset)


def gemm(folder: Path, weight: tuple[int, int] = (8, 4), shape: tuple[int, int] = (32, 8), **attributes: Any) -> Layer:
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="layer", **attributes)
    outputs = weight[0] if attributes.get("transB") else weight[1]
    return Layer(folder, [node], shape, {"w": seeded(*weight), "b": seeded(outputs, seed=1)})


LAYERS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "conv": (conv, {}, 1),
    "grouped conv": (conv, {"groups": 2}, 1),
    "product": (dense, {}, -1),
    "product of rank 3": (dense, {"shape": (2, 16, 8), "bias_first": True}, -1),
    "product of opset 20": (dense, {"opset": 20}, -1),
    "product of opset 13": (dense, {"opset": 13}, -1),
    "gemm": (gemm, {}, -1),
    "gemm of transposed weights": (gemm, {"weight": (4, 8), "transB": 1}, -1),
    "gemm of square transposed weights": (gemm, {"weight": (8, 8), "transB": 1}, -1),
    "gemm of square weights": (gemm, {"weight": (8, 8)}, -1),
    "gemm of transposed inputs": (gemm, {"shape": (8, 32), "transA": 1}, -1),
}


@pytest.mark.parametrize("recipe", ["int8-static", "int8"])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_mean_shift_of_a_layer_is_taken_back(tmp_path: Path, kind: str, recipe: Recipe) -> None:
    make, options, axis = LAYERS[kind]
    layer = make(tmp_path, **options)
    assert layer.quantize(recipe, corrects=False, reduce_range=saturates()) == 0
    before = layer.shift(axis)
    if recipe == "int8" and options.get("transA"):
        assert before == 0  # the library has no integers for it
        return
    assert layer.quantize(recipe, corrects=True, reduce_range=saturates()) == 1
    assert layer.shift(axis) < 0.2 * before


@pytest.mark.parametrize(
    "changes", [{"per_channel": False}, {"weight_type": "uint8"}, {"symmetric_weights": False}, {"reduce_range": True}]
)
def test_other_forms_of_weights_are_understood(tmp_path: Path, changes: dict[str, Any]) -> None:
    layer = conv(tmp_path)
    settings = {"reduce_range": saturates(), **changes}
    layer.quantize(corrects=False, **settings)
    before = layer.shift(1)
    assert layer.quantize(corrects=True, **settings) == 1
    assert layer.shift(1) < 0.2 * before


def test_a_scaled_product_is_shifted_by_its_scale(tmp_path: Path) -> None:
    layer = gemm(tmp_path, (4, 8), transB=1, alpha=0.5)
    layer.quantize(corrects=False)
    before = layer.shift(-1)
    layer.quantize(corrects=True)
    assert layer.shift(-1) < 0.2 * before


def test_a_bias_that_was_scaled_or_shared_is_corrected_too(tmp_path: Path) -> None:
    assert gemm(tmp_path, beta=0.5).quantize(corrects=True) == 1
    nodes = [
        helper.make_node("Conv", ["x", "v", "b"], ["h"], name="one", pads=[1] * 4),
        helper.make_node("Conv", ["h", "w", "b"], ["y"], name="other"),
    ]
    weights = {"v": seeded(4, 4, 3, 3), "w": seeded(4, 4, 3, 3, seed=1), "b": seeded(4)}
    assert Layer(tmp_path, nodes, (1, 4, 8, 8), weights).quantize(corrects=True) == 2


def test_a_layer_without_a_bias_and_one_left_in_float_stay(tmp_path: Path) -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="layer")
    assert Layer(tmp_path, [node], (1, 4, 8, 8), {"w": seeded(4, 4, 3, 3)}).quantize(corrects=True) == 0
    nodes = [
        helper.make_node("Conv", ["x", "v", "b"], ["h"], name="one"),
        helper.make_node("Conv", ["h", "w", "c"], ["y"], name="other"),
    ]
    weights = {"v": seeded(4, 4, 3, 3), "w": seeded(4, 4, 3, 3, seed=1), "b": seeded(4), "c": seeded(4, seed=2)}
    layer = Layer(tmp_path, nodes, (1, 4, 8, 8), weights)
    assert layer.quantize(corrects=True, excluded=("one",)) == 1
    np.testing.assert_array_equal(weights_of(tmp_path / QUANTIZED)["b"], weights["b"])


def test_static_biases_stay_integers_and_dynamic_ones_floats(tmp_path: Path) -> None:
    layer = conv(tmp_path)
    forms: list[tuple[Recipe, str, type]] = [("int8-static", "b_quantized", np.int32), ("int8", "b", np.float32)]
    for recipe, name, dtype in forms:
        layer.quantize(recipe, corrects=False)
        before = weights_of(tmp_path / QUANTIZED)[name]
        layer.quantize(recipe, corrects=True)
        after = weights_of(tmp_path / QUANTIZED)[name]
        assert (after.dtype, after.shape) == (before.dtype, before.shape) == (dtype, (4,))
        assert (after != before).all()


def test_mean_inputs_are_numpys_over_all_samples(tmp_path: Path) -> None:
    layer = conv(tmp_path, groups=2)
    found = mean_inputs(tmp_path / FLOAT, tmp_path / "a.onnx", layer.samples)
    expected = np.stack([feed["x"] for feed in layer.samples]).mean(axis=(0, 1, 3, 4))
    np.testing.assert_allclose(found["layer"], expected, rtol=1e-5)


def test_mean_inputs_of_inner_layers_are_those_of_their_activations(tmp_path: Path) -> None:
    repair(save_vector_model(tmp_path / "m.onnx"), tmp_path / FLOAT)
    samples = [{"vector": seeded(3, 8, seed=number)} for number in range(4)]
    found = mean_inputs(tmp_path / FLOAT, tmp_path / "a.onnx", samples)
    held = weights_of(tmp_path / FLOAT)
    vectors = np.stack([feed["vector"] for feed in samples])
    np.testing.assert_allclose(found["product"], vectors.mean(axis=(0, 1)), rtol=1e-4, atol=1e-6)
    hidden = np.maximum(vectors @ held["m"] + held["mb"], 0)
    np.testing.assert_allclose(found["gemm"], hidden.mean(axis=(0, 1)), rtol=1e-4, atol=1e-6)


def test_weights_in_a_form_not_known_are_left_alone(tmp_path: Path) -> None:
    """A scale that is not ours puts the weights further off than rounding can."""
    layer = conv(tmp_path)
    layer.quantize(corrects=False)
    product = onnx.load(str(tmp_path / QUANTIZED))
    means = mean_inputs(tmp_path / FLOAT, tmp_path / "a.onnx", layer.samples)
    assert correct(tmp_path / FLOAT, product, means) == 1
    (scale,) = [tensor for tensor in product.graph.initializer if tensor.name == "w_scale"]
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * 3, "w_scale"))
    assert correct(tmp_path / FLOAT, product, means) == 0
