"""Models with several signatures: each is run, measured, and calibrated where the samples fit it. Judged by LiteRT alone."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from shared.command.errors import ToolError
from shared.formats.model_file import ModelFile
from shared.runtime.model import open_model
from tools.compare import compare
from tools.quantize_tflite import quantize_tflite
from tools.verify import verify

Arrays = dict[str, NDArray[Any]]

SHAPES = {"encode": {"args_0": (1, 3, 32, 32)}, "decode": {"args_0": (1, 32), "args_1": (1, 32)}}
LARGEST_ERROR = 0.03


class Encoder(torch.nn.Module):
    """An image to a code; its last layer is the decoder's first one."""

    def __init__(self, shared: torch.nn.Linear) -> None:
        super().__init__()
        self.conv, self.shared = torch.nn.Conv2d(3, 32, 3, 2, 1), shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared(torch.relu(self.conv(x)).mean((2, 3)))  # type: ignore[no-any-return]


class Decoder(torch.nn.Module):
    """A code and a shift to values."""

    def __init__(self, shared: torch.nn.Linear) -> None:
        super().__init__()
        self.shared, self.last = shared, torch.nn.Linear(32, 32)

    def forward(self, code: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.shared(code) + shift))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import litert_torch

    torch.manual_seed(0)
    shared = torch.nn.Linear(32, 32)
    path = tmp_path_factory.mktemp("signatures") / "two.tflite"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch of itself
        made = {key: tuple(map(torch.rand, shapes.values())) for key, shapes in SHAPES.items()}
        first = litert_torch.signature("encode", Encoder(shared).eval(), made["encode"])
        first.signature("decode", Decoder(shared).eval(), made["decode"]).convert().export(str(path))
    return path


def noise(seed: int, count: int) -> dict[str, Arrays]:
    rng = np.random.default_rng(seed)
    return {
        key: {name: rng.uniform(-1, 1, (count, *shape)).astype(np.float32) for name, shape in shapes.items()}
        for key, shapes in SHAPES.items()
    }


def answers(path: Path, key: str, arrays: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """Return what a signature answers to each sample, by LiteRT alone."""
    from ai_edge_litert.interpreter import Interpreter

    run = Interpreter(model_path=str(path)).get_signature_runner(key)
    count = len(next(iter(arrays.values())))
    return np.stack([next(iter(run(**{name: array[n] for name, array in arrays.items()}).values())) for n in range(count)])


def errors(before: Path, after: Path) -> dict[str, float]:
    """Return the relative error of each signature on samples that nothing was calibrated with."""
    found = {}
    for key, arrays in noise(1, 8).items():
        exact = answers(before, key, arrays)
        found[key] = float(np.linalg.norm(answers(after, key, arrays) - exact) / np.linalg.norm(exact))
    return found


def write_set(path: Path, *, keys: tuple[str, ...], with_signature: bool) -> Path:
    given = noise(0, 16)
    np.savez(path, **{f"{key}/{name}" if with_signature else name: array for key in keys for name, array in given[key].items()})
    return path


def test_each_signature_is_run_under_its_own_names(model: Path) -> None:
    arrays = noise(1, 1)
    with open_model(ModelFile(model)) as opened:
        assert [spec.name for spec in opened.inputs] == ["encode/args_0", "decode/args_0", "decode/args_1"]
        outputs, _ = opened.run({f"{key}/{name}": array[0] for key, given in arrays.items() for name, array in given.items()})
    assert set(outputs) == {"encode/output_0", "decode/output_0"}
    for key, given in arrays.items():
        np.testing.assert_allclose(outputs[f"{key}/output_0"], answers(model, key, given)[0], atol=1e-6)


@pytest.mark.parametrize("recipe", ["int8", "int8-static", "int16x8", "fp16"])
def test_every_signature_is_quantized_and_measured(model: Path, recipe: str, tmp_path: Path) -> None:
    samples = write_set(tmp_path / "set.npz", keys=("encode", "decode"), with_signature=True)
    output = tmp_path / "q.tflite"
    (done,) = quantize_tflite(model, recipe=recipe, output=output, calibration=samples).result.models
    assert done.coverage == 1
    assert [error.output for error in done.candidates[-1].errors] == ["encode/output_0", "decode/output_0"]
    assert 0 < max(errors(model, output).values()) < LARGEST_ERROR
    assert verify(output).ok
    assert compare(model, [output], images=samples, gate=["min_cosine=0.99"]).ok


@pytest.mark.parametrize(("fed", "other"), [("encode", "decode"), ("decode", "encode")])
def test_a_signature_without_samples_stays_in_float_with_the_reason(model: Path, fed: str, other: str, tmp_path: Path) -> None:
    samples = write_set(tmp_path / "set.npz", keys=(fed,), with_signature=False)
    output = tmp_path / "q.tflite"
    (done,) = quantize_tflite(model, recipe="int8-static", output=output, calibration=samples).result.models
    found = errors(model, output)
    assert 0 < found[fed] < LARGEST_ERROR
    assert found[other] == 0
    assert {layer.reason for layer in done.skipped} == {"the samples have no inputs for its signature"}
    assert f"{other} on made-up inputs" in done.measured_on


def test_photos_calibrate_the_signature_that_takes_an_image(model: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    output = tmp_path / "q.tflite"
    done = quantize_tflite(model, recipe="int8-static", output=output, calibration=tmp_path, input_range="0..1").result.models[0]
    assert [(row.op_type, row.quantized) for row in done.op_types if row.op_type == "CONV_2D"] == [("CONV_2D", 1)]
    assert errors(model, output)["decode"] == 0


def test_a_bias_that_layers_of_two_signatures_share_is_not_corrected_for_one_of_them(model: Path, tmp_path: Path) -> None:
    samples = write_set(tmp_path / "set.npz", keys=("encode", "decode"), with_signature=True)
    (done,) = quantize_tflite(model, recipe="int8", output=tmp_path / "q.tflite", calibration=samples).result.models
    assert done.corrected_biases == 2  # the convolution's and the last layer's; two more read the shared one


def test_samples_that_fit_no_signature_are_refused(model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", args_0=np.zeros((4, 33), np.float32))
    with pytest.raises(ToolError, match="fits no signature"):
        quantize_tflite(model, recipe="int8-static", output=tmp_path / "q.tflite", calibration=tmp_path / "set.npz")


def test_integer_ends_need_samples_of_every_signature(model: Path, tmp_path: Path) -> None:
    samples = write_set(tmp_path / "set.npz", keys=("encode",), with_signature=False)
    with pytest.raises(ToolError, match="samples of every signature"):
        quantize_tflite(model, recipe="int8-static", io_dtype="int8", output=tmp_path / "q.tflite", calibration=samples)


class Words(torch.nn.Module):
    """Integers to rows of a table of three, and these through a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = torch.nn.Embedding(3, 32), torch.nn.Linear(32, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layer(self.table(ids)).mean(1)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One image, four images at once, words, and the name of a file: as models that train on a device have it."""
    import litert_torch
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    torch.manual_seed(0)
    network = Encoder(torch.nn.Linear(32, 32)).eval()
    path = tmp_path_factory.mktemp("mixed") / "mixed.tflite"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch of itself
        first = litert_torch.signature("one", network, (torch.rand(1, 3, 32, 32),))
        second = first.signature("four", network, (torch.rand(4, 3, 32, 32),))
        second.signature("words", Words().eval(), (torch.zeros(1, 16, dtype=torch.int32),)).convert().export(str(path))
    content = flatbuffer_utils.read_model(str(path))
    text = schema.TensorT(name=b"path", shape=np.array([1], np.int32), type=schema.TensorType.STRING, buffer=0)
    content.subgraphs.append(schema.SubGraphT(tensors=[text], inputs=[0], outputs=[0], operators=[], name=b"save"))
    ends = [schema.TensorMapT(name=b"path", tensorIndex=0)]
    place = len(content.subgraphs) - 1
    content.signatureDefs.append(schema.SignatureDefT(inputs=ends, outputs=ends, signatureKey=b"save", subgraphIndex=place))
    flatbuffer_utils.write_model(content, str(path))
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_a_signature_with_texts_is_left_out_and_made_up_words_are_in_the_table(mixed: Path) -> None:
    with open_model(ModelFile(mixed)) as opened:
        assert {spec.signature for spec in opened.inputs} == {"one", "four", "words"}
    assert verify(mixed).ok


@pytest.mark.parametrize("recipe", ["int8", "int8-static"])
def test_photos_feed_signatures_of_every_batch_and_words_are_made_up(
    mixed: Path, photos: Path, recipe: str, tmp_path: Path
) -> None:
    output = tmp_path / "q.tflite"
    (done,) = quantize_tflite(mixed, recipe=recipe, output=output, calibration=photos, input_range="0..1").result.models
    assert "words on made-up inputs" in done.measured_on
    assert (done.coverage == 1) == (recipe == "int8")
    reasons = {layer.reason for layer in done.skipped}
    assert reasons == (set() if recipe == "int8" else {"the samples have no inputs for its signature"})
    assert compare(mixed, [output], images=photos, gate=["min_cosine=0.9"]).ok
    (tmp_path / "one").mkdir()
    np.savez(tmp_path / "one" / "set.npz", **{"one/args_0": np.random.default_rng(0).random((4, 1, 3, 32, 32), np.float32)})
    assert compare(mixed, [output], images=tmp_path / "one" / "set.npz", gate=["min_cosine=0.9"]).ok
    assert verify(output, inputs=tmp_path / "one" / "set.npz").ok


def test_words_beside_photos_have_no_range_of_pixels(mixed: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {"one/args_0": rng.random((4, 3, 32, 32), np.float32), "words/args_0": rng.integers(0, 3, (4, 16), np.int32)}
    np.savez(tmp_path / "set.npz", **arrays)
    given = {"calibration": tmp_path / "set.npz", "input_range": "0..1"}
    assert quantize_tflite(mixed, recipe="int8", output=tmp_path / "q.tflite", **given).ok  # type: ignore[arg-type]


def test_a_damaged_set_is_no_misfit(mixed: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", **{"one/args_0": np.zeros((4, 3, 32, 32), np.float32)})
    (tmp_path / "set.npz").write_bytes((tmp_path / "set.npz").read_bytes()[:1000])
    with pytest.raises(ToolError, match=r"damaged \.npz"):
        quantize_tflite(mixed, recipe="int8-static", output=tmp_path / "q.tflite", calibration=tmp_path / "set.npz")


def test_layers_that_no_rule_selects_are_not_said_to_lack_samples(model: Path, tmp_path: Path) -> None:
    samples = write_set(tmp_path / "set.npz", keys=("encode", "decode"), with_signature=True)
    given = {"recipe": "int8-static", "only": ["CONV_2D"], "calibration": samples}
    (done,) = quantize_tflite(model, output=tmp_path / "q.tflite", **given).result.models  # type: ignore[arg-type]
    assert {layer.reason for layer in done.skipped} == {"no rule matches"}
