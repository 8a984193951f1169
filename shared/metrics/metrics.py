"""How far two outputs are apart. NaN or a shape mismatch raises; nothing is hidden, nothing replaced."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


def _pair(reference: Array, candidate: Array) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if reference.shape != candidate.shape:
        raise ValueError(f"outputs differ in shape: {reference.shape} and {candidate.shape}")
    if not (np.isfinite(reference).all() and np.isfinite(candidate).all()):
        raise ValueError("an output holds NaN or infinite values")
    return reference.astype(np.float64).ravel(), candidate.astype(np.float64).ravel()


def max_abs_error(reference: Array, candidate: Array) -> float:
    """Return the largest absolute difference of two arrays of one shape."""
    a, b = _pair(reference, candidate)
    return float(np.abs(a - b).max())


def relative_error(reference: Array, candidate: Array) -> float:
    """Return the L2 norm of the difference over the L2 norm of the reference, which must not be all zero unless both are."""
    a, b = _pair(reference, candidate)
    scale = float(np.linalg.norm(a))
    difference = float(np.linalg.norm(a - b))
    if scale == 0 < difference:
        raise ValueError("the reference's outputs are all zero, the candidate's are not")
    return difference / (scale or 1.0)


def cosine(reference: Array, candidate: Array) -> float:
    """Return the cosine of the angle between two arrays taken as vectors; 1 is the same direction."""
    a, b = _pair(reference, candidate)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    if norms == 0:
        return 1.0 if np.array_equal(a, b) else 0.0
    return float(np.clip(a @ b / norms, -1, 1))


def message_bits(output: Array) -> NDArray[np.bool_]:
    """Return the message of detector outputs float32 (N, 1 + K) as bool (N, K): a logit above 0 reads as 1."""
    bits: NDArray[np.bool_] = output[:, 1:] > 0
    return bits


def bit_agreement(reference: Array, candidate: Array) -> float:
    """Return the share of message bits that two detector outputs (N, 1 + K) read alike."""
    _pair(reference, candidate)
    return float((message_bits(reference) == message_bits(candidate)).mean())


def psnr_db(reference: Array, candidate: Array, peak: float = 1.0) -> float:
    """Return the peak signal-to-noise ratio of two images of one shape in dB; infinite when they are the same."""
    a, b = _pair(reference, candidate)
    error = float(np.square(a - b).mean())
    return float(10 * np.log10(peak**2 / error)) if error else float("inf")
