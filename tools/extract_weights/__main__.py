"""`python -m tools.extract_weights`."""

from shared.command.cli import run
from tools.extract_weights.command import extract_weights

run(extract_weights)
