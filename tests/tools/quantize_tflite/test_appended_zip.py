"""The zip of label files that follows a TFLite model is carried over to the product."""

import shutil
import zipfile
from pathlib import Path

import pytest

from shared.command.errors import ToolError
from tests.conftest import REALDATA
from tools.quantize_tflite.bundle import copy_appended_zip


def test_an_appended_zip_is_carried_over_and_no_zip_stays_none(tmp_path: Path) -> None:
    source, target = tmp_path / "a.bin", tmp_path / "b.bin"
    source.write_bytes(b"model")
    target.write_bytes(b"smaller")
    copy_appended_zip(source, target)
    assert target.read_bytes() == b"smaller"
    with zipfile.ZipFile(source, "a") as archive:
        archive.writestr("labels.txt", "cat\ndog\n")
    copy_appended_zip(source, target)
    assert target.read_bytes().startswith(b"smaller")
    with zipfile.ZipFile(target) as archive:
        assert archive.read("labels.txt") == b"cat\ndog\n"


@pytest.mark.realdata
def test_label_files_of_a_real_model_are_carried_over(tmp_path: Path) -> None:
    source = REALDATA / "tflite" / "mobilenet_v1_0.25_224_float_metadata.tflite"
    target = tmp_path / "a.tflite"
    shutil.copy(REALDATA / "tflite" / "mlperf_tiny_resnet_float.tflite", target)
    copy_appended_zip(source, target)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target) as new:
        assert old.namelist() == new.namelist() != []
        assert all(old.read(name) == new.read(name) for name in old.namelist())


def test_a_damaged_zip_is_not_carried_over(tmp_path: Path) -> None:
    source, target = tmp_path / "a.bin", tmp_path / "b.bin"
    source.write_bytes(b"model")
    with zipfile.ZipFile(source, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("labels.txt", "cat, dog; " * 100)
    content = bytearray(source.read_bytes())
    content[60:80] = b"\xff" * 20
    source.write_bytes(content)
    target.write_bytes(b"smaller")
    with pytest.raises(ToolError, match="zip appended to the model is damaged"):
        copy_appended_zip(source, target)
