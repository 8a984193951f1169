"""The gates that compare knows, and the values they limit."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from shared.command.errors import ToolError
from shared.command.resources import MIB
from shared.media.attacks import Attack
from shared.metrics.gates import GateResult, check_gate, parse_gates
from shared.networks.card import load_card
from tools.compare import matrix
from tools.compare.accuracy import Accuracy, largest_drop
from tools.compare.comparison import Candidate
from tools.compare.image_quality import ImageTask

UNDER = "min_accuracy_under"  # followed by a colon and the attack
OF_OUTPUTS = ("min_cosine", "max_error")  # may be followed by a colon and the name of an output, then they are for it alone
READ_LOSS = "max_loss_where_read"  # as max_accuracy_drop, but kept where the reference reads nothing, which compare then says
OF_MESSAGES = ("min_bit_accuracy", UNDER, "max_accuracy_drop", READ_LOSS, "min_auc")
OF_GROUND_TRUTH = ("max_psnr_drop", "min_psnr_gain")
OF_MARKING = matrix.MARKING_GATES  # of --embedder
SHARES = ("min_bit_agreement", "min_cosine", *OF_MESSAGES, "min_ssim", "max_marking_drop")  # from 0 to 1
GATES = (
    "min_bit_agreement",
    "min_cosine",
    "max_error",
    "min_speedup",
    "max_size_mb",
    "max_latency_ms",
    *OF_MESSAGES,
    "min_psnr",
    "min_ssim",
    *OF_GROUND_TRUTH,
    *OF_MARKING,
)


def read_gates(card: str | None, texts: Sequence[str]) -> dict[str, float]:
    """Return gate -> limit of `--gates CARD:RECIPE` and of each `--gate NAME=VALUE`, which replaces the card's.

    Raises:
        ToolError: No such card, recipe or gate.
    """
    known: dict[str, float] = {}
    if card is not None:
        name, colon, recipe = card.rpartition(":")
        if not colon:
            raise ToolError("--gates names no recipe", got=card, expected="CARD:RECIPE, such as chunkyseal:int8")
        tables = load_card(name).gates
        if recipe not in tables:
            raise ToolError("the card has no gates for this recipe", where=name, got=recipe, expected=", ".join(sorted(tables)))
        known = {gate: limit for gate, limit in flat_gates(vars(tables[recipe])).items() if limit is not None}
    return {**known, **parse_gates(texts, GATES)}


def flat_gates(table: Mapping[str, Any]) -> dict[str, float]:
    """Return gate -> limit of a card's table, in which a gate may hold a table of its own: its parts get `gate:part` as names."""
    flat: dict[str, float] = {}
    for name, limit in table.items():
        flat |= (
            {f"{name}:{part}": float(of_part) for part, of_part in limit.items()} if isinstance(limit, Mapping) else {name: limit}
        )
    return flat


def require_measurable(
    gates: Mapping[str, float],
    attacks: Sequence[Attack],
    *,
    has_messages: bool,
    has_ground_truth: bool,
    has_embedders: bool = False,
    has_candidates: bool = True,
) -> None:
    """Raise ToolError for gates on values that are not measured, and for limits that no value can have."""
    names = [attack.name for attack in attacks]
    for name, limit in gates.items():
        kind, colon, attack = name.partition(":")
        if kind in OF_MESSAGES and not (has_messages or has_embedders):
            raise ToolError(f"--gate {kind} needs images whose messages are known", remedy="give --messages FILE")
        if kind not in OF_MARKING and not has_candidates:
            raise ToolError(f"--gate {kind} is for candidates, and there is none", remedy="name a candidate, or leave it out")
        if kind in OF_MARKING and not has_embedders:
            raise ToolError(f"--gate {kind} needs embedders", remedy="give --embedder FILE")
        if kind in OF_GROUND_TRUTH and not has_ground_truth:
            raise ToolError(f"--gate {kind} needs the ground truth", remedy="give --images and --ground-truth")
        if kind == UNDER and attack not in names:
            raise ToolError(f"--gate {name}: this attack is not run", expected=f"one of {', '.join(names) or '--attacks'}")
        if colon and kind != UNDER and kind not in OF_OUTPUTS:
            expected = f"an attack after {UNDER}, an output after {' and '.join(OF_OUTPUTS)}"
            raise ToolError(f"--gate {name}: nothing follows {kind}", expected=expected, remedy=f"write {kind}")
        low, high = (-math.inf if kind in OF_GROUND_TRUTH else 0.0), (1.0 if kind in SHARES else math.inf)
        if not (low <= limit <= high and math.isfinite(limit)):
            expected = "a share from 0 to 1" if kind in SHARES else "a finite number" + " of 0 or more" * (low == 0)
            raise ToolError(f"--gate {name}={limit:g}: no value is like that", expected=expected, remedy="correct the limit")


def check_gates(
    gates: Mapping[str, float], candidate: Candidate, reference: Accuracy | None, task: ImageTask | None = None
) -> list[GateResult]:
    """Return every gate with the candidate's value; a value that could not be measured breaks its gate."""
    measurement, accuracy = candidate.measurement, candidate.accuracy
    values: dict[str, float | None] = {
        "min_bit_agreement": candidate.bit_agreement,
        "min_cosine": candidate.cosine,
        "max_error": candidate.relative_error,
        "min_speedup": candidate.speedup,
        "max_size_mb": candidate.size_bytes / MIB,
        "max_latency_ms": measurement.median_ms if measurement else None,
        "min_bit_accuracy": accuracy.clean.bit_accuracy if accuracy else None,
        "max_accuracy_drop": largest_drop(reference, accuracy) if accuracy and reference else None,
        READ_LOSS: (largest_drop(reference, accuracy) or 0.0) if accuracy and reference else None,
        "min_auc": accuracy.clean.auc if accuracy else None,
        **_image_values(candidate, task),
    }
    for name in gates:
        kind, _, part = name.partition(":")
        if kind == UNDER:
            values[name] = accuracy.under(part).bit_accuracy if accuracy else None
        elif part:
            values[name] = _of_output(candidate, kind, part)
    return [check_gate(name, values[name], limit) for name, limit in gates.items() if name not in OF_MARKING]


def _of_output(candidate: Candidate, kind: str, output: str) -> float | None:
    """Return what a gate on one output is about; None where it was not measured."""
    errors = {error.output: error for error in candidate.errors}
    if errors and output not in errors:
        raise ToolError(f"--gate {kind}:{output}: no such output", expected=", ".join(errors))
    error = errors.get(output)
    if error is None or kind == "max_error":
        return None if error is None else error.relative_error
    return 1.0 if error.worst_cosine is None and error.relative_error == 0 else error.worst_cosine  # all zero in both


def _image_values(candidate: Candidate, task: ImageTask | None) -> dict[str, float | None]:
    """Return what the gates on images are about; None where it is not known."""
    images = candidate.images
    truth, before, plain = images and images.truth, task and task.reference, task and task.bicubic
    return {
        "min_psnr": images.psnr_db if images else None,
        "min_ssim": images.ssim if images else None,
        "max_psnr_drop": before.psnr_db - truth.psnr_db if truth and before else None,
        "min_psnr_gain": truth.psnr_db - plain.psnr_db if truth and plain else None,
    }
