"""The search leaves no more layers in float than the limit takes."""

from collections.abc import Callable, Mapping

import pytest

from shared.formats.onnx_graph import OnnxOp
from shared.metrics.fidelity import Fidelity
from tools.quantize_onnx.search import find_kept

LIMIT = 0.1


def layers(*names: str, **sizes: int) -> list[OnnxOp]:
    return [OnnxOp(name, "Conv", {f"{name}_w": sizes.get(name, 100)}, "FLOAT") for name in names]


def adding_up(damage: Mapping[str, float]) -> Callable[[frozenset[str]], Fidelity]:
    """Return a model whose squared errors add up over the layers that are quantized."""

    def measure(kept: frozenset[str]) -> Fidelity:
        error = sum(value**2 for name, value in damage.items() if name not in kept) ** 0.5
        return Fidelity(None, None, 1 - error**2, error)

    return measure


def keeps(fidelity: Fidelity) -> bool:
    return fidelity.relative_error <= LIMIT


def test_nothing_stays_in_float_where_the_limit_is_kept_anyway() -> None:
    found = find_kept(layers("a", "b"), adding_up({"a": 0.01, "b": 0.02}), keeps)
    assert (found.names, found.measured) == ([], 1)
    assert found.fidelity is not None
    assert keeps(found.fidelity)


def test_the_one_bad_layer_stays_in_float_and_no_other() -> None:
    damage = dict.fromkeys("abdefgh", 0.01) | {"c": 0.5}
    found = find_kept(layers(*"abcdefgh"), adding_up(damage), keeps)
    assert found.names == ["c"]
    assert found.fidelity == adding_up(damage)(frozenset("c"))


def test_of_equal_layers_just_as_many_stay_as_it_takes() -> None:
    damage = dict.fromkeys("abcdefgh", 0.05)  # four of them make 0.1
    found = find_kept(layers(*"abcdefgh"), adding_up(damage), keeps)
    assert found.names is not None
    assert len(found.names) == 4
    assert not any(keeps(adding_up(damage)(frozenset(found.names) - {name})) for name in found.names)


def test_damage_counts_for_its_bytes() -> None:
    """Two small layers that do as much as a large one go back to float before it."""
    damage = {"large": 0.09, "one": 0.09, "two": 0.09}
    found = find_kept(layers("large", "one", "two", large=10_000), adding_up(damage), keeps)
    assert found.names == ["one", "two"]


def test_a_large_layer_that_the_order_took_along_is_quantized_again() -> None:
    """Alone `first` is worst for its bytes, together with others it is harmless."""
    alone = {frozenset({"second", "third"}): 0.5, frozenset({"first", "third"}): 0.4, frozenset({"first", "second"}): 0.01}

    def measure(kept: frozenset[str]) -> Fidelity:
        error = alone.get(kept, 0.01 if "second" in kept else 0.5)
        return Fidelity(None, None, 0.0, error)

    found = find_kept(layers("first", "second", "third"), measure, keeps)
    assert found.names == ["second"]


def test_a_layer_with_which_the_model_does_not_run_stays_in_float() -> None:
    measure = adding_up({"a": 0.01, "b": 0.0, "c": 0.02})
    found = find_kept(layers("a", "b", "c"), lambda kept: measure(kept) if "b" in kept else None, keeps)
    assert found.names == ["b"]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_where_no_layer_can_be_quantized_nothing_is_found(count: int) -> None:
    names = [str(number) for number in range(count)]
    found = find_kept(layers(*names), adding_up(dict.fromkeys(names, 1.0)), keeps)
    assert (found.names, found.fidelity) == (None, None)


def test_a_search_runs_each_layer_alone_and_halves_the_rest() -> None:
    names = [f"{number:02}" for number in range(32)]
    calls: list[frozenset[str]] = []
    measure = adding_up(dict.fromkeys(names, 0.001) | {"07": 0.5})

    def counted(kept: frozenset[str]) -> Fidelity:
        calls.append(kept)
        return measure(kept)

    found = find_kept(layers(*names), counted, keeps)
    assert found.names == ["07"]
    assert found.measured == len(calls) <= 1 + 32 + 5 + 1
