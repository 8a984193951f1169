"""A product whose answers are far from the original's is not written, in any mode of either format, unless the user allows it.

The network's answers hang on small differences between large weights: its inputs sum up to zero, so that what all weights have in
common cancels. In float32 that is exact enough; in float16 and in 8 bits the differences are gone.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tools.quantize_onnx import quantize_onnx
from tools.quantize_tflite import quantize_tflite

WIDTH, COMMON, COUNT = 32, 5000.0, 8
MODES: list[tuple[str, dict[str, Any]]] = [
    *(("tflite", {"recipe": recipe}) for recipe in ("fp16", "int8", "int8-weight-only", "int8-static", "int16x8", "int4")),
    *(("onnx", {"recipe": recipe}) for recipe in ("fp16", "int8", "int8-static", "int16x8")),
    ("onnx", {"recipe": "int8-static", "set_options": ["format=qoperator"]}),
    ("onnx", {"recipe": "int8-static", "set_options": ["weight_type=uint8"]}),
    ("onnx", {"recipe": "int8", "set_options": ["weight_type=uint8"]}),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import litert_torch

    folder = tmp_path_factory.mktemp("alarm")
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, WIDTH)).eval()
    with torch.no_grad():
        network[0].weight.copy_(COMMON + torch.randn(WIDTH, WIDTH))
    paths = {kind: folder / f"model.{kind}" for kind in ("tflite", "onnx")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch of itself
        litert_torch.convert(network, (torch.rand(1, WIDTH),)).export(str(paths["tflite"]))
        torch.onnx.export(network, (torch.rand(1, WIDTH),), str(paths["onnx"]), dynamo=False, input_names=["args_0"])
    return paths


@pytest.fixture(scope="module")
def samples(models: dict[str, Path]) -> Path:
    values = np.random.default_rng(0).uniform(-1, 1, (COUNT, 1, WIDTH)).astype(np.float32)
    values[..., -1] = -values[..., :-1].sum(axis=-1)
    path = models["onnx"].with_name("set.npz")
    np.savez(path, args_0=values)
    return path


def label(part: Any) -> str:
    return part if isinstance(part, str) else "-".join(map(str, part.values()))


@pytest.mark.parametrize(("kind", "mode"), MODES, ids=label)
def test_a_ruined_product_is_written_only_where_the_user_allows_it(
    kind: str, mode: dict[str, Any], models: dict[str, Path], samples: Path, tmp_path: Path
) -> None:
    quantize, output = (quantize_tflite if kind == "tflite" else quantize_onnx), tmp_path / f"q.{kind}"
    real = {} if (kind, mode["recipe"]) == ("onnx", "fp16") else {"calibration": samples}
    given = {"output": output, "holdout": samples, **real, **mode}
    ruined = quantize(models[kind], **given)
    assert (ruined.ok, ruined.product, output.exists()) == (False, None, False)
    assert "min_cosine" in ruined.message and "nothing was written" in ruined.message
    lines = [str(line) for line in ruined.result.tables()]
    assert any("LARGE ERROR" in line and "--allow-large-error" in line for line in lines)
    allowed = quantize(models[kind], allow_large_error=True, **given)
    assert allowed.ok and output.exists()
    assert any("LARGE ERROR" in str(line) for line in allowed.result.tables())


def test_the_network_itself_is_sound(models: dict[str, Path], samples: Path) -> None:
    """Both formats agree in float32: what the alarm tells is the quantization."""
    import onnxruntime
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(models["tflite"]))
    run = interpreter.get_signature_runner()
    session = onnxruntime.InferenceSession(onnx.load(models["onnx"]).SerializeToString(), providers=["CPUExecutionProvider"])
    for values in np.load(samples)["args_0"]:
        (one,), (other,) = run(args_0=values).values(), session.run(None, {"args_0": values})
        np.testing.assert_allclose(one, other, atol=0.01 * np.abs(other).max())
