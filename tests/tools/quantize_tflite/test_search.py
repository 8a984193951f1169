"""A search finds the same small model within the limit every time, wherever its candidates are measured."""

import hashlib
import json
import math
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

from shared.calibration.dataset import CalibrationSet
from shared.command.errors import ToolError
from shared.command.resources import cpu_count
from shared.formats.tflite import read_ops
from shared.metrics.output_error import Damage
from shared.runtime import executors
from shared.runtime.executors import dask_cluster, local_processes
from tests.conftest import ROOT
from tools.quantize_tflite import search
from tools.quantize_tflite.candidates import Job, Outcome, Subject, measure_candidate
from tools.quantize_tflite.recipes import Rules, assign, resolve_recipe
from tools.quantize_tflite.repair import shorten_names
from tools.quantize_tflite.search import BASE, STEPS, Found, Ledger, Search, _hull, measure_safely
from tools.quantize_tflite.sensitivity import LayerDamage, measure_layers, node_data

LIMIT = 0.05


@pytest.fixture(scope="module", autouse=True)
def _no_screen_by_time() -> Iterator[None]:
    """Time nobody out: on a busy machine timings wander, and these tests ask for the very same result twice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "TOO_SLOW", math.inf)
        yield


@pytest.fixture(scope="module")
def subject(float_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    path = tmp_path_factory.mktemp("samples") / "samples.npz"
    np.savez(path, images=np.random.default_rng(0).random((4, 3, 64, 64), np.float32))
    return Subject(float_model, hashlib.sha256(float_model.read_bytes()).hexdigest(), CalibrationSet(path))


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    with local_processes() as executor:
        yield executor


def run_search(subject: Subject, executor: Executor, ledger: Path, limit: float = LIMIT) -> Found:
    kept = Ledger(ledger, {"model": subject.sha256})
    try:
        return Search(subject, read_ops(subject.path), [limit], "size", executor, kept).run()
    finally:
        kept.close()


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ledger") / "search.jsonl"


@pytest.fixture(scope="module")
def found(subject: Subject, pool: Executor, ledger: Path) -> Found:
    """The result of one search from nothing; its ledger stays."""
    return run_search(subject, pool, ledger)


def test_the_result_is_within_the_limit_and_smaller_than_float16(subject: Subject, found: Found) -> None:
    again = measure_candidate(Job(subject, assign(found.precisions)))
    assert again == found.outcome
    (damage,) = again.outputs
    assert damage.relative_error is not None
    assert damage.relative_error <= LIMIT
    assert found.drop == damage.relative_error / LIMIT
    half = measure_candidate(Job(subject, assign(dict.fromkeys(found.precisions, BASE))))
    assert again.size_bytes < 0.6 * half.size_bytes
    int8 = measure_candidate(Job(subject, assign(dict.fromkeys(found.precisions, "int8"))))
    assert again.size_bytes < int8.size_bytes


def test_every_layer_has_a_precision_that_was_searched(subject: Subject, found: Found) -> None:
    layers = {op.scope for op in read_ops(subject.path) if op.op_type in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")}
    assert found.precisions.keys() == layers
    assert set(found.precisions.values()) <= {BASE, *STEPS}
    assert found.layers == len(layers)
    assert (found.resumed, found.left_out) == (0, [])


def test_the_ledger_holds_each_measurement_once(found: Found, ledger: Path) -> None:
    head, *entries = map(json.loads, ledger.read_text().splitlines())
    assert head["edgepress"] == "search"
    assert len({entry["key"] for entry in entries}) == len(entries) == found.measured


def test_a_finished_search_measures_nothing_again(subject: Subject, pool: Executor, found: Found, ledger: Path) -> None:
    again = run_search(subject, pool, ledger)
    assert (again.measured, again.resumed) == (0, found.measured)
    assert (again.precisions, again.outcome) == (found.precisions, found.outcome)


def test_another_number_of_workers_finds_the_same_recipe(subject: Subject, found: Found, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as alone:
        again = run_search(subject, alone, tmp_path / "ledger")
    assert (again.precisions, again.outcome, again.measured) == (found.precisions, found.outcome, found.measured)


def test_an_interrupted_search_goes_on_where_it_was(
    subject: Subject, pool: Executor, found: Found, ledger: Path, tmp_path: Path
) -> None:
    lines = ledger.read_text().splitlines(keepends=True)
    cut = tmp_path / "ledger"
    cut.write_text("".join(lines[:30]) + lines[30][: len(lines[30]) // 2])
    again = run_search(subject, pool, cut)
    assert (again.precisions, again.outcome) == (found.precisions, found.outcome)
    assert again.resumed == 29
    assert 0 < again.measured == found.measured - 29
    assert all(json.loads(line) for line in cut.read_text().splitlines())
    assert {json.loads(line).get("key") for line in cut.read_text().splitlines()} == {json.loads(line).get("key") for line in lines}


def test_a_ledger_of_another_model_is_started_anew(found: Found, ledger: Path, tmp_path: Path) -> None:
    other = tmp_path / "ledger"
    other.write_text(ledger.read_text())
    known = Ledger(other, {"model": "another"})
    known.close()
    assert known.resumed == 0
    assert [json.loads(line) for line in other.read_text().splitlines()] == [{"edgepress": "search", "model": "another"}]


@pytest.mark.parametrize("content", ["precious\n", '{"edgepress": "report"}\n', "", "\x00\xff"])
def test_a_file_that_is_no_ledger_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content, encoding="latin-1")
    before = path.read_bytes()
    with pytest.raises(ToolError, match=r"notes\.txt: this file is no search ledger"):
        Ledger(path, {"model": "any"})
    assert path.read_bytes() == before


def test_a_ledger_gives_back_what_was_put(tmp_path: Path) -> None:
    outcomes = {
        "a": Outcome(100, [Damage(0.1, 20.0, 0.99), Damage(None, None, None)], None, 1.25),
        "b": Outcome(0, []),
        "c": Outcome(7, [Damage(0.0, None, 1.0)]),
    }
    first = Ledger(tmp_path / "ledger", {"ai-edge-litert": "1", "model": "m"})
    for key, outcome in outcomes.items():
        first.put(key, outcome)
    first.close()
    second = Ledger(tmp_path / "ledger", {"ai-edge-litert": "1", "model": "m"})
    second.close()
    assert {key: second.get(key) for key in "abcd"} == {**outcomes, "d": None}
    assert second.resumed == 3


def test_tighter_limits_give_larger_files(subject: Subject, pool: Executor, found: Found, tmp_path: Path) -> None:
    shared = tmp_path / "ledger"  # measurements do not depend on the limit
    limits = (0.001, 0.01, 0.2)
    results = [run_search(subject, pool, shared, limit) for limit in limits]
    results.insert(2, found)
    sizes = [result.outcome.size_bytes for result in results]
    assert sizes == sorted(set(sizes), reverse=True)
    assert all(result.drop <= 1 for result in results)


def test_an_impossible_limit_is_an_error_that_names_the_remedy(subject: Subject, pool: Executor, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match=r"even float16 weights move the answers further.*--max-drop"):
        run_search(subject, pool, tmp_path / "ledger", 1e-9)


def test_a_model_without_layers_is_an_error(subject: Subject, pool: Executor, tmp_path: Path) -> None:
    ops = [op for op in read_ops(subject.path) if op.op_type == "ADD"]
    kept = Ledger(tmp_path / "ledger", {})
    with pytest.raises(ToolError, match="no layer of this model can be quantized"):
        Search(subject, ops, [LIMIT], "size", pool, kept).run()
    kept.close()


def test_precisions_that_are_slow_are_left_out(
    subject: Subject, pool: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "TOO_SLOW", 0.0)
    result = run_search(subject, pool, tmp_path / "ledger")
    assert set(result.precisions.values()) == {BASE}
    assert [text.partition(":")[0] for text in result.left_out] == list(STEPS)
    assert all("times slower than float here" in text for text in result.left_out)


def test_layers_left_out_of_the_search_are_not_touched(subject: Subject, pool: Executor, tmp_path: Path) -> None:
    ops = [op for op in read_ops(subject.path) if op.op_type == "CONV_2D"]
    kept = Ledger(tmp_path / "ledger", {"model": subject.sha256})
    result = Search(subject, ops, [LIMIT], "size", pool, kept).run()
    kept.close()
    assert result.precisions.keys() == {op.scope for op in ops}


def test_a_search_for_latency_stays_within_the_limit_too(subject: Subject, pool: Executor, tmp_path: Path) -> None:
    ops = [op for op in read_ops(subject.path) if op.op_type == "CONV_2D"]
    kept = Ledger(tmp_path / "ledger", {"model": subject.sha256})
    result = Search(subject, ops, [LIMIT], "latency", pool, kept).run()
    kept.close()
    assert result.drop <= 1
    assert result.outcome.slowdown is not None


def hull(points: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    return list(_hull(points))


def test_steps_go_along_the_lower_hull() -> None:
    assert hull([]) == []
    assert hull([(10.0, 2.0, "a")]) == [(10.0, 2.0, "a")]
    assert hull([(20.0, 6.0, "b"), (10.0, 2.0, "a")]) == [(10.0, 2.0, "a"), (10.0, 4.0, "b")]


def test_points_above_the_hull_are_no_steps() -> None:
    assert hull([(10.0, 5.0, "above"), (20.0, 6.0, "b")]) == [(20.0, 6.0, "b")]
    assert hull([(10.0, 1.0, "a"), (20.0, 9.0, "above"), (30.0, 10.0, "c")]) == [(10.0, 1.0, "a"), (20.0, 9.0, "c")]


def test_what_saves_nothing_or_harms_more_for_the_same_is_no_step() -> None:
    assert hull([(0.0, 0.0, "same"), (-5.0, 0.0, "larger")]) == []
    assert hull([(10.0, 3.0, "worse"), (10.0, 2.0, "better")]) == [(10.0, 2.0, "better")]


def test_the_smaller_and_less_harmful_choice_is_one_step() -> None:
    assert hull([(10.0, 4.0, "worse"), (20.0, 1.0, "better")]) == [(20.0, 1.0, "better")]
    assert hull([(10.0, 0.0, "free"), (20.0, 0.0, "freer")]) == [(20.0, 0.0, "freer")]


def test_hull_steps_get_less_worthwhile() -> None:
    rng = np.random.default_rng(7)
    for _ in range(50):
        points = [(float(saved), float(harm), str(n)) for n, (saved, harm) in enumerate(rng.random((6, 2)))]
        slopes = [harm / saved for saved, harm, _ in hull(points)]
        assert slopes == sorted(slopes)
        assert sum(saved for saved, _, _ in hull(points)) == pytest.approx(max(saved for saved, _, _ in points))


def test_a_refused_candidate_has_no_size(subject: Subject) -> None:
    rule = {**resolve_recipe("int8")[1][0], "algorithm_key": "alchemy"}
    assert measure_safely(Job(subject, [rule])) == Outcome(0, [])


def test_a_missing_model_is_no_refused_candidate(subject: Subject, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="the model is not here"):
        measure_safely(Job(Subject(tmp_path / "gone.tflite", subject.sha256, subject.samples), []))


@pytest.mark.parametrize("fault", ["another model", "no samples"])
def test_a_worker_that_lacks_the_files_is_no_refused_candidate(subject: Subject, tmp_path: Path, fault: str) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(subject.path.read_bytes() + (b"\0" if fault == "another model" else b""))
    samples = CalibrationSet(tmp_path / "gone.npz") if fault == "no samples" else subject.samples
    with pytest.raises(ToolError, match=r"another model|no such calibration set"):
        measure_safely(Job(Subject(path, subject.sha256, samples), []))


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


@pytest.mark.parametrize(
    "limit",
    [0.0005, 0.05],
)
def test_an_op_that_has_int8_but_no_float16_is_searched(tmp_path: Path, limit: float) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(product_of_matrices())
    np.savez(tmp_path / "a.npz", x=np.random.default_rng(0).random((3, 1, 4, 64), np.float32))
    subject = Subject(path, hashlib.sha256(path.read_bytes()).hexdigest(), CalibrationSet(tmp_path / "a.npz"))
    with ThreadPoolExecutor(1) as alone:
        result = run_search(subject, alone, tmp_path / "ledger", limit)
    assert result.drop <= 1


def test_local_processes_are_as_many_as_cpus_and_end_with_the_block() -> None:
    with local_processes() as executor:
        assert executor._max_workers == cpu_count()  # type: ignore[attr-defined]
        assert list(executor.map(abs, [-1, 2])) == [1, 2]
        workers = list(executor._processes.values())  # type: ignore[attr-defined]
        assert all(worker.is_alive() for worker in workers)
    assert not any(worker.is_alive() for worker in workers)


def test_workers_do_not_outlive_a_killed_tool(tmp_path: Path) -> None:
    script = tmp_path / "tool.py"
    script.write_text(
        textwrap.dedent("""
        import os, signal
        from shared.runtime.executors import local_processes
        if __name__ == "__main__":
            with local_processes() as executor:
                print(executor.submit(os.getpid).result(), flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
        """)
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)})
    worker = Path("/proc") / done.stdout.strip()
    assert worker.name.isdigit()
    deadline = time.monotonic() + 10
    while worker.exists() and "(zombie)" not in (worker / "status").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not worker.exists() or "(zombie)" in (worker / "status").read_text()


def test_a_dask_cluster_finds_the_same_precisions(subject: Subject, found: Found, tmp_path: Path) -> None:
    from distributed import LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        dask_cluster(cluster.scheduler_address) as executor,
    ):
        again = run_search(subject, executor, tmp_path / "ledger")
    assert (again.precisions, again.outcome) == (found.precisions, found.outcome)


def test_a_dask_cluster_without_workers_is_an_error() -> None:
    from distributed import LocalCluster

    with (
        LocalCluster(n_workers=0, processes=False, dashboard_address=None) as cluster,
        pytest.raises(ToolError, match="has no workers"),
        dask_cluster(cluster.scheduler_address),
    ):
        pass


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense://127.0.0.1:8786", "no such host:80", "127.0.0.1"])
def test_nobody_at_the_address_is_one_line(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "CONNECT_TIMEOUT_S", 1)
    with pytest.raises(ToolError, match=re.escape(f"{address}: no Dask scheduler answers")) as caught, dask_cluster(address):
        pass
    assert "\n" not in str(caught.value)


def test_nothing_else_is_printed_where_nobody_answers() -> None:
    script = """
        from shared import executors
        from shared.command.errors import ToolError
        executors.CONNECT_TIMEOUT_S = 1
        try:
            with executors.dask_cluster("tcp://127.0.0.1:1"):
                pass
        except ToolError:
            print("told")
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("told\n", "")


def harmful_rules(subject: Subject) -> tuple[str, Rules]:
    """Return int8 for every layer but one in the middle, which gets int4; and that one's scope."""
    scopes = [op.scope for op in read_ops(subject.path) if op.op_type == "CONV_2D"]
    weight_only = dict.fromkeys(scopes, "int8-weight-only")
    return scopes[2], assign({**weight_only, scopes[2]: "weight_only_wi4_afp32"})


def test_the_layer_that_does_most_harm_comes_first(subject: Subject, pool: Executor) -> None:
    scope, rules = harmful_rules(subject)
    layers = measure_layers(read_ops(subject.path), rules, subject, pool)
    assert len(layers) == 5
    assert layers[0].name + ";" == scope
    errors = [layer.output.relative_error or math.inf for layer in layers]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 3 * errors[1]
    assert all(layer.op_type == "CONV_2D" and layer.layer.relative_error for layer in layers)


@pytest.fixture(scope="module")
def plain(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """The same model, its inner tensors called t0, t1, ..."""
    path = tmp_path_factory.mktemp("plain") / "plain.tflite"
    shorten_names(subject.path, path)
    return Subject(path, hashlib.sha256(path.read_bytes()).hexdigest(), subject.samples)


@pytest.mark.parametrize("workers", [1, 2])
def test_layers_of_a_model_with_plain_names_are_ranked(plain: Subject, workers: int) -> None:
    scope, rules = harmful_rules(plain)
    with ThreadPoolExecutor(workers) as executor:
        layers = measure_layers(read_ops(plain.path), rules, plain, executor)
    assert [layer.op_type for layer in layers] == ["CONV_2D"] * 5
    assert layers[0].name + ";" == scope
    errors = [layer.output.relative_error or math.inf for layer in layers]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 2 * errors[1]
    values = {name: entry["value"] for name, entry in json.loads(node_data("m", layers))["m"]["results"].items()}
    assert values == {layer.tensor: layer.output.relative_error for layer in layers}


def test_layers_that_no_rule_quantizes_are_not_measured(plain: Subject) -> None:
    _, rules = harmful_rules(plain)
    skip = {"regex": "^t", "operation": "CONV_2D", "algorithm_key": "no_quantize", "op_config": {}}
    with ThreadPoolExecutor(1) as executor:
        assert measure_layers(read_ops(plain.path), [*rules, skip], plain, executor) == []


def layer_damage(name: str, error: float | None) -> LayerDamage:
    return LayerDamage("CONV_2D", f"{name};2", name, 10, Damage(0.1, 20.0, 1.0), Damage(error, None, None))


def strictly(text: str) -> object:
    def refuse(constant: str) -> None:
        raise ValueError(f"no JSON: {constant}")

    return json.loads(text, parse_constant=refuse)


def test_node_data_is_json_by_output_tensor() -> None:
    content = strictly(node_data("model.tflite", [layer_damage("a", 0.25), layer_damage("b", 0.0)]))
    assert isinstance(content, dict)
    assert content["model.tflite"]["results"] == {"a": {"value": 0.25}, "b": {"value": 0.0}}
    assert [stop["stop"] for stop in content["model.tflite"]["gradient"]] == [0, 0.5, 1]


def test_node_data_is_json_where_a_layer_gives_nan() -> None:
    content = strictly(node_data("model.tflite", [layer_damage("a", None), layer_damage("b", 0.5)]))
    assert isinstance(content, dict)
    results = content["model.tflite"]["results"]
    assert results["a"]["value"] > results["b"]["value"] == 0.5
