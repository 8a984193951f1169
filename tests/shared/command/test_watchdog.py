"""A tool's parent tells how its child died, ends one that reads too long or takes too much, and clears away what it left."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

TOOL = """
    import atexit, contextlib, mmap, os, signal, time
    from pathlib import Path
    from shared.command.cli import run
    from shared.files.atomic import draft_beside
    from shared.command.watchdog import reading

    def pretend(kind: str, file: Path, *, out: Path = Path("out.bin")) -> str:
        '''Pretend to read a file.'''
        with draft_beside(out) as draft:
            draft.write_bytes(b"half")
            if kind == "crash outside":
                os.abort()
            if kind == "leave":
                os._exit(3)
            if kind == "linger":
                atexit.register(time.sleep, 2)
            with reading(file) as goes_on:
                if kind == "crash":
                    os.kill(os.getpid(), signal.SIGSEGV)
                if kind == "vanish":
                    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
                        os.truncate(file, 0)
                        content[0]
                if kind == "hang":
                    while True:
                        pass
                if kind == "slow":
                    for _ in range(8):
                        time.sleep(0.3)
                        goes_on()
                if kind == "eat":
                    eaten = []
                    while True:
                        eaten.append(b"x" * 10**7)
                        time.sleep(0.01)
                if kind == "wait":
                    print(os.getpid(), flush=True)
                    time.sleep(60)
        return "done"

    if __name__ == "__main__":
        run(pretend)
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    (tmp_path / "pretend.py").write_text(textwrap.dedent(TOOL))
    (tmp_path / "in.bin").write_bytes(b"x" * 5000)
    return [sys.executable, "-W", "ignore", str(tmp_path / "pretend.py")]


def call(command: list[str], *arguments: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, check=False, cwd=folder, env={"PYTHONPATH": str(ROOT)}, timeout=60
    )


def start(command: list[str], *arguments: str, folder: Path) -> "subprocess.Popen[str]":
    """Start the tool as a terminal does: in a process group of its own."""
    pipe = subprocess.PIPE
    env = {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, *arguments], stdout=pipe, stderr=pipe, text=True, cwd=folder, env=env, start_new_session=True
    )


@pytest.mark.parametrize(
    ("kind", "limits", "says"),
    [
        ("crash", [], "in.bin: this file crashed its parser (SIGSEGV); do not trust the file"),
        ("vanish", [], "in.bin: this file crashed its parser (SIGBUS)"),
        ("crash outside", [], "the tool crashed (SIGABRT); please report it"),
        (
            "hang",
            ["--limit", "read-seconds=0.5"],
            "in.bin: reading took longer than 1 s; raise the limit with --limit",
        ),
        ("eat", ["--limit", "read-memory-gb=0.2"], "GB of memory; raise the limit with --limit read-memory-gb"),
    ],
)
def test_a_child_that_dies_is_one_line_exit_2_and_leaves_nothing(
    command: list[str], tmp_path: Path, kind: str, limits: list[str], says: str
) -> None:
    done = call(command, kind, "in.bin", *limits, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.bin", "pretend.py"]


def test_a_child_that_leaves_at_once_leaves_nothing_behind(command: list[str], tmp_path: Path) -> None:
    done = call(command, "leave", "in.bin", folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.bin", "pretend.py"]


def test_an_interruption_after_all_is_reported_is_none(command: list[str], tmp_path: Path) -> None:
    process = start(command, "linger", "in.bin", folder=tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "done\n"
    time.sleep(0.2)  # between telling and not listening any more
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")


def test_a_long_file_that_goes_on_is_not_ended(command: list[str], tmp_path: Path) -> None:
    done = call(command, "slow", "in.bin", "--limit", "read-seconds=1", folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_the_tool_dies_with_its_parent(command: list[str], tmp_path: Path) -> None:
    process = start(command, "wait", "in.bin", folder=tmp_path)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    assert child != process.pid
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    pytest.fail("the tool lives on")


def test_a_second_interruption_does_not_disturb_the_first(command: list[str], tmp_path: Path) -> None:
    process = start(command, "wait", "in.bin", folder=tmp_path)
    assert process.stdout is not None
    process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: parent and child both get it, and the parent passes its own on
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors.count("error:")) == (130, 1)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("text", "says"),
    [("megapixels=none", "no such limit"), ("speed=3", "no such limit; got speed=3"), ("megapixels=-1", "no such limit")],
)
def test_a_limit_that_is_none_is_reported(command: list[str], tmp_path: Path, text: str, says: str) -> None:
    done = call(command, "fine", "in.bin", "--limit", text, folder=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr
