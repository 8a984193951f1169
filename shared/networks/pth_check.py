"""Check a .pth file without running or importing anything: its records, its storages, the objects that its pickle names.

torch.load with `mmap=True` (torch 2.13) trusts the storage lengths in the pickle, even past the end of the file, and never checks
checksums; so lengths and checksums are checked here, before torch maps the file.

Source: layout, https://github.com/pytorch/pytorch/blob/v2.13.0/torch/serialization.py (a zip of `data.pkl` and `data/<key>`)
"""

import io
import mmap
import os
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from shared.command.errors import ToolError, first_line
from shared.command.resources import MIB, cpu_count
from shared.files.zip_layout import LayoutError, locate, require_stored

CHUNK_BYTES = 8 * MIB
MAX_RECORDS = 1_000_000
MAX_PICKLE_BYTES = 64 * MIB  # ten times the pickle of the largest checkpoints, which holds names and shapes
RESAVE = "ask its author for a plain state dict (torch.save of tensors), or for .safetensors"
ITEM_BYTES = {
    **dict.fromkeys(("Double", "Long", "ComplexFloat", "UInt64"), 8),
    **dict.fromkeys(("Float", "Int", "UInt32", "QInt32"), 4),
    **dict.fromkeys(("Half", "BFloat16", "Short", "UInt16"), 2),
    **dict.fromkeys(("Byte", "Char", "Bool", "Untyped", "QUInt8", "QInt8", "Float8_e4m3fn", "Float8_e5m2"), 1),
    "ComplexDouble": 16,
}


def check_pth(path: Path) -> None:
    """Check a .pth file before anything maps or loads it; reads it whole, once, for the checksums.

    Raises:
        ToolError: Damaged or cut off; compressed, overlapping or missing records; storages that are not as long as their records;
            a TorchScript program.
    """
    try:
        with (
            zipfile.ZipFile(path) as archive,
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            names = [info.filename for info in archive.infolist()]
            if any(name.partition("/")[2] == "constants.pkl" or name.partition("/")[2].startswith("code/") for name in names):
                raise ToolError("this is a TorchScript program, not a checkpoint", where=path, remedy=RESAVE)
            require_stored(archive.infolist(), most=MAX_RECORDS)
            starts = locate(archive, content, zero_gaps=False)
            sizes = {info.filename: info.file_size for info in archive.infolist()}
            _check_sums(archive, file.fileno(), starts, path)
            (pickled,) = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")] or [""]
            if not pickled or sizes[pickled] > MAX_PICKLE_BYTES:
                got = "no data.pkl" if not pickled else f"a data.pkl of {sizes[pickled]} bytes"
                raise ToolError("not a checkpoint of torch.save", where=path, got=got, remedy=RESAVE)
            _check_storages(archive.read(pickled), pickled.removesuffix("data.pkl") + "data/", sizes, path)
    except LayoutError as error:
        what = "the .pth file is not as torch.save writes it"
        raise ToolError(f"{what}: {error}", where=path, got=error.got, remedy=RESAVE) from None
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        what = "damaged .pth file, probably cut off"
        raise ToolError(what, where=path, got=first_line(error), remedy="download it again") from None


def _check_sums(archive: zipfile.ZipFile, handle: int, starts: Mapping[str, int], path: Path) -> None:
    """Compare every record with its CRC-32, several records at a time: threads read at the speed of memory."""
    with ThreadPoolExecutor(cpu_count()) as pool:

        def is_sound(info: zipfile.ZipInfo) -> bool:
            """Read in pieces, not through the mapping, so that memory does not grow with the file."""
            place, left, crc = starts[info.filename], info.file_size, 0
            while left and (piece := os.pread(handle, min(left, CHUNK_BYTES), place)):
                place, left, crc = place + len(piece), left - len(piece), zlib.crc32(piece, crc)
            return left == 0 and crc == info.CRC

        infos = archive.infolist()
        damaged = [info.filename for info, is_fine in zip(infos, pool.map(is_sound, infos), strict=True) if not is_fine]
    if damaged:
        remedy = "download it again; if it was saved without checksums, save it with torch.serialization.set_crc32_options(True)"
        what = f"damaged .pth file: {len(damaged)} of {len(infos)} records differ from their checksums"
        raise ToolError(what, where=path, got=damaged[0], remedy=remedy)


def _check_storages(pickled: bytes, folder: str, sizes: Mapping[str, int], path: Path) -> None:
    """Raise ToolError unless every storage in the pickle has a record of exactly its length."""
    scan = _Scan(io.BytesIO(pickled))
    try:
        scan.load()
    except Exception as error:  # noqa: BLE001 - a damaged pickle can raise any error
        raise ToolError("damaged .pth file: its data.pkl can't be read", where=path, got=first_line(error), remedy=RESAVE) from None
    for key, kind, numel in scan.storages:
        item_bytes = ITEM_BYTES.get(str(kind).removesuffix("Storage"))
        if not isinstance(numel, int) or item_bytes is None or sizes.get(f"{folder}{key}") != numel * item_bytes:
            got = f"{numel} x {kind} in {sizes.get(f'{folder}{key}', 'no')} bytes"
            raise ToolError(f"the checkpoint's storage {key!r} is not as long as it says", where=path, got=got, remedy=RESAVE)


class _Inert:
    """Stands for any object that a pickle names: accepts every call and assignment, and does nothing."""

    def __new__(cls, *_: object, **__: object) -> Self:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        """Take any arguments."""

    def __setstate__(self, _: object) -> None:
        """Take any state."""

    def __setitem__(self, _: object, __: object) -> None:
        """Take any item."""

    def append(self, _: object) -> None:
        """Take any element."""

    add = append

    def __call__(self, *_: object, **__: object) -> "_Inert":
        return _Inert()

    def __hash__(self) -> int:
        return 0


class _Scan(pickle._Unpickler):  # noqa: SLF001 - the unpickler written in Python: its memo is a dict, so a large index takes no memory
    """Reads a pickle, notes its storages, and makes inert objects of everything else."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.storages: list[tuple[object, object, object]] = []  # key, kind, number of elements

    def find_class(self, _: str, name: str) -> Any:
        """Return a new inert class with the name; nothing is imported."""
        return type(name, (_Inert,), {})

    def persistent_load(self, pid: Any) -> Any:
        """Note a storage: ("storage", kind, key, device, number of elements)."""
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"):
            raise pickle.UnpicklingError("a persistent id is no storage")
        self.storages.append((pid[2], getattr(pid[1], "__name__", "?"), pid[4]))
        return _Inert()
