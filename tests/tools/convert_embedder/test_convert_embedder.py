"""Converted embedders mark as the published ones do; those that would not never get their names."""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from shared.command.errors import ToolError
from shared.formats.model_file import ModelFile
from shared.media.images import resize
from shared.metrics.metrics import psnr_db
from shared.networks.card import load_card
from shared.watermark import WatermarkEmbedder
from tests.conftest import Run
from tests.shared.watermark.test_embedding import IMAGES, KINDS, Published, difference, marked
from tools.convert_detector import Precision, conversion
from tools.convert_embedder import convert_embedder
from tools.convert_embedder.request import EmbedderForm, ModelFormat, file_name, weights_bytes
from tools.verify import verify

CARDS = ("videoseal", "pixelseal", "chunkyseal", "videoseal_0.0")
MODEL_ERROR = 1e-5  # of images; torch itself differs by as much between one and two threads


@pytest.fixture(params=KINDS)
def published(request: pytest.FixtureRequest, tmp_path: Path) -> Published:
    return Published(request.param, tmp_path)


def converted(published: Published, name: str, **options: Any) -> Path:
    """Convert a small published embedder; return the file of that name."""
    output = published.folder / name
    convert_embedder(model=published.card(), checkpoint=published.checkpoint, output=output, **options)
    return output


@pytest.mark.parametrize("suffix", ["tflite", "onnx"])
def test_the_residual_form_marks_images_of_any_size_as_published(published: Published, suffix: str) -> None:
    made, model = published.made, converted(published, f"m.{suffix}")
    with WatermarkEmbedder(model, threads=1) as embedder:  # no card: the model says what is around it
        assert difference(marked(embedder, made["image"], made["message"]), made["output"]) < MODEL_ERROR
        frames = embedder.embed_frames_float(np.split(made["video"], len(made["video"])), made["video_message"][0])
        assert difference(np.concatenate(list(frames)), made["video_output_repeat"]) < MODEL_ERROR
    findings = verify(model).findings
    assert findings.ok
    assert "reacts to its message" in [check.name for check in findings.checks]


@pytest.mark.parametrize(("suffix", "size"), [("tflite", 80), ("onnx", 64)])
def test_the_image_form_is_the_whole_published_pipeline(published: Published, suffix: str, size: int) -> None:
    image = published.made["output_small"] if size == 64 else published.made["image"]
    image = resize(image[:1], size, size)
    model = converted(published, f"m.{suffix}", form=EmbedderForm.IMAGE, image_size=size)
    with published.open() as reference, WatermarkEmbedder(model, threads=1) as embedder:
        message = published.made["message"][0]
        assert difference(embedder.embed_float(image, message), reference.embed_float(image, message)) < MODEL_ERROR
        assert difference(embedder.embed_float(image, message), image) > 100 * MODEL_ERROR
        with pytest.raises(ToolError, match="takes images of one size; got 50x70"):
            embedder.embed(np.zeros((70, 50, 3), np.uint8), message)
        with pytest.raises(ToolError, match="for images alone"):
            next(embedder.embed_frames([np.zeros((64, 64, 3), np.uint8)], message))


def test_the_model_alone_takes_a_message_and_gives_a_watermark(tmp_path: Path) -> None:
    """LiteRT without our code around it."""
    published = Published("videoseal", tmp_path)
    made = published.made
    interpreter = Interpreter(str(converted(published, "m.tflite")), num_threads=1)
    run = interpreter.get_signature_runner()
    outputs = run(image=made["network_input"][:1], message=made["message"][:1].astype(np.float32))
    assert difference(next(iter(outputs.values())), made["raw"][:1]) < 5e-5


@pytest.mark.parametrize(
    ("form", "precision"),
    [(EmbedderForm.RESIDUAL, Precision.INT8), (EmbedderForm.IMAGE, Precision.INT8), (EmbedderForm.IMAGE, Precision.FP16)],
)
def test_quantized_embedders_mark_alike(form: EmbedderForm, precision: Precision, tmp_path: Path) -> None:
    published = Published("videoseal" if precision is Precision.INT8 else "videoseal00", tmp_path)
    made, path = published.made, converted(published, "m.tflite", form=form, quantize=precision)
    floats = {op.name: op.dtype for op in ModelFile(path).ops if op.dtype}
    ends = [dtype for name, dtype in floats.items() if "ResidualBlock_inc" in name or "Attenuation" in name or "outc" in name]
    assert precision is Precision.FP16 or set(ends) == {"FLOAT32"}
    assert {"INT8", "FLOAT16"} & set(floats.values())
    image, message = made["output_small"][:1], made["message"][0]
    with published.open() as reference, WatermarkEmbedder(path, threads=1) as embedder:
        expected, found = reference.embed_float(image, message), embedder.embed_float(image, message)
    assert psnr_db(expected, found) > psnr_db(expected, image) + 10
    assert psnr_db(expected, found) > 50


def test_a_message_blind_model_never_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter's sample message becomes a constant."""
    real, published = conversion._in_child, Published("videoseal", tmp_path)

    def in_child(exporter: ModuleType, message: dict[str, Any], where: Path) -> dict[str, Any]:
        reply = real(exporter, message, where)
        model = onnx.load(message["draft"])
        model.graph.initializer.append(numpy_helper.from_array(np.zeros((1, 32), np.float32), "baked"))
        for node in model.graph.node:
            node.input[:] = ["baked" if name == "message" else name for name in node.input]
        onnx.save(model, message["draft"])
        return reply

    monkeypatch.setattr(conversion, "_in_child", in_child)
    with pytest.raises(ToolError, match="answers the same for any input; nothing was kept; got message"):
        converted(published, "m.onnx")
    assert not list(tmp_path.glob("*.onnx*"))


def test_a_card_never_changes_what_a_model_says_of_itself(tmp_path: Path) -> None:
    """An RGB embedder's image form has the same inputs as its residual form: as such it would add the photo to itself."""
    published = Published("chunkyseal", tmp_path)
    model = converted(published, "m.onnx", form=EmbedderForm.IMAGE)
    image, message = published.made["output_small"][:1], published.made["message"][0]
    with WatermarkEmbedder(model) as alone, WatermarkEmbedder(model, card=published.card()) as carded:
        np.testing.assert_array_equal(alone.embed_float(image, message), carded.embed_float(image, message))
    with pytest.raises(ToolError, match="the model is of another card"):
        WatermarkEmbedder(model, card="chunkyseal")


@pytest.mark.parametrize("card", CARDS)
def test_the_size_predicted_from_a_card_is_right(card: str) -> None:
    from shared.networks.embedder import embedder_shapes

    exact = 4 * sum(int(np.prod(shape)) for shape in embedder_shapes(load_card(card)).values())
    assert weights_bytes(load_card(card)) == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize(
    ("form", "size", "precision", "name"),
    [
        (EmbedderForm.RESIDUAL, 256, Precision.INT8, "videoseal_embedder_videoseal_256_int8.tflite"),
        (EmbedderForm.IMAGE, 512, Precision.NONE, "videoseal_embedder_videoseal_512_image.tflite"),
    ],
)
def test_names_are_the_guides(form: EmbedderForm, size: int, precision: Precision, name: str) -> None:
    card = load_card("videoseal")
    assert file_name(card, form, size, precision, rehearsal=False, model_format=ModelFormat.TFLITE) == name


def test_a_rehearsal_has_the_checkpoints_keys_and_no_constant_weight(tmp_path: Path) -> None:
    published = Published("videoseal", tmp_path)
    result = convert_embedder(model=published.card(), rehearsal=True, output=tmp_path / "m.tflite")
    assert result.rehearsal
    assert "REHEARSAL" in result.message
    assert ModelFile(tmp_path / "m.tflite").metadata["rehearsal"]
    (weights,) = tmp_path.glob("*_rehearsal_seed0.safetensors")
    state = load_file(weights)
    with WatermarkEmbedder(weights, card=published.card()) as embedder:
        assert embedder.nbits == 32
    for key, value in state.items():
        assert value.numel() == 1 or value.float().std() > 0, key
        assert not key.endswith("running_var") or (value > 0).all(), key
    with pytest.raises(ToolError, match="these weights are a rehearsal's"):
        convert_embedder(model=published.card(), checkpoint=weights, output=tmp_path / "other.tflite")


BAD = {
    "no_embedder": (["--model", "face"], "unknown model 'face'"),
    "both": (["--model", "videoseal", "--rehearsal", "--checkpoint", "CHECKPOINT"], "give either --checkpoint FILE or --rehearsal"),
    "size": (["--model", "CARD", "--checkpoint", "CHECKPOINT", "--image-size", "128"], "--image-size is for --form image"),
    "format": (["--model", "CARD", "--checkpoint", "CHECKPOINT", "--format", "onnx"], "--format differs from the output's name"),
    "missing_key": (["--model", "CARD", "--checkpoint", "BROKEN"], "1 missing: unet.outc.bias"),
    "other_tables": (["--model", "CARD", "--checkpoint", "DIFFERENT"], "the two message tables of the checkpoint differ"),
    "no_file": (["--model", "CARD", "--checkpoint", "nowhere.pth"], "nowhere.pth"),
    "detector_card": (["--model", "CARDLESS", "--checkpoint", "CHECKPOINT"], "this model's card has no embedder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_exit_2_and_nothing_written(case: str, tmp_path: Path, run_tool: Run) -> None:
    published, arguments = Published("videoseal", tmp_path), BAD[case][0]
    state = load_file(published.checkpoint)
    save_file({key: value for key, value in state.items() if not key.endswith("outc.bias")}, tmp_path / "broken.safetensors")
    table = "embedder.msg_processor.msg_embeddings.weight"
    save_file({**state, table: state["embedder.unet.msg_processor.msg_embeddings.weight"] + 1}, tmp_path / "different.safetensors")
    cardless = tmp_path / "cardless.toml"
    cardless.write_text(
        Path(published.card()).read_text().partition("[embedder]")[0] + '[checkpoint]\nurl = "https://example.org/s.pth"\n'
    )
    files = {
        "CHECKPOINT": published.checkpoint,
        "CARD": published.card(),
        "BROKEN": tmp_path / "broken.safetensors",
        "DIFFERENT": tmp_path / "different.safetensors",
        "CARDLESS": cardless,
    }
    (tmp_path / "out").mkdir()
    done = run_tool(
        "convert_embedder", *(str(files.get(text, text)) for text in arguments), "-o", str(tmp_path / "out" / "m.tflite")
    )
    assert done.returncode == 2
    assert BAD[case][1] in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list((tmp_path / "out").iterdir())


def test_a_full_checkpoint_is_taken_as_published(tmp_path: Path) -> None:
    """Tensors of other parts lie in it."""
    published = Published("chunkyseal", tmp_path)
    state = {key: value for key, value in load_file(published.checkpoint).items() if "_parity" not in key}
    state |= {"attenuation.conv_x.weight": torch.ones(1, 1, 3, 3), "detector.pixel_decoder.linear.bias": torch.ones(5)}
    torch.save({"model": state, "epoch": 3}, published.folder / "full.pth")
    output = published.folder / "m.tflite"
    convert_embedder(model=published.card(), checkpoint=published.folder / "full.pth", output=output)
    with WatermarkEmbedder(output) as embedder, published.open() as reference:
        image, message = published.made["image"][:1], published.made["message"][0]
        assert difference(embedder.embed_float(image, message), reference.embed_float(image, message)) < 10 * IMAGES
