"""`python -m tools.convert_detector`."""

from shared.command.cli import run
from tools.convert_detector.command import convert_detector

run(convert_detector)
