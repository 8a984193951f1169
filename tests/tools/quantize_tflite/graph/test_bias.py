"""Corrected biases take back the mean shift of quantized weights, and nothing else changes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from ai_edge_litert.tools import flatbuffer_utils
from numpy.typing import NDArray

from shared.formats.tensors import TensorSpec
from shared.formats.tflite import read_tflite
from shared.runtime.samples import sample_inputs
from tools.quantize_tflite.graph.bias import Layer, _mean_patch, _shift, correct_biases, layers, mean_patches
from tools.quantize_tflite.recipes import Rules, assign, resolve_recipe

Array = NDArray[Any]
KINDS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
SAMPLES = 6


def quantized(path: Path, rules: Rules) -> bytearray:
    from ai_edge_quantizer import quantizer

    job = quantizer.Quantizer(str(path), rules)
    return bytearray(job.quantize(enable_progress_bar=False, enable_progress_report=False).quantized_model)


def open_preserving(content: bytes | bytearray) -> Interpreter:
    with pytest.warns(UserWarning, match="preserve_all_tensors"):
        interpreter = Interpreter(model_content=bytes(content), experimental_preserve_all_tensors=True, num_threads=1)
    interpreter.allocate_tensors()
    return interpreter


def runs(interpreter: Interpreter) -> Iterator[None]:
    """Run seeded samples one by one."""
    (given,) = interpreter.get_input_details()
    spec = TensorSpec("x", tuple(map(int, given["shape"])), "float32")
    for seed in range(SAMPLES):
        interpreter.set_tensor(given["index"], sample_inputs([spec], seed)["x"])
        interpreter.invoke()
        yield


def mean_inputs(content: bytes) -> dict[str, list[tuple[Array, int]]]:
    """Return the sums of the layers' inputs over the samples, and their number."""
    interpreter = open_preserving(content)
    wanted = {layer.input for layer in layers(content)}
    places = {d["name"]: d["index"] for d in interpreter.get_tensor_details() if d["name"] in wanted}
    sums = dict.fromkeys(wanted, np.zeros(()))
    for _ in runs(interpreter):
        sums = {name: sums[name] + interpreter.get_tensor(places[name]).astype(np.float64) for name in wanted}
    return {name: [(total, SAMPLES)] for name, total in sums.items()}


def channel_means(content: bytes | bytearray, name: str) -> Array:
    """Return the mean of each channel of a layer's output, over samples and positions."""
    interpreter = open_preserving(content)
    (index,) = [d["index"] for d in interpreter.get_tensor_details() if d["name"] == name]
    means = []
    for _ in runs(interpreter):
        output = interpreter.get_tensor(index).astype(np.float64)
        means.append(output.reshape(-1, output.shape[-1]).mean(axis=0))
    return np.mean(means, axis=0)


def tensor(name: bytes, shape: tuple[int, ...], buffer: int) -> Any:
    return schema.TensorT(name=name, shape=list(shape), type=schema.TensorType.FLOAT32, buffer=buffer)


def write(tensors: list[Any], ops: list[Any], buffers: list[Array | None], codes: list[int], outputs: list[int]) -> bytes:
    graph = schema.SubGraphT(tensors=tensors, inputs=[0], outputs=outputs, operators=ops, name=b"main")
    kinds = [schema.OperatorCodeT(builtinCode=code, deprecatedBuiltinCode=code, version=1) for code in codes]
    stored = [schema.BufferT(data=None if b is None else b.astype(np.float32).reshape(-1).view(np.uint8)) for b in buffers]
    model = schema.ModelT(version=3, operatorCodes=kinds, subgraphs=[graph], buffers=stored)
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def convolution(
    kind: str,
    weights: Array,
    x_shape: tuple[int, ...],
    y_shape: tuple[int, ...],
    *,
    same: bool = True,
    strides: tuple[int, int] = (1, 1),
    dilations: tuple[int, int] = (1, 1),
) -> bytes:
    """Return a model of one convolution with a bias of zeros."""
    common = {
        "padding": 0 if same else 1,
        "strideH": strides[0],
        "strideW": strides[1],
        "dilationHFactor": dilations[0],
        "dilationWFactor": dilations[1],
    }
    options = (
        schema.Conv2DOptionsT(**common)
        if kind == "CONV_2D"
        else schema.DepthwiseConv2DOptionsT(**common, depthMultiplier=weights.shape[3] // x_shape[3])
    )
    table = getattr(schema.BuiltinOptions, f"{'' if kind == 'CONV_2D' else 'Depthwise'}Conv2DOptions")
    op = schema.OperatorT(opcodeIndex=0, inputs=[0, 1, 2], outputs=[3], builtinOptionsType=table, builtinOptions=options)
    bias = np.zeros(y_shape[-1])
    tensors = [tensor(b"x", x_shape, 0), tensor(b"w", weights.shape, 1), tensor(b"b", bias.shape, 2), tensor(b"y", y_shape, 0)]
    return write(tensors, [op], [None, weights, bias], [getattr(schema.BuiltinOperator, kind)], [3])


def two_matrices(sharing: str) -> bytes:
    """Return two fully connected layers in parallel that share a bias: its 'tensor', its 'buffer', or nothing."""
    rng = np.random.default_rng(5)
    second = 3 if sharing == "tensor" else 6
    tensors = [
        tensor(b"x", (1, 32), 0),
        tensor(b"w1", (48, 32), 1),
        tensor(b"w2", (48, 32), 2),
        tensor(b"b1", (48,), 3),
        tensor(b"y1", (1, 48), 0),
        tensor(b"y2", (1, 48), 0),
        tensor(b"b2", (48,), 3 if sharing == "buffer" else 4),
    ]
    options = {"builtinOptionsType": schema.BuiltinOptions.FullyConnectedOptions}
    ops = [
        schema.OperatorT(opcodeIndex=0, inputs=[0, w, b], outputs=[y], builtinOptions=schema.FullyConnectedOptionsT(), **options)
        for w, b, y in ((1, 3, 4), (2, second, 5))
    ]
    weights = [rng.normal(size=(48, 32)) for _ in range(2)]
    return write(tensors, ops, [None, *weights, np.ones(48), np.ones(48)], [schema.BuiltinOperator.FULLY_CONNECTED], [4, 5])


@pytest.mark.parametrize("recipe", ["int8-weight-only", "weight_only_wi4_afp32"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_shift_of_a_quantized_layer_is_taken_back(float_model: Path, kind: str, recipe: str) -> None:
    content = float_model.read_bytes()
    patches = mean_patches(content, mean_inputs(content))
    assert len(patches) == 21
    names = [op.name for op in read_tflite(float_model).ops if op.op_type == kind]
    for name in (names[0], names[-1]):
        chosen = "int8-weight-only" if kind == "DEPTHWISE_CONV_2D" else recipe  # the quantizer has no depthwise int4
        plain = quantized(float_model, assign({name: chosen}))
        corrected = bytearray(plain)
        assert correct_biases(content, corrected, patches) == 1
        exact = channel_means(content, name)
        before, after = (np.abs(channel_means(model, name) - exact).max() for model in (plain, corrected))
        assert before > 1e-5
        assert after < 0.02 * before


def test_a_model_quantized_whole_answers_better_on_average(float_model: Path) -> None:
    content = float_model.read_bytes()
    plain = quantized(float_model, resolve_recipe("weight_only_wi4_afp32")[1])
    corrected = bytearray(plain)
    assert correct_biases(content, corrected, mean_patches(content, mean_inputs(content))) == 16
    name = read_tflite(float_model).ops[-1].name
    exact = channel_means(content, name)
    before, after = (np.abs(channel_means(model, name) - exact).mean() for model in (plain, corrected))
    assert after < 0.8 * before


def test_only_the_bytes_of_the_quantized_layers_bias_change(float_model: Path) -> None:
    content = float_model.read_bytes()
    op = next(op for op in read_tflite(float_model).ops if op.op_type == "CONV_2D")
    plain = quantized(float_model, assign({op.name: "int8-weight-only"}))
    corrected = bytearray(plain)
    assert correct_biases(content, corrected, mean_patches(content, mean_inputs(content))) == 1
    (layer,) = [layer for layer in layers(plain) if layer.scope == op.scope]
    assert layer.bias is not None
    changed = {place for place, (one, other) in enumerate(zip(plain, corrected, strict=True)) if one != other}
    assert changed
    assert changed <= set(range(*layer.bias))


def test_a_float_model_is_left_alone(float_model: Path) -> None:
    content = float_model.read_bytes()
    same = bytearray(content)
    assert correct_biases(content, same, mean_patches(content, mean_inputs(content))) == 0
    assert same == content


def test_float16_weights_get_their_biases_corrected_too(float_model: Path) -> None:
    content = float_model.read_bytes()
    half = quantized(float_model, resolve_recipe("fp16")[1])
    assert {layer.stored for layer in layers(half)} == {"FLOAT16"}
    assert correct_biases(content, half, mean_patches(content, mean_inputs(content))) == 21


def test_layers_without_a_patch_are_left_alone(float_model: Path) -> None:
    plain = quantized(float_model, resolve_recipe("int8-weight-only")[1])
    corrected = bytearray(plain)
    assert correct_biases(float_model.read_bytes(), corrected, {}) == 0
    assert corrected == plain


@pytest.mark.parametrize(("sharing", "count"), [("nothing", 2), ("tensor", 0), ("buffer", 0)])
def test_layers_that_share_a_bias_are_left_alone(tmp_path: Path, sharing: str, count: int) -> None:
    content = two_matrices(sharing)
    (tmp_path / "m.tflite").write_bytes(content)
    plain = quantized(tmp_path / "m.tflite", resolve_recipe("int8-weight-only")[1])
    corrected = bytearray(plain)
    patches = mean_patches(content, mean_inputs(content))
    assert list(patches) == ["y1;", "y2;"]
    assert correct_biases(content, corrected, patches) == count
    assert (corrected == plain) == (count == 0)


@pytest.mark.parametrize("recipe", ["int8-weight-only", "weight_only_wi4_afp32", "fp16"])
def test_weights_are_read_as_the_runtime_restores_them(float_model: Path, recipe: str) -> None:
    content = quantized(float_model, resolve_recipe(recipe)[1])
    found = list(layers(content))
    assert {layer.stored for layer in found} >= {{"int8-weight-only": "INT8", "fp16": "FLOAT16"}.get(recipe, "INT4")}
    plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES  # XNNPACK keeps what it restores to itself
    interpreter = Interpreter(
        model_content=bytes(content), experimental_preserve_all_tensors=True, experimental_op_resolver_type=plain
    )
    interpreter.allocate_tensors()
    next(runs(interpreter))
    ops = [op for op in interpreter._get_ops_details() if op["op_name"] in KINDS]
    for layer, op in zip(found, ops, strict=True):
        np.testing.assert_array_equal(layer.weights, interpreter.get_tensor(op["inputs"][1]))


def test_int4_weights_of_an_odd_count_are_read_whole(tmp_path: Path) -> None:
    weights = np.random.default_rng(3).normal(size=(3, 3, 3, 5))
    (tmp_path / "m.tflite").write_bytes(convolution("CONV_2D", weights, (1, 8, 8, 5), (1, 8, 8, 3)))
    rules = resolve_recipe("weight_only_wi4_afp32")[1]
    for rule in rules:
        rule["op_config"]["min_weight_elements"] = 0
    (layer,) = layers(quantized(tmp_path / "m.tflite", rules))
    assert layer.stored == "INT4"
    assert np.abs(layer.weights - weights).max() <= np.abs(weights).max() / 7 / 2 * 1.01


def direct_patch(layer: Layer, mean: Array, strides: tuple[int, int], dilations: tuple[int, int], *, same: bool) -> Array:
    """Return what lies under the kernel, averaged place by place over a padded image."""
    kernel = layer.weights.shape[1:3]
    image, counts = mean[0], []
    for axis in range(2):
        size, reach = mean.shape[1 + axis], (kernel[axis] - 1) * dilations[axis] + 1
        count = int(np.ceil(size / strides[axis])) if same else int(np.ceil((size - reach + 1) / strides[axis]))
        total = max((count - 1) * strides[axis] + reach - size, 0) if same else 0
        widths = [(0, 0)] * 3
        widths[axis] = (total // 2, total - total // 2)
        image = np.pad(image, widths)
        counts.append(count)
    windows = [
        image[y * strides[0] :: dilations[0], x * strides[1] :: dilations[1]][: kernel[0], : kernel[1]]
        for y in range(counts[0])
        for x in range(counts[1])
    ]
    assert {window.shape[:2] for window in windows} == {kernel}
    return np.asarray(np.mean(windows, axis=0))


@pytest.mark.parametrize("kind", ["CONV_2D", "DEPTHWISE_CONV_2D"])
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize(
    ("kernel", "size", "strides", "dilations"),
    [
        ((3, 3), (8, 8), (1, 1), (1, 1)),
        ((3, 3), (8, 8), (2, 2), (1, 1)),
        ((4, 4), (9, 7), (2, 2), (1, 1)),
        ((2, 5), (7, 11), (3, 1), (1, 1)),
        ((1, 1), (6, 6), (2, 2), (1, 1)),
        ((2, 2), (8, 8), (4, 4), (1, 1)),
        ((3, 3), (9, 8), (1, 1), (2, 3)),
    ],
)
def test_the_mean_patch_is_what_the_runtime_convolves(
    kind: str,
    same: bool,
    kernel: tuple[int, int],
    size: tuple[int, int],
    strides: tuple[int, int],
    dilations: tuple[int, int],
) -> None:
    rng = np.random.default_rng(1)
    channels, outputs = 3, 6
    weights = rng.normal(size=(outputs, *kernel, channels) if kind == "CONV_2D" else (1, *kernel, outputs))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    counts = [-(-n // s) if same else (n - r) // s + 1 for n, r, s in zip(size, reach, strides, strict=True)]
    content = convolution(
        kind, weights, (1, *size, channels), (1, *counts, outputs), same=same, strides=strides, dilations=dilations
    )
    (layer,) = layers(content)
    mean = rng.random((1, *size, channels), np.float32)
    patch = _mean_patch(layer, mean)
    np.testing.assert_allclose(patch, direct_patch(layer, mean, strides, dilations, same=same), rtol=1e-6)
    interpreter = Interpreter(model_content=content, num_threads=1)
    interpreter.allocate_tensors()
    interpreter.set_tensor(0, mean)
    interpreter.invoke()
    answer = interpreter.get_tensor(3)
    assert answer.shape == (1, *counts, outputs)
    np.testing.assert_allclose(_shift(kind, layer.weights, patch), answer.mean(axis=(0, 1, 2)), rtol=1e-4, atol=1e-5)


def test_the_patch_of_a_matrix_is_the_mean_of_its_rows() -> None:
    layer = Layer("y;", "FULLY_CONNECTED", "x", np.ones((2, 3), np.float32), "FLOAT32", None, None)
    mean = np.arange(12.0).reshape(1, 2, 2, 3)
    np.testing.assert_array_equal(_mean_patch(layer, mean), [4.5, 5.5, 6.5])


def test_a_convolution_in_groups_is_corrected_or_left_alone(tmp_path: Path) -> None:
    weights = np.random.default_rng(2).normal(size=(64, 3, 3, 8))
    content = convolution("CONV_2D", weights, (1, 8, 8, 16), (1, 8, 8, 64))
    (tmp_path / "m.tflite").write_bytes(content)
    plain = quantized(tmp_path / "m.tflite", resolve_recipe("int8-weight-only")[1])
    corrected = bytearray(plain)
    if correct_biases(content, corrected, mean_patches(content, mean_inputs(content))):
        exact = channel_means(content, "y")
        before, after = (np.abs(channel_means(model, "y") - exact).max() for model in (plain, corrected))
        assert after < 0.02 * before
