"""Models run the same samples in turns, as often as fits in the time, and one that fails does not take the others with it."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from shared.formats.model_file import ModelFile
from shared.formats.tensors import TensorSpec
from shared.runtime import benchmark
from shared.runtime.benchmark import BUDGET_S, LARGE_BYTES, LEAST_RUNS, MOST_RUNS, Inputs, ModelRun, Protocol, run_benchmark
from shared.runtime.processes import ChildError
from shared.runtime.samples import sample_inputs

SIZE_BYTES = 10


@pytest.fixture(scope="module", autouse=True)
def few_runs() -> None:
    """Leave the times as they are: how often models run is tested here."""


@dataclass
class Machine:
    """Models that only add up their input, a clock that only they move, and a list of everything that happens.

    Args:
        seconds: That each run takes.
        failing: Model -> the event at which it fails: load, run 0 for the first run, or plain ops.
        shape: Of input and output.
    """

    seconds: float = 0.0
    failing: dict[str, str] = field(default_factory=dict)
    shape: tuple[int, ...] = (1,)
    now: float = 0.0
    events: list[tuple[str, str]] = field(default_factory=list)
    is_open: set[str] = field(default_factory=set)
    most_open: int = 0

    def note(self, name: str, event: str) -> None:
        self.events.append((name, event))
        if self.failing.get(name) == event:
            raise ChildError(f"{name} failed at {event}")

    def runs(self) -> str:
        """Return the names of the models in the order of their timed runs, the first run of each left out."""
        return "".join(name for name, event in self.events if event.startswith("run") and event != "run 0")

    @contextlib.contextmanager
    def open_model(self, source: Any, *, threads: int) -> Iterator[Any]:
        name, count = source.path.stem, iter(range(10**6))
        self.note(name, "load")
        self.is_open.add(name)
        self.most_open = max(self.most_open, len(self.is_open))

        def run(inputs: dict[str, Any]) -> tuple[dict[str, Any], float]:
            number = next(count)
            self.note(name, f"run {number}")
            self.now += self.seconds
            return {"y": inputs["x"] + threads}, 1000.0 if number == 0 else float(number)

        def plain_ops() -> dict[str, int]:
            self.note(name, "plain ops")
            return {"CONV_2D": 2}

        ends = {end: [TensorSpec(name, self.shape, "float32")] for end, name in (("inputs", "x"), ("outputs", "y"))}
        yield SimpleNamespace(run=run, plain_ops=plain_ops, load_ms=5.0, kernels="xnnpack", peak_rss_bytes=77, **ends)
        self.is_open.remove(name)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(benchmark, "open_model", made.open_model)
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(monotonic=lambda: made.now))
    monkeypatch.setattr(benchmark, "available_memory_bytes", lambda: None)
    return made


def sources(names: str) -> list[Any]:
    return [SimpleNamespace(path=Path(f"{name}.tflite"), size_bytes=SIZE_BYTES, kind="tflite") for name in names]


def numbered(count: int) -> list[Inputs]:
    """Return samples of one number each: 0, 10, 20, ..."""

    def sample(value: int) -> Inputs:
        return lambda specs: {specs[0].name: np.full(specs[0].shape, value, np.float32)}

    return [sample(10 * number) for number in range(count)]


def sound(run: ModelRun | ChildError) -> ModelRun:
    assert isinstance(run, ModelRun)
    return run


def values(outputs: list[list[Any]]) -> list[float]:
    return [float(of_sample[0].flat[0]) for of_sample in outputs]


def test_models_run_in_turns_and_the_first_run_of_each_is_not_timed(machine: Machine) -> None:
    done = run_benchmark(sources("abc"), Protocol(numbered(2), 1, runs=3))
    assert (done.interleaved, machine.runs(), machine.most_open) == (True, "abcabcabc", 3)
    for run in map(sound, done.runs):
        assert (run.measurement.runs, run.measurement.median_ms, run.measurement.p90_ms) == (3, 2, pytest.approx(2.8))


@pytest.mark.parametrize(("available", "is_together"), [(None, True), (250, True), (249, False), (0, False)])
def test_models_that_do_not_fit_in_memory_together_run_one_after_the_other(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, available: float | None, is_together: bool
) -> None:
    monkeypatch.setattr(benchmark, "available_memory_bytes", lambda: available)
    monkeypatch.setattr(benchmark, "memory_need_bytes", lambda _: 100)  # both together take 80% of 250
    done = run_benchmark(sources("ab"), Protocol(numbered(1), 1, runs=3))
    assert (done.interleaved, machine.most_open) == (is_together, 1 + is_together)
    assert machine.runs() == ("ababab" if is_together else "aaabbb")
    assert [sound(run).measurement.path.stem for run in done.runs] == ["a", "b"]


@pytest.mark.parametrize(
    ("seconds", "models", "samples", "runs", "expected"),
    [
        (100.0, 1, 1, None, LEAST_RUNS),
        (100.0, 2, 1, None, LEAST_RUNS),
        (100.0, 2, 5, None, 5),
        (0.0, 1, 1, None, MOST_RUNS),
        (0.0, 2, 1, None, MOST_RUNS),
        (BUDGET_S / 16, 1, 1, None, 16),
        (BUDGET_S / 16, 2, 1, None, 16),
        (BUDGET_S / 16, 2, 17, None, 17),
        (0.0, 1, MOST_RUNS + 1, None, MOST_RUNS + 1),
        (100.0, 2, 1, 7, 7),
        (0.0, 2, 1, 1, 1),
        (0.0, 2, 4, 2, 4),
    ],
)
def test_there_are_as_many_runs_as_fit_in_the_time(
    machine: Machine, seconds: float, models: int, samples: int, runs: int | None, expected: int
) -> None:
    """At least three and every sample once, at most 200 for a few samples; the time of each model counts, or a number fixes it."""
    machine.seconds = seconds
    done = run_benchmark(sources("ab"[:models]), Protocol(numbered(samples), 1, runs=runs))
    assert {sound(run).measurement.runs for run in done.runs} == {expected}
    assert {len(sound(run).outputs) for run in done.runs} == {samples}


@pytest.mark.parametrize("event", ["load", "run 0", "run 2", "run 5", "plain ops"])
@pytest.mark.parametrize("failing", ["a", "b"])
def test_a_model_that_fails_drops_out_with_its_error(machine: Machine, failing: str, event: str) -> None:
    """Run 5 is the second of the further samples."""
    machine.failing = {failing: event}
    done = run_benchmark(sources("abc"), Protocol(numbered(2), 1, runs=3, further=numbered(3)))
    by_name = dict(zip("abc", done.runs, strict=True))
    broken = by_name.pop(failing)
    assert isinstance(broken, ChildError)
    assert str(broken) == f"{failing} failed at {event}"
    assert machine.events[-1][0] != failing
    last = [own for name, own in machine.events if name == failing][-1]
    assert last == event, "it is not run any more"
    for run in by_name.values():
        assert (sound(run).measurement.runs, values(sound(run).outputs)) == (3, [1, 11])
        assert values(sound(run).further_outputs) == [1, 11, 21]


def test_all_models_failing_is_no_run_at_all(machine: Machine) -> None:
    machine.failing = {"a": "load", "b": "run 1"}
    done = run_benchmark(sources("ab"), Protocol(numbered(2), 1))
    assert [type(run) for run in done.runs] == [ChildError, ChildError]


def test_a_run_holds_what_was_measured_and_what_the_model_takes(machine: Machine) -> None:
    machine.shape = (1, 16, 24, 3)
    (run,) = map(sound, run_benchmark(sources("a"), Protocol(numbered(1), 4, runs=3)).runs)
    measurement = run.measurement
    assert (measurement.path, measurement.size_bytes, measurement.load_ms) == (Path("a.tflite"), SIZE_BYTES, 5)
    assert (measurement.kernels, measurement.peak_rss_bytes, measurement.plain_ops) == ("xnnpack", 77, {"CONV_2D": 2})
    assert measurement.inputs == ["float32 image of 24x16 pixels"]
    assert (run.output_names, run.input_types, run.makes_images) == (["y"], ("float32",), True)
    assert values(run.outputs) == [4], "the threads that were asked for"


@pytest.mark.parametrize(
    ("shape", "text", "makes_images"),
    [
        ((1, 3, 64, 64), "float32 image of 64 pixels", True),
        ((1, 64, 64, 3), "float32 image of 64 pixels", True),
        ((1, 1, 16, 24), "float32 luma image of 24x16 pixels", True),
        ((1, 8), "float32 (1, 8)", False),
    ],
)
def test_an_image_in_either_layout_is_the_same_input(
    machine: Machine, shape: tuple[int, ...], text: str, makes_images: bool
) -> None:
    machine.shape = shape
    (run,) = map(sound, run_benchmark(sources("a"), Protocol(numbered(1), 1, runs=1)).runs)
    assert (run.measurement.inputs, run.makes_images) == ([text], makes_images)


def test_large_models_are_compared_on_fewer_samples() -> None:
    counts = {(size, is_seeded): benchmark.sample_count(size, is_seeded=is_seeded) for size in (0, LARGE_BYTES, LARGE_BYTES + 1)
              for is_seeded in (False, True)}  # fmt: skip
    assert counts == {
        (0, False): 16,
        (0, True): 8,
        (LARGE_BYTES, False): 16,
        (LARGE_BYTES, True): 8,
        (LARGE_BYTES + 1, False): 3,
        (LARGE_BYTES + 1, True): 2,
    }


@pytest.mark.parametrize("is_together", [True, False])
def test_real_models_answer_in_the_order_of_the_samples(
    float_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_together: bool
) -> None:
    """A file that is cut off is an error among them."""
    if not is_together:
        monkeypatch.setattr(benchmark, "available_memory_bytes", lambda: 2**20)
    cut = tmp_path / "cut.tflite"
    cut.write_bytes(float_model.read_bytes()[:3000])
    samples = [partial(sample_inputs, seed=seed) for seed in (0, 1)]
    protocol = Protocol(samples, threads=1, runs=3, further=samples[::-1])
    done = run_benchmark([ModelFile(float_model), ModelFile(cut), ModelFile(float_model)], protocol)
    one, broken, other = done.runs
    assert done.interleaved is is_together
    assert isinstance(broken, ChildError)
    one, other = sound(one), sound(other)
    assert (one.measurement.runs, len(one.outputs), len(one.further_outputs)) == (3, 2, 2)
    np.testing.assert_array_equal(one.outputs, other.outputs)
    np.testing.assert_array_equal(one.outputs, one.further_outputs[::-1])
    assert (one.outputs[0][0] != one.outputs[1][0]).any()
