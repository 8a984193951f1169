"""`python -m tools.prepare_calibration`."""

from shared.command.cli import run
from tools.prepare_calibration.command import prepare_calibration

run(prepare_calibration)
