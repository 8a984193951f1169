"""A ledger gives back every measurement that was put into it, and no file of another kind is touched."""

import json
from pathlib import Path

import pytest

from shared.command.errors import ToolError
from shared.metrics.output_error import OutputError
from shared.quantize.ledger import Ledger, Outcome, RefusedError, measure_safely
from shared.quantize.request import Precisions
from tests.shared.quantize.fake_model import FakeJob, FakeModel

IDENTITY = {"model": "m", "ai-edge-litert": "1"}
OUTCOMES = {
    "a": Outcome(100, [OutputError("y", 0.1, 0.99, 0.5, 20.0), OutputError("z", problem="an output holds NaN")], None, 1.25),
    "b": Outcome(0, []),
    "c": Outcome(7, [OutputError("y", 0.0, 1.0, 0.0, None, 200.0, 200.0)], OutputError("inside", 0.2)),
}


def write_ledger(path: Path) -> None:
    ledger = Ledger(path, IDENTITY)
    for key, outcome in OUTCOMES.items():
        ledger.put(key, outcome)
    ledger.close()


def read_ledger(path: Path, identity: dict[str, str] = IDENTITY) -> tuple[dict[str, Outcome | None], int]:
    """Return what a ledger knows, and how many measurements it took over."""
    ledger = Ledger(path, identity)
    ledger.close()
    return {key: ledger.get(key) for key in "abcd"}, ledger.resumed


def test_a_ledger_gives_back_every_outcome(tmp_path: Path) -> None:
    write_ledger(tmp_path / "ledger")
    assert read_ledger(tmp_path / "ledger") == ({**OUTCOMES, "d": None}, 3)


def test_each_outcome_is_in_the_file_before_the_next_step(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger", IDENTITY)
    for number, (key, outcome) in enumerate(OUTCOMES.items(), start=1):
        ledger.put(key, outcome)
        assert len((tmp_path / "ledger").read_text().splitlines()) == 1 + number
    ledger.close()


def test_a_ledger_without_a_file_keeps_outcomes_in_memory() -> None:
    ledger = Ledger(None, IDENTITY)
    ledger.put("a", OUTCOMES["a"])
    ledger.close()
    assert (ledger.get("a"), ledger.get("b"), ledger.resumed) == (OUTCOMES["a"], None, 0)


def test_a_line_that_was_cut_off_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    write_ledger(path)
    whole = path.read_text()
    path.write_text(whole[:-20])
    assert read_ledger(path) == ({**OUTCOMES, "c": None, "d": None}, 2)
    assert path.read_text() == "".join(whole.splitlines(keepends=True)[:3])


@pytest.mark.parametrize("identity", [{**IDENTITY, "model": "another"}, {"model": "m"}, {**IDENTITY, "cpu": "other"}])
def test_a_ledger_of_other_measurements_is_started_anew(tmp_path: Path, identity: dict[str, str]) -> None:
    path = tmp_path / "ledger"
    write_ledger(path)
    assert read_ledger(path, identity) == (dict.fromkeys("abcd"), 0)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"edgepress": "search", **identity}]


@pytest.mark.parametrize("content", ["precious\n", '{"edgepress": "report"}\n', "", "\x00\xff", "[" * 100_000])
def test_a_file_that_is_no_ledger_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content, encoding="latin-1")
    before = path.read_bytes()
    with pytest.raises(ToolError, match=r"notes\.txt: this file is no search ledger"):
        Ledger(path, IDENTITY)
    assert path.read_bytes() == before


def test_a_refused_candidate_has_no_size_and_other_errors_stay_errors() -> None:
    def failing(error: Exception) -> FakeJob:
        def refuse(_: Precisions) -> bool:
            raise error

        return FakeJob(FakeModel({"a": 1}, lambda _: 0.0, refuses=refuse), {"a": "int8"}, is_timed=False)

    assert measure_safely(failing(RefusedError("the runtime does not load the candidate"))) == Outcome(0, [])
    with pytest.raises(ToolError, match="the model is not here"):
        measure_safely(failing(ToolError("the model is not here")))
