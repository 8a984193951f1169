"""What a detector reads on images whose messages are known, as they are and under attacks.

Letters in shapes: N images, K message bits.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.command.errors import ToolError
from shared.media.attacks import LIMITS, STANDARD, Attack
from shared.media.images import Pixels, read_pixels
from shared.metrics import metrics
from shared.runtime.benchmark import Inputs
from shared.runtime.samples import image_sample
from shared.watermark.message import Labelled, chance_of_agreement, read_messages

CLEAN = "none"  # the name of no attack
CHANCE = 0.001  # p-value above which a detector's bits are taken for coin tosses
LUCK = 3.1  # standard deviations that a difference exceeds with that probability


@dataclass(frozen=True)
class Condition:
    """What a detector read under one attack.

    Args:
        attack: Name of the attack, or `none`.
        bit_accuracy: Share of bits read right over all marked images.
        detected: Share of marked images whose confidence logit is above 0.
        false_positives: Share of unmarked images whose confidence logit is above 0; None where there are none.
        auc: How often a marked image has more confidence than an unmarked one; None where there are none.
        best_p_value: Of the marked image that was read best: how likely a random message agrees as well.
    """

    attack: str
    bit_accuracy: float
    detected: float
    false_positives: float | None
    auc: float | None
    best_p_value: float = 1.0


@dataclass(frozen=True)
class Reading:
    """What a detector read in one clean image.

    Args:
        file: The image.
        original: The same image before it was marked, where known.
        confidence: The logit of being marked.
        bit_accuracy: Share of bits read right; None for an unmarked image, as all that follows.
        p_value: How likely a random message agrees as well.
        margin: The smallest logit, counted towards the right side; negative where a bit is wrong.
    """

    file: Path
    original: Path | None
    confidence: float
    bit_accuracy: float | None
    p_value: float | None
    margin: float | None


@dataclass(frozen=True)
class Accuracy:
    """What a detector read on all labelled images.

    Args:
        conditions: Without attack first, then under each attack.
        readings: Of the clean images.
        logits: K numbers for each marked clean image, in the order of the readings.
    """

    conditions: list[Condition]
    readings: list[Reading]
    logits: list[list[float]]

    @property
    def clean(self) -> Condition:
        """Without attack."""
        return self.conditions[0]

    def under(self, attack: str) -> Condition:
        """Under the attack of that name."""
        return next(condition for condition in self.conditions if condition.attack == attack)

    def is_chance(self, condition: Condition) -> bool:
        """Whether a detector that tosses coins reads as well, all images together and the best one, at a p-value above CHANCE."""
        bits = self.bits
        pooled = chance_of_agreement(round(condition.bit_accuracy * bits), bits)
        return min(pooled, condition.best_p_value * len(self.logits)) > CHANCE

    @property
    def bits(self) -> int:
        """Message bits of all marked images together."""
        return sum(map(len, self.logits))

    def worst(self, field: str) -> float:
        """Return the worst p-value, margin or bit accuracy of a marked clean image."""
        values = [value for reading in self.readings if (value := getattr(reading, field)) is not None]
        return float(max(values) if field == "p_value" else min(values))


def largest_drop(reference: Accuracy, candidate: Accuracy) -> float | None:
    """Return the largest loss of bit accuracy under any attack or none; negative when the candidate reads better.

    Where the reference itself reads no better than chance there is nothing to lose, unless the loss is more than luck: LUCK
    standard deviations of the difference of two series of coin tosses. None where nothing counts.
    """
    luck = LUCK / math.sqrt(2 * reference.bits)
    drops = [
        (one.bit_accuracy - other.bit_accuracy, reference.is_chance(one))
        for one, other in zip(reference.conditions, candidate.conditions, strict=True)
    ]
    return max((drop for drop, is_chance in drops if not is_chance or drop > luck), default=None)


def choose_labelled(messages: Path | None, samples: int | None) -> list[Labelled]:
    """Return the labelled images, the first `samples` of the marked and of the unmarked where there is a limit."""
    if messages is None:
        return []
    images = read_messages(messages.absolute())
    marked = [image for image in images if image.message is not None][:samples]
    if not marked:
        raise ToolError("no image carries a message", where=messages)
    return marked + [image for image in images if image.message is None][:samples]


def labelled_inputs(labelled: Sequence[Labelled], attacks: Sequence[Attack | None], photos: int | None = None) -> list[Inputs]:
    """Return how to make each sample, attack by attack, image by image; random parts of an attack differ from image to image.

    Args:
        labelled: The images.
        attacks: What they meet.
        photos: After so many images the same photos come again, marked by another embedder; they meet the very same attacks.
    """

    @lru_cache(maxsize=1)  # models in turns ask for the same sample one after the other
    def attacked(number: int, attack: Attack | None) -> Pixels:
        pixels = read_pixels(labelled[number].file)
        return pixels if attack is None else replace(attack, seed=number % (photos or len(labelled)))(pixels)

    def sample(number: int, attack: Attack | None) -> Inputs:
        return lambda specs: image_sample(specs, attacked(number, attack))

    return [sample(number, attack) for attack in attacks for number in range(len(labelled))]


def read_accuracy(labelled: Sequence[Labelled], attacks: Sequence[Attack | None], answers: Sequence[NDArray[Any]]) -> Accuracy:
    """Return what the answers say.

    Args:
        labelled: The images; at least one is marked.
        attacks: None first, then the attacks.
        answers: Outputs float32 (1, 1 + K) in the order of `labelled_inputs`.

    Raises:
        ValueError: An output is of another shape, or not finite.
    """
    messages = [image.message for image in labelled if image.message is not None]
    nbits = len(messages[0])
    if any(answer.shape != (1, 1 + nbits) for answer in answers):
        raise ValueError(f"an output is no message of {nbits} bits: {answers[0].shape} instead of (1, {1 + nbits})")
    outputs = np.concatenate(answers).reshape(len(attacks), len(labelled), 1 + nbits)
    if not np.isfinite(outputs).all():
        raise ValueError("an output holds NaN or infinite values")
    truth, marked = np.stack(messages), np.array([image.message is not None for image in labelled])
    names = [CLEAN if attack is None else attack.name for attack in attacks]
    conditions = [_condition(name, output, truth, marked) for name, output in zip(names, outputs, strict=True)]
    readings = list(_readings(labelled, outputs[0]))
    return Accuracy(conditions, readings, outputs[0][marked, 1:].astype(float).tolist())


def _condition(name: str, output: NDArray[Any], truth: NDArray[np.bool_], marked: NDArray[np.bool_]) -> Condition:
    """Summarise outputs float32 (N, 1 + K) under one attack."""
    bits, confidence = metrics.message_bits(output[marked]), output[:, 0]
    has_unmarked = not marked.all()
    best = int((bits == truth).sum(axis=1).max())
    return Condition(
        attack=name,
        bit_accuracy=float((bits == truth).mean()),
        detected=float((confidence[marked] > 0).mean()),
        false_positives=float((confidence[~marked] > 0).mean()) if has_unmarked else None,
        auc=roc_auc(confidence[marked], confidence[~marked]) if has_unmarked else None,
        best_p_value=chance_of_agreement(best, truth.shape[1]),
    )


def _readings(labelled: Sequence[Labelled], output: NDArray[Any]) -> Iterator[Reading]:
    for image, row in zip(labelled, output, strict=True):
        confidence, logits = float(row[0]), row[1:]
        if image.message is None:
            yield Reading(image.file, None, confidence, None, None, None)
            continue
        right = int(((logits > 0) == image.message).sum())
        margin = float(np.where(image.message, logits, -logits).min())
        p_value = chance_of_agreement(right, logits.size)
        yield Reading(image.file, image.original, confidence, right / logits.size, p_value, margin)


def roc_auc(positives: NDArray[Any], negatives: NDArray[Any]) -> float:
    """Return the area under the ROC curve: how often a positive scores above a negative, ties counting half.

    Args:
        positives: Scores of shape (N,) that should be high.
        negatives: Scores of shape (M,) that should be low.
    """
    if not (positives.size and negatives.size):
        raise ValueError("there are no positives or no negatives")
    differences = positives.astype(np.float64)[:, np.newaxis] - negatives.astype(np.float64)[np.newaxis, :]
    if not np.isfinite(differences).all():
        raise ValueError("a score is NaN or infinite")
    return float((differences > 0).mean() + 0.5 * (differences == 0).mean())


def parse_attacks(text: str) -> list[Attack]:
    """Return the attacks that a text names: `standard`, `none`, or a list like `jpeg-50,crop-0.9`.

    Raises:
        ToolError: An unknown kind, or no strength.
    """
    if text in ("standard", "none"):
        return list(STANDARD) if text == "standard" else []
    attacks: list[Attack] = []
    for name in text.split(","):
        kind, _, strength = name.strip().partition("-")
        try:
            attack = Attack(kind, float(strength))
        except ValueError:
            attack = None
        low, high = LIMITS.get(kind, (0, 0))
        if attack is None or not low <= attack.strength <= high:
            known = ", ".join(f"{kind}-{low:g} to {high:g}" for kind, (low, high) in LIMITS.items())
            raise ToolError(f"unknown attack '{name}'", expected=f"standard, none, or of {known}")
        if attack.name in [known.name for known in attacks]:
            raise ToolError(f"attack '{attack.name}' is named twice")
        attacks.append(attack)
    return attacks
