"""What quantized ONNX models are measured on, and how: answers against the float32 model's, and all of them timed in turns."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from shared.calibration.dataset import RANGES, CalibrationSet, InputRange, Sample, choose_range
from shared.command.cli import step
from shared.command.errors import ToolError
from shared.command.resources import MIB, available_memory_bytes, cpu_count
from shared.formats.model_file import size_bytes
from shared.formats.onnx_graph import declared_range
from shared.formats.tensors import TensorSpec, image_input
from shared.media.images import image_form
from shared.metrics.fidelity import Fidelity, measure_fidelity
from shared.runtime.benchmark import Inputs, Protocol, Shown, run_trials
from shared.runtime.model import ModelSource, memory_need_bytes, open_model
from shared.runtime.processes import ChildError
from shared.runtime.samples import sample_inputs
from tools.quantize_onnx.request import OnnxWish
from tools.quantize_onnx.result import FLOAT, Timed

COMPARED, LARGE_COMPARED = 16, 2  # samples that answers are compared on, unless there are fewer
SEEDED, LARGE_SEEDED = 4, 1  # samples where there is no calibration set
SLACK = 0.05  # that values may lie outside a range: interpolation overshoots
SMALL_BYTES, LARGE_BYTES = 16 * MIB, 512 * MIB
SMALL_RUNS, RUNS, LARGE_RUNS = 20, 10, 2


@dataclass(frozen=True)
class Samples:
    """The samples of one model, their range settled.

    Args:
        inputs: The model's inputs.
        calibration: What to calibrate with.
        count: How many samples that is.
        held: What to measure on.
        told: The same in words.
        image_peak: Width of the range of the images the model makes; None where it makes none.
    """

    inputs: list[TensorSpec]
    calibration: CalibrationSet | None
    count: int
    held: list[Sample]
    told: str
    image_peak: float | None


def settle_samples(source: Path, model: Path, wish: OnnxWish, threads: int) -> Samples:
    """Load what is measured on, and check what is calibrated with.

    Args:
        source: The model as it came, for its metadata and for messages.
        model: The repaired model.
        wish: What is wanted.
        threads: Threads of the runtime.

    Raises:
        ToolError: The model does not load, or samples don't fit it.
    """
    try:
        with open_model(ModelSource(model), threads=threads) as opened:
            inputs, outputs = opened.inputs, opened.outputs
    except ChildError as error:
        remedy = "export it again, for a runtime of today"
        raise ToolError("the model does not load", where=source, got=error, remedy=remedy) from None
    takes_image = image_input(inputs) is not None
    makes_image = takes_image and bool(outputs) and image_form(outputs[0].shape) is not None
    if wish.min_psnr is not None and not makes_image:
        raise ToolError("--min-psnr is for models that make images", where=source, remedy="use --min-cosine")
    given = wish.samples
    real = given or wish.holdout
    known = choose_range(wish.input_range, declared_range(source), real.path if real else source)
    assumes = known is None and takes_image and real is not None and real.path.suffix != ".npz"
    chosen: InputRange | None = "0..1" if assumes else known
    low, high = RANGES[chosen or "0..1"]
    calibration = None if given is None else replace(given, input_range=chosen)
    count = 0
    if calibration is not None:
        with step("check the samples"):
            count = calibration.check(inputs, RANGES[chosen] if chosen else None)
    is_large = size_bytes(model) > LARGE_BYTES
    held = _held_set(wish.holdout, calibration, chosen, LARGE_COMPARED if is_large else COMPARED)
    if held is None:
        samples = [sample_inputs(inputs, seed, (low, high)) for seed in range(LARGE_SEEDED if is_large else SEEDED)]
        told = f"{len(samples)} seeded samples"
    else:
        samples = list(held.samples(inputs))
        is_apart = held.part == "holdout" or given is None or held.path != given.path
        told = f"{len(samples)} samples that were {'not calibrated with' if is_apart else 'calibrated with, too'}"
    if makes_image and chosen is None and real is not None:
        low, high = _seen_range(samples)
        told += f"; PSNR of values from {low:g} to {high:g}, as the samples have them, say --input-range if that is wrong"
    if assumes:
        told += f"; pixels taken as {chosen}, say --input-range if the model wants another range"
    return Samples(inputs, calibration, count, samples, told, high - low if makes_image else None)


def _seen_range(samples: Sequence[Sample]) -> tuple[float, float]:
    """Return the narrowest usual range that all values of arrays lie in, nearly; arrays do not tell theirs."""
    lowest = min(float(values.min()) for sample in samples for values in sample.values())
    highest = max(float(values.max()) for sample in samples for values in sample.values())
    fitting = (limits for limits in RANGES.values() if limits[0] - SLACK <= lowest and highest <= limits[1] + SLACK)
    return next(fitting, RANGES["0..255"])


def _held_set(
    holdout: CalibrationSet | None, calibration: CalibrationSet | None, chosen: InputRange | None, most: int
) -> CalibrationSet | None:
    """Return what to measure on: what the user gave for it, what the set holds out, or else the set itself."""
    if holdout is not None:
        return replace(holdout, input_range=chosen, most=most)
    if calibration is None:
        return None
    return replace(calibration, most=most, part="holdout" if calibration.has_holdout() else calibration.part)


class Evaluation:
    """Runs models on held samples; the float32 model's answers are the reference.

    Args:
        source: The model as it came, for messages.
        model: The repaired float32 model.
        samples: What to run on.
        threads: Threads of the runtime; all CPUs when None.
    """

    def __init__(self, source: Path, model: Path, samples: Samples, threads: int | None) -> None:
        self._source, self._model, self._samples = source, model, samples
        self.threads = threads or cpu_count()
        self.peak_rss_bytes = 0
        self._reference: list[list[Any]] = []

    def answers(self, path: Path) -> Fidelity | None:
        """Return how near a model's answers are to the float32 model's; None where it does not run."""
        if not self._reference:
            (shown,) = self._run([self._model], self._protocol(0), interleaved=True)
            self._refer_to(shown)
        (shown,) = self._run([path], self._protocol(0), interleaved=True)
        return None if isinstance(shown, ChildError) else self._fidelity(shown)

    def time(self, models: Sequence[tuple[str, Path]]) -> tuple[list[Timed], int]:
        """Run labelled models, the float32 one among them, in turns; return what each showed, and the number of runs."""
        size = size_bytes(self._model)
        runs = LARGE_RUNS if size > LARGE_BYTES else SMALL_RUNS if size < SMALL_BYTES else RUNS
        protocol = self._protocol(runs)
        paths = [path for _, path in models]
        available = available_memory_bytes()
        together = available is None or sum(memory_need_bytes(ModelSource(path)) for path in paths) <= available
        shown = self._run(paths, protocol, interleaved=together)
        self._refer_to(shown[[label for label, _ in models].index(FLOAT)])
        return [self._timed(label, path, one) for (label, path), one in zip(models, shown, strict=True)], protocol.runs

    def _protocol(self, runs: int) -> Protocol:
        samples: Sequence[Inputs] = [partial(_given, sample) for sample in self._samples.held]
        return Protocol(samples, max(runs, len(samples)), self.threads)

    def _run(self, paths: Sequence[Path], protocol: Protocol, *, interleaved: bool) -> list[Shown | ChildError]:
        shown = run_trials([ModelSource(path) for path in paths], protocol, interleaved=interleaved)
        peaks = [one.measured.peak_rss_bytes for one in shown if isinstance(one, Shown)]
        self.peak_rss_bytes = max([self.peak_rss_bytes, *peaks])
        return shown

    def _refer_to(self, shown: Shown | ChildError) -> None:
        if isinstance(shown, ChildError):
            raise ToolError("the model does not run", where=self._source, got=shown, remedy="see what verify says of it")
        self._reference = shown.outputs

    def _fidelity(self, shown: Shown) -> Fidelity | None:
        try:
            return measure_fidelity(self._reference, shown.outputs, self._samples.image_peak)
        except ValueError:
            return None

    def _timed(self, label: str, path: Path, shown: Shown | ChildError) -> Timed:
        size = size_bytes(path)
        if isinstance(shown, ChildError):
            return Timed(label, size, error=f"does not run: {shown}")
        fidelity = None if label == FLOAT else self._fidelity(shown)
        error = "its answers are of another shape, or not finite" if fidelity is None and label != FLOAT else None
        return Timed(label, size, shown.measured.median_ms, fidelity, error=error)


def _given(sample: Sample, _: list[TensorSpec]) -> Sample:
    return sample
