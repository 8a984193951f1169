"""Strangers' files: each gets the right exit code and one line with a remedy, and nothing is written, executed or fetched."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import TABLE, Small
from tests.support.bad_inputs import CANARY, SECRET, Case, Good, cases, make_good
from tests.support.fork_server import Done, ForkServer, stray

MOST_CHARACTERS = 900  # of an error's line; keys that don't fit are listed all
MOST_RSS_BYTES = 2 * 10**9
MOST_SECONDS = 60
PARTS = 8


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, float_model: Path, videoseal_small: Small) -> Good:
    return make_good(tmp_path_factory.mktemp("good"), float_model, videoseal_small.card, videoseal_small.checkpoint)


def hashes(folder: Path) -> dict[str, str]:
    """Return what each regular file below a folder holds."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def faults_of(case: Case, done: Done, folder: Path, before: dict[str, str]) -> Iterator[str]:
    """Yield what is wrong with how a tool took a case."""
    after = hashes(folder)
    if done.code != case.code:
        yield f"exit code {done.code} instead of {case.code}: {done.stderr[-300:]}"
    if "Traceback" in done.stderr + done.stdout:
        yield "a traceback"
    reported = done.stderr + done.stdout
    if case.says and not re.search(case.says, reported, re.DOTALL):
        yield f"{case.says!r} is not in {reported[-400:]!r}"
    if done.code == 2:
        yield from _faults_of_line(done)
        if after != before:
            yield f"written: {sorted(after.items() ^ before.items())}"
    lost = [name for name, content in before.items() if after.get(name) != content]
    if lost and case.row != "X14":
        yield f"changed: {lost}"
    if stray(folder) and case.row != "X14":
        yield f"left behind: {stray(folder)}"
    if any(CANARY in name for name in after):
        yield "EXECUTED"
    if SECRET in reported or any(SECRET.encode() in (folder / name).read_bytes() for name in after.keys() - before.keys()):
        yield "the secret is told"
    if done.peak_rss_bytes > MOST_RSS_BYTES or done.seconds > MOST_SECONDS:
        yield f"took {done.peak_rss_bytes / 1e9:.1f} GB and {done.seconds:.0f} s"


def _faults_of_line(done: Done) -> Iterator[str]:
    """Yield what is wrong with how an error was told."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    if len(lines) != 1 or not lines[0].startswith("error: "):
        yield f"not one line: {done.stderr!r}"
    elif len(lines[0]) > MOST_CHARACTERS or not lines[0].isprintable():
        yield f"a line of {len(lines[0])} characters, or with control characters"
    error = json.loads(done.stdout)["error"] if done.stdout.startswith("{") else {}
    if not error.get("remedy"):
        yield f"no remedy: {done.stderr!r}"


@pytest.mark.parametrize("part", range(PARTS))
def test_every_bad_input_gets_what_it_must(
    part: int,
    good: Good,
    fork_server: ForkServer,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """The whole corpus, as a table; every PARTS-th case of it, so that the workers of pytest share it."""
    wrong: list[str] = []
    for number, case in enumerate(cases(good)[part::PARTS]):
        folder = tmp_path / f"{number}" / "in"
        (folder / "out").mkdir(parents=True)
        (folder / "victim.txt").write_text("precious")
        (folder.parent / "secret.txt").write_text(SECRET)
        for name, content in case.before.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        arguments = case.arguments(folder)
        before = hashes(folder)
        done = fork_server.run(case.tool, *arguments, "--json", folder=folder, env=case.env)
        faults = list(faults_of(case, done, folder, before))
        line = next((line for line in done.stderr.splitlines() if line.startswith("error:")), "")
        record_property(TABLE, (case.row, case.tool, case.name, str(done.code), "ok" if not faults else "WRONG", line[:110]))
        wrong += [f"{case.id}: {fault}" for fault in faults]
    assert not wrong, f"{len(wrong)} faults:\n" + "\n".join(wrong)


def test_the_corpus_covers_every_tool(good: Good) -> None:
    corpus = cases(good)
    assert len({case.row for case in corpus if not case.row.startswith("T")}) >= 100
    assert {case.tool for case in corpus} == {
        "extract_weights",
        "convert_detector",
        "quantize_tflite",
        "quantize_onnx",
        "prepare_calibration",
        "verify",
        "compare",
    }


def test_what_a_tool_does_wrong_is_found(good: Good, fork_server: ForkServer, tmp_path: Path) -> None:
    """The judge itself: a product that was written although the tool refused, a wrong code, a canary."""
    folder = tmp_path / "in"
    folder.mkdir()
    case = Case("X22", "an error", "verify", lambda _: ["absent.tflite"], 0, "another text")
    before = hashes(folder)
    done = fork_server.run("verify", "absent.tflite", "--json", folder=folder)
    (folder / CANARY).write_text(SECRET)
    found = " ".join(faults_of(case, done, folder, before))
    for fault in ("exit code 2 instead of 0", "is not in", "written", "EXECUTED", "the secret is told"):
        assert fault in found
