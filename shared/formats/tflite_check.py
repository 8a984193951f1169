"""Whether the tables of a .tflite file hold together: every index and every constant inside the file, before anything follows them.

The runtime verifies the flatbuffer's own structure only; places of weights after it, indices between tables and the sizes of
constants it takes as they are (seen in LiteRT 2.3), and so does AI Edge Quantizer.

Source: https://github.com/google-ai-edge/LiteRT/blob/v2.1.6/tflite/converter/schema/schema.fbs
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

SCHEMA_VERSION = 3
MOST = 30_000  # of anything: tensors, ops, buffers; the largest models known have thousands, and the quantizer takes hours for more
MOST_RANK = 16
MOST_ELEMENTS = 2**42
VARIABLE_LENGTH = ("STRING", "RESOURCE", "VARIANT")  # their constants' size does not follow from their shape
BITS = {
    **dict.fromkeys(("INT4", "UINT4"), 4),
    **dict.fromkeys(("INT8", "UINT8", "BOOL"), 8),
    **dict.fromkeys(("INT16", "UINT16", "FLOAT16", "BFLOAT16"), 16),
    **dict.fromkeys(("INT32", "UINT32", "FLOAT32"), 32),
    **dict.fromkeys(("INT64", "UINT64", "FLOAT64", "COMPLEX64"), 64),
    "COMPLEX128": 128,
    "INT2": 2,
}


def check_structure(model: Any, size_bytes: int, enum_names: Callable[[str], dict[int, str]]) -> None:
    """Raise ValueError unless a model's tables hold together.

    Args:
        model: Its root table.
        size_bytes: Size of the file.
        enum_names: Returns number -> name of an enumeration of the schema.
    """
    _require(model.Version() == SCHEMA_VERSION, f"schema version {model.Version()} instead of {SCHEMA_VERSION}")
    graphs = _all(model, "Subgraphs", size_bytes)
    _require(bool(graphs), "no graph")
    buffers = _all(model, "Buffers", size_bytes)
    spans = [_span(buffer, size_bytes) for buffer in buffers]
    _require_apart(sorted({span for span in spans if span is not None and span[2]}))
    codes = _all(model, "OperatorCodes", size_bytes)
    kinds = enum_names("BuiltinOperator")
    for code in codes:
        _require(max(code.BuiltinCode(), code.DeprecatedBuiltinCode()) in kinds, f"an unknown op code {code.BuiltinCode()}")
    types = enum_names("TensorType")
    for number, graph in enumerate(graphs):
        tensors = _all(graph, "Tensors", size_bytes)
        for place, tensor in enumerate(tensors):
            _check_tensor(tensor, f"tensor {place} of graph {number}", spans, types, size_bytes)
        for side in ("Inputs", "Outputs"):
            _require_places(_numbers(graph, side, size_bytes), len(tensors), f"{side.lower()} of graph {number}", least=0)
        for op in _all(graph, "Operators", size_bytes):
            _require(op.OpcodeIndex() < len(codes), f"an op of graph {number} has no op code")
            _require_places(_numbers(op, "Inputs", size_bytes), len(tensors), f"an op's inputs in graph {number}", least=-1)
            _require_places(_numbers(op, "Outputs", size_bytes), len(tensors), f"an op's outputs in graph {number}", least=0)
    for entry in _all(model, "Metadata", size_bytes):
        _require(entry.Buffer() < len(buffers), "metadata without a buffer")
    for signature in _all(model, "SignatureDefs", size_bytes):
        _require(signature.SubgraphIndex() < len(graphs), "a signature of no graph")
        count = graphs[signature.SubgraphIndex()].TensorsLength()
        for side in ("Inputs", "Outputs"):
            _require_places([entry.TensorIndex() for entry in _all(signature, side, size_bytes)], count, "a signature", least=0)


def _require(holds: bool, fault: str) -> None:  # noqa: FBT001 - like an assertion
    if not holds:
        raise ValueError(fault)


def _count(table: Any, name: str, size_bytes: int) -> int:
    """Return the length of a vector, which must fit in the file."""
    count = int(getattr(table, f"{name}Length")())
    _require(0 <= count <= min(MOST, size_bytes), f"{count} {name.lower()}")
    return count


def _all(table: Any, name: str, size_bytes: int) -> Sequence[Any]:
    """Return all entries of a vector of tables."""
    return [getattr(table, name)(place) for place in range(_count(table, name, size_bytes))]


def _numbers(table: Any, name: str, size_bytes: int) -> list[int]:
    return [int(getattr(table, name)(place)) for place in range(_count(table, name, size_bytes))]


def _require_places(places: Sequence[int], count: int, what: str, *, least: int) -> None:
    wrong = [place for place in places if not least <= place < count]
    _require(not wrong, f"{what} name tensor {wrong[0] if wrong else ''} of {count}")


def _span(buffer: Any, size_bytes: int) -> tuple[int, int, bool] | None:
    """Return where a buffer's content lies, and whether after the flatbuffer; None for an empty one."""
    if length := buffer.DataLength():
        table = buffer._tab  # noqa: SLF001 - the generated code has no public way to a vector's place
        start, is_behind = int(table.Vector(table.Offset(4))), False
    elif buffer.Offset() > 1:
        start, length, is_behind = int(buffer.Offset()), int(buffer.Size()), True
    else:
        return None
    _require(0 <= start <= size_bytes and 0 <= length <= size_bytes - start, "a constant lies outside the file")
    return start, start + length, is_behind


def _require_apart(spans: Sequence[tuple[int, int, bool]]) -> None:
    overlaps = [(one, other) for one, other in itertools.pairwise(spans) if one[1] > other[0]]
    _require(not overlaps, "constants lie over each other")


def _check_tensor(
    tensor: Any, what: str, spans: Sequence[tuple[int, int, bool] | None], types: dict[int, str], size_bytes: int
) -> None:
    _require(tensor.Buffer() < len(spans), f"{what} has no buffer")
    kind = types.get(tensor.Type())
    _require(kind is not None, f"{what} is of no known type")
    _require(_count(tensor, "Shape", size_bytes) <= MOST_RANK, f"{what} has {tensor.ShapeLength()} axes")
    shape = _numbers(tensor, "Shape", size_bytes)
    elements = math.prod(shape)
    _require(all(size >= -1 for size in shape) and elements <= MOST_ELEMENTS, f"{what} has the shape {shape}")
    span = spans[tensor.Buffer()]
    if span is not None and tensor.Sparsity() is None and kind not in VARIABLE_LENGTH:
        expected, found = (elements * BITS[str(kind)] + 7) // 8, span[1] - span[0]
        _require(found == expected, f"{what} holds {found} bytes instead of {expected}")
    if (quantized := tensor.Quantization()) is not None:
        _check_scales(quantized, what, shape, size_bytes)


def _check_scales(quantized: Any, what: str, shape: Sequence[int], size_bytes: int) -> None:
    count = _count(quantized, "Scale", size_bytes)
    if not count:
        return
    scales = [float(quantized.Scale(place)) for place in range(count)]
    _require(all(math.isfinite(scale) and scale > 0 for scale in scales), f"{what} has a scale that is not above 0")
    zeros = _count(quantized, "ZeroPoint", size_bytes)
    _require(zeros in (0, 1, count), f"{what} has {zeros} zero points for {count} scales")
    axis = quantized.QuantizedDimension()
    fits = count == 1 or (0 <= axis < len(shape) and shape[axis] == count)
    _require(fits, f"{what} has {count} scales along axis {axis} of {list(shape)}")
