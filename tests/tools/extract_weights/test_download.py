"""A large file arrives whole from servers that drop connections, ignore ranges, or change the file."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from shared.command.errors import ToolError
from tools.extract_weights import download as module
from tools.extract_weights.download import download

CONTENT = bytes(range(256)) * 4096  # 1 MiB


class Server(ThreadingHTTPServer):
    """A file server with the faults of a test."""

    content = CONTENT
    etag = '"first"'
    ranges = True
    drop_after: int | None = None  # bytes per answer after which the connection breaks
    status = 200
    asked: list[str | None]


class Handler(BaseHTTPRequestHandler):
    """Answers GET with ranges and If-Range."""

    server: Server

    def do_GET(self) -> None:
        server, asked_range = self.server, self.headers.get("Range")
        server.asked.append(asked_range)
        if server.status != 200:
            self.send_error(server.status)
            return
        start = 0
        if asked_range and server.ranges and self.headers.get("If-Range") == server.etag:
            start = int(asked_range.removeprefix("bytes=").removesuffix("-"))
            if start >= len(server.content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(server.content)}")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        else:
            self.send_response(200)
        self.send_header("ETag", server.etag)
        self.send_header("Content-Length", str(len(server.content) - start))
        self.end_headers()
        self.wfile.write(server.content[start:][: server.drop_after])

    def log_message(self, *_: object) -> None:
        """Stay quiet."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "PAUSE_S", 0.0)
    with Server(("127.0.0.1", 0), Handler) as running:
        running.asked = []
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}/checkpoint.pth"


def test_a_file_arrives_and_leaves_no_part(server: Server, tmp_path: Path) -> None:
    download(url(server), tmp_path / "sub" / "c.pth")
    assert (tmp_path / "sub" / "c.pth").read_bytes() == CONTENT
    assert sorted(path.name for path in (tmp_path / "sub").iterdir()) == ["c.pth", "c.pth.sha256"]


def test_a_dropped_download_resumes_at_its_last_byte(server: Server, tmp_path: Path) -> None:
    server.drop_after = 400_000
    download(url(server), tmp_path / "c.pth")
    assert (tmp_path / "c.pth").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=400000-", "bytes=800000-"]


@pytest.mark.parametrize(
    ("part", "etag", "ranges", "asked"),
    [
        (CONTENT[:1000], Server.etag, True, ["bytes=1000-"]),
        (CONTENT, Server.etag, True, [f"bytes={len(CONTENT)}-"]),
        (b"old" * 100, '"changed"', True, ["bytes=300-"]),
        (CONTENT[:1000], Server.etag, False, ["bytes=1000-"]),
    ],
    ids=["resumed", "whole already", "remote file changed", "server without ranges"],
)
def test_a_part_of_an_earlier_run_becomes_the_whole_file(
    server: Server, tmp_path: Path, part: bytes, etag: str, ranges: bool, asked: list[str]
) -> None:
    server.ranges = ranges
    (tmp_path / "c.pth.part").write_bytes(part)
    (tmp_path / "c.pth.part.etag").write_text(etag)
    download(url(server), tmp_path / "c.pth")
    assert (tmp_path / "c.pth").read_bytes() == CONTENT
    assert server.asked == asked


def test_a_server_that_never_delivers_is_an_error_and_the_part_stays(server: Server, tmp_path: Path) -> None:
    server.drop_after = 0
    (tmp_path / "c.pth.part").write_bytes(CONTENT[:1000])
    (tmp_path / "c.pth.part.etag").write_text(server.etag)
    with pytest.raises(ToolError, match=r"the download stopped.*run the same command again"):
        download(url(server), tmp_path / "c.pth")
    assert not (tmp_path / "c.pth").exists()
    assert (tmp_path / "c.pth.part").stat().st_size == 1000
    assert len(server.asked) == module.ATTEMPTS


def test_an_http_error_is_named_at_once(server: Server, tmp_path: Path) -> None:
    server.status = 404
    with pytest.raises(ToolError, match="the server answered 404"):
        download(url(server), tmp_path / "c.pth")
    assert len(server.asked) == 1


def test_no_server_at_all_is_an_error(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="the download stopped"):
        download("http://127.0.0.1:1/nothing.pth", tmp_path / "c.pth")
    assert server.asked == []


def test_an_address_with_a_bad_port_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="not a web address"):
        download("http://localhost:abc/x.pth", tmp_path / "c.pth")
