"""A model's format follows from its name, its size from all its files."""

import shutil
from pathlib import Path

import pytest

from shared.command.errors import ToolError
from shared.formats.model_file import check_is_model, format_of, model_files, read_metadata, size_bytes
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
    assert format_of(Path("some.folder") / name) == expected


def test_a_models_files_and_size_are_all_of_them(tmp_path: Path) -> None:
    path = save_picture_model(tmp_path / "m.onnx")
    assert (model_files(path), size_bytes(path)) == ([path], path.stat().st_size)
    data = tmp_path / "weights.data"
    with_external_weights(path, data.name)
    assert model_files(path) == [path, data]
    assert size_bytes(path) == path.stat().st_size + data.stat().st_size
    assert data.stat().st_size > path.stat().st_size


def test_a_tflite_model_is_one_file(float_model: Path) -> None:
    assert (model_files(float_model), size_bytes(float_model)) == ([float_model], float_model.stat().st_size)


def test_metadata_is_read_from_either_format(float_model: Path, tmp_path: Path) -> None:
    assert read_metadata(float_model)["nbits"] == 32
    assert read_metadata(save_picture_model(tmp_path / "m.onnx", metadata={"edgepress": '{"nbits": 8}'})) == {"nbits": 8}


def test_a_file_is_checked_as_what_its_name_says(float_model: Path, tmp_path: Path) -> None:
    onnx = save_picture_model(tmp_path / "m.onnx")
    for path in (float_model, onnx):
        check_is_model(path)
    with pytest.raises(ToolError, match="not an ONNX model; got a TFLite model"):
        check_is_model(Path(shutil.copy(float_model, tmp_path / "t.onnx")))
    with pytest.raises(ToolError, match="not a TFLite model"):
        check_is_model(Path(shutil.copy(onnx, tmp_path / "o.tflite")))
