"""A calibration set is repeatable; skipped sources are named; wrong options and too few samples are errors."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shared.command.errors import ToolError
from shared.files.provenance import provenance_path
from tests.conftest import ROOT, Run
from tests.shared.media.test_video import write_video
from tests.tools.prepare_calibration.conftest import BROKEN, SMALL, TILE, entries, everything, manifest, picture, write_photos
from tools.prepare_calibration import prepare_calibration
from tools.prepare_calibration.command import SHOWN, SOURCES_PER_SAMPLE


def test_sources_without_samples_are_named_and_counted(mixed: Path, tmp_path: Path) -> None:
    result = prepare_calibration([mixed], output=tmp_path / "tiles", **SMALL)
    reasons = {source.source.removeprefix("photos/"): source.reason for source in result.found.skipped}
    assert set(reasons) == BROKEN
    assert reasons["tiny.png"] == f"smaller than a tile of {TILE} pixels"
    for name in BROKEN - {"tiny.png"}:
        assert reasons[name].startswith(("unreadable image; ", "the image file is empty; ")), name
    assert manifest(tmp_path / "tiles")["skipped"] == [{"source": s.source, "reason": s.reason} for s in result.found.skipped]
    assert "4 sources SKIPPED" in result.message
    assert manifest(tmp_path / "tiles")["sources"] == result.found.sources == 14


def test_the_same_seed_gives_the_same_bytes_in_any_folder(photos: Path, tmp_path: Path) -> None:
    write_video(photos / "v.avi", [np.asarray(picture(number)) for number in range(5)])
    elsewhere = shutil.copytree(photos, tmp_path / "elsewhere" / "photos")
    options = {**SMALL, "holdout": 4, "npz": True, "synthetic": 3}
    for given, name in ((photos, "first"), (elsewhere, "again")):
        prepare_calibration([given], output=tmp_path / name, seed=7, **options)
    prepare_calibration([photos], output=tmp_path / "eight", seed=8, **options)
    assert everything(tmp_path / "first") == everything(tmp_path / "again")
    first, eight = ({entry["sha256"] for entry in entries(tmp_path / name)} for name in ("first", "eight"))
    assert len(eight & first) < len(eight) / 2


def test_a_missing_file_of_a_csv_is_named_as_skipped(photos: Path, tmp_path: Path) -> None:
    (photos / "list.csv").write_text("file\nabsent.png\nabsent.mp4\n" + "".join(f"{number}.png\n" for number in range(8)))
    result = prepare_calibration([photos / "list.csv"], output=tmp_path / "tiles", **SMALL)
    assert {source.source for source in result.found.skipped} == {"absent.png", "absent.mp4"}
    assert result.found.samples == 12


def test_too_few_samples_are_an_error_with_a_remedy(mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="too few samples; got 0 of 14 sources") as caught:
        prepare_calibration([mixed], output=tmp_path / "tiles", tile_size=500)
    reasons = "11 smaller than a tile of 500 pixels, 2 unreadable image, 1 the image file is empty, 0 near-duplicates"
    assert reasons in str(caught.value)
    assert "expected at least 8; give more or larger images" in str(caught.value)
    assert not (tmp_path / "tiles").exists()
    with pytest.raises(ToolError, match="too few samples; got 10 of 14"):
        prepare_calibration([mixed], output=tmp_path / "tiles", tile_size=TILE, tiles_per_image=1, min_samples=11)
    assert not (tmp_path / "tiles").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(ToolError, match="too few samples"):
        prepare_calibration([mixed], output=tmp_path / "mine", tile_size=500)
    assert list((tmp_path / "mine").iterdir()) == []


def test_max_samples_below_min_samples_is_allowed(photos: Path, tmp_path: Path) -> None:
    assert prepare_calibration([photos], output=tmp_path / "tiles", tile_size=TILE, max_samples=3).found.samples == 3


def test_of_many_sources_a_few_are_measured_and_the_number_is_reported(photos: Path, tmp_path: Path) -> None:
    result = prepare_calibration([photos], output=tmp_path / "one", tile_size=TILE, max_samples=1)
    assert (result.found.considered, result.found.sources) == (8, 8)
    for number in range(8, 20):
        picture(number).save(photos / f"{number}.png")
    result = prepare_calibration([photos], output=tmp_path / "two", tile_size=TILE, max_samples=1)
    assert (result.found.considered, result.found.sources) == (SOURCES_PER_SAMPLE, 20)
    assert f"1 samples from {SOURCES_PER_SAMPLE} of 20 sources" in result.message
    content = manifest(tmp_path / "two")
    assert (content["considered"], content["sources"]) == (SOURCES_PER_SAMPLE, 20)


def test_only_some_skipped_sources_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    from rich.console import Console

    write_photos(tmp_path / "photos", 8)
    for number in range(SHOWN + 3):
        (tmp_path / "photos" / f"broken{number:02d}.png").write_text(f"no image {number}")
    result = prepare_calibration([tmp_path / "photos"], output=tmp_path / "tiles", **SMALL)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(result)
    assert capture.get().count("unreadable image") == SHOWN
    assert "and 3 more; manifest.json has all" in capture.get()
    assert len(manifest(tmp_path / "tiles")["skipped"]) == SHOWN + 3


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"resize": "64", "tile_size": 32}, "--resize takes whole images, --tile-size cuts them; give only"),
        ({"resize": "big"}, "--resize is no size; got big; expected pixels, such as 256 or 320x240"),
        ({"resize": "x240"}, "--resize is no size"),
        ({"resize": "320x-1"}, "--resize is no size"),
        ({"resize": "0"}, "--resize is out of range"),
        ({"resize": "99999x8"}, "--resize is out of range"),
        *(
            ({name: value}, f"--{name.replace('_', '-')} does nothing without --npz; leave it out, or add --npz")
            for name, value in {"input_name": "x", "input_range": "0..255", "layout": "nhwc", "channels": "1"}.items()
        ),
    ],
)
def test_wrong_options_are_errors(photos: Path, tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ToolError, match=reason):
        prepare_calibration([photos], output=tmp_path / "tiles", **options)
    assert not (tmp_path / "tiles").exists()


def test_nothing_to_take_samples_from_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="there is nothing to take samples from; name images"):
        prepare_calibration(output=tmp_path / "tiles")


def test_thousands_of_images_take_little_memory(tmp_path: Path) -> None:
    """The decoded pictures together would take 400 MB."""
    (tmp_path / "photos").mkdir()
    for number, block in enumerate(np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), np.uint8)):
        file = io.BytesIO()
        Image.fromarray(block).resize((256, 256), Image.Resampling.NEAREST).save(file, "JPEG")
        for copy in range(40):  # with different bytes after the end of the picture
            (tmp_path / "photos" / f"{number}_{copy}.jpg").write_bytes(file.getvalue() + bytes([copy]))
    lines = (
        "import sys; from pathlib import Path; from shared.command.resources import peak_rss_bytes",
        "from tools.prepare_calibration import prepare_calibration as prepare",
        "found = prepare([Path(sys.argv[1])], output=Path(sys.argv[2]), tile_size=64, tiles_per_image=1, max_samples=250).found",
        "print(found.considered, found.samples, peak_rss_bytes() // 2**20)",  # getrusage would count the memory of the tests
    )
    command = [sys.executable, "-c", "\n".join(lines), str(tmp_path / "photos"), str(tmp_path / "tiles")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    considered, samples, peak_mb = map(int, done.stdout.split())
    assert considered == 2000
    assert samples >= 50
    assert peak_mb < 300


def test_the_command_prints_json_and_refuses_wrong_usage_in_a_single_line(mixed: Path, tmp_path: Path, run_tool: Run) -> None:
    done = run_tool("prepare_calibration", mixed, "-o", tmp_path / "tiles", "--tile-size", TILE, "--max-samples", "9", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert (result["found"]["samples"], len(result["found"]["skipped"])) == (9, 4)
    assert provenance_path(tmp_path / "tiles" / "manifest.json").is_file()
    for wrong in ([mixed, "-o", tmp_path / "no", "--layout", "hwc"], [mixed]):
        done = run_tool("prepare_calibration", *wrong)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert done.stderr.startswith("error: ")
    assert not (tmp_path / "no").exists()
