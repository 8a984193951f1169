"""What each layer alone does to a model's answers when it is quantized: the layers to leave in float come first."""

import json
import re
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from shared.command.cli import step_progress
from shared.formats.tflite import Op
from shared.metrics.output_error import Damage
from shared.runtime.executors import finished
from tools.quantize_tflite.candidates import Job, Outcome, Subject, measure_candidate
from tools.quantize_tflite.coverage import matching_rules
from tools.quantize_tflite.recipes import NO_QUANTIZE, Rules

WORST_SHOWN = 1000.0  # instead of infinity, which JSON does not know


@dataclass(frozen=True)
class LayerDamage:
    """What quantizing one layer alone does: at its own output `tensor`, and at the worst of the model's outputs."""

    op_type: str
    name: str
    tensor: str
    weight_bytes: int
    layer: Damage
    output: Damage


def measure_layers(ops: Sequence[Op], rules: Rules, subject: Subject, executor: Executor) -> list[LayerDamage]:
    """Return the damage of each layer that the rules quantize, the rest of the model in float; the worst at the output first."""
    jobs = {}
    for op in ops:
        deciding = matching_rules(op, rules)
        if op.size_weights and op.dtype == "FLOAT32" and deciding and rules[deciding[-1]]["algorithm_key"] != NO_QUANTIZE:
            alone = [{**rules[deciding[-1]], "regex": f"^(?:{re.escape(op.scope)})$"}]
            jobs[executor.submit(measure_candidate, Job(subject, alone, tensor=op.output))] = op
    found = []
    with step_progress("measure each layer alone", len(jobs)) as advance:
        for op, outcome in finished(jobs):
            found.append(_layer(op, outcome))
            advance("")
    return sorted(found, key=lambda layer: (-_error(layer.output), layer.name))


def node_data(name: str, layers: Sequence[LayerDamage]) -> str:
    """Return JSON that Model Explorer lays over a model's graph: the relative error at the output, by the op's output tensor.

    Source: https://github.com/google-ai-edge/model-explorer/wiki/2.-User-Guide (custom node data)
    """
    results = {layer.tensor: {"value": min(_error(layer.output), WORST_SHOWN)} for layer in layers}
    gradient = [{"stop": 0, "bgColor": "#e8f5e9"}, {"stop": 0.5, "bgColor": "#fff59d"}, {"stop": 1, "bgColor": "#e57373"}]
    return json.dumps({name: {"results": results, "gradient": gradient}}, indent=1)


def _layer(op: Op, outcome: Outcome) -> LayerDamage:
    assert outcome.tensor is not None
    return LayerDamage(op.op_type, op.name, op.output, op.size_weights, outcome.tensor, max(outcome.outputs, key=_error))


def _error(damage: Damage) -> float:
    return float("inf") if damage.relative_error is None else damage.relative_error
