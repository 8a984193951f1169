"""Drafts of files next to their final names, folders for work, and what makes a rename last.

A run that was killed leaves its draft; the next run removes it.
"""

import contextlib
import fcntl
import functools
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from shared.command.errors import ToolError, of_disk
from shared.command.watchdog import temporary

WORKSPACE = "edgepress"
ABANDONED_S = 86400


@contextlib.contextmanager
def draft_beside(output: Path) -> Iterator[Path]:
    """Yield a fresh file in the output's folder; it is gone afterwards unless it was renamed.

    Raises:
        ToolError: The folder is missing or not writable.
    """
    draft = output.with_name(f".{output.name}.{_scope()}-{os.getpid()}.partial")
    for stale in abandoned_drafts(output):
        stale.unlink(missing_ok=True)
    with temporary(draft, draft.with_name(f"{draft.name}.data")):  # weights that an exporter put next to it
        try:
            draft.touch()
        except OSError as error:
            if (full := of_disk(error)) is not None:
                raise full from None
            raise ToolError(
                f"cannot write here: {error.strerror}", where=output.parent, remedy="create the folder or choose another with -o"
            ) from None
        yield draft


def abandoned_drafts(output: Path) -> list[Path]:
    """Return the drafts of a file, and what an exporter put next to them, that runs which are gone have left."""
    return [draft for draft in output.parent.glob(f".{glob.escape(output.name)}.*.partial*") if is_abandoned(draft)]


@contextlib.contextmanager
def kept_aside(paths: Iterable[Path]) -> Iterator[None]:
    """Put files back that are gone when the work fails; a second name keeps each meanwhile, where the file system has such."""
    asides = {path: path.with_name(f".{path.name}.{_scope()}-{os.getpid()}.partial.kept") for path in paths if path.is_file()}
    with temporary(*asides.values()):
        for path, aside in asides.items():
            with contextlib.suppress(OSError):
                os.link(path, aside)
        try:
            yield
        except BaseException:
            for path, aside in asides.items():
                if aside.exists() and not path.exists():
                    aside.replace(path)
            raise


@contextlib.contextmanager
def begun(output: Path, note: str) -> Iterator[None]:
    """Leave a mark with a note next to a file while several are written; a run that is killed leaves it."""
    mark = output.with_name(f".{output.name}.{_scope()}-{os.getpid()}.begun")
    try:
        mark.write_text(note, encoding="utf-8")
        yield
    finally:
        mark.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Make a folder, with its parents, where there is none; if the work fails and leaves it empty, remove it again."""
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def abandoned_marks(output: Path) -> list[Path]:
    """Return the marks that runs which are gone have left next to a file."""
    return [mark for mark in output.parent.glob(f".{glob.escape(output.name)}.*.begun") if is_abandoned(mark)]


def is_abandoned(draft: Path) -> bool:
    """Return whether the run that wrote a draft or mark is gone; of another machine or container, after a day."""
    scope, _, process = re.split(r"\.(?:partial|begun)", draft.name)[0].rpartition(".")[2].rpartition("-")
    if scope == _scope():
        return not _is_running(process)
    try:
        return time.time() - draft.stat().st_mtime > ABANDONED_S
    except FileNotFoundError:
        return False


@functools.cache
def _scope() -> str:
    """Return what tells this machine and container from others, whose processes may have the same numbers."""
    names = Path("/proc/self/ns/pid")
    place = names.readlink() if names.is_symlink() else ""
    return hashlib.sha256(f"{os.uname().nodename} {place}".encode()).hexdigest()[:8]


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """Yield a temporary folder; those that killed runs left are removed first."""
    for stale in Path(tempfile.gettempdir()).glob(f"{WORKSPACE}-*-*"):
        pid = stale.name.split("-")[1]
        if pid.isdigit() and not _is_running(pid):  # others may call their folders something like it
            shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{WORKSPACE}-{os.getpid()}-") as folder:
        yield Path(folder)


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:1]
    except OSError:  # no Linux
        return True
    return state != ["Z"]  # a killed process that nobody has asked about, as in containers without an init


@contextlib.contextmanager
def alone_in(folder: Path, waits: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Wait until no other run holds a folder, having called `waits` if one does, and hold it, no longer than this process lives."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waits()
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def identity(path: Path) -> tuple[int, int] | None:
    """Return inode and ctime of what stands at a path, None where nothing does."""
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_ino, status.st_ctime_ns


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, unless it holds that content already."""
    if not path.is_file() or path.read_bytes() != content:
        with draft_beside(path) as draft:
            draft.write_bytes(content)
            draft.replace(path)


def write_json(path: Path, content: object) -> None:
    """Write JSON values as a file, whole or not at all; NaN is an error."""
    with draft_beside(path) as draft:
        draft.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        sync(draft)
        draft.replace(path)


def sync(path: Path) -> None:
    """Wait until the file, or the folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some file systems refuse it for folders
        if not path.is_dir():
            raise
    finally:
        os.close(handle)
