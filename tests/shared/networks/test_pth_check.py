"""A .pth file is checked as a whole before anything maps it, and no name in its pickle is imported."""

import io
import pickle
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from shared.command.errors import ToolError
from shared.networks.pth_check import _Scan, check_pth

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
DTYPES = [*FLOATS, torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64]


def saved(path: Path) -> Path:
    whole = torch.arange(12.0).reshape(3, 4)
    state = {str(dtype): torch.zeros(5).to(dtype) for dtype in DTYPES}
    views = {"whole": whole, "view": whole[1:], "turned": whole.T, "none": torch.ones(0), "number": torch.tensor(1.0)}
    torch.save({"model": {**state, **views}, "parameter": torch.nn.Parameter(torch.ones(2)), "epoch": 3}, path)
    return path


def test_a_file_of_torch_save_passes(tmp_path: Path) -> None:
    check_pth(saved(tmp_path / "c.pth"))


def test_every_records_checksum_is_checked(tmp_path: Path) -> None:
    content = saved(tmp_path / "c.pth").read_bytes()
    with zipfile.ZipFile(tmp_path / "c.pth") as archive:
        infos = [info for info in archive.infolist() if info.file_size]
    for info in infos:
        start = info.header_offset + 30 + int.from_bytes(content[info.header_offset + 26 :][:2], "little")
        start += int.from_bytes(content[info.header_offset + 28 :][:2], "little")
        damaged = bytearray(content)
        damaged[start + info.file_size - 1] ^= 1
        (tmp_path / "d.pth").write_bytes(damaged)
        with pytest.raises(ToolError, match=rf"1 of {len(infos) + 1} records differ from their checksums; got {info.filename}"):
            check_pth(tmp_path / "d.pth")


def test_a_callable_in_a_pickle_is_neither_imported_nor_called(tmp_path: Path) -> None:
    module = tmp_path / "would_be_imported.py"
    touch = f"__import__('pathlib').Path({str(tmp_path / 'canary')!r}).touch()"
    module.write_text(f"{touch}\ndef call(*_): {touch}\n")
    sys.path.insert(0, str(tmp_path))
    try:
        scan = _Scan(io.BytesIO(b"cwould_be_imported\ncall\n(S'x'\ntR."))
        scan.load()
        assert "would_be_imported" not in sys.modules
        assert not (tmp_path / "canary").exists()
        pickle.loads(b"cwould_be_imported\ncall\n(S'x'\ntR.")
        assert (tmp_path / "canary").exists(), "the pickle has no effect"
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("would_be_imported", None)


@pytest.mark.parametrize("numel", [4, 6])
def test_a_storage_must_be_as_long_as_its_record(tmp_path: Path, numel: int) -> None:
    torch.save({"model": {"w": torch.zeros(5)}}, tmp_path / "c.pth")
    with zipfile.ZipFile(tmp_path / "c.pth") as old, zipfile.ZipFile(tmp_path / "d.pth", "w") as new:
        for name in old.namelist():
            content, length = old.read(name), b"K%ctq" % numel
            new.writestr(name, content.replace(b"K\x05tq", length) if name.endswith("data.pkl") else content)
    with pytest.raises(ToolError, match=rf"storage '0' is not as long as it says; got {numel} x FloatStorage in 20 bytes"):
        check_pth(tmp_path / "d.pth")
