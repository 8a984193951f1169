"""What was measured is told in full: a product that is slower is called slower, and why."""

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console
from rich.console import Group as Lines

from shared.metrics.fidelity import Fidelity
from shared.metrics.gates import GateKept
from shared.quantize.coverage import OpLeft, OpTypeCoverage
from tools.quantize_onnx.result import WHY_SLOWER, PressedOnnx, Timed

NEAR = Fidelity(42.0, 41.0, 0.9999, 0.01)


def pressed(before: float | None, after: float | None, mode: str = "static", **changes: object) -> PressedOnnx:
    models = [
        Timed("original", 4000, 12.0, NEAR),
        Timed("float32", 4000, before),
        Timed(mode, 1000, after, NEAR, is_chosen=True),
    ]
    made = PressedOnnx("m.onnx", mode, "8 bits", 4000, 1000, models=models, measured_on="4 seeded samples", threads=2, runs=20)
    return replace(made, **changes)  # type: ignore[arg-type]


def shown(found: PressedOnnx) -> str:
    file = StringIO()
    Console(file=file, width=200, highlight=False, markup=False).print(Lines(*found.tables()))
    return file.getvalue()


@pytest.mark.parametrize("mode", ["static", "dynamic", "fp16"])
def test_a_slower_product_is_called_slower_and_why(mode: str) -> None:
    verdict = pressed(10.0, 11.0, mode).verdict()
    assert verdict.startswith("SLOWER: latency 10.00 -> 11.00 ms, 0.91 times as fast as float32: ")
    assert verdict.endswith(WHY_SLOWER[mode])


@pytest.mark.parametrize(("after", "factor"), [(5.0, "2.00"), (10.0, "1.00"), (10.4, "0.96")])
def test_what_is_no_slower_than_noise_is_not_called_slower(after: float, factor: str) -> None:
    assert pressed(10.0, after).verdict() == f"latency 10.00 -> {after:.2f} ms, {factor} times as fast as float32"


@pytest.mark.parametrize(("before", "after"), [(None, 5.0), (10.0, None)])
def test_what_was_not_measured_is_said_not_to_be(before: float | None, after: float | None) -> None:
    found = pressed(before, after)
    assert found.speedup is None
    assert "NOT MEASURED" in found.verdict()


def test_the_product_is_the_chosen_one() -> None:
    found = pressed(10.0, 5.0)
    assert (found.product, found.speedup) == (found.models[2], 2.0)
    assert replace(found, models=found.models[:2]).product is None


def test_one_broken_limit_breaks_all_and_is_told() -> None:
    gates = [GateKept("m.onnx", "PSNR", 42.0, 40.0, ok=True), GateKept("m.onnx", "speed-up", None, 1.0, ok=False)]
    found = pressed(10.0, 5.0, gates=gates)
    assert not found.ok
    assert found.broken() == "m.onnx speed-up not measured, limit 1"
    assert replace(found, gates=gates[:1]).ok


def test_tables_tell_every_model_and_each_layer_that_was_left() -> None:
    row = OpTypeCoverage("Conv", 3, 2, 4000, 3000, 1750, ["FLOAT", "INT8"], "1 x excluded")
    left = [OpLeft("Conv", "last", 1000, "excluded")]
    found = pressed(10.0, 5.0, op_types=[row], left=left, coverage=0.75, corrected_biases=2, searched=7, kept=["last"])
    failed = [*found.models, Timed("dynamic", 900, error="does not run: no kernel")]
    text = shown(replace(found, models=failed, repairs="1 nodes named"))
    for part in ("original", "float32", "does not run: no kernel", "1 x excluded", "last", "75.0%", "biases of 2 layers corrected"):
        assert part in text
    assert "searched 7 candidates; left in float: last" in text
    assert "repaired first: 1 nodes named; that alone makes it 1.20 times as fast" in text
    assert "20 runs in turns, 2 threads; answers measured on 4 seeded samples" in text


def test_a_repair_without_gain_claims_none() -> None:
    found = pressed(11.9, 5.0, repairs="1 nodes named")
    assert "repaired first: 1 nodes named" in list(found.sentences())
