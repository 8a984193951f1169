"""One class reads watermarks with any product, from files, arrays and videos."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from shared.command.errors import ToolError
from shared.media.images import read_pixels
from shared.watermark import Agreement, Detection, WatermarkDetector
from shared.watermark.message import Labelled, read_messages, to_hex, to_int
from tests.conftest import Miniseal
from tests.shared.media.test_video import write_video


@pytest.fixture(scope="module")
def samples(miniseal: Miniseal) -> list[Labelled]:
    return read_messages(miniseal.messages)


@pytest.fixture(scope="module")
def marked(samples: list[Labelled]) -> Labelled:
    return next(image for image in samples if image.message is not None)


def test_a_message_is_read_in_every_form(miniseal: Miniseal, marked: Labelled) -> None:
    assert marked.message is not None
    assert marked.original is not None
    with WatermarkDetector(miniseal.int8) as detector:
        assert (detector.nbits, detector.image_size, detector.layout) == (32, 256, "nchw")
        found = detector.detect(marked.file, expected=marked.message)
        unmarked = detector.detect(str(marked.original), expected=to_hex(marked.message))
    np.testing.assert_array_equal(found.bits, marked.message)
    assert (found.hex, found.int) == (to_hex(marked.message), to_int(marked.message))
    assert found.bit_string == "".join("01"[int(bit)] for bit in marked.message)
    assert found.agreement == Agreement(32, 32)
    assert found.agreement.p_value == pytest.approx(2**-32)
    assert found.is_marked
    assert found.confidence > 0.9
    assert not unmarked.is_marked
    assert unmarked.confidence < 0.5
    assert unmarked.agreement is not None
    assert unmarked.agreement.p_value > 1e-4


def test_files_and_arrays_are_read_alike(miniseal: Miniseal, marked: Labelled) -> None:
    pixels = read_pixels(marked.file)
    with WatermarkDetector(miniseal.float_model) as detector:
        one, *others = detector.detect_batch([marked.file, pixels, pixels / 255, (pixels / 255).transpose(2, 0, 1)])
    for other in others:
        np.testing.assert_allclose(other.logits, one.logits, atol=1e-4)


def test_torch_and_tflite_read_alike(miniseal: Miniseal, marked: Labelled) -> None:
    with WatermarkDetector(miniseal.checkpoint, card="miniseal") as torch, WatermarkDetector(miniseal.float_model) as tflite:
        one, other = torch.detect(marked.file), tflite.detect(marked.file)
    np.testing.assert_allclose(one.logits, other.logits, atol=1e-3)
    assert one.confidence_logit == pytest.approx(other.confidence_logit, abs=1e-3)


def test_an_image_of_any_size_is_stretched(miniseal: Miniseal, marked: Labelled) -> None:
    large = np.repeat(np.repeat(read_pixels(marked.file), 2, axis=0), 3, axis=1)
    with WatermarkDetector(miniseal.int8) as detector:
        assert detector.detect(large, expected=marked.message).agreement == Agreement(32, 32)


def test_a_video_is_the_mean_of_its_frames(miniseal: Miniseal, samples: list[Labelled], marked: Labelled, tmp_path: Path) -> None:
    video = write_video(tmp_path / "marked.avi", [read_pixels(marked.file)] * 3 + [read_pixels(samples[1].file)])
    with WatermarkDetector(miniseal.int8) as detector:
        found = detector.detect_video(video, frames=4, expected=marked.message)
    assert len(found.frames) == 4
    np.testing.assert_allclose(found.logits, np.mean([frame.logits for frame in found.frames], axis=0), atol=1e-5)
    assert found.agreement is not None
    assert found.agreement.bit_accuracy > 0.95


def test_metadata_comes_from_the_file_not_from_its_name(miniseal: Miniseal, tmp_path: Path) -> None:
    renamed = Path(shutil.copy(miniseal.int8, tmp_path / "chunkyseal_1024_512_nhwc.tflite"))
    with WatermarkDetector(renamed) as detector:
        assert (detector.nbits, detector.image_size, detector.layout) == (32, 256, "nchw")
    content = renamed.read_bytes()
    bare = tmp_path / "bare.tflite"
    bare.write_bytes(content[: content.rindex(b"PK\x03\x04")])
    with pytest.raises(ToolError, match="does not tell its message length"):
        WatermarkDetector(bare)
    with pytest.raises(ToolError, match="no detector of 64 bits"):
        WatermarkDetector(bare, nbits=64)
    with WatermarkDetector(bare, nbits=32) as detector:
        assert detector.nbits == 32


def test_wrong_input_is_one_line(miniseal: Miniseal, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="no such"):
        WatermarkDetector(tmp_path / "absent.tflite")
    with pytest.raises(ToolError, match="no such checkpoint"):
        WatermarkDetector(tmp_path / "absent.safetensors", card="miniseal")
    (tmp_path / "text.png").write_text("no picture")
    with WatermarkDetector(miniseal.int8) as detector:
        for image, expected, reason in (
            (tmp_path / "text.png", None, "unreadable image"),
            (np.zeros((8, 8)), None, "no RGB image"),
            (np.zeros((8, 8, 3), np.uint8), "1f", "not a message of 32 bits"),
            ("a\0b.png", None, "the name of the image holds a zero byte"),
            ([[1.0]], None, "no RGB image"),
        ):
            with pytest.raises(ToolError, match=reason):
                detector.detect(image, expected=expected)  # type: ignore[arg-type]
        with pytest.raises(ToolError, match="a batch is a list of images"):
            detector.detect_batch("one.png")
        assert isinstance(detector.detect(np.zeros((8, 8, 3), np.uint8)), Detection)


def test_confidence_is_safe_for_any_logit() -> None:
    for logit, confidence in ((-1e4, 0.0), (0.0, 0.5), (1e4, 1.0), (2.0, 0.8807970779778823)):
        assert Detection(logit, np.zeros(4, np.float32)).confidence == pytest.approx(confidence)
