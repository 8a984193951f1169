"""A search finds the smallest model within the limits, every time the same, and leaves no more layers in float than it must."""

import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from shared.command.errors import ToolError
from shared.metrics.output_error import OutputError
from shared.quantize.ledger import Ledger, Outcome
from shared.quantize.request import ALL_OUTPUTS, Limits, Precisions
from shared.quantize.search import Search, SearchResult, SearchSpace, _hull
from tests.shared.quantize.fake_model import FLOAT, FakeModel, Harm, independent

LIMIT = 0.1


def int8(harm: Harm | dict[str, float], **sizes: int) -> FakeModel:
    """Return a model of 100 bytes a layer that is float32 or int8, from the error of each layer alone."""
    errors = {(name, "int8"): error for name, error in harm.items()}
    return FakeModel({str(name): sizes.get(str(name), 100) for name in harm}, independent(errors))


def float_layers(result: SearchResult) -> list[str]:
    return [name for name, precision in result.precisions.items() if precision == FLOAT]


# One precision: which layers stay in float.


def test_nothing_stays_in_float_where_the_whole_model_keeps_the_limit() -> None:
    result = int8({"a": 0.01, "b": 0.02}).search(LIMIT)
    assert (float_layers(result), result.layers, result.measured) == ([], 2, 2)  # float, and the whole model
    assert result.share == pytest.approx(math.sqrt(0.0005) / LIMIT)


def test_the_one_bad_layer_stays_in_float_and_no_other() -> None:
    harm = dict.fromkeys("abdefgh", 0.01) | {"c": 0.5}
    result = int8(harm).search(LIMIT)
    assert float_layers(result) == ["c"]
    assert result.outcome.errors[0].relative_error == pytest.approx(math.sqrt(7) * 0.01)
    assert result.share == pytest.approx(math.sqrt(7) * 0.01 / LIMIT)


def test_of_equal_layers_just_as_many_stay_as_it_takes() -> None:
    result = int8(dict.fromkeys("abcdefgh", 0.0499)).search(LIMIT)  # four of them make just less than 0.1
    assert len(float_layers(result)) == 4


def test_errors_count_for_their_bytes() -> None:
    """Two small layers that do as much as a large one stay in float before it."""
    assert float_layers(int8({"large": 0.09, "one": 0.09, "two": 0.09}, large=10_000).search(LIMIT)) == ["one", "two"]


def test_a_layer_that_the_order_left_in_float_is_quantized_in_the_end() -> None:
    """Alone `first` is worst for its bytes, together with others it is harmless."""
    alone = {"first": 0.5, "second": 0.4, "third": 0.01}

    def error(precisions: Precisions) -> float:
        quantized = [name for name, precision in precisions.items() if precision == "int8"]
        return alone[quantized[0]] if len(quantized) == 1 else 0.5 if "second" in quantized else 0.01 if quantized else 0.0

    assert float_layers(FakeModel(dict.fromkeys(alone, 100), error).search(LIMIT)) == ["second"]


def test_a_layer_that_the_runtime_refuses_stays_in_float() -> None:
    model = int8({"a": 0.01, "b": 0.0, "c": 0.02})
    model.refuses = lambda precisions: precisions["b"] == "int8"
    assert float_layers(model.search(LIMIT)) == ["b"]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_where_no_layer_can_be_quantized_all_stay_in_float(count: int) -> None:
    result = int8({str(number): 1.0 for number in range(count)}).search(LIMIT)
    assert (len(float_layers(result)), result.share) == (count, 0)


def test_a_search_measures_each_layer_alone_and_few_combinations() -> None:
    model = int8({f"{number:02}": 0.001 for number in range(32)} | {"07": 0.5})
    result = model.search(LIMIT)
    assert float_layers(result) == ["07"]
    assert result.measured == len(model.seen) <= 2 + 32 + 2 * 6 + 1  # base and whole, alone, two rounds of the walk, one refinement


# Several precisions.


@pytest.fixture
def mixed() -> FakeModel:
    """Twelve layers of different size and sensitivity, in float16, int8 or int4."""
    rng = np.random.default_rng(3)
    sizes = {f"l{number}": int(rng.integers(100, 1000)) for number in range(12)}
    harm = {(name, p): factor * float(rng.random() + 0.1) for name, (p, factor) in product(sizes, [("int8", 0.01), ("int4", 0.1)])}
    return FakeModel(sizes, independent(harm), ("int8", "int4"), "fp16")


def test_the_result_is_within_the_limit_and_smaller_than_any_whole_precision_within_it(mixed: FakeModel) -> None:
    result = mixed.search(LIMIT)
    whole = {p: mixed.job(dict.fromkeys(mixed.sizes, p), False).measure() for p in ("fp16", "int8", "int4")}
    assert mixed.job(result.precisions, False).measure() == result.outcome
    assert result.share == (result.outcome.errors[0].relative_error or 0) / LIMIT <= 1
    assert whole["int4"].errors[0].relative_error > LIMIT  # type: ignore[operator]
    assert result.outcome.size_bytes < whole["int8"].size_bytes < whole["fp16"].size_bytes
    assert result.precisions.keys() == mixed.sizes.keys()
    assert set(result.precisions.values()) == {"int8", "int4"}
    assert (result.layers, result.resumed, result.left_out) == (12, 0, [])


def test_the_result_is_as_small_as_that_of_all_combinations() -> None:
    rng = np.random.default_rng(5)
    names = "abcde"
    harm = {(name, p): factor * float(rng.random()) for name, (p, factor) in product(names, [("int8", 0.02), ("int4", 0.2)])}
    model = FakeModel(dict.fromkeys(names, 1000), independent(harm), ("int8", "int4"), "fp16")
    every = (dict(zip(names, chosen, strict=True)) for chosen in product(("fp16", "int8", "int4"), repeat=len(names)))
    best = min(model.job(one, False).measure().size_bytes for one in every if model.error(one) <= LIMIT)
    assert model.search(LIMIT).outcome.size_bytes == best


def test_tighter_limits_give_larger_files(mixed: FakeModel, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"  # measurements do not depend on the limit
    results = [mixed.search(limit, ledger=ledger) for limit in (0.001, 0.02, LIMIT, 0.2, 1.0)]
    sizes = [result.outcome.size_bytes for result in results]
    assert sizes == sorted(set(sizes), reverse=True)
    assert all(result.share <= 1 for result in results)


def test_a_search_keeps_the_limits_of_every_output_and_a_least_cosine(mixed: FakeModel) -> None:
    loose = mixed.search(Limits({ALL_OUTPUTS: LIMIT}))
    tight = mixed.search(Limits({ALL_OUTPUTS: LIMIT}, min_cosine=1 - 0.03**2 / 2))
    [error] = tight.outcome.errors
    assert error.cosine is not None and error.cosine >= 1 - 0.03**2 / 2
    assert error.relative_error is not None and error.relative_error <= 0.03
    assert tight.outcome.size_bytes > loose.outcome.size_bytes
    assert mixed.search(Limits({"y": LIMIT})).precisions == loose.precisions


def test_an_impossible_limit_is_an_error_that_names_the_remedy() -> None:
    model = FakeModel({"a": 100}, lambda _: 0.01, base="fp16")
    with pytest.raises(
        ToolError, match=r"even the fp16 model is outside the limits; got y: relative error 1\.000%.*allow a larger error"
    ):
        model.search(0.001)
    model.refuses = lambda _: True
    with pytest.raises(ToolError, match="outside the limits; got it does not run"):
        model.search(0.1)


def test_a_model_without_layers_is_an_error() -> None:
    with pytest.raises(ToolError, match="no layer of this model can be quantized"):
        FakeModel({}, lambda _: 0.0).search(LIMIT)


def test_precisions_that_are_slow_are_left_out(mixed: FakeModel) -> None:
    mixed.speed = {"int4": 1.31}
    result = mixed.search(1.0)
    assert set(result.precisions.values()) == {"int8"}
    assert result.left_out == ["int4: 1.3 times slower than float here"]
    mixed.speed = {"int8": 9.0, "int4": 2.0}
    result = mixed.search(1.0)
    assert set(result.precisions.values()) == {"fp16"}
    assert [text.partition(":")[0] for text in result.left_out] == ["int8", "int4"]


def test_a_precision_that_the_runtime_refuses_is_left_out(mixed: FakeModel) -> None:
    mixed.refuses = lambda precisions: "int4" in precisions.values()
    result = mixed.search(1.0)
    assert set(result.precisions.values()) == {"int8"}
    assert result.left_out == ["int4: the runtime refuses it"]


def test_a_search_for_latency_takes_the_precision_that_is_fast() -> None:
    harm = {("a", "int8"): 0.01, ("b", "int8"): 0.01, ("a", "int4"): 0.01, ("b", "int4"): 0.01}
    model = FakeModel({"a": 100, "b": 100}, independent(harm), ("int8", "int4"), "fp16", {"int8": 0.5, "int4": 1.2})
    assert set(model.search(LIMIT, "latency").precisions.values()) == {"int8"}
    assert set(model.search(LIMIT, "size").precisions.values()) == {"int4"}
    assert model.search(LIMIT, "latency").outcome.slowdown == 0.5


# The same search gives the same result.


def test_another_number_of_workers_finds_the_same_precisions(mixed: FakeModel) -> None:
    one = mixed.search(LIMIT)
    with ThreadPoolExecutor(5) as several:
        assert mixed.search(LIMIT, executor=several) == one


def test_a_finished_search_measures_nothing_again(mixed: FakeModel, tmp_path: Path) -> None:
    first = mixed.search(LIMIT, ledger=tmp_path / "ledger")
    head, *entries = map(json.loads, (tmp_path / "ledger").read_text().splitlines())
    assert head["edgepress"] == "search"
    assert len({entry["key"] for entry in entries}) == len(entries) == first.measured == len(mixed.seen)
    again = mixed.search(LIMIT, ledger=tmp_path / "ledger")
    assert (again.measured, again.resumed, len(mixed.seen)) == (0, first.measured, first.measured)
    assert (again.precisions, again.outcome) == (first.precisions, first.outcome)


@pytest.mark.parametrize("kept", [1, 10, 29])
def test_an_interrupted_search_goes_on_where_it_was(mixed: FakeModel, tmp_path: Path, kept: int) -> None:
    first = mixed.search(LIMIT, ledger=tmp_path / "whole")
    lines = (tmp_path / "whole").read_text().splitlines(keepends=True)
    cut = tmp_path / "cut"
    cut.write_text("".join(lines[: kept + 1]) + lines[kept + 1][: len(lines[kept + 1]) // 2])
    again = mixed.search(LIMIT, ledger=cut)
    assert (again.precisions, again.outcome) == (first.precisions, first.outcome)
    assert (again.resumed, again.measured) == (kept, first.measured - kept)
    assert sorted(cut.read_text().splitlines()) == sorted((tmp_path / "whole").read_text().splitlines())


def test_the_limits_of_several_outputs_are_kept_together(tmp_path: Path) -> None:
    """Each layer moves an output of its own."""

    class Job:
        def __init__(self, precisions: Precisions) -> None:
            self.precisions = precisions

        def measure(self) -> Outcome:
            is_small = {name: precision == "int8" for name, precision in self.precisions.items()}
            return Outcome(200 - 75 * sum(is_small.values()), [OutputError(name, 0.1 * is_small[name]) for name in ("a", "b")])

    kept = Ledger(None, {})
    space = SearchSpace({"a": FLOAT, "b": FLOAT}, {"a": ["int8"], "b": ["int8"]}, FLOAT)
    with ThreadPoolExecutor(1) as alone:
        limits = Limits({"a": 0.2, "b": 0.05})
        result = Search(space, lambda precisions, _: Job(precisions), limits, "size", alone, kept).run()
    assert result.precisions == {"a": "int8", "b": FLOAT}
    assert not list(tmp_path.iterdir())


# The steps of one layer.


def hull(points: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    return list(_hull(points))


def test_steps_go_along_the_lower_hull() -> None:
    assert hull([]) == []
    assert hull([(10.0, 2.0, "a")]) == [(10.0, 2.0, "a")]
    assert hull([(20.0, 6.0, "b"), (10.0, 2.0, "a")]) == [(10.0, 2.0, "a"), (10.0, 4.0, "b")]


def test_points_above_the_hull_are_no_steps() -> None:
    assert hull([(10.0, 5.0, "above"), (20.0, 6.0, "b")]) == [(20.0, 6.0, "b")]
    assert hull([(10.0, 1.0, "a"), (20.0, 9.0, "above"), (30.0, 10.0, "c")]) == [(10.0, 1.0, "a"), (20.0, 9.0, "c")]


def test_a_point_that_saves_nothing_or_harms_more_for_the_same_is_no_step() -> None:
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
