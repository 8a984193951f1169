"""The one error that a user is meant to read."""

import errno
import re
from pathlib import Path
from typing import Any, Self

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of ONNX Runtime and LiteRT: pattern, and what to write in its place.
BOILERPLATE = (
    (r"^\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ", ""),
    (r"Non-zero status code returned while running (\S+) node\. Name:'(.*?)' Status Message: ", r"\1 '\2': "),
    (r"\S{0,300}\w\.(?:cc|h|cpp):\d+:? (?:[\w ]*\w+::[\w:~]+\(.*?\)(?: const)? )?", ""),
    (r"(?:_nchwc|_token_\d+|_QuantizeLinear|_DequantizeLinear)(?=')", ""),
    (r"This is an invalid model\. |Please fix either the inputs/outputs or the model\.", ""),
    (r"In Node, \(\"(.*?)\", (\w+).*?, Error ", r"\2 '\1': "),
    (r"See instructions: https?://\S+ ", ""),
    (r"(?<=[^\s])Node number", ". Node number"),
)
MOST_READ = 4000  # characters of what a runtime says; names in it come from a file of unknown origin
MOST_SHOWN = 600  # characters of each part in the line; much of it may come from a file of unknown origin


class ToolError(Exception):
    """A tool could not do its job; shown as one line, its `parts` as an object with `--json`.

    Args:
        what: What went wrong, as a sentence without a full stop.
        where: The file or option it is about.
        got: What was found.
        expected: What would have been right.
        remedy: What the user can do next.
    """

    exit_code = 2  # could not run; nothing was written

    def __init__(
        self,
        what: str,
        *,
        where: str | Path | None = None,
        got: object = None,
        expected: object = None,
        remedy: str | None = None,
    ) -> None:
        parts = {"what": what, "where": where, "got": got, "expected": expected, "remedy": remedy}
        self.parts = {name: one_line(str(part)) for name, part in parts.items() if part is not None}
        reported = {name: _shortened(part) for name, part in self.parts.items()}
        head = f"{reported['where']}: {reported['what']}" if where is not None else reported["what"]
        words = {"got": "got ", "expected": "expected ", "remedy": ""}
        super().__init__("; ".join([head, *(f"{word}{reported[name]}" for name, word in words.items() if name in reported)]))

    @classmethod
    def of_parts(cls, parts: dict[str, Any]) -> Self:
        """Return the error that `parts` is of: so it goes from a process to its parent."""
        return cls(**parts)

    def moved_to(self, where: str | Path) -> Self:
        """Return the error about another file."""
        return self.of_parts({**self.parts, "where": str(where)})

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).of_parts, (self.parts,)


class DamagedError(ToolError):
    """A file is of the kind it should be, but damaged."""


class CheckError(ToolError):
    """A check of the product itself failed, and nothing was written."""

    exit_code = 1


def _shortened(text: str) -> str:
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}... ({len(text)} characters; --json shows all)"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text that says something, or its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def plain_reason(error: BaseException) -> str:
    """Return what a runtime says of a failure in one line, without its codes, places in its source and endings of its own names."""
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())[:MOST_READ] or type(error).__name__
    for pattern, replacement in BOILERPLATE:
        text = re.sub(pattern, replacement, text)
    return text.strip()


def one_line(text: str) -> str:
    """Return the text with control characters escaped, so that a file's content cannot forge a line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def of_disk(error: BaseException) -> ToolError | None:
    """Return what to tell of a disk that is full, or of a quota or file size limit that is reached; None for other errors.

    Libraries written in other languages say it in their own words, with the system's inside.
    """
    number = getattr(error, "errno", None)
    reported = str(error)
    is_full = number in DISK_FULL or any(f"os error {known}" in reported for known in DISK_FULL)
    if not (is_full or any(words in reported for words in ("No space left on device", "Disk quota exceeded", "File too large"))):
        return None
    where = getattr(error, "filename", None)
    return ToolError(
        "the disk is full, or a quota or size limit is reached", where=where, remedy="free some space, or write elsewhere"
    )
