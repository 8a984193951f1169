"""A limit is kept at its very value, broken beyond it, and broken by what could not be measured."""

from dataclasses import replace

import pytest

from shared.command.errors import ToolError
from shared.media.attacks import Attack
from tests.tools.compare.test_comparison import accuracy, candidate
from tools.compare.comparison import ImageFindings, ImageTask
from tools.compare.gates import Limits, limits_under_attack
from tools.compare.image_quality import TruthScores

FOUND = candidate("a.tflite", 2**20, 4)  # 1 MiB, 4 ms, cosine 0.5, speed-up 2, 75 % of the bits right, 37.5 % under jpeg-50


@pytest.mark.parametrize(
    ("name", "at", "beyond"),
    [
        ("min_cosine", 0.5, 0.51),
        ("min_bit_agreement", 0.9, 0.91),
        ("min_speedup", 2, 2.1),
        ("max_size_mb", 1, 0.9),
        ("max_latency_ms", 4, 3.9),
        ("min_bit_accuracy", 0.75, 0.76),
        ("min_auc", 1, 1.1),
    ],
)
def test_a_limit_is_kept_at_its_value_and_broken_beyond(name: str, at: float, beyond: float) -> None:
    for limit, ok in ((at, True), (beyond, False)):
        (gate,) = Limits({name: limit}, {}).gates(FOUND, None)
        assert (gate.name, gate.value, gate.limit, gate.ok) == (name, pytest.approx(at), limit, ok)
    blind = replace(FOUND, measured=None, cosine=None, bit_agreement=None, speedup=None, accuracy=None)
    if name != "max_size_mb":  # a file always has a size
        assert not Limits({name: at}, {}).gates(blind, None)[0].ok


def test_limits_under_attack_are_kept_and_broken() -> None:
    for limit, ok in ((0.375, True), (0.38, False)):
        (gate,) = Limits({}, {"jpeg-50": limit}).gates(FOUND, None)
        assert (gate.name, gate.value, gate.ok) == ("min_accuracy_under jpeg-50", 0.375, ok)


def test_a_drop_needs_a_reference_that_reads_something() -> None:
    many = replace(accuracy(1), logits=[[0.0] * 32] * 4)
    for reference, value, ok in ((many, 0.25, True), (accuracy(0.5), None, False), (None, None, False)):
        (gate,) = Limits({"max_accuracy_drop": 0.25}, {}).gates(FOUND, reference)
        assert (gate.value, gate.ok) == (value, ok)


def test_limits_that_are_not_asked_for_are_no_gates() -> None:
    assert Limits({"min_cosine": None}, {}).gates(FOUND, None) == []


def test_limits_under_attack_are_read() -> None:
    attacks = [Attack("jpeg", 50), Attack("crop", 0.9)]
    assert limits_under_attack(["jpeg-50=0.97", "crop-0.9=0"], attacks) == {"jpeg-50": 0.97, "crop-0.9": 0}
    for text, reason in (
        ("jpeg-60=0.9", "not run"),
        ("jpeg-50", "no limit"),
        ("jpeg-50=2", "no limit"),
        ("jpeg-50=nan", "no limit"),
    ):
        with pytest.raises(ToolError, match=reason):
            limits_under_attack([text], attacks)
    with pytest.raises(ToolError, match="a limit for this attack already"):
        limits_under_attack(["jpeg-50=0.9", "jpeg-50=0.1"], attacks)


IMAGES = ImageFindings(psnr_db=40, worst_psnr_db=30, ssim=0.9, truth=TruthScores(33, 0.8, []), samples=[])
TASK = ImageTask([], [], reference=TruthScores(34, 0.8, []), bicubic=TruthScores(31, 0.7, []))


@pytest.mark.parametrize(
    ("name", "at", "beyond"),
    [("min_psnr", 40, 40.1), ("min_ssim", 0.9, 0.91), ("max_psnr_drop", 1, 0.9), ("min_psnr_gain", 2, 2.1)],
)
def test_a_limit_on_images_is_kept_at_its_value_and_broken_beyond(name: str, at: float, beyond: float) -> None:
    for limit, ok in ((at, True), (beyond, False)):
        (gate,) = Limits({name: limit}, {}).gates(replace(FOUND, images=IMAGES), None, TASK)
        assert (gate.name, gate.value, gate.limit, gate.ok) == (name, pytest.approx(at), limit, ok)
    assert not Limits({name: at}, {}).gates(FOUND, None, TASK)[0].ok, "the candidate makes no images"


@pytest.mark.parametrize(
    ("images", "task", "blind"),
    [
        (replace(IMAGES, truth=None), TASK, {"max_psnr_drop", "min_psnr_gain"}),
        (IMAGES, replace(TASK, reference=None, bicubic=None), {"max_psnr_drop", "min_psnr_gain"}),
        (IMAGES, None, {"max_psnr_drop", "min_psnr_gain"}),
        (replace(IMAGES, ssim=None), TASK, {"min_ssim"}),
    ],
)
def test_what_is_not_known_of_images_breaks_its_limit(images: ImageFindings, task: ImageTask | None, blind: set[str]) -> None:
    lax: dict[str, float | None] = {"min_psnr": 0, "min_ssim": 0, "max_psnr_drop": 99, "min_psnr_gain": -99}
    gates = Limits(lax, {}).gates(replace(FOUND, images=images), None, task)
    assert {gate.name for gate in gates if not gate.ok} == {gate.name for gate in gates if gate.value is None} == blind


def test_a_candidate_may_be_nearer_to_the_truth_than_its_reference() -> None:
    better = replace(FOUND, images=replace(IMAGES, truth=TruthScores(35, None, [])))
    for limit, ok in ((0, True), (-1, True), (-1.1, False)):
        assert Limits({"max_psnr_drop": limit}, {}).gates(better, None, TASK)[0].ok is ok
