"""A tool works in a child process while its parent watches: a crash, a hang or a memory blow-up becomes one line and an exit code.

Parsers of images, videos, models and checkpoints are native code, and what they read is of unknown origin. Before they read, the
child says so (`reading`); the parent ends it when that takes too long or too much memory, tells which file it was when the child
dies, and removes what it left half-written. In a script that calls the tools as functions, nobody watches and nothing is said.
"""

import atexit
import contextlib
import ctypes
import gc
import glob
import json
import os
import selectors
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from shared.command.errors import one_line
from shared.command.limits import GB, limit

TICK_S = 0.1  # between two looks at a child that reads
SLOWEST_BYTES_PER_S = 20e6  # a large file gets so much more time
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
REPORT = "do not trust the file; if it should be fine, get it again, and report the crash (SECURITY.md)"
PARENT = "EDGEPRESS_PARENT"  # environment variable with the process id of a child's parent
PR_SET_PDEATHSIG = 1  # prctl(2): the signal this process gets when its parent dies


class _Wire:
    """The child's end of the pipe to its parent; None where nobody watches."""

    handle: ClassVar[int | None] = None
    files: ClassVar[list[tuple[str, float, float]]] = []  # what is being read: path, seconds, bytes of memory


def _send_note(**note: Any) -> None:
    if _Wire.handle is not None:
        with contextlib.suppress(BrokenPipeError):  # the parent was killed; this process ends with it
            os.write(_Wire.handle, json.dumps(note).encode() + b"\n")


def _send_reading() -> None:
    path, seconds, memory = _Wire.files[-1] if _Wire.files else ("", 0.0, 0.0)
    _send_note(reading=path, seconds=seconds, memory=memory)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[Callable[[], None]]:
    """Have the parent watch while a file is parsed; what is yielded is to be called when a long file goes on: time starts again."""
    size = path.stat().st_size if path.is_file() else 0
    seconds, memory = limit("read-seconds") + size / SLOWEST_BYTES_PER_S, limit("read-memory-gb") * GB + 2 * size
    _Wire.files.append((str(path), seconds, memory))
    _send_reading()
    try:
        yield _send_reading
    finally:
        _Wire.files.pop()
        _send_reading()


@contextlib.contextmanager
def temporary(*paths: Path) -> Iterator[None]:
    """Remove files at the end; where this process dies or is interrupted before, its parent does, with what is named after them."""
    for path in paths:
        _send_note(made=str(path))
    try:
        yield
    finally:
        for path in paths:
            with contextlib.suppress(OSError):
                path.unlink()
            _send_note(gone=str(path))


def supervise(work: Callable[[], NoReturn]) -> NoReturn:
    """Do the work in a child process, which ends with an exit code; exit with that code, or say in one line how the child died.

    The work begins with the signals of `FORWARDED` blocked, and unblocks them when it handles them.
    """
    parent, (incoming, outgoing) = os.getpid(), os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # until both know what to do with them
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's threads survive a fork: they are stopped before it and started anew
        gc.freeze()  # the collector would touch, and so copy, all that both share
        child = os.fork()
    if child == 0:
        os.close(incoming)
        _Wire.handle = outgoing
        _end_with(parent)
        _work_and_end(work)
    os.close(outgoing)
    for number in FORWARDED:
        signal.signal(number, lambda sent, _: _forward(sent, child))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    watch = _Watch(child)
    watch.follow(incoming)
    _, status = os.waitpid(child, 0)
    watch.clear_away()
    if os.WIFEXITED(status):
        os._exit(os.WEXITSTATUS(status))  # nothing was printed here, and nothing is open
    sys.stderr.write(("\x1b[?25h" if sys.stderr.isatty() else "") + f"error: {one_line(watch.death(os.WTERMSIG(status)))}\n")
    sys.exit(2)


def _work_and_end(work: Callable[[], NoReturn]) -> NoReturn:
    """Work, and end as Python does, but for taking apart all objects, which takes longer in a fork than most tools work."""
    code: object = 1
    try:
        work()
    except SystemExit as done:
        code = done.code
    except BaseException:  # noqa: BLE001 - as Python itself shows it
        sys.excepthook(*sys.exc_info())
    atexit._run_exitfuncs()  # noqa: SLF001 - no public name
    with contextlib.suppress(OSError):  # the reader is gone, or the disk is full: reported already
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def die_with_parent(parent: int | None = None) -> None:
    """Ask Linux to end this process with its parent, so that a killed tool leaves nobody writing.

    Args:
        parent: Process id of the parent; default: as `shared.runtime.processes.Child` says, or whoever it is now.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != (parent or int(os.environ.get(PARENT, os.getppid()))):  # it died before it could be asked for
            os._exit(1)


def _end_with(parent: int) -> None:
    """Let this process die when its parent is killed, and be the one that the system ends where memory runs out."""
    die_with_parent(parent)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("300", encoding="ascii")


def _forward(number: int, child: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)


class _Watch:
    """What the parent knows of its child."""

    def __init__(self, child: int) -> None:
        self._child = child
        self._reading, self._seconds, self._memory, self._since, self._before = "", 0.0, 0.0, 0.0, 0
        self._temporary: dict[str, None] = {}
        self._verdict = ""

    def follow(self, incoming: int) -> None:
        """Take the child's notes until it ends; end it where it reads too long, or takes too much memory."""
        rest = b""
        with selectors.DefaultSelector() as selector:
            selector.register(incoming, selectors.EVENT_READ)
            while True:
                if selector.select(TICK_S if self._reading else None):
                    if not (data := os.read(incoming, 65536)):
                        return
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        self._note(json.loads(line))
                elif self._reading:
                    self._check_limits()

    def _note(self, note: dict[str, Any]) -> None:
        if "reading" in note:
            if note["reading"] != self._reading:
                self._before = _anonymous_bytes(self._child)
            self._reading, self._seconds, self._memory = note["reading"], note["seconds"], note["memory"]
            self._since = time.monotonic()
        elif "made" in note:
            self._temporary[note["made"]] = None
        else:
            self._temporary.pop(note["gone"], None)

    def _check_limits(self) -> None:
        took = _anonymous_bytes(self._child) - self._before
        if time.monotonic() - self._since > self._seconds:
            self._verdict = f"reading took longer than {self._seconds:.0f} s; raise the limit with --limit read-seconds=VALUE"
        elif took > self._memory:
            self._verdict = f"reading took {took / GB:.1f} GB of memory; raise the limit with --limit read-memory-gb=VALUE"
        else:
            return
        os.kill(self._child, signal.SIGKILL)

    def clear_away(self) -> None:
        """Remove what the child left half-written."""
        for path in map(Path, self._temporary):
            for left in path.parent.glob(f"{glob.escape(path.name)}*"):
                with contextlib.suppress(OSError):
                    left.unlink()

    def death(self, number: int) -> str:
        """Say how the child ended."""
        where = f"{self._reading}: " if self._reading else ""
        if self._verdict:
            return f"{where}{self._verdict}"
        if number == signal.SIGKILL:
            return f"{where}the tool was killed, probably out of memory; close other programs or use a larger machine"
        name = signal.Signals(number).name
        if self._reading:
            return f"{where}this file crashed its parser ({name}); {REPORT}"
        return f"the tool crashed ({name}); please report it"


def _anonymous_bytes(process: int) -> int:
    """Return the memory of a process that no file backs; 0 where the system does not tell."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)
