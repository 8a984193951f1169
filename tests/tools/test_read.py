"""read says what is in images and videos, and fails where the expected message is not."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from shared.command.errors import ToolError
from shared.media.images import read_pixels
from shared.watermark.message import Labelled, read_messages, to_hex
from tests.conftest import Miniseal, Run
from tests.shared.media.test_video import write_video
from tools.read import read


@pytest.fixture(scope="module")
def sample(miniseal: Miniseal) -> Labelled:
    return next(image for image in read_messages(miniseal.messages) if image.message is not None)


@pytest.fixture(scope="module")
def message(sample: Labelled) -> str:
    assert sample.message is not None
    return to_hex(sample.message)


def test_an_image_is_read(miniseal: Miniseal, sample: Labelled, message: str) -> None:
    for detector, card in ((miniseal.int8, None), (miniseal.checkpoint, "miniseal")):
        (found,) = read(sample.file, detector=detector, card=card).readings
        assert (found.file, found.message, found.is_marked) == (sample.file.name, message, True)
        assert (found.bit_accuracy, found.p_value, found.frames) == (None, None, 0)
        assert int(found.bits, 2) == int(message, 16)
        assert found.confidence > 0.9


def test_an_expected_message_is_counted(miniseal: Miniseal, sample: Labelled, message: str) -> None:
    found = read(sample.file, detector=miniseal.int8, expected=message)
    assert found.ok
    assert found.readings[0].bit_accuracy == 1
    assert found.readings[0].p_value == pytest.approx(2**-32)
    inverted = f"{int(message, 16) ^ 0xFFFFFFFF:08x}"
    missed = read(sample.file, detector=miniseal.int8, expected=inverted)
    assert not missed.ok
    assert missed.readings[0].bit_accuracy == 0
    assert f"FAILED: the expected message is not in {sample.file.name}" in missed.message


def test_a_folder_is_read_image_by_image(miniseal: Miniseal, sample: Labelled, message: str, tmp_path: Path) -> None:
    assert sample.original is not None
    (tmp_path / "deeper").mkdir()
    shutil.copy(sample.file, tmp_path / "deeper" / f"marked{sample.file.suffix}")
    shutil.copy(sample.original, tmp_path / f"original{sample.original.suffix}")
    found = read(tmp_path, detector=miniseal.int8, expected=message)
    by_file = {Path(one.file).stem: one for one in found.readings}
    assert by_file["marked"].message == message
    assert by_file["marked"].file.startswith("deeper/")
    assert not by_file["original"].is_marked
    assert not found.ok
    assert found.message.startswith("1 of 2 held for marked; 32 bits each; FAILED")
    assert "marked." not in found.message.partition("FAILED")[2]


def test_a_video_is_read(miniseal: Miniseal, sample: Labelled, message: str, tmp_path: Path) -> None:
    video = write_video(tmp_path / "marked.avi", [read_pixels(sample.file)] * 5)
    for aggregation in ("avg", "l2norm_avg"):
        found = read(video, detector=miniseal.int8, expected=message, frames=4, aggregation=aggregation)  # type: ignore[arg-type]
        assert found.ok
        assert found.readings[0].frames == 4
        assert found.readings[0].is_marked


def test_what_cannot_be_read_is_one_line(miniseal: Miniseal, sample: Labelled, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "array.npy", np.zeros(3))
    for source, reason in (
        (tmp_path / "text.png", "unreadable image"),
        (tmp_path / "absent.png", "no such"),
        (tmp_path / "absent.mp4", "no such"),
        (tmp_path / "empty", "no image"),
        (tmp_path / "array.npy", "no image or video by its name"),
    ):
        with pytest.raises(ToolError, match=reason):
            read(source, detector=miniseal.int8)
    with pytest.raises(ToolError, match="not a message of 32 bits"):
        read(sample.file, detector=miniseal.int8, expected="1f")


def test_the_exit_code_says_whether_the_message_is_there(miniseal: Miniseal, sample: Labelled, message: str, run_tool: Run) -> None:
    options = ("read", sample.file, "--detector", miniseal.int8, "--expected")
    right, wrong = run_tool(*options, message, "--json"), run_tool(*options, "0" * 8)
    assert right.returncode == 0, right.stderr
    assert json.loads(right.stdout)["readings"][0]["message"] == message
    assert wrong.returncode == 1
    assert "FAILED: the expected message is not in" in wrong.stdout + wrong.stderr
