"""Access to a file of unknown origin: a regular file, not empty, not too large, and what its first bytes say it is."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from shared.command.errors import ToolError
from shared.command.limits import require_size

HEAD_BYTES = 512
MAGIC: tuple[tuple[int, bytes, str], ...] = (  # byte, what stands there, what that is
    (0, b"version https://git-lfs", "a Git LFS pointer"),
    (4, b"TFL3", "a TFLite model"),
    (0, b"PK\x05\x06", "an empty zip file"),
    (0, b"PK", "a zip file"),
    (0, b"\x89PNG", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"\x1f\x8b", "a gzip file"),
    (0, b"%PDF", "a PDF file"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (4, b"ftyp", "an MP4 video"),
    (0, b"#EXTM3U", "a playlist"),
    (0, b"ffconcat", "a playlist"),
    (0, b"%!PS", "a PostScript program"),
    (0, b"\x80\x02", "a pickle"),
    (0, b"\x80\x03", "a pickle"),
    (0, b"\x80\x04", "a pickle"),
)


@contextlib.contextmanager
def open_checked(
    path: Path, kind: str, *, limit: str = "model-gb", again: str = "get the file again"
) -> Iterator[tuple[IO[bytes], bytes]]:
    """Yield a file that is about to be parsed, at its start, and its first 512 bytes.

    Args:
        path: The file.
        kind: What it is taken for, such as 'model'.
        limit: Which of `shared.command.limits` holds for its size.
        again: What to do where it is not what it should be.

    Raises:
        ToolError: No regular file, empty, larger than the limit, unreadable, or a Git LFS pointer or a web page in its place.
    """
    size = regular_size(path, kind)
    if size == 0:
        raise ToolError(f"the {kind} file is empty", where=path, remedy=again)
    require_size(path, size, limit)
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        if head.startswith(b"version https://git-lfs"):
            raise ToolError(f"this is a Git LFS pointer, not the {kind}", where=path, remedy="run 'git lfs pull'")
        file.seek(0)
        yield file, head


def read_head(path: Path, kind: str, *, limit: str = "model-gb", again: str = "get the file again") -> bytes:
    """Return the first 512 bytes of a file that is about to be parsed; arguments and errors as of `open_checked`."""
    with open_checked(path, kind, limit=limit, again=again) as (_, head):
        return head


def regular_size(path: Path, kind: str) -> int:
    """Return the size in bytes of a regular file; raise ToolError for anything else, before it is opened."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ToolError(f"the name of the {kind} is no text in UTF-8", where=path, remedy="rename it") from None
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        what = f"no such {kind} file" if not path.is_symlink() else f"the {kind} is a link to a file that is not there"
        raise ToolError(what, where=path, remedy="check the path") from None
    except OSError as error:  # a loop of links, a name that is too long, no permission
        raise ToolError(f"the {kind} can't be reached: {error.strerror}", where=path, remedy="check the path") from None
    except ValueError:
        raise ToolError(f"the name of the {kind} holds a zero byte", where=path, remedy="check the path") from None
    if not stat.S_ISREG(status.st_mode):
        found = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, pipe or socket"
        raise ToolError(f"the {kind} is no regular file", where=path, got=found, remedy="name a file")
    if not os.access(path, os.R_OK):
        raise ToolError(f"the {kind} may not be read", where=path, remedy="change its permissions")
    return status.st_size


def is_regular(path: Path) -> bool:
    """Return whether a file of that name can be read; a name from a list of unknown origin may be none at all."""
    try:
        regular_size(path, "")
    except ToolError:
        return False
    return True


def name_kind(head: bytes) -> str:
    """Return what a file is by its first bytes, in words."""
    for place, magic, kind in MAGIC:
        if head[place : place + len(magic)] == magic:
            return kind
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text[:1] == b"<":
        return "an HTML page" if b"html" in text.lower() else "XML"
    try:
        # The head may end within a character of several bytes.
        words = head.decode("utf-8-sig", "strict" if len(head) < HEAD_BYTES else "ignore").split()
    except UnicodeDecodeError:
        words = ["\0"]
    is_text = all(word.isprintable() for word in words)
    return "text" if is_text else "an unknown or cut-off format"
