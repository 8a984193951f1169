"""A large file arrives whole, from servers that drop, ignore ranges, or change their mind."""

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
    """A file server with the faults that a test asks for."""

    content = CONTENT
    etag = '"one"'
    ranges = True
    drop_after: int | None = None  # bytes per answer after which the connection breaks
    status = 200
    asked: list[str | None]


class Handler(BaseHTTPRequestHandler):
    """Answers GET with ranges and If-Range."""

    server: Server

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range")
        server.asked.append(asked)
        if server.status != 200:
            self.send_error(server.status)
            return
        start = 0
        if asked and server.ranges and self.headers.get("If-Range") == server.etag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
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
        thread = threading.Thread(target=running.serve_forever)
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


def test_a_dropped_connection_is_taken_up_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.drop_after = 400_000
    download(url(server), tmp_path / "c.pth")
    assert (tmp_path / "c.pth").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=400000-", "bytes=800000-"]


def test_a_part_of_an_earlier_run_is_taken_up(server: Server, tmp_path: Path) -> None:
    (tmp_path / "c.pth.part").write_bytes(CONTENT[:1000])
    (tmp_path / "c.pth.part.etag").write_text(server.etag)
    download(url(server), tmp_path / "c.pth")
    assert (tmp_path / "c.pth").read_bytes() == CONTENT
    assert server.asked == ["bytes=1000-"]


def test_a_part_that_was_whole_is_only_renamed(server: Server, tmp_path: Path) -> None:
    (tmp_path / "c.pth.part").write_bytes(CONTENT)
    (tmp_path / "c.pth.part.etag").write_text(server.etag)
    download(url(server), tmp_path / "c.pth")
    assert (tmp_path / "c.pth").read_bytes() == CONTENT


def test_a_changed_remote_file_starts_over(server: Server, tmp_path: Path) -> None:
    (tmp_path / "c.pth.part").write_bytes(b"old" * 100)
    (tmp_path / "c.pth.part.etag").write_text('"another"')
    download(url(server), tmp_path / "c.pth")
    assert (tmp_path / "c.pth").read_bytes() == CONTENT


def test_a_server_without_ranges_sends_all_again(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    (tmp_path / "c.pth.part").write_bytes(CONTENT[:1000])
    (tmp_path / "c.pth.part.etag").write_text(server.etag)
    download(url(server), tmp_path / "c.pth")
    assert (tmp_path / "c.pth").read_bytes() == CONTENT


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
