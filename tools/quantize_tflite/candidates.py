"""Quantize one candidate of a model, run it in the real interpreter on real samples, and say how far its answers moved.

Runs wherever an executor puts it: everything it needs comes with the job, and the model and the samples are read from their paths.
"""

import contextlib
import functools
import mmap
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.calibration.arrays import Sample
from shared.calibration.dataset import CalibrationSet
from shared.calibration.samples import HeldSamples
from shared.command.errors import ToolError, plain_reason
from shared.files.checksums import sha256_of
from shared.formats.tensors import TensorSpec
from shared.metrics.output_error import measure_error, measure_errors
from shared.quantize.ledger import Outcome, RefusedError
from shared.runtime.tflite import TfliteModel
from shared.runtime.workarounds import large_weights_quantized
from tools.quantize_tflite.graph.bias import Patches, correct_biases, layers, mean_patches
from tools.quantize_tflite.recipes import Rules

Array = NDArray[Any]
Outputs = list[Array]
TIMED_RUNS = 11


@dataclass(frozen=True)
class Subject:
    """The model that candidates are made of, and what they are run on.

    Args:
        path: A repaired float .tflite file, readable wherever a job runs.
        sha256: Its hash, so that another file in its place is noticed; empty where nobody else could have put one there.
        outputs: Names of its outputs.
        peaks: For each output the width of the range of its values where it is an image, else None.
        held: What outputs are measured on.
        calibration: Real inputs that biases are corrected with.
        corrects_bias: Whether they are.
    """

    path: Path
    sha256: str
    outputs: tuple[str, ...] = ()
    peaks: tuple[float | None, ...] = ()
    held: HeldSamples = field(default_factory=lambda: HeldSamples(None, 1))
    calibration: CalibrationSet | None = None
    corrects_bias: bool = True


@dataclass(frozen=True)
class TfliteJob:
    """One candidate to measure.

    Args:
        subject: The model.
        rules: How to quantize it; empty leaves it in float.
        tensor: Also compare this tensor inside the model.
        is_timed: Also measure its latency, in turns with the float model.
    """

    subject: Subject
    rules: Rules
    tensor: str | None = None
    is_timed: bool = False

    def measure(self) -> Outcome:
        """Quantize and run the candidate; errors as of `shared.quantize.ledger.Job`."""
        subject, tensor = self.subject, self.tensor
        reference = _reference(subject)
        quantized = _quantized(subject, self.rules)
        candidate = _run(quantized, subject, tensor)
        inside = None
        if tensor is not None:
            before = [outputs.pop() for outputs in _run(subject.path, subject, tensor)]
            inside = measure_error(tensor, before, [outputs.pop() for outputs in candidate])
        slowdown = _slowdown(quantized, subject) if self.is_timed else None
        return Outcome(len(quantized), measure_errors(subject.outputs, reference, candidate, subject.peaks), inside, slowdown)


def corrected(subject: Subject, quantized: bytearray | mmap.mmap) -> int:
    """Correct the biases inside a quantized model's bytes from the subject's samples; return of how many layers."""
    if subject.calibration is None or not subject.corrects_bias:
        return 0
    with _mapped(subject.path) as content:
        return correct_biases(content, quantized, _patches(subject))


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    """Yield a file's bytes; the mapping ends when the last view of it does."""
    with path.open("rb") as file:
        yield mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@functools.lru_cache(maxsize=2)
def _reference(subject: Subject) -> list[Outputs]:
    """Return the float model's outputs for every sample; kept for the next job of the same process."""
    try:
        sha256 = sha256_of(subject.path)
    except OSError as error:
        remedy = "all workers need the model and the samples at the same paths"
        raise ToolError("the model is not here", where=subject.path, got=error.strerror, remedy=remedy) from None
    if sha256 != subject.sha256:
        raise ToolError("another model is in its place", where=subject.path)
    return _run(subject.path, subject, None)


@functools.lru_cache(maxsize=2)
def _patches(subject: Subject) -> Patches:
    """Return what bias correction needs to know of the float model's layers."""
    model = _loaded(subject.path, keeps_tensors=True)
    with _mapped(subject.path) as content:
        wanted = {layer.input for layer in layers(content)}
    sums: dict[str, dict[tuple[int, ...], tuple[Any, int]]] = {}
    assert subject.calibration is not None
    for sample in subject.calibration.samples(model.inputs):
        model.run(sample)
        for name, values in model.tensors(wanted).items():
            of_shapes = sums.setdefault(name, {})
            total, count = of_shapes.get(values.shape, (0.0, 0))
            of_shapes[values.shape] = total + values.astype(np.float64), count + 1
    with _mapped(subject.path) as content:
        return mean_patches(content, {name: list(of_shapes.values()) for name, of_shapes in sums.items()})


@functools.lru_cache(maxsize=1)
def _samples(subject: Subject, inputs: tuple[TensorSpec, ...]) -> list[Sample]:
    return subject.held.load(inputs)


def _quantized(subject: Subject, rules: Rules) -> bytearray:
    if not rules:
        return bytearray(subject.path.read_bytes())
    os.environ["TQDM_DISABLE"] = "1"
    from ai_edge_quantizer import quantizer

    try:
        with large_weights_quantized():
            job = quantizer.Quantizer(str(subject.path), rules)
            result = job.quantize(enable_progress_bar=False, enable_progress_report=False)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise RefusedError(
            "AI Edge Quantizer rejects the recipe or the model", where=subject.path, got=plain_reason(error)
        ) from None
    content = bytearray(result.quantized_model)
    corrected(subject, content)
    return content


def _loaded(model: Path | bytearray, *, keeps_tensors: bool = False) -> TfliteModel:
    """Return a loaded model, on one thread: so a candidate gives the same answers wherever it runs."""
    try:
        return TfliteModel(model if isinstance(model, Path) else bytes(model), 1, keeps_tensors=keeps_tensors)
    except (RuntimeError, ValueError) as error:
        raise RefusedError("the runtime does not load the candidate", got=plain_reason(error)) from None


def _run(source: Path | bytearray, subject: Subject, tensor: str | None) -> list[Outputs]:
    """Return the outputs for every sample, followed by the requested tensor."""
    model = _loaded(source, keeps_tensors=tensor is not None)
    outputs = []
    for sample in _samples(subject, tuple(model.inputs)):
        made = model.run(sample)
        outputs.append([made[spec.name] for spec in model.outputs])
        if tensor is not None:
            inside = model.tensors([tensor])
            if not inside:
                raise ToolError("no tensor of this name", where=subject.path, got=tensor)
            outputs[-1].append(inside[tensor])
    return outputs


def _slowdown(candidate: bytearray, subject: Subject) -> float:
    """Return the median latency of the candidate over the float model's, run in turns."""
    sides = [_loaded(subject.path), _loaded(candidate)]
    sample = _samples(subject, tuple(sides[0].inputs))[0]
    times: list[list[float]] = [[], []]
    for number in range(TIMED_RUNS + 1):
        for side, of_side in zip(sides, times, strict=True):
            start = time.perf_counter()
            side.run(sample)
            if number:  # the first run allocates
                of_side.append(time.perf_counter() - start)
    return statistics.median(times[1]) / statistics.median(times[0])
