"""The limits that a candidate must keep, named as compare's options are."""

import math
from dataclasses import dataclass

from shared.command.errors import ToolError
from shared.command.resources import MIB
from shared.media.attacks import Attack
from tools.compare.accuracy import Accuracy, largest_drop
from tools.compare.comparison import Candidate, Gate, ImageTask


@dataclass(frozen=True)
class Limits:
    """The limits that were asked for.

    Args:
        of_numbers: Name of compare's option -> limit; None is no limit.
        under_attack: Name of the attack -> least bit accuracy.
    """

    of_numbers: dict[str, float | None]
    under_attack: dict[str, float]

    def gates(self, candidate: Candidate, reference: Accuracy | None, task: ImageTask | None = None) -> list[Gate]:
        """Return every limit with the candidate's value; a value that could not be measured breaks its limit."""
        measured, accuracy = candidate.measured, candidate.accuracy
        values: dict[str, float | None] = {
            "min_bit_agreement": candidate.bit_agreement,
            "min_cosine": candidate.cosine,
            "min_speedup": candidate.speedup,
            "max_size_mb": candidate.size_bytes / MIB,
            "max_latency_ms": measured.median_ms if measured else None,
            "min_bit_accuracy": accuracy.clean.bit_accuracy if accuracy else None,
            "max_accuracy_drop": largest_drop(reference, accuracy) if accuracy and reference else None,
            "min_auc": accuracy.clean.auc if accuracy else None,
            **_image_values(candidate, task),
        }
        under = {attack: accuracy.under(attack).bit_accuracy if accuracy else None for attack in self.under_attack}
        limits = [(name, values[name], limit) for name, limit in self.of_numbers.items() if limit is not None]
        limits += [(f"min_accuracy_under {attack}", under[attack], limit) for attack, limit in self.under_attack.items()]
        return [Gate(name, value, limit, _keeps(name, value, limit)) for name, value, limit in limits]


def _image_values(candidate: Candidate, task: ImageTask | None) -> dict[str, float | None]:
    """Return what the limits on images are about; None where it is not known."""
    images = candidate.images
    truth, before, plain = images and images.truth, task and task.reference, task and task.bicubic
    return {
        "min_psnr": images.psnr_db if images else None,
        "min_ssim": images.ssim if images else None,
        "max_psnr_drop": before.psnr_db - truth.psnr_db if truth and before else None,
        "min_psnr_gain": truth.psnr_db - plain.psnr_db if truth and plain else None,
    }


def _keeps(name: str, value: float | None, limit: float) -> bool:
    return value is not None and (value <= limit if name.startswith("max") else value >= limit)


def limits_under_attack(limits: list[str], attacks: list[Attack]) -> dict[str, float]:
    """Return attack -> least bit accuracy of options such as `jpeg-50=0.97`.

    Raises:
        ToolError: The attack is not run, has a limit already, or the share is none.
    """
    names = [attack.name for attack in attacks]
    found: dict[str, float] = {}
    for text in limits:
        attack, _, share = text.partition("=")
        option = f"--min-accuracy-under {text}"
        if attack not in names:
            raise ToolError(f"{option}: this attack is not run", expected=f"one of {', '.join(names) or '--attacks'}")
        if attack in found:
            raise ToolError(f"{option}: there is a limit for this attack already", remedy="give one")
        try:
            found[attack] = float(share)
        except ValueError:
            found[attack] = math.nan
        if not 0 <= found[attack] <= 1:
            raise ToolError(f"{option}: no limit", expected=f"{attack}=SHARE, a share from 0 to 1")
    return found
