"""What is compared, on which samples, and how: from models and files to findings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.calibration.arrays import npz_length
from shared.calibration.dataset import MANIFEST_NAME, CalibrationSet, holdout_of
from shared.command.errors import DamagedError, ToolError
from shared.command.resources import cpu_name
from shared.formats.model_file import ModelFile
from shared.formats.tensors import TensorSpec
from shared.formats.tflite import TfliteContent
from shared.media.attacks import Attack
from shared.media.images import read_pixels
from shared.metrics import metrics
from shared.metrics.output_error import OutputError, measure_errors, usual_range
from shared.runtime.benchmark import Inputs, ModelRun, Protocol, run_benchmark
from shared.runtime.model import Source, open_model
from shared.runtime.processes import ChildError
from shared.runtime.samples import Guess, complete_inputs, guess_inputs, image_sample, sample_inputs
from shared.runtime.speed import describe_speed, speedup
from shared.watermark.message import Labelled
from tools.compare.accuracy import Accuracy, labelled_inputs, read_accuracy
from tools.compare.comparison import Candidate, Findings, recommend
from tools.compare.gates import check_gates
from tools.compare.image_quality import (
    ImageFindings,
    ImageTask,
    TruthScores,
    as_image,
    bicubic_scores,
    images_at,
    score,
    score_against_truth,
)
from tools.compare.matrix import MarkedPhotos

Array = NDArray[Any]


@dataclass(frozen=True)
class CompareTask:
    """What is compared, on which samples.

    Args:
        sources: The reference, then all candidates.
        alternatives: How many of the candidates, the last ones, may break gates.
        nbits: Message length of detectors; None for other models.
        samples: Inputs of the timed runs.
        runs: Timed runs per model; None for as many as fit in the benchmark's time.
        threads: Threads of the runtime.
        files: The images the samples come from; empty for seeded samples.
        truths: What each of them should become; empty where that is not known.
        labelled: The images whose messages are known.
        attacks: None, then what these meet too.
        pixel_range: What 0 and 255 become in the models' inputs.
        marked: The photos that embedders marked, where these are compared, too.
        is_range_known: Whether somebody said so; then it holds for the images they make, too.
    """

    sources: list[Source]
    alternatives: int
    nbits: int | None
    samples: list[Inputs]
    runs: int | None
    threads: int
    files: list[Path]
    truths: list[Path]
    labelled: list[Labelled]
    attacks: list[Attack | None]
    pixel_range: tuple[float, float] = (0.0, 1.0)
    is_range_known: bool = True
    marked: MarkedPhotos | None = None

    def pictures(self) -> list[Path]:
        """Return every image that is read or shown, once."""
        originals = [image.original for image in self.labelled if image.original is not None]
        known = [] if self.marked else [*self.files, *(image.file for image in self.labelled)]  # else made here
        return list(dict.fromkeys([*known, *self.truths, *originals]))

    def find(self, gates: Mapping[str, float]) -> Findings:
        """Run all models and compare them."""
        labelled = self.marked.labelled if self.marked else self.labelled
        further = labelled_inputs(labelled, self.attacks, len(self.labelled)) if labelled else []
        done = run_benchmark(self.sources, Protocol(self.samples, self.threads, self.runs, further))
        first, *others = done.runs
        reference = self.sources[0].path
        if isinstance(first, ChildError):
            raise ToolError("the reference does not run", where=reference, got=first, remedy="see what verify says of it")
        if self.nbits is not None and (shape := first.outputs[0][0].shape) != (1, 1 + self.nbits):
            raise ToolError(f"the reference's output holds no message of {self.nbits} bits", where=reference, got=shape)
        try:
            accuracy, images = self._accuracy(first), self._image_task(first)
        except ValueError as error:
            raise ToolError("the reference's answers can't be read", where=reference, got=error) from None
        found = (self._against(first, number, run) for number, run in enumerate(others, start=1))
        compared = [replace(one, gates=check_gates(gates, one, accuracy, images)) for one in found]
        if self.truths and images is None:
            raise ToolError("--ground-truth is for models that make images", where=reference, remedy="leave it out")
        how = (len(self.samples), self.threads, done.interleaved, cpu_name())
        findings = Findings(first.measurement, accuracy, compared, *how, images=images)
        if self.marked is not None:
            answers = [None if isinstance(run, ChildError) else self._accuracies(run) for run in done.runs]
            matrix = self.marked.matrix([source.path for source in self.sources], answers)
            findings = replace(findings, matrix=matrix.checked(gates, self.alternatives))
        return recommend(findings)

    def _against(self, reference: ModelRun, number: int, run: ModelRun | ChildError) -> Candidate:
        """Compare the candidate of that number, counted from 1, with the reference, without gates."""
        source = self.sources[number]
        size = source.size_bytes
        is_alternative = number > len(self.sources) - 1 - self.alternatives
        candidate = Candidate(source.path, size, 1 - size / reference.measurement.size_bytes, is_alternative)
        if isinstance(run, ChildError):
            return replace(candidate, problem=str(run), verdict=f"does not run: {run}")
        measurement, takes = run.measurement, reference.measurement.inputs
        candidate = replace(candidate, measurement=measurement)
        if not self.files and measurement.inputs != takes:  # image files are the same inputs at any size
            problem = f"it takes {', '.join(measurement.inputs)}, its reference {', '.join(takes)}"
            return replace(candidate, problem=problem, verdict=f"cannot be compared: {problem}")
        candidate = replace(candidate, speedup=speedup(reference.measurement, measurement))
        try:
            errors = self._errors(reference, run)
            if problem := "; ".join(f"{error.output}: {error.problem}" for error in errors if error.problem):
                raise ValueError(problem)  # noqa: TRY301 - as what reading answers raises
            return replace(
                candidate,
                errors=errors,
                bit_agreement=None if self.nbits is None else _bit_agreement(reference.outputs, run.outputs, self.nbits),
                accuracy=self._accuracy(run),
                images=self._images(reference, run, errors),
                verdict=describe_speed(reference.measurement, measurement, source),
            )
        except ValueError as error:
            return replace(candidate, problem=str(error), verdict=f"cannot be compared: {error}")

    def _errors(self, reference: ModelRun, run: ModelRun) -> list[OutputError]:
        """Compare all outputs; an image is the same in either layout."""
        if len(run.output_names) != len(reference.output_names):
            raise ValueError(f"it has {len(run.output_names)} outputs, its reference {len(reference.output_names)}")
        if not self._are_images(reference, run):
            return measure_errors(reference.output_names, reference.outputs, run.outputs)
        before, after = ([[as_image(first), *rest] for first, *rest in one.outputs] for one in (reference, run))
        peaks = [float(np.ptp(self._output_range(reference))), *[None] * (len(run.output_names) - 1)]
        return measure_errors(reference.output_names, before, after, peaks)

    def _are_images(self, reference: ModelRun, run: ModelRun) -> bool:
        return reference.makes_images and run.makes_images and self.nbits is None

    def _accuracy(self, run: ModelRun) -> Accuracy | None:
        """Return what a model read on the labelled images."""
        return next(iter(self._accuracies(run)), None)

    def _accuracies(self, run: ModelRun) -> list[Accuracy]:
        """Return what a model read on the images of each embedder; of labelled ones once, else never."""
        answers = [outputs[0] for outputs in run.further_outputs]
        if self.marked is None:
            return [read_accuracy(self.labelled, self.attacks, answers)] if self.labelled else []
        return self.marked.read(answers, self.attacks)

    def _images(self, reference: ModelRun, run: ModelRun, errors: Sequence[OutputError]) -> ImageFindings | None:
        """Return how good a model's images are, where it makes any and its reference does."""
        if not self._are_images(reference, run):
            return None
        peak = float(np.ptp(self._output_range(reference)))
        pairs = zip(reference.outputs, run.outputs, strict=True)
        scores = [score(as_image(one[0]), as_image(other[0]), peak) for one, other in pairs]
        similarities = [one.ssim for one in scores if one.ssim is not None]
        whole, worst = errors[0].psnr_db, errors[0].worst_psnr_db
        assert whole is not None and worst is not None
        return ImageFindings(
            psnr_db=whole,
            worst_psnr_db=worst,
            ssim=float(np.mean(similarities)) if len(similarities) == len(scores) else None,
            truth=self._truth(run, reference),
            samples=[one.psnr_db for one in scores],
        )

    def _output_range(self, reference: ModelRun) -> tuple[float, float]:
        """Return what 0 and 255 become in the images that models make, if need be from the reference's own."""
        return self.pixel_range if self.is_range_known else usual_range([outputs[0] for outputs in reference.outputs])

    def _truth(self, run: ModelRun, reference: ModelRun) -> TruthScores | None:
        """Return how near a model's images are to the ground truth."""
        if not self.truths:
            return None
        low, high = self._output_range(reference)
        return score_against_truth([(outputs[0] - low) / (high - low) for outputs in run.outputs], self.files, self.truths)

    def _image_task(self, reference: ModelRun) -> ImageTask | None:
        """Return what went in and how good the reference's images are, where it makes any."""
        if not reference.makes_images or self.nbits is not None:
            return None
        channels = as_image(reference.outputs[0][0]).shape[2]
        plain = bicubic_scores(self.files, self.truths, channels) if self.truths else None
        truth, made = self._truth(reference, reference), self._output_range(reference)
        return ImageTask(self.files, self.truths, truth, plain, self.pixel_range, made)


def _bit_agreement(reference: list[list[Array]], candidate: list[list[Array]], nbits: int) -> float:
    """Return the share of bits read alike over all samples; the message is the first output, (1, 1 + nbits)."""
    one, other = (np.concatenate([outputs[0] for outputs in samples]) for samples in (reference, candidate))
    if one.shape[1:] != (1 + nbits,):
        raise ValueError(f"the output {one.shape[1:]} holds no message of {nbits} bits")
    return metrics.bit_agreement(one, other)


def choose_samples(
    images: Path | None,
    labelled: Sequence[Labelled],
    *,
    seed: int,
    count: int,
    guess: Guess,
) -> tuple[list[Inputs], list[Path]]:
    """Return the inputs of the timed runs, and the files they come from.

    Of labelled images these are the marked ones: the logits of an unmarked image are noise around 0, whose direction means nothing.
    """
    if labelled:
        marked = [image for image in labelled if image.message is not None]
        return labelled_inputs(marked, [None]), [image.file for image in marked]
    if images is not None and images.suffix == ".npz":
        length = min(count, npz_length(images))
        return [partial(_from_arrays, file=images, number=number, guess=guess) for number in range(length)], []
    if images is None:
        return [partial(sample_inputs, seed=seed + number, guess=guess) for number in range(count)], []
    files = _listed(images)[:count]
    return [partial(_from_file, file=file, guess=guess) for file in files], files


def choose_guess(reference: Source, threads: int, hinted: Guess, *, is_made_up: bool) -> Guess:
    """Return what made-up inputs look like.

    Args:
        reference: The reference.
        threads: Threads of the runtime.
        hinted: The guess that follows from its hints.
        is_made_up: Whether all inputs are; else those of signatures that the samples don't fit.

    Raises:
        ToolError: It runs with none.
    """
    if not isinstance(reference, ModelFile):
        return hinted
    if not (reference.content.has_open_inputs if isinstance(reference.content, TfliteContent) else is_made_up):
        return hinted
    try:
        with open_model(reference, threads=threads) as model:
            inputs = model.inputs
        return guess_inputs(reference, inputs, threads, hinted)
    except ChildError as error:
        remedy = "see what verify says of it, or give real inputs with --images FILE.npz"
        raise ToolError("the reference does not run", where=reference.path, got=error, remedy=remedy) from None


def _listed(images: Path) -> list[Path]:
    """Return image files; of a calibration set those that were held out, or else its samples."""
    is_set = (images / MANIFEST_NAME).is_file() or (images.suffix == ".json" and images.is_file())
    return holdout_of(images).images() if is_set else images_at(images)


def _from_file(specs: list[TensorSpec], file: Path, guess: Guess) -> dict[str, Array]:
    return image_sample(specs, read_pixels(file), guess)


def _from_arrays(specs: list[TensorSpec], file: Path, number: int, guess: Guess) -> dict[str, Array]:
    return complete_inputs(_arrays(tuple(specs), file)[number], specs, number, guess)


@lru_cache(maxsize=4)
def _arrays(specs: tuple[TensorSpec, ...], file: Path) -> list[dict[str, Array]]:
    return list(CalibrationSet(file).samples(list(specs)))


def message_length(bits: int | None, labelled: Sequence[Labelled], sources: Sequence[Source]) -> int | None:
    """Return the message length that was given, else of the labelled images, else the first in the metadata of a model."""
    known = next((image.message.size for image in labelled if image.message is not None), None)
    if bits is not None and known is not None and bits != known:
        raise ToolError("--bits contradicts --messages", got=bits, expected=known, remedy="leave out --bits")
    return bits or known or next((found for source in sources if (found := _nbits(source))), None)


def _nbits(source: Source) -> int | None:
    try:
        return source.nbits
    except DamagedError:  # reported as a model that does not run
        return None
