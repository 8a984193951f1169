"""Drafts and folders of runs that are gone are removed, those of running ones are not."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from shared.files import atomic
from shared.files.atomic import draft_beside, workspace


def test_drafts_of_dead_processes_are_cleared_away_and_others_left(tmp_path: Path) -> None:
    here = atomic._scope()
    names = [f"{here}-999999999", f"{here}-{os.getppid()}", "0123abcd-999999999", "0123abcd-999999998"]
    dead, alive, elsewhere, old = (tmp_path / f".out.txt.{name}.partial" for name in names)
    for path in (dead, alive, elsewhere, old):
        path.touch()
    os.utime(old, (time.time() - 2 * atomic.ABANDONED_S,) * 2)
    with draft_beside(tmp_path / "out.txt"):
        pass
    left = [path.exists() for path in (dead, alive, elsewhere, old)]
    assert left == [False, True, True, False], "another machine's or container's process may be alive for a day"


def test_folders_that_killed_runs_left_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    stale, running = tmp_path / f"edgepress-{ended.pid}-a", tmp_path / f"edgepress-{os.getppid()}-a"
    stale.mkdir()
    running.mkdir()
    photos = tmp_path / "edgepress-my-photos"
    photos.mkdir()
    with workspace() as folder:
        assert folder.parent == tmp_path
        assert folder.name.startswith(f"edgepress-{os.getpid()}-")
    assert sorted(tmp_path.iterdir()) == [running, photos]


def test_weights_of_drafts_of_dead_processes_are_cleared_away(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = [f".m.onnx.{atomic._scope()}-{pid}.partial.data" for pid in (ended.pid, os.getppid())]
    stale, running = (tmp_path / name for name in names)
    for path in (stale, running):
        path.touch()
    with draft_beside(tmp_path / "m.onnx"):
        assert not stale.exists()
        assert running.exists()


def test_a_killed_process_that_nobody_has_asked_about_is_not_running(tmp_path: Path) -> None:
    zombie = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert zombie.stdout is not None
    zombie.stdout.read()  # it has ended, but for its number
    deadline = time.monotonic() + 10
    while atomic._is_running(str(zombie.pid)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not atomic._is_running(str(zombie.pid))
    os.kill(zombie.pid, 0)  # the number is still taken
    zombie.communicate()
