"""The alarm trips on outputs that are far from the original's, with a lower limit where inputs are made up."""

import pytest

from shared.metrics.alarm import alarms, describe_alarms
from shared.metrics.output_error import OutputError


def error(cosine: float | None = 1.0, psnr_db: float | None = None, values: int = 10) -> OutputError:
    return OutputError("y", 0.1, cosine, psnr_db=psnr_db, values=values)


@pytest.mark.parametrize(
    ("found", "is_made_up", "broken"),
    [
        (error(0.95), False, ""),
        (error(0.949), False, "min_cosine:y"),
        (error(0.76), True, ""),
        (error(0.74), True, "min_cosine:y"),
        (error(0.1, values=1), True, ""),
        (error(0.1, values=1), False, "min_cosine:y"),
        (error(0.99, psnr_db=24.9), False, "min_psnr:y"),
        (error(0.1, psnr_db=25.0), True, ""),
        (error(None), False, ""),
    ],
)
def test_an_output_is_far_off_below_its_limit(found: OutputError, is_made_up: bool, broken: str) -> None:
    gates = alarms([error(), found], is_made_up=is_made_up)
    assert [gate.name for gate in gates] == ([broken] if broken else [])
    assert not any(gate.ok for gate in gates)


def test_the_remedies_name_the_worst_layers_and_real_inputs() -> None:
    assert not describe_alarms([error()], [], is_made_up=False)
    text = describe_alarms([error(0.1)], ["conv1", "conv7"], is_made_up=True)
    assert text.startswith("LARGE ERROR: min_cosine:y 0.1, limit 0.75; try --calibration")
    assert "--exclude for conv1, conv7, which do most" in text
    assert "--calibration" not in describe_alarms([error(0.1)], [], is_made_up=False)
    assert "--sensitivity" in describe_alarms([error(0.1)], [], is_made_up=False)
