"""What each layer alone does to a model's outputs when it is quantized: the layers to leave in float come first."""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from rich.table import Column, Table

from shared.command.cli import step_progress
from shared.command.resources import size_text
from shared.metrics.output_error import OutputError, size_of, worst_error
from shared.quantize.coverage import SHOWN, Layer, number_text, short_name
from shared.quantize.ledger import Job, Outcome
from shared.runtime.executors import finished

WORST_SHOWN = 1000.0  # instead of infinity, which JSON does not know


@dataclass(frozen=True)
class LayerSensitivity:
    """What quantizing one layer alone does.

    Args:
        op_type: Type of the op.
        name: Name of the layer.
        tensor: Name of its output.
        weight_bytes: Bytes of its weights.
        at_layer: Error of that output.
        at_output: Error of the model's output that is furthest off.
    """

    op_type: str
    name: str
    tensor: str
    weight_bytes: int
    at_layer: OutputError
    at_output: OutputError


def measure_sensitivity(layers: Sequence[Layer], jobs: Mapping[str, Job], executor: Executor) -> list[LayerSensitivity]:
    """Return the sensitivity of each layer, the worst at the model's outputs first.

    Args:
        layers: Of the model.
        jobs: Layer name -> measurement of the model with that layer alone quantized; other layers are left out.
        executor: Where they are measured.
    """
    submitted = {executor.submit(_measure, jobs[layer.name]): layer for layer in layers if layer.name in jobs}
    found = []
    with step_progress("measure each layer alone", len(submitted)) as advance:
        for layer, outcome in finished(submitted):
            assert outcome.tensor is not None
            worst = worst_error(outcome.errors)
            found.append(LayerSensitivity(layer.op_type, layer.name, layer.output, layer.weight_bytes, outcome.tensor, worst))
            advance("")
    return sorted(found, key=lambda layer: (-size_of(layer.at_output), layer.name))


def _measure(job: Job) -> Outcome:
    return job.measure()


def sensitivity_table(layers: Sequence[LayerSensitivity]) -> Table:
    """Return the layers that do most to the outputs."""
    headers = ("op type", "weights", "error at the layer", "SNR", "error at the output", "cosine")
    table = Table(Column("layer, worst first", overflow="fold"), *headers, title="what each layer does alone")
    for layer in layers[:SHOWN]:
        table.add_row(*layer_cells(layer))
    return table


def layer_cells(layer: LayerSensitivity) -> Iterator[str]:
    """Yield the cells of a layer's row."""
    yield short_name(layer.name)
    yield layer.op_type
    yield size_text(layer.weight_bytes)
    yield number_text(layer.at_layer.relative_error, ".2%")
    yield number_text(layer.at_layer.snr_db, ".1f", " dB")
    yield number_text(layer.at_output.relative_error, ".3%")
    yield number_text(layer.at_output.cosine, ".6f")


def node_data(name: str, layers: Sequence[LayerSensitivity]) -> str:
    """Return JSON that Model Explorer lays over a model's graph: the relative error at the output, by the op's output tensor.

    Source: https://github.com/google-ai-edge/model-explorer/wiki/2.-User-Guide (custom node data)
    """
    results = {layer.tensor: {"value": min(size_of(layer.at_output), WORST_SHOWN)} for layer in layers}
    gradient = [{"stop": 0, "bgColor": "#e8f5e9"}, {"stop": 0.5, "bgColor": "#fff59d"}, {"stop": 1, "bgColor": "#e57373"}]
    return json.dumps({name: {"results": results, "gradient": gradient}}, indent=1)
