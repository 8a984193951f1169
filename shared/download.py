"""Download one large file: resumed where it stopped, checked for its size, never under its final name before it is whole."""

import http.client
import time
import urllib.error
import urllib.request
from pathlib import Path

from shared.cli import byte_progress, warn
from shared.errors import ToolError
from shared.machine import MIB, require_disk

CHUNK_BYTES = 4 * MIB
TIMEOUT_S = 60
ATTEMPTS = 5  # in a row without a single new byte
PAUSE_S = 2.0  # before the next attempt; doubled each time


def download(url: str, target: Path) -> None:
    """Fetch `url` to `target`, going on from `<target>.part` if that is there.

    The server is asked for the rest only on the condition that the file is still the one that was begun (`If-Range`). A server
    that ignores this sends the whole file again, and the download starts over.

    Raises:
        ToolError: No connection, an HTTP error, a full disk, or a size other than announced; the part stays for the next try.

    Source: RFC 9110, sections 13.1.5 (If-Range) and 14 (range requests).
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _fetch_rest(url, part)
        except urllib.error.HTTPError as error:
            raise ToolError(f"the server answered {error.code} {error.reason}", where=url, remedy="check the address") from None
        except http.client.InvalidURL as error:
            raise ToolError(f"not a web address: {error}", where=url) from None
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            after = part.stat().st_size if part.exists() else 0
            failures = 0 if after > before else failures + 1
            if failures >= ATTEMPTS:
                remedy = f"run the same command again: it goes on after {after / MIB:.0f} MiB"
                raise ToolError(f"the download stopped: {error}", where=url, remedy=remedy) from None
            warn(f"the connection broke after {after / MIB:.0f} MiB; trying again")
            time.sleep(PAUSE_S * 2**failures)
        else:
            part.replace(target)
            _validator(part).unlink(missing_ok=True)
            return


def _validator(part: Path) -> Path:
    """Return the file that remembers which version of the remote file was begun."""
    return part.with_name(part.name + ".etag")


def _fetch_rest(url: str, part: Path) -> None:
    """Append what is missing; return when the file has the announced size."""
    have = part.stat().st_size if part.exists() else 0
    etag = _validator(part).read_text() if have and _validator(part).exists() else ""
    headers = {"Accept-Encoding": "identity"}
    if have and etag:
        headers |= {"Range": f"bytes={have}-", "If-Range": etag}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)  # noqa: S310 - card checks http(s)
    except urllib.error.HTTPError as error:
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        if error.headers.get("Content-Range", "").rpartition("/")[2] == str(have):
            return  # it was whole already
        part.unlink()
        raise ConnectionError("the part on disk does not fit the file; starting over") from None
    with response:
        resumed = response.status == http.client.PARTIAL_CONTENT
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink()
            raise ConnectionError("the server sent another range than asked for; starting over")
        start = have if resumed else 0
        announced = response.headers.get("Content-Length")
        total = start + int(announced) if announced else None
        if total is not None:
            require_disk(total - start, part.parent, "download this file")
        _validator(part).write_text(response.headers.get("ETag") or response.headers.get("Last-Modified") or "")
        with part.open("ab" if resumed else "wb") as file, byte_progress(part.stem, total, start) as advance:
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                advance(len(chunk))
    size = part.stat().st_size
    if total is not None and size != total:
        raise ConnectionError(f"the connection ended after {size} of {total} bytes")
