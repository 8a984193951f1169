"""What AI Edge Quantizer did to every op of a model, rule by rule, and why it skipped the rest."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from shared.formats.tflite import Op
from shared.quantize.coverage import LayerState, RuleMatches
from tools.quantize_tflite.recipes import NO_QUANTIZE, NONE, Rules, Selector, operation_of, resolve_recipe, supports

FLOATS = ("FLOAT32", "FLOAT64")
COUNTED_WEIGHTS = 0.999  # the layers that hold this share of all weights are searched; the others stay in float16


def layer_states(before: Sequence[Op], after: Sequence[Op], given: Sequence[Op]) -> list[LayerState]:
    """Compare a model's ops with the product's, by name.

    Args:
        before: Ops of the repaired model.
        after: Ops of the product.
        given: Ops of the model as it came; the same type of weights again is no quantization.
    """
    now = {op.name: op for op in after}
    stored = {op.name: op.dtype for op in given}
    firsts = {op.buffer: op.name for op in reversed(before)}
    states = [_state(op, now.get(op.name), stored.get(op.name, op.dtype)) for op in before]
    return [
        replace(state, is_shared=op.buffer > 0 and firsts[op.buffer] != op.name) for op, state in zip(before, states, strict=True)
    ]


def _state(op: Op, now: Op | None, stored: str) -> LayerState:
    if now is None:
        return LayerState(op, op.dtype, op.weight_bytes, has_smaller_weights=False)
    is_smaller = now.weight_bytes < op.weight_bytes and now.dtype != stored
    is_integer = not op.weight_bytes and _became_integer(op, now)
    return LayerState(op, now.dtype, now.weight_bytes, is_smaller, is_integer)


def _became_integer(before: Op, after: Op) -> bool:
    return before.output_dtype in FLOATS and after.output_dtype.startswith("INT")


def deciding_rule(op: Op, rules: Rules) -> dict[str, Any] | None:
    """Return the rule that decides an op's precision: the last that matches and supports it; None without any."""
    places = _matching(op, rules)
    return rules[places[-1]] if places else None


def _matching(op: Op, rules: Rules) -> list[int]:
    """Return the places of the rules that match an op and support it."""
    operation = operation_of(op.op_type)
    return [
        number
        for number, rule in enumerate(rules)
        if operation is not None
        and rule["operation"] in ("*", operation)
        and re.search(rule["regex"], op.scope)
        and supports(rule, operation)
    ]


def count_matches(ops: Sequence[Op], rules: Rules) -> list[RuleMatches]:
    """Return for each rule how many ops it matches, and how many it decides."""
    matching = [_matching(op, rules) for op in ops]
    matched = Counter(number for numbers in matching for number in numbers)
    decided = Counter(numbers[-1] for numbers in matching if numbers)
    return [
        RuleMatches(rule["regex"], rule["operation"], rule["algorithm_key"], _precision(rule), matched[number], decided[number])
        for number, rule in enumerate(rules)
    ]


def unmatched_selectors(ops: Sequence[Op], selectors: Sequence[Selector]) -> list[str]:
    """Return the selectors that select no op, as the user wrote them."""
    ends = ("INPUT", "OUTPUT")
    return [
        selector.text
        for selector in selectors
        if selector.operation not in ends and not any(selector.applies(operation_of(op.op_type), op.scope) for op in ops)
    ]


def _precision(rule: dict[str, object]) -> str:
    config = rule.get("op_config")
    if rule["algorithm_key"] == NO_QUANTIZE or not isinstance(config, dict):
        return "left as it is"
    parts = []
    for key, what in (("weight_tensor_config", "weights"), ("activation_tensor_config", "activations")):
        if key in config:
            kind = "float" if config[key].get("dtype") == "FLOAT" else "int"
            parts.append(f"{kind}{config[key].get('num_bits')} {what}")
    dynamic = config.get("compute_precision") == "INTEGER" and "activation_tensor_config" not in config
    return ", ".join([*parts, *(["activations quantized at run time"] if dynamic else [])])


def why_skipped(state: LayerState, rules: Rules) -> str:
    """Return why the quantizer left an op as it was."""
    op = state.layer
    assert isinstance(op, Op)
    if state.weight_bytes < op.weight_bytes:
        return f"weights were {state.dtype} already"
    if op.dtype and op.dtype not in FLOATS:
        return f"weights are {op.dtype}, quantized already"
    operation = operation_of(op.op_type)
    if operation is None:
        return "AI Edge Quantizer does not know this op"
    matching = [rule for rule in rules if rule["operation"] in ("*", operation) and re.search(rule["regex"], op.scope)]
    if not matching or matching[-1]["algorithm_key"] == NO_QUANTIZE:
        return "excluded by a rule" if matching else "no rule matches"
    supporting = [rule for rule in matching if supports(rule, operation)]
    if not supporting:
        return "no rule supports this op type"
    is_small = supporting[-1].get("op_config", {}).get("min_weight_elements", 0) > 0
    return "fewer weights than the rule asks for" if is_small else "skipped by the quantizer"


def supported_recipes(op: Op, recipes: Sequence[str]) -> list[str]:
    """Return the recipes among those given that do something to an op."""
    operation = operation_of(op.op_type)
    if operation is None or op.dtype != "FLOAT32":
        return []
    return [recipe for recipe in recipes if recipe != NONE and any(supports(rule, operation) for rule in resolve_recipe(recipe)[1])]


def heavy_layers(ops: Sequence[Op]) -> list[Op]:
    """Return the layers that together hold nearly all weights, in the order of the graph."""
    total, reached, kept = sum(op.weight_bytes for op in ops), 0, set()
    for op in sorted(ops, key=lambda op: (-op.weight_bytes, op.scope)):
        if reached >= COUNTED_WEIGHTS * total:
            break
        kept.add(op.name)
        reached += op.weight_bytes
    return [op for op in ops if op.name in kept]
