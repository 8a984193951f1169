"""Compare quantized models with their reference on the same inputs: size, speed, and how far the answers moved.

Example:
    python -m tools.compare model.tflite model_int8.tflite --min-cosine 0.999 --min-speedup 1.5

A reference may be a checkpoint (with --model), run in torch.
"""

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Column, Table

from shared import artifacts, metrics
from shared.artifacts import Plan, Product
from shared.cards import load_card
from shared.child import ChildError
from shared.cli import Overwrite, Refresh, Seed, Threads, run, size_text, step, to_json
from shared.errors import ToolError
from shared.images import image_files, image_layout, read_image, to_layout
from shared.machine import MIB, available_memory_bytes, cpu_count, cpu_name
from shared.runtime import Model, ModelSource, TensorSpec, memory_need_bytes, open_model, sample_inputs
from shared.tflite import check_is_tflite, read_dequantized_types

PACKAGES = ("ai-edge-litert", "torch", "numpy")
LARGE_BYTES = 512 * MIB  # models above this take seconds a run
SAMPLES, LARGE_SAMPLES = 8, 3
RUNS, LARGE_RUNS = 20, 3
SLOWER = 0.97  # speed-ups below this count as slower; repeated runs of one model differ by less
MEMORY_SHARE = 0.8  # of the free memory that models loaded side by side may take

Array = NDArray[Any]
Inputs = Callable[[list[TensorSpec], int], dict[str, Array]]


@dataclass(frozen=True)
class Gate:
    """A limit, and whether the candidate kept it."""

    name: str
    value: float | None
    limit: float
    ok: bool


@dataclass(frozen=True)
class Measured:
    """What one model showed. Latencies leave out the first run."""

    path: Path
    size_bytes: int
    load_ms: float
    median_ms: float
    p90_ms: float
    runs: int
    kernels: str
    peak_rss_bytes: int
    inputs: list[str]


@dataclass(frozen=True)
class Candidate:
    """A candidate against the reference; errors are of the worst sample, bit agreement is over all samples.

    `error` tells why there are no measurements: it crashed, or its outputs don't compare.
    """

    path: Path
    size_bytes: int
    reduction: float
    measured: Measured | None = None
    speedup: float | None = None
    cosine: float | None = None
    relative_error: float | None = None
    max_abs_error: float | None = None
    bit_agreement: float | None = None
    error: str | None = None
    gates: list[Gate] = field(default_factory=list)
    verdict: str = ""


@dataclass(frozen=True)
class Findings:
    """The reference, its candidates, and how they were measured."""

    reference: Measured
    candidates: list[Candidate]
    samples: int
    threads: int
    interleaved: bool

    @property
    def peak_rss_bytes(self) -> int:
        """Largest resident set of any model."""
        return max([self.reference.peak_rss_bytes, *(c.measured.peak_rss_bytes for c in self.candidates if c.measured)])

    @property
    def ok(self) -> bool:
        """Whether every candidate ran and kept every limit."""
        return all(candidate.error is None and all(gate.ok for gate in candidate.gates) for candidate in self.candidates)


@dataclass(frozen=True)
class Comparison:
    """Result of compare."""

    findings: Findings
    report: Product | None
    message: str

    @property
    def ok(self) -> bool:
        """Whether every candidate ran and kept every limit."""
        return self.findings.ok

    def __rich__(self) -> RenderableType:
        found = self.findings
        names = ["reference", *(f"candidate {number}" for number, _ in enumerate(found.candidates, start=1))]
        table = Table("", *(Column(name, overflow="fold") for name in names))
        for name, reference, of in _rows(found.reference):
            table.add_row(name, reference, *(of(candidate) for candidate in found.candidates))
        gates = Table("candidate", "gate", "value", "limit", "")
        for candidate in found.candidates:
            for gate in candidate.gates:
                value = "none" if gate.value is None else f"{gate.value:.6g}"
                gates.add_row(candidate.path.name, gate.name, value, f"{gate.limit:g}", "ok" if gate.ok else "FAILED")
        verdicts = [f"{candidate.path.name}: {candidate.verdict}" for candidate in found.candidates]
        return Lines(table, *([gates] if gates.row_count else []), *verdicts, self.message)


def _rows(reference: Measured) -> Iterator[tuple[str, str, Callable[[Candidate], str]]]:
    """Yield the rows of the table: name, the reference's value, and how to get a candidate's."""

    def measured(text: Callable[[Measured], str]) -> Callable[[Candidate], str]:
        return lambda c: text(c.measured) if c.measured else "-"

    def number(pick: Callable[[Candidate], float | None], form: str) -> Callable[[Candidate], str]:
        return lambda c: "-" if (value := pick(c)) is None else format(value, form)

    yield "file", reference.path.name, lambda c: c.path.name
    yield "size", size_text(reference.size_bytes), lambda c: f"{size_text(c.size_bytes)} ({_change(c.reduction)})"
    yield "load", f"{reference.load_ms:.0f} ms", measured(lambda m: f"{m.load_ms:.0f} ms")
    yield "latency, median", f"{reference.median_ms:.1f} ms", measured(lambda m: f"{m.median_ms:.1f} ms")
    yield "latency, p90", f"{reference.p90_ms:.1f} ms", measured(lambda m: f"{m.p90_ms:.1f} ms")
    yield "speed-up", "1", number(lambda c: c.speedup, ".2f")
    yield "peak memory", size_text(reference.peak_rss_bytes), measured(lambda m: size_text(m.peak_rss_bytes))
    yield "kernels", reference.kernels, measured(lambda m: m.kernels)
    yield "bit agreement", "1", number(lambda c: c.bit_agreement, ".4f")
    yield "cosine, worst", "1", number(lambda c: c.cosine, ".6f")
    yield "relative error, worst", "0", number(lambda c: c.relative_error, ".3g")
    yield "largest difference", "0", number(lambda c: c.max_abs_error, ".3g")


def _change(reduction: float) -> str:
    return f"{reduction:.1%} smaller" if reduction >= 0 else f"{-reduction:.1%} larger"


class _Recorder:
    """Runs one model sample after sample and keeps what it showed."""

    def __init__(self, source: ModelSource, model: Model, inputs: Inputs, samples: int) -> None:
        self._source, self._model, self._inputs, self._samples = source, model, inputs, samples
        self._latencies: list[float] = []
        self.outputs: list[list[Array]] = []
        self._model.run(self._inputs(self._model.inputs, 0))  # the first run allocates and is not timed

    def run(self, number: int) -> None:
        """Time run `number`; keep the outputs of the first round through the samples."""
        outputs, ms = self._model.run(self._inputs(self._model.inputs, number % self._samples))
        self._latencies.append(ms)
        if number < self._samples:
            self.outputs.append([outputs[spec.name] for spec in self._model.outputs])

    def measured(self) -> Measured:
        return Measured(
            path=self._source.path,
            size_bytes=self._source.path.stat().st_size,
            load_ms=self._model.load_ms,
            median_ms=statistics.median(self._latencies),
            p90_ms=float(np.percentile(self._latencies, 90)),
            runs=len(self._latencies),
            kernels=self._model.kernels,
            peak_rss_bytes=self._model.peak_rss_bytes,
            inputs=[_describe(spec) for spec in self._model.inputs],
        )


def _describe(spec: TensorSpec) -> str:
    """Return what a model takes; an image in either layout is the same."""
    layout = image_layout(spec.shape)
    return f"{spec.dtype} image of {layout[1]} pixels" if layout else f"{spec.dtype} {spec.shape}"


@dataclass(frozen=True)
class _Protocol:
    """How every model is measured."""

    inputs: Inputs
    samples: int
    runs: int
    threads: int

    @contextmanager
    def record(self, source: ModelSource) -> Iterator[_Recorder]:
        with open_model(source, threads=self.threads) as model:
            yield _Recorder(source, model, self.inputs, self.samples)


Shown = tuple[Measured, list[list[Array]]]


def _measure(sources: list[ModelSource], protocol: _Protocol, *, interleaved: bool) -> list[Shown | ChildError]:
    """Measure all models, in turns run by run or one after the other; a model that fails is its error."""
    if not interleaved:
        return [_measure_alone(source, protocol) for source in sources]
    with step(f"run {len(sources)} models in turns"), ExitStack() as stack:
        recorders: list[_Recorder | ChildError] = []
        for source in sources:
            try:
                recorders.append(stack.enter_context(protocol.record(source)))
            except ChildError as error:
                recorders.append(error)
        for number in range(protocol.runs):
            for index, recorder in enumerate(recorders):
                if isinstance(recorder, _Recorder):
                    try:
                        recorder.run(number)
                    except ChildError as error:
                        recorders[index] = error
        return [(r.measured(), r.outputs) if isinstance(r, _Recorder) else r for r in recorders]


def _measure_alone(source: ModelSource, protocol: _Protocol) -> Shown | ChildError:
    try:
        with step(f"run {source.path.name}"), protocol.record(source) as recorder:
            for number in range(protocol.runs):
                recorder.run(number)
            return recorder.measured(), recorder.outputs
    except ChildError as error:
        return error


def _against(
    reference: Shown, source: ModelSource, shown: Shown | ChildError, nbits: int | None, *, same_images: bool = False
) -> Candidate:
    """Compare one candidate with the reference, without gates; image files are the same inputs at any size."""
    size = source.path.stat().st_size
    candidate = Candidate(source.path, size, 1 - size / reference[0].size_bytes)
    if isinstance(shown, ChildError):
        return _with(candidate, error=str(shown), verdict=f"does not run: {shown}")
    measured, outputs = shown
    speedup = reference[0].median_ms / measured.median_ms
    if not same_images and measured.inputs != reference[0].inputs:
        error = f"it takes {', '.join(measured.inputs)}, its reference {', '.join(reference[0].inputs)}"
        return _with(candidate, measured=measured, error=error, verdict=f"cannot be compared: {error}")
    try:
        pairs = [(_flat(one), _flat(other)) for one, other in zip(reference[1], outputs, strict=True)]
        return _with(
            candidate,
            measured=measured,
            speedup=speedup,
            cosine=min(metrics.cosine(one, other) for one, other in pairs),
            relative_error=max(metrics.relative_error(one, other) for one, other in pairs),
            max_abs_error=max(metrics.max_abs_error(one, other) for one, other in pairs),
            bit_agreement=None if nbits is None else _bit_agreement(reference[1], outputs, nbits),
            verdict=_verdict(source, speedup),
        )
    except ValueError as error:
        return _with(candidate, measured=measured, speedup=speedup, error=str(error), verdict=f"cannot be compared: {error}")


def _with(candidate: Candidate, **changes: Any) -> Candidate:
    return Candidate(**{**candidate.__dict__, **changes})


def _flat(outputs: list[Array]) -> Array:
    """Return all outputs of one sample as one vector."""
    return np.concatenate([output.astype(np.float64).ravel() for output in outputs])


def _bit_agreement(reference: list[list[Array]], candidate: list[list[Array]], nbits: int) -> float:
    """Return the share of bits read alike over all samples; the message is the first output, (1, 1 + nbits)."""
    one, other = (np.concatenate([outputs[0] for outputs in samples]) for samples in (reference, candidate))
    if one.shape[1:] != (1 + nbits,):
        raise ValueError(f"the output {one.shape[1:]} holds no message of {nbits} bits")
    return metrics.bit_agreement(one, other)


def _verdict(source: ModelSource, speedup: float) -> str:
    """Say in words whether the candidate is faster, and if not, why."""
    if speedup >= 1 / SLOWER:
        return f"{speedup:.2f} times faster than its reference"
    relation = f"slower than its reference ({speedup:.2f} times as fast)" if speedup < SLOWER else "as fast as its reference"
    unpacked = sorted(read_dequantized_types(source.path)) if source.card is None else []
    if unpacked:
        weights = ", ".join(unpacked)
        return f"{relation}: its {weights} weights are unpacked to float32, which saves size, not time; for speed take int8"
    return f"{relation}: this CPU has no faster kernels for what it computes with; measure on the target device"


def _gates(candidate: Candidate, limits: dict[str, float | None]) -> list[Gate]:
    """Return the limits that were asked for; a value that could not be measured breaks its limit."""
    values = {
        "min_bit_agreement": candidate.bit_agreement,
        "min_cosine": candidate.cosine,
        "min_speedup": candidate.speedup,
        "max_size_mb": candidate.size_bytes / MIB,
    }
    gates = []
    for name, limit in limits.items():
        if limit is not None:
            value = values[name]
            kept = value is not None and (value <= limit if name.startswith("max") else value >= limit)
            gates.append(Gate(name, value, limit, kept))
    return gates


def _inputs_from(images: Path | None, seed: int, samples: int) -> tuple[Inputs, list[Path]]:
    """Return how to make sample i for a model's inputs, and the files it comes from."""
    if images is None:
        return lambda specs, number: sample_inputs(specs, seed + number), []
    files = image_files(images)[:samples]

    def from_images(specs: list[TensorSpec], number: int) -> dict[str, Array]:
        layout = image_layout(specs[0].shape) if len(specs) == 1 and specs[0].dtype == "float32" else None
        if layout is None:
            raise ToolError("the model does not take one square RGB float32 image", where=images, remedy="leave out --images")
        return {specs[0].name: to_layout(read_image(files[number], layout[1]), layout[0])}

    return from_images, files


def compare(
    reference: Annotated[Path, typer.Argument(help="A .tflite model, or a checkpoint with --model.")],
    candidates: Annotated[list[Path], typer.Argument(help="One or more .tflite models.")],
    *,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the comparison as JSON.")] = None,
    model: Annotated[str | None, typer.Option(help="Model card of a reference that is a checkpoint.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of images; default: seeded samples.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Inputs to compare on; default: 8, or 3 for large models.")] = None,
    runs: Annotated[int | None, typer.Option(min=1, help="Timed runs per model; default: 20, or 3 for large models.")] = None,
    threads: Threads = None,
    bits: Annotated[int | None, typer.Option(min=1, help="Message bits of detectors without our metadata.")] = None,
    seed: Seed = 0,
    min_bit_agreement: Annotated[float | None, typer.Option(min=0, max=1, help="Gate: share of bits read alike.")] = None,
    min_cosine: Annotated[float | None, typer.Option(min=0, max=1, help="Gate: cosine of the worst sample's outputs.")] = None,
    min_speedup: Annotated[float | None, typer.Option(min=0, help="Gate: reference's median latency over the candidate's.")] = None,
    max_size_mb: Annotated[float | None, typer.Option(min=0, help="Gate: size in MB of 2^20 bytes.")] = None,
    overwrite: Overwrite = False,
    refresh: Refresh = False,
) -> Comparison:
    """Compare quantized models with their reference on the same inputs: size, speed, and how far the answers moved.

    Models are run in turns while they fit in memory together, else one after the other. Each runs in a process of its own.

    Raises:
        ToolError: A file is missing or of another kind, or the reference itself does not run.
    """
    card = None if model is None else load_card(model)
    if any(limit is not None and not math.isfinite(limit) for limit in (min_speedup, max_size_mb)):
        raise ToolError("a limit is not finite", remedy="leave it out")
    sources = [ModelSource(reference, card), *(ModelSource(path) for path in candidates)]
    for source in sources:
        if source.card is None:
            check_is_tflite(source.path)
        elif not source.path.is_file():
            raise ToolError("no such checkpoint file", where=source.path)
    nbits = bits or next((found for source in sources if (found := source.nbits())), None)
    is_large = reference.stat().st_size > LARGE_BYTES
    samples = samples or (LARGE_SAMPLES if is_large else SAMPLES)
    inputs, files = _inputs_from(images, seed, samples)
    samples = len(files) or samples
    runs = max(samples, runs or (LARGE_RUNS if is_large else RUNS))
    protocol = _Protocol(inputs, samples, runs, threads or cpu_count())
    limits = {
        "min_bit_agreement": min_bit_agreement,
        "min_cosine": min_cosine,
        "min_speedup": min_speedup,
        "max_size_mb": max_size_mb,
    }

    def find() -> Findings:
        available = available_memory_bytes()
        interleaved = available is None or sum(map(memory_need_bytes, sources)) <= MEMORY_SHARE * available
        first, *others = _measure(sources, protocol, interleaved=interleaved)
        if isinstance(first, ChildError):
            raise ToolError("the reference does not run", where=reference, got=first)
        compared = [
            _against(first, source, shown, nbits, same_images=bool(files))
            for source, shown in zip(sources[1:], others, strict=True)
        ]
        compared = [_with(candidate, gates=_gates(candidate, limits)) for candidate in compared]
        return Findings(first[0], compared, samples, protocol.threads, interleaved)

    if output is None:
        findings, report = find(), None
    else:

        def make(draft: Path) -> Findings:
            found = find()
            draft.write_text(to_json(found) + "\n", encoding="utf-8")
            return found

        arguments: dict[str, object] = {"runs": runs, "samples": samples, "threads": protocol.threads, "bits": nbits, "seed": seed}
        arguments |= {"cpu": cpu_name()}  # latencies of one machine say nothing of another
        arguments |= {"limits": limits, "card": card and card.as_arguments(), "images": [file.name for file in files]}
        plan = Plan(output, "compare", arguments, [reference, *candidates, *files], PACKAGES, overwrite=overwrite, refresh=refresh)
        report, findings = artifacts.build(plan, Findings, make)
    return Comparison(findings, report, _message(findings, report))


def _message(findings: Findings, report: Product | None) -> str:
    order = "in turns" if findings.interleaved else "one model at a time"
    how = f"{findings.reference.runs} runs {order}, {findings.samples} samples, {findings.threads} threads"
    broken = [f"{c.path.name} {gate.name}" for c in findings.candidates for gate in c.gates if not gate.ok]
    broken += [f"{c.path.name} {c.error}" for c in findings.candidates if c.error is not None]
    verdict = (
        f"FAILED: {'; '.join(broken)}"
        if broken
        else "every gate kept"
        if any(c.gates for c in findings.candidates)
        else "no gates set"
    )
    head = f"up to date, see {report.path}: " if report is not None and report.up_to_date else ""
    return f"{head}{verdict} ({how})"


if __name__ == "__main__":
    run(compare)
