"""What a quantizer did to every op of a model, and why it left the rest."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shared.formats.tflite import Op
from shared.quantize.coverage import OpLeft, OpTypeCoverage
from tools.quantize_tflite.recipes import NO_QUANTIZE, Rules, Selector, operation_of, supports

FLOATS = ("FLOAT32", "FLOAT64")


@dataclass(frozen=True)
class RuleMatches:
    """One rule of a recipe, and what came of it.

    Args:
        regex: What it matches among op scopes.
        operation: The op type it is for, or '*'.
        algorithm: How it quantizes, or 'no_quantize'.
        precision: In short, such as 'int8 weights' or 'int8 weights, int8 activations'.
        matched: Ops it matches and supports.
        decided: Ops whose fate it decided, because no later rule did.
    """

    regex: str
    operation: str
    algorithm: str
    precision: str
    matched: int
    decided: int


def measure_coverage(
    before: Sequence[Op], after: Sequence[Op], rules: Rules, stored: Mapping[str, str] | None = None
) -> tuple[list[OpTypeCoverage], list[OpLeft]]:
    """Compare two models op by op, matched by name: one row per op type, largest weights first, and each op that was left.

    Args:
        before: Ops of the repaired model.
        after: Ops of the product.
        rules: What was asked for.
        stored: Scope -> type of the weights in the file that was given; the same type again is no quantization.
    """
    now = {op.scope: op for op in after}
    stored = stored or {}
    rows, left = [], []
    for op_type in dict.fromkeys(op.op_type for op in before):
        of_type = [op for op in before if op.op_type == op_type]
        integer = [op for op in of_type if not op.size_weights and op.scope in now and _became_integer(op, now[op.scope])]
        ops = of_type if integer else [op for op in of_type if op.size_weights]
        smaller = [
            op
            for op in ops
            if op.scope in now
            and now[op.scope].size_weights < op.size_weights
            and now[op.scope].dtype != stored.get(op.scope, op.dtype)
        ]
        done = {op.scope for op in (*integer, *smaller)}
        kept = [op for op in ops if op.scope not in done]
        why = {
            op.scope: f"weights were {now[op.scope].dtype} already"
            if op.scope in now and now[op.scope].size_weights < op.size_weights
            else _why_left(op, rules)
            for op in kept
        }
        left += [OpLeft(op.op_type, op.name, op.size_weights, why[op.scope]) for op in kept if op.size_weights]
        if not ops:
            continue
        rows.append(
            OpTypeCoverage(
                op_type=op_type,
                ops=len(ops),
                quantized=len(done),
                weight_bytes=sum(op.size_weights for op in ops),
                quantized_weight_bytes=sum(op.size_weights for op in smaller),
                bytes_after=sum(now.get(op.scope, op).size_weights for op in ops),
                dtypes=sorted({now.get(op.scope, op).dtype for op in ops} - {""}),
                reason="; ".join(f"{count} x {reason}" for reason, count in Counter(why.values()).most_common()),
            )
        )
    return sorted(rows, key=lambda row: -row.weight_bytes), sorted(left, key=lambda op: -op.weight_bytes)


def _became_integer(before: Op, after: Op) -> bool:
    return before.output_dtype in FLOATS and after.output_dtype.startswith("INT")


def matching_rules(op: Op, rules: Rules) -> list[int]:
    """Return the places of the rules that match an op and support it; the last one decides."""
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
    matching = [matching_rules(op, rules) for op in ops]
    matched = Counter(number for numbers in matching for number in numbers)
    decided = Counter(numbers[-1] for numbers in matching if numbers)
    return [
        RuleMatches(rule["regex"], rule["operation"], rule["algorithm_key"], _precision(rule), matched[number], decided[number])
        for number, rule in enumerate(rules)
    ]


def unmatched(ops: Sequence[Op], selectors: Sequence[Selector]) -> list[str]:
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


def _why_left(op: Op, rules: Rules) -> str:
    """Return why the quantizer left an op as it was."""
    if op.dtype and op.dtype not in FLOATS:
        return f"weights are {op.dtype}, quantized already"
    operation = operation_of(op.op_type)
    if operation is None:
        return "AI Edge Quantizer does not know this op"
    matching = [rule for rule in rules if rule["operation"] in ("*", operation) and re.search(rule["regex"], op.scope)]
    if not matching:
        return "no rule matches"
    if matching[-1]["algorithm_key"] == NO_QUANTIZE:
        return "excluded by a rule"
    supporting = [rule for rule in matching if supports(rule, operation)]
    if not supporting:
        return "no rule supports this op type"
    is_small = supporting[-1].get("op_config", {}).get("min_weight_elements", 0) > 0
    return "fewer weights than the rule asks for" if is_small else "skipped by the quantizer"
