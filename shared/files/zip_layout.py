"""Where the entries of a zip file lie, as every reader of zip files sees it: stored, in bounds, none twice, none over another.

Python's zipfile, PyTorch and MediaPipe read the directory at the end; others go from entry to entry. A file on which they would
differ is refused, and so is one whose directory leads out of the file: what is mapped into memory is not checked again.
"""

import errno
import mmap
import struct
import zipfile
import zlib
from collections.abc import Sequence

LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # signature, version, flags, method, time, date, crc, sizes, lengths of name and extra
END_RECORD_BYTES = 22
ENCRYPTED, HAS_DESCRIPTOR = 0x41, 0x08
DESCRIPTOR_BYTES = 16
# What reading a zip can raise on a damaged or encrypted one.
ZIP_DAMAGE = (zipfile.BadZipFile, zlib.error, LookupError, ValueError, EOFError, RuntimeError, NotImplementedError, OSError)
DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # errors of the disk, not of the zip


class LayoutError(Exception):
    """What is wrong, as a sentence without a full stop, and at which entry."""

    def __init__(self, what: str, entry: str | None = None) -> None:
        super().__init__(what)
        self.got = None if entry is None else f"entry {entry!r}"


def require_stored(infos: Sequence[zipfile.ZipInfo], *, most: int) -> None:
    """Raise LayoutError unless there are 1 to `most` entries with plain names of their own, stored as they are."""
    if not 0 < len(infos) <= most:
        raise LayoutError(f"the zip has {len(infos)} entries, expected 1 to {most}")
    seen: set[str] = set()
    for info in infos:
        name, written = info.filename, info.orig_filename  # zipfile cuts a name off at a NUL
        if written in seen:
            raise LayoutError("two entries have the same name", name)
        seen.add(written)
        if not written.isprintable() or "\\" in written or {"", ".", ".."} & set(written.removesuffix("/").split("/")):
            raise LayoutError("an entry's name is no plain name", written)
        if info.flag_bits & ENCRYPTED:
            raise LayoutError("an entry is encrypted", name)
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise LayoutError("an entry is compressed", name)


def locate(archive: zipfile.ZipFile, content: mmap.mmap, *, zero_gaps: bool) -> dict[str, int]:
    """Return entry -> where its data starts in the file.

    Args:
        archive: The zip file, its entries checked by `require_stored`.
        content: The same file, mapped.
        zero_gaps: Whether nothing but zeros may lie between entries; else anything may, as no reader looks there.

    Raises:
        LayoutError: Headers that differ, entries over each other or outside, something after the directory, a comment.
    """
    if archive.comment or content[-END_RECORD_BYTES:][:4] != b"PK\5\6":
        raise LayoutError("something lies behind the zip's directory")
    end, reached, starts = archive.start_dir, 0, {}
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        start = info.header_offset
        if start < reached or start + LOCAL_HEADER.size > end or (zero_gaps and content[reached:start].strip(b"\0")):
            raise LayoutError("something lies between or across the entries", info.filename)
        header = LOCAL_HEADER.unpack(content[start : start + LOCAL_HEADER.size])
        signature, _, flags, method, _, _, crc, packed, size, name_length, extra_length = header
        behind = start + LOCAL_HEADER.size
        name = content[behind : behind + name_length]
        has_descriptor = flags & HAS_DESCRIPTOR  # sizes follow the data; readers take those of the directory
        is_zip64 = 0xFFFFFFFF in (packed, size)  # true sizes stand in the extra field
        agrees = has_descriptor or is_zip64 or (crc, packed, size) == (info.CRC, info.compress_size, info.file_size)
        if signature != b"PK\3\4" or method != 0 or flags != info.flag_bits or not agrees or not _is_name(name, info):
            raise LayoutError("an entry's two headers differ", info.filename)
        starts[info.filename] = behind + name_length + extra_length
        reached = starts[info.filename] + info.file_size
        if reached > end:
            raise LayoutError("an entry reaches into the directory", info.filename)
        if zero_gaps and has_descriptor:
            reached += DESCRIPTOR_BYTES
    if zero_gaps and content[reached:end].strip(b"\0"):
        raise LayoutError("something lies between the entries and their directory")
    return starts


def _is_name(written: bytes, info: zipfile.ZipInfo) -> bool:
    """Return whether a local header's name is that of the directory, in either of the encodings that zip files have."""
    return any(written.decode(encoding, "replace") == info.orig_filename for encoding in ("utf-8", "cp437"))
