"""`python -m tools.compare`."""

from shared.command.cli import run
from tools.compare.command import compare

run(compare)
