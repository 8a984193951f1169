"""Answers are compared over all samples, and what is not finite is an error."""

import numpy as np
import pytest

from shared.metrics.fidelity import MOST_DB, measure_fidelity
from shared.metrics.metrics import psnr_db
from tests.support.small_onnx import seeded

PICTURES = [[seeded(1, 3, 8, 8, seed=number)] for number in range(3)]


def moved(by: list[float]) -> list[list[np.ndarray]]:
    """Return the pictures, each moved by a constant."""
    return [[picture + np.float32(step)] for (picture,), step in zip(PICTURES, by, strict=True)]


def test_the_same_answers_are_at_the_end_of_every_scale() -> None:
    found = measure_fidelity(PICTURES, PICTURES, 1.0)
    assert (found.psnr_db, found.worst_psnr_db, found.relative_error) == (MOST_DB, MOST_DB, 0)
    assert found.cosine == pytest.approx(1)


@pytest.mark.parametrize(("peak", "expected"), [(1.0, 20.0), (255.0, 20 + 20 * np.log10(255))])
def test_psnr_is_that_of_the_peak(peak: float, expected: float) -> None:
    found = measure_fidelity(PICTURES, moved([0.1, 0.1, 0.1]), peak)
    assert found.psnr_db == pytest.approx(expected, abs=1e-3)
    assert found.psnr_db == pytest.approx(psnr_db(PICTURES[0][0], moved([0.1] * 3)[0][0], peak), abs=1e-3)


def test_psnr_is_of_all_samples_together_and_the_worst_is_told() -> None:
    found = measure_fidelity(PICTURES, moved([0.1, 0.0, 0.2]), 1.0)
    assert found.psnr_db == pytest.approx(10 * np.log10(3 / (0.1**2 + 0.2**2)), abs=1e-3)
    assert found.worst_psnr_db == pytest.approx(10 * np.log10(1 / 0.2**2), abs=1e-3)


def test_large_samples_count_for_their_size() -> None:
    reference = [[np.zeros((1, 1, 1, 1), np.float32)], [np.zeros((1, 1, 1, 3), np.float32)]]
    candidate = [[np.ones((1, 1, 1, 1), np.float32)], [np.zeros((1, 1, 1, 3), np.float32)]]
    with pytest.raises(ValueError, match="all zero"):
        measure_fidelity(reference, candidate, 1.0)
    reference = [[output + 1 for output in sample] for sample in reference]
    candidate = [[output + 1 for output in sample] for sample in candidate]
    assert measure_fidelity(reference, candidate, 1.0).psnr_db == pytest.approx(10 * np.log10(4))


def test_cosine_and_error_are_of_the_worst_sample_over_all_its_outputs() -> None:
    reference = [[np.array([1.0, 0.0]), np.array([0.0])], [np.array([3.0, 4.0]), np.array([0.0])]]
    candidate = [[np.array([1.0, 0.0]), np.array([1.0])], [np.array([3.0, 4.0]), np.array([0.0])]]
    found = measure_fidelity(reference, candidate)
    assert found.cosine == pytest.approx(0.5**0.5)
    assert found.relative_error == pytest.approx(1.0)
    assert (found.psnr_db, found.worst_psnr_db) == (None, None)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_answers_that_are_not_finite_are_an_error(value: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        measure_fidelity(PICTURES, moved([0, value, 0]), 1.0)


def test_answers_of_another_shape_or_number_are_an_error() -> None:
    with pytest.raises(ValueError, match="shape"):
        measure_fidelity(PICTURES, [[picture[:, :2]] for (picture,) in PICTURES], 1.0)
    with pytest.raises(ValueError, match="shorter"):
        measure_fidelity(PICTURES, PICTURES[:2], 1.0)


def test_it_is_told_in_one_line_with_psnr_only_for_images() -> None:
    text = str(measure_fidelity(PICTURES, moved([0.1, 0.1, 0.1]), 1.0))
    assert text.startswith("PSNR 20.00 dB (worst sample 20.00), cosine 0.99")
    assert str(measure_fidelity(PICTURES, PICTURES)) == "cosine 1.000000, relative error 0.00% at worst"
