"""Every op of a TFLite model is accounted for, every rule counted."""

from collections.abc import Sequence

from shared.formats.tflite import Op
from shared.quantize.coverage import OpTypeCoverage, SkippedLayer, measure_coverage
from tools.quantize_tflite.coverage import count_matches, layer_states, unmatched_selectors, why_skipped
from tools.quantize_tflite.recipes import Rules, parse_selector, resolve_recipe

SKIP_HEAD = {"regex": "head", "operation": "*", "algorithm_key": "no_quantize", "op_config": {}}
BEFORE = [
    Op("CONV_2D", "b", "INT8", 10),
    Op("FULLY_CONNECTED", "head", "FLOAT32", 40),
    Op("FULLY_CONNECTED", "body", "FLOAT32", 40),
    Op("PRELU", "slope", "FLOAT32", 8),
    Op("ADD", "sum", "FLOAT32", 4),
    Op("RELU", "cut"),
]
AFTER = [*BEFORE[:2], Op("FULLY_CONNECTED", "body", "INT8", 10), *BEFORE[3:]]


def coverage_of(
    before: Sequence[Op], after: Sequence[Op], rules: Rules, given: Sequence[Op] | None = None
) -> tuple[list[OpTypeCoverage], list[SkippedLayer]]:
    """Return the coverage as the tool's backend does; `given` are the ops of the model as it came."""
    states = layer_states(before, after, given or before)
    return measure_coverage(states, lambda state: why_skipped(state, rules))


def test_there_is_a_reason_for_every_op_that_stayed() -> None:
    rows, skipped = coverage_of(BEFORE, AFTER, [*resolve_recipe("int8")[1], SKIP_HEAD])
    reasons = {layer.name: layer.reason for layer in skipped}
    assert reasons == {
        "b": "weights are INT8, quantized already",
        "head": "excluded by a rule",
        "slope": "AI Edge Quantizer does not know this op",
        "sum": "no rule supports this op type",
    }
    fully = next(row for row in rows if row.op_type == "FULLY_CONNECTED")
    assert (fully.quantized, fully.ops, fully.weight_bytes, fully.quantized_weight_bytes, fully.bytes_after) == (1, 2, 80, 40, 50)
    assert fully.reason == "1 x excluded by a rule"
    assert [row.op_type for row in rows] == ["FULLY_CONNECTED", "CONV_2D", "PRELU", "ADD"]  # RELU has no weights


def test_ops_without_weights_count_where_their_outputs_became_integers() -> None:
    after = [*AFTER[:5], Op("RELU", "cut", output_dtype="INT8")]
    rows, skipped = coverage_of(BEFORE, after, resolve_recipe("int8-static")[1])
    relu = next(row for row in rows if row.op_type == "RELU")
    assert (relu.ops, relu.quantized, relu.weight_bytes) == (1, 1, 0)
    assert "cut" not in {layer.name for layer in skipped}


def test_each_rule_counts_what_it_matches_and_what_it_decides() -> None:
    matches = count_matches(BEFORE, [*resolve_recipe("int8")[1], SKIP_HEAD])
    assert [(rule.matched, rule.decided) for rule in matches] == [(3, 2), (1, 1)]
    assert [rule.precision for rule in matches] == ["int8 weights, activations quantized at run time", "left as it is"]


def test_a_rule_for_an_op_type_it_does_not_support_matches_nothing() -> None:
    int4 = resolve_recipe("dynamic_wi4_afp32")[1]
    assert count_matches([Op("DEPTHWISE_CONV_2D", "d", "FLOAT32", 4)], int4)[0].matched == 0


def test_selectors_that_select_nothing_are_named() -> None:
    selectors = [parse_selector(text) for text in ("FULLY_CONNECTED", "bo.y", "nobody", "CONV_2D", "TRANSPOSE_CONV", "INPUT")]
    assert unmatched_selectors(BEFORE, selectors) == ["nobody", "TRANSPOSE_CONV"]


def test_the_type_that_the_file_had_already_is_no_quantization() -> None:
    before, after = [Op("CONV_2D", "a", "FLOAT32", 40)], [Op("CONV_2D", "a", "FLOAT16", 20)]
    fp16 = resolve_recipe("fp16")[1]
    rows, skipped = coverage_of(before, after, fp16, given=after)
    assert (rows[0].quantized, skipped[0].reason) == (0, "weights were FLOAT16 already")
    assert coverage_of(before, after, fp16)[0][0].quantized == 1
