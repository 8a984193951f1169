"""Masks of attention hold -inf: a value, which stays in float with the ops at it, while the rest is quantized."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.formats.model_file import ModelFile
from shared.runtime.model import open_model
from tools.quantize_tflite import quantize_tflite

SHAPE = (1, 16, 32)
LARGEST_ERROR = 0.03


class Attention(torch.nn.Module):
    """Attention in which no position sees a later one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.o = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)
        self.register_buffer("mask", torch.triu(torch.full((16, 16), float("-inf")), 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q(x).chunk(3, -1)
        scores = torch.softmax(q @ k.transpose(1, 2) / 32**0.5 + self.mask, -1)
        return self.o(scores @ v)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import litert_torch

    path = tmp_path_factory.mktemp("masked") / "masked.tflite"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch of itself
        litert_torch.convert(Attention().eval(), (torch.randn(*SHAPE),)).export(str(path))
    return path


def answers(path: Path, samples: np.ndarray) -> np.ndarray:
    with open_model(ModelFile(path), threads=1) as model:
        (spec,) = model.inputs
        return np.stack([next(iter(model.run({spec.name: sample})[0].values())) for sample in samples])


@pytest.mark.parametrize("recipe", ["int8", "int8-static", "int16x8", "fp16"])
def test_a_mask_of_minus_infinity_is_a_value(masked: Path, recipe: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with open_model(ModelFile(masked)) as model:
        (spec,) = model.inputs
    np.savez(tmp_path / "set.npz", **{spec.name: rng.standard_normal((16, *SHAPE)).astype(np.float32)})
    output = tmp_path / "q.tflite"
    quantize_tflite(masked, recipe=recipe, output=output, calibration=tmp_path / "set.npz")
    held = rng.standard_normal((4, *SHAPE)).astype(np.float32)
    before, after = answers(masked, held), answers(output, held)
    assert np.linalg.norm(before - after) < LARGEST_ERROR * np.linalg.norm(before)
