"""Metrics have known values, and nothing hides a NaN."""

import math

import numpy as np
import pytest

from shared.metrics import metrics

METRICS = [metrics.max_abs_error, metrics.relative_error, metrics.cosine]


def test_metrics_have_known_values() -> None:
    a, b = np.array([3.0, 4.0], np.float32), np.array([3.0, 5.0], np.float32)
    assert metrics.max_abs_error(a, b) == 1
    assert metrics.relative_error(a, b) == pytest.approx(1 / 5)
    assert metrics.cosine(a, b) == pytest.approx(29 / (5 * math.sqrt(34)))
    assert metrics.cosine(a, -a) == -1


def test_equal_arrays_are_perfect_even_when_all_zero() -> None:
    for a in (np.array([1.0, -2.0]), np.zeros(2)):
        assert (metrics.max_abs_error(a, a), metrics.relative_error(a, a), metrics.cosine(a, a)) == (0, 0, pytest.approx(1))


def test_anything_against_zero_is_far_off() -> None:
    with pytest.raises(ValueError, match="all zero"):
        metrics.relative_error(np.zeros(2), np.ones(2))
    assert metrics.cosine(np.zeros(2), np.ones(2)) == 0


@pytest.mark.parametrize("metric", [*METRICS, metrics.bit_agreement])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_raise(metric: object, bad: float) -> None:
    good, broken = np.ones((1, 3)), np.array([[1.0, bad, 1.0]])
    for pair in ((good, broken), (broken, good), (broken, broken)):
        with pytest.raises(ValueError, match="NaN or infinite"):
            metric(*pair)  # type: ignore[operator]


@pytest.mark.parametrize("metric", [*METRICS, metrics.bit_agreement])
def test_shapes_must_be_the_same(metric: object) -> None:
    with pytest.raises(ValueError, match=r"\(1, 3\) and \(3, 1\)"):
        metric(np.ones((1, 3)), np.ones((3, 1)))  # type: ignore[operator]


def test_bits_are_logits_above_zero_and_confidence_is_no_bit() -> None:
    one = np.array([[9.0, 0.5, -0.5, 0.0, 2.0]])
    other = np.array([[-9.0, 0.1, 0.1, -1.0, 3.0]])
    assert metrics.message_bits(one).tolist() == [[True, False, False, True]]
    assert metrics.bit_agreement(one, other) == 0.75


def test_psnr_is_of_the_mean_square_error() -> None:
    black = np.zeros((1, 3, 8, 8), np.float32)
    assert metrics.psnr_db(black, black) == float("inf")
    assert metrics.psnr_db(black, black + 0.01) == pytest.approx(40, abs=1e-4)
    assert metrics.psnr_db(black, black + 2.55, peak=255) == pytest.approx(40, abs=1e-4)
    with pytest.raises(ValueError, match="NaN"):
        metrics.psnr_db(black, black * np.nan)
