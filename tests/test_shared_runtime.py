"""Any model is loaded and run the same way, and its samples fit its inputs."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from shared import runtime
from shared.cards import load_card
from shared.child import ChildError
from shared.errors import ToolError
from shared.runtime import InputForm, ModelSource, TensorSpec, choose_kernels, open_model, sample_inputs
from tests.conftest import REALDATA, Small


def test_a_tflite_model_tells_its_signature_and_runs(float_model: Path) -> None:
    with open_model(ModelSource(float_model), threads=1) as model:
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
        (ModelSource(videoseal_small.checkpoint, card), None),
        (ModelSource(float_model), "xnnpack"),
        (ModelSource(float_model), "reference"),
    ]
    for source, kernels in sources:
        with open_model(source, kernels=kernels) as model:  # type: ignore[arg-type]
            outputs.append(model.run(sample_inputs(model.inputs, 3))[0]["output_0"])
    for output in outputs[1:]:
        np.testing.assert_allclose(output, outputs[0], atol=1e-5)


def test_a_torch_detector_takes_the_form_of_a_product(videoseal_small: Small) -> None:
    source = ModelSource(videoseal_small.checkpoint, load_card(str(videoseal_small.card)), InputForm(100, "nhwc", resize=True))
    with open_model(source) as model:
        assert model.inputs[0].shape == (1, 100, 100, 3)
        assert model.run(sample_inputs(model.inputs, 0))[0]["output_0"].shape == (1, 33)


def test_a_damaged_model_is_an_error_of_the_child(float_model: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.tflite"
    content = bytearray(float_model.read_bytes())
    content[8:4000] = bytes(3992)
    damaged.write_bytes(content)
    with pytest.raises(ChildError), open_model(ModelSource(damaged)):
        pass


def test_a_file_of_another_kind_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.tflite").write_text("no model")
    with pytest.raises(ToolError, match="not a TFLite model"), open_model(ModelSource(tmp_path / "a.tflite")):
        pass


def test_our_models_tell_their_message_length(float_model: Path, videoseal_small: Small, tmp_path: Path) -> None:
    renamed = tmp_path / "anything.tflite"
    shutil.copy(float_model, renamed)
    assert ModelSource(renamed).nbits() == 32
    assert ModelSource(videoseal_small.checkpoint, load_card(str(videoseal_small.card))).nbits() == 32


def test_kernels_follow_the_free_memory(float_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_kernels(ModelSource(float_model)) == "xnnpack"
    monkeypatch.setattr(runtime, "available_memory_bytes", lambda: 10)
    assert choose_kernels(ModelSource(float_model)) == "reference"


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


@pytest.mark.realdata
@pytest.mark.parametrize(
    "name", ["mediapipe/pose_detection.tflite", "mediapipe/selfie_segmenter.tflite", "tflite/mlperf_tiny_resnet_int8.tflite"]
)
def test_other_peoples_models_run(name: str) -> None:
    with open_model(ModelSource(REALDATA / name)) as model:
        outputs, _ = model.run(sample_inputs(model.inputs, 0))
        assert [outputs[spec.name].shape for spec in model.outputs] == [spec.shape for spec in model.outputs]


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["mangled_a.tflite", "mangled_b.tflite"])
def test_other_peoples_mangled_models_are_errors(name: str) -> None:
    with pytest.raises(ChildError), open_model(ModelSource(REALDATA / "corrupt" / name)):
        pass
