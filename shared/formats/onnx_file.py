"""Access to an .onnx file and to the files next to it that hold its weights, all inside its folder; weights are not loaded."""

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from shared.command.errors import ToolError, first_line
from shared.command.limits import require_size
from shared.command.watchdog import reading
from shared.files.file_type import is_regular, name_kind, read_head, regular_size

MAX_PROTOBUF_BYTES = 2**31 - 1
MOST_ELEMENTS = 2**42
AGAIN = "export or download it again"
# Op type -> places of the inputs that are weights, biases, or parameters of a normalization.
LAYER_CONSTANTS = {
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gemm": (0, 1, 2),
    "MatMul": (0, 1),
    "BatchNormalization": (1, 2, 3, 4),
    "InstanceNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "GroupNormalization": (1, 2),
    "PRelu": (1,),
    "LSTM": (1, 2, 3),
    "GRU": (1, 2, 3),
    "RNN": (1, 2, 3),
}
SCALES = {"Mul": (0, 1), "Div": (0, 1)}  # what a product or quotient with a constant scales
Model = Any  # onnx.ModelProto; the package has no stubs that mypy would follow


def read_checked(path: Path) -> tuple[Model, list[Path]]:
    """Return the model as onnx.ModelProto, weights of external files not loaded, and these files, sorted.

    Raises:
        ToolError: No ONNX model, one without a graph, or one whose external files are not there.
    """
    kind = name_kind(read_head(path, "model", again=AGAIN))
    if kind.startswith(("a ", "an HTML", "XML")):  # protobuf has no magic number
        raise ToolError("not an ONNX model", where=path, got=kind, expected="an .onnx file", remedy=AGAIN)
    model = read_model(path)
    return model, files_of(model, path)


def check_is_onnx(path: Path) -> list[Path]:
    """Return the files next to a model that hold its weights; errors as of `read_checked`."""
    return read_checked(path)[1]


def read_model(path: Path) -> Model:
    """Return the model as onnx.ModelProto, weights of external files not loaded.

    Raises:
        ToolError: No ONNX model, or one without a graph.
    """
    import onnx
    from google.protobuf.message import DecodeError

    size = regular_size(path, "model")
    if size > MAX_PROTOBUF_BYTES:
        got, expected = f"{size} bytes", "at most 2 GiB beside external data"
        raise ToolError("the file is larger than any ONNX model can be", where=path, got=got, expected=expected, remedy=AGAIN)
    try:
        with reading(path):
            model = onnx.load(os.path.abspath(path), load_external_data=False)  # noqa: PTH100 - bare names slip past its checks
    except (DecodeError, ValueError, OSError) as error:
        raise ToolError("not an ONNX model, or a damaged one", where=path, got=first_line(error), remedy=AGAIN) from None
    if not model.graph.node or not model.opset_import:
        raise ToolError("not an ONNX model, or a damaged one", where=path, got="no graph with nodes", remedy=AGAIN)
    return model


def name_weights(draft: Path, output: Path) -> None:
    """Give the file `<draft>.data` that a draft's weights lie in, if any, its final name next to the output, and tell the draft.

    The name holds the start of the content's sha256: so a new model's weights never replace those of the model it replaces, and
    either is whole at any moment.
    """
    from onnx import TensorProto

    data = draft.with_name(f"{draft.name}.data")
    if not data.exists():
        return
    try:
        with data.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        final = output.with_name(f"{output.stem}.{digest[:8]}.data")
        model = read_model(draft)
        for tensor in tensors(model):
            if tensor.data_location == TensorProto.EXTERNAL:
                next(entry for entry in tensor.external_data if entry.key == "location").value = final.name
        draft.write_bytes(model.SerializeToString(deterministic=True))
        data.replace(final)
    finally:
        data.unlink(missing_ok=True)


def tensors(model: Model) -> Iterator[Any]:
    """Yield all constant tensors of a model: of its graph, of the graphs inside its nodes, and of its functions."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)
    for training in model.training_info:
        yield from _graph_tensors(training.initialization)
        yield from _graph_tensors(training.algorithm)


def _graph_tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[Any]) -> Iterator[Any]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for sparse in (*((attribute.sparse_tensor,) if attribute.HasField("sparse_tensor") else ()), *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for inner in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _graph_tensors(inner)


def inner_graphs(node: Any) -> list[Any]:
    """Return the graphs inside of a node, such as the branches of an If."""
    return [
        graph for attribute in node.attribute for graph in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs)
    ]


def external_files(path: Path) -> list[Path]:
    """Return the files next to a model that hold its weights, sorted; errors as of `files_of`."""
    return files_of(read_model(path), path)


def files_of(model: Model, path: Path) -> list[Path]:
    """Return the files that a model, read from `path`, refers to for its weights, sorted.

    Raises:
        ToolError: One is missing, too short, or lies outside the model's folder.
    """
    from onnx import TensorProto

    ends: dict[str, int] = {}
    for tensor in tensors(model):
        is_known = tensor.data_type in TensorProto.DataType.values()
        if any(size < 0 for size in tensor.dims) or math.prod(tensor.dims) > MOST_ELEMENTS or not is_known:
            got = f"{tensor.name} {list(tensor.dims)} of type {tensor.data_type}"
            raise ToolError("a constant of the model has an impossible shape or type", where=path, got=got, remedy=AGAIN)
        if tensor.data_location == TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            location = entries.get("location", "")
            try:
                offset, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
            except ValueError:
                offset = length = -1
            parts = PurePosixPath(location).parts if isinstance(location, str) else ()  # bytes where it is no UTF-8
            if len(parts) != 1 or not location.isprintable() or parts[0] in ("..", "/") or min(offset, length) < 0:
                got = f"{tensor.name}: {location!r} at {entries.get('offset', 0)}"
                raise ToolError(
                    "external weights must lie beside the model", where=path, got=got, expected="a file name", remedy=AGAIN
                )
            ends[location] = max(ends.get(location, 0), offset + (length or tensor_bytes(tensor)))
    files = []
    for location, end in sorted(ends.items()):
        file = path.parent / location
        if not is_regular(file):
            raise ToolError("the model's weights are missing", where=file, remedy=f"put {location} beside {path.name}")
        if file.is_symlink() or file.stat().st_nlink > 1:
            remedy = "copy the file itself there; huggingface_hub does with local_dir"
            raise ToolError("the model's weights are a link, which ONNX does not follow", where=file, remedy=remedy)
        size = file.stat().st_size
        require_size(file, size, "model-gb")
        if size < end:
            expected = f"at least {end} bytes"
            raise ToolError("the model's weights are cut off", where=file, got=size, expected=expected, remedy=AGAIN)
        files.append(file)
    return files


def tensor_bytes(tensor: Any) -> int:
    """Return the bytes a tensor's values take, wherever they lie."""
    import onnx

    bits = {"INT4": 4, "UINT4": 4}.get(onnx.TensorProto.DataType.Name(tensor.data_type))
    if bits is None:
        try:
            bits = 8 * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
        except (KeyError, TypeError, ValueError):
            bits = 8
    return int((math.prod(tensor.dims) * bits + 7) // 8)


def check_constants(path: Path) -> None:
    """Raise ToolError where the values of a constant can't be read; reads all of them once."""
    with reading(path):
        for tensor in tensors(read_model(path)):
            values_of(tensor, path)


def require_finite(path: Path, where: Path | None = None) -> None:
    """Raise ToolError where a weight, a bias, a scale or a parameter of a normalization is NaN or infinite.

    Other constants may be infinite: masks of attention, limits and paddings are.

    Args:
        path: The model.
        where: The file to name in the error; default: the model.
    """
    import onnx

    floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16}
    faults = []
    with reading(path):
        for tensor in _layer_constants(read_model(path).graph, {}):
            if tensor.data_type in floats:
                values = values_of(tensor, path)
                with np.errstate(all="ignore"):
                    is_finite = bool(np.isfinite(values.sum(dtype=np.float64)) or np.isfinite(values).all())
                faults += [] if is_finite else [tensor.name]
    if faults:
        got = f"{len(faults)} tensors, the first {faults[0]}"
        raise ToolError("the model holds NaN or infinite weights", where=where or path, got=got, remedy="train or export it again")


def values_of(tensor: Any, path: Path) -> Any:
    """Return the values of a constant of the model in `path`, wherever they lie.

    Raises:
        ToolError: They can't be read.
    """
    import onnx

    try:
        return onnx.numpy_helper.to_array(tensor, str(path.absolute().parent))
    except (ValueError, TypeError, OSError, onnx.checker.ValidationError) as error:
        got = f"{tensor.name}: {first_line(error)}"
        raise ToolError("a constant of the model is damaged", where=path, got=got, remedy=AGAIN) from None


def _layer_constants(graph: Any, outer: Mapping[str, Any]) -> Iterator[Any]:
    """Yield each constant that a layer or a normalization reads, once, of a graph and of the graphs inside its nodes."""
    constants = {**outer, **{tensor.name: tensor for tensor in graph.initializer}}
    for node in graph.node:
        for attribute in node.attribute if node.op_type == "Constant" else ():
            if attribute.HasField("t"):
                constants[node.output[0]] = attribute.t
                attribute.t.name = node.output[0]
    read: dict[str, None] = {}
    for node in graph.node:
        places = LAYER_CONSTANTS.get(node.op_type, SCALES.get(node.op_type, ()))
        read |= dict.fromkeys(name for place, name in enumerate(node.input) if place in places and name in constants)
        for inner in inner_graphs(node):
            yield from _layer_constants(inner, constants)
    yield from (constants[name] for name in read)
