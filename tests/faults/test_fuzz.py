"""Readers of strangers' files survive files changed at random, and those that once broke one; the fuzzer tells when one breaks."""

import random
from pathlib import Path

import pytest

from shared.command.errors import ToolError
from tests.support import fuzz
from tests.support.corruptions import scramble
from tests.support.fuzz import FOUND, TARGETS, Target, describe, name_of, pursue

ROUNDS = 250  # changed files for each target
FORMER = sorted(path.relative_to(FOUND).as_posix() for path in FOUND.glob("*/*"))
# What the children of a test try: a reader that breaks at the letter X in one way, at Z in another, and dies of an E.
BROKEN = """
import os
def read(data):
    if data.startswith(b"E"):
        os.abort()
    if b"X" in data:
        raise KeyError("no X")
    if b"Z" in data:
        raise ValueError("no Z")
fuzz.TARGETS["csv"] = fuzz.Target(read, lambda: [], lambda data, rng: data)
"""


def seeded(seed: int) -> random.Random:
    return random.Random(seed)


def test_every_kept_input_is_of_a_target_and_small() -> None:
    assert {path.name for path in FOUND.glob("*")} <= set(TARGETS)
    assert all((FOUND / name).stat().st_size < 100_000 for name in FORMER)


@pytest.mark.parametrize("name", FORMER)
def test_what_once_broke_a_reader_does_not_any_more(name: str) -> None:
    error = TARGETS[name.partition("/")[0]].attempt((FOUND / name).read_bytes())
    assert error is None, describe(error)


@pytest.mark.parametrize("name", TARGETS)
def test_the_seeds_are_valid_files(name: str) -> None:
    for data in TARGETS[name].seeds():
        TARGETS[name].read(data)


@pytest.mark.parametrize("name", TARGETS)
def test_readers_survive_files_changed_at_random(name: str) -> None:
    target, rng = TARGETS[name], seeded(0)
    seeds, faults = target.seeds(), {}
    for _ in range(ROUNDS):
        data = target.mutate(rng.choice(seeds), rng)
        if error := target.attempt(data):
            faults.setdefault(describe(error), data)
    assert not faults


@pytest.mark.filterwarnings("ignore")  # of onnx, about keys it does not know
@pytest.mark.parametrize("name", TARGETS)
def test_changes_get_past_the_first_check(name: str) -> None:
    """Some changed files are read to the end, and some are not."""
    target, rng = TARGETS[name], seeded(0)
    seeds, refused = target.seeds(), 0
    for _ in range(60):
        try:
            target.read(target.mutate(rng.choice(seeds), rng))
        except ToolError:
            refused += 1
    assert 0 < refused < 60


def test_the_same_seed_makes_the_same_changes() -> None:
    for target in TARGETS.values():
        seed = target.seeds()[0]
        one, other = ([target.mutate(seed, rng) for _ in range(5)] for rng in (seeded(1), seeded(1)))
        assert one == other != [seed] * 5


@pytest.mark.parametrize("error", [ValueError, MemoryError, RecursionError, SystemExit, BaseException])
def test_any_other_error_than_ours_is_a_finding(error: type[BaseException]) -> None:
    def read(data: bytes) -> None:
        raise error("told")

    found = Target(read, list, scramble).attempt(b"")
    assert type(found) is error
    assert describe(found).startswith(f"{error.__name__} in test_fuzz.py:")


def test_our_own_error_is_none() -> None:
    def read(data: bytes) -> None:
        raise ToolError("damaged")

    assert Target(read, list, scramble).attempt(b"") is None


def test_findings_are_kept_one_for_each_kind_and_crashes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deadly = b"E\n"
    inputs = [b"fine\n", b"X\n", b"XX\n", b"Z\n", deadly]
    monkeypatch.setitem(TARGETS, "csv", Target(TARGETS["csv"].read, lambda: inputs, scramble))
    outcome = pursue("csv", 1, keep=tmp_path, child=fuzz.PLAIN + BROKEN)
    kept = {path.name: path.read_bytes() for path in (tmp_path / "csv").iterdir()}
    said = sorted(outcome.findings.values())
    assert kept.keys() == outcome.findings.keys()
    assert [what.partition(" ")[0] for what in said] == ["KeyError", "ValueError", "crash:"]
    assert kept[name_of(deadly)] == deadly
    assert outcome.executions > 100  # a new child went on after the first died
