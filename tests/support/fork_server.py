"""Run tools as their users do, hundreds of times, without waiting for imports: a process that has imported all forks for each call.

The fork runs `shared.command.cli.run`, the whole command: watched by a parent, with its exit code, stdout and stderr. As root on
Linux it has no network. `python -m tests.support.fork_server` is the process; `ForkServer` talks to it.
"""

import contextlib
import ctypes
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import noxfile

ROOT = Path(__file__).resolve().parent.parent.parent
LIBRARIES = ("torch", "onnx", "onnxruntime", "ai_edge_litert.interpreter", "ai_edge_litert.schema_py_generated", "cv2", "PIL.Image")
CLONE_NEWNET = 0x40000000  # unshare(2)


@dataclass(frozen=True)
class Done:
    """How a call ended."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    peak_rss_bytes: int


class ForkServer:
    """The process that forks; use with `with`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.support.fork_server"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def run(
        self,
        tool: str,
        *arguments: str | Path,
        folder: Path,
        env: Mapping[str, str] | None = None,
        patch: str = "",
        kill_after_s: float | None = None,
    ) -> Done:
        """Run a tool in a folder and return how it ended.

        Args:
            tool: Its name.
            arguments: Its command line.
            folder: Where it runs; what it prints is kept in files beside that folder.
            env: Further environment variables.
            patch: Name of a function of `tests.support.faults` and its arguments as JSON, such as 'kill_at [3]', called before the
                tool: it makes faults.
            kill_after_s: Send SIGKILL to the tool's process after this time; its code is then -9.
        """
        outputs = [folder.with_name(f"{folder.name}.{stream}") for stream in ("stdout", "stderr")]
        order = {"tool": tool, "arguments": [os.fsdecode(a) for a in arguments], "folder": str(folder), "env": dict(env or {})}
        order |= {"outputs": [str(path) for path in outputs], "patch": patch, "kill_after_s": kill_after_s}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        reply = json.loads(self._process.stdout.readline())
        stdout, stderr = (path.read_text(encoding="utf-8", errors="replace") for path in outputs)
        return Done(reply["code"], stdout, stderr, reply["seconds"], reply["peak_rss_bytes"])


def _serve() -> None:
    for library in LIBRARIES:
        importlib.import_module(library)
    benchmark: Any = importlib.import_module("shared.runtime.benchmark")
    benchmark.BUDGET_S = 0.0  # models are timed a few times only
    tools: dict[str, Callable[..., Any]] = {name: getattr(importlib.import_module(f"tools.{name}"), name) for name in noxfile.TOOLS}
    for line in sys.stdin:
        order = json.loads(line)
        start = time.monotonic()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        child = os.fork()
        if child == 0:
            _become(tools[order["tool"]], order)
        if order["kill_after_s"] is not None:
            _kill_after(child, order["kill_after_s"])
        _, status = os.waitpid(child, 0)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        code = os.waitstatus_to_exitcode(status)
        peak = after.ru_maxrss * 1024 if after.ru_maxrss > before.ru_maxrss else 0  # the largest so far hides smaller ones
        sys.stdout.write(json.dumps({"code": code, "seconds": time.monotonic() - start, "peak_rss_bytes": peak}) + "\n")
        sys.stdout.flush()


def _kill_after(child: int, seconds: float) -> None:
    """Wait, unless the child ends before, then kill it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.001)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)


def _become(tool: Callable[..., Any], order: Mapping[str, Any]) -> None:
    """Be the command: never returns."""
    from shared.command.cli import run

    os.chdir(order["folder"])
    os.environ.update(order["env"])
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for number, path in enumerate(order["outputs"], start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    ctypes.CDLL(None).unshare(CLONE_NEWNET)  # fails where that needs rights that we lack
    sys.argv = [f"tools.{order['tool']}", *order["arguments"]]
    try:
        if order["patch"]:
            name, _, arguments = order["patch"].partition(" ")
            getattr(importlib.import_module("tests.support.faults"), name)(*json.loads(arguments or "[]"))
        run(tool)
    except SystemExit as done:
        sys.stdout.flush()
        os._exit(done.code if isinstance(done.code, int) else 1)
    except BaseException:  # noqa: BLE001 - as Python itself ends
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(1)


def stray(folder: Path) -> Sequence[str]:
    """Return the names of drafts that lie in a folder or below."""
    return sorted(path.name for path in folder.rglob("*") if ".partial" in path.name)


if __name__ == "__main__":
    _serve()
