"""The small network and its samples, as every test of this tool takes them."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from shared.formats.tensors import TensorSpec
from shared.runtime.samples import sample_inputs


@pytest.fixture
def model(float_model: Path, tmp_path: Path) -> Path:
    """A copy in a folder of its own."""
    return Path(shutil.copy(float_model, tmp_path / "model.tflite"))


@pytest.fixture(scope="session")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seeded pictures as the small network takes them."""
    path = tmp_path_factory.mktemp("set") / "tiles.npz"
    specs = [TensorSpec("images", (1, 3, 64, 64), "float32")]
    np.savez(path, images=np.concatenate([sample_inputs(specs, seed)["images"] for seed in range(8)]))
    return path
