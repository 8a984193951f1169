"""`python -m tools.quantize_tflite`."""

from shared.command.cli import run
from tools.quantize_tflite.command import quantize_tflite

run(quantize_tflite)
