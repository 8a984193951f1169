"""How far a model's outputs are from a reference's, output by output, over all samples.

A value that is NaN or infinite, a shape that differs and an empty output are handled here and nowhere else.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
MOST_DB = 200.0  # stands for no difference, too: JSON has no infinity


@dataclass(frozen=True)
class OutputError:
    """How far one output is from the reference's. Values are None where `problem` says why, or where a measure has no meaning.

    Args:
        output: Name of the output, or of a tensor inside the model.
        relative_error: Euclidean norm of the difference, over the root mean square of the norms of the reference's answers;
            largest over the samples.
        cosine: Of the reference's and the candidate's values, smallest over the samples; 0 where one of both is all zeros. None
            where both are in every sample.
        max_abs_error: Largest absolute difference of a value.
        snr_db: Signal-to-noise ratio, energy of the reference over that of the difference; None without any difference.
        psnr_db: Peak signal-to-noise ratio of an image over all samples together, at most MOST_DB; None for other outputs.
        worst_psnr_db: Of the worst sample.
        problem: Why the output cannot be compared; empty where it can.
    """

    output: str
    relative_error: float | None = None
    cosine: float | None = None
    max_abs_error: float | None = None
    snr_db: float | None = None
    psnr_db: float | None = None
    worst_psnr_db: float | None = None
    problem: str = ""

    def __str__(self) -> str:
        if self.problem or self.relative_error is None:
            return f"{self.output}: {self.problem or 'empty in every sample'}"
        images = "" if self.psnr_db is None else f", PSNR {self.psnr_db:.2f} dB (worst sample {self.worst_psnr_db:.2f})"
        cosine = "-" if self.cosine is None else f"{self.cosine:.6f}"
        return f"{self.output}: relative error {self.relative_error:.3%}, cosine {cosine}{images}"


def measure_errors(
    names: Sequence[str],
    reference: Sequence[Sequence[Array]],
    candidate: Sequence[Sequence[Array]],
    peaks: Sequence[float | None] = (),
) -> list[OutputError]:
    """Compare the outputs of two models.

    Args:
        names: Of the outputs, in the models' order.
        reference: For each sample the outputs in that order, of any shape.
        candidate: The same of the other model.
        peaks: For each output the width of the range of its values where it is an image, else None.

    Raises:
        ValueError: The models differ in the number of outputs or samples.
    """
    peaks = peaks or [None] * len(names)
    by_output = zip(zip(*reference, strict=True), zip(*candidate, strict=True), strict=True)
    return [measure_error(name, *pair, peak) for name, pair, peak in zip(names, by_output, peaks, strict=True)]


def measure_error(name: str, reference: Sequence[Array], candidate: Sequence[Array], peak: float | None = None) -> OutputError:
    """Compare one output, sample by sample; arguments as of `measure_errors`."""
    shapes = next(((r.shape, c.shape) for r, c in zip(reference, candidate, strict=True) if r.shape != c.shape), None)
    if shapes is not None:
        return OutputError(name, problem=f"outputs differ in shape: {shapes[0]} and {shapes[1]}")
    pairs = [(r.astype(np.float64).ravel(), c.astype(np.float64).ravel()) for r, c in zip(reference, candidate, strict=True)]
    if not all(np.isfinite(values).all() for pair in pairs for values in pair):
        return OutputError(name, problem="an output holds NaN or infinite values")
    if not any(r.size for r, _ in pairs):
        return OutputError(name)  # empty on both sides: nothing differs, and there is nothing to measure
    signal = np.array([r @ r for r, _ in pairs])
    noise = np.array([(r - c) @ (r - c) for r, c in pairs])
    cosines = [float(np.clip(r @ c / (math.sqrt((r @ r) * (c @ c)) or 1.0), -1, 1)) for r, c in pairs if r.any() or c.any()]
    largest = max(float(np.abs(r - c).max(initial=0)) for r, c in pairs)
    cosine = min(cosines, default=None)
    whole, worst = _decibels(noise, np.array([r.size for r, _ in pairs]), peak)
    if noise.max() == 0:
        return OutputError(name, 0.0, cosine, largest, None, whole, worst)
    if signal.max() == 0:
        problem = "the reference's values are all zero, the candidate's are not"
        return OutputError(name, None, cosine, largest, None, whole, worst, problem)
    error, ratio = math.sqrt(noise.max() / signal.mean()), 10 * math.log10(signal.sum() / noise.sum())
    return OutputError(name, error, cosine, largest, ratio, whole, worst)


def _decibels(noise: Array, sizes: Array, peak: float | None) -> tuple[float | None, float | None]:
    """Return the PSNR over all samples together, and that of the worst; None without a peak."""
    if peak is None:
        return None, None
    return _decibel(noise.sum() / sizes.sum(), peak), _decibel(float((noise / np.maximum(sizes, 1)).max()), peak)


def _decibel(mean_square: float, peak: float) -> float:
    return min(10 * math.log10(peak**2 / mean_square), MOST_DB) if mean_square else MOST_DB


def worst_error(errors: Sequence[OutputError]) -> OutputError:
    """Return the error of the output that is furthest off; one that cannot be compared is further off than any other."""
    return max(errors, key=size_of)


def size_of(error: OutputError) -> float:
    """Return a relative error to sort by: infinite for an output that cannot be compared, 0 for one that is always empty."""
    return math.inf if error.problem else error.relative_error or 0.0
