"""Faults that tests make in a tool's process before the tool runs: the functions that `ForkServer.run` names as its `patch`.

A tool's own work is done by a child of that process. Steps are counted there: files opened for writing, renamed, removed and
synced, and folders made and removed, all but what lies in /proc and the like.
"""

import contextlib
import errno
import io
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
GROWING = ("os.mkdir",)
CHANGING = ("os.rename", "os.truncate", "os.remove", "os.rmdir", *GROWING)
NO_DISK = ("/proc/", "/dev/", "/sys/")
MUCH_BYTES = 10**15

Act = Callable[[int, str], None]


def kill_at(number: int, only_worker: bool = False) -> None:
    """Kill the tool before its n-th step, as `kill -9` does; or only the process that works, as the system does without memory."""
    watcher = os.getpid()

    def act(count: int, _: str) -> None:
        if count == number:
            if not only_worker:
                os.kill(watcher, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    _before_steps(act, CHANGING)


def fail_at(number: int, code: int = errno.ENOSPC) -> None:
    """Let the n-th step that takes room on the disk fail, and all that follow; files can still be renamed and removed."""

    def act(count: int, path: str) -> None:
        if count >= number:
            raise OSError(code, os.strerror(code), path)

    plenty_of_disk()
    _before_steps(act, GROWING)


def count_steps(notes: str) -> None:
    """Write down the steps of a tool that nothing disturbs."""
    handle = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    _before_steps(lambda _, path: os.write(handle, os.fsencode(path) + b"\n") and None, CHANGING)


def signal_after(number: int, seconds: float) -> None:
    """Send the tool a signal after some time."""
    tool = os.getpid()
    if os.fork() == 0:
        time.sleep(seconds)
        if os.getppid() == tool:
            os.kill(tool, number)
        os._exit(0)


def signal_within(step: int, number: int) -> None:
    """Send the tool a signal that arrives while its n-th step is taken: the step is done, and what called it never hears of it."""

    def act(count: int, _: str) -> None:
        if count == step:
            os.kill(os.getpid(), number)

    _after_steps(act)


def count_within(notes: str) -> None:
    """Write down the steps of `signal_within` of a tool that nothing disturbs."""
    handle = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    _after_steps(lambda _, what: os.write(handle, what.encode() + b"\n") and None)


def _after_steps(act: Act) -> None:
    """Call `act` with number and name after each step of the process that works: files changed, our contexts begun, or ending."""
    watcher, count = os.getpid(), 0

    def step(what: str) -> None:
        nonlocal count
        if os.getpid() != watcher:
            count += 1
            act(count, what)

    def followed(name: str, function: Callable[..., Any], is_step: Callable[..., bool]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            result = function(*arguments, **named)
            if is_step(*arguments, **named):
                step(f"{name} {arguments[0]}")
            return result

        return call

    def on_disk(path: Any, *_: Any, **__: Any) -> bool:
        return isinstance(path, int) or not os.path.abspath(os.fsdecode(path)).startswith(NO_DISK)  # noqa: PTH100

    def writes(path: Any, mode: int | str = "r", *_: Any, **__: Any) -> bool:
        return on_disk(path) and bool(mode & WRITING if isinstance(mode, int) else set(mode) & set("wax+"))

    for name in ("rename", "replace", "unlink", "remove", "mkdir", "rmdir", "fsync", "link"):
        setattr(os, name, followed(name, getattr(os, name), on_disk))
    os.open, io.open = followed("os.open", os.open, writes), followed("open", io.open, writes)
    manager = contextlib._GeneratorContextManager  # the class of all that @contextlib.contextmanager makes
    enter, leave = manager.__enter__, manager.__exit__

    def step_of_ours(what: str, context: Any) -> None:
        if Path(context.gen.gi_code.co_filename).parent.name == "shared":
            step(f"{what} {context.gen.gi_code.co_name}")

    def entered(self: Any) -> Any:
        result = enter(self)
        step_of_ours("begin", self)
        return result

    def left(self: Any, *error: Any) -> Any:
        step_of_ours("end", self)
        return leave(self, *error)

    manager.__enter__, manager.__exit__ = entered, left  # type: ignore[method-assign]


def plenty_of_disk() -> None:
    """Let the system say that there is room, so that the disk is full only when it is written to."""
    usage = shutil.disk_usage("/")
    shutil.disk_usage = lambda _: type(usage)(MUCH_BYTES, 0, MUCH_BYTES)  # type: ignore[assignment]
    fresh_tempdir()


def fresh_tempdir() -> None:
    """Look again for the folder of temporary files: TMPDIR may have changed since the process was made."""
    tempfile.tempdir = None


def limit_file_size(most_bytes: int) -> None:
    """Let no file become larger, not even by a child's hand; what is printed passes."""
    plenty_of_disk()
    _print_through_pipes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))


def _print_through_pipes() -> None:
    """Have other processes write what is printed, and wait for them at the end."""
    helpers = []
    for stream in (1, 2):
        target, (incoming, outgoing) = os.dup(stream), os.pipe()
        helper = os.fork()
        if helper == 0:
            for handle in (1, 2, outgoing):
                os.close(handle)
            while piece := os.read(incoming, 65536):
                os.write(target, piece)
            os._exit(0)
        os.dup2(outgoing, stream)
        for handle in (target, incoming, outgoing):
            os.close(handle)
        helpers.append(helper)
    sys.stdout, sys.stderr = (open(stream, "w", 1, encoding="utf-8", closefd=False) for stream in (1, 2))  # noqa: SIM115
    leave = os._exit

    def leave_last(code: int) -> NoReturn:
        os.close(1)
        os.close(2)
        for helper in helpers:
            with contextlib.suppress(ChildProcessError):  # in the child
                os.waitpid(helper, 0)
        leave(code)

    os._exit = leave_last


def _before_steps(act: Act, events: tuple[str, ...]) -> None:
    """Call `act` with number and path before each step of the process that works."""
    watcher, count = os.getpid(), 0
    sync = os.fsync

    def step(path: Any) -> None:
        nonlocal count
        if os.getpid() == watcher or isinstance(path, int):
            return
        where = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 - a link is itself changed
        if not where.startswith(NO_DISK) and "__pycache__" not in where:
            count += 1
            act(count, where)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if (event == "open" and arguments[2] & WRITING) or event in events:
            step(arguments[0])

    def synced(handle: int) -> None:
        link = Path(f"/proc/self/fd/{handle}")
        step(str(link.readlink()) if link.is_symlink() else f"descriptor {handle}")
        sync(handle)

    os.fsync = synced
    sys.addaudithook(hook)
