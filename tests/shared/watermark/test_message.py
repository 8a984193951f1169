"""Messages survive every way of writing them; wrong ones and wrong files are one line."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.command.errors import ToolError
from shared.watermark.message import chance_of_agreement, parse_message, read_messages, to_bit_string, to_hex, to_int

BITS = np.array([0, 0, 0, 1, 1, 0, 1, 0], bool)


def test_the_first_bit_is_the_highest() -> None:
    assert (to_bit_string(BITS), to_hex(BITS), to_int(BITS)) == ("00011010", "1a", 26)
    assert to_hex(np.array([1, 0, 1, 1, 1], bool)) == "17"  # 5 bits take two digits


@pytest.mark.parametrize("text", ["00011010", "1a", "1A", "0x1a", 26, np.int64(26), BITS, BITS.astype(int), BITS.tolist()])
def test_every_form_is_read(text: object) -> None:
    np.testing.assert_array_equal(parse_message(text, 8), BITS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["1g", "1a2", "", "0001101", 256, -1, True, 1.5, None, BITS[:7], [[1], [1, 0]], np.full(8, 0.5), "٣a", "0b11", " 1a"]
)
def test_what_is_no_message_of_that_length_is_an_error(text: object) -> None:
    with pytest.raises(ToolError, match="not a message of 8 bits"):
        parse_message(text, 8)  # type: ignore[arg-type]


def test_long_messages_go_there_and_back() -> None:
    bits = np.random.default_rng(0).random(1024) < 0.5
    for form in (to_hex, to_int, to_bit_string):
        np.testing.assert_array_equal(parse_message(form(bits), 1024), bits)  # type: ignore[operator]


def test_the_chance_of_agreement_is_the_binomial_tail() -> None:
    for matching, nbits, chance in ((0, 32, 1), (32, 32, 2**-32), (31, 32, 33 / 2**32), (2, 3, 0.5), (1024, 1024, 2.0**-1024)):
        assert chance_of_agreement(matching, nbits) == pytest.approx(chance, rel=1e-9)
    assert chance_of_agreement(51200, 102400) == pytest.approx(0.5, abs=0.01)  # many, and in no time


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "sub/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    Image.new("RGB", (8, 8)).save(tmp_path.parent / "outside.png")
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path


def write(folder: Path, content: object) -> Path:
    path = folder / "messages.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_set_names_marked_and_unmarked_images(folder: Path) -> None:
    entries = [{"file": "a.png", "message": "1a", "original": "sub/b.png"}, {"file": "sub/b.png", "message": None}]
    marked, unmarked = read_messages(write(folder, {"nbits": 8, "images": entries, "seed": 3}))
    assert (marked.file, marked.original) == (folder / "a.png", folder / "sub/b.png")
    assert marked.message is not None
    np.testing.assert_array_equal(marked.message, BITS)
    assert (unmarked.file, unmarked.message, unmarked.original) == (folder / "sub/b.png", None, None)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "the messages file is empty"),
        ("[" * 100000, "bad messages file"),
        ("\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "bad messages file"),
        ([], "bad messages file"),
        ({"nbits": 8, "images": []}, "at least 1"),
        ({"nbits": 0, "images": [{"file": "a.png", "message": None}]}, "nbits"),
        ({"nbits": 8, "images": [{"file": "a.png"}]}, "message: Field required"),
        ({"nbits": 8, "images": [{"file": "a.png", "message": "1a", "orignal": "b.png"}]}, "orignal"),
        ({"nbits": 8, "images": [{"file": "a.png", "message": "1a2"}]}, r"image 'a\.png': not a message of 8 bits"),
        ({"nbits": 8, "images": [{"file": "gone.png", "message": "1a"}]}, "is not there"),
        ({"nbits": 8, "images": [{"file": "../outside.png", "message": "1a"}]}, "lies outside"),
        ({"nbits": 8, "images": [{"file": "/etc/hostname", "message": "1a"}]}, "lies outside"),
        ({"nbits": 8, "images": [{"file": "a\0.png", "message": "1a"}]}, "lies outside"),
        ({"nbits": 8, "images": [{"file": "loop", "message": "1a"}]}, "lies outside|is not there"),
        ({"nbits": 8, "images": [{"file": "a.png", "message": "1a"}, {"file": "sub/../a.png", "message": None}]}, "listed twice"),
    ],
)
def test_a_wrong_messages_file_is_one_line(folder: Path, content: object, reason: str) -> None:
    with pytest.raises(ToolError, match=reason) as caught:
        read_messages(write(folder, content))
    assert "\n" not in str(caught.value)


def test_a_missing_messages_file_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="no such messages file"):
        read_messages(tmp_path / "messages.json")
