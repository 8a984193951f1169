"""compare measures both sides alike, whatever their formats."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shared.command.errors import ToolError
from shared.formats.model_file import ModelFile
from shared.runtime import benchmark
from shared.runtime.benchmark import Measurement, ModelRun
from shared.runtime.model import Model, Source, open_model
from shared.runtime.processes import ChildError
from tests.conftest import REALDATA, Run, Small
from tests.support.small_onnx import save_picture_model
from tools.compare import compare
from tools.compare.task import CompareTask
from tools.convert_detector import convert_detector
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
        assert candidate.measurement is not None
        assert candidate.measurement.median_ms > 0
        assert candidate.measurement.p90_ms >= candidate.measurement.median_ms
        assert candidate.speedup == found.reference.median_ms / candidate.measurement.median_ms
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
    result = compare(products["none"], [products["none"]], runs=2, samples=2, gate=["min_bit_agreement=0.9"])
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
    monkeypatch.setattr(benchmark, "available_memory_bytes", lambda: 2**30)
    found = compare(products["none"], [products["int8"]], runs=2, samples=2).findings
    assert (found.interleaved, most[0]) == (False, 1)
    monkeypatch.setattr(benchmark, "available_memory_bytes", lambda: None)
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


def test_a_candidate_that_is_slower_has_a_verdict_with_the_reason(products: dict[str, Path]) -> None:
    """The reason is in the products themselves; `shared.runtime.speed` has the words."""
    assert ModelFile(products["fp16"]).why_slow().startswith("its float16 weights are unpacked to float32")
    assert ModelFile(products["int8"]).why_slow() == ""
    slow = replace(run_of(1).measurement, median_ms=2.0)
    verdict = task_of(products)._against(run_of(1), 1, replace(run_of(1), measurement=slow)).verdict
    assert verdict.startswith("SLOWER: latency 1.00 -> 2.00 ms, 0.50 times as fast: this CPU has no faster kernels")


def test_a_candidate_that_crashes_is_a_failed_check_not_a_crash(products: dict[str, Path], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.tflite"
    damaged.write_bytes(products["int8"].read_bytes()[:5000])
    result = compare(products["none"], [damaged, products["int8"]], runs=2, samples=2, gate=["min_cosine=0.5"])
    broken, sound = result.findings.candidates
    assert broken.problem is not None
    assert (broken.measurement, [gate.ok for gate in broken.gates]) == (None, [False])
    assert sound.problem is None
    assert not result.ok
    with pytest.raises(ToolError, match=r"damaged TFLite model|the reference does not run"):
        compare(damaged, [products["int8"]], runs=2, samples=2)


def test_a_damaged_candidate_of_a_model_that_is_no_detector_is_a_failed_check_too(tmp_path: Path) -> None:
    model, damaged = save_picture_model(tmp_path / "model.onnx"), tmp_path / "damaged.tflite"
    damaged.write_bytes(b"\x18\0\0\0TFL3" + bytes(100))
    broken, sound = compare(model, [damaged, model], runs=1, samples=1).findings.candidates
    assert "damaged TFLite model" in str(broken.problem)
    assert (sound.problem, sound.relative_error) == (None, 0)


def run_of(value: float, takes: str = "float32 image of 64 pixels") -> ModelRun:
    """Return the run of a model whose outputs all have one value."""
    measurement = Measurement(Path("model.tflite"), 10, 1, 1, 1, 1, "xnnpack", 1, [takes])
    return ModelRun(measurement, ["output_0"], [[np.full((1, 33), value, np.float32)]], [])


def task_of(products: dict[str, Path], files: list[Path] | None = None) -> CompareTask:
    sources: list[Source] = [ModelFile(products["none"]), ModelFile(products["int8"])]
    return CompareTask(sources, 0, 32, [], 1, 1, files or [], [], [], [None])


def test_nan_in_a_candidate_is_a_failed_check(products: dict[str, Path]) -> None:
    task = task_of(products)
    found = task._against(run_of(1), 1, run_of(np.nan))
    assert (found.problem, found.errors) == ("output_0: an output holds NaN or infinite values", [])
    assert task._against(run_of(1), 1, ChildError("gone")).problem == "gone"


def test_a_candidate_with_another_number_of_outputs_cannot_be_compared(products: dict[str, Path]) -> None:
    more = replace(run_of(1), output_names=["output_0", "output_1"], outputs=[[*run_of(1).outputs[0], np.zeros(1)]])
    assert task_of(products)._against(run_of(1), 1, more).problem == "it has 2 outputs, its reference 1"


def test_models_of_different_message_lengths_cannot_be_compared(products: dict[str, Path], float_models: dict[str, Path]) -> None:
    candidate = compare(products["none"], [float_models["chunkyseal_small"]], runs=2, samples=2).findings.candidates[0]
    assert candidate.problem is not None
    assert "differ in shape" in candidate.problem


def test_the_report_is_json_and_up_to_date_the_second_time(products: dict[str, Path], tmp_path: Path, run_tool: Run) -> None:
    arguments = [products["none"], products["int8"], "-o", tmp_path / "compare.json", "--runs", "2", "--samples", "2", "--json"]
    first = run_tool("compare", *arguments)
    assert first.returncode == 0
    content = json.loads((tmp_path / "compare.json").read_text())
    assert (content["ok"], content["provenance"]["tool"]) == (True, "compare")
    assert [path.name for path in tmp_path.iterdir()] == ["compare.json"]
    second = run_tool("compare", *arguments)
    assert json.loads(second.stdout)["report"]["up_to_date"]
    assert json.loads(second.stdout)["findings"] == json.loads(first.stdout)["findings"]


def test_exit_codes_of_the_command(products: dict[str, Path], tmp_path: Path, run_tool: Run) -> None:
    quick = ["--runs", "2", "--samples", "2"]
    tripped = run_tool("compare", products["none"], products["int8"], "--gate", "max_size_mb=0.001", *quick)
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
    other = run_of(1, takes="int8 image of 64 pixels")
    problem = task_of(products)._against(run_of(1), 1, other).problem
    assert problem == "it takes int8 image of 64 pixels, its reference float32 image of 64 pixels"
    assert task_of(products, [Path("a.png")])._against(run_of(1), 1, other).problem is None


def test_a_candidate_that_is_an_alternative_too_is_refused_or_keeps_its_gates(products: dict[str, Path], tmp_path: Path) -> None:
    given: dict[str, Any] = {"runs": 2, "samples": 2, "gate": ["max_size_mb=0.001"]}
    with pytest.raises(ToolError, match="a candidate is named twice"):
        compare(products["none"], [products["int8"]], alternatives=[products["int8"]], **given)
    (tmp_path / "link.tflite").symlink_to(products["int8"])
    found = compare(products["none"], [products["int8"]], alternatives=[tmp_path / "link.tflite"], **given)
    assert [candidate.is_alternative for candidate in found.findings.candidates] == [False, True]
    assert not found.ok


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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.json", "r.html"]
    (tmp_path / "r.html").write_text("mine")
    refused = run_tool("compare", *arguments)
    assert (refused.returncode, (tmp_path / "r.html").read_text()) == (2, "mine")


@pytest.mark.realdata
def test_a_quantized_twin_with_integer_inputs_cannot_be_compared() -> None:
    folder = REALDATA / "tflite"
    candidate = compare(
        folder / "mlperf_tiny_resnet_float.tflite", [folder / "mlperf_tiny_resnet_int8.tflite"], runs=1
    ).findings.candidates[0]
    assert candidate.problem is not None
    assert "it takes int8" in candidate.problem


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
    reverse = compare(onnx_detector, [products["none"]], runs=2, samples=2).findings
    kernels = [found.reference.kernels, *(c.measurement.kernels for c in found.candidates if c.measurement)]
    assert kernels == ["torch", "xnnpack", "onnxruntime"]
    for candidate in (*found.candidates, *reverse.candidates):
        assert candidate.problem is None
        assert candidate.bit_agreement == 1, "the length of the message is in the models"
        assert candidate.relative_error is not None
        assert candidate.relative_error < 1e-4


def test_a_dynamically_quantized_model_holds_the_reason_why_it_is_slow(tmp_path: Path) -> None:
    model = save_picture_model(tmp_path / "model.onnx", widths=(16,))
    product = quantize_onnx(model, recipe="int8").product
    assert product is not None
    assert "quantize it statically" in ModelFile(product.path).why_slow()
