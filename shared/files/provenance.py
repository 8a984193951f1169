"""Where a product comes from: `<product>.json` next to it, or inside a report; and hashes of files, checked against noted ones.

A file whose size, times and inode are as recorded is not hashed again: content can't change without one of them changing.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from shared.command.errors import ToolError
from shared.files.checksums import Checksum, find_checksum, require_same, sha256_of
from shared.files.code_version import code_version
from shared.files.file_type import regular_size
from shared.files.reports import split_report


@dataclass(frozen=True)
class FileRecord:
    """A file's content, the stat values under which it was hashed, and what its checksum was compared with, if anything."""

    path: str
    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    sha256: str
    verified_by: str = field(default="", compare=False)


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
    made_twice: bool = False  # and came out the same to the last byte


def provenance_path(product: Path) -> Path:
    """Return where the provenance of a product lies."""
    return product.with_name(product.name + ".json")


def read_provenance(product: Path) -> Provenance | None:
    """Return the provenance inside a report, or next to another product; None where there is none of ours."""
    inside = _read_inside(product)
    return read_provenance_file(product) if inside is None else inside[0]


def _read_inside(report: Path) -> tuple[Provenance, str] | None:
    """Return the provenance that a report holds, and the sha256 of the rest."""
    found = split_report(report)
    try:
        return None if found is None else (TypeAdapter(Provenance).validate_python(found[0]), found[1])
    except ValidationError:
        return None


def read_provenance_file(product: Path) -> Provenance | None:
    """Return the content of `<product>.json`; None where there is no such file of ours."""
    path = provenance_path(product)
    try:
        return TypeAdapter(Provenance).validate_json(path.read_bytes()) if path.is_file() else None
    except (OSError, ValidationError):
        return None


def record(path: Path, *, known: Iterable[FileRecord] = (), name: Path | None = None, sha256: str | None = None) -> FileRecord:
    """Return size, times and sha256 of a file; the hash comes from an earlier record where that still holds.

    Args:
        path: The file.
        known: Earlier records, next to the one in the file's own provenance.
        name: The name to record, where it is about to change.
        sha256: The hash, where the caller has just computed it.

    Raises:
        ToolError: No such file, or it changed while it was read.
    """
    regular_size(path, "input")
    try:
        before = path.stat()
        unhashed = FileRecord(
            str(name or path), before.st_size, before.st_mtime_ns, before.st_ctime_ns, before.st_ino, sha256 or ""
        )
        if sha256 is not None:
            return unhashed
        own = read_provenance(path)
        for earlier in (*known, *([own.output] if own else [])):
            if replace(earlier, path=unhashed.path, sha256="") == unhashed:
                return replace(unhashed, sha256=earlier.sha256)
        inside = _read_inside(path)
        digest = sha256_of(path) if inside is None else inside[1]
        after = path.stat()
        if (after.st_mtime_ns, after.st_size, after.st_ino) != (before.st_mtime_ns, before.st_size, before.st_ino):
            raise ToolError("the file changed while it was read", where=path, remedy="wait until it is complete, then try again")
    except FileNotFoundError:
        raise ToolError("no such file", where=path, remedy="check the path") from None
    return replace(unhashed, sha256=digest)


def verified(path: Path, found: FileRecord) -> FileRecord:
    """Return a record with the name of the checksum that its hash was compared with; raise ToolError where they differ."""
    own = read_provenance(path)
    noted_in = path if _read_inside(path) else provenance_path(path)
    if own is not None and found.sha256 not in (own.output.sha256, own.replaces_sha256):
        require_same(path, found.sha256, Checksum(own.output.sha256, noted_in))
    checksum = find_checksum(path)
    if checksum is not None:
        require_same(path, found.sha256, checksum)
    by = noted_in.name if own else checksum.noted_in.name if checksum else ""
    return replace(found, verified_by=by)


def require_checksums(paths: Iterable[Path]) -> None:
    """Raise ToolError where a file is not what its provenance or a checksum next to it says; others are not read."""
    for path in paths:
        if read_provenance(path) is not None or find_checksum(path) is not None:
            verified(path, record(path))


def versions(tool: str, packages: Sequence[str]) -> dict[str, str]:
    """Return the versions that decide a product's bytes; for this project's own code, a hash of it.

    Args:
        tool: Name of a tool, or the dotted name of another module of the project that writes products.
        packages: Distributions whose version matters.
    """
    module = tool if "." in tool else f"tools.{tool}"
    installed = {name: metadata.version(name) for name in packages if _is_installed(name)}
    return {"python": ".".join(map(str, sys.version_info[:3])), **installed, "edgepress-code": code_version(module)}


def _is_installed(name: str) -> bool:
    return any(metadata.distributions(name=name))


def as_json(value: Any) -> Any:
    """Return the value as JSON gives it back, so that what was written compares equal with what is planned."""
    return TypeAdapter(Any).dump_python(value, mode="json")
