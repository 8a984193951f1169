"""How far quantizing moved a tensor over all samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Damage:
    """How far quantizing moved a tensor, over all samples.

    Args:
        relative_error: Largest over the samples of the Euclidean norm of the difference, divided by the root mean square over the
            samples of the norm of the float values. None where a value is no finite number.
        snr_db: Signal-to-noise ratio, the energy of the float values over that of the difference; None without any difference.
        cosine: Of the float and the quantized values, smallest over the samples; 0 where one side
            is all zeros, None where both are in every sample.
    """

    relative_error: float | None
    snr_db: float | None
    cosine: float | None


def measure_damage(reference: Sequence[Array], candidate: Sequence[Array]) -> Damage:
    """Compare a tensor, sample by sample; any shape, float."""
    flat = [(r.astype(np.float64).ravel(), c.astype(np.float64).ravel()) for r, c in zip(reference, candidate, strict=True)]
    if not all(np.isfinite(side).all() for pair in flat for side in pair):
        return Damage(None, None, None)
    signal = np.array([r @ r for r, _ in flat])
    noise = np.array([(r - c) @ (r - c) for r, c in flat])
    cosines = [float(r @ c / (np.sqrt((r @ r) * (c @ c)) or 1.0)) for r, c in flat if r.any() or c.any()]
    cosine = min(cosines, default=None)
    if noise.max() == 0:
        return Damage(0.0, None, cosine)
    if signal.max() == 0:
        return Damage(None, None, cosine)
    return Damage(float(np.sqrt(noise.max() / signal.mean())), float(10 * np.log10(signal.sum() / noise.sum())), cosine)
