"""Outputs are compared over all samples, and an output that cannot be compared is a problem, never a number."""

import math
from dataclasses import fields

import numpy as np
import pytest

from shared.metrics.metrics import psnr_db
from shared.metrics.output_error import (
    MOST_DB,
    Array,
    OutputError,
    measure_error,
    measure_errors,
    size_of,
    usual_range,
    worst_error,
)
from tests.support.small_onnx import seeded

PICTURES = [seeded(1, 3, 8, 8, seed=number) for number in range(3)]


def moved(steps: list[float]) -> list[Array]:
    """Return the pictures, each moved by a constant."""
    return [picture + np.float32(step) for picture, step in zip(PICTURES, steps, strict=True)]


def vectors(*values: list[float]) -> list[Array]:
    return [np.array(value, np.float64) for value in values]


def numbers(error: OutputError) -> dict[str, float]:
    """Return everything that the error gives as a number."""
    values = {entry.name: getattr(error, entry.name) for entry in fields(error) if entry.name not in {"output", "problem"}}
    return {name: value for name, value in values.items() if value is not None}


def test_equal_outputs_are_at_the_end_of_every_scale() -> None:
    error = measure_error("made", PICTURES, [picture.copy() for picture in PICTURES], 1.0)
    assert (error.output, error.relative_error, error.max_abs_error, error.snr_db) == ("made", 0, 0, None)
    assert (error.psnr_db, error.worst_psnr_db, error.problem) == (MOST_DB, MOST_DB, "")
    assert error.cosine == pytest.approx(1)


def test_relative_error_snr_and_cosine_follow_their_formulas() -> None:
    error = measure_error("out", vectors([3, 4], [0, 1]), vectors([3, 4.5], [0.1, 1]))
    # Norms of the reference 5 and 1: root mean square sqrt(13); norms of the differences 0.5 and 0.1.
    assert error.relative_error == pytest.approx(0.5 / math.sqrt(13))
    assert error.snr_db == pytest.approx(10 * math.log10(26 / 0.26))
    assert error.cosine == pytest.approx(28 / math.sqrt(26 * 30.26))
    assert error.worst_cosine == pytest.approx(1 / math.sqrt(1.01))  # the second sample's; the first's is 27 / (5 sqrt(29.25))
    assert error.mean_error == pytest.approx(0.1)
    assert error.max_abs_error == pytest.approx(0.5)


def test_the_worst_sample_decides_the_relative_error_and_has_a_cosine_of_its_own() -> None:
    error = measure_error("out", vectors(*[[1, 0]] * 4), vectors(*[[1, 0]] * 3, [1, 0.5]))
    assert error.relative_error == pytest.approx(0.5)
    assert error.snr_db == pytest.approx(10 * math.log10(4 / 0.25))
    assert error.worst_cosine == pytest.approx(1 / math.sqrt(1.25))
    assert error.cosine == pytest.approx(4 / math.sqrt(4 * 4.25))


def test_a_single_small_sample_is_not_measured_by_itself() -> None:
    error = measure_error("out", vectors([10], [0.001]), vectors([10], [0.002]))
    assert error.relative_error == pytest.approx(0.001 / math.sqrt(50), rel=1e-3)


def test_an_output_of_opposite_sign_has_cosine_minus_one() -> None:
    error = measure_error("out", vectors([1, 2]), vectors([-1, -2]))
    assert error.cosine == pytest.approx(-1)
    assert error.relative_error == pytest.approx(2)


def test_integers_are_compared_as_numbers() -> None:
    error = measure_error("out", [np.array([0, 200], np.uint8)], [np.array([200, 0], np.uint8)])
    assert error.relative_error == pytest.approx(math.sqrt(2))
    assert error.max_abs_error == 200
    assert error.cosine == pytest.approx(0)


def test_a_candidate_of_zeros_lost_everything() -> None:
    error = measure_error("out", vectors([3, 4]), vectors([0, 0]))
    assert error.relative_error == pytest.approx(1)
    assert error.snr_db == pytest.approx(0)
    assert error.cosine == 0


def test_a_reference_of_zeros_has_no_relative_error() -> None:
    zeros = vectors([0, 0, 0])
    error = measure_error("out", zeros, vectors([0, 0.1, 0]))
    assert (error.relative_error, error.snr_db, error.cosine) == (None, None, 0)
    assert error.problem == "the reference's values are all zero, the candidate's are not"
    assert measure_error("out", zeros, zeros) == OutputError("out", 0.0, None, 0.0, values=3)


def test_a_sample_of_zeros_on_both_sides_has_no_cosine_and_leaves_those_of_others() -> None:
    error = measure_error("out", vectors([0, 0], [1, 1]), vectors([0, 0], [1, 1]))
    assert error.cosine == pytest.approx(1)


@pytest.mark.parametrize(("peak", "expected"), [(1.0, 20.0), (255.0, 20 + 20 * np.log10(255))])
def test_psnr_is_that_of_the_peak(peak: float, expected: float) -> None:
    error = measure_error("made", PICTURES, moved([0.1, 0.1, 0.1]), peak)
    assert error.psnr_db == pytest.approx(expected, abs=1e-3)
    assert error.psnr_db == pytest.approx(psnr_db(PICTURES[0], moved([0.1] * 3)[0], peak), abs=1e-3)


def test_psnr_is_of_all_samples_together_and_the_worst_is_given_too() -> None:
    error = measure_error("made", PICTURES, moved([0.1, 0.0, 0.2]), 1.0)
    assert error.psnr_db == pytest.approx(10 * np.log10(3 / (0.1**2 + 0.2**2)), abs=1e-3)
    assert error.worst_psnr_db == pytest.approx(10 * np.log10(1 / 0.2**2), abs=1e-3)


def test_large_samples_count_for_their_size_in_psnr() -> None:
    reference = [np.ones((1, 1, 1, 1), np.float32), np.ones((1, 1, 1, 3), np.float32)]
    candidate = [np.full((1, 1, 1, 1), 2, np.float32), np.ones((1, 1, 1, 3), np.float32)]
    assert measure_error("made", reference, candidate, 1.0).psnr_db == pytest.approx(10 * np.log10(4))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["reference", "candidate"])
@pytest.mark.parametrize("peak", [None, 1.0])
def test_values_that_are_not_finite_are_a_problem_and_no_number(value: float, side: str, peak: float | None) -> None:
    good, bad = vectors([1, 1, 1], [1, 1, 1]), vectors([1, 1, 1], [1, value, 1])
    pair = (bad, good) if side == "reference" else (good, bad)
    assert measure_error("out", *pair, peak) == OutputError("out", problem="an output holds NaN or infinite values")


@pytest.mark.parametrize("peak", [None, 1.0])
def test_another_shape_is_a_problem_and_no_number(peak: float | None) -> None:
    """Also where numpy would broadcast one to the other."""
    for reference, candidate in (((1, 3), (3, 1)), ((1, 3, 8, 8), (1, 2, 8, 8)), ((1, 0), (1, 2)), ((4,), (1, 4))):
        error = measure_error("out", [np.ones(reference)], [np.ones(candidate)], peak)
        assert numbers(error) == {"left_out": 0, "values": 0}
        assert error.problem == f"outputs differ in shape: {reference} and {candidate}"
    several = measure_error("out", [np.ones(2), np.ones(2)], [np.ones(3), np.ones(3)])
    assert several.problem == "outputs differ in shape: (2,) and (3,)"


def test_samples_of_another_length_are_left_out_and_counted() -> None:
    """Boxes that are kept: their number follows from scores near a threshold."""
    reference, candidate = (
        [np.ones((2, 4)), np.ones((3, 4)), np.ones((0, 4))],
        [np.full((2, 4), 1.5), np.ones((4, 4)), np.ones((0, 4))],
    )
    error = measure_error("boxes", reference, candidate)
    assert (error.max_abs_error, error.left_out, error.problem) == (0.5, 2, "")
    assert str(error).endswith("; 2 samples left out, empty or of another length")
    none = measure_error("boxes", reference[1:], candidate[1:])
    assert (none.relative_error, none.left_out, none.problem) == (None, 2, "")
    assert str(none) == "boxes: empty, or of another length, in every sample"


def test_a_value_that_is_infinite_in_both_does_not_differ() -> None:
    error = measure_error("scores", vectors([1, -math.inf, 2]), vectors([1, -math.inf, 2.5]))
    assert (error.max_abs_error, error.problem) == (0.5, "")
    nan = vectors([1, math.nan])
    assert measure_error("scores", nan, nan).problem == "an output holds NaN or infinite values"


@pytest.mark.parametrize("peak", [None, 1.0])
def test_an_output_that_is_empty_in_every_sample_is_neither_a_problem_nor_a_number(peak: float | None) -> None:
    empty = [np.ones((0, 4)), np.ones((0, 4))]
    assert measure_error("boxes", empty, empty, peak) == OutputError("boxes", left_out=2)
    found = measure_error("boxes", [*empty, np.ones((1, 4))], [*empty, np.full((1, 4), 1.5)], peak)
    assert (found.max_abs_error, found.problem) == (0.5, "")


def test_every_output_is_compared_by_itself_and_its_own_peak() -> None:
    reference = [[picture, np.array([1.0, 0.0])] for picture in PICTURES]
    candidate = [[picture, np.array([1.0, 1.0])] for picture in moved([0.1] * 3)]
    image, vector = measure_errors(["image", "vector"], reference, candidate, [1.0, None])
    assert image == measure_error("image", PICTURES, moved([0.1] * 3), 1.0)
    assert (vector.output, vector.psnr_db, vector.worst_psnr_db) == ("vector", None, None)
    assert vector.relative_error == pytest.approx(1)
    assert vector.cosine == pytest.approx(0.5**0.5)
    assert [error.psnr_db for error in measure_errors(["image", "vector"], reference, candidate)] == [None, None]


def test_another_number_of_samples_or_outputs_is_an_error() -> None:
    samples = [[picture] for picture in PICTURES]
    with pytest.raises(ValueError, match="shorter"):
        measure_errors(["made"], samples, samples[:2])
    with pytest.raises(ValueError, match="longer"):
        measure_errors(["made"], samples, [[picture, picture] for picture in PICTURES])
    with pytest.raises(ValueError, match="longer"):
        measure_errors(["made"], samples, [[picture, picture][: 1 + (place > 0)] for place, picture in enumerate(PICTURES)])


def test_the_worst_output_has_the_largest_error_and_none_at_all_is_larger() -> None:
    small, large, broken = OutputError("a", 0.1), OutputError("b", 0.2), OutputError("c", problem="NaN")
    assert worst_error([small, large]) is large
    assert worst_error([small, broken, large]) is broken
    assert (size_of(large), size_of(broken)) == (0.2, math.inf)


def test_an_error_is_one_line_with_psnr_only_for_images() -> None:
    text = str(measure_error("made", PICTURES, moved([0.1, 0.1, 0.1]), 1.0))
    assert text.startswith("made: relative error ")
    assert text.endswith(", PSNR 20.00 dB (worst sample 20.00)")
    assert ", cosine 0.99" in text
    assert str(measure_error("made", PICTURES, PICTURES)) == (
        "made: relative error 0.000%, cosine 1.000000; worst sample 0.000%, 1.000000"
    )
    assert str(OutputError("made", problem="outputs differ")) == "made: outputs differ"
    zeros = vectors([0, 0])
    assert str(measure_error("made", zeros, zeros)) == "made: relative error 0.000%, cosine -; worst sample 0.000%"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, (0, 1)),
        (0.3, 0.4, (0, 1)),
        (-0.1, 1.2, (0, 1)),
        (-1, 1, (-1, 1)),
        (0, 255, (0, 255)),
        (-20, 260, (0, 255)),
        (-5, 4e3, (-5, 4e3)),
    ],
)
def test_the_usual_range_is_the_narrowest_that_holds_images_with_some_overshoot(
    low: float, high: float, expected: tuple[float, float]
) -> None:
    images = [np.linspace(low, high, 12).reshape(1, 3, 2, 2), np.full((1, 3, 2, 2), low)]
    assert usual_range(images) == expected


def test_a_peak_of_zero_is_that_of_the_references_own_range() -> None:
    reference = [np.linspace(0, 255, 12).reshape(1, 3, 2, 2)]
    candidate = [reference[0] + 1]
    assert measure_error("y", reference, candidate, 0.0) == measure_error("y", reference, candidate, 255.0)
