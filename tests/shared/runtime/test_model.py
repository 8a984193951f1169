"""Models of all formats load and run alike, and samples fit their inputs."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, save

from shared.command.errors import ToolError
from shared.formats.model_file import ModelFile
from shared.formats.tensors import TensorSpec, image_input
from shared.networks.card import InputForm, load_card
from shared.runtime import model as module
from shared.runtime.model import DetectorCheckpoint, choose_kernels, open_model
from shared.runtime.processes import ChildError
from shared.runtime.samples import Guess, image_sample, sample_inputs
from tests.conftest import REALDATA, Small
from tests.support.small_onnx import answer, save_picture_model, save_vector_model, seeded, with_external_weights


def test_a_tflite_model_tells_its_signature_and_runs(float_model: Path) -> None:
    with open_model(ModelFile(float_model), threads=1) as model:
        assert model.inputs == [TensorSpec("image", (1, 3, 64, 64), "float32")]
        assert model.outputs == [TensorSpec("output_0", (1, 33), "float32")]
        outputs, run_ms = model.run(sample_inputs(model.inputs, 0))
    assert outputs["output_0"].shape == (1, 33)
    assert run_ms > 0
    assert model.load_ms > 0
    assert model.peak_rss_bytes > 2**20


def test_torch_xnnpack_and_reference_kernels_agree(float_model: Path, videoseal_small: Small) -> None:
    card = load_card(str(videoseal_small.card))
    outputs = []
    sources = [
        (DetectorCheckpoint(videoseal_small.checkpoint, card), None),
        (ModelFile(float_model), "xnnpack"),
        (ModelFile(float_model), "reference"),
    ]
    for source, kernels in sources:
        with open_model(source, kernels=kernels) as model:  # type: ignore[arg-type]
            outputs.append(model.run(sample_inputs(model.inputs, 3))[0]["output_0"])
    for output in outputs[1:]:
        np.testing.assert_allclose(output, outputs[0], atol=1e-5)


def test_a_torch_detector_takes_the_form_of_a_product(videoseal_small: Small) -> None:
    source = DetectorCheckpoint(
        videoseal_small.checkpoint, load_card(str(videoseal_small.card)), InputForm(100, "nhwc", resize=True)
    )
    with open_model(source) as model:
        assert model.inputs[0].shape == (1, 100, 100, 3)
        assert model.run(sample_inputs(model.inputs, 0))[0]["output_0"].shape == (1, 33)


def test_a_damaged_model_is_an_error_of_the_child(float_model: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.tflite"
    content = bytearray(float_model.read_bytes())
    content[8:4000] = bytes(3992)
    damaged.write_bytes(content)
    with pytest.raises(ChildError), open_model(ModelFile(damaged)):
        pass


def test_a_file_of_another_kind_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.tflite").write_text("no model")
    with pytest.raises(ToolError, match="not a TFLite model"), open_model(ModelFile(tmp_path / "a.tflite")):
        pass


def test_our_models_tell_their_message_length(float_model: Path, videoseal_small: Small, tmp_path: Path) -> None:
    renamed = tmp_path / "anything.tflite"
    shutil.copy(float_model, renamed)
    assert ModelFile(renamed).nbits == 32
    assert DetectorCheckpoint(videoseal_small.checkpoint, load_card(str(videoseal_small.card))).nbits == 32


def test_kernels_follow_the_free_memory(float_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_kernels(ModelFile(float_model)) == "xnnpack"
    monkeypatch.setattr(module, "available_memory_bytes", lambda: 10)
    assert choose_kernels(ModelFile(float_model)) == "reference"


def test_samples_fit_their_inputs_and_repeat() -> None:
    specs = [
        TensorSpec("image", (1, 3, 16, 16), "float32"),
        TensorSpec("nhwc", (1, 16, 16, 3), "float32"),
        TensorSpec("points", (1, 5, 2), "float32"),
        TensorSpec("pixels", (1, 4), "uint8"),
        TensorSpec("ids", (2,), "int32"),
    ]
    samples = sample_inputs(specs, 7)
    for spec in specs:
        assert (samples[spec.name].shape, samples[spec.name].dtype) == (spec.shape, spec.dtype)
    assert samples["points"].min() >= 0
    assert samples["points"].max() <= 1
    again = sample_inputs(specs, 7)
    assert all(np.array_equal(samples[name], again[name]) for name in samples)


def test_the_same_picture_in_either_layout() -> None:
    nchw = sample_inputs([TensorSpec("a", (1, 3, 16, 16), "float32")], 1)["a"]
    nhwc = sample_inputs([TensorSpec("b", (1, 16, 16, 3), "float32")], 1)["b"]
    np.testing.assert_array_equal(nchw.transpose(0, 2, 3, 1), nhwc)


def test_text_inputs_cannot_be_made_up() -> None:
    with pytest.raises(ToolError, match="can't be made up"):
        sample_inputs([TensorSpec("text", (1,), "object")], 0)


@pytest.mark.parametrize("is_external", [False, True])
def test_an_onnx_model_runs_as_onnx_runtime_runs_it(tmp_path: Path, is_external: bool) -> None:
    path = save_picture_model(tmp_path / "m.onnx")
    expected = answer(path, image=seeded(1, 3, 16, 16))[0]
    if is_external:
        with_external_weights(path)
    with open_model(ModelFile(path), threads=1) as model:
        assert (model.inputs, model.outputs, model.kernels) == (
            [TensorSpec("image", (1, 3, 16, 16), "float32")],
            [TensorSpec("made", (1, 3, 16, 16), "float32")],
            "onnxruntime",
        )
        outputs, run_ms = model.run({"image": seeded(1, 3, 16, 16)})
        assert model.plain_ops() == {}
    np.testing.assert_allclose(outputs["made"], expected, rtol=1e-5, atol=1e-6)
    assert run_ms > 0


def test_a_free_axis_of_an_onnx_model_is_minus_one_and_takes_any_length(tmp_path: Path) -> None:
    path = save_picture_model(tmp_path / "m.onnx", shape=("n", 3, "h", "w"))
    with open_model(ModelFile(path), threads=1) as model:
        assert model.inputs[0].shape == (-1, 3, -1, -1)
        for shape in ((1, 3, 8, 12), (2, 3, 20, 16)):
            assert model.run({"image": seeded(*shape)})[0]["made"].shape == shape


def test_other_types_than_float_go_in_and_out(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["x"], ["b"], to=TensorProto.BOOL),
    ]
    given = [helper.make_tensor_value_info("x", TensorProto.INT64, [3])]
    made = [helper.make_tensor_value_info("h", TensorProto.FLOAT16, [3]), helper.make_tensor_value_info("b", TensorProto.BOOL, [3])]
    graph = helper.make_graph(nodes, "casts", given, made)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(tmp_path / "m.onnx"))
    with open_model(ModelFile(tmp_path / "m.onnx"), threads=1) as model:
        assert [spec.dtype for spec in (*model.inputs, *model.outputs)] == ["int64", "float16", "bool"]
        outputs, _ = model.run({"x": np.array([0, 1, 2])})
    np.testing.assert_array_equal(outputs["h"], np.array([0, 1, 2], np.float16), strict=True)
    np.testing.assert_array_equal(outputs["b"], [False, True, True])


def test_an_onnx_model_of_text_is_a_tool_error(tmp_path: Path) -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.STRING, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "text", ends[:1], ends[1:])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(tmp_path / "m.onnx"))
    with (
        pytest.raises(ToolError, match=r"tensor 'x' of the model holds tensor\(string\), not numbers"),
        open_model(ModelFile(tmp_path / "m.onnx")),
    ):
        pass


def test_an_onnx_model_of_unknown_ops_is_an_error_of_the_child(tmp_path: Path) -> None:
    path = save_picture_model(tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes().replace(b"Relu", b"Rely"))
    with pytest.raises(ChildError, match="Rely"), open_model(ModelFile(path)):
        pass


def test_an_onnx_models_size_and_message_length_are_its_own(tmp_path: Path) -> None:
    path = save_picture_model(tmp_path / "m.onnx", metadata={"edgepress": '{"nbits": 32}'})
    source, size = ModelFile(path), path.stat().st_size
    assert (source.size_bytes, source.nbits, choose_kernels(source)) == (size, 32, "onnxruntime")
    source = ModelFile(with_external_weights(path))
    assert source.size_bytes > 0.9 * size > path.stat().st_size
    assert source.nbits == 32
    assert ModelFile(save_vector_model(tmp_path / "v.onnx")).nbits is None


@pytest.mark.parametrize(
    ("specs", "is_image"),
    [
        ([TensorSpec("x", (-1, 1, 224, 224), "float32")], True),
        ([TensorSpec("x", (1, -1, -1, 3), "float32")], True),
        ([TensorSpec("x", (1, 3, 16, 16), "uint8")], True),
        ([TensorSpec("x", (4, 3, 16, 16), "float16")], True),
        ([TensorSpec("x", (1, 3, 16, 16), "int8")], False),
        ([TensorSpec("x", (-1, 8), "float32")], False),
        ([TensorSpec("x", (1, 3, 16, 16), "float32"), TensorSpec("scale", (1,), "float32")], False),
        ([], False),
    ],
)
def test_only_a_model_of_one_image_takes_an_image(specs: list[TensorSpec], is_image: bool) -> None:
    found = image_input(specs)
    assert (found is not None) == is_image
    assert found is None or found[0] == "x"


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((-1, 3, -1, -1), (1, 3, Guess().side, Guess().side)),
        ((-1, 1, 224, 200), (1, 1, 224, 200)),
        ((1, -1, 32, 3), (1, Guess().side, 32, 3)),
        ((-1, 8), (1, 8)),
        ((-1, -1, 8), (1, 1, 8)),
    ],
)
def test_free_axes_of_samples_are_settled(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    sample = sample_inputs([TensorSpec("x", shape, "float32")], 0)["x"]
    assert (sample.shape, sample.dtype) == (expected, np.float32)
    assert sample.std() > 0.05


@pytest.mark.parametrize("span", [(-1.0, 1.0), (0.0, 255.0)])
def test_made_up_pictures_span_the_range_that_the_model_takes(span: tuple[float, float]) -> None:
    sample = sample_inputs([TensorSpec("x", (1, 3, 32, 32), "float32")], 0, Guess(pixel_range=span))["x"]
    assert span[0] <= sample.min() < sample.max() <= span[1]
    assert np.ptp(sample) > 0.5 * (span[1] - span[0])


def test_an_image_is_stretched_to_a_model_of_one_size_only() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    for shape, expected in (((1, 3, -1, -1), (1, 3, 20, 30)), ((1, 16, 24, 3), (1, 16, 24, 3)), ((-1, 1, -1, -1), (1, 1, 20, 30))):
        assert image_sample([TensorSpec("x", shape, "float32")], pixels)["x"].shape == expected


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "shape", "made"),
    [
        ("super-resolution-10", (-1, 1, 224, 224), (1, 1, 672, 672)),
        ("realesr-animevideov3", (-1, 3, -1, -1), (1, 3, 512, 512)),
        ("srcnn_DerBurri", (1, 1, 224, 224), (1, 1, 224, 224)),
    ],
)
def test_other_peoples_onnx_models_run(name: str, shape: tuple[int, ...], made: tuple[int, ...]) -> None:
    with open_model(ModelFile(REALDATA / "onnx" / f"{name}.onnx")) as model:
        assert model.inputs[0].shape == shape
        outputs, _ = model.run(sample_inputs(model.inputs, 0))
    assert [values.shape for values in outputs.values()] == [made]


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["external_data_missing.onnx", "mangled.onnx"])
def test_other_peoples_broken_onnx_models_are_errors(name: str) -> None:
    with pytest.raises(ToolError), open_model(ModelFile(REALDATA / "corrupt" / name)):
        pass


@pytest.mark.realdata
@pytest.mark.parametrize(
    "name", ["mediapipe/pose_detection.tflite", "mediapipe/selfie_segmenter.tflite", "tflite/mlperf_tiny_resnet_int8.tflite"]
)
def test_other_peoples_models_run(name: str) -> None:
    with open_model(ModelFile(REALDATA / name)) as model:
        outputs, _ = model.run(sample_inputs(model.inputs, 0))
        assert [outputs[spec.name].shape for spec in model.outputs] == [spec.shape for spec in model.outputs]


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["mangled_a.tflite", "mangled_b.tflite"])
def test_other_peoples_mangled_models_are_errors(name: str) -> None:
    with pytest.raises(ChildError), open_model(ModelFile(REALDATA / "corrupt" / name)):
        pass
