"""A model that is slower than its reference is called so, with the reason."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from shared.formats.model_file import ModelFile
from shared.formats.tflite import TfliteContent
from shared.networks.card import load_card
from shared.runtime.benchmark import SLOWER, Measurement
from shared.runtime.model import DetectorCheckpoint
from shared.runtime.speed import NO_FASTER_KERNELS, describe_speed, is_slower, speedup
from tests.support.small_onnx import save

BEFORE = Measurement(Path("model.tflite"), 10, 1, 100.0, 100.0, 3, "xnnpack", 1, ["float32 image of 64 pixels"])
PLAIN = ModelFile(Path("int8.tflite"), TfliteContent([]))


def after(ms: float, **plain_ops: int) -> Measurement:
    return replace(BEFORE, path=Path("int8.tflite"), median_ms=ms, plain_ops=plain_ops)


@pytest.mark.parametrize(
    ("ms", "is_called_slower", "text"),
    [
        (300.0, True, "SLOWER: latency 100.00 -> 300.00 ms, 0.33 times as fast: "),
        (100 * SLOWER + 0.01, True, "SLOWER: latency 100.00 -> 105.01 ms, 0.95 times as fast: "),
        (100 * SLOWER, False, "latency 100.00 -> 105.00 ms, as fast as its reference: "),
        (100.0, False, "latency 100.00 -> 100.00 ms, as fast as its reference: "),
        (100 / SLOWER + 0.01, False, "latency 100.00 -> 95.25 ms, as fast as its reference: "),
    ],
)
def test_slower_begins_above_the_threshold_and_a_model_that_is_not_faster_has_a_reason(
    ms: float, is_called_slower: bool, text: str
) -> None:
    assert is_slower(BEFORE, after(ms)) is is_called_slower
    assert describe_speed(BEFORE, after(ms), PLAIN) == text + NO_FASTER_KERNELS


def test_a_faster_model_needs_no_reason() -> None:
    assert speedup(BEFORE, after(50)) == 2
    for ops in ({}, {"CONV_2D": 9}):
        assert describe_speed(BEFORE, after(50, **ops), PLAIN) == "latency 100.00 -> 50.00 ms, 2.00 times as fast"
    assert describe_speed(BEFORE, after(100 / SLOWER - 0.01), PLAIN).endswith(", 1.05 times as fast")


def test_ops_that_xnnpack_leaves_to_plain_kernels_are_the_reason_with_a_remedy() -> None:
    text = describe_speed(BEFORE, after(300, CONV_2D=2, MUL=1), PLAIN)
    reason = "XNNPACK leaves 2 CONV_2D, 1 MUL to plain kernels; int8-weight-only and fp16 keep float kernels; --rule OP_TYPE=RECIPE"
    assert text.startswith(f"SLOWER: latency 100.00 -> 300.00 ms, 0.33 times as fast: {reason}")


def test_only_ops_beyond_those_of_the_reference_count() -> None:
    before = replace(BEFORE, plain_ops={"MUL": 3, "PACK": 1, "CAST": 5})
    assert "leaves 1 MUL, 1 PAD to" in describe_speed(before, after(300, MUL=4, PACK=1, PAD=1, CAST=4), PLAIN)
    assert describe_speed(before, after(300, MUL=3), PLAIN).endswith(NO_FASTER_KERNELS)


@pytest.mark.parametrize("types", [["float16"], ["float16", "int8"]])
def test_weights_that_are_unpacked_to_float32_are_the_reason(types: list[str]) -> None:
    source = ModelFile(Path("fp16.tflite"), TfliteContent([], restored_types=types))
    reason = f"its {', '.join(types)} weights are unpacked to float32, which saves size, not time; for speed take int8"
    assert describe_speed(BEFORE, after(200), source).endswith(f"0.50 times as fast: {reason}")
    assert "plain kernels" in describe_speed(BEFORE, after(200, CONV_2D=1), source), "ops left behind come first"


def test_a_slow_onnx_models_reason_is_in_what_it_holds(tmp_path: Path) -> None:
    """No model is run: a node and a weight are enough."""
    node, weight = onnx.helper.make_node, {"w": np.ones((3, 3, 1, 1), np.float16)}
    shape = {"x": (1, 3, 8, 8)}
    dynamic = save(tmp_path / "dynamic.onnx", [node("DynamicQuantizeLinear", ["x"], ["y", "scale", "zero"])], shape, {"y": None})
    half = save(tmp_path / "half.onnx", [node("Cast", ["w"], ["y"], to=1)], shape, {"y": None}, weight)
    static = save(
        tmp_path / "static.onnx", [node("QuantizeLinear", ["x", "s"], ["y"])], shape, {"y": None}, {"s": np.ones((), np.float32)}
    )
    plain = save(tmp_path / "plain.onnx", [node("Relu", ["x"], ["y"])], shape, {"y": (1, 3, 8, 8)})
    slow = {path.stem: describe_speed(BEFORE, after(200), ModelFile(path)) for path in (dynamic, half, static, plain)}
    start = "SLOWER: latency 100.00 -> 200.00 ms, 0.50 times as fast: "
    assert all(text.startswith(start) for text in slow.values())
    assert "finds the range of every activation at each run" in slow["dynamic"]
    assert "quantize it statically" in slow["dynamic"]
    assert "converts float16 to float32 to compute" in slow["half"]
    assert "integer kernels are slower than float ones on this CPU" in slow["static"]
    assert slow["plain"] == start + NO_FASTER_KERNELS
    assert describe_speed(BEFORE, after(50), ModelFile(dynamic)).endswith("2.00 times as fast")


def test_a_checkpoint_in_torch_has_no_reason_of_its_own() -> None:
    source = DetectorCheckpoint(Path("checkpoint.pth"), load_card("miniseal"))
    assert describe_speed(BEFORE, after(200), source).endswith(NO_FASTER_KERNELS)
