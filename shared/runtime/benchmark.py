"""Run several models on the same inputs, in turns, and keep what they showed: times, memory, outputs."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.command.cli import step, step_progress
from shared.formats.tensors import TensorSpec, image_input
from shared.media.images import image_form, image_layout
from shared.runtime.model import Model, ModelSource, open_model
from shared.runtime.processes import ChildError

Array = NDArray[Any]
Inputs = Callable[[list[TensorSpec]], dict[str, Array]]  # a model's input specs -> one sample by input name


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
class Shown:
    """A model's measurements and outputs.

    Args:
        measured: Times, size and memory.
        outputs: For each sample of the protocol, the model's outputs in its own order.
        answers: The same for each further sample.
        makes_images: Whether it makes an image of an image.
    """

    measured: Measured
    outputs: list[list[Array]]
    answers: list[list[Array]]
    makes_images: bool = False


@dataclass(frozen=True)
class Protocol:
    """How every model is run.

    Args:
        samples: Inputs for timed runs, in turn until there are `runs` of them.
        runs: Timed runs; at least one for each sample.
        threads: Threads of the runtime.
        further: Inputs that are run once each, untimed.
    """

    samples: Sequence[Inputs]
    runs: int
    threads: int
    further: Sequence[Inputs] = ()

    def __post_init__(self) -> None:
        assert self.runs >= len(self.samples) > 0


def run_trials(sources: list[ModelSource], protocol: Protocol, *, interleaved: bool) -> list[Shown | ChildError]:
    """Run all models, in turns or one after the other; a model that fails is its error."""
    if not interleaved:
        return [shown for source in sources for shown in _in_turns([source], protocol, f"run {source.path.name}")]
    return _in_turns(sources, protocol, f"run {len(sources)} models in turns")


@dataclass
class _Trial:
    """One loaded model on its way through the protocol."""

    source: ModelSource
    model: Model
    latencies: list[float] = field(default_factory=list)
    outputs: list[list[Array]] = field(default_factory=list)
    answers: list[list[Array]] = field(default_factory=list)

    def run(self, inputs: Inputs) -> tuple[list[Array], float]:
        outputs, ms = self.model.run(inputs(self.model.inputs))
        return [outputs[spec.name] for spec in self.model.outputs], ms

    def time(self, inputs: Inputs, *, is_new: bool) -> None:
        outputs, ms = self.run(inputs)
        self.latencies.append(ms)
        if is_new:
            self.outputs.append(outputs)

    def answer(self, inputs: Inputs) -> None:
        self.answers.append(self.run(inputs)[0])

    def shown(self) -> Shown:
        measured = Measured(
            path=self.source.path,
            size_bytes=self.source.size_bytes,
            load_ms=self.model.load_ms,
            median_ms=statistics.median(self.latencies),
            p90_ms=float(np.percentile(self.latencies, 90)),
            runs=len(self.latencies),
            kernels=self.model.kernels,
            peak_rss_bytes=self.model.peak_rss_bytes,
            inputs=[_describe(spec) for spec in self.model.inputs],
        )
        makes_images = image_input(self.model.inputs) is not None and image_form(self.model.outputs[0].shape) is not None
        return Shown(measured, self.outputs, self.answers, makes_images)


def _describe(spec: TensorSpec) -> str:
    """Return what a model takes; an image in either layout is the same."""
    if layout := image_layout(spec.shape):
        return f"{spec.dtype} image of {layout[1]} pixels"
    if (form := image_form(spec.shape)) is None:
        return f"{spec.dtype} {spec.shape}"
    kind = "luma image" if form.channels == 1 else "image"
    return f"{spec.dtype} {kind} of {form.width or 'any'}x{form.height or 'any'} pixels"


def _in_turns(sources: list[ModelSource], protocol: Protocol, name: str) -> list[Shown | ChildError]:
    with ExitStack() as stack:
        trials = _Trials()
        with step(name):
            for source in sources:
                trials.add(stack, source, protocol)
            for number in range(protocol.runs):
                inputs = protocol.samples[number % len(protocol.samples)]
                trials.each(partial(_Trial.time, inputs=inputs, is_new=number < len(protocol.samples)))
        if protocol.further:
            with step_progress(f"{name}: further samples", len(protocol.further)) as advance:
                for inputs in protocol.further:
                    trials.each(partial(_Trial.answer, inputs=inputs))
                    advance("")
        return trials.results()


class _Trials:
    """Models side by side; one that fails drops out with its error."""

    def __init__(self) -> None:
        self._all: list[_Trial | ChildError] = []

    def add(self, stack: ExitStack, source: ModelSource, protocol: Protocol) -> None:
        try:
            self._all.append(stack.enter_context(_open(source, protocol)))
        except ChildError as error:
            self._all.append(error)

    def each(self, work: Callable[[_Trial], None]) -> None:
        for index, trial in enumerate(self._all):
            if isinstance(trial, _Trial):
                try:
                    work(trial)
                except ChildError as error:
                    self._all[index] = error

    def results(self) -> list[Shown | ChildError]:
        return [trial.shown() if isinstance(trial, _Trial) else trial for trial in self._all]


@contextmanager
def _open(source: ModelSource, protocol: Protocol) -> Iterator[_Trial]:
    with open_model(source, threads=protocol.threads) as model:
        trial = _Trial(source, model)
        trial.run(protocol.samples[0])  # the first run allocates and is not timed
        yield trial
