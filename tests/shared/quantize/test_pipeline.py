"""A model goes one path through the pipeline: what each step found decides the next, and a bad product is never kept."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from shared.calibration.dataset import CalibrationSet
from shared.command.errors import ToolError
from shared.command.options import InputRange
from shared.files.checksums import sha256_of
from shared.formats.model_file import ModelFile
from shared.formats.tensors import TensorSpec
from shared.formats.tflite import TfliteContent
from shared.quantize import pipeline
from shared.quantize.backend import Candidate, Quantization, UnchangedError
from shared.quantize.coverage import OpTypeCoverage, SkippedLayer
from shared.quantize.ledger import Job, MakeJob
from shared.quantize.pipeline import quantize_model
from shared.quantize.request import ALL_OUTPUTS, Limits, Precisions, Request
from shared.quantize.result import ModelResult
from shared.quantize.search import SearchSpace
from shared.runtime.benchmark import Benchmark, Measurement, ModelRun, Protocol
from shared.runtime.model import Source
from shared.runtime.processes import ChildError, Workspace
from tests.shared.quantize.fake_model import FakeModel, independent

INPUT = TensorSpec("x", (1, 4), "float32")
OUTPUT = TensorSpec("y", (1, 4), "float32")
ROW = OpTypeCoverage("CONV_2D", 1, 1, 400, 400, 100, ["INT8"], "")


@dataclass
class FakeBackend:
    """A format whose models are empty files: `behaviour` says what each does when it is run, by its file's name.

    Args:
        behaviour: Stem of a file -> its latency in ms and its offset from the source's outputs, or why it does not run.
        repairs: Repairs, in words; a repaired model is the file `repaired.tflite`.
        recipes: Of the candidates.
        search_model: What a search measures.
        calibrations: Ways to calibrate, by the error that each adds.
        runs_here: Whether the runtime has all ops.
        rows: Coverage.
    """

    behaviour: dict[str, tuple[float, float] | str] = field(default_factory=dict)
    repairs: str = ""
    recipes: Sequence[str] = ("int8",)
    search_model: FakeModel | None = None
    calibrations: Sequence[float] = (0.0,)
    runs_here: bool = True
    rows: list[OpTypeCoverage] = field(default_factory=lambda: [ROW])
    TIMES_REPAIRED: bool = False
    ASSUMED_RANGE: InputRange | None = None
    WORKER: ModuleType = pipeline
    quantized_with: list[Precisions | None] = field(default_factory=list)

    def repair(self, source: ModelFile, request: Request, workspace: Workspace) -> tuple[ModelFile, str]:
        return (fake_file(workspace.folder / "repaired.tflite"), self.repairs) if self.repairs else (source, "")

    def specs(self, model: ModelFile, name: str, workspace: Workspace) -> tuple[list[TensorSpec], list[TensorSpec]] | None:
        return ([INPUT], [OUTPUT]) if self.runs_here else None

    def bounded(self, samples: CalibrationSet, *_: object) -> CalibrationSet:
        return samples

    def unmatched(self, model: ModelFile, request: Request, name: str) -> list[str]:
        return ["nobody"]

    def variants(self, request: Request) -> list[Request]:
        return [replace(request, recipe=recipe) for recipe in self.recipes]

    def space(self, quantization: Quantization) -> SearchSpace | None:
        return self.search_model.space() if self.search_model else None

    def search_variants(self, quantization: Quantization) -> list[Quantization]:
        return [replace(quantization, name=f"{quantization.name} {added}") for added in self.calibrations]

    def job_maker(self, quantization: Quantization) -> MakeJob:
        assert self.search_model is not None
        added, model = float(quantization.name.split()[-1]), self.search_model
        return replace(model, error=lambda precisions: model.error(precisions) + added).job

    def identity(self, quantization: Quantization) -> dict[str, str]:
        return {"calibration": quantization.name}

    def quantize(self, quantization: Quantization, precisions: Precisions | None) -> Candidate:
        recipe = quantization.request.recipe
        if self.behaviour.get(recipe) == "cannot be made":
            raise ToolError("the recipe does not fit", where=quantization.name)
        self.quantized_with.append(precisions)
        calibration = quantization.workspace.folder / "calibration.json"
        calibration.write_text("statistics")
        model = fake_file(quantization.workspace.folder / f"{recipe}.tflite", 1000)
        return Candidate(quantization.request, model, calibration=calibration)

    def coverage(self, quantization: Quantization, candidate: Candidate) -> tuple[list[OpTypeCoverage], list[SkippedLayer]]:
        return self.rows, []

    def layer_jobs(self, quantization: Quantization, candidate: Candidate) -> dict[str, Job]:
        return {}

    def benchmark(self, sources: Sequence[Source], protocol: Protocol) -> Benchmark:
        return Benchmark([self._run(source, protocol) for source in sources], interleaved=True)

    def _run(self, source: Source, protocol: Protocol) -> ModelRun | ChildError:
        what = self.behaviour.get(source.path.stem, (10.0, 0.0))
        if isinstance(what, str):
            return ChildError(what)
        ms, offset = what
        outputs = [[inputs([INPUT])["x"] + np.float32(offset)] for inputs in protocol.samples]
        measured = Measurement(source.path, source.size_bytes, 1.0, ms, ms, 20, "xnnpack", 5, [])
        return ModelRun(measured, ["y"], outputs, [], input_types=("float32",))


def fake_file(path: Path, size: int = 4000) -> ModelFile:
    path.write_bytes(b"0" * size)
    return ModelFile(path, TfliteContent([]))


Quantize = Callable[..., ModelResult]


@pytest.fixture
def quantize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Quantize:
    """Return a function that sends a model through the pipeline with a backend and a request."""
    np.savez(tmp_path / "samples.npz", x=np.random.default_rng(0).random((4, 4), np.float32))

    def run(backend: FakeBackend, *, with_samples: bool = True, **asked: object) -> ModelResult:
        monkeypatch.setattr(pipeline, "run_benchmark", backend.benchmark)
        samples = CalibrationSet(tmp_path / "samples.npz") if with_samples else None
        request = Request("int8", "dynamic", None, samples, executor=lambda _: ThreadPoolExecutor(1))
        source = fake_file(tmp_path / "model.tflite")
        asked_for = replace(request, **asked)  # type: ignore[arg-type]
        return quantize_model(source, "m", asked_for, backend, tmp_path / "work", tmp_path / "out.tflite")

    return run


def test_a_product_is_moved_to_its_place_with_its_measurements(quantize: Quantize, tmp_path: Path) -> None:
    result = quantize(FakeBackend({"int8": (5.0, 0.001)}), threads=3)
    assert (tmp_path / "out.tflite").stat().st_size == result.size_after_bytes == 1000
    assert (result.name, result.recipe, result.size_before_bytes, result.coverage) == ("m", "int8", 4000, 1.0)
    assert (result.samples, result.measured_on, result.threads) == (4, "4 samples that were calibrated with, too", 3)
    assert (result.unmatched, result.speedup, result.peak_rss_bytes) == (["nobody"], 2.0, 5)
    assert result.calibration_sha256 == sha256_of(tmp_path / "work" / "calibration.json")
    assert [candidate.label for candidate in result.candidates] == ["original", "int8"]
    [error] = result.candidates[1].errors
    assert error.max_abs_error == pytest.approx(0.001, rel=1e-3)


def test_without_samples_seeded_ones_are_measured_on(quantize: Quantize) -> None:
    result = quantize(FakeBackend(), with_samples=False)
    assert (result.samples, result.measured_on) == (0, "8 seeded samples")


def test_a_holdout_is_measured_on_instead_of_the_calibration_set(quantize: Quantize, tmp_path: Path) -> None:
    np.savez(tmp_path / "holdout.npz", x=np.ones((3, 4), np.float32))
    result = quantize(FakeBackend(), holdout=CalibrationSet(tmp_path / "holdout.npz"))
    assert (result.samples, result.measured_on) == (4, "3 samples that were not calibrated with")


@pytest.mark.parametrize(("is_reference", "labels"), [(False, ["original", "int8"]), (True, ["float32", "original", "int8"])])
def test_a_repaired_model_is_the_reference_where_the_format_says_so(
    quantize: Quantize, is_reference: bool, labels: list[str]
) -> None:
    result = quantize(FakeBackend(repairs="1 nodes named", TIMES_REPAIRED=is_reference))
    assert (result.repairs, [candidate.label for candidate in result.candidates]) == ("1 nodes named", labels)


def test_a_repair_that_changes_the_outputs_is_refused(quantize: Quantize, tmp_path: Path) -> None:
    backend = FakeBackend({"repaired": (10.0, 0.1)}, repairs="1 nodes named", TIMES_REPAIRED=True)
    with pytest.raises(ToolError, match="repairing the model changes its answers"):
        quantize(backend)
    assert not (tmp_path / "out.tflite").exists()


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [
        ({"model": "crashed"}, "m: the model does not run; got crashed"),
        ({"int8": "crashed"}, "m: the quantized model does not run; nothing was kept; got int8: does not run: crashed"),
        ({"int8": (5.0, float("nan"))}, "nothing was kept; got int8: y: an output holds NaN or infinite values"),
    ],
)
def test_a_model_that_fails_is_no_product(
    quantize: Quantize, tmp_path: Path, behaviour: dict[str, tuple[float, float] | str], says: str
) -> None:
    with pytest.raises(ToolError, match=says):
        quantize(FakeBackend(behaviour))
    assert not (tmp_path / "out.tflite").exists()


@pytest.mark.parametrize(
    ("rows", "got"),
    [([], "it has no constant operands"), ([replace(ROW, quantized=0, reason="1 x excluded")], "CONV_2D 1 x excluded")],
)
def test_a_recipe_that_changes_nothing_is_an_error(quantize: Quantize, rows: list[OpTypeCoverage], got: str) -> None:
    with pytest.raises(UnchangedError, match=f"m: recipe int8 changes no op of this model; got {got}; choose another recipe"):
        quantize(FakeBackend(rows=rows))


# Several recipes to choose from.


def test_the_fastest_recipe_is_the_product(quantize: Quantize) -> None:
    result = quantize(
        FakeBackend({"slow": (9.0, 0.0), "fast": (3.0, 0.5), "middle": (5.0, 0.0)}, recipes=("slow", "fast", "middle"))
    )
    assert (result.recipe, result.speedup) == ("fast", 10 / 3)
    assert [candidate.is_product for candidate in result.candidates] == [False, False, True, False]


def test_the_fastest_recipe_within_the_limits_is_the_product(quantize: Quantize) -> None:
    backend = FakeBackend({"slow": (9.0, 0.0), "fast": (3.0, 0.5), "middle": (5.0, 0.001)}, recipes=("slow", "fast", "middle"))
    assert quantize(backend, limits=Limits({ALL_OUTPUTS: 0.01})).recipe == "middle"


def test_a_recipe_that_fails_leaves_the_others(quantize: Quantize) -> None:
    backend = FakeBackend({"a": "cannot be made", "b": "crashed", "c": (5.0, float("inf")), "d": (20.0, 0.0)}, recipes="abcd")
    result = quantize(backend)
    problems = {candidate.label: candidate.problem for candidate in result.candidates if candidate.problem}
    assert result.recipe == "d"
    assert problems == {
        "b": "does not run: crashed",
        "c": "y: an output holds NaN or infinite values",
        "a": "the recipe does not fit",
    }


@pytest.mark.parametrize(("with_samples", "remedy"), [(True, "allow a larger error"), (False, "give --calibration")])
def test_where_no_recipe_keeps_the_limits_every_error_is_named(quantize: Quantize, with_samples: bool, remedy: str) -> None:
    backend = FakeBackend({"a": (5.0, 0.5), "b": "cannot be made"}, recipes="ab")
    with pytest.raises(ToolError, match=rf"m: no recipe keeps the limits; got a: y: .*; b: the recipe does not fit; {remedy}"):
        quantize(backend, with_samples=with_samples, limits=Limits({ALL_OUTPUTS: 0.01}))


# A search.


def searched(**changes: object) -> FakeBackend:
    model = FakeModel({"a": 100, "b": 100}, independent({("a", "int8"): 0.01, ("b", "int8"): 0.5}))
    return FakeBackend(search_model=model, **changes)  # type: ignore[arg-type]


def test_the_precisions_of_a_search_are_quantized(quantize: Quantize, tmp_path: Path) -> None:
    backend = searched()
    result = quantize(backend, limits=Limits({ALL_OUTPUTS: 0.02}), ledger=tmp_path / "ledger")
    assert backend.quantized_with == [{"a": "int8", "b": "float32"}]
    assert result.search is not None
    assert (result.search.share, result.search.layers, result.search.precisions) == (0.5, 2, {"float32": 1, "int8": 1})
    assert len((tmp_path / "ledger").read_text().splitlines()) == 1 + result.search.measured


def test_a_search_takes_the_calibration_with_the_smallest_error(quantize: Quantize, tmp_path: Path) -> None:
    result = quantize(searched(calibrations=(0.005, 0.0, 0.002)), limits=Limits({ALL_OUTPUTS: 0.02}), ledger=tmp_path / "ledger")
    assert '"calibration": "m 0.0"' in (tmp_path / "ledger").read_text()
    assert result.search is not None and result.search.share == 0.5


@pytest.mark.parametrize(
    ("limits", "with_samples", "says"),
    [
        (Limits({ALL_OUTPUTS: 0.1}), False, "m: a search needs real inputs to measure on; give --calibration"),
        (Limits({"z": 0.1, ALL_OUTPUTS: 0.1}), True, "m: no such output; got z; expected one of y"),
        (Limits(min_psnr=40.0), True, "m: --min-psnr is for models that make images"),
    ],
)
def test_a_search_that_cannot_be_made_is_refused(quantize: Quantize, limits: Limits, with_samples: bool, says: str) -> None:
    with pytest.raises(ToolError, match=says):
        quantize(searched(), with_samples=with_samples, limits=limits)


def test_an_error_of_a_search_names_the_model(quantize: Quantize) -> None:
    backend = FakeBackend(search_model=FakeModel({}, lambda _: 0.0))
    with pytest.raises(ToolError, match=r"m.*: no layer of this model can be quantized"):
        quantize(backend, limits=Limits({ALL_OUTPUTS: 0.1}))


# A model that the runtime here cannot run.


def test_a_model_with_unknown_ops_is_quantized_unmeasured(quantize: Quantize) -> None:
    result = quantize(FakeBackend(runs_here=False), with_samples=False)
    assert (result.unmeasured, result.candidates, result.product) == ("the runtime here lacks ops of this model", [], None)
    assert result.coverage == 1.0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"with_samples": True}, "samples can't be run through it"),
        ({"with_samples": False, "limits": Limits({ALL_OUTPUTS: 0.1})}, "a search can't run it"),
        ({"with_samples": False, "sensitivity": True}, "its layers can't be measured"),
    ],
)
def test_what_needs_runs_is_refused_for_a_model_with_unknown_ops(quantize: Quantize, options: dict[str, object], says: str) -> None:
    with pytest.raises(ToolError, match=f"m: the runtime here lacks ops of this model: {says}"):
        quantize(FakeBackend(runs_here=False), **options)
