"""Bundles come out as they went in, aligned; a zip that two readers could see differently is refused."""

import contextlib
import errno
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from shared.command.errors import ToolError
from tests.conftest import REALDATA
from tools.quantize_tflite import bundle
from tools.quantize_tflite.bundle import ALIGNMENT, MAX_DEPTH, MAX_ENTRIES, Entry, is_bundle, models_of, pack_bundle, unpack_bundle

LOCAL = struct.Struct("<4s5H3L2H")
CENTRAL = struct.Struct("<4s6H3L5H2L")
END = struct.Struct("<4s4H2LH")
MODEL = b"\x1c\0\0\0TFL3" + bytes(range(200))
OTHER = b"\x1c\0\0\0TFL3" + bytes(range(50))
CONTENTS = {"detector.tflite": MODEL, "labels.txt": b"cat\ndog\n", "empty": b"", "blend.tflite": OTHER}


@dataclass(frozen=True)
class Part:
    """One entry of a zip, truthful but for what `local` and `central` say of their headers."""

    name: bytes = b"detector.tflite"
    data: bytes = MODEL
    before: bytes = b""
    flags: int = 0
    method: int = zipfile.ZIP_STORED
    local: dict[str, object] = field(default_factory=dict)
    central: dict[str, object] = field(default_factory=dict)

    def fields(self, lies: dict[str, object]) -> tuple[dict[str, object], bytes]:
        true = {"flags": self.flags, "method": self.method, "crc": zlib.crc32(self.data), "packed": len(self.data)}
        given = {"signature": None, "size": len(self.data), "name": self.name, "offset": None, **true, **lies}
        name = given["name"]
        assert isinstance(name, bytes)
        return given, name


def zipped(*parts: Part, behind: bytes = b"", directory_size: int = 0) -> bytes:
    """Return a zip file of those parts, with bytes behind them and an error in the directory's size."""
    content, directory = bytearray(), bytearray()
    for part in parts:
        content += part.before
        given, name = part.fields(part.central)
        offset = len(content) if given["offset"] is None else given["offset"]
        sizes = given["crc"], given["packed"], given["size"]
        directory += CENTRAL.pack(
            b"PK\1\2", 20, 20, given["flags"], given["method"], 0, 33, *sizes, len(name), 0, 0, 0, 0, 0, offset
        )  # 33: 1 January 1980
        directory += name
        given, name = part.fields(part.local)
        sizes = given["crc"], given["packed"], given["size"]
        content += LOCAL.pack(given["signature"] or b"PK\3\4", 20, given["flags"], given["method"], 0, 33, *sizes, len(name), 0)
        content += name + part.data
    content += behind
    end = END.pack(b"PK\5\6", 0, 0, len(parts), len(parts), len(directory) + directory_size, len(content), 0)
    return bytes(content + directory + end)


def official(contents: dict[str, bytes]) -> bytes:
    """Return what MediaPipe's own packer writes: one to four zero bytes before each entry, data at multiples of four."""
    parts: list[Part] = []
    offset = 0
    for name, data in contents.items():
        header = LOCAL.size + len(name.encode())
        zeros = 4 - (offset + header) % 4
        parts.append(Part(name.encode(), data, bytes(zeros)))
        offset += zeros + header + len(data)
    return zipped(*parts)


def nested(depth: int) -> bytes:
    """Return bundles in each other, so many in all."""
    return zipped(Part(b"inner.task", nested(depth - 1))) if depth > 1 else zipped(Part())


def streamed(contents: dict[str, bytes]) -> bytes:
    """Return a zip written to a pipe: sizes follow the data."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as end:
        with os.fdopen(writing, "wb") as pipe, zipfile.ZipFile(pipe, "w") as archive:
            for name, data in contents.items():
                archive.writestr(name, data)
        return end.read()


def unpack(content: bytes, folder: Path) -> tuple[Entry, ...]:
    path = folder / "in.task"
    path.write_bytes(content)
    return unpack_bundle(path, folder / "unpacked")


def contents_of(entries: tuple[Entry, ...]) -> dict[str, object]:
    return {entry.name: entry.path.read_bytes() if entry.entries is None else contents_of(entry.entries) for entry in entries}


def data_offsets(path: Path) -> list[int]:
    """Return where each entry's data begin, as its local header says."""
    content, offsets = path.read_bytes(), []
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            *_, name, extra = LOCAL.unpack_from(content, info.header_offset)
            offsets.append(info.header_offset + LOCAL.size + name + extra)
            assert content[offsets[-1] :][: info.file_size] == archive.read(info)
    return offsets


@pytest.mark.parametrize(
    "write", [official, streamed, lambda contents: zipped(*(Part(k.encode(), v) for k, v in contents.items()))]
)
def test_a_bundle_comes_out_as_it_went_in(tmp_path: Path, write: Callable[[dict[str, bytes]], bytes]) -> None:
    entries = unpack(write(CONTENTS), tmp_path)
    assert contents_of(entries) == CONTENTS
    pack_bundle(entries, tmp_path / "out.task", {})
    again = unpack_bundle(tmp_path / "out.task", tmp_path / "again")
    assert [entry.name for entry in again] == list(CONTENTS)
    assert contents_of(again) == CONTENTS


def test_what_is_packed_is_stored_undated_and_aligned(tmp_path: Path) -> None:
    contents = {**CONTENTS, "möwe.tflite": MODEL, "x" * 61: b"odd", "y" * 62: b"odder"}
    flagged = [Part(name.encode(), data, flags=0 if name.isascii() else 0x800) for name, data in contents.items()]
    pack_bundle(unpack(zipped(*flagged), tmp_path), tmp_path / "out.task", {})
    assert (tmp_path / "out.task").read_bytes()[:4] == b"PK\3\4"
    assert [offset % ALIGNMENT for offset in data_offsets(tmp_path / "out.task")] == [0] * len(contents)
    with zipfile.ZipFile(tmp_path / "out.task") as archive:
        assert {(info.compress_type, info.date_time) for info in archive.infolist()} == {
            (zipfile.ZIP_STORED, (1980, 1, 1, 0, 0, 0))
        }
        assert {info.filename: archive.read(info) for info in archive.infolist()} == contents


def test_the_same_content_is_the_same_bytes_whenever_and_wherever_it_was_packed(tmp_path: Path) -> None:
    packed = []
    for number, write in enumerate((official, streamed)):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        entries = unpack(write(CONTENTS), folder)
        for entry in entries:
            os.utime(entry.path, (10**9 * (number + 1),) * 2)
        pack_bundle(entries, folder / "out.task", {})
        packed.append((folder / "out.task").read_bytes())
    assert packed[0] == packed[1]
    pack_bundle(unpack_bundle(tmp_path / "0" / "out.task", tmp_path / "again"), tmp_path / "again.task", {})
    assert (tmp_path / "again.task").read_bytes() == packed[0]


def test_bundles_in_bundles_are_unpacked_and_packed_and_their_models_aligned_in_the_whole(tmp_path: Path) -> None:
    hand = {"hand_detector.tflite": MODEL, "hand_landmarks.tflite": OTHER}
    entries = unpack(official({"gesture.tflite": OTHER, "hand_landmarker.task": official(hand)}), tmp_path)
    assert contents_of(entries) == {"gesture.tflite": OTHER, "hand_landmarker.task": hand}
    pack_bundle(entries, tmp_path / "out.task", {})
    assert contents_of(unpack_bundle(tmp_path / "out.task", tmp_path / "again")) == contents_of(entries)
    whole = (tmp_path / "out.task").read_bytes()
    assert [whole.find(MODEL) % ALIGNMENT, whole.find(OTHER) % ALIGNMENT, whole.rfind(OTHER) % ALIGNMENT] == [0, 0, 0]
    assert whole.find(OTHER) < whole.find(MODEL) < whole.rfind(OTHER)


def test_a_replaced_model_gets_in_at_every_depth_and_the_rest_stays(tmp_path: Path) -> None:
    hand = {"detector.tflite": MODEL, "landmarks.tflite": OTHER}
    entries = unpack(official({"detector.tflite": MODEL, "hand.task": official(hand)}), tmp_path)
    small = tmp_path / "small.tflite"
    small.write_bytes(b"small")
    inner = dict(models_of(entries))["hand.task/detector.tflite"]
    pack_bundle(entries, tmp_path / "out.task", {inner.path: small})
    expected = {"detector.tflite": MODEL, "hand.task": {"detector.tflite": b"small", "landmarks.tflite": OTHER}}
    assert contents_of(unpack_bundle(tmp_path / "out.task", tmp_path / "again")) == expected
    pack_bundle(entries, tmp_path / "out.task", {entries[0].path: small})
    expected = {"detector.tflite": b"small", "hand.task": hand}
    assert contents_of(unpack_bundle(tmp_path / "out.task", tmp_path / "once_more")) == expected


def test_models_are_named_by_as_to_them_and_known_by_their_content(tmp_path: Path) -> None:
    inner = official({"detector.tflite": MODEL, "card.txt": b"TFL3"})
    entries = unpack(official({"weights": MODEL, "fake.tflite": b"no model", "hand.task": inner, "pose.task": inner}), tmp_path)
    models = dict(models_of(entries))
    assert list(models) == ["weights", "hand.task/detector.tflite", "pose.task/detector.tflite"]
    assert all(entry.path.read_bytes() == MODEL for entry in models.values())


@pytest.mark.parametrize(
    ("content", "is_one"),
    [
        (zipped(Part()), True),
        (official({"detector.tflite": MODEL, "labels.txt": b"cat"}), True),
        (streamed(CONTENTS), True),
        (MODEL, False),
        (MODEL + zipped(Part(b"labels.txt", b"cat")), False),
        (zipped(Part())[:-30], False),
        (b"", False),
        (b"PK\3\4", False),
        (b"<!DOCTYPE html><html></html>", False),
        (zipped(Part())[: -END.size] + struct.pack("<4sLQL", b"PK\6\7", 0, 0, 2) + zipped(Part())[-END.size :], False),
    ],
)
def test_a_bundle_is_a_zip_and_no_model_with_a_zip_behind_it(tmp_path: Path, content: bytes, is_one: bool) -> None:
    (tmp_path / "a").write_bytes(content)
    assert is_bundle(tmp_path / "a") is is_one


A, B = Part(b"a", b"A" * 50), Part(b"b", b"B" * 50)
FLIPPED = zipped(A, B).replace(b"BBB", b"BCB", 1)
DEFLATED = zlib.compress(b"A" * 500, wbits=-15)
SQUEEZED = {"size": 500, "crc": zlib.crc32(b"A" * 500)}
HIDDEN = zipped(Part(b"hidden", b"H"))[: LOCAL.size + 7]
LONGER = {"packed": 60, "size": 60}
FAR = {"packed": 10**6, "size": 10**6}

FAULTS: dict[str, tuple[bytes, str]] = {
    "truncated": (zipped(A, B)[:-10], "damaged bundle"),
    "cut at the front": (zipped(A, B)[20:], "bundle"),
    "no zip": (b"<html></html>", "damaged bundle"),
    "no bytes": (b"", "damaged bundle"),
    "no entries": (zipped(), "not a MediaPipe bundle; got 0 entries"),
    "too many entries": (
        zipped(*(Part(b"%d" % i, b"") for i in range(MAX_ENTRIES + 1))),
        "not a MediaPipe bundle; got 257 entries",
    ),
    "too deep": (nested(MAX_DEPTH + 1), "more than 3 deep"),
    "deflated": (zipped(Part(b"a", DEFLATED, method=8, local=SQUEEZED, central=SQUEEZED), B), "compressed.*entry 'a'"),
    "said to be deflated": (zipped(Part(b"a", method=8)), "compressed"),
    "stored in fewer bytes": (zipped(Part(b"a", local={"packed": 9}, central={"packed": 9})), "compressed"),
    "encrypted": (zipped(A, Part(b"b", flags=0x01)), "encrypted.*entry 'b'"),
    "strongly encrypted": (zipped(A, Part(b"b", flags=0x41)), "encrypted"),
    "one name twice": (zipped(A, B, A), "same name.*entry 'a'"),
    "above": (zipped(Part(b"../x")), "no plain name.*'../x'"),
    "above, further in": (zipped(Part(b"a/../../x")), "no plain name"),
    "absolute": (zipped(Part(b"/x")), "no plain name"),
    "backslash": (zipped(Part(b"..\\x")), "no plain name"),
    "unprintable": (zipped(Part(b"a\x1b[2Jb\nc")), "no plain name"),
    "a folder": (zipped(Part(b"models/", b""), A), "holds a folder"),
    "another name inside": (zipped(A, Part(b"b", local={"name": b"c"})), "two headers differ.*entry 'b'"),
    "another size inside": (zipped(A, Part(b"b", local=LONGER)), "two headers differ"),
    "another checksum inside": (zipped(Part(b"a", local={"crc": 1}), B), "two headers differ"),
    "another method inside": (zipped(Part(b"a", local={"method": 8}), B), "two headers differ"),
    "no header inside": (zipped(A, Part(b"b", local={"signature": b"PK\7\7"})), "two headers differ"),
    "two entries in one place": (zipped(A, Part(b"b", b"A" * 50, central={"offset": 0})), "between or across"),
    "an entry in another's data": (
        zipped(Part(b"a", HIDDEN), Part(b"hidden", b"H", central={"offset": LOCAL.size + 1})),
        "between or across",
    ),
    "longer than its place": (zipped(Part(b"a", local=LONGER, central=LONGER), B), "between or across"),
    "something before": (zipped(Part(b"a", before=b"#!/bin/sh\n"), B), "between or across"),
    "something between": (zipped(A, Part(b"b", before=b"\0\0hidden\0\0")), "between or across"),
    "an unlisted entry between": (zipped(A, Part(b"b", before=HIDDEN)), "between or across"),
    "into the directory": (zipped(A, Part(b"b", b"B" * 50, local=LONGER, central=LONGER)), "reaches into the directory"),
    "a flipped bit": (FLIPPED, "damaged bundle.*CRC"),
    "a flipped bit in a bundle within": (zipped(A, Part(b"in.task", FLIPPED)), "damaged bundle.*CRC"),
    "a smaller directory": (zipped(A, B, directory_size=-10), "damaged bundle"),
    "a larger directory": (zipped(A, B, directory_size=10), "damaged bundle"),
    "an offset behind the end": (zipped(A, Part(b"b", central={"offset": 10**6})), "between or across"),
    "two entries behind the end": (zipped(Part(b"a", local=FAR, central=FAR), Part(b"b", central={"offset": 2 * 10**6})), "bundle"),
    "something before the directory": (zipped(A, B, behind=b"hidden"), "between the entries and their directory"),
    "an unlisted entry before the directory": (zipped(A, B, behind=HIDDEN), "between the entries and their directory"),
    "encrypted inside": (zipped(A, Part(b"b", local={"flags": 0x01})), "two headers differ"),
    "no name": (zipped(A, Part(b"")), "no plain name"),
    "here": (zipped(Part(b"."), A), "no plain name"),
    "here, further in": (zipped(Part(b"./a"), A), "no plain name"),
    "a zero byte in its name": (zipped(A, Part(b"b\0c")), "no plain name"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_hostile_bundle_is_refused_in_one_line(tmp_path: Path, fault: str) -> None:
    content, says = FAULTS[fault]
    with pytest.raises(ToolError, match=says) as caught:
        unpack(content, tmp_path)
    assert str(caught.value).isprintable()
    assert str(tmp_path) in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"in.task", "unpacked"}


def test_the_limits_are_what_is_still_allowed(tmp_path: Path) -> None:
    (tmp_path / "wide").mkdir()
    assert len(unpack(zipped(*(Part(b"%d" % i, b"") for i in range(MAX_ENTRIES))), tmp_path / "wide")) == MAX_ENTRIES
    (tmp_path / "deep").mkdir()
    models = dict(models_of(unpack(nested(MAX_DEPTH), tmp_path / "deep")))
    assert list(models) == ["inner.task/inner.task/detector.tflite"]


def test_entries_that_lie_in_another_order_come_in_the_directorys(tmp_path: Path) -> None:
    behind = LOCAL.size + 1 + len(A.data)
    fields_a, fields_b = ({"name": part.name, "crc": zlib.crc32(part.data)} for part in (A, B))
    swapped = zipped(
        Part(b"a", A.data, central={**fields_b, "offset": behind}),
        Part(b"b", B.data, central={**fields_a, "offset": 0}),
    )
    assert list(contents_of(unpack(swapped, tmp_path)).items()) == [("b", B.data), ("a", A.data)]


def test_no_damage_ends_in_anything_but_an_error_line(tmp_path: Path) -> None:
    whole = zipped(Part(), Part(b"in.task", zipped(A, B)), Part(b"labels.txt", b"cat"))
    refused = 0
    for seed in range(400):
        rng, content = np.random.default_rng(seed), bytearray(whole)
        for place in rng.integers(0, len(content), 2):
            content[place] = rng.choice((0, 1, 80, 255, rng.integers(256)))
        (tmp_path / "a.task").write_bytes(content[: len(content) if seed % 4 else int(rng.integers(len(content)))])
        with contextlib.suppress(ToolError):
            refused += 1
            unpack_bundle(tmp_path / "a.task", tmp_path / f"{seed}")
            refused -= 1
    assert 200 < refused < 400


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "models"),
    [
        ("face_landmarker", ["face_detector.tflite", "face_landmarks_detector.tflite", "face_blendshapes.tflite"]),
        (
            "dummy_gesture_recognizer",
            [
                "dummy_hand_landmarker.task/dummy_hand_detector.tflite",
                "dummy_hand_landmarker.task/dummy_hand_landmarker.tflite",
                "dummy_gesture_recognizer.tflite",
            ],
        ),
    ],
)
def test_published_bundles_come_out_as_they_went_in(tmp_path: Path, name: str, models: list[str]) -> None:
    source = REALDATA / "mediapipe" / f"{name}.task"
    assert is_bundle(source)
    entries = unpack_bundle(source, tmp_path / "first")
    assert [found for found, _ in models_of(entries)] == models
    with zipfile.ZipFile(source) as archive:
        plain = [(entry.name, entry.path.read_bytes()) for entry in entries]
        assert plain == [(info.filename, archive.read(info)) for info in archive.infolist()]
    pack_bundle(entries, tmp_path / "out.task", {})
    assert contents_of(unpack_bundle(tmp_path / "out.task", tmp_path / "second")) == contents_of(entries)
    assert {offset % ALIGNMENT for offset in data_offsets(tmp_path / "out.task")} == {0}


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["html_page", "text_placeholder", "truncated"])
def test_what_others_call_a_bundle_and_is_none_is_refused(tmp_path: Path, name: str) -> None:
    source = REALDATA / "corrupt" / f"{name}.task"
    assert not is_bundle(source)
    with pytest.raises(ToolError, match=rf"{name}\.task: damaged bundle") as caught:
        unpack_bundle(source, tmp_path / "unpacked")
    assert str(caught.value).isprintable()


def test_an_entry_too_large_for_plain_headers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "LARGEST_ENTRY", 49)
    with pytest.raises(ToolError, match="an entry is larger than 49 bytes"):
        unpack(zipped(A), tmp_path)


def test_a_full_disk_is_no_damage_of_the_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bundle.shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="No space left"):
        unpack(zipped(A), tmp_path)
