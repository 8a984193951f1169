"""Each op's fate is told, and for what stayed as it was there is a reason."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from shared.formats.onnx_file import read_model
from shared.formats.onnx_graph import read_ops
from tests.support.small_onnx import Array, save_vector_model, seeded
from tools.quantize_onnx.coverage import measure_coverage
from tools.quantize_onnx.settings import Settings

GEMM, PRODUCT, PLUS = 4 * 16 * 4, 8 * 16 * 4, 16 * 4  # bytes of weights


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_vector_model(tmp_path / "m.onnx")


def product(source: Path, **weights: Array | None) -> Any:
    """Return a product in which weights are replaced, or gone."""
    model = onnx.load(str(source))
    kept = [tensor for tensor in model.graph.initializer if weights.get(tensor.name, tensor) is not None]
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensor for tensor in kept if tensor.name not in weights)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items() if value is not None)
    return model


def quantized(name: str, *shape: int) -> dict[str, Array | None]:
    return {name: None, f"{name}_quantized": np.ones(shape, np.int8)}


def test_weights_in_8_bits_count_as_quantized_and_largest_come_first(source: Path) -> None:
    made = product(source, **quantized("m", 8, 16), **quantized("g", 4, 16))
    rows, left = measure_coverage(read_ops(read_model(source)), made, Settings("static"), {})
    assert [(row.op_type, row.quantized, row.weight_bytes, row.bytes_after, row.dtypes) for row in rows] == [
        ("MatMul", 1, PRODUCT, PRODUCT // 4, ["INT8"]),
        ("Gemm", 1, GEMM, GEMM // 4, ["INT8"]),
        ("Add", 0, PLUS, PLUS, ["FLOAT"]),
    ]
    assert [(op.op_type, op.name) for op in left] == [("Add", "plus")]
    assert left[0].reason == "not among the op types to quantize, see --op-type"


def test_weights_in_float16_count_as_quantized(source: Path) -> None:
    made = product(source, m=seeded(8, 16).astype(np.float16))
    rows, _ = measure_coverage(read_ops(read_model(source)), made, Settings("fp16"), {})
    found = {row.op_type: (row.quantized, row.dtypes, row.reason) for row in rows}
    assert found["MatMul"] == (1, ["FLOAT16"], "")
    assert found["Gemm"] == (0, ["FLOAT"], "1 x float16 is not safe or not known for this op")


@pytest.mark.parametrize(
    ("settings", "reasons", "expected"),
    [
        (Settings("static"), {"gemm": "left in float by the search"}, "left in float by the search"),
        (Settings("static", kept_op_types=("Gemm",)), {}, "excluded"),
        (Settings("static", op_types=("Conv",)), {}, "not among the op types to quantize"),
        (Settings("static"), {}, "ONNX Runtime's quantizer left it"),
    ],
)
def test_every_op_that_stays_has_its_reason(source: Path, settings: Settings, reasons: dict[str, str], expected: str) -> None:
    rows, left = measure_coverage(read_ops(read_model(source)), onnx.load(str(source)), settings, reasons)
    assert all(op.reason for op in left)
    assert {op.name for op in left} == {"product", "plus", "gemm"}
    assert expected in next(op.reason for op in left if op.name == "gemm")
    assert next(row.reason for row in rows if row.op_type == "Gemm").startswith("1 x ")


def test_weights_that_were_small_already_are_told_so(tmp_path: Path) -> None:
    source = save_vector_model(tmp_path / "m.onnx")
    model = product(source, g=np.ones((4, 16), np.int8))
    source.write_bytes(model.SerializeToString())
    _, left = measure_coverage(read_ops(read_model(source)), model, Settings("static"), {})
    assert next(op.reason for op in left if op.name == "gemm") == "weights are INT8 already"
