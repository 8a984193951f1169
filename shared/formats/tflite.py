"""Read a .tflite file without loading its weights: ops, constants, metadata.

Source: schema, https://github.com/google-ai-edge/LiteRT/blob/v2.1.6/tflite/converter/schema/schema.fbs
"""

import contextlib
import functools
import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from shared.command.errors import DamagedError, ToolError, first_line
from shared.command.watchdog import reading
from shared.files.file_type import name_kind, open_checked
from shared.formats.tflite_check import check_structure
from shared.formats.tflite_metadata import read_metadata, task_library_range

IDENTIFIER = b"TFL3"  # at byte 4
# What a walk over a flatbuffer's tables can raise on a damaged file.
DAMAGE = (struct.error, LookupError, TypeError, ValueError, AttributeError, AssertionError, ArithmeticError, RecursionError)
AGAIN = "convert or download it again"
CHUNK_BYTES = 2**24
# Op types whose constants are weights, biases or scales.
LAYERS = {"CONV_2D", "CONV_3D", "CONV_3D_TRANSPOSE", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV", "BATCH_MATMUL"}
LAYERS |= {"EMBEDDING_LOOKUP", "MUL", "DIV", "PRELU", "UNIDIRECTIONAL_SEQUENCE_LSTM", "BIDIRECTIONAL_SEQUENCE_LSTM"}
CARRIERS = {"DEQUANTIZE", "DENSIFY", "RESHAPE", "TRANSPOSE", "CAST"}  # that a constant may pass on its way to a layer


@dataclass(frozen=True)
class Op:
    """One op, and its constant float or quantized operands.

    Args:
        op_type: Builtin operator, such as CONV_2D; a custom op by its own name.
        name: Names of the op's outputs, joined by ';'; mostly there is one.
        dtype: Type of the largest constant operand, such as FLOAT32 or INT8; empty where there is none.
        weight_bytes: Bytes of the largest constant operand.
        output_dtype: Type of the first output.
        output: Name of the first output.
        buffer: Number of the buffer that holds the largest constant operand, which ops may share; 0 without one.
    """

    op_type: str
    name: str
    dtype: str = ""
    weight_bytes: int = 0
    output_dtype: str = "FLOAT32"
    output: str = ""
    buffer: int = 0

    @property
    def scope(self) -> str:
        """What rules of a recipe match: the name of each output followed by ';'."""
        return f"{self.name};"


@dataclass(frozen=True)
class TfliteContent:
    """What a .tflite file holds, its weights left out.

    Args:
        ops: The ops in the order of the graph, except those that only restore a constant.
        custom_ops: Names of custom ops, which only some runtimes have.
        restored_types: Types of constants that a DEQUANTIZE op turns into float32 at run time, such as `float16`.
        has_sparse: Whether a DENSIFY op restores a sparse constant.
        metadata: Metadata of one of our models; empty for others.
        input_range: Range of the first input for pixels from 0 to 255, as the metadata gives it.
    """

    ops: list[Op]
    custom_ops: list[str] = field(default_factory=list)
    restored_types: list[str] = field(default_factory=list)
    has_sparse: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)
    input_range: tuple[float, float] | None = None


def read_tflite(path: Path) -> TfliteContent:
    """Return what a .tflite file holds; opens the file once and reads no weights.

    Raises:
        ToolError: No TFLite model.
        DamagedError: Its tables don't hold together.
    """
    with _opened(path) as (model, file):
        codes = [model.OperatorCodes(i) for i in range(model.OperatorCodesLength())]
        kinds = [op_type(code) for code in codes]
        graphs = [model.Subgraphs(g) for g in range(model.SubgraphsLength())]
        custom = sorted({code.CustomCode().decode() for code in codes if code.CustomCode()})
        restored = {kind.lower() for graph in graphs for kind in _restored_types(model, graph, kinds)}
        metadata = read_metadata(file)
        declared = (0.0, 1.0) if "nbits" in metadata else task_library_range(model, DAMAGE)
        ops = [op for graph in graphs for op in _graph_ops(model, graph, kinds)]
        return TfliteContent(ops, custom, sorted(restored), "DENSIFY" in kinds, metadata, declared)


def check_is_tflite(path: Path) -> None:
    """Raise ToolError unless the file is a TFLite model whose tables hold together; reads no weights."""
    with _opened(path):
        pass


@contextlib.contextmanager
def open_flatbuffer(path: Path) -> Iterator[Any]:
    """Yield the root table of a model, memory-mapped.

    Raises:
        ToolError: No TFLite model, or damage met while the caller reads it.
    """
    with _opened(path) as (model, _):
        yield model


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, IO[bytes]]]:
    """Yield the checked root table of a model, memory-mapped, and its file; damage met meanwhile is a DamagedError."""
    from ai_edge_litert import schema_py_generated as schema

    with open_checked(path, "model", again=AGAIN) as (file, head):
        if head[4:8] != IDENTIFIER:
            is_bundle = head[:4].strip(b"\0")[:2] == b"PK"  # official bundles start with zeros
            kind = "a zip file, perhaps a .task bundle" if is_bundle else name_kind(head)
            raise ToolError("not a TFLite model", where=path, got=kind, expected="a .tflite file", remedy=AGAIN)
        with reading(path), mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                model = schema.Model.GetRootAs(content)
                check_structure(model, len(content), enum_names)
                yield model, file
            except DAMAGE as error:
                raise DamagedError("damaged TFLite model", where=path, got=first_line(error), remedy=AGAIN) from None


def require_finite(path: Path) -> None:
    """Raise ToolError where a weight, a bias or a scale of a layer is NaN or infinite; reads all once, at the speed of memory.

    Other constants may be infinite: masks of attention, limits and paddings are.
    """
    with _opened(path) as (model, file):
        kinds = [op_type(model.OperatorCodes(i)) for i in range(model.OperatorCodesLength())]
        faults = []
        for graph in (model.Subgraphs(g) for g in range(model.SubgraphsLength())):
            for tensor in (graph.Tensors(t) for t in _layer_constants(graph, kinds)):
                dtype = {"FLOAT32": np.float32, "FLOAT16": np.float16}.get(enum_names("TensorType")[tensor.Type()])
                if dtype is not None and (span := constant_span(model, tensor)) is not None:
                    bad = _count_not_finite(file, span, np.dtype(dtype))
                    faults += [f"{(tensor.Name() or b'').decode()} ({bad} values)"] if bad else []
    if faults:
        got = f"{len(faults)} tensors, the first {faults[0]}"
        raise ToolError("the model holds NaN or infinite weights", where=path, got=got, remedy="train or export it again")


def _layer_constants(graph: Any, kinds: list[str]) -> list[int]:
    """Return the numbers of the tensors that layers read, and of those that ops turn into these."""
    ops = [graph.Operators(i) for i in range(graph.OperatorsLength())]
    makers = {op.Outputs(k): op for op in ops for k in range(op.OutputsLength())}
    found: dict[int, None] = {}
    waiting = [op.Inputs(k) for op in ops if kinds[op.OpcodeIndex()] in LAYERS for k in range(op.InputsLength())]
    while waiting:
        number = waiting.pop()
        if number < 0 or number in found:
            continue
        found[number] = None
        maker = makers.get(number)
        if maker is not None and kinds[maker.OpcodeIndex()] in CARRIERS:
            waiting += [maker.Inputs(k) for k in range(maker.InputsLength())]
    return sorted(found)


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


def _graph_ops(model: Any, graph: Any, kinds: list[str]) -> Iterator[Op]:
    """Yield the ops of a graph, except those that only restore a constant.

    A constant that reaches its op through DEQUANTIZE counts as that op's, with its stored type: so weight-only int8 and fp16
    models compare with their float32 originals op by op.
    """
    types = enum_names("TensorType")
    stored: dict[int, int] = {}  # output of a DEQUANTIZE -> the constant it reads
    for op in (graph.Operators(i) for i in range(graph.OperatorsLength())):
        kind = kinds[op.OpcodeIndex()]
        if kind == "DEQUANTIZE" and _buffer_bytes(model, graph.Tensors(op.Inputs(0))):
            stored[op.Outputs(0)] = op.Inputs(0)
            continue
        operands = [op.Inputs(k) for k in range(op.InputsLength())]
        constants = [graph.Tensors(stored.get(t, t)) for t in operands if t >= 0]
        sizes = [(_elements(t), _buffer_bytes(model, t), types[t.Type()], t.Buffer()) for t in constants]
        sizes = [entry for entry in sizes if entry[1] and entry[2] not in ("INT32", "INT64", "BOOL", "STRING")]
        outputs = [graph.Tensors(op.Outputs(k)) for k in range(op.OutputsLength())]
        if outputs:
            names = [(tensor.Name() or b"").decode() for tensor in outputs]
            _, weight_bytes, dtype, buffer = max(sizes, default=(0, 0, "", 0))
            yield Op(kind, ";".join(names), dtype, weight_bytes, types[outputs[0].Type()], names[0], buffer)


def _restored_types(model: Any, graph: Any, kinds: list[str]) -> Iterator[str]:
    """Yield the types of constants that DEQUANTIZE ops of a graph turn into float32 at run time."""
    for op in (graph.Operators(i) for i in range(graph.OperatorsLength())):
        if kinds[op.OpcodeIndex()] == "DEQUANTIZE":
            tensor = graph.Tensors(op.Inputs(0))
            if _buffer_bytes(model, tensor):
                yield enum_names("TensorType")[tensor.Type()]


def op_type(code: Any) -> str:
    """Return the name of an op code's operator; of a custom op its own."""
    kind = enum_names("BuiltinOperator")[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]
    return code.CustomCode().decode() if kind == "CUSTOM" and code.CustomCode() else kind


def constant_span(model: Any, tensor: Any) -> tuple[int, int] | None:
    """Return where a tensor's constant lies in the file, in the flatbuffer or after it: start and end; None for activations."""
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
    """Return the bytes of a tensor's constant, inside the flatbuffer or after it; 0 for activations."""
    buffer = model.Buffers(tensor.Buffer())
    return int(buffer.DataLength() or (buffer.Size() if buffer.Offset() > 1 else 0))
