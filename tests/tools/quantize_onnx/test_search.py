"""A search leaves no more layers in float than the limits take, and finds the same model wherever and however often it runs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from shared.command.errors import ToolError
from shared.metrics.output_error import OutputError
from shared.quantize.ledger import Ledger, Outcome, RefusedError
from shared.quantize.product import Quantized
from shared.quantize.request import Limits, Precisions
from shared.quantize.search import Search, SearchResult, SearchSpace
from tests.conftest import ROOT
from tests.support.small_onnx import save_picture_model, save_vector_model
from tests.tools.quantize_onnx.conftest import names, only, psnr_of, relative_error_of, save_with_a_bad_layer
from tools.quantize_onnx import quantize_onnx
from tools.quantize_onnx.backend import FLOAT
from tools.quantize_onnx.command import saturates
from tools.quantize_onnx.options import OnnxRequest
from tools.quantize_onnx.quantizing import QuantizeTask, quantize

LIMIT = 0.1
INT8 = "int8-static"
LEDGER = "model_int8-static_search.jsonl"

ErrorOf = Callable[[frozenset[str]], float]

# The search itself, over models whose errors are known.


@dataclass(frozen=True)
class FormulaJob:
    """A candidate whose error is known.

    Args:
        error_of: Error by the layers that are quantized.
        sizes: Layer -> bytes that it saves; 100 for layers that are not there.
        refused: Layer that the runtime refuses in 8 bits; empty without.
        precisions: Of the candidate.
    """

    error_of: ErrorOf
    sizes: Mapping[str, int]
    refused: str
    precisions: Precisions

    def measure(self) -> Outcome:
        quantized = frozenset(layer for layer, precision in self.precisions.items() if precision == INT8)
        if self.refused in quantized:
            raise RefusedError("no kernel")
        error = self.error_of(quantized)
        size = 100_000 - sum(self.sizes.get(layer, 100) for layer in quantized)
        return Outcome(size, [OutputError("out", error, worst_cosine=1 - error**2)])


def search(
    errors: Mapping[str, float], *, sizes: Mapping[str, int] | None = None, refused: str = "", error_of: ErrorOf | None = None
) -> tuple[list[str], SearchResult]:
    """Return the layers left in float, and the result; squared errors of layers add up unless `error_of` says otherwise."""
    space = SearchSpace(dict.fromkeys(errors, FLOAT), {layer: [INT8] for layer in errors}, FLOAT)

    def added(quantized: frozenset[str]) -> float:
        return sum(errors[layer] ** 2 for layer in quantized) ** 0.5

    def make(precisions: Precisions, _: bool) -> FormulaJob:
        return FormulaJob(error_of or added, sizes or {}, refused, precisions)

    with ThreadPoolExecutor(1) as executor:
        result = Search(space, make, Limits({"": LIMIT}), "size", executor, Ledger(None, {})).run()
    assert result.share <= 1
    return [layer for layer, precision in result.precisions.items() if precision == FLOAT], result


def test_nothing_stays_in_float_where_the_limit_is_kept_anyway() -> None:
    floats, result = search({"a": 0.01, "b": 0.02})
    assert (floats, result.measured) == ([], 2)  # in float, and quantized as a whole


def test_the_one_bad_layer_stays_in_float_and_no_other() -> None:
    errors = dict.fromkeys("abdefgh", 0.01) | {"c": 0.5}
    floats, result = search(errors)
    assert floats == ["c"]
    assert result.outcome.errors[0].relative_error == pytest.approx(0.01 * 7**0.5)


def test_of_equal_layers_just_as_many_stay_as_it_takes() -> None:
    floats, _ = search(dict.fromkeys("abcdefgh", 0.05))  # four of them make 0.1
    assert len(floats) == 4


def test_errors_count_for_their_bytes() -> None:
    """Two small layers that are as harmful as a large one go back to float before it."""
    floats, _ = search({"large": 0.09, "one": 0.09, "two": 0.09}, sizes={"large": 10_000})
    assert floats == ["one", "two"]


def test_a_layer_that_is_bad_alone_and_harmless_in_company_is_quantized() -> None:
    alone = {frozenset({"first"}): 0.5, frozenset({"second"}): 0.4, frozenset({"third"}): 0.01}

    def error_of(quantized: frozenset[str]) -> float:
        return alone.get(quantized, 0.5 if "second" in quantized else 0.01) if quantized else 0.0

    floats, _ = search(dict.fromkeys(("first", "second", "third"), 0.0), error_of=error_of)
    assert floats == ["second"]


def test_a_layer_with_which_the_model_does_not_run_stays_in_float() -> None:
    floats, _ = search({"a": 0.01, "b": 0.0, "c": 0.02}, refused="b")
    assert floats == ["b"]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_where_no_layer_can_be_quantized_all_stay_in_float(count: int) -> None:
    floats, _ = search(dict.fromkeys(map(str, range(count)), 1.0))
    assert len(floats) == count


def test_a_search_measures_each_layer_alone_and_few_mixtures() -> None:
    layers = [f"{number:02}" for number in range(32)]
    floats, result = search(dict.fromkeys(layers, 0.001) | {"07": 0.5})
    assert floats == ["07"]
    assert result.measured <= 2 + 32 + 2 * 6 + 1  # in float and whole; alone; two walks over the list; the last layer once more


# Real models.


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three convolutions, the second of which is bad in 8 bits."""
    return save_with_a_bad_layer(tmp_path_factory.mktemp("bad") / "model.onnx")


def reduced() -> list[str]:
    return ["reduce_range=yes"] if saturates() else []


@pytest.fixture(scope="module")
def searched(bad: Path, tiles: Path) -> Quantized:
    """The result of one search from nothing; its ledger stays next to the product."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shared.runtime.benchmark.BUDGET_S", 0.0)
        return quantize_onnx(bad, calibration=tiles, min_psnr=60, set_options=reduced())


def same_file(one: Quantized, other: Quantized) -> bool:
    assert one.product is not None and other.product is not None
    return one.product.sha256 == other.product.sha256


def test_a_search_leaves_the_bad_layer_in_float_and_no_other(searched: Quantized, bad: Path, tiles: Path, tmp_path: Path) -> None:
    without = quantize_onnx(bad, output=tmp_path / "without.onnx", calibration=tiles)
    assert psnr_of(without) < 55
    result = only(searched)
    assert searched.ok
    assert result.float_layers == ["conv1"]
    assert [(op.name, op.reason.partition(":")[0]) for op in result.skipped] == [("conv1", "left in float by the search")]
    assert psnr_of(searched) >= 60
    assert result.search is not None
    assert result.search.precisions == {FLOAT: 1, INT8: 2}


def test_a_layer_that_is_left_in_float_is_computed_in_float(bad: Path, tiles: Path, tmp_path: Path) -> None:
    """ONNX Runtime quantizes float weights between quantized tensors itself when it loads a model, per tensor."""
    errors = []
    for number, exclude in enumerate([[], ["conv1"]]):
        made = quantize_onnx(bad, output=tmp_path / f"{number}.onnx", calibration=tiles, exclude=exclude)
        errors.append(relative_error_of(made))
    assert errors[1] < 0.2 * errors[0]


def test_no_layer_of_a_real_model_stays_in_float_where_the_limit_is_kept_anyway(model: Path, tiles: Path) -> None:
    result = only(quantize_onnx(model, calibration=tiles, min_psnr=30))
    assert result.search is not None
    assert (result.float_layers, result.skipped, result.search.measured) == ([], [], 2)


@pytest.mark.parametrize("recipe", ["int8-static", "int16x8"])
def test_a_relative_error_is_a_limit_too(bad: Path, tiles: Path, tmp_path: Path, recipe: str) -> None:
    """16 bits of activations do not help weights that lack bits."""
    quantized = quantize_onnx(
        bad,
        output=tmp_path / "m.onnx",
        recipe=recipe,  # type: ignore[arg-type]
        calibration=tiles,
        max_error=["made=0.02"],
        set_options=reduced(),
    )
    assert relative_error_of(quantized) <= 0.02
    assert only(quantized).float_layers == ["conv1"]
    assert [gate.name for gate in quantized.result.gates] == ["max_error:made"]


def test_a_limit_on_an_output_that_is_not_there_is_an_error(bad: Path, tiles: Path, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="no such output; got nobody; expected one of made"):
        quantize_onnx(bad, output=tmp_path / "m.onnx", calibration=tiles, max_error=["nobody=0.02"])


def test_a_limit_that_no_mix_keeps_is_an_error_with_a_remedy_and_nothing_is_written(tmp_path: Path, tiles: Path) -> None:
    model = save_picture_model(tmp_path / "model.onnx", widths=[32])
    says = (
        r"no int8-static model keeps the limits: no layer can be quantized inside them; allow a larger error, or use --recipe fp16"
    )
    with pytest.raises(ToolError, match=says):
        quantize_onnx(model, calibration=tiles, min_psnr=150)
    assert names(model.parent) == {"model.onnx", LEDGER}


def test_a_search_does_not_count_what_is_excluded_anyway(tmp_path: Path, vectors: Path) -> None:
    model = save_vector_model(tmp_path / "m.onnx")
    with pytest.raises(ToolError, match="no int8-static model keeps the limits"):
        quantize_onnx(model, calibration=vectors, exclude=["Gemm"], min_cosine=0.999999999)
    with pytest.raises(ToolError, match=r"m\.onnx: no layer of this model can be quantized"):
        quantize_onnx(model, calibration=vectors, exclude=["Gemm", "MatMul"], min_cosine=0.9)


def test_a_model_that_is_slower_in_8_bits_is_no_faster_one(
    bad: Path, tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.quantize.search.TOO_SLOW", 0.0)
    with pytest.raises(ToolError, match=r"no int8-static model keeps the limits.*int8-static: .* times slower than float here"):
        quantize_onnx(bad, output=tmp_path / "m.onnx", calibration=tiles, min_psnr=30, objective="latency")


# Again, after an interruption, on other executors.


def test_a_finished_search_measures_nothing_again(searched: Quantized, bad: Path, tiles: Path) -> None:
    before = (bad.parent / LEDGER).read_bytes()
    again = quantize_onnx(bad, calibration=tiles, min_psnr=60, set_options=reduced(), overwrite=True, gate=["min_coverage=0"])
    first, second = only(searched).search, only(again).search
    assert first is not None and second is not None
    assert (second.measured, second.resumed) == (0, first.measured)
    assert same_file(searched, again)
    assert (bad.parent / LEDGER).read_bytes() == before
    head, *entries = map(json.loads, before.decode().splitlines())
    assert head["edgepress"] == "search"
    assert len({entry["key"] for entry in entries}) == len(entries) == first.measured


def test_candidates_that_are_made_at_the_same_time_do_not_share_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's quantizer writes and deletes a file next to the model, named after it."""
    import onnxruntime.quantization

    model, sources = save_picture_model(tmp_path / "model.onnx"), []
    quantize_dynamic = onnxruntime.quantization.quantize_dynamic

    def noted(source: Path, *arguments: object, **options: object) -> None:
        sources.append(source)
        quantize_dynamic(source, *arguments, **options)

    monkeypatch.setattr(onnxruntime.quantization, "quantize_dynamic", noted)
    task = QuantizeTask(model, model, model, OnnxRequest("int8"))
    for number in range(2):
        quantize(task, tmp_path / f"{number}.onnx")
    assert len({*sources, model}) == 3
    assert {source.parent for source in sources} == {tmp_path}  # external weights lie there
    assert names(tmp_path) == {"model.onnx", "0.onnx", "1.onnx"}


def test_a_file_that_is_no_ledger_is_refused_and_left_alone(bad: Path, tiles: Path, tmp_path: Path) -> None:
    (tmp_path / "m_search.jsonl").write_text("precious\n")
    with pytest.raises(ToolError, match=r"m_search\.jsonl: this file is no search ledger"):
        quantize_onnx(bad, output=tmp_path / "m.onnx", calibration=tiles, min_psnr=60)
    assert (tmp_path / "m_search.jsonl").read_text() == "precious\n"
    assert names(tmp_path) == {"m_search.jsonl"}


def test_one_worker_finds_the_same_file(
    searched: Quantized, bad: Path, tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.runtime.executors.cpu_count", lambda: 1)
    alone = quantize_onnx(bad, output=tmp_path / "m.onnx", calibration=tiles, min_psnr=60, set_options=reduced())
    assert same_file(searched, alone)
    assert only(alone).search == only(searched).search


def test_two_dask_workers_find_the_same_file(searched: Quantized, bad: Path, tiles: Path, tmp_path: Path) -> None:
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        again = quantize_onnx(
            bad,
            output=tmp_path / "m.onnx",
            calibration=tiles,
            min_psnr=60,
            set_options=reduced(),
            sensitivity=True,
            dask=cluster.scheduler_address,
        )
    assert same_file(searched, again)
    assert only(again).search == only(searched).search
    assert {layer.name for layer in only(again).sensitivity} == {"conv0", "conv2"}


def test_a_search_that_was_killed_goes_on_where_it_was(tmp_path: Path, tiles: Path) -> None:
    """Killed by the kernel halfway, as a process that takes too much memory is: all its processes at once."""
    model = save_picture_model(tmp_path / "model.onnx", widths=[16] * 6)
    whole = quantize_onnx(model, output=tmp_path / "whole.onnx", calibration=tiles, min_psnr=84, set_options=reduced())
    search = only(whole).search
    assert search is not None
    assert search.measured > 12
    settings = [part for setting in reduced() for part in ("--set", setting)]
    command = [sys.executable, "-m", "tools.quantize_onnx", model, "--calibration", tiles, "--min-psnr", "84", *settings, "--json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ledger, halfway = tmp_path / LEDGER, search.measured // 2
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not ledger.exists() or len(ledger.read_bytes().splitlines()) <= halfway:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    known = len(ledger.read_bytes().splitlines()) - 1
    assert halfway <= known < search.measured
    assert "model_int8-static.onnx" not in names(tmp_path)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    (result,) = json.loads(done.stdout)["result"]["models"]
    assert known - 1 <= result["search"]["resumed"] <= known  # the last line may have been cut off
    assert result["search"]["measured"] == search.measured - result["search"]["resumed"]
    assert (tmp_path / "model_int8-static.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()
