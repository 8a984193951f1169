"""Ranges of activations for static quantization, from real inputs, one sample and a bounded part of the activations in memory.

ONNX Runtime's own calibrators keep every activation of every sample for entropy and percentile. Its histograms are used here, but
filled sample by sample, between limits that a first pass has found; so they have the same bins whatever comes first.
"""

import contextlib
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shared.calibration.dataset import CalibrationSet
from shared.command.errors import ToolError
from shared.command.resources import MIB
from shared.files.atomic import draft_beside
from shared.files.checksums import sha256_of
from shared.formats.model_file import ModelFile
from shared.formats.onnx_file import Model
from shared.formats.tensors import INFINITE_FROM

CalibrationMethod = Literal["minmax", "entropy", "percentile"]
PERCENTILE = 99.999  # of a tensor's values lie inside the range
PERCENTILE_BINS = 2048
ENTROPY_BINS, ENTROPY_LEVELS = 1024, 128  # bins of the histogram, and of what it is compared with
FETCHED_BYTES = 512 * MIB  # of activations at a time; the model itself may need more
PROBED = 8  # tensors fetched at a time while their sizes are unknown
LEAST_RANGE = 1e-6  # of a tensor that is constant on all samples
Feed = dict[str, NDArray[Any]]
Limits = dict[str, tuple[float, float]]


def find_ranges(model: Path, augmented: Path, op_types: Sequence[str], samples: Iterable[Feed], method: CalibrationMethod) -> Any:
    """Return onnxruntime.quantization's TensorsData for the activations at ops of the given types.

    Tensors that are infinite, NaN, or empty in every sample have no range and are left out.

    Args:
        model: The repaired float32 model.
        augmented: A file to write a copy to that gives its activations out; in the same folder, as weights may lie next to it.
        op_types: Whose inputs and outputs count.
        samples: Inputs by name; iterated over twice.
        method: `minmax` takes the smallest and the largest value, the others may cut off rare ones.
    """
    from onnxruntime.quantization import calibrate

    names = activations(model, op_types)
    if not names:
        return _as_ranges({})
    limits = _smallest_and_largest(model, augmented, names, samples)
    if method == "minmax" or not limits:
        return _as_ranges(limits)
    names = list(limits)
    session = _giving_out(model, augmented, names)
    bins = PERCENTILE_BINS if method == "percentile" else ENTROPY_BINS
    collector = calibrate.HistogramCollector(method, False, bins, ENTROPY_LEVELS, PERCENTILE, "same")
    for name in names:  # with its final limits from the start, or bins would multiply as larger values come
        low, high = limits[name]
        threshold = np.float32(max(abs(low), abs(high), LEAST_RANGE))
        edges = np.linspace(-threshold, threshold, bins + 1, dtype=np.float32)
        empty = np.zeros(bins, np.int64)
        collector.histogram_dict[name] = (empty, edges, np.float32(low), np.float32(high), threshold)
    with contextlib.redirect_stdout(io.StringIO()):
        for part in _activations(session, names, samples):
            for name, values in part.items():
                _count(collector.histogram_dict[name], values)
        found = collector.compute_collection_result()
    return _as_ranges({name: found[name][:2] for name in names})


def _count(histogram: tuple[Any, ...], values: NDArray[Any]) -> None:
    """Add values to a histogram of equal bins over -threshold..threshold; what numpy.histogram does, in a fifth of the time."""
    counts, *_, threshold = histogram
    places = (values.ravel() + threshold) * np.float32(len(counts) / (2 * threshold))
    counts += np.bincount(np.clip(places.astype(np.int32), 0, len(counts) - 1), minlength=len(counts))


def _as_ranges(limits: Mapping[str, tuple[float, float]]) -> Any:
    """Return ranges in the library's form; it takes them as the smallest and largest values, whatever the method."""
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData

    return TensorsData(
        CalibrationMethod.MinMax, {name: (np.float32(low), np.float32(high)) for name, (low, high) in limits.items()}
    )


def activations(model: Path, op_types: Sequence[str]) -> list[str]:
    """Return the names of a model's float32 activations at ops of the given types, its inputs and outputs included."""
    import onnx

    graph = onnx.load(str(model.absolute()), load_external_data=False).graph
    kinds = _float_tensors(graph)
    constants = {tensor.name for tensor in graph.initializer}
    names = (name for node in graph.node if node.op_type in op_types for name in (*node.input, *node.output))
    wanted = (name for name in names if name not in constants and kinds.get(name))
    return list(dict.fromkeys(wanted))


def read_ranges(path: Path) -> Limits:
    """Return the smallest and the largest value of each activation, from a file of ranges."""
    from onnxruntime.quantization.calibrate import load_tensors_data

    found = load_tensors_data(path).data
    return {name: (float(np.min(of.lowest)), float(np.max(of.highest))) for name, of in found.items()}


def unranged(model: Model, op_types: Sequence[str], ranges: Mapping[str, object]) -> Iterator[str]:
    """Yield the names of the nodes of given types at which an activation has no range: they can't be quantized."""
    constants = {tensor.name for tensor in model.graph.initializer}
    kinds = _float_tensors(model.graph)
    for node in model.graph.node:
        names = [name for name in (*node.input, *node.output) if name not in constants and kinds.get(name, True)]
        if node.op_type in op_types and any(name not in ranges for name in names if name):
            yield node.name


def _float_tensors(graph: Any) -> dict[str, bool]:
    """Return tensor -> whether it is float32, as far as that is known."""
    import onnx

    values = (*graph.value_info, *graph.input, *graph.output)
    return {value.name: value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for value in values}


def open_session(path: Path) -> Any:
    """Return a session that runs nodes as soon as their inputs are there, so that activations are freed early.

    In ONNX Runtime's default order SCUNet with a node at each activation takes 5.8 GB, in this one 1.0 GB and half the time.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _smallest_and_largest(model: Path, augmented: Path, names: list[str], samples: Iterable[Feed]) -> Limits:
    """Return the limits of each activation, found inside the graph: the activations themselves never leave it."""
    import onnx

    proto = onnx.load(str(model.absolute()), load_external_data=False)
    kinds = ("ReduceMin", "ReduceMax")
    made = [f"edgepress_{kind}_{number}" for number in range(len(names)) for kind in kinds]
    added: dict[str, list[Any]] = {}
    for number, name in enumerate(names):
        for kind in kinds:
            output = f"edgepress_{kind}_{number}"
            added.setdefault(name, []).append(onnx.helper.make_node(kind, [name], [output], keepdims=0, name=output))
            proto.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, []))
    insert_after(proto.graph, added)
    onnx.save_model(proto, str(augmented))
    session = open_session(augmented)
    found = np.array([session.run(made, feed) for feed in samples], np.float64).reshape(-1, len(names), 2)
    if not len(found):
        raise ToolError("the calibration set is empty")
    limits = {}
    for name, of_samples in zip(names, found.swapaxes(0, 1), strict=True):
        seen = of_samples[~(of_samples[:, 0] > of_samples[:, 1])]  # of an empty tensor the smallest value is above the largest
        if seen.size and (np.abs(seen) < INFINITE_FROM).all():
            limits[name] = float(seen[:, 0].min()), float(seen[:, 1].max())
    return limits


def insert_after(graph: Any, added: Mapping[str, Sequence[Any]]) -> None:
    """Insert nodes right after those that make the tensors they read, in place.

    At the end of the graph ONNX Runtime would run them last, and keep every activation until then.
    """
    nodes = [node for value in graph.input for node in added.get(value.name, ())]
    for node in graph.node:
        nodes += [node, *(one for name in node.output for one in added.get(name, ()))]
    del graph.node[:]
    graph.node.extend(nodes)


def _giving_out(model: Path, augmented: Path, names: list[str]) -> Any:
    """Return a session of a copy of the model that gives its activations out."""
    import onnx

    proto = onnx.load(str(model.absolute()), load_external_data=False)
    known = {value.name for value in (*proto.graph.output, *proto.graph.input)}
    for name in names:
        if name not in known:
            proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    onnx.save_model(proto, str(augmented))
    return open_session(augmented)


def _activations(session: Any, names: list[str], samples: Iterable[Feed]) -> Iterator[Feed]:
    """Yield activations sample by sample, in parts of about FETCHED_BYTES; the model runs once for each part."""
    made = {output.name for output in session.get_outputs()}
    inner = [name for name in names if name in made]
    sizes: dict[str, int] = {}
    for feed in samples:
        given = {name: feed[name] for name in names if name in feed}
        if given:
            yield given
        parts = _parts(inner, sizes) if sizes else [inner[at : at + PROBED] for at in range(0, len(inner), PROBED)]
        for part in parts:
            outputs = dict(zip(part, session.run(part, feed), strict=True))
            sizes |= {name: values.nbytes for name, values in outputs.items()}
            yield {name: values for name, values in outputs.items() if values.size}


def _parts(names: list[str], sizes: dict[str, int]) -> list[list[str]]:
    parts: list[list[str]] = []
    total = FETCHED_BYTES + 1
    for name in names:
        if total + sizes[name] > FETCHED_BYTES:
            parts.append([])
            total = 0
        parts[-1].append(name)
        total += sizes[name]
    return parts


KIND = "edgepress ranges"
VERSION = 3  # of how ranges are found and named; to be raised with this module and `tools.quantize_onnx.graph.rewrite`


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


def cache_key(model: ModelFile, samples: CalibrationSet, method: str, op_types: Sequence[str]) -> str:
    """Return what decides ranges as one hash: the model's files, the samples, how ranges are found, and at which ops."""
    versions = " ".join(f"{name} {metadata.version(name)}" for name in ("onnx", "onnxruntime"))
    whole = hashlib.sha256(f"{VERSION} {versions} {samples.sha256()} {method} {' '.join(op_types)}".encode())
    for file in model.files:
        whole.update(sha256_of(file).encode())
    return whole.hexdigest()
