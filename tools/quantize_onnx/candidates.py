"""Quantize one candidate of an ONNX model, run it on samples, and say how far its outputs moved.

Runs wherever an executor puts it: the job holds everything it needs, and the model and the samples are read from their paths.
"""

import functools
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from shared.calibration.arrays import Sample
from shared.calibration.samples import HeldSamples
from shared.command.errors import ToolError, plain_reason
from shared.files.checksums import sha256_of
from shared.formats.onnx_graph import OnnxOp
from shared.formats.tensors import TensorSpec
from shared.metrics.output_error import OutputError, measure_error, measure_errors
from shared.quantize.ledger import Outcome, RefusedError
from tools.quantize_onnx.quantizing import QuantizeTask, quantize

Outputs = list[NDArray[Any]]
TIMED_RUNS = 11
ONLY_ERRORS = 3  # of ONNX Runtime's log levels


@dataclass(frozen=True)
class Subject:
    """The model that candidates are made of, and what they are run on.

    Args:
        task: How candidates are made; each has layers in float of its own.
        sha256: Of the repaired model, so that another file in its place is noticed.
        inputs: The model's inputs.
        outputs: Names of its outputs.
        peaks: For each output the width of the range of its values where it is an image, else None.
        held: What outputs are measured on.
    """

    task: QuantizeTask
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    peaks: tuple[float | None, ...]
    held: HeldSamples


@dataclass(frozen=True)
class OnnxJob:
    """One candidate to measure.

    Args:
        subject: The model.
        float_layers: Nodes that stay in float; None measures the float model itself.
        tensor: Also compare this tensor inside the model.
        is_timed: Also measure its latency, in turns with the float model.
    """

    subject: Subject
    float_layers: tuple[str, ...] | None
    tensor: str | None = None
    is_timed: bool = False

    def measure(self) -> Outcome:
        """Quantize and run the candidate; errors as of `shared.quantize.ledger.Job`."""
        subject, tensor = self.subject, self.tensor
        reference = _reference(subject)
        if self.float_layers is None:
            errors = measure_errors(subject.outputs, reference, reference, subject.peaks)
            return Outcome(_size(subject.task.repaired), errors, slowdown=1.0)
        with tempfile.TemporaryDirectory(prefix="candidate-", dir=subject.task.repaired.parent) as folder:
            path = Path(folder) / "candidate.onnx"
            try:
                quantize(replace(subject.task, wanted=replace(subject.task.wanted, float_layers=self.float_layers)), path)
            except ToolError as error:
                raise RefusedError(**error.parts) from None
            session = _session(path)
            outputs = _run(session, subject, subject.outputs)
            inside = None if tensor is None else _compare_tensor(subject, path, tensor)
            slowdown = _slowdown(session, subject) if self.is_timed else None
            return Outcome(_size(path), measure_errors(subject.outputs, reference, outputs, subject.peaks), inside, slowdown)


def comparable_tensor(op: OnnxOp, ops: Sequence[OnnxOp], product: Sequence[OnnxOp]) -> str:
    """Return the tensor that shows an op's error: its output, or the output of the next op, where the quantizer joined both.

    Args:
        op: The op.
        ops: Of the float model.
        product: Of the quantized model.
    """
    there = {name for other in product for name in other.outputs}
    tensor = op.output
    while tensor not in there:
        readers = [reader for reader in ops if tensor in reader.inputs]
        if len(readers) != 1:
            return op.output
        tensor = readers[0].output
    return tensor


@functools.lru_cache(maxsize=2)
def _reference(subject: Subject) -> list[Outputs]:
    """Return the float model's outputs for every sample; kept for the next job of the same process."""
    path = subject.task.repaired
    try:
        sha256 = sha256_of(path)
    except OSError as error:
        remedy = "all workers need the model and the samples at the same paths"
        raise ToolError("the model is not here", where=path, got=error.strerror, remedy=remedy) from None
    if sha256 != subject.sha256:
        raise ToolError("another model is in its place", where=path)
    return _run(_session(path), subject, subject.outputs)


@functools.lru_cache(maxsize=1)
def _samples(subject: Subject) -> list[Sample]:
    return subject.held.load(subject.inputs)


def _session(path: Path) -> Any:
    """Return a session on one thread: so a candidate gives the same outputs wherever it runs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = ONLY_ERRORS
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - it raises classes of its own
        raise RefusedError("the runtime does not load the candidate", got=plain_reason(error)) from None


def _run(session: Any, subject: Subject, outputs: Sequence[str]) -> list[Outputs]:
    try:
        return [session.run(list(outputs), sample) for sample in _samples(subject)]
    except ToolError:
        raise
    except Exception as error:  # noqa: BLE001 - it raises classes of its own
        raise RefusedError("the runtime does not run the candidate", got=plain_reason(error)) from None


def _compare_tensor(subject: Subject, candidate: Path, tensor: str) -> OutputError:
    """Compare a tensor inside the candidate with the float model's; rewriting and fusing may have taken it out of the candidate."""
    sides = []
    for path in (subject.task.repaired, candidate):
        shown = _with_output(path, tensor)
        if shown is None:
            return OutputError(tensor, problem="the quantized model has no such tensor")
        try:
            sides.append([outputs[0] for outputs in _run(_session(shown), subject, [tensor])])
        finally:
            shown.unlink()
    before, after = sides
    return measure_error(tensor, before, after)


def _with_output(path: Path, tensor: str) -> Path | None:
    """Write a copy of a model to the same folder that gives a tensor out; return it, or None where there is no such tensor."""
    import onnx

    model = onnx.load(str(path.absolute()), load_external_data=False)
    if tensor not in {name for node in model.graph.node for name in node.output}:
        return None
    if tensor not in {value.name for value in model.graph.output}:
        model.graph.output.append(onnx.ValueInfoProto(name=tensor))
    with tempfile.NamedTemporaryFile(suffix=".onnx", dir=path.parent, delete=False) as file:
        file.write(model.SerializeToString())
    return Path(file.name)


def _slowdown(session: Any, subject: Subject) -> float:
    """Return the median latency of the candidate over the float model's, run in turns."""
    sides = [_session(subject.task.repaired), session]
    sample = _samples(subject)[0]
    times: list[list[float]] = [[], []]
    for number in range(TIMED_RUNS + 1):
        for side, of_side in zip(sides, times, strict=True):
            start = time.perf_counter()
            side.run(list(subject.outputs), sample)
            if number:  # the first run allocates
                of_side.append(time.perf_counter() - start)
    return statistics.median(times[1]) / statistics.median(times[0])


def _size(path: Path) -> int:
    """Return the size of a model with the file of its weights, if any."""
    return sum(file.stat().st_size for file in (path, path.with_name(f"{path.name}.data")) if file.exists())
