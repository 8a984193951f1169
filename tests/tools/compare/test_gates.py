"""Every gate of compare is kept at its very limit, broken beyond it, and broken by a value that could not be measured."""

from dataclasses import replace
from pathlib import Path

import pytest

from shared.command.errors import ToolError
from shared.media.attacks import Attack
from shared.metrics.output_error import OutputError
from tests.conftest import write_card
from tests.tools.compare.test_comparison import accuracy, candidate
from tools.compare.gates import (
    GATES,
    OF_GROUND_TRUTH,
    OF_MARKING,
    OF_MESSAGES,
    SHARES,
    UNDER,
    check_gates,
    flat_gates,
    read_gates,
    require_measurable,
)
from tools.compare.image_quality import ImageFindings, ImageTask, TruthScores

FOUND = candidate("a.tflite", 2**20, 4)  # 1 MiB, 4 ms, cosine 0.5, speed-up 2, 75 % of the bits right, 37.5 % under jpeg-50
IMAGES = ImageFindings(psnr_db=40, worst_psnr_db=30, ssim=0.9, truth=TruthScores(33, 0.8, []), samples=[])
TASK = ImageTask([], [], reference=TruthScores(34, 0.8, []), bicubic=TruthScores(31, 0.7, []))
REFERENCE = replace(accuracy(1), logits=[[0.0] * 32] * 4)
# Gate -> the very limit, and one beyond it.
LIMITS = {
    "min_bit_agreement": (0.9, 0.91),
    "min_cosine": (0.5, 0.51),
    "max_error": (0.1, 0.09),
    "min_speedup": (2, 2.1),
    "max_size_mb": (1, 0.9),
    "max_latency_ms": (4, 3.9),
    "min_bit_accuracy": (0.75, 0.76),
    "min_accuracy_under:jpeg-50": (0.375, 0.38),
    "max_accuracy_drop": (0.25, 0.24),
    "max_loss_where_read": (0.25, 0.24),
    "min_auc": (1, 1.1),
    "min_psnr": (40, 40.1),
    "min_ssim": (0.9, 0.91),
    "max_psnr_drop": (1, 0.9),
    "min_psnr_gain": (2, 2.1),
}


def test_every_gate_is_in_the_table() -> None:
    assert {name.partition(":")[0] for name in LIMITS} | set(OF_MARKING) == set(GATES)


@pytest.mark.parametrize("name", LIMITS)
def test_a_gate_is_kept_at_its_limit_and_broken_beyond_or_without_a_value(name: str) -> None:
    at, beyond = LIMITS[name]
    for limit, ok in ((at, True), (beyond, False)):
        (gate,) = check_gates({name: limit}, replace(FOUND, images=IMAGES), REFERENCE, TASK)
        assert (gate.name, gate.value, gate.limit, gate.ok) == (name, pytest.approx(at), limit, ok)
    blind = replace(FOUND, measurement=None, errors=[], bit_agreement=None, speedup=None, accuracy=None)
    (gate,) = check_gates({name: -1e9 if name.startswith("min") else 1e9}, blind, REFERENCE, TASK)
    if name == "max_size_mb":  # a file always has a size
        assert (gate.value, gate.ok) == (1, True)
    else:
        assert (gate.value, gate.ok) == (None, False)


def test_a_drop_needs_a_reference_that_reads_something() -> None:
    for reference, value, ok in ((REFERENCE, 0.25, True), (accuracy(0.5), None, False), (None, None, False)):
        (gate,) = check_gates({"max_accuracy_drop": 0.25}, FOUND, reference)
        assert (gate.value, gate.ok) == (value, ok)


def test_without_limits_there_are_no_gates() -> None:
    assert check_gates({}, FOUND, None) == []


@pytest.mark.parametrize(
    ("images", "task", "blind"),
    [
        (replace(IMAGES, truth=None), TASK, {"max_psnr_drop", "min_psnr_gain"}),
        (IMAGES, replace(TASK, reference=None, bicubic=None), {"max_psnr_drop", "min_psnr_gain"}),
        (IMAGES, None, {"max_psnr_drop", "min_psnr_gain"}),
        (replace(IMAGES, ssim=None), TASK, {"min_ssim"}),
    ],
)
def test_a_quality_of_images_that_is_not_known_breaks_its_gate(
    images: ImageFindings, task: ImageTask | None, blind: set[str]
) -> None:
    lax: dict[str, float] = {"min_psnr": 0, "min_ssim": 0, "max_psnr_drop": 99, "min_psnr_gain": -99}
    gates = check_gates(lax, replace(FOUND, images=images), None, task)
    assert {gate.name for gate in gates if not gate.ok} == {gate.name for gate in gates if gate.value is None} == blind


def test_a_candidate_may_be_nearer_to_the_truth_than_its_reference() -> None:
    better = replace(FOUND, images=replace(IMAGES, truth=TruthScores(35, None, [])))
    for limit, ok in ((0, True), (-1, True), (-1.1, False)):
        assert check_gates({"max_psnr_drop": limit}, better, None, TASK)[0].ok is ok


def test_the_gates_of_a_card_are_read_and_an_option_replaces_one_of_them() -> None:
    card = read_gates("miniseal:int8", ["min_cosine=0.5", "min_accuracy_under:jpeg-50=0.1", "min_speedup=2"])
    under = {"jpeg-80": 0.99, "resize-0.75": 0.98} | {f"{kind}-{times}": 0.98 for kind in ("brightness", "contrast")
                                                     for times in ("1.25", "0.75")}  # fmt: skip
    assert card == {
        "max_size_mb": 0.55,
        "min_cosine": 0.5,
        "min_bit_accuracy": 0.999,
        "max_accuracy_drop": 0.005,
        "min_auc": 0.995,
        "min_accuracy_under:jpeg-50": 0.1,
        **{f"min_accuracy_under:{attack}": share for attack, share in under.items()},
        "min_speedup": 2,
    }
    assert read_gates("miniseal:int8", [])["min_cosine"] == 0.999
    assert read_gates(None, ["min_cosine=0.5"]) == {"min_cosine": 0.5}
    assert read_gates(None, []) == {}


def test_a_card_of_ones_own_is_read_by_its_path(tmp_path: Path) -> None:
    path = write_card(tmp_path / "own.toml")
    path.write_text(path.read_text() + "\n[gates.fp16]\nmax_latency_ms = 3\n")
    assert read_gates(f"{path}:fp16", []) == {"max_latency_ms": 3}


@pytest.mark.parametrize(
    ("card", "texts", "reason"),
    [
        ("miniseal", [], "--gates names no recipe; got miniseal; expected CARD:RECIPE"),
        ("miniseal:int4", [], "the card has no gates for this recipe; got int4; expected fp16, fp32, int8"),
        ("absent:int8", [], "absent"),
        (None, ["min_sharpness=1"], "no such gate; expected NAME=VALUE, NAME one of max_accuracy_drop, max_error, "),
        (None, ["min_cosine=0.5", "min_cosine=0.6"], "the gate has a limit already"),
    ],
)
def test_gates_that_are_none_are_errors_in_one_line(card: str | None, texts: list[str], reason: str) -> None:
    with pytest.raises(ToolError, match=reason) as caught:
        read_gates(card, texts)
    assert "\n" not in str(caught.value)


def measurable(gates: dict[str, float], *, has_messages: bool = True, has_ground_truth: bool = True) -> None:
    attacks = [Attack("jpeg", 50), Attack("crop", 0.9)]
    require_measurable(gates, attacks, has_messages=has_messages, has_ground_truth=has_ground_truth, has_embedders=has_messages)


def test_gates_on_values_that_are_measured_pass() -> None:
    measurable({f"{UNDER}:jpeg-50": 0.97, f"{UNDER}:crop-0.9": 0, "max_psnr_drop": -1})
    measurable({name: 1 for name in GATES if name != UNDER})
    measurable(
        {name: 1 for name in GATES if name not in (*OF_MESSAGES, *OF_GROUND_TRUTH, *OF_MARKING)},
        has_messages=False,
        has_ground_truth=False,
    )


@pytest.mark.parametrize("name", [f"{UNDER}:jpeg-50", *(name for name in OF_MESSAGES if name != UNDER), *OF_GROUND_TRUTH])
def test_gates_on_values_that_are_not_measured_are_errors(name: str) -> None:
    needed = "the ground truth" if name in OF_GROUND_TRUTH else "images whose messages are known; give --messages FILE"
    with pytest.raises(ToolError, match=f"--gate {name.partition(':')[0]} needs {needed}"):
        measurable({name: 1}, has_messages=False, has_ground_truth=False)


@pytest.mark.parametrize(
    ("name", "limit", "reason"),
    [
        (f"{UNDER}:jpeg-60", 0.9, "this attack is not run; expected one of jpeg-50, crop-0.9"),
        (UNDER, 0.9, "this attack is not run"),
        ("min_speedup:jpeg-50", 0.9, "nothing follows min_speedup.* an output after min_cosine and max_error; write min_speedup"),
        *((f"{name}{':jpeg-50' * (name == UNDER)}", limit, "a share from 0 to 1") for name in SHARES for limit in (-0.1, 1.1)),
        ("min_speedup", -1, "expected a finite number of 0 or more"),
        ("max_size_mb", float("inf"), "expected a finite number of 0 or more"),
        ("max_psnr_drop", float("inf"), "expected a finite number; correct"),
        (f"{UNDER}:jpeg-50", float("nan"), "a share from 0 to 1"),
    ],
)
def test_limits_that_no_value_can_have_are_errors(name: str, limit: float, reason: str) -> None:
    with pytest.raises(ToolError, match=reason):
        measurable({name: limit})


def test_a_gate_can_be_on_one_output() -> None:
    boxes = OutputError("boxes", relative_error=0.001, worst_cosine=0.999)
    scores = OutputError("scores", relative_error=0.2, worst_cosine=0.9)
    found = replace(FOUND, errors=[boxes, scores])
    for gates, expected in (
        ({"max_error:boxes": 0.01}, [(0.001, True)]),
        ({"max_error:scores": 0.01, "min_cosine:scores": 0.9}, [(0.2, False), (0.9, True)]),
        ({"max_error": 0.01, "min_cosine": 0.95}, [(0.2, False), (0.9, False)]),  # without a name the worst one decides
    ):
        measurable(gates)
        assert [(gate.value, gate.ok) for gate in check_gates(gates, found, REFERENCE)] == expected
    (gate,) = check_gates({"max_error:boxes": 1}, replace(FOUND, errors=[]), REFERENCE)
    assert (gate.value, gate.ok) == (None, False)
    zeros = replace(FOUND, errors=[OutputError("mask", relative_error=0.0), scores])
    assert check_gates({"min_cosine:mask": 0.9}, zeros, REFERENCE)[0].ok
    with pytest.raises(ToolError, match="no such output; expected boxes, scores"):
        check_gates({"min_cosine:masks": 0.9}, found, REFERENCE)


def test_parts_of_a_cards_gate_get_names_of_their_own() -> None:
    table = {"min_cosine": 0.99, "min_accuracy_under": {"jpeg-50": 0.97, "resize-0.75": 1}, "min_auc": None}
    assert flat_gates(table) == {
        "min_cosine": 0.99,
        "min_accuracy_under:jpeg-50": 0.97,
        "min_accuracy_under:resize-0.75": 1.0,
        "min_auc": None,
    }
