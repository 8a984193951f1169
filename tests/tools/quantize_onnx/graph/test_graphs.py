"""Graphs of the kinds that people report trouble with keep their answers, whatever they are quantized to."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from tests.support.small_onnx import Array
from tests.tools.quantize_onnx.graph.graphs import GRAPHS, MODES, errors_of, pictures, product_of

LARGEST_ERROR = 0.03  # relative, of an output over all samples


def as_taken(name: str, samples: list[dict[str, Array]]) -> list[dict[str, Array]]:
    return [{"image": sample["image"].astype(np.float16)} for sample in samples] if name == "float16" else samples


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", GRAPHS)
def test_every_output_keeps_its_answers_names_and_types(name: str, mode: str, tmp_path: Path) -> None:
    source = GRAPHS[name](tmp_path / "model.onnx")
    samples = as_taken(name, pictures(8))
    product = product_of(source, tmp_path / "work", mode, samples)
    before, after = (onnxruntime.InferenceSession(str(path)) for path in (source, product))
    assert [(value.name, value.type) for value in before.get_outputs()] == [
        (value.name, value.type) for value in after.get_outputs()
    ]
    assert [value.name for value in before.get_inputs()] == [value.name for value in after.get_inputs()]
    errors = errors_of(source, product, as_taken(name, pictures(4, seed=1)))
    assert max(errors) < LARGEST_ERROR, errors


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "fp16"])
@pytest.mark.parametrize("name", ["matrices of three axes", "computed weights", "functions", "sparse weights", "float16"])
def test_no_large_weight_stays_in_float(name: str, mode: str, tmp_path: Path) -> None:
    source = GRAPHS[name](tmp_path / "model.onnx")
    product = product_of(source, tmp_path / "work", mode, as_taken(name, pictures(4)))
    held = onnx.load(str(product)).graph.initializer
    floats = [tensor.name for tensor in held if tensor.data_type == TensorProto.FLOAT and np.prod(tensor.dims) >= 64]
    assert not floats
