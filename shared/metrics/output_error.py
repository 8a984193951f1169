"""How far a model's outputs are from a reference's, output by output, over all samples.

A value that is NaN or infinite, a shape that differs and an empty output are handled here and nowhere else.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
USUAL_RANGES = ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0))  # of pixels
OVERSHOOT = 0.25  # of a range's width
MOST_DB = 200.0  # stands for no difference, too: JSON has no infinity


@dataclass(frozen=True)
class OutputError:
    """How far one output is from the reference's. Values are None where `problem` says why, or where a measure has no meaning.

    Args:
        output: Name of the output, or of a tensor inside the model.
        relative_error: Euclidean norm of the difference, over the root mean square of the norms of the reference's answers;
            largest over the samples.
        cosine: Of the reference's and the candidate's values, over all samples together; 0 where one of both is all zeros. None
            where both are.
        max_abs_error: Largest absolute difference of a value.
        snr_db: Signal-to-noise ratio, energy of the reference over that of the difference; None without any difference.
        psnr_db: Peak signal-to-noise ratio of an image over all samples together, at most MOST_DB; None for other outputs.
        worst_psnr_db: Of the worst sample.
        problem: Why the output cannot be compared; empty where it can.
        worst_cosine: Cosine of the worst sample.
        left_out: Samples that are not compared: the output is empty in one, or has another number of rows in the candidate.
        values: The most values that the output has in a sample.
    """

    output: str
    relative_error: float | None = None
    cosine: float | None = None
    max_abs_error: float | None = None
    snr_db: float | None = None
    psnr_db: float | None = None
    worst_psnr_db: float | None = None
    problem: str = ""
    worst_cosine: float | None = None
    left_out: int = 0
    values: int = 0

    @property
    def mean_error(self) -> float | None:
        """Euclidean norm of the difference over that of the reference's answers, over all samples together."""
        return self.relative_error if self.snr_db is None else 10 ** (-self.snr_db / 20)

    def __str__(self) -> str:
        if self.problem or self.relative_error is None:
            return f"{self.output}: {self.problem or 'empty, or of another length, in every sample'}"
        images = "" if self.psnr_db is None else f", PSNR {self.psnr_db:.2f} dB (worst sample {self.worst_psnr_db:.2f})"
        cosine = "-" if self.cosine is None else f"{self.cosine:.6f}"
        worst = f"; worst sample {self.relative_error:.3%}" + ("" if self.worst_cosine is None else f", {self.worst_cosine:.6f}")
        left_out = f"; {self.left_out} samples left out, empty or of another length" if self.left_out else ""
        return f"{self.output}: relative error {self.mean_error:.3%}, cosine {cosine}{worst}{images}{left_out}"


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
        peaks: For each output the width of the range of its values where it is an image, 0 where the reference's own values tell
            it, else None.

    Raises:
        ValueError: The models differ in the number of outputs or samples.
    """
    peaks = peaks or [None] * len(names)
    by_output = zip(zip(*reference, strict=True), zip(*candidate, strict=True), strict=True)
    return [measure_error(name, *pair, peak) for name, pair, peak in zip(names, by_output, peaks, strict=True)]


def measure_error(name: str, reference: Sequence[Array], candidate: Sequence[Array], peak: float | None = None) -> OutputError:
    """Compare one output, sample by sample; arguments as of `measure_errors`.

    Samples in which the output is empty, or has another length, are left out and counted, unless both models always give one shape:
    then that shape is wrong. A value that is infinite in both models alike does not differ.
    """
    if problem := _wrong_shape(reference, candidate):
        return OutputError(name, problem=problem)
    kept = [(r, c) for r, c in zip(reference, candidate, strict=True) if r.shape == c.shape and r.size]
    left_out = len(reference) - len(kept)
    if not kept:
        return OutputError(name, left_out=left_out)
    pairs = [_finite_alike(r.astype(np.float64).ravel(), c.astype(np.float64).ravel()) for r, c in kept]
    if not all(np.isfinite(values).all() for pair in pairs for values in pair):
        return OutputError(name, problem="an output holds NaN or infinite values")
    signal = np.array([r @ r for r, _ in pairs])
    noise = np.array([(r - c) @ (r - c) for r, c in pairs])
    others = np.array([c @ c for _, c in pairs])
    products = np.array([r @ c for r, c in pairs])
    cosines = [_cosine(*values) for values in zip(products, signal, others, strict=True) if values[1] or values[2]]
    if peak == 0:
        peak = float(np.ptp(usual_range([r for r, _ in pairs])))
    whole, worst = _decibels(noise, np.array([r.size for r, _ in pairs]), peak)
    error = OutputError(
        name,
        cosine=_cosine(products.sum(), signal.sum(), others.sum()) if cosines else None,
        max_abs_error=max(float(np.abs(r - c).max(initial=0)) for r, c in pairs),
        psnr_db=whole,
        worst_psnr_db=worst,
        worst_cosine=min(cosines, default=None),
        left_out=left_out,
        values=max(r.size for r, _ in pairs),
    )
    if noise.max() == 0:
        return replace(error, relative_error=0.0)
    if signal.max() == 0:
        return replace(error, problem="the reference's values are all zero, the candidate's are not")
    ratio = 10 * math.log10(signal.sum() / noise.sum())
    return replace(error, relative_error=math.sqrt(noise.max() / signal.mean()), snr_db=ratio)


def usual_range(values: Sequence[Array]) -> tuple[float, float]:
    """Return the narrowest usual range of pixels that holds the values of images, or else their own; networks may overshoot."""
    low, high = min(float(array.min()) for array in values), max(float(array.max()) for array in values)
    holding = ((a, b) for a, b in USUAL_RANGES if a - OVERSHOOT * (b - a) <= low and high <= b + OVERSHOOT * (b - a))
    return next(holding, (low, high))


def _wrong_shape(reference: Sequence[Array], candidate: Sequence[Array]) -> str:
    """Say how shapes differ that should not; empty where they are the same, or depend on the data."""
    pairs = [(r.shape, c.shape) for r, c in zip(reference, candidate, strict=True)]
    different = next((pair for pair in pairs if pair[0] != pair[1]), None)
    if different is None:
        return ""
    is_fixed = all(pair == pairs[0] for pair in pairs)
    if is_fixed or len(different[0]) != len(different[1]):
        return f"outputs differ in shape: {different[0]} and {different[1]}"
    return ""


def _finite_alike(one: Array, other: Array) -> tuple[Array, Array]:
    """Return two arrays with 0 in place of values that are infinite in both alike."""
    alike = np.isinf(one) & (one == other)
    return (np.where(alike, 0, one), np.where(alike, 0, other)) if alike.any() else (one, other)


def _cosine(product: float, one: float, other: float) -> float:
    return float(np.clip(product / (math.sqrt(one * other) or 1.0), -1, 1))


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
