"""How far a model's answers moved from its reference's, over all samples: PSNR where they are images, cosine and error for all."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
MOST_DB = 200.0  # stands for no difference, too: JSON has no infinity


@dataclass(frozen=True)
class Fidelity:
    """How near the answers are.

    Args:
        psnr_db: Peak signal-to-noise ratio of the first output over all samples together, which is below the mean of the samples'
            own; at most MOST_DB. None where that output is no image.
        worst_psnr_db: Of the worst sample.
        cosine: Of all outputs of a sample as one vector, smallest over the samples.
        relative_error: Norm of the difference over that of the reference, largest over the samples.
    """

    psnr_db: float | None
    worst_psnr_db: float | None
    cosine: float
    relative_error: float

    def __str__(self) -> str:
        images = "" if self.psnr_db is None else f"PSNR {self.psnr_db:.2f} dB (worst sample {self.worst_psnr_db:.2f}), "
        return f"{images}cosine {self.cosine:.6f}, relative error {self.relative_error:.2%} at worst"


def measure_fidelity(
    reference: Sequence[Sequence[Array]], candidate: Sequence[Sequence[Array]], peak: float | None = None
) -> Fidelity:
    """Compare the outputs of two models, sample by sample.

    Args:
        reference: For each sample the outputs in the model's order.
        candidate: The same of the other model.
        peak: Width of the range of an image output's values; None where the first output is no image.

    Raises:
        ValueError: Outputs differ in shape, or hold NaN or infinity.
    """
    from shared.metrics.metrics import cosine, relative_error

    pairs = [(_flat(one), _flat(other)) for one, other in zip(reference, candidate, strict=True)]
    cosines = [cosine(one, other) for one, other in pairs]
    errors = [relative_error(one, other) for one, other in pairs]
    squares = [_mean_square(one[0], other[0]) for one, other in zip(reference, candidate, strict=True)] if peak else []
    sizes = [one[0].size for one in reference]
    return Fidelity(
        psnr_db=_db(float(np.average(squares, weights=sizes)), peak) if peak else None,
        worst_psnr_db=_db(max(squares), peak) if peak else None,
        cosine=min(cosines),
        relative_error=max(errors),
    )


def _flat(outputs: Sequence[Array]) -> Array:
    return np.concatenate([output.astype(np.float64).ravel() for output in outputs])


def _mean_square(one: Array, other: Array) -> float:
    return float(np.square(one.astype(np.float64) - other.astype(np.float64)).mean())


def _db(mean_square: float, peak: float) -> float:
    return float(min(10 * np.log10(peak**2 / mean_square), MOST_DB)) if mean_square else MOST_DB
