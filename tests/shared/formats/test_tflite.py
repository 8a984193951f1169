"""What a model file says of itself is read without loading it."""

import zipfile
from pathlib import Path

import pytest

from shared.command.errors import ToolError
from shared.formats.tflite import check_is_tflite, read_tflite
from shared.formats.tflite_metadata import append_metadata
from shared.formats.tflite_metadata import read_metadata as read_from
from tests.conftest import REALDATA


def read_metadata(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        return read_from(file)


def test_the_weights_of_every_op_are_counted(float_model: Path) -> None:
    ops = [op for op in read_tflite(float_model).ops if op.weight_bytes]
    counts = {kind: sum(op.op_type == kind for op in ops) for kind in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")}
    assert counts == {"CONV_2D": 5, "DEPTHWISE_CONV_2D": 5, "FULLY_CONNECTED": 11}
    largest = max(ops, key=lambda op: op.weight_bytes)
    assert (largest.weight_bytes, largest.dtype) == (64 * 64 * 9 * 4, "FLOAT32")
    assert len({op.name for op in ops}) == len(ops)
    assert all((op.scope, op.output) == (f"{op.name};", op.name) for op in ops), "every op has one output"


def test_metadata_is_appended_and_read_back(float_model: Path, tmp_path: Path) -> None:
    assert read_tflite(float_model).metadata == read_metadata(float_model) == {
        "image_size": 64, "input_layout": "nchw", "model": "videoseal_small", "nbits": 32, "rehearsal": False, "resize": False,
    }  # fmt: skip
    plain = tmp_path / "plain.bin"
    plain.write_bytes(b"\0" * 100)
    assert read_metadata(plain) == {}
    append_metadata(plain, {"a": 1})
    first = plain.read_bytes()
    assert read_metadata(plain) == {"a": 1}
    plain.write_bytes(b"\0" * 100)
    append_metadata(plain, {"a": 1})
    assert plain.read_bytes() == first


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"PK\x03\x04" + bytes(60), "perhaps a .task bundle"),
        (b"<html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"0123456789", "got text"),
    ],
)
def test_what_is_no_model_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "a.tflite").write_bytes(content)
    with pytest.raises(ToolError, match=says):
        check_is_tflite(tmp_path / "a.tflite")


def test_a_damaged_flatbuffer_is_an_error_not_a_traceback(float_model: Path, tmp_path: Path) -> None:
    content = float_model.read_bytes()
    for kept in (8, 64, 1000, len(content) // 2):
        damaged = tmp_path / "a.tflite"
        damaged.write_bytes(content[:kept].ljust(200, b"\xff"))
        with pytest.raises(ToolError, match="damaged TFLite model"):
            read_tflite(damaged)


@pytest.mark.realdata
def test_old_files_tell_their_op_types_too() -> None:
    """Files from before schema 3a keep the op in a deprecated field and leave the new one 0, which means ADD."""
    ops = read_tflite(REALDATA / "mediapipe" / "selfie_segmenter.tflite").ops
    assert sum(op.op_type == "CONV_2D" for op in ops) > 10
    assert {op.dtype for op in ops if op.op_type == "CONV_2D"} == {"FLOAT16"}


@pytest.mark.realdata
def test_weights_behind_dequantize_are_known_by_their_stored_type() -> None:
    assert read_tflite(REALDATA / "mediapipe" / "selfie_segmenter.tflite").restored_types == ["float16"]
    assert read_tflite(REALDATA / "tflite" / "mlperf_tiny_resnet_float.tflite").restored_types == []


def test_a_damaged_zip_is_no_metadata(tmp_path: Path) -> None:
    source = tmp_path / "a.bin"
    source.write_bytes(b"model")
    with zipfile.ZipFile(source, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("edgepress.json", '{"nbits": 3}' * 100)
    content = bytearray(source.read_bytes())
    content[60:80] = b"\xff" * 20
    source.write_bytes(content)
    assert read_metadata(source) == {}


def test_metadata_of_absurd_size_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"model")
    append_metadata(path, {"a": "x" * 2**17})
    assert read_metadata(path) == {}


@pytest.mark.realdata
def test_the_range_of_an_input_is_read_from_the_metadata() -> None:
    known = {
        "tflite/mobilenet_v1_0.25_224_float_metadata.tflite": (-1.0, 1.0),
        "mediapipe/selfie_segmenter.tflite": (0.0, 1.0),
        "tflite/mlperf_tiny_resnet_float.tflite": None,
    }
    assert {name: read_tflite(REALDATA / name).input_range for name in known} == known


def test_our_own_detectors_take_pixels_from_0_to_1(float_model: Path) -> None:
    assert read_tflite(float_model).input_range == (0.0, 1.0)


@pytest.mark.realdata
def test_custom_ops_are_named() -> None:
    assert read_tflite(REALDATA / "mediapipe" / "selfie_segmenter.tflite").custom_ops == ["Convolution2DTransposeBias"]
    assert read_tflite(REALDATA / "tflite" / "mlperf_tiny_resnet_float.tflite").custom_ops == []
