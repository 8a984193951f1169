"""Coverage counts the layers of every op type, and each layer with weights that was skipped has its reason."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from shared.formats.tflite import Op
from shared.quantize.coverage import (
    LONGEST,
    SHOWN,
    LayerState,
    OpTypeCoverage,
    SkippedLayer,
    covered_share,
    measure_coverage,
    number_text,
    short_name,
    skipped_tables,
)
from tests.shared.quantize.results import text_of


def state(op_type: str, name: str, before: int, after: int | None = None, dtype: str = "INT8") -> LayerState:
    """Return a layer whose weights became smaller, or stayed where `after` is None."""
    op = Op(op_type, name, "FLOAT32" if before else "", before)
    if after is None:
        return LayerState(op, op.dtype, before, has_smaller_weights=False)
    return LayerState(op, dtype, after, has_smaller_weights=True)


def became_integer(op_type: str, name: str) -> LayerState:
    return LayerState(Op(op_type, name), "", 0, has_smaller_weights=False, became_integer=True)


def why(skipped: LayerState) -> str:
    return f"because of {skipped.layer.name}"


STATES = [
    state("CONV_2D", "c1", 40, 10),
    state("CONV_2D", "c2", 80, None),
    state("FULLY_CONNECTED", "f1", 400, 100),
    state("FULLY_CONNECTED", "f2", 400, 200, "FLOAT16"),
    state("ADD", "plus", 0),
]


def test_each_op_type_with_weights_has_a_row_the_largest_first() -> None:
    rows, skipped = measure_coverage(STATES, why)
    assert rows == [
        OpTypeCoverage("FULLY_CONNECTED", 2, 2, 800, 800, 300, ["FLOAT16", "INT8"], ""),
        OpTypeCoverage("CONV_2D", 2, 1, 120, 40, 90, ["FLOAT32", "INT8"], "1 x because of c2"),
    ]
    assert skipped == [SkippedLayer("CONV_2D", "c2", 80, "because of c2")]
    assert covered_share(rows) == 840 / 920


def test_ops_without_weights_count_where_some_of_their_type_became_integers() -> None:
    rows, skipped = measure_coverage([*STATES, became_integer("ADD", "sum")], why)
    [add] = [row for row in rows if row.op_type == "ADD"]
    assert (add.ops, add.quantized, add.weight_bytes, add.dtypes, add.reason) == (2, 1, 0, [], "1 x because of plus")
    assert [layer.name for layer in skipped] == ["c2"]  # without weights nothing is lost


def test_equal_reasons_are_counted_and_skipped_layers_ranked_by_size() -> None:
    states = [state("CONV_2D", str(size), size) for size in (8, 32, 16)] + [state("CONV_2D", "x", 64)]
    rows, skipped = measure_coverage(states, lambda one: "too small" if one.layer.weight_bytes < 64 else "excluded")
    assert rows[0].reason == "3 x too small; 1 x excluded"
    assert [layer.weight_bytes for layer in skipped] == [64, 32, 16, 8]


def test_a_model_without_weights_has_no_coverage() -> None:
    rows, skipped = measure_coverage([state("ADD", "plus", 0)], why)
    assert (rows, skipped, covered_share(rows)) == ([], [], None)


def printed(rows: Sequence[OpTypeCoverage], layers: Sequence[SkippedLayer]) -> str:
    return text_of(skipped_tables(rows, layers))


def test_skipped_layers_are_listed_unless_the_row_of_their_type_says_it_all() -> None:
    unknown = OpTypeCoverage("PRELU", 2, 0, 8, 0, 8, ["FLOAT32"], "2 x not known")
    several = OpTypeCoverage("ADD", 2, 0, 8, 0, 8, ["FLOAT32"], "1 x not known; 1 x excluded")
    partly = OpTypeCoverage("CONV_2D", 2, 1, 8, 4, 5, ["FLOAT32", "INT8"], "1 x excluded")
    layers = [SkippedLayer(kind, f"layer of {kind}", 4, "excluded") for kind in ("PRELU", "ADD", "CONV_2D")]
    text = printed([unknown, several, partly], layers)
    assert "layer of ADD" in text and "layer of CONV_2D" in text
    assert "layer of PRELU" not in text
    assert printed([unknown], layers[:1]).strip() == ""


def test_a_long_list_is_cut_and_says_so() -> None:
    layers = [SkippedLayer("CONV_2D", f"layer {number}", 4, "excluded") for number in range(SHOWN + 3)]
    text = printed([], layers)
    assert f"layer {SHOWN - 1} " in text
    assert f"layer {SHOWN} " not in text
    assert "and 3 smaller ones; --json has all" in text


@pytest.mark.parametrize("length", [1, LONGEST - 1, LONGEST, LONGEST + 1, 500])
def test_a_long_name_keeps_its_end(length: int) -> None:
    name = "x" * (length - 1) + "y"
    assert len(short_name(name)) == min(length, LONGEST)
    assert short_name(name).endswith("y")
    assert short_name(name).startswith("...") == (length > LONGEST)


def test_a_number_that_is_not_there_is_a_dash() -> None:
    assert (number_text(None, ".2%", " dB"), number_text(0.5, ".1%"), number_text(1.25, ".1f", " dB")) == ("-", "50.0%", "1.2 dB")


def test_weights_that_layers_share_count_once() -> None:
    first = state("CONV_2D", "c1", 40, 10)
    rows, _ = measure_coverage([first, replace(state("CONV_2D", "c2", 40, 10), is_shared=True)], why)
    assert rows == [OpTypeCoverage("CONV_2D", 2, 2, 40, 40, 10, ["INT8"], "")]
