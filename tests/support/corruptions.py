"""Changes to files that get past the first check of whoever reads them.

A byte changed anywhere mostly trips a checksum or a length, and nothing behind it is tried. So each format has its own way to be
changed: records with their checksums mended, fields of tables and messages, words of text. What can't be taken apart any more is
changed byte by byte.
"""

import io
import itertools
import json
import pickle
import pickletools
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

from tests.tools.quantize_tflite.test_bundle import CENTRAL, END, LOCAL, Part, zipped

Mutate = Callable[[bytes, random.Random], bytes]
END64, LOCATOR64 = struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
HEADERS = {b"PK\3\4": LOCAL, b"PK\1\2": CENTRAL, b"PK\5\6": END, b"PK\6\6": END64, b"PK\6\7": LOCATOR64}
BEHIND = {b"PK\3\4": 0, b"PK\1\2": 2}  # bytes; how much further back a header has the fields that both of an entry's have
BYTES = (0, 1, 0x7F, 0x80, 0xFF)
NUMBERS = (0, 1, 2, 3, 4, 8, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30)
FLOATS = (0.0, -0.0, 0.5, -1.0, 1e-45, 1e308, float("inf"), float("-inf"), float("nan"))
PATHS = ("", " ", ".", "..", "/", "../weights.data", "/etc/passwd", "weights.data", "a/b", "a\\b", "a\0b", "x" * 300, "é" * 40)
STRANGE = ("\x1b[2J", "\u202e", "\ud800", "x" * 5000, "[" * 1200, "nan", "-1", "1e999", "9" * 5000, "0x10", "1_0", "module.")
TEXTS = (*PATHS, *STRANGE)
MARKS = ("=", ".", "[", "]", "[[", "]]", "{", "}", '"', "'", '"""', "'''", "#", "\n", "\r", "-", "0x", "\\u", "\\U0010ffff")
DATES = ("1979-05-27T07:32:00Z", "1979-13-41", "25:61:61")
TOML = (*MARKS, *DATES, "nan", "inf", "true", "url", "file", "[gates.int8]", "[checkpoint]", "a.b.c = 1\n")
ENDS = ("\n", "\r", "\r\n", "\0", "\t", ",", ";", '"', '""')
CSV = (*ENDS, "file", "frame", "time", "a.png", "b.mp4", "..", "/", "nan", "inf", "-1", "1e308")
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "X")
KINDS = ("<f4", "|O", ">f8", "<U9999", "<M8[ns]", "f4,i4")
NPY = (*KINDS, "(", ")", "[", "{", "None", "True", "-1", "0", "'shape'", "'descr'", "9" * 40)


# Numbers, texts, bytes.


def odd(rng: random.Random, old: float = 0) -> Any:
    """Return a number that parsers stumble over, or one near to what stood there."""
    if isinstance(old, float):
        return rng.choice((*FLOATS, -old, old * 2))
    near = old + rng.choice((-1, 1, -2, 2, 4, 64, -64))
    return rng.choice((near, rng.choice(NUMBERS), -rng.choice(NUMBERS), -1))


def scramble(data: bytes, rng: random.Random) -> bytes:
    """Flip bits, set bytes and words, cut out and double pieces, cut off the end."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        content = content or bytearray(1)
        at, length = rng.randrange(len(content)), rng.randint(1, 64)
        match rng.randrange(12):
            case 0 | 1 | 2:
                content[at] ^= 1 << rng.randrange(8)
            case 3 | 4:
                content[at] = rng.choice((*BYTES, rng.randrange(256)))
            case 5 | 6:
                content = bytearray(set_word(content, at, rng))
            case 7 | 8:
                del content[at : at + length]
            case 9 | 10:
                to = rng.randrange(len(content))
                content[to:to] = content[at : at + length]
            case _:
                del content[at:]
    return bytes(content)


def set_word(data: bytes, at: int, rng: random.Random, widths: Sequence[int] = (2, 4, 8)) -> bytes:
    """Set an integer of some bytes, lowest byte first."""
    width = rng.choice(widths)
    value = odd(rng, int.from_bytes(data[at : at + width], "little"))
    return data[:at] + (value % 256**width).to_bytes(width, "little") + data[at + width :]


def bend_text(words: Sequence[str]) -> Mutate:
    """Return what changes the numbers, words and lines of a text, with words of its language."""

    def bend(data: bytes, rng: random.Random) -> bytes:
        text = data.decode()
        parts = re.split(r"(\w+)", text) if rng.random() < 0.7 else text.splitlines(keepends=True)
        at = rng.randrange(len(parts))
        match rng.randrange(6):
            case 0:
                parts[at] = rng.choice(words)
            case 1:
                parts.insert(at, rng.choice(words))
            case 2:
                places = [place for place, part in enumerate(parts) if part.isdigit()] or [at]
                place = rng.choice(places)
                parts[place] = str(odd(rng, int(parts[place]) if parts[place].isdigit() else 0.5))
            case 3:
                del parts[at]
            case 4:
                parts.insert(rng.randrange(len(parts)), parts[at] * rng.choice((1, 1, 2, 100)))
            case _:
                parts[at] = rng.choice(TEXTS)
        return "".join(parts).encode("utf-8", "surrogatepass")

    return bend


def bend_nest(nest: Any, rng: random.Random) -> Any:
    """Change one number, text or list in a nest of dicts, lists and objects."""
    holder = [nest]
    slots = list(_slots(holder))
    scalars = [slot for slot in slots if isinstance(slot[2], int | float | str | bytes)]
    owner, key, value = rng.choice(scalars if scalars and rng.random() < 0.7 else slots)
    new: Any
    match value:
        case bool():
            new = not value
        case int() | float():
            new = odd(rng, value)
        case str():
            new = rng.choice((*TEXTS, *DTYPES, value[1:], value * 2))
        case bytes():
            new = rng.choice((scramble(value, rng), rng.choice(TEXTS).encode("utf-8", "surrogatepass"), None))
        case list() if value and rng.random() < 0.8:
            at = rng.randrange(len(value))
            new = rng.choice((value[:at], value[at:], value[:at] + value[at + 1 :], [*value, value[at]], [*value, *value]))
        case dict() if value and rng.random() < 0.8:
            gone = rng.choice(list(value))
            new = {rng.choice((*TEXTS, "__metadata__")) if name == gone else name: inner for name, inner in value.items()}
        case _:
            new = rng.choice((None, 0, [], {}))
    _put(owner, key, new)
    return holder[0]


def _slots(owner: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Yield owner, key and value of everything in a nest; short arrays become lists."""
    items = list(owner.items() if isinstance(owner, dict) else enumerate(owner) if isinstance(owner, list) else vars(owner).items())
    for key, found in items:
        value = found
        if isinstance(found, np.ndarray):
            value = found.tolist()
            _put(owner, key, value)
        yield owner, key, value
        if isinstance(value, list | dict) or hasattr(value, "__dict__"):
            yield from _slots(value)


def _put(owner: Any, key: Any, value: Any) -> None:
    if isinstance(owner, dict | list):
        owner[key] = value
    else:
        setattr(owner, key, value)


# Zip files, and what is made of them.


def bend_zip(change: Callable[[str, bytes, random.Random], bytes]) -> Mutate:
    """Return what changes a zip's headers, or an entry by name and content, its checksum mended."""

    def bend(data: bytes, rng: random.Random) -> bytes:
        return bend_headers(data, rng) if rng.random() < 0.4 else bend_entries(data, rng, change)

    return bend


def bend_headers(data: bytes, rng: random.Random) -> bytes:
    """Set a field of a zip's headers, often both of an entry's two alike."""
    places = [(found.start(), signature) for signature in HEADERS for found in re.finditer(re.escape(signature), data)]
    at, signature = rng.choice(places)
    field = rng.randrange(4, HEADERS[signature].size - 1, 2)
    bent = set_word(data, at + field, rng, (2, 4))
    if signature in BEHIND and rng.random() < 0.5:
        common = field - BEHIND[signature]
        others = [(place, kind) for place, kind in places if kind in BEHIND and kind != signature]
        place, kind = rng.choice(others)
        to = place + common + BEHIND[kind]
        bent = bent[:to] + bent[at + field : at + field + 4] + bent[to + 4 :]
    return bent[: len(data)]


def bend_entries(data: bytes, rng: random.Random, change: Callable[[str, bytes, random.Random], bytes]) -> bytes:
    """Change a zip's entries, and write them anew."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    at = rng.randrange(len(entries))
    name, content = entries[at]
    match rng.randrange(8):
        case 0:
            entries[at] = (rng.choice((*TEXTS, name.upper(), name + "/", "folder/" + name, "a.task")), content)
        case 1:
            del entries[at]
        case 2:
            entries.append(rng.choice(entries))
        case 3:
            entries.append(("inner.task", data))
        case _:
            entries[at] = (name, change(name, content, rng))
    return rezip(entries, gap=rng.choice((0, 0, 0, 1, 3, 64)))


def rezip(entries: Sequence[tuple[str, bytes]], gap: int = 0) -> bytes:
    """Return a zip of those entries, stored, with zeros before each."""
    return zipped(*(Part(name.encode("utf-8", "surrogatepass"), content, bytes(gap), flags=0x800) for name, content in entries))


def bend_bundle_entry(name: str, content: bytes, rng: random.Random) -> bytes:
    """Change an entry of a bundle: a bundle inside as one."""
    return bend_headers(content, rng) if name.endswith(".task") else scramble(content, rng)


def bend_record(name: str, content: bytes, rng: random.Random) -> bytes:
    """Change a record of a .pth file: its pickle op by op."""
    return bend_pickle(content, rng) if name.endswith("data.pkl") else scramble(content, rng)


def bend_pickle(data: bytes, rng: random.Random) -> bytes:
    """Change, drop, double or swap ops of a pickle."""
    ops = list(pickletools.genops(data))
    starts = [place for _, _, place in ops if place is not None]
    pieces = [data[start:end] for start, end in itertools.pairwise([*starts, len(data)])]
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(1, len(pieces))
        arguments = {number: value for number, (op, value, _) in enumerate(ops) if not op.name.endswith(("GLOBAL", "PUT"))}
        kind = rng.choice((int, str))
        place = min(rng.choice([number for number, value in arguments.items() if isinstance(value, kind)]), len(pieces) - 1)
        match rng.randrange(8):
            case 0 | 1 | 2 | 3:
                is_number = isinstance(old := arguments.get(place), int)
                new = odd(rng, old) if is_number else rng.choice((*TEXTS, "0", "1", "cuda", "meta"))
                pieces[place] = pickle.dumps(new, 2)[2 : -1 if is_number else -3]  # without the pickle's start and end
            case 4:
                other = rng.choice((b"Double", b"Half", b"Bool", b"Untyped", b"ComplexDouble"))
                pieces = [piece.replace(b"FloatStorage", other + b"Storage") for piece in pieces]
            case 5:
                del pieces[at]
            case 6:
                pieces.insert(rng.randrange(1, len(pieces)), pieces[at])
            case _:
                to = rng.randrange(1, len(pieces))
                pieces[at], pieces[to] = pieces[to], pieces[at]
    return b"".join(pieces)


def bend_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Change the header of a .safetensors file, its length mended."""
    length = int.from_bytes(data[:8], "little")
    header = bend_nest(json.loads(data[8 : 8 + length]), rng)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def bend_checkpoint(data: bytes, rng: random.Random) -> bytes:
    """Change a checkpoint of either kind."""
    return bend_zip(bend_record)(data, rng) if data.startswith(b"PK") else bend_safetensors(data, rng)


def bend_array(_: str, content: bytes, rng: random.Random) -> bytes:
    """Change an array of an .npz: its header as text, its length mended, or its bytes."""
    length = struct.unpack_from("<H", content, 8)[0]
    header = bend_text(NPY)(content[10 : 10 + length], rng)
    if rng.random() < 0.2:
        return scramble(content, rng)
    return content[:8] + struct.pack("<H", len(header)) + header + content[10 + length :]


def bend_json(data: bytes, rng: random.Random) -> bytes:
    """Change a value of a JSON file."""
    return json.dumps(bend_nest(json.loads(data), rng)).encode()


def bend_tflite(data: bytes, rng: random.Random) -> bytes:
    """Change a field of a TFLite model's tables, or an aligned word; what is appended stays."""
    if rng.random() < 0.5:
        return set_word(data, 4 * rng.randrange(len(data) // 4), rng, (4,))
    end = data.find(b"PK\3\4")
    flat, behind = (data, b"") if end < 0 else (data[:end], data[end:])
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(flat))
    for _ in range(rng.choice((1, 1, 2))):
        bend_nest(model, rng)
    written = bytes(flatbuffer_utils.convert_object_to_bytearray(model))
    if behind and rng.random() < 0.2:
        behind = bend_headers(behind, rng)
    return written + (behind or data[len(written) :])  # weights lie behind it, too


def bend_onnx(data: bytes, rng: random.Random) -> bytes:
    """Change fields of an ONNX model's messages."""
    model = onnx.ModelProto.FromString(data)
    for _ in range(rng.choice((1, 1, 2))):
        message = rng.choice(list(_messages(model)))
        fields = [field for field, _ in message.ListFields()]
        field = rng.choice(fields if fields and rng.random() < 0.8 else message.DESCRIPTOR.fields)
        value = getattr(message, field.name)
        if isinstance(value, int | float | str | bytes):
            setattr(message, field.name, _other(value, rng))
        elif not hasattr(value, "extend"):
            message.ClearField(field.name) if rng.random() < 0.5 else value.SetInParent()
        elif not value or rng.random() < 0.3:
            value.add() if hasattr(value, "add") else value.append({9: "x", 12: b"x"}.get(field.type, 1))
        else:
            at = rng.randrange(len(value))
            if rng.random() < 0.3:
                del value[at]
            elif hasattr(value, "add"):
                value.add().CopyFrom(value[at])
            else:
                value[at] = _other(value[at], rng)
    return bytes(model.SerializeToString())


def _messages(message: Any) -> Iterator[Any]:
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if hasattr(value, "extend") else [value]:
                yield from _messages(inner)


def _other(value: float | str | bytes, rng: random.Random) -> Any:
    if isinstance(value, str):
        return rng.choice((*(text for text in TEXTS if text.isascii()), value[1:], value * 2))
    return scramble(value, rng) if isinstance(value, bytes) else odd(rng, value)


def bend_image(data: bytes, rng: random.Random) -> bytes:
    """Change an image: a chunk of a PNG with its checksum mended, anything else byte by byte."""
    if not data.startswith(b"\x89PNG") or rng.random() < 0.3:
        return scramble(data, rng)
    chunks, at = [], 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    place = rng.randrange(len(chunks))
    kind, content = chunks[place]
    chunks[place] = (kind, scramble(content, rng)) if rng.random() < 0.8 else (kind, content[: len(content) // 2])
    return data[:8] + b"".join(struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
