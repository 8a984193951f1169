"""Attacks change images of 8 bits according to their names, repeatably."""

import numpy as np
import pytest

from shared.command.errors import ToolError
from shared.media.attacks import KINDS, LIMITS, STANDARD, Attack
from shared.media.images import Pixels, to_image
from shared.metrics import metrics
from tools.compare.accuracy import parse_attacks
from tools.prepare_calibration.sources import seeded_image


@pytest.fixture(scope="module")
def picture() -> Pixels:
    image = seeded_image(64, np.random.default_rng(0))[0].transpose(1, 2, 0)
    return np.asarray(np.rint(255 * image), np.uint8)


def psnr(reference: Pixels, candidate: Pixels) -> float:
    return metrics.psnr_db(to_image(reference), to_image(candidate))


@pytest.mark.parametrize("attack", STANDARD, ids=lambda attack: attack.name)
def test_a_standard_attack_changes_pixels_repeatably(attack: Attack, picture: Pixels) -> None:
    once, again = attack(picture), attack(picture)
    assert (once.dtype, once.shape[2]) == (np.uint8, 3)
    np.testing.assert_array_equal(once, again)
    assert once.shape != picture.shape or (once != picture).any()


@pytest.mark.parametrize(
    ("milder", "harder"),
    [("jpeg-90", "jpeg-30"), ("resize-0.9", "resize-0.3"), ("blur-0.5", "blur-2"), ("noise-0.01", "noise-0.1")],
)
def test_a_harder_attack_has_a_lower_psnr(milder: str, harder: str, picture: Pixels) -> None:
    (mild,), (hard,) = parse_attacks(milder), parse_attacks(harder)
    assert psnr(picture, mild(picture)) > psnr(picture, hard(picture))


def test_brightness_and_contrast_multiply(picture: Pixels) -> None:
    darker = Attack("brightness", 0.5)(picture)
    np.testing.assert_allclose(darker, picture / 2, atol=1)
    flat = np.full((8, 8, 3), 100, np.uint8)
    np.testing.assert_array_equal(Attack("contrast", 2)(flat), flat)


def test_a_crop_is_a_part_of_the_image_and_its_place_depends_on_the_seed(picture: Pixels) -> None:
    parts = [Attack("crop", 0.5, seed)(picture) for seed in range(4)]
    assert all(part.shape == (32, 32, 3) for part in parts)
    windows = np.lib.stride_tricks.sliding_window_view(picture, (32, 32, 3)).reshape(-1, 32, 32, 3)
    assert all((windows == part).all(axis=(1, 2, 3)).any() for part in parts)
    assert len({part.tobytes() for part in parts}) > 1


def test_noise_has_the_given_strength() -> None:
    flat = np.full((128, 128, 3), 128, np.uint8)
    assert float(Attack("noise", 0.04)(flat).std()) == pytest.approx(0.04 * 255, rel=0.05)


def test_attacks_are_read_from_their_names() -> None:
    assert parse_attacks("none") == []
    assert parse_attacks("standard") == list(STANDARD)
    assert [attack.name for attack in parse_attacks("jpeg-50, crop-0.9")] == ["jpeg-50", "crop-0.9"]
    assert KINDS.keys() == LIMITS.keys()
    assert Attack("noise", 0.01000001).name == "noise-0.01000001"
    with pytest.raises(ToolError, match="named twice"):
        parse_attacks("jpeg-50,jpeg-50.0")


@pytest.mark.parametrize("text", ["jpg-50", "jpeg", "jpeg-0", "jpeg-101", "crop-0", "noise-nan", "blur-inf", "", "resize-2"])
def test_a_wrong_attack_is_an_error_with_a_list_of_known_attacks(text: str) -> None:
    with pytest.raises(ToolError, match=r"unknown attack.*jpeg-1 to 100"):
        parse_attacks(text)
