"""The samples of one quantization: real inputs to calibrate with, and real or seeded inputs to measure answers on."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shared.calibration.arrays import Sample
from shared.calibration.dataset import RANGES, CalibrationSet, choose_range, name_of_range
from shared.command.cli import step
from shared.command.errors import ToolError
from shared.command.options import InputRange
from shared.formats.input_hints import InputHints
from shared.formats.model_file import ModelFile
from shared.formats.tensors import TensorSpec, but_message, by_signature, image_input, makes_image
from shared.runtime.benchmark import Inputs, sample_count
from shared.runtime.processes import ChildError
from shared.runtime.samples import Guess, complete_inputs, guess_inputs, sample_inputs


@dataclass(frozen=True)
class HeldSamples:
    """What answers are measured on; small enough to be sent to other processes.

    Args:
        dataset: Real inputs; None for seeded ones.
        count: How many there are at most.
        guess: What made-up inputs look like.
    """

    dataset: CalibrationSet | None
    count: int
    guess: Guess = Guess()  # noqa: RUF009 - frozen

    def load(self, inputs: Sequence[TensorSpec]) -> list[Sample]:
        """Return the samples, each input in its spec's shape and dtype; inputs of signatures without real ones are made up."""
        if self.dataset is None:
            return [sample_inputs(list(inputs), seed, self.guess) for seed in range(self.count)]
        real = enumerate(self.dataset.samples(list(inputs)))
        return [complete_inputs(sample, list(inputs), seed, self.guess) for seed, sample in real]

    def sha256(self) -> str:
        """Return a hash of everything that decides the samples."""
        return f"{self.count} made up, {self.guess}" if self.dataset is None else self.dataset.sha256()


@dataclass(frozen=True)
class Samples:
    """The samples of one quantization, their range settled.

    Args:
        calibration: What to calibrate with; None without real inputs.
        count: How many samples that is.
        held: What to measure answers on.
        note: The same in words.
        peaks: For each output of the model the width of the range of the images it makes, 0 where nobody said it, else None.
    """

    calibration: CalibrationSet | None
    count: int
    held: HeldSamples
    note: str
    peaks: list[float | None]


@dataclass(frozen=True)
class KnownRange:
    """What is known of the range of a model's image input.

    Args:
        given: As the user says.
        declared: As the model's metadata says.
        hints: What the model's first ops tell.
        assumed: Range to take where nobody says any; None where that is an error.
    """

    given: InputRange | None = None
    declared: tuple[float, float] | None = None
    hints: InputHints = field(default_factory=InputHints)
    assumed: InputRange | None = None

    def choose(self, inputs: Sequence[TensorSpec], real: CalibrationSet | None, where: Path) -> "ChosenRange":
        """Return the range to take.

        Args:
            inputs: The model's inputs.
            real: Real inputs, if there are any.
            where: The model, for messages.
        """
        images = [but_message(group)[0] for group in by_signature(inputs) if image_input(group) is not None]
        declared = RANGES["0..255"] if images and images[0].dtype == "uint8" else self.declared
        known = choose_range(self.given, declared, real.path if real else where)
        assumes = self.assumed is not None and known is None and bool(images) and real is not None and real.path.suffix != ".npz"
        guess = Guess.of_hints(self.hints, RANGES[known] if known else declared)
        chosen = name_of_range(guess.pixel_range) or self.assumed if assumes else known
        width = float(np.ptp(guess.pixel_range)) if known or declared else 0.0
        return ChosenRange(chosen, assumes, replace(guess, pixel_range=RANGES[chosen]) if chosen else guess, width)


class ChosenRange(NamedTuple):
    """The range of an image input: its name, whether nobody said it, made-up inputs in it, and its width where it was said."""

    name: InputRange | None
    is_assumed: bool
    guess: Guess
    width: float


def settle_samples(
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    *,
    size_bytes: int,
    where: Path,
    calibration: CalibrationSet | None,
    holdout: CalibrationSet | None,
    known: KnownRange,
) -> Samples:
    """Check what is calibrated with, and settle what is measured on.

    Args:
        inputs: The model's inputs.
        outputs: Its outputs.
        size_bytes: Its size: large models are measured on fewer samples.
        where: The model, for messages.
        calibration: Real inputs to calibrate with, their range still open.
        holdout: Real inputs to measure on; None: what the calibration set itself holds out, else its own samples.
        known: What is known of the range of its image input.

    Raises:
        ToolError: Samples don't fit the model, or their range is not known.
    """
    chosen, is_assumed, guess, width = known.choose(inputs, calibration or holdout, where)
    settled, count = None, 0
    if calibration is not None:
        settled = replace(calibration, input_range=chosen)
        with step("check the samples"):
            count = settled.check(list(inputs), RANGES[chosen] if chosen else known.declared)
    most = sample_count(size_bytes, is_seeded=False)
    dataset = _held_set(holdout, settled, chosen, most)
    if dataset is None:
        seeded = sample_count(size_bytes, is_seeded=True)
        held, note = HeldSamples(None, seeded, guess), f"{seeded} seeded samples"
    else:
        samples = list(dataset.samples(list(inputs)))
        if not samples:
            raise ToolError("there are no samples to measure on", where=dataset.path)
        held = HeldSamples(dataset, len(samples), guess)
        is_apart = dataset.part == "holdout" or calibration is None or dataset.path != calibration.path
        note = _describe(samples, inputs, is_apart=is_apart)
    if is_assumed:
        note += f"; pixels taken as {chosen}, say --input-range if the model wants another range"
    peaks = [width if makes_image(list(inputs), spec) else None for spec in outputs]
    return Samples(settled, count, held, note, peaks)


def _describe(samples: Sequence[Sample], inputs: Sequence[TensorSpec], *, is_apart: bool) -> str:
    """Say what samples answers are measured on, and which signatures they have no inputs for."""
    note = f"{len(samples)} samples that were {'not calibrated with' if is_apart else 'calibrated with, too'}"
    lacking = sorted({spec.signature for spec in inputs if spec.name not in samples[0]})
    return f"{note}; {', '.join(lacking)} on made-up inputs, for which the samples have nothing" if lacking else note


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


def guess_held(held: HeldSamples, model: ModelFile, inputs: Sequence[TensorSpec], where: str, threads: int) -> HeldSamples:
    """Return samples that a model runs with, those of its inputs that are made up as it takes them.

    Raises:
        ToolError: It runs with none.
    """
    try:
        return replace(held, guess=guess_inputs(model, inputs, threads, held.guess))
    except ChildError as error:
        remedy = "give real inputs with --calibration FILE.npz, one array for each input"
        raise ToolError("the model does not run", where=where, got=error, remedy=remedy) from None
