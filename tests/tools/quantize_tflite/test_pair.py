"""A product is told from its original by what both do in one run."""

from dataclasses import replace
from pathlib import Path

import pytest

from tools.quantize_tflite import pair
from tools.quantize_tflite.pair import Measured, measure_pair

FAST = Measured(1.0, 1.0, 1, 1, 1, are_seeded=True, answers=[])
SLOW = replace(FAST, after_ms=3.0)
SLOWER = replace(FAST, after_ms=9.0)


@pytest.mark.parametrize(
    ("found", "says"),
    [([FAST], FAST), ([SLOW, FAST, SLOWER], SLOW), ([SLOW, FAST, FAST], FAST), ([SLOW, "no memory", "no memory"], SLOW)],
)
def test_what_seems_slower_is_measured_twice_more_and_the_middle_counts(
    found: list[Measured | str], says: Measured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a").touch()
    left = iter(found)
    monkeypatch.setattr(pair, "_measure_once", lambda *_: next(left))
    assert measure_pair(tmp_path / "a", tmp_path / "a", []) == says
    assert list(left) == []


def test_a_slower_product_is_told_with_the_cause_and_a_way_out() -> None:
    sentence = replace(SLOW, outside={"CONV_2D": 2}).sentence()
    assert sentence.startswith("SLOWER: latency 1.00 -> 3.00 ms, 0.33 times as fast: XNNPACK leaves 2 CONV_2D to plain kernels; ")
    assert "its kernels for this precision are slower here" in SLOW.sentence()
    assert FAST.sentence() == "latency 1.00 -> 1.00 ms, 1.00 times as fast"


def test_a_pair_that_does_not_fit_in_memory_is_not_run(float_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair, "available_memory_bytes", lambda: 1)
    assert "too little free memory for both" in str(measure_pair(float_model, float_model, []))
