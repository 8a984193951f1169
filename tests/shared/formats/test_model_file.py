"""A model's format follows from its name, everything else from the file, which is parsed once."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.command.errors import ToolError
from shared.formats import model_file
from shared.formats.model_file import ModelFile
from shared.formats.onnx_graph import OnnxContent
from shared.formats.tflite import TfliteContent
from tests.support.small_onnx import save_picture_model, with_external_weights


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("m.onnx", "onnx"),
        (".m.onnx.0123abcd-123.partial", "onnx"),
        ("m.v2.onnx", "onnx"),
        ("m.tflite", "tflite"),
        (".m.tflite.123.partial", "tflite"),
        ("onnx.tflite", "tflite"),
        ("m", "tflite"),
    ],
)
def test_the_name_tells_the_format_of_a_draft_too(name: str, expected: str) -> None:
    assert ModelFile(Path("some.folder") / name).kind == expected


def test_a_models_files_and_size_are_all_of_them(tmp_path: Path) -> None:
    path = save_picture_model(tmp_path / "m.onnx")
    whole, size = ModelFile(path), path.stat().st_size
    assert (whole.files, whole.size_bytes) == ([path], size)
    data = tmp_path / "weights.data"
    split = ModelFile(with_external_weights(path, data.name))
    assert split.files == [path, data]
    assert split.size_bytes == path.stat().st_size + data.stat().st_size
    assert data.stat().st_size > path.stat().st_size


def test_a_tflite_model_is_one_file(float_model: Path) -> None:
    model = ModelFile(float_model)
    assert (model.files, model.size_bytes) == ([float_model], float_model.stat().st_size)


def test_the_size_of_a_damaged_tflite_model_is_that_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "m.tflite").write_bytes(bytes(100))
    assert ModelFile(tmp_path / "m.tflite").size_bytes == 100


def test_metadata_is_read_from_either_format(float_model: Path, tmp_path: Path) -> None:
    model = ModelFile(float_model)
    assert (model.metadata["nbits"], model.nbits, model.input_range) == (32, 32, (0.0, 1.0))
    onnx = ModelFile(save_picture_model(tmp_path / "m.onnx", metadata={"edgepress": '{"nbits": 8}'}))
    assert (onnx.metadata, onnx.nbits, onnx.input_range) == ({"nbits": 8}, 8, (0.0, 1.0))
    plain = ModelFile(save_picture_model(tmp_path / "plain.onnx"))
    assert (plain.metadata, plain.nbits, plain.input_range) == ({}, None, None)


@pytest.mark.parametrize("nbits", [0, -1, "32", 2.5, None])
def test_a_message_length_that_is_none_is_not_believed(nbits: object) -> None:
    assert ModelFile(Path("m.tflite"), TfliteContent([], metadata={"nbits": nbits})).nbits is None


def test_a_file_is_checked_as_what_its_name_says(float_model: Path, tmp_path: Path) -> None:
    onnx = save_picture_model(tmp_path / "m.onnx")
    for path in (float_model, onnx):
        ModelFile(path).check()
    with pytest.raises(ToolError, match="not an ONNX model; got a TFLite model"):
        ModelFile(Path(shutil.copy(float_model, tmp_path / "t.onnx"))).check()
    with pytest.raises(ToolError, match="not a TFLite model"):
        ModelFile(Path(shutil.copy(onnx, tmp_path / "o.tflite"))).check()


def test_a_file_is_parsed_when_it_is_asked_for_the_first_time_and_not_again(
    float_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[Path] = []

    def counted(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
        def parse(path: Path) -> Any:
            parsed.append(path)
            return read(path)

        return parse

    for name in ("read_tflite", "read_onnx"):
        monkeypatch.setattr(model_file, name, counted(getattr(model_file, name)))
    paths = [float_model, save_picture_model(tmp_path / "m.onnx")]
    models = [ModelFile(path) for path in paths]
    assert parsed == []
    for model in models:
        model.check()
        assert (len(model.ops) > 1, model.files, model.size_bytes) == (True, [model.path], model.path.stat().st_size)
        assert (model.metadata, model.nbits, model.input_range, model.why_slow()) == (
            model.content.metadata,
            model.metadata.get("nbits"),
            model.content.input_range,
            "",
        )
    assert parsed == paths


def test_content_that_is_known_already_is_not_read() -> None:
    for content in (TfliteContent([], metadata={"a": 1}), OnnxContent([], metadata={"a": 1})):
        model = ModelFile(Path("absent.onnx"), content)
        model.check()
        assert model.metadata == {"a": 1}
