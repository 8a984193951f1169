"""Download one large file: resume after an interruption, check size and content, give the final name to a whole file only.

The hash of the finished file is kept in `<file>.sha256`, so that later damage is noticed.
"""

import contextlib
import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from shared.command.cli import progress_console, step, warn
from shared.command.errors import ToolError
from shared.command.resources import MIB, require_disk
from shared.files.atomic import alone_in, sync
from shared.files.checksums import write_checksum

CHUNK_BYTES = 4 * MIB
TIMEOUT_S = 60
ATTEMPTS = 5  # in a row without a single new byte
PAUSE_S = 1.0  # before the next attempt; doubled each time
RETRIED = {408, 429, 500, 502, 503, 504}  # answers of a busy server


def download(url: str, target: Path, *, sha256: str | None = None, check: Callable[[Path], object] = lambda _: None) -> None:
    """Fetch `url` to `target`, and resume from `<target>.part` if there is one.

    The request for the rest carries the condition that the remote file has not changed (`If-Range`). A server without support
    for it sends the whole file again, and the download starts over.

    Args:
        url: The address.
        target: The file to write.
        sha256: Hash that the file must have, where it is known.
        check: Reads the whole part, and raises ToolError where its content is of the wrong kind.

    Raises:
        ToolError: No connection, an HTTP error, a full disk, or a size that differs from the announced size; the part stays for the
            next try. Wrong content; then the part is removed.

    Source: RFC 9110, sections 13.1.5 (If-Range) and 14 (range requests).
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    with alone_in(target.parent, lambda: warn(f"another run works in {target.parent}; waiting for it")):
        if target.is_file():
            return  # fetched by a parallel run during the wait
        _fetch(url, part)
        digest = _sha256(part)
        try:
            _require_sha256(url, digest, sha256)
            check(part)
        except ToolError:
            part.unlink()
            _validator(part).unlink(missing_ok=True)
            raise
        sync(part)
        write_checksum(target, digest)
        part.replace(target)
        sync(target.parent)
        _validator(part).unlink(missing_ok=True)


def _fetch(url: str, part: Path) -> None:
    """Fetch a whole file; try again after a broken connection, up to ATTEMPTS times in a row without a new byte."""
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _fetch_rest(url, part)
        except http.client.InvalidURL as error:
            raise ToolError(f"not a web address: {error}", where=url, remedy="correct the card's url") from None
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code not in RETRIED:
                what = f"the server answered {error.code} {error.reason}"
                raise ToolError(what, where=url, remedy="check the address") from None
            after = part.stat().st_size if part.exists() else 0
            failures = 0 if after > before else failures + 1
            if failures >= ATTEMPTS:
                remedy = f"run the same command again: it goes on after {after / MIB:.0f} MiB"
                raise ToolError(f"the download stopped: {error}", where=url, remedy=remedy) from None
            warn(f"the connection broke after {after / MIB:.0f} MiB; trying again")
            time.sleep(PAUSE_S * 2**failures)
        else:
            return


def _sha256(part: Path) -> str:
    with step(f"check {part.stem}"), part.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_sha256(url: str, digest: str, expected: str | None) -> None:
    if expected not in (None, digest):
        what, remedy = "the server sent a file with the wrong hash", "try again; if it stays so, do not use this address"
        raise ToolError(what, where=url, got=f"sha256 {digest}", expected=expected, remedy=remedy)


def _validator(part: Path) -> Path:
    """Return the file that keeps the version of the remote file whose download was begun."""
    return part.with_name(part.name + ".etag")


def _strong(headers: http.client.HTTPMessage) -> str:
    """Return the identifier of this exact version of the remote file: its ETag unless weak, or its date."""
    etag = headers.get("ETag") or ""
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified") or ""


def _ask(url: str, part: Path, condition: dict[str, str]) -> http.client.HTTPResponse | None:
    """Return the server's answer, None where the part on disk is already whole."""
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", **condition})  # noqa: S310 - a card's url is http(s)
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT_S)  # noqa: S310 - as above
    except urllib.error.HTTPError as error:
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        if error.headers.get("Content-Range", "").rpartition("/")[2] == str(part.stat().st_size):
            return None
        part.unlink()
        raise ConnectionError("the part on disk does not fit the file; starting over") from None
    if response.headers.get("Content-Encoding", "identity") != "identity":
        response.close()
        raise ToolError("the server sends the file compressed, against the request", where=url, remedy="download the file by hand")
    return response


def _fetch_rest(url: str, part: Path) -> None:
    """Append the missing bytes; return when the file has the announced size."""
    have = part.stat().st_size if part.exists() else 0
    version = _validator(part).read_text(encoding="latin-1") if have and _validator(part).exists() else ""
    response = _ask(url, part, {"Range": f"bytes={have}-", "If-Range": version} if have and version else {})
    if response is None:
        return
    with response:
        resumed = response.status == http.client.PARTIAL_CONTENT
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink()
            raise ConnectionError("the server sent the wrong range; starting over")
        start = have if resumed else 0
        announced = response.headers.get("Content-Length")
        total = start + int(announced) if announced and announced.isdecimal() else None
        if total is not None:
            require_disk(total - start, part.parent, "download this file")
        if not resumed:
            # The old bytes go before the new version is noted: a run killed in between leaves no part of the wrong version.
            part.write_bytes(b"")
            _validator(part).write_text(_strong(response.headers), encoding="latin-1")
        with part.open("ab") as file, byte_progress(part.stem, total, start) as advance:
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                advance(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    size = part.stat().st_size
    if total is not None and size != total:
        raise ConnectionError(f"the connection ended after {size} of {total} bytes")


@contextlib.contextmanager
def byte_progress(name: str, total: int | None, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yield a function to be called with the bytes of each piece; draws a bar when stderr is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=progress_console, transient=True, disable=not progress_console.is_terminal) as progress:
        task = progress.add_task(name, total=total, completed=done)
        yield lambda size: progress.update(task, advance=size)
