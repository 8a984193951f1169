"""Write files whole or not at all, hash them, keep their provenance beside them, and tell whether they are up to date.

Next to each product lies `<product>.json`: tool, arguments, inputs and output with sha256, versions, duration, peak memory and
what the tool found. A product is up to date when all of that still holds. A file whose size, times and inode are as recorded
is not hashed again: content can't change without one of them changing.
"""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from shared.errors import ToolError
from shared.machine import peak_rss_bytes

WORKSPACE = "edgepress"
ROOT = Path(__file__).resolve().parent.parent
Found = TypeVar("Found")


@dataclass(frozen=True)
class FileRecord:
    """A file's content, and the stat values under which it was hashed."""

    path: str
    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    sha256: str


@dataclass(frozen=True)
class Product:
    """A file a tool wrote, or found up to date; the size is that of all files it consists of."""

    path: Path
    size_bytes: int
    sha256: str
    seconds: float
    peak_rss_bytes: int
    up_to_date: bool = False


@dataclass(frozen=True)
class Plan:
    """What a tool is about to write, and everything that decides its bytes.

    Args:
        output: The file to write.
        tool: Name of the tool.
        arguments: What the user chose, JSON values only.
        inputs: Files that are read.
        packages: Distributions whose version matters.
        overwrite: Replace whatever is at `output`.
        refresh: Replace it if this project wrote it.
        companions: Returns the files in the output's folder that a product refers to, such as the weights of a large ONNX model.
    """

    output: Path
    tool: str
    arguments: Mapping[str, object]
    inputs: Sequence[Path] = ()
    packages: Sequence[str] = ()
    overwrite: bool = False
    refresh: bool = False
    companions: Callable[[Path], Sequence[Path]] = field(default=lambda _: ())


@dataclass(frozen=True)
class Provenance:
    """The content of `<product>.json`."""

    tool: str
    arguments: dict[str, Any]
    versions: dict[str, str]
    inputs: list[FileRecord]
    output: FileRecord
    replaces_sha256: str | None  # of the file that stood here before; tells our file from another's after a crash
    seconds: float
    peak_rss_bytes: int
    found: dict[str, Any] = field(default_factory=dict)
    companions: list[FileRecord] = field(default_factory=list)  # files the output refers to, in its folder


def build(plan: Plan, found_type: type[Found], make: Callable[[Path], Found]) -> tuple[Product, Found]:
    """Write a product through `make`, or find it up to date.

    `make` gets the path of a draft beside the output, writes it, and returns what it found: a dataclass, kept in the
    provenance. Only then does the draft take the output's name. A product whose `found.ok` is False is never up to date.
    A `found.peak_rss_bytes` is the peak memory of the processes that did the work.

    Raises:
        ToolError: The output exists and may not be replaced, is an input, or cannot be written.
    """
    _require_file_name(plan.output)
    for source in plan.inputs:
        for written in (plan.output, provenance_path(plan.output)):
            if written.exists() and source.exists() and written.samefile(source):
                raise ToolError("the output is the input", where=written, remedy="choose another file with -o")
    old = read_provenance(plan.output)
    inputs = [record(path, known=old.inputs if old else ()) for path in plan.inputs]
    if old is not None and plan.output.is_file() and _describes(old, plan, inputs):
        with contextlib.suppress(ValidationError):
            found = TypeAdapter(found_type).validate_python(old.found)
            if getattr(found, "ok", True):
                return Product(plan.output, _size(old), old.output.sha256, old.seconds, old.peak_rss_bytes, up_to_date=True), found
    replaces = _require_replaceable(plan, old)
    found_there = _identity(plan.output)
    start = time.monotonic()
    with draft_beside(plan.output) as draft:
        found = make(draft)
        _sync(draft)
        provenance = Provenance(
            tool=plan.tool,
            arguments=_as_json(plan.arguments),
            versions=_versions(plan),
            inputs=inputs,
            output=record(draft, name=plan.output),
            replaces_sha256=replaces,
            seconds=round(time.monotonic() - start, 3),
            peak_rss_bytes=max(peak_rss_bytes(), getattr(found, "peak_rss_bytes", 0)),
            found=_as_json(found),
            companions=[record(path) for path in plan.companions(draft)],
        )
        with _alone_in(plan.output.parent):
            if _identity(plan.output) != found_there:
                raise ToolError("another run wrote the output meanwhile; it was kept", where=plan.output, remedy="run again")
            _write_json(provenance_path(plan.output), asdict(provenance))
            draft.replace(plan.output)  # atomic: same folder
            _sync(plan.output.parent)
            final = replace(provenance, output=record(plan.output, sha256=provenance.output.sha256))  # renaming moved the ctime
            _write_json(provenance_path(plan.output), asdict(final))
        _remove_former(old, final, plan.output.parent)
    return Product(plan.output, _size(final), final.output.sha256, final.seconds, final.peak_rss_bytes), found


def _size(provenance: Provenance) -> int:
    """Return the size of a product with the files it refers to."""
    return sum(item.size_bytes for item in (provenance.output, *provenance.companions))


def _remove_former(old: Provenance | None, new: Provenance, folder: Path) -> None:
    """Remove the files that only the former product referred to, where they are still what we wrote."""
    kept = {Path(item.path).name for item in new.companions}
    for item in old.companions if old else ():
        path = folder / Path(item.path).name
        if path.name not in kept and path.is_file() and not path.is_symlink() and record(path).sha256 == item.sha256:
            path.unlink()


def require_not_anothers(output: Path, *, overwrite: bool) -> None:
    """Raise ToolError where a tool is bound to refuse an output later: for what it would do before that."""
    _require_file_name(output)
    plan = Plan(output, "", {}, overwrite=overwrite, refresh=True)
    _require_replaceable(plan, read_provenance(output))


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs from putting a product into the folder; only while one takes its name."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _identity(path: Path) -> tuple[int, int] | None:
    """Return inode and ctime of what stands at a path, None where nothing does."""
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_ino, status.st_ctime_ns


def provenance_path(product: Path) -> Path:
    """Return where the provenance of a product lies."""
    return product.with_name(product.name + ".json")


def read_provenance(product: Path) -> Provenance | None:
    """Return the provenance beside a product, or None where there is none of ours."""
    path = provenance_path(product)
    try:
        return TypeAdapter(Provenance).validate_json(path.read_bytes()) if path.is_file() else None
    except (OSError, ValidationError):
        return None


def record(path: Path, *, known: Iterable[FileRecord] = (), name: Path | None = None, sha256: str | None = None) -> FileRecord:
    """Return size, times and sha256 of a file; the hash comes from an earlier record where that still holds.

    Args:
        path: The file.
        known: Earlier records, beside the one in the file's own provenance.
        name: The name to record, where it is about to change.
        sha256: The hash, where the caller has just computed it.

    Raises:
        ToolError: No such file, or it changed while it was read.
    """
    try:
        before = path.stat()
        if not stat.S_ISREG(before.st_mode):
            raise ToolError("not a regular file", where=path, expected="a file")
        unhashed = FileRecord(
            str(name or path), before.st_size, before.st_mtime_ns, before.st_ctime_ns, before.st_ino, sha256 or ""
        )
        if sha256 is not None:
            return unhashed
        own = read_provenance(path)
        for earlier in (*known, *([own.output] if own else [])):
            if replace(earlier, path=unhashed.path, sha256="") == unhashed:
                return replace(unhashed, sha256=earlier.sha256)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if path.stat().st_mtime_ns != before.st_mtime_ns:
            raise ToolError("the file changed while it was read", where=path, remedy="wait until it is complete, then try again")
    except FileNotFoundError:
        raise ToolError("no such file", where=path, remedy="check the path") from None
    return replace(unhashed, sha256=digest)


@contextlib.contextmanager
def draft_beside(output: Path) -> Iterator[Path]:
    """Yield a fresh file in the output's folder; it is gone afterwards unless it was renamed.

    Raises:
        ToolError: The folder is missing or not writable.
    """
    draft = output.with_name(f".{output.name}.{os.getpid()}.partial")
    for stale in output.parent.glob(f".{glob.escape(output.name)}.*.partial*"):  # and what an exporter put beside its draft
        if not _is_running(stale.name.rpartition(".partial")[0].rpartition(".")[2]):
            stale.unlink(missing_ok=True)
    try:
        draft.touch()
    except OSError as error:
        raise ToolError(
            f"cannot write here: {error.strerror}", where=output.parent, remedy="create the folder or choose another with -o"
        ) from None
    try:
        yield draft
    finally:
        draft.unlink(missing_ok=True)
        draft.with_name(f"{draft.name}.data").unlink(missing_ok=True)  # weights that an exporter put beside it


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """Yield a temporary folder; those that killed runs left behind are removed first."""
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
    return True


def _describes(old: Provenance, plan: Plan, inputs: Sequence[FileRecord]) -> bool:
    same_inputs = [item.sha256 for item in old.inputs] == [item.sha256 for item in inputs]
    same_request = (old.tool, old.arguments, old.versions) == (plan.tool, _as_json(plan.arguments), _versions(plan))
    if not (same_inputs and same_request and record(plan.output).sha256 == old.output.sha256):
        return False
    companions = [plan.output.parent / Path(item.path).name for item in old.companions]
    return all(path.is_file() for path in companions) and [record(path, known=old.companions).sha256 for path in companions] == [
        item.sha256 for item in old.companions
    ]


def _require_replaceable(plan: Plan, old: Provenance | None) -> str | None:
    """Return the sha256 of the file to be replaced, None where there is none, or raise ToolError."""
    output, side = plan.output, provenance_path(plan.output)
    if side.exists() and old is None and not plan.overwrite:
        raise ToolError("the provenance would replace this file", where=side, remedy="use --overwrite, or another name with -o")
    if not output.exists() and not output.is_symlink():
        return None
    if output.exists() and not output.is_file():
        raise ToolError("the output is no regular file", where=output, remedy="choose a file with -o")
    ours = False
    if output.is_file() and not output.is_symlink() and old is not None:
        current = record(output).sha256
        ours = current in (old.output.sha256, old.replaces_sha256)
    if plan.overwrite or (plan.refresh and ours):
        return record(output).sha256 if output.is_file() else None
    what = "the output exists and is out of date" if ours else "the output exists"
    raise ToolError(what, where=output, remedy="use --overwrite to replace it, or choose another file with -o")


def _require_file_name(output: Path) -> None:
    if output.is_dir() or not output.name:
        raise ToolError("the output is a folder", where=output, expected="a file name")


def _versions(plan: Plan) -> dict[str, str]:
    """Return the versions that decide a product's bytes; for this project's own code, a hash of it."""
    code = hashlib.sha256()
    for path in sorted([ROOT / "tools" / f"{plan.tool}.py", *(ROOT / "shared").glob("*.py")]):
        if path.exists():
            code.update(path.read_bytes())
    packages = {name: metadata.version(name) for name in plan.packages if _is_installed(name)}
    return {"python": ".".join(map(str, sys.version_info[:3])), **packages, "edgepress-code": code.hexdigest()[:16]}


def _is_installed(name: str) -> bool:
    return any(metadata.distributions(name=name))


def _as_json(value: Any) -> Any:
    """Return the value as JSON gives it back, so that what was written compares equal with what is planned."""
    return TypeAdapter(Any).dump_python(value, mode="json")


def _write_json(path: Path, content: object) -> None:
    with draft_beside(path) as draft:
        draft.write_text(json.dumps(_as_json(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        _sync(draft)
        draft.replace(path)


def _sync(path: Path) -> None:
    """Wait until the file, or the folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some file systems refuse it for folders
        if not path.is_dir():
            raise
    finally:
        os.close(handle)
