"""The table, the verdict and the advice say what was found."""

import io
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from shared.metrics.gates import GateResult
from shared.metrics.output_error import OutputError
from shared.runtime.benchmark import Measurement
from tools.compare.accuracy import Accuracy, Condition, Reading
from tools.compare.comparison import Candidate, Findings


def measured(name: str, size: int, ms: float) -> Measurement:
    return Measurement(Path(name), size, 1, ms, ms, 3, "xnnpack", 1000, ["float32 image of 64 pixels"])


def accuracy(share: float) -> Accuracy:
    conditions = [Condition("none", share, 1, 0, 1), Condition("jpeg-50", share / 2, 1, 0, 1)]
    return Accuracy(conditions, [Reading(Path("a.png"), None, 2.5, share, 0.25, 1.5)], [[1.5, -2.0]])


def candidate(name: str, size: int, ms: float, *, ok: bool = True, is_alternative: bool = False) -> Candidate:
    return Candidate(
        path=Path(name),
        size_bytes=size,
        reduction=0.5,
        is_alternative=is_alternative,
        measurement=measured(name, size, ms),
        speedup=2,
        errors=[OutputError("bits", relative_error=0.1, worst_cosine=0.5, max_abs_error=0.25)],
        bit_agreement=0.9,
        accuracy=accuracy(0.75),
        gates=[GateResult("min_cosine", 0.5, 0.4 if ok else 0.9, ok)],
        verdict="fast",
    )


FINDINGS = Findings(measured("model.tflite", 2000, 10), accuracy(1), [candidate("a.tflite", 900, 4)], 8, 2, True, "some CPU")


def shown(findings: Findings) -> str:
    console = Console(width=200, file=io.StringIO())
    with console.capture() as capture:
        for part in findings.tables():
            console.print(part)
    return capture.get()


def test_the_tables_hold_every_figure() -> None:
    text = shown(FINDINGS)
    for figure in ("900 B (50.0% smaller)", "4.0 ms", "0.500000", "0.1", "75.00%", "37.50%", "0.25", "1.50", "min_cosine", "ok"):
        assert figure in text, figure
    assert "alternative" not in text
    assert "recommended" not in text


def test_a_broken_gate_fails_a_candidate_but_not_an_alternative() -> None:
    good, bad = candidate("a.tflite", 900, 4), candidate("b.tflite", 100, 1, ok=False)
    failed = replace(FINDINGS, candidates=[good, bad])
    assert not failed.ok
    assert failed.verdict() == "FAILED: b min_cosine"
    assert "FAILED" in shown(failed)
    kept = replace(FINDINGS, candidates=[good, replace(bad, is_alternative=True)])
    assert kept.ok
    assert kept.verdict().startswith("every gate kept")
    assert "outside" in shown(kept)
    assert replace(FINDINGS, candidates=[replace(good, problem="crashed")]).verdict() == "FAILED: a crashed"


def test_the_worst_output_counts() -> None:
    errors = [
        OutputError("a", 0.1, None, 3.0, worst_cosine=0.9),
        OutputError("b", 0.3, None, 1.0, worst_cosine=0.8),
        OutputError("zeros", 0.0, None, 0.0),
    ]
    several = replace(candidate("a.tflite", 900, 4), errors=errors)
    assert (several.relative_error, several.cosine, several.max_abs_error) == (0.3, 0.8, 3.0)
    none = replace(several, errors=[])
    assert (none.relative_error, none.cosine, none.max_abs_error) == (None, None, None)


def test_labels_are_what_a_name_adds_to_the_references() -> None:
    several = replace(FINDINGS, candidates=[candidate(name, 900, 4) for name in ("model_int8.tflite", "other.tflite")])
    assert several.labels() == ["model", "int8", "other"]
    assert [several.role(number) for number in range(2)] == ["reference", "candidate"]


def test_a_label_is_never_empty() -> None:
    assert replace(FINDINGS, candidates=[candidate("model_.tflite", 900, 4)]).labels() == ["model", "model_"]


def test_models_of_one_name_are_labelled_by_their_paths() -> None:
    several = replace(
        FINDINGS, candidates=[candidate(name, 900, 4, ok=False) for name in ("a/m.tflite", "b/m.tflite", "b/model.tflite")]
    )
    assert several.labels() == ["model.tflite", "a/m.tflite", "b/m.tflite", "b/model.tflite"]
    assert "b/m.tflite min_cosine" in several.verdict()
    best = replace(several, smallest=Path("b/m.tflite"), fastest=Path("b/m.tflite"))
    assert best.advice() == ["recommended: b/m.tflite, the smallest and the fastest inside the gates"]


def test_advice_names_the_smallest_and_the_fastest() -> None:
    several = replace(FINDINGS, candidates=[candidate("a.tflite", 900, 4), candidate("b.tflite", 100, 9)])
    assert several.advice() == ["recommended: none, no candidate is inside the gates"]
    both = replace(several, smallest=Path("b.tflite"), fastest=Path("a.tflite"))
    assert both.advice() == ["recommended: b, the smallest inside the gates; a is the fastest"]
    one = replace(several, smallest=Path("a.tflite"), fastest=Path("a.tflite"))
    assert one.advice() == ["recommended: a, the smallest and the fastest inside the gates"]


def test_each_of_several_outputs_has_a_row_of_its_own() -> None:
    errors = [OutputError("boxes", 0.001, worst_cosine=0.999998), OutputError("scores", 0.19, worst_cosine=0.98)]
    text = shown(replace(FINDINGS, candidates=[replace(candidate("a.tflite", 900, 4), errors=errors)]))
    assert "0.001, 0.999998" in text
    assert "0.19, 0.980000" in text
    assert "bits: relative error" not in shown(FINDINGS)  # of one output the row of the worst says all


def test_of_many_outputs_the_furthest_off_are_shown() -> None:
    errors = [OutputError(f"output {number}", relative_error=number / 100, worst_cosine=1) for number in range(20)]
    text = shown(replace(FINDINGS, candidates=[replace(candidate("a.tflite", 900, 4), errors=errors)]))
    assert "output 12: relative error" in text
    assert "output 11: relative error" not in text
