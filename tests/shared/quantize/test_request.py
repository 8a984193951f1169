"""Limits on outputs: how they are given, which outputs they hold for, and how much of them an error takes."""

import math
from dataclasses import replace

import pytest

from shared.command.errors import ToolError
from shared.metrics.output_error import OutputError
from shared.quantize.request import ALL_OUTPUTS, Limits, parse_max_error

NEAR = OutputError("y", 0.01, 0.9999, 0.1, 40.0, 42.0, 41.0, worst_cosine=0.9999)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["0.01"], {ALL_OUTPUTS: 0.01}),
        (["1e-2", "logits=0.5"], {ALL_OUTPUTS: 0.01, "logits": 0.5}),
        (["0.5", "0.01"], {ALL_OUTPUTS: 0.01}),
        (["a=b=0.5"], {"a=b": 0.5}),
        ([], {}),
    ],
)
def test_a_limit_is_for_every_output_or_for_the_one_it_names(texts: list[str], expected: dict[str, float]) -> None:
    assert parse_max_error(texts) == expected


@pytest.mark.parametrize("text", ["0", "-0.1", "nan", "inf", "much", "", "logits=0", "logits=much"])
def test_a_limit_that_is_no_positive_number_is_refused(text: str) -> None:
    with pytest.raises(ToolError, match="--max-error is no positive number; got"):
        parse_max_error([text])


@pytest.mark.parametrize("text", ["=0.01", "logits=", "="])
def test_a_limit_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ToolError, match="not of the form --max-error X or OUTPUT=X"):
        parse_max_error([text])


@pytest.mark.parametrize("name", ["min_psnr", "min_cosine"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_least_value_that_is_not_finite_is_refused(name: str, value: float) -> None:
    with pytest.raises(ToolError, match=f"--{name.replace('_', '-')} is not finite"):
        Limits(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("limits", "asked"),
    [(Limits(), False), (Limits({ALL_OUTPUTS: 1.0}), True), (Limits(min_psnr=0.0), True), (Limits(min_cosine=0.0), True)],
)
def test_limits_are_true_where_one_is_given(limits: Limits, asked: bool) -> None:
    assert bool(limits) is asked


@pytest.mark.parametrize(
    ("limits", "share"),
    [
        (Limits({ALL_OUTPUTS: 0.05}), 0.2),
        (Limits({"y": 0.02, ALL_OUTPUTS: 1.0}), 0.5),  # its own limit before the common one
        (Limits({"z": 0.001}), 0.0),
        (Limits(min_psnr=36.0), 10 ** (-6 / 20)),  # six decibels to spare: half the noise
        (Limits(min_cosine=0.99), 0.1),  # the square root of the angles' ratio: 1e-4 to 1e-2
        (Limits({ALL_OUTPUTS: 0.05}, 36.0, 0.99), 10 ** (-6 / 20)),
    ],
)
def test_a_share_is_that_of_the_limit_which_is_nearest(limits: Limits, share: float) -> None:
    assert limits.share([NEAR]) == pytest.approx(share)
    assert limits.keeps([NEAR])


@pytest.mark.parametrize(
    "limits", [Limits({ALL_OUTPUTS: 0.009}), Limits(min_psnr=42.1), Limits(min_cosine=0.99995), Limits(min_cosine=1.0)]
)
def test_an_error_beyond_its_limit_takes_more_than_all_of_it(limits: Limits) -> None:
    assert limits.share([NEAR]) > 1
    assert not limits.keeps([NEAR])
    assert not limits.keeps([replace(NEAR, output="x", relative_error=0.0, cosine=1.0, psnr_db=200.0), NEAR])


def test_a_cosine_of_one_is_kept_by_equal_outputs_alone() -> None:
    assert Limits(min_cosine=1.0).share([replace(NEAR, worst_cosine=1.0)]) == 0


@pytest.mark.parametrize(
    "errors", [[], [OutputError("y", problem="an output holds NaN or infinite values")], [NEAR, replace(NEAR, problem="no")]]
)
def test_outputs_that_cannot_be_compared_keep_no_limit(errors: list[OutputError]) -> None:
    assert Limits({ALL_OUTPUTS: 1e9}).share(errors) == math.inf


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        (Limits({"x": 0.1, "z": 0.1, ALL_OUTPUTS: 0.1}), "m: no such output; got x, z; expected one of y, logits"),
        (Limits({"y": 0.1}), "m: an output has no limit; got logits; give it one with --max-error"),
        (Limits(min_psnr=40.0), "m: --min-psnr is for models that make images; use --min-cosine"),
    ],
)
def test_limits_that_do_not_fit_the_outputs_are_refused(limits: Limits, says: str) -> None:
    with pytest.raises(ToolError, match=says):
        limits.require_outputs(["y", "logits"], [False, False], "m")


@pytest.mark.parametrize(
    "limits", [Limits({ALL_OUTPUTS: 0.1}), Limits({"y": 0.1, "logits": 1.0}), Limits(min_psnr=40.0), Limits(min_cosine=0.9)]
)
def test_limits_that_fit_the_outputs_are_taken(limits: Limits) -> None:
    limits.require_outputs(["y", "logits"], [True, False], "m")
