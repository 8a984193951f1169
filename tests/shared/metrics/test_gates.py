"""A gate is kept at its very limit, broken beyond it, and broken by a value that could not be measured."""

import io
import math

import pytest
from rich.console import Console

from shared.command.errors import ToolError
from shared.metrics.gates import GateResult, broken, check_gate, gate_table, parse_gates

KNOWN = ("min_speedup", "max_size_mb", "min_accuracy_under")
KEPT = GateResult("min_speedup", 1.5, 1.2, ok=True, model="a.tflite")
BROKEN = GateResult("max_size_mb", 12.345678, 3, ok=False, model="b.tflite")
UNMEASURED = GateResult("min_cosine", None, 0.9, ok=False)


@pytest.mark.parametrize(("name", "kept", "beyond"), [("min_cosine", 0.6, 0.4), ("max_error", 0.4, 0.6)])
def test_a_gate_is_kept_at_its_limit_and_broken_beyond(name: str, kept: float, beyond: float) -> None:
    assert check_gate(name, 0.5, 0.5, "m") == GateResult(name, 0.5, 0.5, ok=True, model="m")
    assert check_gate(name, kept, 0.5).ok
    assert not check_gate(name, beyond, 0.5).ok


@pytest.mark.parametrize("name", ["min_cosine", "max_error"])
@pytest.mark.parametrize("value", [None, math.nan])
def test_a_value_that_could_not_be_measured_breaks_its_gate(name: str, value: float | None) -> None:
    for limit in (-1e9, 1e9):
        assert not check_gate(name, value, limit).ok


def test_limits_are_read_by_name_and_part() -> None:
    texts = ["min_speedup=1.5", "max_size_mb=-3", "min_accuracy_under:jpeg-50=0.97", "min_accuracy_under:crop-0.9=0"]
    assert parse_gates(texts, KNOWN) == {
        "min_speedup": 1.5,
        "max_size_mb": -3,
        "min_accuracy_under:jpeg-50": 0.97,
        "min_accuracy_under:crop-0.9": 0,
    }
    assert parse_gates([], KNOWN) == {}


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (["min_sped=1"], "--gate min_sped=1: no such gate; expected NAME=VALUE, NAME one of max_size_mb, min_accuracy_under, min_"),
        (["min_speedup"], "no such gate"),
        (["=1"], "no such gate"),
        ([""], "no such gate"),
        (["min_speedup="], "the limit is no finite number"),
        (["min_speedup=fast"], "the limit is no finite number"),
        (["min_speedup=nan"], "the limit is no finite number"),
        (["max_size_mb=inf"], "the limit is no finite number"),
        (["min_accuracy_under:jpeg-50"], "no such gate"),
        (["min_speedup=1", "min_speedup=2"], "the gate has a limit already; give one"),
        (["min_accuracy_under:jpeg-50=0.9", "min_accuracy_under:jpeg-50=0.1"], "the gate has a limit already"),
    ],
)
def test_texts_that_are_no_gates_are_errors_in_one_line(texts: list[str], reason: str) -> None:
    with pytest.raises(ToolError, match=reason) as caught:
        parse_gates(texts, KNOWN)
    assert "\n" not in str(caught.value)


def test_broken_gates_are_one_line_with_value_and_limit() -> None:
    assert broken([KEPT]) == ""
    assert broken([KEPT, BROKEN, UNMEASURED]) == "b.tflite max_size_mb 12.35, limit 3; min_cosine not measured, limit 0.9"


def test_the_table_holds_every_gate() -> None:
    console = Console(width=120, file=io.StringIO())
    with console.capture() as capture:
        console.print(gate_table([KEPT, BROKEN, UNMEASURED]))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capture.get().splitlines() if line.startswith("│")]
    assert rows == [
        ["a.tflite", "min_speedup", "1.5", "1.2", "ok"],
        ["b.tflite", "max_size_mb", "12.3457", "3", "FAILED"],
        ["", "min_cosine", "not measured", "0.9", "FAILED"],
    ]
