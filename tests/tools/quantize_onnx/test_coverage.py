"""What became of each op is reported, with a reason for what was skipped; a slower product is called slower, and why."""

from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from rich.console import Console
from rich.console import Group as Lines

from shared.formats.model_file import SLOW_DYNAMIC, SLOW_HALF, SLOW_STATIC, ModelFile
from shared.metrics.gates import check_gate
from shared.metrics.output_error import OutputError
from shared.quantize.backend import Candidate, Quantization
from shared.quantize.coverage import OpTypeCoverage, SkippedLayer
from shared.quantize.product import Quantized
from shared.quantize.request import Request
from shared.quantize.result import CandidateResult, ModelResult, QuantizationResult, SearchSummary
from shared.runtime.benchmark import Measurement
from shared.runtime.speed import describe_speed
from tests.support.small_onnx import Array, save_vector_model, seeded
from tests.tools.quantize_onnx.conftest import save_model
from tools.quantize_onnx import quantize_onnx
from tools.quantize_onnx.backend import coverage
from tools.quantize_onnx.options import OnnxRequest, OnnxSettings

GEMM, PRODUCT, PLUS = 4 * 16 * 4, 8 * 16 * 4, 16 * 4  # bytes of weights

# Coverage.


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_vector_model(tmp_path / "m.onnx")


def write_product(source: Path, **weights: Array | None) -> Path:
    """Write a product in which weights are replaced, or gone."""
    model = onnx.load(str(source))
    others = [tensor for tensor in model.graph.initializer if tensor.name not in weights]
    del model.graph.initializer[:]
    model.graph.initializer.extend(others)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items() if value is not None)
    path = source.with_name("product.onnx")
    path.write_bytes(model.SerializeToString())
    return path


def quantized(name: str, *shape: int) -> dict[str, Array | None]:
    return {name: None, f"{name}_quantized": np.ones(shape, np.int8)}


def measured(
    source: Path, product: Path, wanted: OnnxRequest, float_layers: dict[str, str] | None = None
) -> tuple[list[OpTypeCoverage], list[SkippedLayer]]:
    """Return the coverage of a product."""
    request = Request(wanted.recipe, str(wanted), wanted)
    whole = cast("Quantization", SimpleNamespace(model=ModelFile(source)))
    return coverage(whole, Candidate(request, ModelFile(product), float_layers=float_layers or {}))


def test_weights_in_8_bits_count_as_quantized_and_largest_come_first(source: Path) -> None:
    made = write_product(source, **quantized("m", 8, 16), **quantized("g", 4, 16))
    rows, skipped = measured(source, made, OnnxRequest("int8-static"))
    assert [(row.op_type, row.quantized, row.weight_bytes, row.bytes_after, row.dtypes) for row in rows] == [
        ("MatMul", 1, PRODUCT, PRODUCT // 4, ["INT8"]),
        ("Gemm", 1, GEMM, GEMM // 4, ["INT8"]),
        ("Add", 0, PLUS, PLUS, ["FLOAT"]),
    ]
    assert [(op.op_type, op.name) for op in skipped] == [("Add", "plus")]
    assert skipped[0].reason == "not among the op types to quantize, see --set op_types"


def test_weights_in_float16_count_as_quantized(source: Path) -> None:
    made = write_product(source, m=seeded(8, 16).astype(np.float16))
    rows, _ = measured(source, made, OnnxRequest("fp16"))
    found = {row.op_type: (row.quantized, row.dtypes, row.reason) for row in rows}
    assert found["MatMul"] == (1, ["FLOAT16"], "")
    assert found["Gemm"] == (0, ["FLOAT"], "1 x float16 is not safe or not known for this op")


@pytest.mark.parametrize(
    ("wanted", "float_layers", "expected"),
    [
        (OnnxRequest("int8-static"), {"gemm": "left in float by the search"}, "left in float by the search"),
        (OnnxRequest("int8-static", float_layers=("gemm",)), {}, "excluded"),
        (OnnxRequest("int8-static", float_op_types=("Gemm",)), {}, "excluded"),
        (OnnxRequest("int8-static", OnnxSettings(op_types=("Conv",))), {}, "not among the op types to quantize"),
        (OnnxRequest("int8-static"), {}, "has no form for it"),
    ],
)
def test_every_op_that_stays_has_its_reason(source: Path, wanted: OnnxRequest, float_layers: dict[str, str], expected: str) -> None:
    rows, skipped = measured(source, source, wanted, float_layers)
    assert all(op.reason for op in skipped)
    assert {op.name for op in skipped} == {"product", "plus", "gemm"}
    assert expected in next(op.reason for op in skipped if op.name == "gemm")
    assert next(row.reason for row in rows if row.op_type == "Gemm").startswith("1 x ")


def test_weights_that_were_small_already_are_reported_so(source: Path) -> None:
    small = write_product(source, g=np.ones((4, 16), np.int8))
    _, skipped = measured(small, small, OnnxRequest("int8-static"))
    assert next(op.reason for op in skipped if op.name == "gemm") == "weights are INT8 already"


# Speed, and what tables and sentences say.


def measurement(median_ms: float) -> Measurement:
    return Measurement(Path("m.onnx"), 4000, 1.0, median_ms, median_ms, 20, "onnxruntime", 2**20, [])


@pytest.mark.parametrize(("recipe", "reason"), [("int8-static", SLOW_STATIC), ("int8", SLOW_DYNAMIC), ("fp16", SLOW_HALF)])
def test_a_slower_product_is_called_slower_and_why(static: Quantized, tmp_path: Path, recipe: Any, reason: str) -> None:
    made = static if recipe == "int8-static" else quantize_onnx(save_model(tmp_path), recipe=recipe)
    assert made.product is not None
    sentence = describe_speed(measurement(10.0), measurement(11.0), ModelFile(made.product.path))
    assert sentence.startswith(f"SLOWER: latency 10.00 -> 11.00 ms, 0.91 times as fast: {reason}")


NEAR = [OutputError("made", 0.01, 0.9999, 0.1, 40.0, 42.0, 41.0)]


def result_of(**changes: Any) -> ModelResult:
    """Return the result of a repaired model whose original takes 12 ms, the reference 10 and the product 5."""
    candidates = [
        CandidateResult("float32", measurement(10.0)),
        CandidateResult("original", measurement(12.0), NEAR),
        CandidateResult("int8-static", measurement(5.0), NEAR, "latency 10.00 -> 5.00 ms, 2.00 times as fast", is_product=True),
        CandidateResult("int8", None, problem="does not run: no kernel"),
    ]
    row = OpTypeCoverage("Conv", 3, 2, 4000, 3000, 1750, ["FLOAT", "INT8"], "1 x excluded")
    made = ModelResult(
        name="m.onnx",
        recipe="int8-static",
        expansion="8 bits",
        size_before_bytes=4000,
        size_after_bytes=1000,
        repairs="1 nodes named",
        op_types=[row],
        skipped=[SkippedLayer("Conv", "last", 1000, "excluded")],
        coverage=0.75,
        corrected_biases=2,
        measured_on="4 seeded samples",
        threads=2,
        candidates=candidates,
        search=SearchSummary("size", 0.5, 3, 7, 2, [], {"float32": 1, "int8-static": 2}),
        float_layers=["last"],
    )
    return replace(made, **changes)


def shown(model: ModelResult) -> str:
    file = StringIO()
    Console(file=file, width=200, highlight=False, markup=False).print(Lines(*QuantizationResult([model]).tables()))
    return file.getvalue()


def test_the_product_is_the_marked_one_and_its_speed_is_against_the_repaired_model() -> None:
    made = result_of()
    assert (made.product, made.speedup) == (made.candidates[2], 2.0)
    without = replace(made, candidates=made.candidates[:2])
    assert (without.product, without.speedup) == (None, None)


def test_one_broken_gate_breaks_all_and_is_reported() -> None:
    gates = [check_gate("min_psnr", 42.0, 40.0), check_gate("min_speedup", None, 1.0)]
    found = QuantizationResult([result_of()], gates=gates)
    assert not found.ok
    assert found.verdict() == "min_speedup not measured, limit 1"
    assert replace(found, gates=gates[:1]).ok


def test_tables_show_every_candidate_and_each_layer_that_was_skipped() -> None:
    text = shown(result_of())
    for part in ("original", "float32", "does not run: no kernel", "1 x excluded", "last", "75.0%", "biases of 2 layers corrected"):
        assert part in text
    assert "searched 3 layers, 7 candidates measured, 2 known from an earlier run: 1 float32, 2 int8-static" in text
    assert "left in float: last" in text
    assert "repaired first: 1 nodes named; that alone makes it 1.20 times as fast" in text
    assert "20 runs in turns, 2 threads; answers measured on 4 seeded samples" in text
    assert "latency 10.00 -> 5.00 ms, 2.00 times as fast" in text


def test_a_product_that_was_not_run_is_said_not_to_be_measured() -> None:
    text = shown(result_of(candidates=[], unmeasured="the runtime here lacks ops of this model"))
    assert "NOT MEASURED: the runtime here lacks ops of this model" in text
    assert "runs in turns" not in text


def test_a_repair_without_gain_claims_none() -> None:
    made = result_of()
    slow = [CandidateResult("float32", measurement(11.9)), *made.candidates[1:]]
    assert "repaired first: 1 nodes named\n" in shown(replace(made, candidates=slow)).replace(" \n", "\n")
