"""Read what a .tflite file says of itself, without loading its weights: ops, weights, signature, metadata.

The metadata of our models is a small zip appended to the flatbuffer, the way TFLite models carry associated files. Runtimes
ignore it, `unzip -p model.tflite edgepress.json` shows it.

Source: https://ai.google.dev/edge/litert/conversion/tensorflow/metadata (appended associated files);
    schema: https://github.com/google-ai-edge/LiteRT/blob/v2.1.6/tflite/converter/schema/schema.fbs
"""

import contextlib
import functools
import json
import mmap
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import ToolError, first_line

IDENTIFIER = b"TFL3"  # at byte 4
METADATA_NAME = "edgepress.json"
# What a walk over a flatbuffer's tables can raise on a damaged file.
DAMAGE = (struct.error, LookupError, TypeError, ValueError, AttributeError, AssertionError, OverflowError, RecursionError)
# What reading an appended zip can raise on a damaged or encrypted one.
ZIP_DAMAGE = (zipfile.BadZipFile, zlib.error, LookupError, ValueError, EOFError, RuntimeError, NotImplementedError, OSError)
MAX_METADATA_BYTES = 2**16
MAX_APPENDED_BYTES = 2**28  # of all associated files together; label files and vocabularies are far smaller


@dataclass(frozen=True)
class OpWeights:
    """The constant operands of one op.

    Args:
        op_type: Builtin operator, such as CONV_2D.
        name: Name of the op's first output tensor; the scope that recipe rules match.
        dtype: Type of the largest constant operand, such as FLOAT32 or INT8.
        size_bytes: Bytes of all constant operands.
        size_weights: Bytes of the largest constant operand.
        code_is_old: Whether the op's type stands in the schema's deprecated field only.
    """

    op_type: str
    name: str
    dtype: str
    size_bytes: int
    size_weights: int
    code_is_old: bool = False


def check_is_tflite(path: Path) -> None:
    """Raise ToolError unless the file exists and starts like a TFLite flatbuffer."""
    if not path.is_file():
        raise ToolError("no such model file", where=path, remedy="check the path")
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise ToolError("the model file is empty", where=path, remedy="convert or download it again")
    if head.startswith(b"version https://git-lfs"):
        raise ToolError("this is a Git LFS pointer, not the model", where=path, remedy="run 'git lfs pull'")
    if head[4:8] != IDENTIFIER:
        kind = (
            "a zip file, perhaps a .task bundle"
            if b"PK\x03\x04" in head[:8]
            else "an HTML page"
            if head[:1] == b"<"
            else "no 'TFL3' at byte 4"
        )
        raise ToolError("not a TFLite model", where=path, got=kind, expected="a .tflite file")


@contextlib.contextmanager
def _open_model(path: Path) -> Iterator[Any]:
    """Yield the root table of a model, memory-mapped."""
    from ai_edge_litert import schema_py_generated as schema

    check_is_tflite(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            yield schema.Model.GetRootAs(content)
        except DAMAGE as error:
            raise ToolError(
                "damaged TFLite model", where=path, got=first_line(error), remedy="convert or download it again"
            ) from None


@functools.cache
def _names(enumeration: str) -> dict[int, str]:
    from ai_edge_litert import schema_py_generated as schema

    return {value: name for name, value in vars(getattr(schema, enumeration)).items() if isinstance(value, int)}


def read_op_weights(path: Path) -> list[OpWeights]:
    """Return the ops that have constant float or quantized operands, in the order of the graph.

    A constant that reaches its op through DEQUANTIZE counts as that op's, with its stored type: so weight-only int8 and fp16
    models compare with their float32 originals op by op.
    """
    found = []
    with _open_model(path) as model:
        op_types = [_op_type(model.OperatorCodes(i)) for i in range(model.OperatorCodesLength())]
        for g in range(model.SubgraphsLength()):
            graph = model.Subgraphs(g)
            behind: dict[int, int] = {}  # output of a DEQUANTIZE -> the constant it reads
            for i in range(graph.OperatorsLength()):
                op = graph.Operators(i)
                op_type = op_types[op.OpcodeIndex()]
                if op_type == "DEQUANTIZE" and _buffer_bytes(model, graph.Tensors(op.Inputs(0))):
                    behind[op.Outputs(0)] = op.Inputs(0)
                    continue
                operands = [op.Inputs(k) for k in range(op.InputsLength())]
                constants = [graph.Tensors(behind.get(t, t)) for t in operands if t >= 0]
                sizes = [(_buffer_bytes(model, t), _names("TensorType")[t.Type()]) for t in constants]
                sizes = [(size, kind) for size, kind in sizes if size and kind not in ("INT32", "INT64", "BOOL", "STRING")]
                if sizes and op.OutputsLength():
                    weights, dtype = max(sizes)
                    name = graph.Tensors(op.Outputs(0)).Name().decode()
                    code = model.OperatorCodes(op.OpcodeIndex())
                    is_old = code.BuiltinCode() == 0 != code.DeprecatedBuiltinCode()
                    found.append(OpWeights(op_type, name, dtype, sum(size for size, _ in sizes), weights, is_old))
    return found


def read_dequantized_types(path: Path) -> set[str]:
    """Return the types of constants that a DEQUANTIZE op turns into float32 at run time."""
    types = set()
    with _open_model(path) as model:
        for g in range(model.SubgraphsLength()):
            graph = model.Subgraphs(g)
            for i in range(graph.OperatorsLength()):
                op = graph.Operators(i)
                if _op_type(model.OperatorCodes(op.OpcodeIndex())) == "DEQUANTIZE":
                    tensor = graph.Tensors(op.Inputs(0))
                    if _buffer_bytes(model, tensor):
                        types.add(_names("TensorType")[tensor.Type()].lower())
    return types


def _op_type(code: Any) -> str:
    return _names("BuiltinOperator")[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]


def _buffer_bytes(model: Any, tensor: Any) -> int:
    """Return the bytes of a tensor's constant, inside the flatbuffer or behind it; 0 for activations."""
    buffer = model.Buffers(tensor.Buffer())
    return int(buffer.DataLength() or (buffer.Size() if buffer.Offset() > 1 else 0))


def append_metadata(path: Path, content: Mapping[str, object]) -> None:
    """Append the metadata of one of our models as a zip with one stored, undated entry: the same content, the same bytes."""
    entry = zipfile.ZipInfo(METADATA_NAME, date_time=(1980, 1, 1, 0, 0, 0))
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        archive.writestr(entry, json.dumps(content, sort_keys=True))


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of one of our models, empty where the file has none."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.getinfo(METADATA_NAME).file_size > MAX_METADATA_BYTES:
                return {}
            content = json.loads(archive.read(METADATA_NAME))
            return content if isinstance(content, dict) else {}
    except (*ZIP_DAMAGE, RecursionError):
        return {}


def copy_appended_zip(source: Path, target: Path) -> None:
    """Append the zip that follows the flatbuffer of `source`, if any, to `target`, entry by entry.

    Raises:
        ToolError: The zip is damaged, encrypted or too large to be label files.
    """
    if not zipfile.is_zipfile(source):
        return
    try:
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "a", zipfile.ZIP_STORED) as new:
            if sum(entry.file_size for entry in old.infolist()) > MAX_APPENDED_BYTES:
                raise ToolError("the zip appended to the model is too large", where=source, expected="label files and the like")
            for entry in old.infolist():
                with old.open(entry) as data, new.open(_same_entry(entry), "w") as out:
                    shutil.copyfileobj(data, out)
    except ZIP_DAMAGE as error:
        raise ToolError("the zip appended to the model is damaged", where=source, got=first_line(error)) from None


def _same_entry(entry: zipfile.ZipInfo) -> zipfile.ZipInfo:
    """Return an entry of the same name, date and compression for another archive."""
    same = zipfile.ZipInfo(entry.filename, date_time=entry.date_time)
    same.compress_type = entry.compress_type
    same.file_size = entry.file_size
    return same
