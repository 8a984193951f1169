"""What is wanted of an ONNX model: how to quantize it, with which samples, inside which limits."""

from dataclasses import dataclass
from pathlib import Path

from shared.calibration.dataset import CalibrationSet, InputRange
from shared.metrics.fidelity import Fidelity
from tools.quantize_onnx.settings import Settings


@dataclass(frozen=True)
class OnnxWish:
    """What is wanted of a model.

    Args:
        settings: How to quantize; of mode `auto` the settings of its static candidate.
        is_auto: Whether to take the fastest mode that keeps the limits.
        tries_methods: Whether a search may take another calibration method where the first does not do.
        exclude: Node names, or op types, that stay in float; regexes are resolved before.
        samples: Real inputs to calibrate with; their range still open.
        holdout: Real inputs to measure on; None: what the calibration set itself holds out, else its own samples.
        input_range: Range of the model's image input, as the user says.
        corrects_bias: Whether biases are corrected where there are samples.
        min_psnr: Least PSNR in dB, over all samples.
        min_cosine: Least cosine of the worst sample.
        threads: Threads of the runtime.
        range_cache: Where ranges of activations are kept for later runs.
    """

    settings: Settings
    is_auto: bool = False
    tries_methods: bool = False
    exclude: tuple[str, ...] = ()
    samples: CalibrationSet | None = None
    holdout: CalibrationSet | None = None
    input_range: InputRange | None = None
    corrects_bias: bool = True
    min_psnr: float | None = None
    min_cosine: float | None = None
    threads: int | None = None
    range_cache: Path | None = None

    def has_limits(self) -> bool:
        """Whether the answers have a limit to keep."""
        return self.min_psnr is not None or self.min_cosine is not None

    def keeps(self, fidelity: Fidelity) -> bool:
        """Return whether answers are inside the limits."""
        if self.min_psnr is not None and (fidelity.psnr_db is None or fidelity.psnr_db < self.min_psnr):
            return False
        return self.min_cosine is None or fidelity.cosine >= self.min_cosine
