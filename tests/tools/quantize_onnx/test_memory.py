"""The memory of activations is estimated before a sample of full size runs, and samples are made to fit half of what is free."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from shared.calibration.dataset import TILE_SIZE, CalibrationSet
from shared.command.errors import ToolError
from shared.formats.tensors import TensorSpec
from tools.quantize_onnx import memory, quantize_onnx
from tools.quantize_onnx.graph.repair import repair
from tools.quantize_onnx.memory import LEAST_TILE, OVERHEAD, activation_bytes, bound_samples

CHANNELS = 16
FREE = [TensorSpec("image", (1, 3, -1, -1), "float32")]


def write_network(path: Path, size: tuple[int | str, int | str]) -> Path:
    """Write two convolutions and a sum with the input's padding, which is computed from its shape as exporters write it."""
    rng = np.random.default_rng(0)
    weights = {"w": (CHANNELS, 3, 3, 3), "v": (3, CHANNELS, 3, 3)}
    constants = [numpy_helper.from_array(0.05 * rng.standard_normal(s, np.float32), name) for name, s in weights.items()]
    constants += [numpy_helper.from_array(np.array(v, np.int64), name) for name, v in (("eight", [8]), ("zeros", [0] * 6))]
    nodes = [
        helper.make_node("Shape", ["image"], ["shape"], start=2),
        helper.make_node("Mod", ["shape", "eight"], ["over"]),
        helper.make_node("Concat", ["zeros", "over"], ["pads"], axis=0),
        helper.make_node("Pad", ["image", "pads"], ["padded"]),
        helper.make_node("Conv", ["padded", "w"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "v"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c", "padded"], ["out"]),
    ]
    ends = [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, *size])]
    graph = helper.make_graph(nodes, "g", ends, [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def value(name: str, shape: list[int | str] | list[int] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (300, 400, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("is_free", [True, False])
def test_the_estimate_counts_the_tensors_that_live_at_the_same_time(tmp_path: Path, *, is_free: bool) -> None:
    path = tmp_path / "repaired.onnx"
    repair(write_network(tmp_path / "m.onnx", ("h", "w") if is_free else (LEAST_TILE, LEAST_TILE)), path, keeps_halves=False)
    inputs = FREE if is_free else [TensorSpec("image", (1, 3, LEAST_TILE, LEAST_TILE), "float32")]
    found = activation_bytes(path, tmp_path / "scratch.onnx", inputs)
    pixels = 4 * LEAST_TILE**2
    most = (3 + 2 * CHANNELS) * pixels  # the padded image waits for the sum while the activation replaces the convolution's result
    assert OVERHEAD * most <= found < OVERHEAD * (most + 1000)  # shapes and paddings are a few bytes


def test_inputs_of_free_length_that_are_no_images_are_not_estimated(tmp_path: Path) -> None:
    path = write_network(tmp_path / "m.onnx", ("h", "w"))
    assert activation_bytes(path, tmp_path / "s.onnx", [TensorSpec("text", (1, -1), "int64")]) == 0


@pytest.mark.parametrize(("free", "tile"), [(None, TILE_SIZE), (2**30, TILE_SIZE), (2**21, TILE_SIZE // 2), (2**19, LEAST_TILE)])
def test_tiles_shrink_with_the_free_memory(photos: Path, free: int | None, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory_bytes", lambda: free)
    needed = 2**18  # at LEAST_TILE
    found = bound_samples(CalibrationSet(photos, "0..1"), FREE, needed, "m.onnx")
    assert found.tile == tile
    assert next(found.samples(FREE))["image"].shape == (1, 3, tile, tile)


def test_what_does_not_fit_is_refused_before_it_runs(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_network(tmp_path / "m.onnx", ("h", "w"))
    np.savez(tmp_path / "large.npz", image=np.random.default_rng(0).random((2, 3, 512, 512), np.float32))
    monkeypatch.setattr(memory, "available_memory_bytes", lambda: 2**26)
    for given, fits in ((photos, True), (tmp_path / "large.npz", False)):
        output = tmp_path / f"{given.stem}.onnx"
        if fits:
            assert quantize_onnx(path, output=output, calibration=given, input_range="0..1").ok
        else:
            with pytest.raises(ToolError, match="more than half of the free memory; got about 10"):
                quantize_onnx(path, output=output, calibration=given)
            assert not output.exists()
    fixed = write_network(tmp_path / "fixed.onnx", (1024, 1024))
    with pytest.raises(ToolError, match="more than half of the free memory"):
        quantize_onnx(fixed, output=tmp_path / "q.onnx", calibration=photos, input_range="0..1")


def test_tensors_that_branches_read_are_freed_too(tmp_path: Path) -> None:
    """A chain of sums holds two tensors at a time, whether a branch reads one of them or not."""
    size, found = [1, 64, 32, 32], []
    for has_branch in (False, True):
        nodes = [helper.make_node("Relu", ["image"], ["a"])]
        if has_branch:
            inner = [
                helper.make_graph([helper.make_node(kind, ["a"], ["z"])], kind, [], [value("z", size)]) for kind in ("Neg", "Abs")
            ]
            nodes.append(helper.make_node("If", ["yes"], ["b"], then_branch=inner[0], else_branch=inner[1]))
        else:
            nodes.append(helper.make_node("Neg", ["a"], ["b"]))
        nodes += [helper.make_node("Neg", ["b"], ["c"]), helper.make_node("Add", ["c", "b"], ["out"])]
        graph = helper.make_graph(
            nodes, "g", [value("image", size)], [value("out", size)], [numpy_helper.from_array(np.array(True), "yes")]
        )
        path = tmp_path / f"{has_branch}.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
        found.append(activation_bytes(path, tmp_path / "s.onnx", [TensorSpec("image", tuple(size), "float32")]))
    assert found[0] == found[1]


def test_a_model_that_does_not_run_at_a_small_size_is_calibrated_all_the_same(tmp_path: Path, photos: Path) -> None:
    """Free height and width, and a table of positions for one size: as some exporters write transformers."""
    table = numpy_helper.from_array(np.zeros((1, 3, 256, 256), np.float32), "table")
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((3, 3, 1, 1)).astype(np.float32), "w")
    nodes = [helper.make_node("Add", ["image", "table"], ["a"]), helper.make_node("Conv", ["a", "w"], ["out"])]
    graph = helper.make_graph(nodes, "g", [value("image", [1, 3, "h", "w"])], [value("out", None)], [table, weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "m.onnx")
    assert activation_bytes(tmp_path / "m.onnx", tmp_path / "s.onnx", FREE) == 0
    assert quantize_onnx(tmp_path / "m.onnx", output=tmp_path / "q.onnx", calibration=photos, input_range="0..1").ok
