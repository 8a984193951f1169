"""A detector with a vision transformer converts to both formats, is quantized whole, and takes images of its own size."""

from pathlib import Path

import pytest

from shared.command.errors import ToolError
from shared.formats.model_file import ModelFile
from shared.networks.card import load_card
from shared.networks.detector import detector_shapes
from tests.conftest import Small
from tools.compare import compare
from tools.convert_detector import convert_detector
from tools.convert_detector.command import Precision
from tools.convert_detector.request import weights_bytes


def test_it_converts_and_is_quantized_to_int8_in_every_layer(videoseal_0_small: Small, tmp_path: Path) -> None:
    given = {"model": str(videoseal_0_small.card), "checkpoint": videoseal_0_small.checkpoint}
    done = convert_detector(**given, quantize=Precision.INT8, output=tmp_path / "int8.tflite")
    assert done.float_model.agreement.relative_error < 1e-4
    assert done.quantized_product is not None
    ops = ModelFile(done.quantized_product.path).ops
    assert {op.dtype for op in ops if op.op_type in ("CONV_2D", "FULLY_CONNECTED")} == {"INT8"}
    assert "GATHER" not in {op.op_type for op in ops}
    assert compare(done.float_product.path, [done.quantized_product.path], gate=["min_cosine=0.98"]).ok


def test_it_converts_to_onnx_for_any_number_of_images(videoseal_0_small: Small, tmp_path: Path) -> None:
    given = {"model": str(videoseal_0_small.card), "checkpoint": videoseal_0_small.checkpoint}
    done = convert_detector(**given, output=tmp_path / "m.onnx", dynamic_batch=True)
    assert done.float_model.agreement.relative_error < 1e-4


def test_images_of_another_size_are_refused_or_resized(videoseal_0_small: Small, tmp_path: Path) -> None:
    given = {"model": str(videoseal_0_small.card), "checkpoint": videoseal_0_small.checkpoint, "image_size": 96}
    with pytest.raises(ToolError, match="takes images of one size; got 96; expected 64"):
        convert_detector(**given, output=tmp_path / "m.tflite")
    assert convert_detector(**given, simple=False, output=tmp_path / "m.tflite").float_model.agreement.relative_error < 1e-4


@pytest.mark.parametrize("name", ["videoseal", "chunkyseal", "videoseal_0.0"])
def test_the_size_of_the_weights_is_known_from_the_card(name: str) -> None:
    card = load_card(name)
    exact = 4 * sum(map(_size, detector_shapes(card).values()))
    assert 0.98 * exact < weights_bytes(card) < 1.02 * exact


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for axis in shape:
        size *= axis
    return size
