"""The first ops of a model tell the range of its image, and how many rows the table has that its integers choose from."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from shared.formats.input_hints import GraphInput, find_hints
from shared.formats.model_file import ModelFile
from shared.formats.tensors import TensorSpec
from shared.runtime.model import open_model
from shared.runtime.samples import Guess, guess_inputs, sample_inputs
from tools.compare import compare
from tools.quantize_onnx import quantize_onnx
from tools.quantize_tflite import quantize_tflite
from tools.verify import verify

UNITS, SIGNED, BYTES = (0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)
MEAN, SPREAD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
ROWS = 7


def write_network(path: Path, first: list[tuple[str, Any]], name: str = "image") -> Path:
    """Write a convolution after ops with constants; a constant is a number, one per channel, or those of a normalization."""
    constants, nodes, read = [], [], name
    for number, (kind, values) in enumerate(first):
        arrays = values if isinstance(values, list) else [np.asarray(values, np.float32)]
        if kind in ("Sub", "Add", "Mul", "Div"):
            arrays = [array.reshape(1, -1, 1, 1) for array in arrays]
        names = [f"c{number}_{k}" for k in range(len(arrays))]
        constants += [numpy_helper.from_array(array.astype(np.float32), key) for key, array in zip(names, arrays, strict=True)]
        nodes.append(helper.make_node(kind, [read, *names], [f"y{number}"]))
        read = f"y{number}"
    weights = np.random.default_rng(0).standard_normal((8, 3, 3, 3)).astype(np.float32)
    constants.append(numpy_helper.from_array(weights, "w"))
    nodes.append(helper.make_node("Conv", [read, "w"], ["out"]))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 16, 16])]
    graph = helper.make_graph(nodes, "g", ends, [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ([], None),
        ([("Mul", 1 / 255)], BYTES),
        ([("Div", 255.0)], BYTES),
        ([("Mul", 1 / 127.5), ("Sub", 1.0)], BYTES),
        ([("Sub", 255 * MEAN)], BYTES),
        ([("Sub", 255 * MEAN), ("Div", 255 * SPREAD)], BYTES),
        ([("Sub", MEAN), ("Div", SPREAD)], UNITS),
        ([("Mul", 2.0), ("Sub", 1.0)], UNITS),
        ([("Mul", 255.0)], UNITS),
        ([("Add", 1.0), ("Mul", 0.5)], SIGNED),
        ([("Transpose", []), ("Transpose", []), ("Div", 255.0)], BYTES),
        ([("BatchNormalization", [np.ones(3), np.zeros(3), 255 * MEAN, (255 * SPREAD) ** 2])], BYTES),
        ([("BatchNormalization", [np.ones(3), np.zeros(3), MEAN, SPREAD**2])], UNITS),
        ([("Add", 0.001)], None),
        ([("Add", 1.0), ("Log", [])], None),
        ([("Mul", 0.04)], None),
    ],
)
def test_the_first_ops_tell_what_pixels_are(
    tmp_path: Path, first: list[tuple[str, Any]], expected: tuple[float, float] | None
) -> None:
    assert ModelFile(write_network(tmp_path / "m.onnx", first)).hints.pixel_range == expected


def test_other_inputs_say_nothing_of_the_image(tmp_path: Path) -> None:
    model = onnx.load(write_network(tmp_path / "m.onnx", []))
    model.graph.input.append(helper.make_tensor_value_info("sigma", TensorProto.FLOAT, [1]))
    model.graph.initializer.append(numpy_helper.from_array(np.array([0.001], np.float32), "thousandth"))
    model.graph.node.append(helper.make_node("Mul", ["sigma", "thousandth"], ["noise"]))
    model.graph.output.append(helper.make_tensor_value_info("noise", TensorProto.FLOAT, [1]))
    onnx.save(model, tmp_path / "two.onnx")
    assert ModelFile(tmp_path / "two.onnx").hints.pixel_range is None


@pytest.mark.parametrize(
    ("rows", "shift", "axis", "dtype", "expected"),
    [
        (50, 0, 0, "int64", 49),
        (50, 2, 0, "int64", 47),
        (50, 0, 1, "int64", 2),
        (1000, 0, 0, "uint8", 999),
        (0, 0, 0, "int64", None),
    ],
)
def test_the_largest_integer_chooses_the_last_row(
    tmp_path: Path, rows: int, shift: int, axis: int, dtype: str, expected: int | None
) -> None:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    constants = [
        numpy_helper.from_array(np.ones((rows, 3), np.float32), "table"),
        numpy_helper.from_array(np.array(shift), "shift"),
    ]
    nodes = [
        helper.make_node("Cast", ["ids"], ["wide"], to=TensorProto.INT64),
        helper.make_node("Add", ["wide", "shift"], ["places"]),
        helper.make_node("Gather", ["table", "places"], ["y"], axis=axis),
    ]
    ends = [helper.make_tensor_value_info("ids", kind, [8]), helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "m.onnx")
    model = ModelFile(tmp_path / "m.onnx")
    assert model.hints.largest.get("ids") == expected
    if expected is not None:
        with open_model(model) as opened:
            guess = guess_inputs(model, opened.inputs, 1, Guess.of_hints(model.hints))
            opened.run(sample_inputs(opened.inputs, 0, guess))


def test_images_from_0_to_1_of_bytes_are_compared_in_their_own_range(tmp_path: Path) -> None:
    """A network that divides bytes by 255 and makes images from 0 to 1: an error of a fifth is 20 dB, not 68."""
    model = write_network(tmp_path / "m.onnx", [("Div", 255.0)])
    for factor in (1.0, 0.8):
        proto = onnx.load(model)
        (weight,) = [tensor for tensor in proto.graph.initializer if tensor.name == "w"]
        values = factor * np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1)
        weight.CopyFrom(numpy_helper.from_array(values.astype(np.float32), "w"))
        onnx.save(proto, tmp_path / f"{factor}.onnx")
    (found,) = compare(tmp_path / "1.0.onnx", [tmp_path / "0.8.onnx"]).findings.candidates
    assert found.images is not None
    assert 10 < found.images.psnr_db < 30


@pytest.mark.parametrize(
    ("name", "expected"),
    [("image", None), ("normalized_input_image_tensor", SIGNED), ("image_0_255", BYTES), ("input_0to255", BYTES)],
)
def test_the_name_of_an_input_tells_what_pixels_are(tmp_path: Path, name: str, expected: tuple[float, float] | None) -> None:
    assert ModelFile(write_network(tmp_path / "m.onnx", [], name)).hints.pixel_range == expected


def test_integers_called_a_mask_are_0_or_1() -> None:
    inputs = [GraphInput(name, name, is_image=False) for name in ("attention_mask", "ids")]
    hints = find_hints(inputs, [], {}, lambda _: None)
    assert hints.largest == {"attention_mask": 1}
    values = sample_inputs([TensorSpec("attention_mask", (1, 64), "int64")], 0, Guess.of_hints(hints))["attention_mask"]
    assert (values.min(), values.max()) == (0, 1)


def test_made_up_pictures_are_in_the_range_that_the_model_tells(tmp_path: Path) -> None:
    model = write_network(tmp_path / "m.onnx", [("Div", 255.0)])
    (done,) = quantize_onnx(model, recipe="int8", output=tmp_path / "q.onnx").result.models
    guess = Guess.of_hints(ModelFile(model).hints)
    with open_model(ModelFile(model)) as opened:
        picture = sample_inputs(opened.inputs, 0, guess)["image"]
        assert 100 < picture.max() <= 255
        largest, _ = opened.run({"image": picture})
    assert done.candidates[0].measurement is not None
    # The answers that were compared are those on pixels up to 255: the largest difference is no hundredth of them.
    (error,) = done.candidates[-1].errors
    assert error.max_abs_error is not None
    assert error.max_abs_error > np.abs(largest["out"]).max() / 1000


class Table(torch.nn.Module):
    """Rows of a table chosen by integers, as networks for text begin."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.layer = torch.nn.Embedding(ROWS, 32), torch.nn.Linear(32, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layer(self.table(ids))  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=["onnx", "tflite"])
def looking_up(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import litert_torch

    path = tmp_path_factory.mktemp("table") / f"table.{request.param}"
    ids = (torch.zeros(1, 64, dtype=torch.int64),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch of itself
        if request.param == "onnx":
            torch.onnx.export(Table().eval(), ids, str(path), dynamo=False)
        else:
            litert_torch.convert(Table().eval(), ids).export(str(path))
    return path


def test_integers_stay_inside_the_table_and_reach_all_of_it(looking_up: Path) -> None:
    model = ModelFile(looking_up)
    with open_model(model) as opened:
        guess = guess_inputs(model, opened.inputs, 1, Guess.of_hints(model.hints))
        ids = np.concatenate([next(iter(sample_inputs(opened.inputs, seed, guess).values())) for seed in range(4)])
    assert (ids.min(), ids.max()) == (0, ROWS - 1)


def test_a_model_of_tokens_goes_through_every_tool(looking_up: Path, tmp_path: Path) -> None:
    output = tmp_path / f"q{looking_up.suffix}"
    quantize = quantize_onnx if looking_up.suffix == ".onnx" else quantize_tflite
    assert quantize(looking_up, recipe="int8", output=output).ok
    assert verify(output).ok
    assert compare(looking_up, [output], gate=["min_cosine=0.99"]).ok
