"""Ranges of activations that were found before, in a file of the user's choice: for the same model, samples and method."""

import hashlib
import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from shared.calibration.dataset import CalibrationSet
from shared.command.errors import ToolError
from shared.files.atomic import draft_beside
from shared.formats.model_file import model_files

KIND = "edgepress ranges"
VERSION = 1  # of how ranges are found and named; to be raised with `tools.quantize_onnx.ranges` and `tools.quantize_onnx.rewrite`


class RangeCache:
    """A file of ranges by what they belong to; other entries of the file stay.

    Args:
        path: The file; made where there is none.

    Raises:
        ToolError: The file holds something else.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[str, Any] = {}
        if path.exists():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                self._entries = dict(content["entries"]) if content["kind"] == KIND else {}
                is_ours = content["kind"] == KIND
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                is_ours = False
            if not is_ours:
                raise ToolError("the range cache holds something else", where=path, remedy="choose another file")

    def get(self, key: str) -> dict[str, Any] | None:
        """Return what is known under a key."""
        found = self._entries.get(key)
        return found if isinstance(found, dict) else None

    def put(self, key: str, ranges: dict[str, Any]) -> None:
        """Keep ranges under a key, on disk too."""
        self._entries[key] = ranges
        with draft_beside(self._path) as draft:
            draft.write_text(json.dumps({"kind": KIND, "entries": self._entries}) + "\n", encoding="utf-8")
            draft.replace(self._path)


def key_of(model: Path, samples: CalibrationSet, method: str, op_types: Sequence[str]) -> str:
    """Return what decides ranges as one hash: the model's files, the samples, how ranges are found, and at which ops."""
    versions = " ".join(f"{name} {metadata.version(name)}" for name in ("onnx", "onnxruntime"))
    whole = hashlib.sha256(f"{VERSION} {versions} {samples.sha256()} {method} {' '.join(op_types)}".encode())
    for file in model_files(model):
        with file.open("rb") as content:
            whole.update(hashlib.file_digest(content, "sha256").digest())
    return whole.hexdigest()
