"""A download that is killed goes on; a server that lies is caught, and nothing gets the checkpoint's name."""

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from shared.command.errors import ToolError
from tests.conftest import ROOT
from tests.faults.test_interruptions import FEW
from tests.support.crash_scenarios import faults_of_refusal
from tests.support.fork_server import Done
from tools.extract_weights import download as module
from tools.extract_weights import extract_weights

PIECES, PIECE_S = 40, 0.05  # a download takes two seconds
NAME = "weights.pth"
HTML = b"<!DOCTYPE html><html><body>Please sign in</body></html>"


@dataclass
class Manner:
    """How a server behaves.

    Args:
        content: What it sends.
        rest: What it sends from the second answer on, where that is another.
        pause_s: Between two of its pieces.
        length_off: By how much its Content-Length differs from the truth.
        encoding: Its Content-Encoding.
        kind: Its Content-Type.
        range_off: By how much the start of its Content-Range differs from what was asked for.
        drops: Bytes after which its first answer ends.
        asked: The ranges it was asked for.
    """

    content: bytes
    rest: bytes | None = None
    pause_s: float = 0.0
    length_off: int = 0
    encoding: str = ""
    kind: str = "application/octet-stream"
    range_off: int = 0
    drops: int | None = None
    asked: list[str | None] = field(default_factory=list)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    manner: Manner


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        manner, asked = self.server.manner, self.headers.get("Range")
        manner.asked.append(asked)
        is_first = len(manner.asked) == 1
        content = manner.content if is_first or manner.rest is None else manner.rest
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start + manner.range_off}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", '"one"')
        self.send_header("Content-Type", manner.kind)
        if manner.encoding:
            self.send_header("Content-Encoding", manner.encoding)
        self.send_header("Content-Length", str(len(content) - start + manner.length_off))
        self.end_headers()
        sent = content[start : manner.drops if is_first else None]
        size = max(1, len(content) // PIECES)
        with contextlib.suppress(OSError):
            for place in range(0, len(sent), size):
                self.wfile.write(sent[place : place + size])
                time.sleep(manner.pause_s)

    def log_message(self, *_: object) -> None:
        """Stay quiet."""


@pytest.fixture
def server() -> Iterator[_Server]:
    with _Server(("127.0.0.1", 0), _Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def checkpoint() -> bytes:
    """A .pth of some megabytes with a detector in it."""
    import io

    import torch

    seeded = torch.Generator().manual_seed(0)
    state = {f"detector.layer{number}.weight": torch.randn(256, 1024, generator=seeded) for number in range(16)}
    file = io.BytesIO()
    torch.save({"model": state}, file)
    return file.getvalue()


def write_card(folder: Path, server: _Server, sha256: str | None) -> Path:
    """Write a card whose checkpoint lies on the server."""
    card = folder / "small.toml"
    noted = f'sha256 = "{sha256}"\n' if sha256 else ""
    card.write_text(
        'title = "Small"\nnbits = 32\ndepths = [1, 1, 2, 1]\ndims = [16, 32, 48, 64]\nstem_stride = 4\nimage_size = 64\n'
        f'output_prefix = "small"\n[checkpoint]\nurl = "http://127.0.0.1:{server.server_port}/{NAME}"\n{noted}'
    )
    return card


def found(folder: Path) -> dict[str, bytes]:
    """Return all files but the card."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".toml")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_a_download_killed_at_any_moment_goes_on_and_is_whole(
    server: _Server, checkpoint: bytes, tmp_path: Path, rounds: int
) -> None:
    """The real command, killed while bytes come: twice, five times with more rounds."""
    server.manner = Manner(checkpoint, pause_s=PIECE_S)
    write_card(tmp_path, server, hashlib.sha256(checkpoint).hexdigest())
    command = [sys.executable, "-W", "ignore", "-m", "tools.extract_weights", "--model", "small.toml", "--download"]
    command += ["--prefix", "detector.", "-o", "out.safetensors"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    moments, have = random.Random("download"), [0]
    for _ in range(2 if rounds <= FEW else 5):
        before = len(server.manner.asked)
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while len(server.manner.asked) == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.9 * PIECES * PIECE_S * (1 - have[-1] / len(checkpoint))))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        parts = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix == ".part"]
        have.append(sum(path.stat().st_size for path in parts))
        assert not [name for name in found(tmp_path) if name.endswith((".pth", ".safetensors"))]
    server.manner.pause_s = 0.0
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    resumed = sum(asked is not None for asked in server.manner.asked)
    (arrived,) = [path for path in tmp_path.rglob("*.pth") if path.is_file()]
    assert arrived.read_bytes() == checkpoint
    digest = hashlib.sha256(checkpoint).hexdigest()
    assert arrived.with_name(arrived.name + ".sha256").read_text() == f"{digest}  {arrived.name}\n"
    assert not [name for name in found(tmp_path) if ".part" in name]
    assert (tmp_path / "out.safetensors").is_file()
    print(f"\ndownload: {len(have) - 1} killed with {have[1:]} bytes there; {resumed} answers resumed; complete at the end")
    assert max(have) == 0 or resumed


def flipped(content: bytes, place: int) -> bytes:
    """Return the content with one bit of a byte flipped."""
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


LIES = {
    "another content of the same size": (lambda good: Manner(flipped(good, len(good) // 2)), True),
    "a page instead of the file": (lambda good: Manner(HTML, kind="text/html"), False),
    "a page instead of the file, the hash known": (lambda good: Manner(HTML, kind="text/html"), True),
    "other bytes from where it was resumed": (
        lambda good: Manner(good, rest=flipped(good, len(good) * 3 // 4), drops=len(good) // 2),
        True,
    ),
    "other bytes from where it was resumed, the hash unknown": (
        lambda good: Manner(good, rest=flipped(good, len(good) * 3 // 4), drops=len(good) // 2),
        False,
    ),
    "too long a Content-Length": (lambda good: Manner(good, length_off=1000), True),
    "too short a Content-Length": (lambda good: Manner(good, length_off=-1000), True),
    "too short a Content-Length, the hash unknown": (lambda good: Manner(good, length_off=-1000), False),
    "compressed although asked not to": (lambda good: Manner(good, encoding="gzip"), True),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_server_that_lies_is_caught_and_nothing_gets_the_name(
    server: _Server, checkpoint: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    manner, knows_hash = LIES[lie]
    server.manner = manner(checkpoint)
    card = write_card(tmp_path, server, hashlib.sha256(checkpoint).hexdigest() if knows_hash else None)
    monkeypatch.setattr(module, "PAUSE_S", 0.0)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ToolError) as caught:
        extract_weights(model=str(card), download=True, prefix="detector.", output=tmp_path / "out.safetensors")
    assert "\n" not in str(caught.value)
    left = [name for name in found(tmp_path) if not name.endswith((".part", ".part.etag"))]
    assert left == []


def test_a_wrong_content_range_starts_over_and_arrives_whole(
    server: _Server, checkpoint: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.manner = Manner(checkpoint, drops=1000, range_off=7)
    card = write_card(tmp_path, server, hashlib.sha256(checkpoint).hexdigest())
    monkeypatch.setattr(module, "PAUSE_S", 0.0)
    monkeypatch.chdir(tmp_path)
    extract_weights(model=str(card), download=True, prefix="detector.", output=tmp_path / "out.safetensors")
    (arrived,) = tmp_path.rglob("*.pth")
    assert arrived.read_bytes() == checkpoint
    assert server.manner.asked == [None, "bytes=1000-", None]


def test_the_command_says_that_a_server_lies_in_one_line(server: _Server, checkpoint: bytes, tmp_path: Path) -> None:
    server.manner = Manner(HTML, kind="text/html")
    write_card(tmp_path, server, None)
    command = [sys.executable, "-W", "ignore", "-m", "tools.extract_weights", "--model", "small.toml", "--download"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "-o", "out.safetensors"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert not list(faults_of_refusal(Done(done.returncode, done.stdout, done.stderr, 0.0, 0)))
    assert found(tmp_path) == {}
