"""A search over a real model finds the same small file within the limit every time, wherever its candidates are measured."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

from shared.calibration.dataset import CalibrationSet
from shared.calibration.samples import HeldSamples, Samples
from shared.command.errors import ToolError
from shared.formats.model_file import ModelFile
from shared.formats.tensors import TensorSpec
from shared.metrics.output_error import OutputError
from shared.quantize import search
from shared.quantize.backend import Candidate, Quantization
from shared.quantize.ledger import Ledger, Outcome
from shared.quantize.product import Quantized
from shared.quantize.request import ALL_OUTPUTS, Limits, Request
from shared.quantize.result import ModelResult
from shared.quantize.search import Search, SearchResult
from shared.quantize.sensitivity import LayerSensitivity, measure_sensitivity, node_data
from shared.runtime.executors import local_processes
from shared.runtime.processes import Workspace
from tests.conftest import ROOT
from tests.tools.quantize_tflite.graph.test_bias import convolution
from tools.quantize_tflite import backend, coverage, quantize_tflite
from tools.quantize_tflite.backend import BASE, STEPS, _subject, job_maker, layer_jobs, space
from tools.quantize_tflite.candidates import TfliteJob
from tools.quantize_tflite.graph.repair import shorten_names
from tools.quantize_tflite.options import TfliteSettings
from tools.quantize_tflite.recipes import Rules, assign, parse_selector

LIMIT = 0.05
OTHERS = ["DEPTHWISE_CONV_2D", "FULLY_CONNECTED"]  # left out where five layers are enough


@pytest.fixture(scope="module", autouse=True)
def _no_screen_by_time() -> Iterator[None]:
    """Leave out no precision as too slow: on a busy machine timings wander, and these tests ask for the very same result twice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "TOO_SLOW", math.inf)
        yield


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("samples") / "samples.npz"
    np.savez(path, images=np.random.default_rng(0).random((4, 3, 64, 64), np.float32))
    return path


def quantization_of(model: Path, samples: Path, *exclude: str, output: str = "output_0") -> Quantization:
    """Return a quantization as the pipeline settles it."""
    dataset = CalibrationSet(samples)
    request = Request("search", "mixed", TfliteSettings(exclude=[parse_selector(text) for text in exclude]))
    settled = Samples(dataset, 4, HeldSamples(dataset, 4), "", [None])
    inputs = [TensorSpec("image", (1, 3, 64, 64), "float32")]
    source = ModelFile(model)
    return Quantization("m", source, source, request, settled, Workspace(samples.parent, backend.WORKER, 60), inputs, [output])


@pytest.fixture(scope="module")
def quantization(float_model: Path, samples: Path) -> Quantization:
    return quantization_of(float_model, samples)


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    with local_processes() as executor:
        yield executor


def run_search(quantization: Quantization, executor: Executor, *, latency: bool = False, limit: float = LIMIT) -> SearchResult:
    limits = Limits({ALL_OUTPUTS: limit})
    objective = "latency" if latency else "size"
    return Search(space(quantization), job_maker(quantization), limits, objective, executor, Ledger(None, {})).run()


def measured(quantization: Quantization, precisions: dict[str, str]) -> Outcome:
    return job_maker(quantization)(precisions, False).measure()


@pytest.fixture(scope="module")
def convolutions(float_model: Path, samples: Path) -> Quantization:
    """The same with all layers but five excluded."""
    return quantization_of(float_model, samples, *OTHERS)


def test_an_impossible_limit_is_an_error_that_names_the_remedy(quantization: Quantization, pool: Executor) -> None:
    with pytest.raises(
        ToolError, match=r"even the float16 model is outside the limits; got output_0: relative error .*larger error"
    ):
        run_search(quantization, pool, limit=1e-9)


def test_a_search_for_latency_stays_within_the_limit_too(convolutions: Quantization, pool: Executor) -> None:
    result = run_search(convolutions, pool, latency=True)
    assert result.share <= 1
    assert result.outcome.slowdown is not None


def test_excluded_layers_are_not_searched(convolutions: Quantization, float_model: Path, samples: Path) -> None:
    chosen = space(convolutions)
    assert list(chosen.base) == list(chosen.choices) == [op.name for op in convolutions.model.ops if op.op_type == "CONV_2D"]
    assert set(chosen.base.values()) == {BASE}
    assert chosen.precisions == list(STEPS)
    assert not space(quantization_of(float_model, samples, *OTHERS, "CONV_2D")).choices


def test_small_layers_stay_in_float16(quantization: Quantization, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "COUNTED_WEIGHTS", 0.5)
    chosen = space(quantization)
    sizes = {op.name: op.weight_bytes for op in quantization.model.ops if op.name in chosen.base}
    assert len(chosen.choices) < len(chosen.base) == 21
    assert min(sizes[name] for name in chosen.choices) >= max(size for name, size in sizes.items() if name not in chosen.choices)
    assert sum(sizes[name] for name in chosen.choices) >= 0.5 * sum(sizes.values())


def product_of_matrices() -> bytes:
    """Return a fully connected layer with a bias and behind it a product with a stored matrix."""
    rng = np.random.default_rng(4)
    shapes = {b"x": (1, 4, 64), b"w": (64, 64), b"h": (1, 4, 64), b"m": (64, 96), b"y": (1, 4, 96), b"b": (64,)}
    stored = {b"w": 1, b"m": 2, b"b": 3}
    tensors = [schema.TensorT(name=n, shape=list(s), type=0, buffer=stored.get(n, 0)) for n, s in shapes.items()]
    options = schema.FullyConnectedOptionsT(keepNumDims=True)
    ops = [
        schema.OperatorT(opcodeIndex=0, inputs=[0, 1, 5], outputs=[2], builtinOptionsType=8, builtinOptions=options),
        schema.OperatorT(
            opcodeIndex=1, inputs=[2, 3], outputs=[4], builtinOptionsType=101, builtinOptions=schema.BatchMatMulOptionsT()
        ),
    ]
    assert schema.BuiltinOptions.FullyConnectedOptions == 8 and schema.BuiltinOptions.BatchMatMulOptions == 101
    graph = schema.SubGraphT(tensors=tensors, inputs=[0], outputs=[4], operators=ops, name=b"main")
    buffers = [schema.BufferT()]
    buffers += [schema.BufferT(data=rng.normal(size=shapes[n]).astype(np.float32).reshape(-1).view(np.uint8)) for n in stored]
    codes = [schema.OperatorCodeT(builtinCode=c, deprecatedBuiltinCode=c, version=1) for c in (9, 126)]
    model = schema.ModelT(version=3, operatorCodes=codes, subgraphs=[graph], buffers=buffers)
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


@pytest.mark.parametrize("limit", [0.0005, 0.05])
def test_an_op_that_has_int8_but_no_float16_is_searched(tmp_path: Path, limit: float) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(product_of_matrices())
    np.savez(tmp_path / "a.npz", x=np.random.default_rng(0).random((3, 1, 4, 64), np.float32))
    matrices = quantization_of(path, tmp_path / "a.npz", output="y")
    assert (list(space(matrices).base), list(space(matrices).choices)) == (["h"], ["h", "y"])
    with ThreadPoolExecutor(1) as alone:
        assert run_search(matrices, alone, limit=limit).share <= 1


# The whole tool.


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("searched") / "page.html"


@pytest.fixture(scope="module")
def searched(float_model: Path, samples: Path, page: Path) -> Quantized:
    """The product of a search over all layers, with a page next to it."""
    output = page.with_name("m.tflite")
    return quantize_tflite(float_model, output=output, calibration=samples, max_error=[str(LIMIT)], sensitivity=True, html=page)


def path_of(done: Quantized) -> Path:
    assert done.product is not None
    return done.product.path


def test_the_result_is_within_the_limit_and_smaller_than_int8(quantization: Quantization, searched: Quantized) -> None:
    [model] = searched.result.models
    assert model.search is not None and model.product is not None
    [error] = model.product.errors
    assert error.relative_error is not None
    assert error.relative_error <= LIMIT
    [again] = TfliteJob(_subject(quantization), model.rules).measure().errors
    assert model.search.share == (again.relative_error or 0) / LIMIT <= 1
    half, int8 = (measured(quantization, dict.fromkeys(space(quantization).base, recipe)).size_bytes for recipe in (BASE, "int8"))
    assert path_of(searched).stat().st_size < min(0.6 * half, int8)
    assert model.size_after_bytes < 0.5 * model.size_before_bytes


def test_every_layer_has_a_precision_that_was_searched(quantization: Quantization, searched: Quantized) -> None:
    [model] = searched.result.models
    assert model.search is not None
    layers = [op for op in quantization.model.ops if op.op_type in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")]
    assert sum(model.search.precisions.values()) == model.search.layers == len(layers)
    assert model.search.precisions.keys() <= {BASE, *STEPS}
    assert {row.op_type: row.quantized for row in model.op_types if row.quantized} == Counter(op.op_type for op in layers)
    assert (model.search.resumed, model.search.left_out, model.float_layers) == (0, [], [])


def test_the_written_recipe_gives_the_same_size_again(float_model: Path, searched: Quantized, tmp_path: Path) -> None:
    recipe = path_of(searched).with_name("m_recipe.json")
    again = quantize_tflite(float_model, output=tmp_path / "again.tflite", recipe=str(recipe))
    assert path_of(again).stat().st_size == path_of(searched).stat().st_size


def test_a_search_writes_the_sensitivity_of_its_layers_and_the_page(searched: Quantized, page: Path) -> None:
    [model] = searched.result.models
    errors = errors_of(model.sensitivity)
    assert errors == sorted(errors, reverse=True)
    nodes = json.loads(page.with_name("m_node_data.json").read_text())["videoseal_small.tflite"]["results"]
    assert len(nodes) == len(model.sensitivity) > 15
    assert "Error at the output, each layer quantized alone" in page.read_text()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_error": ["0.01"]}, "a search needs real inputs"),
        ({"min_cosine": 0.99}, "a search needs real inputs"),
        ({"min_psnr": 40.0}, "--min-psnr is for models that make images; use --min-cosine"),
        ({"max_error": ["0.01"], "recipe": "int8"}, "a search for limits finds the recipe by itself"),
    ],
)
def test_a_search_that_cannot_be_made_is_refused(model: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ToolError, match=says):
        quantize_tflite(model, **options)


# The same file wherever it was measured, and however often it was interrupted.


def small_search(model: Path, samples: Path, output: Path, dask: str | None = None) -> Quantized:
    return quantize_tflite(model, output=output, calibration=samples, max_error=[str(LIMIT)], exclude=OTHERS, dask=dask)


@pytest.fixture(scope="module")
def local(float_model: Path, samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """The product of a search over five layers, measured in processes of this machine."""
    return small_search(float_model, samples, tmp_path_factory.mktemp("local") / "m.tflite")


def test_one_worker_in_this_process_finds_the_same_precisions(convolutions: Quantization, local: Quantized) -> None:
    with ThreadPoolExecutor(1) as alone:
        found = run_search(convolutions, alone)
    [model] = local.result.models
    assert assign(found.precisions) == model.rules
    assert model.search is not None
    assert (found.measured, found.share) == (model.search.measured, model.search.share)


def test_two_dask_workers_give_the_same_file(float_model: Path, samples: Path, local: Quantized, tmp_path: Path) -> None:
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        again = small_search(float_model, samples, tmp_path / "m.tflite", cluster.scheduler_address)
    assert path_of(again).read_bytes() == path_of(local).read_bytes()


def test_a_search_that_was_killed_goes_on_and_gives_the_same_file(
    float_model: Path, samples: Path, local: Quantized, tmp_path: Path
) -> None:
    output, ledger = tmp_path / "m.tflite", tmp_path / "m_search.jsonl"
    script = (
        "import math, sys; from pathlib import Path; from shared.quantize import search; search.TOO_SLOW = math.inf\n"
        "from tests.tools.quantize_tflite.test_search import small_search; small_search(*map(Path, sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, *map(str, (float_model, samples, output))]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while (not ledger.exists() or ledger.read_text().count("\n") < 9) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not output.exists()
    again = small_search(float_model, samples, output)
    [model], [before] = again.result.models, local.result.models
    assert model.search is not None and before.search is not None
    assert model.search.resumed >= 8
    assert model.search.measured + model.search.resumed == before.search.measured
    assert path_of(again).read_bytes() == path_of(local).read_bytes()


# Limits and samples of other kinds, on a network that makes an image.


@pytest.fixture(scope="module")
def blur(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that blurs an image, with samples and others that are held out."""
    path, rng = tmp_path_factory.mktemp("blur") / "blur.tflite", np.random.default_rng(0)
    weights = rng.random((3, 7, 7, 3))
    path.write_bytes(convolution("CONV_2D", weights / weights.sum(axis=(1, 2, 3), keepdims=True), (1, 16, 16, 3), (1, 16, 16, 3)))
    for name, count in (("samples", 4), ("holdout", 3)):
        np.savez(path.with_name(f"{name}.npz"), x=rng.random((count, 16, 16, 3), np.float32))
    return path


def blurred(blur: Path, output: Path, **options: Any) -> ModelResult:
    """Return the result of a run with samples, held out ones too."""
    samples, holdout = blur.with_name("samples.npz"), blur.with_name("holdout.npz")
    [result] = quantize_tflite(blur, output=output, calibration=samples, holdout=holdout, **options).result.models
    return result


@pytest.mark.parametrize(
    ("loose", "tight", "value"),
    [
        ({"min_psnr": 30.0}, {"min_psnr": 75.0}, lambda error: error.psnr_db),
        ({"min_cosine": 0.99}, {"min_cosine": 0.9999999}, lambda error: error.cosine),
        ({"max_error": ["0.1"]}, {"max_error": ["0.0005"]}, lambda error: -error.relative_error),
    ],
)
def test_each_limit_is_kept_at_the_smallest_size_on_samples_that_are_held_out(
    blur: Path, tmp_path: Path, loose: dict[str, Any], tight: dict[str, Any], value: Callable[[OutputError], float]
) -> None:
    results = [blurred(blur, tmp_path / f"{number}.tflite", **limit) for number, limit in enumerate((loose, tight))]
    for result, limit in zip(results, (loose, tight), strict=True):
        [(name, least)] = limit.items()
        assert result.search is not None and result.product is not None
        assert (result.samples, result.measured_on.partition(";")[0]) == (4, "3 samples that were not calibrated with")
        assert value(result.product.errors[0]) >= (-float(least[0]) if name == "max_error" else least)
    assert results[0].size_after_bytes < results[1].size_after_bytes < results[1].size_before_bytes


def test_a_psnr_that_nothing_reaches_is_an_error(blur: Path, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match=r"blur\.tflite: even the float16 model is outside the limits; got y: .*PSNR"):
        blurred(blur, tmp_path / "m.tflite", min_psnr=150.0)


def test_samples_that_are_held_out_need_no_calibration_set(blur: Path, tmp_path: Path) -> None:
    holdout = blur.with_name("holdout.npz")
    done = quantize_tflite(blur, output=tmp_path / "m.tflite", holdout=holdout, gate=["min_psnr=30", "min_cosine=0.9"])
    [result] = done.result.models
    assert (result.samples, result.corrected_biases) == (0, 0)
    assert result.measured_on.startswith("3 samples that were not calibrated with")
    assert [gate.ok for gate in done.result.gates] == [True, True]
    np.savez(holdout.with_name("others.npz"), x=np.zeros((2, 16, 16, 3), np.float32) + 0.5)
    with pytest.raises(ToolError, match="the output exists and is out of date"):
        quantize_tflite(blur, output=tmp_path / "m.tflite", holdout=holdout.with_name("others.npz"), gate=["min_psnr=30"])


# Sensitivity.


def harmful_rules(model: Path) -> tuple[str, Rules]:
    """Return int8 for every layer but one in the middle, which gets int4; and that one's name."""
    names = [op.name for op in ModelFile(model).ops if op.op_type == "CONV_2D"]
    weight_only = dict.fromkeys(names, "int8-weight-only")
    return names[2], assign({**weight_only, names[2]: "weight_only_wi4_afp32"})


def sensitivity_of(quantization: Quantization, rules: Rules, executor: Executor) -> list[LayerSensitivity]:
    candidate = Candidate(quantization.request, quantization.model, rules=rules)
    return measure_sensitivity(quantization.model.ops, layer_jobs(quantization, candidate), executor)


def errors_of(layers: Sequence[LayerSensitivity]) -> list[float]:
    return [layer.at_output.relative_error or math.inf for layer in layers]


def test_the_layer_that_does_most_harm_comes_first(quantization: Quantization, pool: Executor) -> None:
    name, rules = harmful_rules(quantization.model.path)
    layers = sensitivity_of(quantization, rules, pool)
    assert len(layers) == 5
    assert layers[0].name == name
    errors = errors_of(layers)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 3 * errors[1]
    assert all(layer.op_type == "CONV_2D" and layer.at_layer.relative_error for layer in layers)


@pytest.fixture(scope="module")
def plain(quantization: Quantization, samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantization:
    """The same model with inner tensors named t0, t1, ..."""
    path = tmp_path_factory.mktemp("plain") / "plain.tflite"
    shorten_names(quantization.model.path, path)
    return quantization_of(path, samples)


@pytest.mark.parametrize("workers", [1, 2])
def test_layers_of_a_model_with_plain_names_are_ranked(plain: Quantization, workers: int) -> None:
    name, rules = harmful_rules(plain.model.path)
    with ThreadPoolExecutor(workers) as executor:
        layers = sensitivity_of(plain, rules, executor)
    assert [layer.op_type for layer in layers] == ["CONV_2D"] * 5
    assert layers[0].name == name
    errors = errors_of(layers)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 2 * errors[1]
    values = {tensor: entry["value"] for tensor, entry in json.loads(node_data("m", layers))["m"]["results"].items()}
    assert values == {layer.tensor: layer.at_output.relative_error for layer in layers}


def test_layers_that_no_rule_quantizes_are_not_measured(plain: Quantization) -> None:
    _, rules = harmful_rules(plain.model.path)
    skip = {"regex": "^t", "operation": "CONV_2D", "algorithm_key": "no_quantize", "op_config": {}}
    assert layer_jobs(plain, Candidate(plain.request, plain.model, rules=[*rules, skip])) == {}


def test_layers_of_a_static_recipe_are_refused(plain: Quantization) -> None:
    """Where the user asks for them; a product of no use is explained only where that is possible."""
    candidate = Candidate(plain.request, plain.model, rules=assign({"t1": "int8-static"}))
    assert not layer_jobs(plain, candidate)
    asked = replace(plain, request=replace(plain.request, sensitivity=True))
    with pytest.raises(ToolError, match="m: --sensitivity measures layers of recipes without calibration; leave out --sensitivity"):
        layer_jobs(asked, candidate)
