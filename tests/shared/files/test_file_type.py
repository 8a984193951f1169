"""What a file is by its first bytes, and that nothing but a regular file is opened."""

import os
from pathlib import Path

import pytest

from shared.command.errors import ToolError
from shared.command.limits import DEFAULTS, VARIABLE, limit, raise_limits
from shared.files.file_type import HEAD_BYTES, is_regular, name_kind, read_head


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\x1c\0\0\0TFL3", "a TFLite model"),
        (b"PK\x05\x06" + bytes(18), "an empty zip file"),
        (b"PK\x03\x04", "a zip file"),
        (b"\n\n <!DOCTYPE html>", "an HTML page"),
        (b"<?xml version='1.0'?><Error/>", "XML"),
        (b"\xef\xbb\xbfhello\r\n", "text"),
        (("é" * 200).encode()[:-1], "an unknown or cut-off format"),
        (("x" + "é" * 256).encode()[:HEAD_BYTES], "text"),
        (b"\x00\x01\x02", "an unknown or cut-off format"),
    ],
)
def test_a_file_is_named_by_its_first_bytes(head: bytes, kind: str) -> None:
    assert name_kind(head) == kind


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name in ("pipe", "loop", "absent", "file/below", "x" * 300, "\udce9", "\0"):
        with pytest.raises(ToolError):
            read_head(tmp_path / name, "model")
        assert not is_regular(tmp_path / name)
    for path in (tmp_path, Path("/dev/zero")):
        with pytest.raises(ToolError, match="is no regular file"):
            read_head(path, "model")
    assert [read_head(tmp_path / name, "model") for name in ("file", "link")] == [b"x", b"x"]


def test_a_limit_holds_until_it_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "image-mb=0.001")
    (tmp_path / "large").write_bytes(bytes(1500))
    with pytest.raises(ToolError, match=r"larger than the limit; got 0.0 MB; expected at most 0.001; .*--limit image-mb=VALUE"):
        read_head(tmp_path / "large", "image", limit="image-mb")
    raise_limits(["image-mb=1", "video-gb=2"])
    assert os.environ[VARIABLE] == "image-mb=1 video-gb=2"
    assert len(read_head(tmp_path / "large", "image", limit="image-mb")) == HEAD_BYTES
    assert (limit("video-gb"), limit("model-gb")) == (2, DEFAULTS["model-gb"])
    monkeypatch.setenv(VARIABLE, "nonsense")
    with pytest.raises(ToolError, match="no such limit"):
        limit("video-gb")
