"""Download one large file: resumed where it stopped, checked for size and content, never under its final name before it is whole.

Beside the finished file lies `<file>.sha256`: what it was when it came, so that later damage is noticed.
"""

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from shared.command.cli import byte_progress, step, warn
from shared.command.errors import ToolError
from shared.command.resources import MIB, require_disk
from shared.files.atomic import alone_in, sync
from shared.files.checksums import write_voucher

CHUNK_BYTES = 4 * MIB
TIMEOUT_S = 60
ATTEMPTS = 5  # in a row without a single new byte
PAUSE_S = 1.0  # before the next attempt; doubled each time
RETRIED = {408, 429, 500, 502, 503, 504}  # what a busy server answers, and a moment later does not


def download(url: str, target: Path, *, sha256: str | None = None, check: Callable[[Path], object] = lambda _: None) -> None:
    """Fetch `url` to `target`, going on from `<target>.part` if that is there.

    The server is asked for the rest only on the condition that the file is still the one that was begun (`If-Range`). A server
    that ignores this sends the whole file again, and the download starts over.

    Args:
        url: The address.
        target: The file to write.
        sha256: What it must have, where that is known.
        check: Reads the whole part as what it should be, and raises ToolError where it is not that.

    Raises:
        ToolError: No connection, an HTTP error, a full disk, or a size other than announced; the part stays for the next try.
            Another content than it should have; then the part is removed.

    Source: RFC 9110, sections 13.1.5 (If-Range) and 14 (range requests).
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    with alone_in(target.parent, lambda: warn(f"another run works in {target.parent}; waiting for it")):
        if target.is_file():
            return  # another run fetched it while this one waited
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
        write_voucher(target, digest)
        part.replace(target)
        sync(target.parent)
        _validator(part).unlink(missing_ok=True)


def _fetch(url: str, part: Path) -> None:
    """Fetch all of a file, trying again as long as something comes."""
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _fetch_rest(url, part)
        except http.client.InvalidURL as error:
            raise ToolError(f"not a web address: {error}", where=url, remedy="correct the card's url") from None
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code not in RETRIED:
                told = f"the server answered {error.code} {error.reason}"
                raise ToolError(told, where=url, remedy="check the address") from None
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
        what, remedy = "the server sent another file than it should", "try again; if it stays so, do not use what is there"
        raise ToolError(what, where=url, got=f"sha256 {digest}", expected=expected, remedy=remedy)


def _validator(part: Path) -> Path:
    """Return the file that remembers which version of the remote file was begun."""
    return part.with_name(part.name + ".etag")


def _strong(headers: http.client.HTTPMessage) -> str:
    """Return what tells one version of the remote file from another to the byte: its ETag unless weak, or its date."""
    etag = headers.get("ETag") or ""
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified") or ""


def _ask(url: str, part: Path, condition: dict[str, str]) -> http.client.HTTPResponse | None:
    """Return the server's answer, None where the part is whole already."""
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
        raise ToolError("the server sends the file compressed although asked not to", where=url, remedy="get it another way")
    return response


def _fetch_rest(url: str, part: Path) -> None:
    """Append what is missing; return when the file has the announced size."""
    have = part.stat().st_size if part.exists() else 0
    version = _validator(part).read_text(encoding="latin-1") if have and _validator(part).exists() else ""
    response = _ask(url, part, {"Range": f"bytes={have}-", "If-Range": version} if have and version else {})
    if response is None:
        return
    with response:
        resumed = response.status == http.client.PARTIAL_CONTENT
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink()
            raise ConnectionError("the server sent another range than asked for; starting over")
        start = have if resumed else 0
        announced = response.headers.get("Content-Length")
        total = start + int(announced) if announced and announced.isdecimal() else None
        if total is not None:
            require_disk(total - start, part.parent, "download this file")
        if not resumed:
            # The old bytes go before the new version is noted: killed in between, there is nothing that could be taken up wrongly.
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
