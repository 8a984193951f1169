"""The samples of one quantization: real inputs to calibrate with, and real or seeded inputs to measure answers on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shared.calibration.arrays import Sample
from shared.calibration.dataset import RANGES, CalibrationSet, choose_range
from shared.command.cli import step
from shared.command.errors import ToolError
from shared.command.options import InputRange
from shared.formats.model_file import ModelFile
from shared.formats.tensors import TensorSpec, image_input, makes_image
from shared.runtime.benchmark import Inputs, sample_count
from shared.runtime.processes import ChildError
from shared.runtime.samples import Guess, guess_inputs, sample_inputs

SLACK = 0.05  # that values may lie outside a range: interpolation overshoots


@dataclass(frozen=True)
class HeldSamples:
    """What answers are measured on; small enough to be sent to other processes.

    Args:
        dataset: Real inputs; None for seeded ones.
        count: How many there are at most.
        pixel_range: Range of made-up pictures.
        guess: What made-up inputs look like.
    """

    dataset: CalibrationSet | None
    count: int
    pixel_range: tuple[float, float] = (0.0, 1.0)
    guess: Guess = Guess()  # noqa: RUF009 - frozen

    def load(self, inputs: Sequence[TensorSpec]) -> list[Sample]:
        """Return the samples, each input in its spec's shape and dtype."""
        if self.dataset is None:
            return [sample_inputs(list(inputs), seed, self.pixel_range, self.guess) for seed in range(self.count)]
        return list(self.dataset.samples(list(inputs)))

    def sha256(self) -> str:
        """Return a hash of everything that decides the samples."""
        return f"{self.count} made up in {self.pixel_range}, {self.guess}" if self.dataset is None else self.dataset.sha256()


@dataclass(frozen=True)
class Samples:
    """The samples of one quantization, their range settled.

    Args:
        calibration: What to calibrate with; None without real inputs.
        count: How many samples that is.
        held: What to measure answers on.
        note: The same in words.
        peaks: For each output of the model the width of the range of the images it makes, else None.
    """

    calibration: CalibrationSet | None
    count: int
    held: HeldSamples
    note: str
    peaks: list[float | None]


def settle_samples(
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    *,
    size_bytes: int,
    where: Path,
    calibration: CalibrationSet | None,
    holdout: CalibrationSet | None,
    input_range: InputRange | None,
    declared: tuple[float, float] | None,
    assumed: InputRange | None,
) -> Samples:
    """Check what is calibrated with, and settle what is measured on.

    Args:
        inputs: The model's inputs.
        outputs: Its outputs.
        size_bytes: Its size: large models are measured on fewer samples.
        where: The model, for messages.
        calibration: Real inputs to calibrate with, their range still open.
        holdout: Real inputs to measure on; None: what the calibration set itself holds out, else its own samples.
        input_range: Range of the image input, as the user says.
        declared: The same, as the model's metadata says.
        assumed: Range to take where neither does, with a note; None raises.

    Raises:
        ToolError: Samples don't fit the model, or their range is not known.
    """
    takes_image = image_input(list(inputs)) is not None
    are_images = [makes_image(list(inputs), spec) for spec in outputs]
    real = calibration or holdout
    if takes_image and inputs[0].dtype == "uint8":
        declared = RANGES["0..255"]
    known = choose_range(input_range, declared, real.path if real else where)
    assumes = assumed is not None and known is None and takes_image and real is not None and real.path.suffix != ".npz"
    chosen = assumed if assumes else known
    low, high = RANGES[chosen] if chosen else declared or (0.0, 1.0)
    settled, count = None, 0
    if calibration is not None:
        settled = replace(calibration, input_range=chosen)
        with step("check the samples"):
            count = settled.check(list(inputs), RANGES[chosen] if chosen else declared)
    most = sample_count(size_bytes, is_seeded=False)
    dataset = _held_set(holdout, settled, chosen, most)
    if dataset is None:
        seeded = sample_count(size_bytes, is_seeded=True)
        held, note = HeldSamples(None, seeded, (low, high)), f"{seeded} seeded samples"
    else:
        samples = list(dataset.samples(list(inputs)))
        held = HeldSamples(dataset, len(samples), (low, high))
        is_apart = dataset.part == "holdout" or calibration is None or dataset.path != calibration.path
        note = f"{len(samples)} samples that were {'not calibrated with' if is_apart else 'calibrated with, too'}"
        if are_images[:1] == [True] and chosen is None:
            low, high = _seen_range(samples)
            note += f"; PSNR of values from {low:g} to {high:g}, as the samples have them, say --input-range if that is wrong"
    if assumes:
        note += f"; pixels taken as {chosen}, say --input-range if the model wants another range"
    peaks = [high - low if is_image else None for is_image in are_images]
    return Samples(settled, count, held, note, peaks)


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
        part = "holdout" if holdout.has_holdout() else holdout.part
        return replace(holdout, input_range=chosen, most=most, part=part)
    if calibration is None:
        return None
    if calibration.has_holdout():
        return replace(calibration, most=most, part="holdout")
    return replace(calibration, most=min(calibration.most or most, most))


def sample_for(sample: Sample, of: Sequence[TensorSpec]) -> Inputs:
    """Return a sample of one model as input of any other made from it: names may differ, types too; then it is a seeded one."""

    def inputs(specs: list[TensorSpec]) -> Sample:
        if [spec.dtype for spec in specs] != [spec.dtype for spec in of]:
            return sample_inputs(specs, 0)
        return {to.name: sample[known.name] for known, to in zip(of, specs, strict=True)}

    return inputs


def guess_held(held: HeldSamples, model: ModelFile, where: str, threads: int) -> HeldSamples:
    """Return made-up samples that a model runs with.

    Raises:
        ToolError: It runs with none.
    """
    try:
        return replace(held, guess=guess_inputs(model, threads, held.pixel_range))
    except ChildError as error:
        remedy = "give real inputs with --calibration FILE.npz, one array for each input"
        raise ToolError("the model does not run", where=where, got=error, remedy=remedy) from None
