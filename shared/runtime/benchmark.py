"""Run several models on the same inputs, in turns, and keep times, memory and outputs. The one place where models are timed.

Every model runs the same samples, one after the other's turn, so that whatever else the machine does meets all of them alike.
Models that do not fit in memory together run one after the other.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.command.cli import step, step_progress
from shared.command.resources import MIB, available_memory_bytes
from shared.formats.tensors import TensorSpec, makes_image
from shared.media.images import image_form, image_layout
from shared.runtime.model import Model, Source, memory_need_bytes, open_model
from shared.runtime.processes import ChildError

Array = NDArray[Any]
Inputs = Callable[[list[TensorSpec]], dict[str, Array]]  # a model's input specs -> one sample by input name

SLOWER = 1.05  # times the reference's latency; a model above it is slower, and that is said with the reason
LARGE_BYTES = 512 * MIB  # models above it take seconds a run
SAMPLES, LARGE_SAMPLES = 16, 3  # real inputs that answers are compared on, at most
SEEDED_SAMPLES, LARGE_SEEDED_SAMPLES = 8, 2  # where there are no real ones
LEAST_RUNS, MOST_RUNS = 3, 200  # timed runs of each model
BUDGET_S = 2.0  # that timed runs of one model may take beyond LEAST_RUNS
MEMORY_SHARE = 0.8  # of the free memory that models loaded side by side may take


@dataclass(frozen=True)
class Measurement:
    """What running one model measured. Latencies leave out the first run.

    Args:
        path: The model.
        size_bytes: Size of all its files.
        load_ms: Time to load it.
        median_ms: Median latency.
        p90_ms: Latency that nine of ten runs keep.
        runs: Timed runs.
        kernels: Which kernels ran it.
        peak_rss_bytes: Largest resident set of its process, its mapped file included.
        inputs: What it takes, in words.
        plain_ops: Op type -> ops that ran in plain kernels although XNNPACK took others.
    """

    path: Path
    size_bytes: int
    load_ms: float
    median_ms: float
    p90_ms: float
    runs: int
    kernels: str
    peak_rss_bytes: int
    inputs: list[str]
    plain_ops: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelRun:
    """A model's measurement and outputs.

    Args:
        measurement: Times, size and memory.
        output_names: Names of the outputs.
        outputs: For each sample the outputs in that order.
        further_outputs: The same for each further sample.
        makes_images: Whether it makes an image of an image.
        input_types: Types of the inputs.
    """

    measurement: Measurement
    output_names: list[str]
    outputs: list[list[Array]]
    further_outputs: list[list[Array]]
    makes_images: bool = False
    input_types: tuple[str, ...] = ()


@dataclass(frozen=True)
class Protocol:
    """How every model is run.

    Args:
        samples: Inputs of the timed runs, in turn; each is run once at least.
        threads: Threads of the runtime.
        runs: Timed runs of each model; as many as fit in BUDGET_S where it is None.
        further: Inputs that are run once each, untimed, by all models at the same time.
    """

    samples: Sequence[Inputs]
    threads: int
    runs: int | None = None
    further: Sequence[Inputs] = ()

    def __post_init__(self) -> None:
        assert self.samples


@dataclass(frozen=True)
class Benchmark:
    """What several models did; one that fails is its error."""

    runs: list[ModelRun | ChildError]
    interleaved: bool


def sample_count(size_bytes: int, *, is_seeded: bool) -> int:
    """Return how many samples a model of that size is compared on, at most."""
    if is_seeded:
        return LARGE_SEEDED_SAMPLES if size_bytes > LARGE_BYTES else SEEDED_SAMPLES
    return LARGE_SAMPLES if size_bytes > LARGE_BYTES else SAMPLES


def run_benchmark(sources: Sequence[Source], protocol: Protocol) -> Benchmark:
    """Run all models: in turns, or one after the other where they do not fit in memory together."""
    available = available_memory_bytes()
    together = available is None or sum(map(memory_need_bytes, sources)) <= MEMORY_SHARE * available
    if together:
        name = f"run {len(sources)} models in turns" if len(sources) > 1 else f"run {sources[0].path.name}"
        return Benchmark(_in_turns(sources, protocol, name), interleaved=True)
    runs = [run for source in sources for run in _in_turns([source], protocol, f"run {source.path.name}")]
    return Benchmark(runs, interleaved=False)


@dataclass
class _Trial:
    """One loaded model on its way through the protocol."""

    source: Source
    model: Model
    latencies: list[float] = field(default_factory=list)
    outputs: list[list[Array]] = field(default_factory=list)
    further_outputs: list[list[Array]] = field(default_factory=list)

    def run(self, inputs: dict[str, Array]) -> tuple[list[Array], float]:
        outputs, ms = self.model.run(inputs)
        return [outputs[spec.name] for spec in self.model.outputs], ms

    def time(self, inputs: Inputs, *, is_new: bool) -> None:
        outputs, ms = self.run(inputs(self.model.inputs))
        self.latencies.append(ms)
        if is_new:
            self.outputs.append(outputs)

    def run_further(self, made: Mapping[tuple[TensorSpec, ...], dict[str, Array]]) -> None:
        self.further_outputs.append(self.run(made[tuple(self.model.inputs)])[0])

    def finish(self) -> ModelRun:
        model = self.model
        measurement = Measurement(
            path=self.source.path,
            size_bytes=self.source.size_bytes,
            load_ms=model.load_ms,
            median_ms=statistics.median(self.latencies),
            p90_ms=float(np.percentile(self.latencies, 90)),
            runs=len(self.latencies),
            kernels=model.kernels,
            peak_rss_bytes=model.peak_rss_bytes,
            inputs=[_describe(spec) for spec in model.inputs],
            plain_ops=model.plain_ops(),
        )
        makes_images = makes_image(model.inputs, model.outputs[0])
        names, types = [spec.name for spec in model.outputs], tuple(spec.dtype for spec in model.inputs)
        return ModelRun(measurement, names, self.outputs, self.further_outputs, makes_images, types)


def _describe(spec: TensorSpec) -> str:
    """Return what a model takes; an image in either layout is the same."""
    if layout := image_layout(spec.shape):
        return f"{spec.dtype} image of {layout[1]} pixels"
    if (form := image_form(spec.shape)) is None:
        return f"{spec.dtype} {spec.shape}"
    kind = "luma image" if form.channels == 1 else "image"
    return f"{spec.dtype} {kind} of {form.width or 'any'}x{form.height or 'any'} pixels"


def _in_turns(sources: Sequence[Source], protocol: Protocol, name: str) -> list[ModelRun | ChildError]:
    with ExitStack() as stack:
        trials = _Trials(stack.enter_context(ThreadPoolExecutor(len(sources))))
        with step(name):
            for source in sources:
                trials.add(stack, source, protocol)
            start, number = time.monotonic(), 0
            while number < _wanted_runs(protocol, number, time.monotonic() - start, len(sources)):
                inputs = protocol.samples[number % len(protocol.samples)]
                trials.each(partial(_Trial.time, inputs=inputs, is_new=number < len(protocol.samples)))
                number += 1
        if protocol.further:
            with step_progress(f"{name}: further samples", len(protocol.further)) as advance:
                for inputs in protocol.further:
                    trials.run_further(inputs)
                    advance("")
        trials.each(_Trial.finish)
        return trials.results()


def _wanted_runs(protocol: Protocol, done: int, seconds: float, models: int) -> int:
    """Return how many runs of each model there should be, as far as that is known after some."""
    least = len(protocol.samples)
    if protocol.runs is not None:
        return max(least, protocol.runs)
    is_over = done >= LEAST_RUNS and seconds >= BUDGET_S * models
    return max(least, done if is_over else MOST_RUNS)


class _Trials:
    """Models side by side; one that fails drops out with its error."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self._all: list[_Trial | ModelRun | ChildError] = []
        self._threads = threads

    def add(self, stack: ExitStack, source: Source, protocol: Protocol) -> None:
        try:
            self._all.append(stack.enter_context(_open(source, protocol)))
        except ChildError as error:
            self._all.append(error)

    def each(self, work: Callable[[_Trial], ModelRun | None]) -> None:
        self._all = [_after(work, trial) for trial in self._all]

    def run_further(self, inputs: Inputs) -> None:
        """Run all models at the same time, as nothing is timed here, on one copy of the inputs for each kind of input."""
        made: dict[tuple[TensorSpec, ...], dict[str, Array]] = {}
        for trial in self._all:
            if isinstance(trial, _Trial) and (specs := tuple(trial.model.inputs)) not in made:
                made[specs] = inputs(list(specs))
        self._all = list(self._threads.map(partial(_after, partial(_Trial.run_further, made=made)), self._all))

    def results(self) -> list[ModelRun | ChildError]:
        return [trial for trial in self._all if not isinstance(trial, _Trial)]


def _after(work: Callable[[_Trial], ModelRun | None], trial: _Trial | ModelRun | ChildError) -> _Trial | ModelRun | ChildError:
    """Return what a trial is after a piece of work: its result, itself, or its error."""
    if not isinstance(trial, _Trial):
        return trial
    try:
        return work(trial) or trial
    except ChildError as error:
        return error


@contextmanager
def _open(source: Source, protocol: Protocol) -> Iterator[_Trial]:
    with open_model(source, threads=protocol.threads) as model:
        trial = _Trial(source, model)
        trial.run(protocol.samples[0](model.inputs))  # the first run allocates and is not timed
        yield trial
