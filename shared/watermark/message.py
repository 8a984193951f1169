"""Messages of watermarks: as bits, hex, integers or text; the chance of agreement; and the messages of a set of images.

The first bit is the leftmost digit of a bit string and the highest of an integer.
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from shared.command.errors import ToolError
from shared.files.file_type import is_regular, read_head

Bits = NDArray[np.bool_]  # (K,)
FILE_NAME = "messages.json"
HEX_DIGITS = set("0123456789abcdef")
AGAIN = "correct it; models/miniseal/samples/messages.json shows the form"


def to_bit_string(bits: Bits) -> str:
    """Return the message as digits `0` and `1`, a digit for each bit."""
    return "".join("1" if bit else "0" for bit in bits)


def to_int(bits: Bits) -> int:
    """Return the message as an integer."""
    return int(to_bit_string(bits), 2)


def to_hex(bits: Bits) -> str:
    """Return the message as hexadecimal digits, a digit for each four bits, rounded up; leading zeros are kept."""
    return f"{to_int(bits):0{-(-len(bits) // 4)}x}"


def parse_message(message: "str | int | Bits", nbits: int) -> Bits:
    """Return a message as bool (nbits,).

    Args:
        message: An integer, a string of `nbits` digits 0 and 1, hexadecimal digits with or without `0x`, text of `nbits` / 8
            bytes in UTF-8, or the bits in a row.
        nbits: Length of the message.

    Raises:
        ToolError: The message has a wrong form or length.
    """
    digits = -(-nbits // 4)
    expected = f"an integer below 2**{nbits}, {nbits} binary digits or {digits} hexadecimal digits"
    expected += f", or text of {nbits // 8} bytes" if nbits % 8 == 0 else ""
    if isinstance(message, np.integer):
        message = int(message)
    elif isinstance(message, list | tuple):
        message = np.asarray(message, dtype=object)  # also of ragged lists
    match message:
        case np.ndarray():
            if message.shape == (nbits,) and bool(np.isin(message, (0, 1)).all()):
                return message.astype(bool)
        case int() if 0 <= message < 2**nbits and not isinstance(message, bool):
            return _from_int(message, nbits)
        case str():
            number = _number_of(message, nbits)
            if number is not None:
                return _from_int(number, nbits)
    got = f"an array of shape {message.shape}" if isinstance(message, np.ndarray) else repr(message)
    raise ToolError(f"not a message of {nbits} bits", got=got, expected=expected, remedy="correct it")


def _number_of(message: str, nbits: int) -> int | None:
    """Return the integer that a string means; None where it has another length."""
    digits, text = -(-nbits // 4), message.lower().removeprefix("0x")
    if len(message) == nbits and set(message) <= {"0", "1"}:
        return int(message, 2)
    if len(text) == digits and set(text) <= HEX_DIGITS:
        return int(text, 16) if int(text, 16) < 2**nbits else None
    code = message.encode(errors="replace")
    if len(code) * 8 != nbits:
        return None
    if set(text) <= HEX_DIGITS:  # more likely digits, and too few
        remedy = f"if it is text, give its {digits} hexadecimal digits: {code.hex()}"
        raise ToolError(f"not a message of {nbits} bits", got=repr(message), expected=f"{digits} hexadecimal digits", remedy=remedy)
    return int.from_bytes(code)


def _from_int(number: int, nbits: int) -> Bits:
    return np.array([digit == "1" for digit in f"{number:0{nbits}b}"])


def chance_of_agreement(matching: int, nbits: int) -> float:
    """Return the p-value: the probability that a random message matches a given message in at least `matching` of `nbits` bits."""
    whole = math.lgamma(nbits + 1) - nbits * math.log(2)
    counts = range(matching, nbits + 1)
    chances = (math.exp(whole - math.lgamma(count + 1) - math.lgamma(nbits - count + 1)) for count in counts)
    return min(1.0, math.fsum(chances))


@dataclass(frozen=True)
class Labelled:
    """An image whose message is known.

    Args:
        file: The image.
        message: Its message, bool (K,); None for an unmarked image.
        original: The unmarked original, if known.
    """

    file: Path
    message: Bits | None
    original: Path | None = None


@dataclass(frozen=True)
class _Entry:
    __pydantic_config__ = ConfigDict(extra="forbid")
    file: str
    message: str | None
    original: str | None = None
    source: str | None = None  # origin of the image, for the reader
    box: list[int] | None = None


@dataclass(frozen=True)
class _Content:
    __pydantic_config__ = ConfigDict(extra="ignore")  # a set may have further fields
    nbits: Annotated[int, Field(ge=1, le=65536, strict=True)]
    images: Annotated[list[_Entry], Field(min_length=1)]


def read_messages(path: Path) -> list[Labelled]:
    """Return the images that a messages file lists; names of files are relative to its folder.

    The file: `{"nbits": 32, "images": [{"file": "a.png", "message": "1f3a09bc", "original": "b.png"}, ...]}`; a message is
    hexadecimal or binary digits, or text, as of `parse_message`, or null for an unmarked image; `original` may be left out.

    Raises:
        ToolError: The file is missing or has a wrong form; an image is missing or outside the folder; a message is wrong.
    """
    read_head(path, "messages", limit="text-mb", again=AGAIN)
    try:
        content = TypeAdapter(_Content).validate_json(path.read_bytes())
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc'])) or 'the file'}: {fault['msg']}" for fault in error.errors()[:3]]
        raise ToolError("bad messages file: " + "; ".join(faults), where=path, remedy=AGAIN) from None
    images = [
        Labelled(
            _beside(path, entry.file),
            None if entry.message is None else _message(path, entry, content.nbits),
            None if entry.original is None else _beside(path, entry.original),
        )
        for entry in content.images
    ]
    places = Counter(image.file.resolve() for image in images)
    if twice := next((place for place, times in places.items() if times > 1), None):
        raise ToolError("an image is listed twice", where=path, got=repr(str(twice)), remedy="list each image once")
    return images


def _message(path: Path, entry: _Entry, nbits: int) -> Bits:
    assert entry.message is not None
    try:
        return parse_message(entry.message, nbits)
    except ToolError as error:
        raise ToolError(f"image '{entry.file}': {error}", where=path, remedy=AGAIN) from None


def _beside(path: Path, name: str) -> Path:
    """Return a file of the set; it must lie in the folder of the messages file, or below."""
    folder = path.parent
    try:
        is_inside = (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a loop of links, an impossible name
        is_inside = False
    if not is_inside:
        what, remedy = "an image lies outside the folder of its messages file", "put it there, or below"
        raise ToolError(what, where=path, got=repr(name), remedy=remedy)
    if not is_regular(folder / name):
        raise ToolError("an image of the messages file is not there", where=path, got=repr(name), remedy=AGAIN)
    return folder / name
