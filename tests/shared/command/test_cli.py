"""One wrapper for all tools: results, errors, exit codes."""

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from shared.command.cli import to_json
from shared.command.errors import ToolError
from shared.command.resources import size_text
from tests.conftest import ROOT

PRETENDED_TOOL = """
    import sys, time
    from dataclasses import dataclass
    from pathlib import Path
    from typing import Annotated
    import typer
    from shared.command.cli import run, step, warn
    from shared.command.errors import ToolError

    @dataclass(frozen=True)
    class Result:
        path: Path
        value: float
        ok: bool = True

        def __rich__(self):
            return f"value {self.value}" + (" of a[/b].pth [int8]" if self.value == 7 else "")

    def pretend(kind: str, *, value: float = 1.0) -> Result:
        '''Pretend to work.'''
        with step("working"):
            if kind == "tool":
                raise ToolError("it broke", where="file.pth", got=1, expected=2, remedy="try again")
            if kind == "newline":
                raise ToolError("a name with\\nerror: a forged line")
            if kind == "bug":
                raise LookupError("a bug")
            if kind == "full":
                raise OSError(28, "No space left on device", "out.bin")
            if kind == "package":
                import a_package_of_nobody
            if kind == "memory":
                raise MemoryError
            if kind == "wait":
                print("ready", flush=True)
                time.sleep(60)
        print("noise", file=sys.stderr) if kind == "noise" else None
        return Result(Path("x"), float("nan") if kind == "nan" else value, ok=kind != "failed")

    if __name__ == "__main__":
        run(pretend)
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    (tmp_path / "pretend.py").write_text(textwrap.dedent(PRETENDED_TOOL))
    return [sys.executable, str(tmp_path / "pretend.py")]


def call(command: list[str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)}, timeout=60
    )


def test_a_result_goes_to_stdout_and_nothing_to_stderr(command: list[str]) -> None:
    done = call(command, "fine", "--value", "2.5")
    assert (done.returncode, done.stdout, done.stderr) == (0, "value 2.5\n", "")


def test_brackets_in_names_are_no_markup(command: list[str]) -> None:
    assert call(command, "fine", "--value", "7").stdout == "value 7.0 of a[/b].pth [int8]\n"


def test_json_prints_one_object_and_nothing_else(command: list[str]) -> None:
    done = call(command, "fine", "--json")
    assert json.loads(done.stdout) == {"path": "x", "value": 1.0, "ok": True}
    assert done.stdout.count("\n") == 1


def test_a_failed_check_exits_1_with_its_result(command: list[str]) -> None:
    done = call(command, "failed", "--json")
    assert (done.returncode, json.loads(done.stdout)["ok"]) == (1, False)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["tool"], "error: file.pth: it broke; got 1; expected 2; try again\n"),
        (["newline"], "error: a name with\\nerror: a forged line\n"),
        (["full"], "error: out.bin: the disk is full, or a quota or size limit is reached; free some space, or write elsewhere\n"),
        (
            ["package"],
            (
                "error: package a_package_of_nobody is not installed; "
                "pip install --constraint constraints.txt --editable '.[pretend]'\n"
            ),
        ),
        (["memory"], "error: out of memory; close other programs or use a larger machine\n"),
        (["fine", "--colour"], "error: No such option: --colour; see --help\n"),
        ([], "error: Missing argument 'KIND'; see --help\n"),
        (
            ["fine", "--value", "much"],
            "error: Invalid value for '--value': Input should be a valid number, unable to parse string as a number; see --help\n",
        ),
    ],
)
def test_what_could_not_run_is_one_line_and_exit_2(command: list[str], arguments: list[str], line: str) -> None:
    done = call(command, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.lower() == line.lower()


def test_a_bug_keeps_its_traceback(command: list[str]) -> None:
    done = call(command, "bug")
    assert done.returncode == 1
    assert "LookupError: a bug" in done.stderr


def test_nan_is_never_written_as_json(command: list[str]) -> None:
    done = call(command, "nan", "--json")
    assert done.returncode != 0
    assert done.stdout == ""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_interruptions_have_their_codes(command: list[str], sent: signal.Signals, code: int) -> None:
    process = subprocess.Popen(
        [*command, "wait"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(sent)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (code, "error: interrupted; what was finished is kept, and nothing half-written\n")


def test_sizes_are_in_binary_units() -> None:
    assert [size_text(n) for n in (12, 2048, 3 * 2**20, 2950 * 2**20)] == ["12 B", "2.0 KiB", "3.0 MiB", "2950.0 MiB"]


def test_what_is_no_json_is_an_error() -> None:
    from dataclasses import dataclass

    @dataclass
    class Odd:
        value: object

    with pytest.raises(TypeError):
        to_json(Odd(object()))


def test_a_tool_error_escapes_control_characters() -> None:
    assert str(ToolError("bad name", where="a\x1b[31m\nb")) == "a\\x1b[31m\\nb: bad name"
