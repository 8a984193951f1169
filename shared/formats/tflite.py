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
from shared.formats.input_hints import GraphInput, InputHints, Step, find_hints
from shared.formats.tflite_check import check_structure
from shared.formats.tflite_metadata import read_metadata, task_library_range
from shared.media.images import image_form

IDENTIFIER = b"TFL3"  # at byte 4
# What a walk over a flatbuffer's tables can raise on a damaged file.
DAMAGE = (struct.error, LookupError, TypeError, ValueError, AttributeError, AssertionError, ArithmeticError, RecursionError)
AGAIN = "convert or download it again"
PLAIN_TYPES = {"FLOAT32": np.float32, "FLOAT16": np.float16, "INT32": np.int32, "INT64": np.int64}


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
        hints: What its first ops tell about its inputs.
        has_open_inputs: Whether an input has integers, or an axis of free length.
    """

    ops: list[Op]
    custom_ops: list[str] = field(default_factory=list)
    restored_types: list[str] = field(default_factory=list)
    has_sparse: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)
    input_range: tuple[float, float] | None = None
    hints: InputHints = field(default_factory=InputHints)
    has_open_inputs: bool = False


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
        is_open = any(_is_open(graph.Tensors(graph.Inputs(k))) for graph in graphs for k in range(graph.InputsLength()))
        hints = _hints_of(model, file, kinds)
        return TfliteContent(ops, custom, sorted(restored), "DENSIFY" in kinds, metadata, declared, hints, is_open)


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
            names = [tensor_name(tensor) for tensor in outputs]
            _, weight_bytes, dtype, buffer = max(sizes, default=(0, 0, "", 0))
            yield Op(kind, ";".join(names), dtype, weight_bytes, types[outputs[0].Type()], names[0], buffer)


def _hints_of(model: Any, file: IO[bytes], kinds: list[str]) -> InputHints:
    """Return what the graphs tell about their inputs, by the names of tensors and by those of signatures."""
    graphs = [model.Subgraphs(g) for g in range(model.SubgraphsLength())]
    found = [_graph_hints(model, graph, file, kinds) for graph in graphs]
    largest = {tensor_name(graphs[g].Tensors(int(t))): top for g, hints in enumerate(found) for t, top in hints.largest.items()}
    for signature in (model.SignatureDefs(i) for i in range(model.SignatureDefsLength())):
        for entry in (signature.Inputs(k) for k in range(signature.InputsLength())):
            top = found[signature.SubgraphIndex()].largest.get(str(entry.TensorIndex()))
            if top is not None:
                name = entry.Name().decode()
                largest |= {name: top, f"{signature.SignatureKey().decode()}/{name}": top}
    return InputHints(next((hints.pixel_range for hints in found if hints.pixel_range), None), largest)


def _graph_hints(model: Any, graph: Any, file: IO[bytes], kinds: list[str]) -> InputHints:
    """Return what a graph tells about its inputs, by the numbers of their tensors."""
    tensors = [graph.Tensors(t) for t in range(graph.TensorsLength())]
    stored = {str(t): tensor for t, tensor in enumerate(tensors) if _buffer_bytes(model, tensor)}
    shapes = {key: [tensor.Shape(i) for i in range(tensor.ShapeLength())] for key, tensor in stored.items()}
    ops = [graph.Operators(i) for i in range(graph.OperatorsLength())]
    steps = [
        Step(
            kinds[op.OpcodeIndex()].replace("_", ""),
            [str(op.Inputs(k)) for k in range(op.InputsLength())],
            [str(op.Outputs(k)) for k in range(op.OutputsLength())],
        )
        for op in ops
    ]

    def constant(key: str) -> Any:
        start, end = constant_span(model, stored[key]) or (0, 0)
        dtype = PLAIN_TYPES.get(enum_names("TensorType")[stored[key].Type()])  # small integers are quantized
        file.seek(start)
        return None if dtype is None else np.frombuffer(file.read(end - start), dtype)

    places = [graph.Inputs(k) for k in range(graph.InputsLength())]
    inputs = [GraphInput(str(t), tensor_name(tensors[t]), _is_image(tensors[t])) for t in places]
    return find_hints(inputs, steps, shapes, constant)


def _is_open(tensor: Any) -> bool:
    kind = enum_names("TensorType")[tensor.Type()]
    return "INT" in kind or any(tensor.ShapeSignature(i) < 0 for i in range(1, tensor.ShapeSignatureLength()))


def _is_image(tensor: Any) -> bool:
    shape = tuple(tensor.Shape(i) for i in range(tensor.ShapeLength()))
    signed = tuple(tensor.ShapeSignature(i) for i in range(tensor.ShapeSignatureLength())) or shape
    return enum_names("TensorType")[tensor.Type()] in ("FLOAT32", "FLOAT16") and image_form(signed) is not None


def tensor_name(tensor: Any) -> str:
    """Return a tensor's name, empty where it has none."""
    return (tensor.Name() or b"").decode()


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
