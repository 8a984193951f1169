"""What every model file tells, whatever its format: its kind, its files, its size, its metadata."""

import re
from pathlib import Path
from typing import Any, Literal

from shared.formats import onnx_file, onnx_graph, tflite

Format = Literal["tflite", "onnx"]
ONNX_SUFFIX = ".onnx"
DRAFT = re.compile(r"\.[0-9a-f]{8}-\d+\.partial$")  # see `shared.draft_beside`


def format_of(path: Path) -> Format:
    """Return a model file's format by its name; a draft's is the name of what it will be, with more behind it."""
    return "onnx" if DRAFT.sub("", path.name).endswith(ONNX_SUFFIX) else "tflite"


def check_is_model(path: Path) -> None:
    """Raise ToolError unless the file exists and starts like a model of its format."""
    if format_of(path) == "onnx":
        onnx_file.check_is_onnx(path)
    else:
        tflite.check_is_tflite(path)


def model_files(path: Path) -> list[Path]:
    """Return the model's file and those beside it that hold its weights."""
    return [path, *(onnx_file.external_files(path) if format_of(path) == "onnx" else ())]


def size_bytes(path: Path) -> int:
    """Return the size of a model with all its files."""
    return sum(file.stat().st_size for file in model_files(path))


def declared_range(path: Path) -> tuple[float, float] | None:
    """Return the range of a model's image input as its own metadata tells it, or None."""
    return onnx_graph.declared_range(path) if format_of(path) == "onnx" else tflite.declared_range(path)


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of one of our models, empty where the file has none."""
    return onnx_graph.read_metadata(path) if format_of(path) == "onnx" else tflite.read_metadata(path)
