"""compare measures both sides alike, and every gate of it trips."""

import inspect
import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from ai_edge_litert import schema_py_generated as schema
from PIL import Image

import noxfile
from shared.command.errors import ToolError
from shared.command.resources import saturates
from shared.files import artifacts
from shared.files.plan import Plan
from shared.formats.model_file import ModelFile
from shared.formats.tensors import TensorSpec
from shared.runtime import benchmark
from shared.runtime.benchmark import Measured, Shown
from shared.runtime.model import Model, open_model
from shared.runtime.processes import ChildError
from shared.runtime.samples import image_sample
from tests.conftest import REALDATA, ROOT, Miniseal, Run, Small
from tests.support.small_onnx import save, save_picture_model
from tests.tools.compare.test_page import parse
from tools.compare import command as module
from tools.compare import compare
from tools.compare.image_quality import bicubic_scores
from tools.compare.page import Page
from tools.convert_detector import convert_detector
from tools.prepare_calibration import prepare_calibration
from tools.quantize_onnx import quantize_onnx
from tools.quantize_tflite import quantize_tflite


@pytest.fixture(scope="module")
def products(float_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The float32 model and its products, side by side."""
    folder = tmp_path_factory.mktemp("products")
    found = {"none": Path(shutil.copy(float_model, folder / "model.tflite"))}
    for recipe in ("int8", "fp16"):
        found[recipe] = quantize_tflite(found["none"], recipe=recipe).product.path
    return found


def test_a_model_against_itself_is_perfect(products: dict[str, Path]) -> None:
    candidate = compare(products["none"], [products["none"]], runs=3, samples=2).findings.candidates[0]
    assert (candidate.bit_agreement, candidate.relative_error, candidate.max_abs_error) == (1, 0, 0)
    assert candidate.cosine == pytest.approx(1)
    assert candidate.reduction == 0


def test_candidates_are_measured_against_their_reference(products: dict[str, Path]) -> None:
    found = compare(products["none"], [products["int8"], products["fp16"]], runs=4, samples=3, threads=1).findings
    int8, fp16 = found.candidates
    assert (found.samples, found.threads, found.reference.runs, found.interleaved) == (3, 1, 4, True)
    for candidate in (int8, fp16):
        assert candidate.measured is not None
        assert candidate.measured.median_ms > 0
        assert candidate.measured.p90_ms >= candidate.measured.median_ms
        assert candidate.speedup == found.reference.median_ms / candidate.measured.median_ms
        assert candidate.reduction == 1 - candidate.size_bytes / found.reference.size_bytes
    assert int8.cosine is not None
    assert fp16.cosine is not None
    assert 0.99 < int8.cosine < fp16.cosine <= 1


def test_a_checkpoint_run_in_torch_is_a_reference(products: dict[str, Path], videoseal_small: Small) -> None:
    found = compare(videoseal_small.checkpoint, [products["none"]], model=str(videoseal_small.card), runs=2, samples=2).findings
    assert found.reference.kernels == "torch"
    assert found.candidates[0].relative_error is not None
    assert found.candidates[0].relative_error < 1e-5
    assert found.candidates[0].bit_agreement == 1


@pytest.mark.parametrize("gate", ["min_cosine", "min_speedup", "max_size_mb"])
def test_every_gate_trips_and_is_kept(products: dict[str, Path], gate: str) -> None:
    kept, tripped = {"max_size_mb": (100.0, 0.001), "min_speedup": (0.0, 1e6)}.get(gate, (0.0, 1.0))
    for limit, ok in ((kept, True), (tripped, False)):
        result = compare(products["none"], [products["int8"]], runs=2, samples=2, **{gate: limit})  # type: ignore[arg-type]
        found = result.findings.candidates[0].gates
        assert [(one.name, one.limit, one.ok) for one in found] == [(gate, limit, ok)]
        assert result.ok is ok
        assert ("FAILED" in result.message) is not ok


def test_bit_agreement_below_its_limit_trips(products: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The candidate, loaded last, answers with every sign turned."""
    run, init, loaded = Model.run, Model.__init__, []

    def remember(self: Model, *arguments: object) -> None:
        init(self, *arguments)  # type: ignore[arg-type]
        loaded.append(self)

    def turn(self: Model, inputs: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], float]:  # type: ignore[type-arg]
        outputs, run_ms = run(self, inputs)
        sign = np.float32(-1 if self is loaded[-1] and len(loaded) == 2 else 1)
        return {name: output * sign for name, output in outputs.items()}, run_ms

    monkeypatch.setattr(Model, "__init__", remember)
    monkeypatch.setattr(Model, "run", turn)
    result = compare(products["none"], [products["none"]], runs=2, samples=2, min_bit_agreement=0.9)
    assert not result.ok
    agreement = result.findings.candidates[0].bit_agreement
    assert agreement is not None
    assert agreement < 0.1


def test_one_model_at_a_time_where_memory_is_short(products: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    open_now, most = [0], [0]

    class Counting:
        def __init__(self, *arguments: object, **options: object) -> None:
            self.context = open_model(*arguments, **options)  # type: ignore[arg-type]

        def __enter__(self) -> Model:
            open_now[0] += 1
            most[0] = max(most[0], open_now[0])
            return self.context.__enter__()

        def __exit__(self, *details: object) -> None:
            open_now[0] -= 1
            self.context.__exit__(*details)  # type: ignore[arg-type]

    monkeypatch.setattr(benchmark, "open_model", Counting)
    monkeypatch.setattr(module, "available_memory_bytes", lambda: 2**30)
    found = compare(products["none"], [products["int8"]], runs=2, samples=2).findings
    assert (found.interleaved, most[0]) == (False, 1)
    monkeypatch.setattr(module, "available_memory_bytes", lambda: None)
    assert compare(products["none"], [products["int8"]], runs=2, samples=2).findings.interleaved
    assert most[0] == 2


def test_images_of_a_folder_are_the_inputs(products: dict[str, Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(rng.integers(0, 256, (80, 90, 3), np.uint8)).save(tmp_path / name)
    found = compare(products["none"], [products["int8"]], images=tmp_path, samples=2, runs=2).findings
    assert found.samples == 2
    made_up = compare(products["none"], [products["int8"]], samples=2, runs=2).findings
    assert found.candidates[0].max_abs_error != made_up.candidates[0].max_abs_error


def test_a_slower_candidate_is_told_in_words_with_the_reason(products: dict[str, Path]) -> None:
    assert module._verdict(ModelFile(products["int8"]), 2.0) == "2.00 times faster than its reference"
    slow = module._verdict(ModelFile(products["fp16"]), 0.5)
    assert slow.startswith("slower than its reference (0.50 times as fast): its float16 weights are unpacked to float32")
    assert "no faster kernels" in module._verdict(ModelFile(products["int8"]), 0.5)
    assert module._verdict(ModelFile(products["int8"]), 1.0).startswith("as fast as its reference")


def test_a_candidate_that_crashes_is_a_failed_check_not_a_crash(products: dict[str, Path], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.tflite"
    damaged.write_bytes(products["int8"].read_bytes()[:5000])
    result = compare(products["none"], [damaged, products["int8"]], runs=2, samples=2, min_cosine=0.5)
    broken, sound = result.findings.candidates
    assert broken.error is not None
    assert (broken.measured, [gate.ok for gate in broken.gates]) == (None, [False])
    assert sound.error is None
    assert not result.ok
    with pytest.raises(ToolError, match=r"damaged TFLite model|the reference does not run"):
        compare(damaged, [products["int8"]], runs=2, samples=2)


def shown(value: float, takes: str = "float32 image of 64 pixels") -> Shown:
    """Return what a model would have shown whose outputs all have one value."""
    measured = Measured(Path("model.tflite"), 10, 1, 1, 1, 1, "xnnpack", 1, [takes])
    return Shown(measured, [[np.full((1, 33), value, np.float32)]], [])


def task_of(products: dict[str, Path], files: list[Path] | None = None) -> module._Task:
    sources = [ModelFile(products["none"]), ModelFile(products["int8"])]
    return module._Task(sources, 0, 32, [], 1, 1, files or [], [], [], [None])


def test_nan_in_a_candidate_is_a_failed_check(products: dict[str, Path]) -> None:
    task = task_of(products)
    assert module._against(shown(1), 1, shown(np.nan), task).error == "an output holds NaN or infinite values"
    assert module._against(shown(1), 1, ChildError("gone"), task).error == "gone"


def test_models_of_different_message_lengths_cannot_be_compared(products: dict[str, Path], float_models: dict[str, Path]) -> None:
    candidate = compare(products["none"], [float_models["chunkyseal_small"]], runs=2, samples=2).findings.candidates[0]
    assert candidate.error is not None
    assert "differ in shape" in candidate.error


def test_the_report_is_json_and_up_to_date_the_second_time(products: dict[str, Path], tmp_path: Path, run_tool: Run) -> None:
    arguments = [products["none"], products["int8"], "-o", tmp_path / "compare.json", "--runs", "2", "--samples", "2", "--json"]
    first = run_tool("compare", *arguments)
    assert first.returncode == 0
    assert json.loads((tmp_path / "compare.json").read_text())["ok"] is True
    second = run_tool("compare", *arguments)
    assert json.loads(second.stdout)["report"]["up_to_date"]
    assert json.loads(second.stdout)["findings"] == json.loads(first.stdout)["findings"]


def test_exit_codes_of_the_command(products: dict[str, Path], tmp_path: Path, run_tool: Run) -> None:
    quick = ["--runs", "2", "--samples", "2"]
    tripped = run_tool("compare", products["none"], products["int8"], "--max-size-mb", "0.001", *quick)
    assert (tripped.returncode, "FAILED" in tripped.stdout, tripped.stderr) == (1, True, "")
    for wrong in (
        [tmp_path / "absent.tflite", products["int8"]],
        [products["none"], tmp_path / "absent.tflite"],
        [products["none"]],
    ):
        done = run_tool("compare", *wrong, *quick)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_images_for_a_model_that_takes_none_are_an_error(products: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ToolError, match="no images"):
        compare(products["none"], [products["int8"]], images=tmp_path / "empty")


def test_models_that_take_other_inputs_cannot_be_compared(products: dict[str, Path]) -> None:
    other = shown(1, takes="int8 image of 64 pixels")
    candidate = module._against(shown(1), 1, other, task_of(products))
    assert candidate.error == "it takes int8 image of 64 pixels, its reference float32 image of 64 pixels"
    assert module._against(shown(1), 1, other, task_of(products, [Path("a.png")])).error is None


@pytest.mark.parametrize("limit", [float("inf"), float("nan")])
def test_a_limit_must_be_finite(products: dict[str, Path], limit: float) -> None:
    with pytest.raises(ToolError, match="a limit is not finite"):
        compare(products["none"], [products["int8"]], max_size_mb=limit)


@pytest.fixture(scope="module")
def damaged(miniseal: Miniseal, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained INT8 model with all large weights replaced by noise: it loads and runs as before."""
    content, rng, replaced = bytearray(miniseal.int8.read_bytes()), np.random.default_rng(0), 0
    model = schema.Model.GetRootAs(bytes(content))
    for buffer in map(model.Buffers, range(model.BuffersLength())):
        if buffer.Size() >= LARGE_WEIGHTS:  # bytes that lie behind the flatbuffer
            noise = rng.integers(-127, 128, buffer.Size(), np.int8).tobytes()
            content[buffer.Offset() : buffer.Offset() + buffer.Size()] = noise
            replaced += len(noise)
    assert replaced > len(content) / 2
    path = tmp_path_factory.mktemp("damaged") / "int8.tflite"
    path.write_bytes(content)
    return path


LARGE_WEIGHTS = 4096  # bytes; in this model only int8 weights are
ACCURACY_LIMITS = {"min_bit_accuracy": 0.999, "min_auc": 0.995, "max_accuracy_drop": 0.005}
OTHER_LIMITS = {"min_cosine": 0.999, "min_bit_agreement": 0.99, "min_speedup": 0.01, "max_size_mb": 1.0, "max_latency_ms": 1e4}
IMAGE_GATES = ("min_psnr", "min_ssim", "max_psnr_drop", "min_psnr_gain")  # tripped further below
BEYOND = {"min_speedup": 1e4, "max_size_mb": 0.01, "max_latency_ms": 1e-4}


def test_every_gate_passes_a_sound_model_and_trips_on_a_damaged_one(miniseal: Miniseal, damaged: Path) -> None:
    def gates(candidate: Path, limits: dict[str, float]) -> dict[str, bool]:
        found = compare(
            miniseal.float_model,
            [candidate],
            messages=miniseal.messages,
            samples=4,
            attacks="jpeg-90",
            runs=8,
            min_accuracy_under=["jpeg-90=0.9"],
            **limits,  # type: ignore[arg-type]
        )
        assert found.ok == all(gate.ok for gate in found.findings.candidates[0].gates)
        return {gate.name: gate.ok for gate in found.findings.candidates[0].gates}

    sound = gates(miniseal.int8, ACCURACY_LIMITS | OTHER_LIMITS)
    assert sound == dict.fromkeys([*OTHER_LIMITS, *ACCURACY_LIMITS, "min_accuracy_under jpeg-90"], True)
    broken = gates(damaged, ACCURACY_LIMITS | OTHER_LIMITS | BEYOND)
    assert broken == dict.fromkeys(sound, False)
    options = set(inspect.signature(compare).parameters)
    of_detectors = {name.partition(" ")[0] for name in sound}
    assert {name for name in options if name.startswith(("min_", "max_"))} == of_detectors | set(IMAGE_GATES)


def test_the_demos_compare_exits_1_on_a_damaged_model_and_says_why(miniseal: Miniseal, damaged: Path, run_tool: Run) -> None:
    limits = noxfile.gates(tomllib.loads((ROOT / "models" / "miniseal.toml").read_text())["gates"]["int8"])
    done = run_tool("compare", miniseal.float_model, damaged, "--messages", miniseal.messages, "--runs", "1", *limits)
    assert (done.returncode, done.stderr) == (1, "")
    why = "FAILED: int8 min_cosine; int8 min_bit_accuracy; int8 max_accuracy_drop; int8 min_auc; int8 min_accuracy_under jpeg-80"
    assert why in " ".join(done.stdout.split())


def test_the_smallest_and_the_fastest_inside_the_limits_are_recommended(miniseal: Miniseal, damaged: Path) -> None:
    found = compare(
        miniseal.float_model,
        [miniseal.float_model],
        alternatives=[miniseal.int8, damaged],
        messages=miniseal.messages,
        samples=4,
        attacks="none",
        min_bit_accuracy=0.99,
    ).findings
    assert found.ok
    assert [candidate.is_inside for candidate in found.candidates] == [True, True, False]
    assert found.smallest == miniseal.int8
    assert found.fastest in (miniseal.int8, miniseal.float_model)


def test_labelled_images_meet_the_attacks_asked_for(miniseal: Miniseal) -> None:
    result = compare(
        miniseal.checkpoint, [miniseal.int8], model="miniseal", messages=miniseal.messages, samples=2, attacks="blur-1"
    )
    found = result.findings
    assert found.accuracy is not None
    assert [condition.attack for condition in found.accuracy.conditions] == ["none", "blur-1"]
    assert (found.samples, len(found.accuracy.readings), len(found.accuracy.logits)) == (2, 4, 2)
    assert found.candidates[0].accuracy is not None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"min_bit_accuracy": 0.9}, "--min-bit-accuracy needs images whose messages are known"),
        ({"min_auc": 0.9}, "--min-auc needs"),
        ({"max_accuracy_drop": 0.1}, "--max-accuracy-drop needs"),
        ({"min_accuracy_under": ["jpeg-50=0.9"]}, "--min-accuracy-under needs"),
        ({"attacks": "jpeg-50"}, "--attacks needs"),
        ({"messages": True, "min_accuracy_under": ["jpeg-50=0.9", "jpeg-50=0.1"]}, "a limit for this attack already"),
        ({"messages": True, "bits": 16}, "--bits contradicts --messages"),
        ({"bits": 16}, "the reference's output holds no message of 16 bits"),
        ({"messages": True, "attacks": "jpeg-90", "min_accuracy_under": ["jpeg-50=0.9"]}, "this attack is not run; .*jpeg-90"),
        ({"messages": True, "min_accuracy_under": ["jpeg-50=high"]}, "no limit"),
        ({"messages": True, "min_accuracy_under": ["jpeg-50=1.1"]}, "no limit"),
        ({"messages": True, "min_accuracy_under": ["jpeg-50=nan"]}, "no limit"),
        ({"messages": True, "attacks": "rain-1"}, "unknown attack"),
        ({"messages": True, "attacks": ""}, "unknown attack"),
        ({"messages": True, "images": Path()}, "both say which images"),
    ],
)
def test_options_that_make_no_sense_are_errors(miniseal: Miniseal, options: dict[str, Any], reason: str) -> None:
    options = {**options, **({"messages": miniseal.messages} if options.get("messages") else {})}
    with pytest.raises(ToolError, match=reason):
        compare(miniseal.float_model, [miniseal.int8], **options)


def test_messages_of_another_length_are_an_error(float_model: Path, chunkyseal_small: Small, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "messages.json").write_text('{"nbits": 8, "images": [{"file": "a.png", "message": "1f"}]}')
    with pytest.raises(ToolError, match="the reference's output holds no message of 8 bits"):
        compare(float_model, [float_model], messages=tmp_path / "messages.json", attacks="none")
    (tmp_path / "messages.json").write_text('{"nbits": 8, "images": [{"file": "a.png", "message": null}]}')
    with pytest.raises(ToolError, match="no image carries a message"):
        compare(float_model, [float_model], messages=tmp_path / "messages.json")


def test_a_candidate_that_is_an_alternative_too_is_refused_or_keeps_its_limits(products: dict[str, Path], tmp_path: Path) -> None:
    options = {"runs": 2, "samples": 2, "max_size_mb": 0.001}
    with pytest.raises(ToolError, match="a candidate is named twice"):
        compare(products["none"], [products["int8"]], alternatives=[products["int8"]], **options)  # type: ignore[arg-type]
    (tmp_path / "link.tflite").symlink_to(products["int8"])
    found = compare(products["none"], [products["int8"]], alternatives=[tmp_path / "link.tflite"], **options)  # type: ignore[arg-type]
    assert [candidate.is_alternative for candidate in found.findings.candidates] == [False, True]
    assert not found.ok


def test_the_page_replaces_nothing_it_is_made_from(miniseal: Miniseal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Path(shutil.copy(miniseal.int8, tmp_path / "model.tflite"))
    monkeypatch.setattr(module, "run_trials", lambda *_, **__: pytest.fail("it was refused too late"))
    image = miniseal.messages.parent / "unmarked" / "00_camera.png"
    (tmp_path / "mine.html").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    messages = Path(shutil.copytree(miniseal.messages.parent, tmp_path, dirs_exist_ok=True)) / "messages.json"
    truth = messages.read_text()

    def write_old(draft: Path) -> Page:
        draft.write_text("old")
        return Page(0, 0)

    artifacts.build(Plan(tmp_path / "stale.html", "compare", {}), Page, write_old)
    for html, options, reason in (
        (model, {"overwrite": True}, "a file it is made from"),
        (image, {"overwrite": True, "messages": miniseal.messages}, "a file it is made from"),
        (tmp_path / "a.json", {"output": tmp_path / "a.json"}, "name the same file"),
        (tmp_path / "a", {"output": tmp_path / "a.json"}, "name the same file, or one's provenance"),
        (tmp_path / "messages", {"overwrite": True, "messages": messages, "attacks": "none"}, "a file it is made from"),
        (tmp_path / "stale.html", {"output": tmp_path / "a.json"}, "the page exists"),
        (tmp_path / "loop", {}, "exists|no regular file|a symbolic link"),
        (tmp_path / "absent" / "a.html", {}, "no such folder"),
        (tmp_path / "mine.html", {"refresh": True, "output": tmp_path / "a.json"}, "the output exists"),
        (tmp_path / "mine.html", {}, "exists"),
    ):
        with pytest.raises(ToolError, match=reason):
            compare(miniseal.float_model, [model], html=html, **options)  # type: ignore[arg-type]
    assert (model.read_bytes(), (tmp_path / "mine.html").read_text()) == (miniseal.int8.read_bytes(), "mine")
    assert not (tmp_path / "a.json").exists()
    assert messages.read_text() == truth


def test_a_renamed_model_is_compared_again(products: dict[str, Path], tmp_path: Path) -> None:
    options = {"output": tmp_path / "c.json", "runs": 2, "samples": 2, "refresh": True}
    for name in ("one.tflite", "other.tflite"):
        model = Path(shutil.copy(products["int8"], tmp_path / name))
        found = compare(products["none"], [model], **options)  # type: ignore[arg-type]
        assert found.findings.candidates[0].path == model


def test_the_page_is_a_product_like_any_other(products: dict[str, Path], tmp_path: Path, run_tool: Run) -> None:
    arguments = [
        products["none"],
        products["int8"],
        "-o",
        tmp_path / "c.json",
        "--html",
        tmp_path / "r.html",
        "--runs",
        "2",
        "--json",
    ]
    first, second = (run_tool("compare", *arguments) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert [json.loads(done.stdout)["html"]["up_to_date"] for done in (first, second)] == [False, True]
    assert "<!doctype html>" in (tmp_path / "r.html").read_text()
    (tmp_path / "r.html").write_text("mine")
    refused = run_tool("compare", *arguments)
    assert (refused.returncode, (tmp_path / "r.html").read_text()) == (2, "mine")


@pytest.mark.realdata
def test_a_quantized_twin_with_integer_inputs_is_told_apart() -> None:
    folder = REALDATA / "tflite"
    candidate = compare(
        folder / "mlperf_tiny_resnet_float.tflite", [folder / "mlperf_tiny_resnet_int8.tflite"]
    ).findings.candidates[0]
    assert candidate.error is not None
    assert "it takes int8" in candidate.error


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
        enlargers["twofold"], [enlargers["brighter"]], images=pairs / "small", truth=pairs / "truth", runs=3, threads=1
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
    found = compare(models[0], models[1:], images=pairs / "small", truth=pairs / "truth", runs=1, threads=1).findings
    assert found.images is not None
    assert found.images.bicubic == bicubic_scores(found.images.files, found.images.truths, channels=1)
    assert found.images.reference is not None
    assert found.images.reference.psnr_db == pytest.approx(20 * np.log10(255 / MISSING), abs=0.2)


def test_every_gate_on_images_is_kept_at_its_value_and_trips_beyond(enlargers: dict[str, Path], pairs: Path) -> None:
    given: dict[str, Any] = {"images": pairs / "small", "truth": pairs / "truth", "runs": 1, "threads": 1}
    models = enlargers["twofold"], [enlargers["brighter"]]
    found = compare(*models, **given, min_psnr=0, min_ssim=0, max_psnr_drop=0, min_psnr_gain=0).findings
    values = {gate.name: gate.value for gate in found.candidates[0].gates}
    assert values["max_psnr_drop"] == pytest.approx(20 * np.log10((ADDED - MISSING) / MISSING))
    assert found.images is not None
    assert found.images.bicubic is not None
    assert values["min_psnr_gain"] == pytest.approx(luma_db(ADDED - MISSING) - found.images.bicubic.psnr_db)
    for side, ok in ((-1e-6, True), (1e-6, False)):
        limits = {name: values[name] + (-side if name.startswith("max") else side) for name in IMAGE_GATES}
        result = compare(*models, **given, **limits)
        assert {gate.name: gate.ok for gate in result.findings.candidates[0].gates} == dict.fromkeys(IMAGE_GATES, ok)
        assert result.ok is ok


def test_a_limit_on_images_is_broken_by_a_model_that_makes_none(products: dict[str, Path]) -> None:
    result = compare(products["none"], [products["int8"]], runs=1, samples=1, min_psnr=1)
    assert [(gate.name, gate.value, gate.ok) for gate in result.findings.candidates[0].gates] == [("min_psnr", None, False)]
    assert not result.ok


def test_models_that_enlarge_differently_cannot_be_compared(enlargers: dict[str, Path], pairs: Path) -> None:
    found = compare(enlargers["twofold"], [enlargers["threefold"]], images=pairs / "small", runs=1).findings
    assert "differ in shape" in str(found.candidates[0].error)


def test_seeded_samples_do_for_models_that_make_images(enlargers: dict[str, Path], tmp_path: Path) -> None:
    result = compare(enlargers["twofold"], [enlargers["brighter"]], samples=2, runs=2, html=tmp_path / "r.html")
    images = result.findings.candidates[0].images
    assert images is not None
    assert images.psnr_db == pytest.approx(20 * np.log10(255 / ADDED), abs=1e-3)
    assert "<img" not in (tmp_path / "r.html").read_text()


def test_both_layouts_of_an_image_are_the_same_answer(enlargers: dict[str, Path], pairs: Path) -> None:
    candidate = compare(enlargers["twofold"], [enlargers["nhwc"]], images=pairs / "small", runs=1).findings.candidates[0]
    assert candidate.error is None
    assert candidate.images is not None
    assert candidate.images.psnr_db > 100
    assert candidate.images.ssim == pytest.approx(1)


def test_cosine_and_errors_of_an_image_do_not_depend_on_its_layout(enlargers: dict[str, Path], pairs: Path) -> None:
    candidate = compare(enlargers["twofold"], [enlargers["nhwc"]], images=pairs / "small", runs=1).findings.candidates[0]
    assert candidate.cosine == pytest.approx(1)
    assert candidate.max_abs_error == pytest.approx(0, abs=1e-6)


def test_the_page_shows_what_models_make_of_the_images(enlargers: dict[str, Path], pairs: Path, tmp_path: Path) -> None:
    given = {"images": pairs / "small", "truth": pairs / "truth"}
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
        ({"truth": "truth"}, "--truth needs the images to make it from"),
        ({"images": "small", "max_psnr_drop": 0.1}, "--max-psnr-drop needs the truth; give --images and --truth"),
        ({"images": "small", "min_psnr_gain": 0.1}, "--min-psnr-gain needs the truth"),
        ({"images": "small", "truth": "small"}, r"images have no truth; got 0_lr\.png, 1_lr\.png, 2_lr\.png"),
        ({"images": "small", "truth": "truth/[01].png"}, r"images have no truth; got 2_lr\.png"),
        ({"images": "small", "truth": "absent"}, "no such image folder"),
        ({"images": "small/*.jpg"}, "no images match"),
        ({"images": "truth", "truth": "small/*"}, "images have no truth"),
    ],
)
def test_images_and_truths_that_make_no_sense_are_errors(
    enlargers: dict[str, Path], pairs: Path, options: dict[str, Any], reason: str
) -> None:
    options = {name: pairs / value if isinstance(value, str) else value for name, value in options.items()}
    with pytest.raises(ToolError, match=reason) as caught:
        compare(enlargers["twofold"], [enlargers["brighter"]], **options)
    assert "\n" not in str(caught.value)


def test_a_truth_for_models_that_make_no_images_is_an_error(products: dict[str, Path], pairs: Path) -> None:
    with pytest.raises(ToolError, match="--truth is for models that make images"):
        compare(products["none"], [products["int8"]], images=pairs / "small", truth=pairs / "truth", runs=1)


def test_exit_codes_for_images(enlargers: dict[str, Path], pairs: Path, tmp_path: Path, run_tool: Run) -> None:
    given = ["--images", pairs / "small", "--truth", pairs / "truth", "--runs", "1"]
    models = [enlargers["twofold"], enlargers["brighter"]]
    kept = run_tool("compare", *models, *given, "--min-psnr", "28", "--max-psnr-drop", "4")
    assert (kept.returncode, kept.stderr) == (0, "")
    tripped = run_tool("compare", *models, *given, "--min-psnr", "29", "--max-psnr-drop", "4")
    assert (tripped.returncode, tripped.stderr) == (1, "")
    assert "FAILED: brighter min_psnr" in " ".join(tripped.stdout.split())
    for number in range(3):
        Image.new("RGB", (40, 33)).save(tmp_path / f"{number}.png")
    wrong = run_tool("compare", *models, "--images", pairs / "small", "--truth", tmp_path, "--runs", "1")
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)
    assert "an image is 40x32 pixels, its truth 40x33" in wrong.stderr


@pytest.fixture(scope="module")
def onnx_detector(videoseal_small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small VideoSeal network as ONNX model."""
    output = tmp_path_factory.mktemp("onnx") / "model_onnx.onnx"
    convert_detector(model=str(videoseal_small.card), checkpoint=videoseal_small.checkpoint, output=output)
    return output


def test_tflite_onnx_and_torch_agree_on_the_same_detector(
    products: dict[str, Path], onnx_detector: Path, videoseal_small: Small
) -> None:
    card = str(videoseal_small.card)
    found = compare(videoseal_small.checkpoint, [products["none"], onnx_detector], model=card, runs=2, samples=2).findings
    other_way = compare(onnx_detector, [products["none"]], runs=2, samples=2).findings
    assert [found.reference.kernels, *(c.measured.kernels for c in found.candidates if c.measured)] == [
        "torch",
        "xnnpack",
        "onnxruntime",
    ]
    for candidate in (*found.candidates, *other_way.candidates):
        assert candidate.error is None
        assert candidate.bit_agreement == 1, "the length of the message is in the models"
        assert candidate.relative_error is not None
        assert candidate.relative_error < 1e-4


def test_a_slow_onnx_model_is_told_the_reason_by_what_it_holds(tmp_path: Path) -> None:
    """No model is run: a node and a weight are enough."""
    node, weight = onnx.helper.make_node, {"w": np.ones((3, 3, 1, 1), np.float16)}
    shape = {"x": (1, 3, 8, 8)}
    dynamic = save(tmp_path / "dynamic.onnx", [node("DynamicQuantizeLinear", ["x"], ["y", "scale", "zero"])], shape, {"y": None})
    half = save(tmp_path / "half.onnx", [node("Cast", ["w"], ["y"], to=1)], shape, {"y": None}, weight)
    plain = save(tmp_path / "plain.onnx", [node("Relu", ["x"], ["y"])], shape, {"y": (1, 3, 8, 8)})
    slow = {path.stem: module._verdict(ModelFile(path), 0.5) for path in (dynamic, half, plain)}
    assert all(text.startswith("slower than its reference (0.50 times as fast): ") for text in slow.values())
    assert "finds the range of every activation at each run" in slow["dynamic"]
    assert "quantize it statically" in slow["dynamic"]
    assert "computes float16 by way of float32" in slow["half"]
    assert "no faster kernels" in slow["plain"]
    assert module._verdict(ModelFile(dynamic), 2.0) == "2.00 times faster than its reference"


def test_a_dynamically_quantized_model_holds_what_the_reason_names(tmp_path: Path) -> None:
    model = save_picture_model(tmp_path / "model.onnx", widths=(16,))
    product = quantize_onnx(model, mode="dynamic").product
    assert product is not None
    assert "quantize it statically" in module._verdict(ModelFile(product.path), 0.5)


def test_an_image_is_stretched_to_a_model_of_one_size_only() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    for shape, expected in (((1, 3, -1, -1), (1, 3, 20, 30)), ((1, 16, 24, 3), (1, 16, 24, 3)), ((-1, 1, -1, -1), (1, 1, 20, 30))):
        assert image_sample([TensorSpec("x", shape, "float32")], pixels)["x"].shape == expected


@pytest.mark.realdata
def test_the_shipped_super_resolution_beats_bicubic_and_its_int8_product_keeps_that(tmp_path: Path) -> None:
    model, images = ROOT / "models" / "minisr" / "minisr_x2.onnx", REALDATA / "images"
    photos = sorted(images.glob("kodim*.png"))
    prepare_calibration(photos, output=tmp_path / "tiles", tile_size=128, max_samples=16)
    product = quantize_onnx(model, output=tmp_path / "int8.onnx", calibration=tmp_path / "tiles", reduce_range=saturates()).product
    assert product is not None
    limits = {"max_psnr_drop": 0.3, "min_psnr_gain": 0.5}
    given = {"images": images / "set5_*_x2lr.png", "truth": images / "set5_*[a-z].png"}
    result = compare(model, [product.path], runs=1, **given, **limits)  # type: ignore[arg-type]
    task = result.findings.images
    assert result.ok, result.message
    assert result.findings.samples == 5
    assert task is not None
    assert task.reference is not None
    assert task.bicubic is not None
    assert task.reference.psnr_db >= task.bicubic.psnr_db + 0.5
