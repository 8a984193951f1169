"""MediaPipe `.task` bundles, and the zip of label files that may follow a TFLite model.

Bundles are zip files whose entries the runtime maps where they lie, so all are stored and aligned.

Source: https://github.com/google-ai-edge/mediapipe/blob/v0.10.21/mediapipe/tasks/cc/metadata/utils/zip_utils.cc (what the
    runtime reads) and .../tasks/python/metadata/metadata_writers/model_asset_bundle_utils.py (what the official packer writes).
    We align to 64 bytes, not 4, by an extra field as Android's zipalign does, not by loose zero bytes: other readers accept it too.
"""

import mmap
import shutil
import stat
import struct
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.command.errors import ToolError, first_line
from shared.command.watchdog import reading
from shared.files.zip_layout import DISK_TROUBLE, LOCAL_HEADER, ZIP_DAMAGE, LayoutError, locate, require_stored
from shared.formats.tflite import IDENTIFIER, check_is_tflite

ALIGNMENT = 64  # bytes; weights inside a model lie at multiples of 16
EXTRA_ID = 0xD935  # Android's zipalign: alignment, then padding
MAX_ENTRIES = 256
LARGEST_ENTRY = 1_900_000_000  # bytes; above, zipfile writes headers of another length
MAX_APPENDED_BYTES = 2**28  # of all associated files together; label files and vocabularies are far smaller
MAX_DEPTH = 3  # bundles inside bundles; the deepest published one has one level
UNDATED = (1980, 1, 1, 0, 0, 0)
REMEDY = "download the bundle again"


@dataclass(frozen=True)
class Entry:
    """One file of a bundle, unpacked.

    Args:
        name: Its name in the bundle.
        path: Where its content lies.
        entries: Its own entries where it is a bundle itself, else None.
    """

    name: str
    path: Path
    entries: "tuple[Entry, ...] | None" = None

    @property
    def is_model(self) -> bool:
        """Whether this is a TFLite model."""
        with self.path.open("rb") as file:
            return file.read(8)[4:] == IDENTIFIER


def is_bundle(path: Path) -> bool:
    """Whether a file looks like a zip file rather than a model with a zip after it; the official ones don't start with 'PK'."""
    with path.open("rb") as file:
        if file.read(8)[4:] == IDENTIFIER:
            return False
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # Python 3.11 on some damaged directories
        return False


def unpack_bundle(path: Path, folder: Path, name: str | None = None, depth: int = 1) -> tuple[Entry, ...]:
    """Copy a bundle's entries into a folder, bundles inside it too.

    Args:
        path: The bundle.
        folder: A folder to make.
        name: What errors call the bundle; default: its path.
        depth: How deep it lies in others.

    Raises:
        ToolError: Anything but a plain zip of stored, checksummed entries that follow each other.
    """
    name = name or str(path)
    if depth > MAX_DEPTH:
        raise ToolError(f"bundles lie in each other more than {MAX_DEPTH} deep", where=name, remedy=REMEDY)
    folder.mkdir()
    try:
        with reading(path), zipfile.ZipFile(path) as archive:
            _require_plain(archive, path, name)
            places = [(info, folder / f"{number}") for number, info in enumerate(archive.infolist())]
            return tuple(_unpack(archive, info, place, f"{name}/{info.filename}", depth) for info, place in places)
    except ZIP_DAMAGE as error:
        if isinstance(error, OSError) and error.errno in DISK_TROUBLE:
            raise
        raise ToolError("damaged bundle", where=name, got=first_line(error), remedy=REMEDY) from None


def check_packed(path: Path, folder: Path) -> None:
    """Read a bundle that was just written: its entries, their checksums and its models; `folder` is made, and removed again."""
    try:
        for _, entry in models_of(unpack_bundle(path, folder)):
            check_is_tflite(entry.path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unpack(archive: zipfile.ZipFile, info: zipfile.ZipInfo, place: Path, name: str, depth: int) -> Entry:
    with archive.open(info) as data, place.open("wb") as file:  # checks the CRC at the end
        shutil.copyfileobj(data, file)
    inside = place.with_name(place.name + "_entries")
    entries = unpack_bundle(place, inside, name, depth + 1) if info.filename.endswith(".task") else None
    return Entry(info.filename, place, entries)


def _require_plain(archive: zipfile.ZipFile, path: Path, where: str) -> None:
    """Raise ToolError unless the bundle is what every reader of zip files sees alike."""
    infos = archive.infolist()
    if not infos or len(infos) > MAX_ENTRIES:
        got, expected = f"{len(infos)} entries", f"1 to {MAX_ENTRIES}"
        raise ToolError("not a MediaPipe bundle", where=where, got=got, expected=expected, remedy=REMEDY)
    try:
        require_stored(infos, most=MAX_ENTRIES)
        _require_files(infos)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            locate(archive, content, zero_gaps=True)
    except LayoutError as error:
        raise ToolError(f"not a plain bundle: {error}", where=where, got=error.got, remedy=REMEDY) from None


def _require_files(infos: list[zipfile.ZipInfo]) -> None:
    """Raise LayoutError unless all entries are files that MediaPipe can hold, and that every file system tells apart."""
    for info in infos:
        if info.is_dir() or stat.S_ISLNK(info.external_attr >> 16):
            raise LayoutError("the bundle holds a folder or a link", info.filename)
        if info.file_size > LARGEST_ENTRY:
            raise LayoutError(f"an entry is larger than {LARGEST_ENTRY} bytes", info.filename)
    if len({info.filename.casefold() for info in infos}) < len(infos):
        raise LayoutError("two entries differ only in case")


def models_of(entries: Sequence[Entry], prefix: str = "") -> Iterator[tuple[str, Entry]]:
    """Yield the TFLite models of a bundle and of the bundles in it, named such as 'hand_landmarker.task/hand_detector.tflite'."""
    for entry in entries:
        if entry.entries is not None:
            yield from models_of(entry.entries, f"{prefix}{entry.name}/")
        elif entry.is_model:
            yield prefix + entry.name, entry


def pack_bundle(entries: Sequence[Entry], output: Path, replaced: dict[Path, Path]) -> None:
    """Write a bundle: entries in their order, stored, undated, data at multiples of 64 bytes; the same content, the same bytes.

    Args:
        entries: What `unpack_bundle` returned.
        output: The file to write.
        replaced: Which entries' contents come from another file, by the entry's own path.
    """
    with zipfile.ZipFile(output, "w", zipfile.ZIP_STORED) as archive:
        for entry in entries:
            content = replaced.get(entry.path, entry.path)
            if entry.entries is not None:
                content = entry.path.with_name(entry.path.name + "_packed")
                pack_bundle(entry.entries, content, replaced)
            info = zipfile.ZipInfo(entry.name, date_time=UNDATED)
            info.create_system, info.external_attr, info.file_size = 3, 0o644 << 16, content.stat().st_size
            assert archive.fp is not None
            header = archive.fp.tell() + LOCAL_HEADER.size + len(entry.name.encode()) + 6
            info.extra = struct.pack("<3H", EXTRA_ID, 2 + -header % ALIGNMENT, ALIGNMENT) + bytes(-header % ALIGNMENT)
            with content.open("rb") as data, archive.open(info, "w") as file:
                shutil.copyfileobj(data, file)


def copy_appended_zip(source: Path, target: Path) -> None:
    """Append the zip that follows the flatbuffer of `source`, if any, to `target`, entry by entry.

    Raises:
        ToolError: The zip is damaged, encrypted or too large to be label files.
    """
    try:
        if not zipfile.is_zipfile(source):  # Python 3.11 raises on some damaged directories
            return
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "a", zipfile.ZIP_STORED) as new:
            if sum(entry.file_size for entry in old.infolist()) > MAX_APPENDED_BYTES:
                raise ToolError("the zip appended to the model is too large", where=source, expected="label files and the like")
            for entry in old.infolist():
                with old.open(entry) as data, new.open(_same_entry(entry), "w") as out:
                    shutil.copyfileobj(data, out)
    except ZIP_DAMAGE as error:
        if isinstance(error, OSError) and error.errno in DISK_TROUBLE:
            raise
        raise ToolError("the zip appended to the model is damaged", where=source, got=first_line(error)) from None


def _same_entry(entry: zipfile.ZipInfo) -> zipfile.ZipInfo:
    """Return an entry of the same name, date and compression for another archive."""
    same = zipfile.ZipInfo(entry.filename, date_time=entry.date_time)
    same.compress_type = entry.compress_type
    same.file_size = entry.file_size
    return same
