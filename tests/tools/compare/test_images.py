"""Models that make images of images are compared with their reference and with the ground truth, and every gate on them trips."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from shared.command.errors import ToolError
from tests.conftest import REALDATA, ROOT, Run
from tests.support.small_onnx import save
from tests.tools.compare.test_page import parse
from tools.compare import compare
from tools.compare.image_quality import bicubic_scores
from tools.prepare_calibration import prepare_calibration
from tools.quantize_onnx import quantize_onnx
from tools.quantize_onnx.command import saturates

IMAGE_GATES = ("min_psnr", "min_ssim", "max_psnr_drop", "min_psnr_gain")
ADDED = 10  # grey levels that `brighter` adds
MISSING = 4  # grey levels by which the truth is brighter than the reference makes it


def write_enlarger(path: Path, *, added: float = 0, scale: float = 2, is_nhwc: bool = False, channels: int = 3) -> Path:
    """Write a model that repeats pixels, `scale` times as many each way, and adds grey levels; images of any size."""
    inner, shape = "image", ("n", channels, "h", "w")
    nodes = []
    if is_nhwc:
        nodes.append(onnx.helper.make_node("Transpose", ["image"], ["nchw"], perm=[0, 3, 1, 2]))
        inner, shape = "nchw", ("n", "h", "w", channels)
    how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    nodes.append(onnx.helper.make_node("Resize", [inner, "", "scales"], ["large"], **how))
    nodes.append(onnx.helper.make_node("Add", ["large", "added"], ["sum" if is_nhwc else "made"]))
    if is_nhwc:
        nodes.append(onnx.helper.make_node("Transpose", ["sum"], ["made"], perm=[0, 2, 3, 1]))
    made = [size if size in ("n", channels) else f"{size}2" for size in shape]
    weights = {"scales": np.array([1, 1, scale, scale], np.float32), "added": np.float32(added / 255).reshape(1)}
    return save(path, nodes, {"image": shape}, {"made": made}, weights)


@pytest.fixture(scope="module")
def enlargers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models that make images of images, all alike but for what their names say."""
    folder = tmp_path_factory.mktemp("enlargers")
    kinds: dict[str, dict[str, Any]] = {"brighter": {"added": ADDED}, "nhwc": {"is_nhwc": True}, "threefold": {"scale": 3}}
    found = {name: write_enlarger(folder / f"twofold_{name}.onnx", **options) for name, options in kinds.items()}
    return {"twofold": write_enlarger(folder / "twofold.onnx"), **found}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three images, `small/*_lr.png`, and of what they should become, `truth/*.png`."""
    folder = tmp_path_factory.mktemp("pairs")
    for name in ("small", "truth"):
        (folder / name).mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(50, 200, (16 + number, 20, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "small" / f"{number}_lr.png")
        large = np.repeat(np.repeat(pixels, 2, axis=0), 2, axis=1) + np.uint8(MISSING)
        Image.fromarray(large).save(folder / "truth" / f"{number}.png")
    return folder


def luma_db(levels: float) -> float:
    """Return the luma PSNR of an image that is everywhere so many grey levels off."""
    return float(20 * np.log10(255 / (levels * 219 / 255)))


def test_images_are_compared_with_the_references_and_with_the_truth(enlargers: dict[str, Path], pairs: Path) -> None:
    found = compare(
        enlargers["twofold"], [enlargers["brighter"]], images=pairs / "small", ground_truth=pairs / "truth", runs=3, threads=1
    ).findings
    task, images = found.images, found.candidates[0].images
    assert task is not None
    assert images is not None
    files = [pairs / "small" / f"{number}_lr.png" for number in range(3)]
    truths = [pairs / "truth" / f"{number}.png" for number in range(3)]
    assert (found.samples, task.files, task.truths, task.bicubic) == (3, files, truths, bicubic_scores(files, truths))
    decibel = 20 * np.log10(255 / ADDED)
    assert [images.psnr_db, images.worst_psnr_db, *images.samples] == pytest.approx([decibel] * 5, abs=1e-3)
    assert images.ssim is not None
    assert 0.9 < images.ssim < 1
    assert task.reference is not None
    assert images.truth is not None
    assert task.reference.psnr_db == pytest.approx(luma_db(MISSING))
    assert images.truth.psnr_db == pytest.approx(luma_db(ADDED - MISSING))
    assert found.candidates[0].bit_agreement is None


def test_models_of_the_luma_are_measured_against_bicubic_of_the_luma(pairs: Path, tmp_path: Path) -> None:
    models = [write_enlarger(tmp_path / f"luma{added}.onnx", added=added, channels=1) for added in (0, ADDED)]
    found = compare(models[0], models[1:], images=pairs / "small", ground_truth=pairs / "truth", runs=1, threads=1).findings
    assert found.images is not None
    assert found.images.bicubic == bicubic_scores(found.images.files, found.images.truths, channels=1)
    assert found.images.reference is not None
    assert found.images.reference.psnr_db == pytest.approx(20 * np.log10(255 / MISSING), abs=0.2)


def test_every_gate_on_images_is_kept_at_its_value_and_trips_beyond(enlargers: dict[str, Path], pairs: Path) -> None:
    given: dict[str, Any] = {"images": pairs / "small", "ground_truth": pairs / "truth", "runs": 1, "threads": 1}
    models = enlargers["twofold"], [enlargers["brighter"]]
    found = compare(*models, **given, gate=[f"{name}=0" for name in IMAGE_GATES]).findings
    values = {gate.name: gate.value for gate in found.candidates[0].gates}
    assert values["max_psnr_drop"] == pytest.approx(20 * np.log10((ADDED - MISSING) / MISSING))
    assert found.images is not None
    assert found.images.bicubic is not None
    assert values["min_psnr_gain"] == pytest.approx(luma_db(ADDED - MISSING) - found.images.bicubic.psnr_db)
    for side, ok in ((-1e-6, True), (1e-6, False)):
        limits = {name: values[name] + (-side if name.startswith("max") else side) for name in IMAGE_GATES}
        result = compare(*models, **given, gate=[f"{name}={limit!r}" for name, limit in limits.items()])
        assert {gate.name: gate.ok for gate in result.findings.candidates[0].gates} == dict.fromkeys(IMAGE_GATES, ok)
        assert result.ok is ok


def test_a_gate_on_images_is_broken_by_a_model_that_makes_none(float_model: Path) -> None:
    result = compare(float_model, [float_model], runs=1, samples=1, gate=["min_psnr=1"])
    assert [(gate.name, gate.value, gate.ok) for gate in result.findings.candidates[0].gates] == [("min_psnr", None, False)]
    assert not result.ok


def test_models_that_enlarge_differently_cannot_be_compared(enlargers: dict[str, Path], pairs: Path) -> None:
    found = compare(enlargers["twofold"], [enlargers["threefold"]], images=pairs / "small", runs=1).findings
    assert "differ in shape" in str(found.candidates[0].problem)


def test_seeded_samples_do_for_models_that_make_images(enlargers: dict[str, Path], tmp_path: Path) -> None:
    result = compare(enlargers["twofold"], [enlargers["brighter"]], samples=2, runs=2, html=tmp_path / "r.html")
    images = result.findings.candidates[0].images
    assert images is not None
    assert images.psnr_db == pytest.approx(20 * np.log10(255 / ADDED), abs=1e-3)
    assert "<img" not in (tmp_path / "r.html").read_text()


def test_both_layouts_of_an_image_are_the_same_output(enlargers: dict[str, Path], pairs: Path) -> None:
    candidate = compare(enlargers["twofold"], [enlargers["nhwc"]], images=pairs / "small", runs=1).findings.candidates[0]
    assert candidate.problem is None
    assert candidate.images is not None
    assert candidate.images.psnr_db > 100
    assert candidate.images.ssim == pytest.approx(1)
    assert candidate.cosine == pytest.approx(1)
    assert candidate.max_abs_error == pytest.approx(0, abs=1e-6)


def test_the_page_shows_what_models_make_of_the_images(enlargers: dict[str, Path], pairs: Path, tmp_path: Path) -> None:
    given = {"images": pairs / "small", "ground_truth": pairs / "truth"}
    result = compare(enlargers["twofold"], [enlargers["brighter"]], runs=1, html=tmp_path / "r.html", **given)
    page = (tmp_path / "r.html").read_text()
    assert result.html is not None
    assert len(parse(page).sources) == 3 * 5
    for caption in ("input", "reference", "brighter", "truth", f"brighter - reference, {100 // ADDED} times"):
        assert page.count(f"<figcaption>{caption}</figcaption>") == 3
    for text in (
        "PSNR to the reference",
        "SSIM to the reference",
        "luma PSNR to the truth",
        "to bicubic",
        "luma SSIM to the truth",
    ):
        assert text in page


def test_images_come_from_a_pattern_or_from_what_a_calibration_set_holds_out(
    enlargers: dict[str, Path], pairs: Path, tmp_path: Path
) -> None:
    def files(images: Path) -> list[str]:
        found = compare(enlargers["twofold"], [enlargers["brighter"]], images=images, samples=9, runs=1, threads=1).findings
        assert found.images is not None
        return [file.name for file in found.images.files]

    assert files(pairs / "small" / "[12]_*.png") == ["1_lr.png", "2_lr.png"]
    assert files(pairs / "small" / "1_lr.png") == ["1_lr.png"]
    for holdout in (0, 2):
        folder = tmp_path / f"{holdout}"
        prepare_calibration([pairs], output=folder, tile_size=8, max_samples=3, min_samples=1, holdout=holdout)
        content = json.loads((folder / "manifest.json").read_text())
        named = [entry["file"] for entry in content["holdout" if holdout else "samples"]]
        assert files(folder) == named


def test_the_manifest_itself_names_the_images_too(enlargers: dict[str, Path], pairs: Path, tmp_path: Path) -> None:
    prepare_calibration([pairs], output=tmp_path / "tiles", tile_size=8, max_samples=3, min_samples=1)
    images = tmp_path / "tiles" / "manifest.json"
    assert compare(enlargers["twofold"], [enlargers["brighter"]], images=images, runs=1).findings.samples == 3


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"ground_truth": "truth"}, "--ground-truth needs the images to make it from"),
        (
            {"images": "small", "gate": ["max_psnr_drop=0.1"]},
            "--gate max_psnr_drop needs the ground truth; give --images and",
        ),
        ({"images": "small", "gate": ["min_psnr_gain=0.1"]}, "--gate min_psnr_gain needs the ground truth"),
        ({"images": "small", "ground_truth": "small"}, r"images have no truth; got 0_lr\.png, 1_lr\.png, 2_lr\.png"),
        ({"images": "small", "ground_truth": "truth/[01].png"}, r"images have no truth; got 2_lr\.png"),
        ({"images": "small", "ground_truth": "absent"}, "no such image folder"),
        ({"images": "small/*.jpg"}, "no images match"),
        ({"images": "truth", "ground_truth": "small/*"}, "images have no truth"),
    ],
)
def test_images_and_truths_that_make_no_sense_are_errors(
    enlargers: dict[str, Path], pairs: Path, options: dict[str, Any], reason: str
) -> None:
    options = {name: pairs / value if isinstance(value, str) else value for name, value in options.items()}
    with pytest.raises(ToolError, match=reason) as caught:
        compare(enlargers["twofold"], [enlargers["brighter"]], **options)
    assert "\n" not in str(caught.value)


def test_a_truth_for_models_that_make_no_images_is_an_error(float_model: Path, pairs: Path) -> None:
    with pytest.raises(ToolError, match="--ground-truth is for models that make images"):
        compare(float_model, [float_model], images=pairs / "small", ground_truth=pairs / "truth", runs=1)


def test_exit_codes_for_images(enlargers: dict[str, Path], pairs: Path, tmp_path: Path, run_tool: Run) -> None:
    given = ["--images", pairs / "small", "--ground-truth", pairs / "truth", "--runs", "1"]
    models = [enlargers["twofold"], enlargers["brighter"]]
    kept = run_tool("compare", *models, *given, "--gate", "min_psnr=28", "--gate", "max_psnr_drop=4")
    assert (kept.returncode, kept.stderr) == (0, "")
    tripped = run_tool("compare", *models, *given, "--gate", "min_psnr=29", "--gate", "max_psnr_drop=4")
    assert (tripped.returncode, tripped.stderr) == (1, "")
    assert "FAILED: brighter min_psnr" in " ".join(tripped.stdout.split())
    for number in range(3):
        Image.new("RGB", (40, 33)).save(tmp_path / f"{number}.png")
    wrong = run_tool("compare", *models, "--images", pairs / "small", "--ground-truth", tmp_path, "--runs", "1")
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)
    assert "an image is 40x32 pixels, its truth 40x33" in wrong.stderr


@pytest.mark.realdata
def test_the_shipped_super_resolution_beats_bicubic_and_its_int8_product_keeps_that(tmp_path: Path) -> None:
    model, images = ROOT / "models" / "minisr" / "minisr_x2.onnx", REALDATA / "images"
    photos = sorted(images.glob("kodim*.png"))
    prepare_calibration(photos, output=tmp_path / "tiles", tile_size=128, max_samples=16)
    settings = [f"reduce_range={saturates()}".lower()]
    product = quantize_onnx(model, output=tmp_path / "int8.onnx", calibration=tmp_path / "tiles", set_options=settings).product
    assert product is not None
    given = {"images": images / "set5_*_x2lr.png", "ground_truth": images / "set5_*[a-z].png"}
    result = compare(model, [product.path], runs=1, gate=["max_psnr_drop=0.3", "min_psnr_gain=0.5"], **given)  # type: ignore[arg-type]
    task = result.findings.images
    assert result.ok, result.message
    assert result.findings.samples == 5
    assert task is not None
    assert task.reference is not None
    assert task.bicubic is not None
    assert task.reference.psnr_db >= task.bicubic.psnr_db + 0.5
