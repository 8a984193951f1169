"""The sha256 that a file should have, where it is noted next to the file: formats of weights have no checksum of their own.

Noted in our own provenance (`<file>.json`), in `<file>.sha256` or in SHA256SUMS, both as sha256sum writes them.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from shared.command.errors import ToolError
from shared.command.limits import require_size

SUFFIX, SUMS = ".sha256", "SHA256SUMS"
LINE = re.compile(r"^\\?([0-9a-fA-F]{64})(?: [ *](.+))?$")


@dataclass(frozen=True)
class Checksum:
    """What a file's hash should be, and who says so."""

    sha256: str
    noted_in: Path


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's content as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_checksum(path: Path) -> Checksum | None:
    """Return what `<file>.sha256` or SHA256SUMS say of a file, None where there is neither.

    Raises:
        ToolError: The file of hashes is damaged.
    """
    for notes in (path.with_name(path.name + SUFFIX), path.with_name(SUMS)):
        if notes.is_file() and notes != path:
            require_size(notes, notes.stat().st_size, "text-mb")
            lines = [line for line in notes.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if line.strip()]
            found = [LINE.match(line.strip()) for line in lines]
            if notes.name != SUMS and not (len(found) == 1 and found[0]):
                raise ToolError(
                    "no sha256", where=notes, expected="one line as sha256sum writes it", remedy="write it again, or remove it"
                )
            for match in filter(None, found):
                if notes.name != SUMS or (match[2] or "").removeprefix("./") == path.name:
                    return Checksum(match[1].lower(), notes)
    return None


def write_checksum(path: Path, sha256: str) -> None:
    """Note a file's hash next to it."""
    path.with_name(path.name + SUFFIX).write_text(f"{sha256}  {path.name}\n", encoding="utf-8", errors="surrogateescape")


def require_same(path: Path, sha256: str, checksum: Checksum) -> None:
    """Raise ToolError unless a file has the hash that was noted."""
    if sha256 != checksum.sha256:
        raise ToolError(
            "the file is not the one that its checksum is of: damaged, or replaced",
            where=path,
            got=f"sha256 {sha256[:16]}...",
            expected=f"{checksum.sha256[:16]}..., as {checksum.noted_in.name} says",
            remedy=f"get or make it again; if it was meant to change, remove {checksum.noted_in.name}",
        )
