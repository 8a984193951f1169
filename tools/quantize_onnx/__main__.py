"""`python -m tools.quantize_onnx`."""

from shared.command.cli import run
from tools.quantize_onnx.command import quantize_onnx

run(quantize_onnx)
