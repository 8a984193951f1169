"""`python -m tools.convert_embedder`."""

from shared.command.cli import run
from tools.convert_embedder.command import convert_embedder

run(convert_embedder)
