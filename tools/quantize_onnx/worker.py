"""The worker process of `tools.quantize_onnx`: onnx and onnxruntime.quantization on files of unknown origin."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from shared.calibration.arrays import Sample
from shared.calibration.dataset import CalibrationSet
from shared.formats.onnx_file import check_constants, require_finite
from shared.formats.onnx_graph import OnnxContent, read_onnx
from shared.formats.tensors import TensorSpec
from shared.runtime.processes import Message, answer_tasks
from tools.quantize_onnx import ranges
from tools.quantize_onnx.bias import mean_inputs
from tools.quantize_onnx.graph.repair import repair
from tools.quantize_onnx.graph.rewrite import write_rewritten
from tools.quantize_onnx.memory import activation_bytes
from tools.quantize_onnx.quantizing import QuantizeTask, quantize
from tools.quantize_onnx.ranges import CalibrationMethod

Samples = dict[str, Any]  # a calibration set as a message: its fields, and the model's inputs


def repair_model(source: str, target: str, *, keeps_halves: bool) -> Message:
    """Check a model's constants, and write the repaired model; return what was repaired, and what the file holds."""
    check_constants(Path(source))
    done = repair(Path(source), Path(target), keeps_halves=keeps_halves)
    require_finite(Path(target), where=Path(source))
    return {"repairs": str(done), "content": _content(Path(target))}


def rewrite(model: str, target: str) -> Message:
    """Write the model in the form whose integer kernels are fast, see `tools.quantize_onnx.graph.rewrite`.

    Returns:
        Whether anything changed, so that there is a file, and the names of nodes that must stay in float.
    """
    changed, float_layers = write_rewritten(Path(model), Path(target))
    return {"changed": changed, "float_layers": float_layers}


def find_ranges(model: str, target: str, method: CalibrationMethod, op_types: list[str], samples: Samples) -> Message:
    """Write the ranges of a model's activations, in onnxruntime.quantization's form; return how many there are."""
    from onnxruntime.quantization.calibrate import save_tensors_data

    augmented = Path(model).with_name("augmented.onnx")
    found = ranges.find_ranges(Path(model), augmented, op_types, _Feeds(samples), method)
    save_tensors_data(found, target)
    augmented.unlink(missing_ok=True)
    return {"tensors": len(found.data)}


def find_activations(model: str, inputs: list[Any]) -> Message:
    """Return the memory that a model's activations take, in bytes; see `tools.quantize_onnx.memory`."""
    scratch = Path(model).with_name("shapes.onnx")
    needed = activation_bytes(Path(model), scratch, _specs(inputs))
    scratch.unlink(missing_ok=True)
    return {"bytes": needed}


def find_means(model: str, target: str, samples: Samples) -> Message:
    """Write the mean inputs of a model's layers; return how many there are."""
    augmented = Path(model).with_name("augmented.onnx")
    found = mean_inputs(Path(model), augmented, _Feeds(samples))
    augmented.unlink(missing_ok=True)
    names = list(found)
    arrays: dict[str, Any] = {f"mean_{number}": found[name] for number, name in enumerate(names)}
    np.savez(target, names=np.array(json.dumps(names)), **arrays)
    return {"layers": len(found)}


def quantize_file(target: str, recipe: dict[str, Any]) -> Message:
    """Quantize a model into a file; return how many biases were corrected, and what the file holds."""
    corrected = quantize(TypeAdapter(QuantizeTask).validate_python(recipe), Path(target))
    return {"corrected": corrected, "content": _content(Path(target))}


def _content(path: Path) -> Any:
    return TypeAdapter(OnnxContent).dump_python(read_onnx(path), mode="json")


def as_message(inputs: Sequence[TensorSpec]) -> list[Any]:
    """Return a model's inputs as JSON can hold them."""
    return [[spec.name, spec.shape, spec.dtype] for spec in inputs]


def _specs(inputs: list[Any]) -> list[TensorSpec]:
    return [TensorSpec(name, tuple(shape), dtype) for name, shape, dtype in inputs]


class _Feeds:
    """Samples of a calibration set by input name; can be iterated over again."""

    def __init__(self, samples: Samples) -> None:
        self._inputs = _specs(samples["inputs"])
        self._set = CalibrationSet.from_message(samples["set"])

    def __iter__(self) -> Iterator[Sample]:
        return self._set.samples(self._inputs)


handle = answer_tasks(
    {
        "repair": repair_model,
        "activations": find_activations,
        "rewrite": rewrite,
        "ranges": find_ranges,
        "means": find_means,
        "quantize": quantize_file,
    }
)
