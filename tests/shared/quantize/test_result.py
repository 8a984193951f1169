"""A result says what was measured in full, in tables, in sentences, and as the values of gates."""

from dataclasses import replace

import pytest

from shared.metrics.gates import check_gate
from shared.metrics.output_error import OutputError
from shared.quantize.result import (
    GATES,
    ORIGINAL,
    CandidateResult,
    ModelResult,
    QuantizationResult,
    SearchSummary,
    sentences,
    size_change,
)
from tests.shared.quantize.results import NEAR, candidate, measured, model_result, sensitive_layer, text_of


def printed(*models: ModelResult, **changes: object) -> str:
    """Return the tables as they are printed."""
    return text_of(QuantizationResult(list(models), **changes).tables())  # type: ignore[arg-type]


def test_the_product_is_the_candidate_that_was_chosen() -> None:
    model = model_result(ms=5.0)
    assert model.product is model.candidates[1]
    assert (model.speedup, model.is_slower) == (2.0, False)
    assert model_result(ms=20.0).is_slower
    assert replace(model, candidates=model.candidates[:1]).product is None


@pytest.mark.parametrize("candidates", [[], [CandidateResult("float32", None)], [CandidateResult("float32", measured(10.0))]])
def test_without_measurements_there_is_no_speedup(candidates: list[CandidateResult]) -> None:
    model = replace(model_result(), candidates=candidates)
    assert (model.speedup, model.is_slower, model.product) == (None, False, None)


def test_every_gate_has_its_value() -> None:
    images = [replace(NEAR, psnr_db=42.0), OutputError("z", 0.02, 0.999, 0.5, 30.0, 38.0, worst_cosine=0.999)]
    model = model_result(candidates=[candidate("float32", 10.0), candidate("int8", 4.0, *images, is_product=True)])
    values = model.gate_values()
    assert {name: values[name] for name in GATES} == {
        "min_coverage": 0.75,
        "min_speedup": 2.5,
        "min_cosine": 0.999,
        "min_psnr": 38.0,
        "max_error": 0.02,
        "max_size_mb": 1000 / 2**20,
        "max_latency_ms": 4.0,
    }


def test_the_error_gate_of_an_output_takes_it_out_of_the_common_one() -> None:
    errors = [NEAR, OutputError("z", 0.02)]
    model = model_result(candidates=[candidate("float32", 10.0), candidate("int8", 4.0, *errors, is_product=True)])
    values = model.gate_values(["max_error", "max_error:z"])
    assert (values["max_error"], values["max_error:z"]) == (0.01, 0.02)


@pytest.mark.parametrize("error", [OutputError("y", problem="an output holds NaN"), None])
def test_outputs_that_cannot_be_compared_have_no_value(error: OutputError | None) -> None:
    errors = [NEAR, error] if error else []
    values = model_result(candidates=[candidate("float32", 10.0), candidate("int8", 4.0, *errors, is_product=True)]).gate_values()
    assert [values[name] for name in ("min_cosine", "min_psnr", "max_error")] == [None, None, None]
    assert values["min_speedup"] == 2.5


def test_a_product_that_could_not_be_run_has_no_measured_value() -> None:
    values = replace(model_result(), candidates=[]).gate_values()
    assert {name for name, value in values.items() if value is not None} == {"min_coverage", "max_size_mb"}


def test_one_broken_gate_breaks_the_result_and_is_named() -> None:
    gates = [check_gate("min_psnr", 42.0, 40.0, "m.onnx"), check_gate("min_speedup", None, 1.0, "m.onnx")]
    result = QuantizationResult([model_result()], gates=gates)
    assert not result.ok
    assert result.verdict() == "m.onnx min_speedup not measured, limit 1"
    assert replace(result, gates=gates[:1]).ok
    assert "FAILED" in printed(model_result(), gates=gates)


def test_the_peak_memory_is_that_of_the_largest_model() -> None:
    models = [model_result(peak_rss_bytes=3), model_result(peak_rss_bytes=7)]
    assert QuantizationResult(models).peak_rss_bytes == 7
    assert QuantizationResult([]).peak_rss_bytes == 0


def test_tables_show_every_candidate_and_each_skipped_layer() -> None:
    failed = [*model_result().candidates, CandidateResult("int8-static", None, problem="does not run: no kernel")]
    text = printed(model_result(candidates=failed, corrected_biases=2, saved_name_bytes=2048))
    for part in (
        "m.tflite: int8 = dynamic_wi8_afp32",
        "reference",
        "int8-static",
        "does not run: no kernel",
        "1 x excluded",
        "last",
    ):
        assert part in text
    for part in ("75.0% of the weight bytes quantized", "biases of 2 layers corrected", "inner tensors shortened by 2.0 KiB"):
        assert part in text
    assert "20 runs in turns, 2 threads; answers measured on 8 seeded samples" in text
    assert "y: relative error 1.000%, cosine 0.999900" in text


def test_models_that_could_not_run_side_by_side_and_unlike_types_are_said() -> None:
    text = printed(
        model_result(candidates=[candidate("float32", 10.0), candidate("int8", 4.0, is_product=True)], interleaved=False)
    )
    assert "20 runs one model after the other" in text
    assert "not compared: inputs or outputs differ in type from the reference's" in text


def test_a_slower_product_is_said_to_be_slower() -> None:
    assert "SLOWER: latency 10.00 -> 20.00 ms" in list(sentences(model_result(ms=20.0)))


def test_a_product_that_could_not_be_run_is_said_to_be_unmeasured() -> None:
    lines = list(sentences(replace(model_result(), candidates=[], unmeasured="the runtime here lacks ops of this model")))
    assert lines[-1] == "NOT MEASURED: the runtime here lacks ops of this model"
    assert not any("runs" in line.split() for line in lines)


@pytest.mark.parametrize(("original_ms", "gain"), [(12.0, "; that alone makes it 1.20 times as fast"), (10.1, ""), (8.0, "")])
def test_a_repair_claims_the_gain_that_was_measured(original_ms: float, gain: str) -> None:
    reference, product = model_result().candidates
    models = [reference, candidate(ORIGINAL, original_ms, NEAR), product]
    assert f"repaired first: 1 nodes named{gain}" in list(sentences(model_result(repairs="1 nodes named", candidates=models)))


def test_a_search_says_how_it_went_and_what_it_left_in_float() -> None:
    search = SearchSummary("size", 0.983, 21, 110, 40, ["int8: 1.4 times slower than float here"], {"fp16": 3, "int8": 18})
    lines = list(sentences(model_result(search=search, float_layers=[f"layer{number}" for number in range(10)])))
    assert "searched 21 layers, 110 candidates measured, 40 known from an earlier run: 3 fp16, 18 int8" in lines
    assert "largest error takes 98.3% of its limit" in lines
    assert "not searched: int8: 1.4 times slower than float here" in lines
    [left] = [line for line in lines if line.startswith("left in float: layer0, layer1, ")]
    assert left.endswith("layer7, ...")


def test_sensitive_layers_are_a_table_the_worst_first() -> None:
    text = printed(model_result(sensitivity=[sensitive_layer("bad", 0.5), sensitive_layer("good", 0.001)]))
    assert "what each layer does alone" in text
    assert text.index("bad") < text.index("good")
    assert "50.000%" in text and "20.0 dB" in text


def test_entries_of_a_bundle_that_stay_are_named() -> None:
    assert "carried over byte for byte: geometry.binarypb, other.tflite" in printed(unchanged=["geometry.binarypb", "other.tflite"])


@pytest.mark.parametrize(("after", "says"), [(1000, "75.0% smaller"), (4000, "0.0% smaller"), (5000, "25.0% LARGER")])
def test_a_model_that_grew_is_said_to_be_larger(after: int, says: str) -> None:
    assert size_change(4000, after).endswith(says)
