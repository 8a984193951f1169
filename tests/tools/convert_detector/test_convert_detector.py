"""A converted detector answers as the published network does, in every form and precision."""

import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.command.errors import ToolError
from shared.files.provenance import read_provenance
from shared.formats.model_file import ModelFile
from shared.formats.onnx_file import external_files
from shared.networks.card import InputForm, load_card
from shared.runtime.model import DetectorCheckpoint, open_model
from tests.conftest import ROOT, Run, Small
from tests.support.small_onnx import with_external_weights
from tools.convert_detector import conversion as module
from tools.convert_detector import convert_detector, run_in_torch
from tools.convert_detector.request import InputLayout, ModelFormat, Precision, file_name, weights_bytes
from tools.quantize_tflite import quantize_tflite
from tools.verify import verify

TFLITE_TOLERANCE = 1e-4


@pytest.mark.parametrize("kind", ["videoseal_small", "chunkyseal_small"])
def test_tflite_output_is_the_published_codes(kind: str, float_models: dict[str, Path], request: pytest.FixtureRequest) -> None:
    tensors = load_file(request.getfixturevalue(kind).checkpoint)
    with open_model(ModelFile(float_models[kind])) as model:
        for image, published in zip(tensors["_parity.input"], tensors["_parity.output"], strict=True):
            output = model.run({"image": image[None].numpy()})[0]["output_0"]
            np.testing.assert_allclose(output[0], published.numpy(), atol=TFLITE_TOLERANCE)


def test_every_precision_gives_a_model_that_verify_passes(videoseal_small: Small, tmp_path: Path) -> None:
    sizes = {}
    for precision in Precision:
        output = tmp_path / f"{precision.value}.tflite"
        result = convert_detector(
            model=str(videoseal_small.card), checkpoint=videoseal_small.checkpoint, output=output, quantize=precision
        )
        found = verify(output).findings
        assert found.ok, [check for check in found.checks if not check.ok]
        assert any(check.name == "bits that are one" for check in found.checks)
        sizes[precision] = output.stat().st_size
        if precision is not Precision.NONE:
            assert result.float_product.path.name == "small_detector_videoseal_small_64.tflite"
            assert "smaller" in result.message
    assert sizes["int4"] < sizes["int8"] < sizes["fp16"] < sizes["none"]


@pytest.mark.parametrize(
    ("layout", "size", "simple", "shape"),
    [("nhwc", 64, True, (1, 64, 64, 3)), ("nchw", 128, True, (1, 3, 128, 128)), ("nhwc", 100, False, (1, 100, 100, 3))],
)
def test_every_form_gives_a_model_that_verify_passes(
    videoseal_small: Small, tmp_path: Path, layout: str, size: int, simple: bool, shape: tuple[int, ...]
) -> None:
    output = tmp_path / "form.tflite"
    form = {"input_layout": InputLayout(layout), "image_size": size, "simple": simple}
    result = convert_detector(model=str(videoseal_small.card), checkpoint=videoseal_small.checkpoint, output=output, **form)  # type: ignore[arg-type]
    assert verify(output).ok
    assert ("the accuracy is unknown" in result.message) == (simple and size != 64)
    with open_model(ModelFile(output)) as model:
        assert model.inputs[0].shape == shape
    for recipe in ("int8", "int4", "fp16", "int8-weight-only"):
        assert verify(quantize_tflite(output, recipe=recipe).product.path).ok
    metadata = ModelFile(output).metadata
    assert (metadata["input_layout"], metadata["image_size"], metadata["resize"]) == (layout, size, not simple)


def test_a_rehearsal_says_so_in_name_metadata_and_on_stderr(tmp_path: Path, videoseal_small: Small, run_tool: Run) -> None:
    output = tmp_path / "small_detector_videoseal_small_rehearsal_64_int8.tflite"
    done = run_tool("convert_detector", "--model", videoseal_small.card, "--rehearsal", "--quantize", "int8", "-o", output)
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)
    assert done.stderr.startswith("note: REHEARSAL: Small with seeded, untrained weights")
    assert ModelFile(output).metadata["rehearsal"] is True
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".json"} == {
        output.name,
        "small_detector_videoseal_small_rehearsal_64.tflite",
        "small_detector_videoseal_small_rehearsal_seed0.safetensors",
    }
    weights = tmp_path / "small_detector_videoseal_small_rehearsal_seed0.safetensors"
    with pytest.raises(ToolError, match="a rehearsal's, untrained"):
        convert_detector(model=str(videoseal_small.card), checkpoint=weights, output=tmp_path / "real.tflite")
    again = run_tool("convert_detector", "--model", videoseal_small.card, "--rehearsal", "--quantize", "int8", "-o", output)
    assert again.returncode == 0
    assert "up to date" in again.stdout


def test_no_seeded_weight_is_constant(tmp_path: Path, videoseal_small: Small) -> None:
    """Constants would be folded away, and the rehearsal would show a lighter model than a trained one."""
    from shared.networks.detector import detector_shapes
    from tools.convert_detector.export import seeded_weights

    shapes = detector_shapes(load_card(str(videoseal_small.card)))
    one, again = dict(seeded_weights(shapes, 5)), dict(seeded_weights(shapes, 5))
    assert all(tensor.std() > 0 for tensor in one.values() if tensor.numel() > 1)
    assert all(torch.equal(one[key], again[key]) for key in one)


@pytest.mark.parametrize(
    ("card", "precision", "rehearsal", "name"),
    [
        ("videoseal", "none", False, "videoseal_detector_videoseal_256.tflite"),
        ("pixelseal", "int8", False, "videoseal_detector_pixelseal_256_int8.tflite"),
        ("chunkyseal", "fp16", False, "chunkyseal_detector_chunkyseal_256_fp16.tflite"),
        ("chunkyseal", "int8", True, "chunkyseal_detector_chunkyseal_rehearsal_256_int8.tflite"),
    ],
)
def test_names_are_the_guides(card: str, precision: str, rehearsal: bool, name: str) -> None:
    assert file_name(load_card(card), InputForm(256), Precision(precision), rehearsal=rehearsal) == name


def test_other_forms_have_names_of_their_own() -> None:
    name = file_name(load_card("videoseal"), InputForm(512, "nhwc", resize=True), Precision.NONE, rehearsal=False)
    assert name == "videoseal_detector_videoseal_512_nhwc_resize.tflite"


@pytest.mark.parametrize("card", ["videoseal", "chunkyseal"])
def test_the_size_predicted_from_a_card_is_right(card: str) -> None:
    from shared.networks.detector import detector_shapes

    exact = 4 * sum(int(np.prod(shape)) for shape in detector_shapes(load_card(card)).values())
    assert weights_bytes(load_card(card)) == pytest.approx(exact, rel=0.01)


def test_a_model_that_disagrees_with_torch_never_gets_its_name(
    videoseal_small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check is given other weights than were converted."""
    other = tmp_path / "other.safetensors"
    state = load_file(videoseal_small.checkpoint)
    state["detector.pixel_decoder.linear.bias"] += 0.01
    save_file(state, other)
    check = module._check
    torch_model = DetectorCheckpoint(other, load_card(str(videoseal_small.card)))
    monkeypatch.setattr(
        module, "_check", lambda network, model: check(replace(network, reference=lambda: run_in_torch(torch_model)), model)
    )
    with pytest.raises(ToolError, match="disagrees with torch; nothing was kept; got relative error"):
        convert_detector(model=str(videoseal_small.card), checkpoint=videoseal_small.checkpoint, output=tmp_path / "m.tflite")
    assert [path.name for path in tmp_path.iterdir()] == ["other.safetensors"]


def test_an_edited_card_makes_the_product_stale(videoseal_small: Small, tmp_path: Path, float_model: Path) -> None:
    provenance = read_provenance(float_model)
    assert provenance is not None
    card = tmp_path / "videoseal_small.toml"
    card.write_text(videoseal_small.card.read_text().replace("image_size = 64", "image_size = 65"))
    with pytest.raises(ToolError, match="exists and is out of date"):
        convert_detector(model=str(card), checkpoint=videoseal_small.checkpoint, output=float_model)


def test_half_precision_weights_are_cast_and_reported(videoseal_small: Small, tmp_path: Path) -> None:
    half = {key: value.half() for key, value in load_file(videoseal_small.checkpoint).items() if key.startswith("detector.")}
    save_file(half, tmp_path / "half.safetensors")
    result = convert_detector(
        model=str(videoseal_small.card), checkpoint=tmp_path / "half.safetensors", output=tmp_path / "m.tflite"
    )
    assert result.float_model.casts == ["torch.float16"]
    assert "the weights were torch.float16" in result.message


def test_too_little_memory_or_disk_is_reported_before_the_work(
    videoseal_small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"model": str(videoseal_small.card), "checkpoint": videoseal_small.checkpoint, "output": tmp_path / "m.tflite"}
    monkeypatch.setattr("shared.command.resources.available_memory_bytes", lambda: 2**20)
    with pytest.raises(ToolError, match=r"not enough free memory to convert this model; got 0.0 GiB; expected at least 0.9 GiB"):
        convert_detector(**arguments)  # type: ignore[arg-type]
    monkeypatch.setattr("shared.command.resources.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(ToolError, match="not enough free disk to convert this model"):
        convert_detector(**arguments)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


BAD_INPUTS = {
    "no weights": "give either --checkpoint FILE or --rehearsal",
    "both": "give either --checkpoint FILE or --rehearsal",
    "missing": "no such input file",
    "empty": "the checkpoint file is empty",
    "text": "not a checkpoint",
    "nan": "holds 1 NaN",
    "missing keys": "1 missing",
    "wrong model": "missing",
    "unknown model": "did you mean videoseal",
    "unknown precision": "int9",
    "output exists": "use --overwrite",
    "no folder": "no such folder",
}


@pytest.mark.parametrize("fault", BAD_INPUTS)
def test_bad_input_is_one_line_exit_2_and_nothing_written(
    fault: str, videoseal_small: Small, tmp_path: Path, run_tool: Run
) -> None:
    weights = tmp_path / "weights.safetensors"
    state = load_file(videoseal_small.checkpoint)
    if fault == "nan":
        state["detector.pixel_decoder.linear.bias"][3] = float("nan")
    if fault == "missing keys":
        del state["detector.pixel_decoder.linear.bias"]
    save_file(state, weights)
    if fault in ("empty", "text"):
        weights.write_text("" if fault == "empty" else "weights, honestly\n")
    if fault == "missing":
        weights.unlink()
    output = tmp_path / ("absent" if fault == "no folder" else "") / "m.tflite"
    if fault == "output exists":
        output.write_text("precious")
    model = {"unknown model": "videosea", "wrong model": "videoseal"}.get(fault, videoseal_small.card)
    options: list[str | Path] = [] if fault == "no weights" else ["--checkpoint", weights]
    options += ["--rehearsal"] if fault == "both" else []
    options += ["--quantize", "int9"] if fault == "unknown precision" else []
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    done = run_tool("convert_detector", "--model", model, "-o", output, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr)
    assert BAD_INPUTS[fault] in done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_terminated_in_the_middle_nothing_is_left(videoseal_small: Small, tmp_path: Path) -> None:
    """Also not the folded weights, which a child was writing."""
    command = [sys.executable, "-m", "tools.convert_detector", "--model", str(videoseal_small.card)]
    command += ["--checkpoint", str(videoseal_small.checkpoint), "-o", str(tmp_path / "m.tflite")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not any(path.name.startswith(".m.folded") and path.stat().st_size for path in tmp_path.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.count("\n")) == (143, 1)
    assert not list(tmp_path.iterdir())


def test_the_checkpoint_is_never_replaced(videoseal_small: Small, tmp_path: Path) -> None:
    weights = Path(shutil.copy(videoseal_small.checkpoint, tmp_path / "w.safetensors"))
    before = weights.read_bytes()
    for quantize in (Precision.NONE, Precision.INT8):
        with pytest.raises(ToolError, match="the output is the checkpoint"):
            convert_detector(model=str(videoseal_small.card), checkpoint=weights, output=weights, quantize=quantize, overwrite=True)
    assert weights.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_quantized_model_does_not_replace_its_float_one(videoseal_small: Small, tmp_path: Path) -> None:
    output = tmp_path / "small_detector_videoseal_small_64.tflite"
    with pytest.raises(ToolError, match="would replace its float32 model"):
        convert_detector(
            model=str(videoseal_small.card), checkpoint=videoseal_small.checkpoint, output=output, quantize=Precision.INT8
        )


@pytest.mark.parametrize("taken", ["m.tflite", "small_detector_videoseal_small_rehearsal_64.tflite"])
def test_a_taken_name_is_reported_before_anything_is_written(videoseal_small: Small, tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).write_text("precious")
    with pytest.raises(ToolError, match=f"{taken}: the output exists"):
        convert_detector(model=str(videoseal_small.card), rehearsal=True, output=tmp_path / "m.tflite", quantize=Precision.INT8)
    assert [path.name for path in tmp_path.iterdir()] == [taken]


def test_an_image_too_small_for_the_network_is_reported_before_anything_is_written(videoseal_small: Small, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="too small for the network; got 63 pixels; expected at least 64"):
        convert_detector(model=str(videoseal_small.card), rehearsal=True, output=tmp_path / "m.tflite", image_size=63)
    assert not list(tmp_path.iterdir())


# ONNX.


@pytest.fixture(scope="module")
def onnx_model(videoseal_small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small VideoSeal network as ONNX model."""
    output = tmp_path_factory.mktemp("onnx") / "small.onnx"
    convert_detector(model=str(videoseal_small.card), checkpoint=videoseal_small.checkpoint, output=output)
    return output


def test_onnx_output_is_the_published_codes(onnx_model: Path, videoseal_small: Small) -> None:
    tensors = load_file(videoseal_small.checkpoint)
    with open_model(ModelFile(onnx_model)) as model:
        assert (model.kernels, model.inputs[0].shape) == ("onnxruntime", (1, 3, 64, 64))
        for image, published in zip(tensors["_parity.input"], tensors["_parity.output"], strict=True):
            output = model.run({"image": image[None].numpy()})[0]["output_0"]
            np.testing.assert_allclose(output[0], published.numpy(), atol=TFLITE_TOLERANCE)


def test_an_onnx_detector_tells_what_it_is_and_nothing_of_where_it_was_made(onnx_model: Path) -> None:
    metadata = ModelFile(onnx_model).metadata
    assert (metadata["nbits"], metadata["image_size"], metadata["input_layout"]) == (32, 64, "nchw")
    assert (metadata["resize"], metadata["rehearsal"]) == (False, False)
    assert ModelFile(onnx_model).nbits == 32
    assert external_files(onnx_model) == []
    for place in (str(ROOT), "site-packages", 'File "'):
        assert place.encode() not in onnx_model.read_bytes()
    provenance = read_provenance(onnx_model)
    assert provenance is not None
    assert {"torch", "onnxruntime"} <= provenance.versions.keys()


def test_a_dynamic_batch_of_three_answers_as_one_after_the_other(videoseal_small: Small, tmp_path: Path) -> None:
    output = tmp_path / "m.onnx"
    convert_detector(model=str(videoseal_small.card), checkpoint=videoseal_small.checkpoint, output=output, dynamic_batch=True)
    images = np.random.default_rng(0).random((3, 3, 64, 64), np.float32)
    with open_model(ModelFile(output)) as model:
        assert model.inputs[0].shape == (-1, 3, 64, 64)
        together = model.run({"image": images})[0]["output_0"]
        alone = [model.run({"image": image[None]})[0]["output_0"][0] for image in images]
    assert together.shape == (3, 33)
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-4)


def test_an_onnx_detector_is_up_to_date_and_the_form_decides(onnx_model: Path, videoseal_small: Small) -> None:
    arguments = {"model": str(videoseal_small.card), "checkpoint": videoseal_small.checkpoint, "output": onnx_model}
    assert convert_detector(**arguments).float_product.up_to_date  # type: ignore[arg-type]
    with pytest.raises(ToolError, match="out of date"):
        convert_detector(**arguments, dynamic_batch=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"output": "m.onnx", "quantize": Precision.INT8}, "--quantize is for TFLite; .*then run quantize_onnx"),
        (
            {"output": "m", "model_format": ModelFormat.ONNX, "quantize": Precision.FP16},
            "--quantize is for TFLite",
        ),
        ({"output": "m.tflite", "dynamic_batch": True}, "--dynamic-batch is for ONNX; add --format onnx"),
        ({"output": "m.tflite", "model_format": ModelFormat.ONNX}, "--format differs from the output's name"),
        ({"output": "m.onnx", "model_format": ModelFormat.TFLITE}, "--format differs from the output's name"),
        ({"output": "m.bin", "model_format": ModelFormat.ONNX}, r"an ONNX model's name must end in \.onnx"),
    ],
)
def test_options_that_do_not_go_with_the_format_are_refused(
    videoseal_small: Small, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    arguments = {**options, "output": tmp_path / options["output"]}
    with pytest.raises(ToolError, match=says):
        convert_detector(model=str(videoseal_small.card), checkpoint=videoseal_small.checkpoint, **arguments)
    assert not list(tmp_path.iterdir())


def test_refusing_to_quantize_to_onnx_is_one_line_and_exit_2(videoseal_small: Small, tmp_path: Path, run_tool: Run) -> None:
    options = ["--format", "onnx", "--quantize", "int8", "-o", tmp_path / "m.onnx"]
    done = run_tool("convert_detector", "--model", videoseal_small.card, "--checkpoint", videoseal_small.checkpoint, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: --quantize is for TFLite[^\n]+\n", done.stderr)
    assert not list(tmp_path.iterdir())


def test_an_onnx_products_name_is_the_guides() -> None:
    name = file_name(load_card("videoseal"), InputForm(256), Precision.NONE, rehearsal=False, model_format=ModelFormat.ONNX)
    assert name == "videoseal_detector_videoseal_256.onnx"


@pytest.fixture
def writes_weights_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the exporter put weights beside its draft, as it does with those of large networks."""
    real = module._in_child

    def in_child(exporter: ModuleType, message: dict[str, Any], where: Path) -> dict[str, Any]:
        reply = real(exporter, message, where)
        if message["task"] == "convert":
            draft = Path(message["draft"])
            with_external_weights(draft, f"{draft.name}.data", least=256)
        return reply

    monkeypatch.setattr(module, "_in_child", in_child)


@pytest.mark.usefixtures("writes_weights_beside")
def test_weights_of_a_large_network_lie_beside_it_under_a_name_of_their_content(videoseal_small: Small, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"model": str(videoseal_small.card), "output": tmp_path / "m.onnx"}
    product = convert_detector(checkpoint=videoseal_small.checkpoint, **arguments).float_product
    (weights,) = external_files(product.path)
    assert re.fullmatch(r"m\.[0-9a-f]{8}\.data", weights.name)
    assert product.size_bytes == product.path.stat().st_size + weights.stat().st_size
    assert {path.name for path in tmp_path.iterdir()} == {"m.onnx", "m.onnx.json", weights.name}
    assert convert_detector(checkpoint=videoseal_small.checkpoint, **arguments).float_product.up_to_date
    state = load_file(videoseal_small.checkpoint)
    state["detector.pixel_decoder.linear.weight"] += 1
    (tmp_path / "other").mkdir()
    save_file(state, tmp_path / "other" / "w.safetensors")
    convert_detector(checkpoint=tmp_path / "other" / "w.safetensors", refresh=True, **arguments)
    (others,) = external_files(product.path)
    assert others.name != weights.name
    assert {path.name for path in tmp_path.iterdir()} == {"m.onnx", "m.onnx.json", others.name, "other"}


@pytest.mark.usefixtures("writes_weights_beside")
def test_weights_of_a_network_that_disagrees_with_torch_are_not_kept(
    videoseal_small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_RELATIVE_ERROR", -1.0)
    with pytest.raises(ToolError, match="disagrees with torch; nothing was kept"):
        convert_detector(model=str(videoseal_small.card), checkpoint=videoseal_small.checkpoint, output=tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_an_onnx_model_that_disagrees_with_torch_never_gets_its_name(
    videoseal_small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module._in_child

    def in_child(exporter: ModuleType, message: dict[str, Any], where: Path) -> dict[str, Any]:
        reply = real(exporter, message, where)
        model = onnx.load(message["draft"])
        for node in model.graph.node:
            node.op_type = "Tanh" if node.op_type == "Gelu" else node.op_type
            if node.op_type == "Tanh":
                del node.attribute[:]
        onnx.save(model, message["draft"])
        return reply

    monkeypatch.setattr(module, "_in_child", in_child)
    with pytest.raises(ToolError, match="disagrees with torch; nothing was kept"):
        convert_detector(model=str(videoseal_small.card), checkpoint=videoseal_small.checkpoint, output=tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
