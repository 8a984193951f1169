"""The one error that a user is meant to read."""

from pathlib import Path


class ToolError(Exception):
    """A tool could not do its job; shown as one line, exit code 2.

    Args:
        what: What went wrong, as a sentence without a full stop.
        where: The file or option it is about.
        got: What was found.
        expected: What would have been right.
        remedy: What the user can do next.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | Path | None = None,
        got: object = None,
        expected: object = None,
        remedy: str | None = None,
    ) -> None:
        head = f"{where}: {what}" if where is not None else what
        parts = [head]
        if got is not None:
            parts.append(f"got {got}")
        if expected is not None:
            parts.append(f"expected {expected}")
        if remedy is not None:
            parts.append(remedy)
        super().__init__(one_line("; ".join(parts)))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text that says something, or its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def one_line(text: str) -> str:
    """Return the text with control characters escaped, so that a file's content cannot forge a line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
