"""Reports hold their provenance inside themselves: a JSON object under a key of its own, a page in a script element.

The hash of a report is that of its content without the provenance.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

KEY = "provenance"
RESULT = "found"  # of a provenance: the result, which a JSON report is itself
ELEMENT = re.compile(r'<script type="application/json" id="edgepress-provenance">(.*?)</script>\n', re.DOTALL)
STARTS = (b"{", b"<")
MODELS = (".tflite", ".task", ".onnx", ".pth", ".safetensors")  # never reports: not opened to find out
MOST_BYTES = 2**27  # of a report; a page holds pictures


def embed(path: Path, provenance: dict[str, Any]) -> None:
    """Put provenance, JSON values, into a report that has none; a page gets it before the end of its body."""
    text = path.read_text(encoding="utf-8")
    if _is_page(text):
        content = json.dumps(provenance).replace("<", "\\u003c")
        element = f'<script type="application/json" id="edgepress-provenance">{content}</script>\n'
        head, end, tail = text.rpartition("</body>")
        path.write_text(f"{head}{element}{end}{tail}" if end else text + element, encoding="utf-8")
    else:
        content = json.loads(text)
        if all(
            content.get(name) == value for name, value in provenance.get(RESULT, {}).items()
        ):  # it is there once, as the report itself
            provenance = {name: value for name, value in provenance.items() if name != RESULT}
        path.write_text(json.dumps({**content, KEY: provenance}, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def split_report(path: Path) -> tuple[dict[str, Any], str] | None:
    """Return the provenance inside a report and the sha256 of the rest; None where the file is no such report."""
    try:
        if path.suffix in MODELS or not path.is_file() or path.stat().st_size > MOST_BYTES or not _starts_as_report(path):
            return None
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
        if _is_page(text):
            element = ELEMENT.search(text)
            return None if element is None else (json.loads(element[1]), hash_of(text[: element.start()] + text[element.end() :]))
        content = json.loads(text)
        provenance = {RESULT: content, **content.pop(KEY)}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return (provenance, hash_of(json.dumps(content))) if isinstance(provenance, dict) else None


def report_sha256(path: Path) -> str:
    """Return the sha256 of a report that holds no provenance yet."""
    text = path.read_text(encoding="utf-8")
    return hash_of(text if _is_page(text) else json.dumps(json.loads(text)))


def hash_of(text: str) -> str:
    """Return the sha256 of a text."""
    return hashlib.sha256(text.encode("utf-8", errors="surrogateescape")).hexdigest()


def _starts_as_report(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(64).lstrip().startswith(STARTS)


def _is_page(text: str) -> bool:
    return text.lstrip()[:1] == "<"
