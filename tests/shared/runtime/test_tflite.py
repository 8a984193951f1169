"""Free height and width of TFLite models: made-up and real images of any size run, in one size after the other."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shared.formats.model_file import ModelFile
from shared.runtime.model import open_model
from tools.compare import compare
from tools.quantize_tflite import quantize_tflite
from tools.verify import verify


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of convolutions whose ends say that height and width are free, as converters from other frameworks write it."""
    import litert_torch
    from ai_edge_litert.tools import flatbuffer_utils

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("free") / "free.tflite"
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(16, 3, 3, padding=1)
    ).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch of itself
        litert_torch.convert(network, (torch.rand(1, 3, 32, 32),)).export(str(path))
    model = flatbuffer_utils.read_model(str(path))
    (graph,) = model.subgraphs
    for end in (*graph.inputs, *graph.outputs):
        graph.tensors[end].shape = np.array([1, 3, 1, 1], np.int32)
        graph.tensors[end].shapeSignature = np.array([1, 3, -1, -1], np.int32)
    flatbuffer_utils.write_model(model, str(path))
    return path


def test_a_free_axis_is_minus_one_and_takes_any_length(free: Path) -> None:
    with open_model(ModelFile(free)) as model:
        assert model.inputs[0].shape == (1, 3, -1, -1)
        for size in ((8, 8), (20, 12), (8, 8)):
            outputs, _ = model.run({model.inputs[0].name: np.ones((1, 3, *size), np.float32)})
            assert outputs[model.outputs[0].name].shape == (1, 3, *size)


@pytest.mark.parametrize("recipe", ["int8", "int8-static"])
def test_photos_of_several_sizes_calibrate_it(free: Path, recipe: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number, size in enumerate(((48, 64), (64, 48), (48, 64), (300, 280))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    output = tmp_path / "q.tflite"
    (done,) = quantize_tflite(free, recipe=recipe, output=output, calibration=tmp_path, input_range="0..1").result.models
    assert done.coverage == 1
    assert done.corrected_biases == (2 if recipe == "int8" else 0)
    (error,) = done.candidates[-1].errors
    assert error.relative_error is not None
    assert 0 < error.relative_error < 0.05
    assert verify(output).ok
    assert compare(free, [output], gate=["min_psnr=40"]).ok
    assert compare(free, [output], images=tmp_path, gate=["min_psnr=40"]).ok
