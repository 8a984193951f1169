"""Small models with samples for them, and what the tests of this folder ask of results."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from shared.formats.tensors import TensorSpec
from shared.media.images import image_files, read_pixels
from shared.metrics.output_error import OutputError
from shared.quantize.product import Quantized
from shared.quantize.result import ModelResult
from shared.runtime.samples import sample_inputs
from tests.conftest import REALDATA
from tests.support.small_onnx import PICTURE, save_picture_model
from tools.prepare_calibration.sources import seeded_image
from tools.quantize_onnx import quantize_onnx

COUNT = 6  # samples of the small sets


@pytest.fixture(autouse=True)
def few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time nothing longer than it takes to see that it is timed."""
    monkeypatch.setattr("shared.runtime.benchmark.BUDGET_S", 0.0)


def save_model(folder: Path) -> Path:
    """Write four convolutions: picture in, picture out."""
    return save_picture_model(folder / "model.onnx", widths=[32, 32, 32], metadata={"author": "somebody"})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A picture model of its own for each test, which may change it."""
    return save_model(tmp_path)


@pytest.fixture(scope="session")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seeded pictures as the small model takes them."""
    path = tmp_path_factory.mktemp("set") / "tiles.npz"
    specs = [TensorSpec("image", PICTURE, "float32")]
    np.savez(path, image=np.concatenate([sample_inputs(specs, seed)["image"] for seed in range(COUNT)]))
    return path


@pytest.fixture(scope="session")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of the vector model."""
    path = tmp_path_factory.mktemp("set") / "vectors.npz"
    np.savez(path, vector=np.random.default_rng(0).random((COUNT, 1, 8), np.float32))
    return path


@pytest.fixture(scope="session")
def static(tmp_path_factory: pytest.TempPathFactory, tiles: Path) -> Quantized:
    """The picture model in int8, its product next to it: for tests that leave both as they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shared.runtime.benchmark.BUDGET_S", 0.0)
        return quantize_onnx(save_model(tmp_path_factory.mktemp("static")), calibration=tiles)


def only(quantized: Quantized) -> ModelResult:
    """Return the result of the one model."""
    (result,) = quantized.result.models
    return result


def error_of(quantized: Quantized) -> OutputError:
    """Return the error of the product's one output."""
    product = only(quantized).product
    assert product is not None
    (error,) = product.errors
    return error


def psnr_of(quantized: Quantized) -> float:
    """Return the PSNR of the product's one output."""
    psnr_db = error_of(quantized).psnr_db
    assert psnr_db is not None
    return psnr_db


def relative_error_of(quantized: Quantized) -> float:
    """Return the relative error of the product's one output."""
    error = error_of(quantized).relative_error
    assert error is not None
    return error


def size_of(quantized: Quantized) -> int:
    """Return the size of the product."""
    assert quantized.product is not None
    return quantized.product.size_bytes


def names(folder: Path) -> set[str]:
    """Return the names of the files in a folder."""
    return {path.name for path in folder.iterdir()}


def save_with_a_bad_layer(path: Path) -> Path:
    """Write a model whose second convolution has weights for a dead channel that are far larger than the others."""
    model = onnx.load(str(save_picture_model(path, widths=[32, 32])))
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor).copy()
        if tensor.name == "b0":
            values[0] = -3
        if tensor.name == "w1":
            values[:, 0] = 100
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    path.write_bytes(model.SerializeToString())
    return path


def save_manifest(folder: Path, *, holds_out: bool = True) -> Path:
    """Write a set of dark pictures that holds bright ones out of calibration."""
    folder.mkdir()
    for name, low, count in (("dark", 0, 4), ("bright", 155, 2)):
        for number in range(count):
            picture = seeded_image(16, np.random.default_rng(number))[0].transpose(1, 2, 0)
            Image.fromarray((low + 100 * picture).astype(np.uint8)).save(folder / f"{name}{number}.png")
    content = {"samples": [{"file": f"dark{number}.png"} for number in range(4)]}
    if holds_out:
        content["holdout"] = [{"file": f"bright{number}.png"} for number in range(2)]
    (folder / "manifest.json").write_text(json.dumps(content))
    return folder


def cut_tiles(folder: Path, size: int, count: int, *, is_small: bool = False) -> Path:
    """Cut tiles out of real photographs."""
    folder.mkdir()
    files = [path for path in image_files(REALDATA / "images") if path.stem.endswith("x2lr") == is_small]
    for number in range(count):
        pixels = read_pixels(files[number % len(files)])
        top, left = (((length - size) * (1 + number // len(files))) // 3 for length in pixels.shape[:2])
        Image.fromarray(pixels[top : top + size, left : left + size]).save(folder / f"{number:02}.png")
    return folder
