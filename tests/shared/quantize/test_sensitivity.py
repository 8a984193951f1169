"""The layer that does most harm alone comes first, and Model Explorer can read it."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from shared.formats.tflite import Op
from shared.metrics.output_error import OutputError
from shared.quantize.ledger import Outcome
from shared.quantize.sensitivity import LayerSensitivity, measure_sensitivity, node_data


class Job:
    """A measurement that is known beforehand."""

    def __init__(self, *errors: float | None) -> None:
        self.errors = [
            OutputError(f"y{number}", error, problem="" if error is not None else "NaN") for number, error in enumerate(errors)
        ]

    def measure(self) -> Outcome:
        return Outcome(1, self.errors, OutputError("inside", 0.01))


LAYERS = [Op("CONV_2D", "a", "FLOAT32", 10, output="a"), Op("ADD", "b;b2", "FLOAT32", 20, output="b"), Op("RELU", "c", output="c")]


@pytest.mark.parametrize("workers", [1, 3])
def test_layers_are_ranked_by_the_worst_of_the_outputs(workers: int) -> None:
    with ThreadPoolExecutor(workers) as executor:
        jobs = {"a": Job(0.1, 0.2), "b;b2": Job(0.3, 0.0)}
        found = measure_sensitivity(LAYERS, jobs, executor)
        equal = measure_sensitivity(LAYERS, {"a": Job(0.1), "b;b2": Job(0.1)}, executor)
        broken = measure_sensitivity(LAYERS, {"a": Job(0.1, None), "b;b2": Job(9.0, 9.0)}, executor)
    inside = OutputError("inside", 0.01)
    assert found == [
        LayerSensitivity("ADD", "b;b2", "b", 20, inside, OutputError("y0", 0.3)),
        LayerSensitivity("CONV_2D", "a", "a", 10, inside, OutputError("y1", 0.2)),
    ]
    assert [layer.name for layer in equal] == ["a", "b;b2"]
    assert [layer.name for layer in broken] == ["a", "b;b2"]  # no number is worse than any


def strictly(text: str) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Return JSON, which knows neither NaN nor infinity."""

    def refuse(constant: str) -> None:
        raise ValueError(f"no JSON: {constant}")

    content: dict[str, dict[str, dict[str, dict[str, float]]]] = json.loads(text, parse_constant=refuse)
    return content


def layer(name: str, error: float | None) -> LayerSensitivity:
    return LayerSensitivity(
        "CONV_2D",
        f"{name};2",
        name,
        10,
        OutputError(name, 0.1),
        OutputError("y", error, problem="" if error is not None else "NaN"),
    )


def test_node_data_is_json_by_output_tensor() -> None:
    content = strictly(node_data("model.tflite", [layer("a", 0.25), layer("b", 0.0)]))
    assert content["model.tflite"]["results"] == {"a": {"value": 0.25}, "b": {"value": 0.0}}
    assert [stop["stop"] for stop in content["model.tflite"]["gradient"]] == [0, 0.5, 1]  # type: ignore[index]


def test_node_data_is_json_where_a_layer_gives_nan() -> None:
    results = strictly(node_data("model.tflite", [layer("a", None), layer("b", 0.5)]))["model.tflite"]["results"]
    assert results["a"]["value"] > results["b"]["value"] == 0.5
