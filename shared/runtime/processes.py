"""Work in a process of its own: memory is given back, noise is caught, and a crash becomes one error.

Parent and child exchange messages over pipes: a line of JSON, then the raw bytes of the arrays it announces. Neither side
unpickles anything the other sent.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from shared.command.errors import ToolError, of_disk, one_line, plain_reason
from shared.command.resources import peak_rss_bytes
from shared.command.watchdog import PARENT, die_with_parent
from shared.files.code_version import ROOT

Arrays = Mapping[str, NDArray[Any]]
Message = dict[str, Any]
Handler = Callable[[Message, Arrays], tuple[Message, Arrays]]

LOG_TAIL = 200  # characters of a crashed child's last line that go into the error


class ChildError(Exception):
    """What was asked for failed in the child, or the child crashed, hung or was killed."""


class Child:
    """A Python process that answers messages through a module's function `handle`.

    Args:
        module: A module of this project with a function `handle`, see `Handler`.
        timeout_s: Limit for each answer.
    """

    def __init__(self, module: ModuleType, timeout_s: float) -> None:
        self.peak_rss_bytes = 0
        self._timeout_s = timeout_s
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - closed in close()
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, module.__name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": path, PARENT: str(os.getpid())},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(OSError):  # what was not sent can't be flushed any more
                assert stream is not None
                stream.close()

    def ask(self, message: Message, arrays: Arrays | None = None) -> tuple[Message, dict[str, NDArray[Any]]]:
        """Send one message and return the answer.

        Raises:
            ToolError: Raised by the handler in the child.
            ChildError: Anything else that went wrong there.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self._process.kill()

        watchdog = threading.Timer(self._timeout_s, expire)
        watchdog.start()
        try:
            _send(self._process.stdin, message, arrays or {})
            reply, results = _receive(self._process.stdout)
        except (OSError, EOFError):
            code = self._process.wait()
            if expired.is_set():
                raise ChildError(f"no answer within {self._timeout_s:.0f} s") from None
            raise ChildError(self._death(code)) from None
        finally:
            watchdog.cancel()
        self.peak_rss_bytes = reply["peak_rss_bytes"]
        if "tool_error" in reply:
            raise ToolError.of_parts(reply["tool_error"])
        if "error" in reply:
            raise ChildError(one_line(reply["error"]))
        return reply, results

    def _death(self, code: int) -> str:
        """Say how the process ended, with the last line it wrote."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        last = f": {one_line(lines[-1])[:LOG_TAIL]}" if lines else ""
        if code == -signal.SIGKILL:
            return "its process was killed, probably out of memory"
        if code == -signal.SIGBUS:
            return "its process crashed with SIGBUS: the disk is full, or a file that it had mapped became shorter"
        return (
            f"its process crashed with {signal.Signals(-code).name}{last}" if code < 0 else f"its process ended with {code}{last}"
        )


class Workspace:
    """A folder for the intermediate files of one model, and a process that works in it; use with `with`.

    Args:
        folder: An empty folder.
        worker: A module whose `handle` is made by `answer_tasks`.
        timeout_s: Limit for each task.
    """

    def __init__(self, folder: Path, worker: ModuleType, timeout_s: float) -> None:
        self.folder = folder
        self.peak_rss_bytes = 0
        self._worker, self._timeout_s = worker, timeout_s
        self._child: Child | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.restart()

    def _is_inside(self, error: ToolError) -> bool:
        return error.parts.get("where", "").startswith(str(self.folder))

    def restart(self) -> None:
        """End the process, which gives its memory back; the next task starts another."""
        if self._child is not None:
            self._child.__exit__()
            self._child = None

    def run(self, task: str, failure: str, where: Path | str, **arguments: Any) -> Message:
        """Do one task of the worker and return its reply.

        Args:
            task: Name of the task.
            failure: What to say where the process fails.
            where: The model it is about.
            arguments: The task's own, JSON values only.

        Raises:
            ToolError: Raised by the task, or its process crashed or hung.
        """
        if self._child is None:
            self._child = Child(self._worker, self._timeout_s)
        try:
            reply, _ = self._child.ask({"task": task, **arguments})
        except ChildError as error:
            raise ToolError(failure, where=where, got=str(error).replace(f"{self.folder}/", "")) from None
        except ToolError as error:  # of an intermediate file, whose name says nothing to the user
            raise error.moved_to(where) if self._is_inside(error) else error from None
        self.peak_rss_bytes = max(self.peak_rss_bytes, self._child.peak_rss_bytes)
        return reply


def answer_tasks(tasks: Mapping[str, Callable[..., Message]]) -> Handler:
    """Return a handler that does tasks by their names: {"task": name, the task's arguments}."""

    def handle(message: Message, _: Arrays) -> tuple[Message, Arrays]:
        return dict(tasks[message.pop("task")](**message)), {}

    return handle


def serve(handler: Handler) -> None:
    """Answer messages on stdin until it ends; what libraries print goes to stderr, answers alone to the real stdout."""
    die_with_parent()
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        while True:
            message, arrays = _receive(sys.stdin.buffer)
            results: Arrays = {}
            try:
                reply, results = handler(message, arrays)
            except ToolError as error:
                reply = {"tool_error": error.parts}
            except Exception as error:  # noqa: BLE001 - the parent decides what it means; the traceback stays in the log
                with contextlib.suppress(OSError):  # the disk that is full may be the one of the log
                    traceback.print_exc()
                full = of_disk(error)
                reply = {"tool_error": full.parts} if full else {"error": plain_reason(error)}
            _send(replies, {**reply, "peak_rss_bytes": peak_rss_bytes()}, results)


def _send(stream: IO[bytes], message: Message, arrays: Arrays) -> None:
    solid = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    heads = [[name, array.dtype.str, list(array.shape)] for name, array in solid.items()]
    stream.write(json.dumps({"message": message, "arrays": heads}).encode() + b"\n")
    for array in solid.values():
        stream.write(array.tobytes())
    stream.flush()


def _receive(stream: IO[bytes]) -> tuple[Message, dict[str, NDArray[Any]]]:
    """Read one message; EOFError when the other side is gone."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    head = json.loads(line)
    arrays = {}
    for name, dtype, shape in head["arrays"]:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        data = stream.read(size)
        if len(data) < size:
            raise EOFError
        arrays[name] = np.frombuffer(data, dtype).reshape(shape)
    return head["message"], arrays


if __name__ == "__main__":
    serve(importlib.import_module(sys.argv[1]).handle)
