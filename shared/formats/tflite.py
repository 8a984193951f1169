"""Read what a .tflite file says of itself, without loading its weights: ops, weights, signature, metadata.

The metadata of our models is a small zip appended to the flatbuffer, the way TFLite models carry associated files. Runtimes
ignore it, `unzip -p model.tflite edgepress.json` shows it.

Source: https://ai.google.dev/edge/litert/conversion/tensorflow/metadata (appended associated files);
    schema: https://github.com/google-ai-edge/LiteRT/blob/v2.1.6/tflite/converter/schema/schema.fbs
"""

import contextlib
import functools
import json
import math
import mmap
import shutil
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from shared.command.errors import DamagedError, ToolError, first_line
from shared.command.watchdog import reading
from shared.files.file_type import name_kind, read_head
from shared.files.zip_layout import DISK_TROUBLE, ZIP_DAMAGE
from shared.formats.tflite_check import check_structure

IDENTIFIER = b"TFL3"  # at byte 4
METADATA_NAME = "edgepress.json"
# What a walk over a flatbuffer's tables can raise on a damaged file.
DAMAGE = (struct.error, LookupError, TypeError, ValueError, AttributeError, AssertionError, ArithmeticError, RecursionError)
AGAIN = "convert or download it again"
CHUNK_BYTES = 2**24
MAX_METADATA_BYTES = 2**16
MAX_APPENDED_BYTES = 2**28  # of all associated files together; label files and vocabularies are far smaller


@dataclass(frozen=True)
class Op:
    """One op, and its constant float or quantized operands.

    Args:
        op_type: Builtin operator, such as CONV_2D; a custom op by its own name.
        scope: Names of the op's outputs, each with ';' behind it; what recipe rules match.
        dtype: Type of the largest constant operand, such as FLOAT32 or INT8; empty where there is none.
        size_bytes: Bytes of all constant operands.
        size_weights: Bytes of the largest constant operand.
        output_dtype: Type of the first output.
        output: Name of the first output.
    """

    op_type: str
    scope: str
    dtype: str = ""
    size_bytes: int = 0
    size_weights: int = 0
    output_dtype: str = "FLOAT32"
    output: str = ""

    @property
    def name(self) -> str:
        """Names of its outputs; mostly there is one."""
        return self.scope.removesuffix(";")


def check_is_tflite(path: Path) -> None:
    """Raise ToolError unless the file is a TFLite model whose tables hold together; reads no weights."""
    head = read_head(path, "model", again=AGAIN)
    if head[4:8] != IDENTIFIER:
        is_bundle = head[:4].strip(b"\0")[:2] == b"PK"  # official bundles start with zeros
        kind = "a zip file, perhaps a .task bundle" if is_bundle else name_kind(head)
        raise ToolError("not a TFLite model", where=path, got=kind, expected="a .tflite file", remedy=AGAIN)
    status = path.stat()
    _check_once(path, (status.st_size, status.st_mtime_ns, status.st_ino))


@functools.lru_cache(maxsize=64)
def _check_once(path: Path, _: tuple[int, ...]) -> None:
    """Check the structure of a file as it is now; the second argument tells one state of it from another."""
    with _mapped_root(path) as (model, size):
        check_structure(model, size, enum_names)


@contextlib.contextmanager
def _mapped_root(path: Path) -> Iterator[tuple[Any, int]]:
    """Yield the root table of a model, memory-mapped, and the file's size; damage met meanwhile is a ToolError."""
    from ai_edge_litert import schema_py_generated as schema

    with reading(path), path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            yield schema.Model.GetRootAs(content), len(content)
        except DAMAGE as error:
            raise DamagedError("damaged TFLite model", where=path, got=first_line(error), remedy=AGAIN) from None


@contextlib.contextmanager
def open_flatbuffer(path: Path) -> Iterator[Any]:
    """Yield the root table of a model, memory-mapped.

    Raises:
        ToolError: No TFLite model, or damage met while the caller reads it.
    """
    check_is_tflite(path)
    with _mapped_root(path) as (model, _):
        yield model


def require_finite(path: Path) -> None:
    """Raise ToolError where a float weight is NaN or infinite; reads all of them once, at the speed of memory."""
    with open_flatbuffer(path) as model, path.open("rb") as file:
        faults = []
        for graph in (model.Subgraphs(g) for g in range(model.SubgraphsLength())):
            for tensor in (graph.Tensors(t) for t in range(graph.TensorsLength())):
                dtype = {"FLOAT32": np.float32, "FLOAT16": np.float16}.get(enum_names("TensorType")[tensor.Type()])
                if dtype is not None and (span := constant_span(model, tensor)) is not None:
                    bad = _count_not_finite(file, span, np.dtype(dtype))
                    faults += [f"{(tensor.Name() or b'').decode()} ({bad} values)"] if bad else []
    if faults:
        got = f"{len(faults)} tensors, the first {faults[0]}"
        raise ToolError("the model holds NaN or infinite weights", where=path, got=got, remedy="train or export it again")


def _count_not_finite(file: IO[bytes], span: tuple[int, int], dtype: np.dtype[Any]) -> int:
    bad = 0
    file.seek(span[0])
    for start in range(span[0], span[1], CHUNK_BYTES):
        values = np.frombuffer(file.read(min(CHUNK_BYTES, span[1] - start)), dtype)
        with np.errstate(all="ignore"):
            if not np.isfinite(values.sum(dtype=np.float32)):  # a sum is several times faster; it may overflow
                bad += int((~np.isfinite(values)).sum())
    return bad


@functools.cache
def enum_names(enumeration: str) -> dict[int, str]:
    """Return number -> name of an enumeration of the schema, such as BuiltinOperator or TensorType."""
    from ai_edge_litert import schema_py_generated as schema

    return {value: name for name, value in vars(getattr(schema, enumeration)).items() if isinstance(value, int)}


def read_ops(path: Path) -> list[Op]:
    """Return the ops of a model in the order of the graph, except those that only restore a constant.

    A constant that reaches its op through DEQUANTIZE counts as that op's, with its stored type: so weight-only int8 and fp16
    models compare with their float32 originals op by op.
    """
    found = []
    with open_flatbuffer(path) as model:
        codes = [model.OperatorCodes(i) for i in range(model.OperatorCodesLength())]
        for g in range(model.SubgraphsLength()):
            graph = model.Subgraphs(g)
            behind: dict[int, int] = {}  # output of a DEQUANTIZE -> the constant it reads
            for i in range(graph.OperatorsLength()):
                op = graph.Operators(i)
                op_type = _op_type(codes[op.OpcodeIndex()])
                if op_type == "DEQUANTIZE" and _buffer_bytes(model, graph.Tensors(op.Inputs(0))):
                    behind[op.Outputs(0)] = op.Inputs(0)
                    continue
                operands = [op.Inputs(k) for k in range(op.InputsLength())]
                constants = [graph.Tensors(behind.get(t, t)) for t in operands if t >= 0]
                sizes = [(_elements(t), _buffer_bytes(model, t), enum_names("TensorType")[t.Type()]) for t in constants]
                sizes = [entry for entry in sizes if entry[1] and entry[2] not in ("INT32", "INT64", "BOOL", "STRING")]
                outputs = [graph.Tensors(op.Outputs(k)) for k in range(op.OutputsLength())]
                if not outputs:
                    continue
                scope = "".join(f"{(tensor.Name() or b'').decode()};" for tensor in outputs)
                _, weights, dtype = max(sizes, default=(0, 0, ""))
                total = sum(size for _, size, _ in sizes)
                output = (outputs[0].Name() or b"").decode()
                found.append(Op(op_type, scope, dtype, total, weights, enum_names("TensorType")[outputs[0].Type()], output))
    return found


def read_dequantized_types(path: Path) -> set[str]:
    """Return the types of constants that a DEQUANTIZE op turns into float32 at run time."""
    types = set()
    with open_flatbuffer(path) as model:
        for g in range(model.SubgraphsLength()):
            graph = model.Subgraphs(g)
            for i in range(graph.OperatorsLength()):
                op = graph.Operators(i)
                if _op_type(model.OperatorCodes(op.OpcodeIndex())) == "DEQUANTIZE":
                    tensor = graph.Tensors(op.Inputs(0))
                    if _buffer_bytes(model, tensor):
                        types.add(enum_names("TensorType")[tensor.Type()].lower())
    return types


def _op_type(code: Any) -> str:
    kind = enum_names("BuiltinOperator")[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]
    return code.CustomCode().decode() if kind == "CUSTOM" and code.CustomCode() else kind


def custom_ops(path: Path) -> list[str]:
    """Return the names of a model's custom ops: those that only some runtimes have."""
    with open_flatbuffer(path) as model:
        codes = [model.OperatorCodes(i) for i in range(model.OperatorCodesLength())]
        return sorted({code.CustomCode().decode() for code in codes if code.CustomCode()})


def constant_span(model: Any, tensor: Any) -> tuple[int, int] | None:
    """Return where a tensor's constant lies in the file, in the flatbuffer or behind it: start and end; None for activations."""
    buffer = model.Buffers(tensor.Buffer())
    if length := buffer.DataLength():
        table = buffer._tab  # noqa: SLF001 - the generated code has no public way to a vector's place
        start = int(table.Vector(table.Offset(4)))
        return start, start + length
    if buffer.Offset() > 1:
        return int(buffer.Offset()), int(buffer.Offset() + buffer.Size())
    return None


def _elements(tensor: Any) -> int:
    return math.prod(tensor.Shape(i) for i in range(tensor.ShapeLength()))


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
    try:
        if not zipfile.is_zipfile(source):  # Python 3.11 raises on some damaged directories
            return
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "a", zipfile.ZIP_STORED) as new:
            if sum(entry.file_size for entry in old.infolist()) > MAX_APPENDED_BYTES:
                raise ToolError("the zip appended to the model is too large", where=source, expected="label files and the like")
            for entry in old.infolist():
                with old.open(entry) as data, new.open(_same_entry(entry), "w") as out:
                    shutil.copyfileobj(data, out)
    except ZIP_DAMAGE as error:
        if isinstance(error, OSError) and error.errno in DISK_TROUBLE:
            raise
        raise ToolError("the zip appended to the model is damaged", where=source, got=first_line(error)) from None


def _same_entry(entry: zipfile.ZipInfo) -> zipfile.ZipInfo:
    """Return an entry of the same name, date and compression for another archive."""
    same = zipfile.ZipInfo(entry.filename, date_time=entry.date_time)
    same.compress_type = entry.compress_type
    same.file_size = entry.file_size
    return same


def declared_range(path: Path) -> tuple[float, float] | None:
    """Return the range of a model's first input for pixels from 0 to 255, as its own metadata gives it, or None.

    Source: https://github.com/tensorflow/tflite-support/blob/v0.4.4/tensorflow_lite_support/metadata/metadata_schema.fbs
        (ModelMetadata, SubGraphMetadata, TensorMetadata, NormalizationOptions); and what our own detectors say of themselves.
    """
    if "nbits" in read_metadata(path):
        return 0.0, 1.0
    with open_flatbuffer(path) as model:
        for entry in (model.Metadata(i) for i in range(model.MetadataLength())):
            if entry.Name() == b"TFLITE_METADATA":
                content = _buffer_content(model.Buffers(entry.Buffer()))
                with contextlib.suppress(*DAMAGE):  # metadata of another version says nothing
                    return _normalised_range(content)
    return None


def _buffer_content(buffer: Any) -> bytes:
    if buffer.DataLength():
        return bytes(buffer.DataAsNumpy())
    start = buffer.Offset()
    return bytes(buffer._tab.Bytes[start : start + buffer.Size()])  # noqa: SLF001 - as above


def _normalised_range(content: bytes) -> tuple[float, float] | None:
    """Return (0 - mean) / std and (255 - mean) / std of the first input's normalisation."""
    import flatbuffers
    from flatbuffers.table import Table

    uint32 = flatbuffers.number_types.UOffsetTFlags
    float32, uint8 = flatbuffers.number_types.Float32Flags, flatbuffers.number_types.Uint8Flags

    def field(table: Any, number: int) -> int:
        return int(table.Offset(4 + 2 * number))

    def tables(table: Any, number: int) -> list[Any]:
        offset = field(table, number)
        if not offset:
            return []
        start, length = table.Vector(offset), table.VectorLen(offset)
        return [Table(table.Bytes, table.Indirect(start + 4 * i)) for i in range(length)]

    def first_float(table: Any, number: int) -> float:
        return float(table.Get(float32, table.Vector(field(table, number))))

    root = Table(content, int(flatbuffers.encode.Get(uint32.packer_type, content, 0)))
    tensor = tables(tables(root, 3)[0], 2)[0]  # the first subgraph's first input
    for unit in tables(tensor, 4):
        if unit.Get(uint8, unit.Pos + field(unit, 0)) == 1:  # normalisation
            options = Table(content, unit.Indirect(unit.Pos + field(unit, 1)))
            mean, std = first_float(options, 0), first_float(options, 1)
            low, high = (0 - mean) / std, (255 - mean) / std
            return (low, high) if math.isfinite(low) and math.isfinite(high) else None
    return None
