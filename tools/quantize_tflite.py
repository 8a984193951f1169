"""Quantize a TFLite model with an AI Edge Quantizer recipe, and say what became of every layer.

Example:
    python -m tools.quantize_tflite model.tflite -o model_int8.tflite --recipe int8

Source: recipes and their names, https://github.com/google-ai-edge/ai-edge-quantizer (0.10)
"""

import difflib
import inspect
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table

from shared import artifacts
from shared.artifacts import Plan, Product
from shared.child import Child, ChildError
from shared.cli import Overwrite, Refresh, run, size_text, step
from shared.errors import ToolError
from shared.machine import MIB, require_disk, require_memory
from shared.runtime import ModelSource, open_model
from shared.tflite import OpWeights, check_is_tflite, copy_appended_zip, read_op_weights

PACKAGES = ("ai-edge-quantizer", "ai-edge-litert", "numpy")
# Measured at 33.4 M and 773.7 M parameters: libraries, and the weights already quantized.
BASE_MEMORY = 300 * MIB
MEMORY_PER_BYTE = 0.3
QUANTIZE_TIMEOUT_S = 3600.0
RULE_KEYS = {"regex": str, "operation": str, "algorithm_key": str, "op_config": dict}
FLOATS = ("FLOAT32", "FLOAT64")

FP16_RECIPE = "weight_only_wfp16_afp32"  # ours: the library has the algorithm, but no recipe of that kind
INT4_RECIPE = "dynamic_wi4_afp32_over_wi8"  # ours: int4 where it is supported, int8 elsewhere
STATIC = ("int8-static", "int16x8")  # known by name, refused until there are calibration sets
ALIASES = {
    "fp16": FP16_RECIPE,
    "int8": "dynamic_wi8_afp32",
    "int8-weight-only": "weight_only_wi8_afp32",
    "int4": INT4_RECIPE,
    "int8-static": "static_wi8_ai8",
    "int16x8": "static_wi8_ai16",
}

RECIPE_HELP = f"Recipe: {', '.join(name for name in ALIASES if name not in STATIC)}, a name of AI Edge Quantizer, or a .json file."

Rules = list[dict[str, Any]]


@dataclass(frozen=True)
class OpTypeCoverage:
    """What became of the weights of one op type.

    Args:
        op_type: Builtin operator, such as CONV_2D.
        ops: Ops of this type that have constant operands.
        quantized: How many of them have smaller weights now.
        weight_bytes: Bytes of their weights before; of each op, its largest constant.
        quantized_weight_bytes: How many of these bytes belong to quantized ops.
        bytes_after: Bytes of the weights now.
        dtypes: Types of the weights now.
        reason: Why the rest stayed as it was; empty where nothing did.
    """

    op_type: str
    ops: int
    quantized: int
    weight_bytes: int
    quantized_weight_bytes: int
    bytes_after: int
    dtypes: list[str]
    reason: str


@dataclass(frozen=True)
class Coverage:
    """Recipe and coverage of a quantized model."""

    recipe: str
    expansion: str
    op_types: list[OpTypeCoverage]
    size_before_bytes: int
    peak_rss_bytes: int


@dataclass(frozen=True)
class QuantizedModel:
    """Result of quantize_tflite."""

    source: Path
    product: Product
    coverage: Coverage
    message: str

    def __rich__(self) -> RenderableType:
        table = Table(
            "op type", "quantized", "weights before", "after", "now", "why not all", title=f"{self.source} -> {self.product.path}"
        )
        for row in self.coverage.op_types:
            counts = f"{row.quantized} of {row.ops}"
            table.add_row(
                row.op_type, counts, size_text(row.weight_bytes), size_text(row.bytes_after), ", ".join(row.dtypes), row.reason
            )
        return Lines(table, self.message)


def recipe_names() -> list[str]:
    """Return the recipe names of AI Edge Quantizer and our own; aliases not included."""
    from ai_edge_quantizer import recipe

    published = [name for name, _ in inspect.getmembers(recipe, inspect.isfunction) if re.match(r"dynamic|weight|static", name)]
    return sorted([*published, FP16_RECIPE, INT4_RECIPE])


def resolve_recipe(recipe: str) -> tuple[str, Rules]:
    """Return the full name and the rules of an alias, a recipe name, or a JSON file in AI Edge Quantizer's schema.

    Raises:
        ToolError: Unknown name (with the near miss), or a file with a wrong rule.
    """
    from ai_edge_quantizer import recipe as published

    if recipe.endswith(".json"):
        return recipe, _read_rules(Path(recipe))
    name = ALIASES.get(recipe, recipe)
    names = recipe_names()
    if name not in names:
        known = [*ALIASES, *names]
        near = difflib.get_close_matches(recipe.lower(), known, n=1, cutoff=0.4)
        remedy = f"did you mean {near[0]}?" if near else "name one of them or a .json file"
        raise ToolError(f"unknown recipe '{recipe}'", expected="one of " + ", ".join(known), remedy=remedy)
    if name == FP16_RECIPE:
        weights = {"num_bits": 16, "symmetric": True, "granularity": "TENSORWISE", "dtype": "FLOAT"}
        config = {"weight_tensor_config": weights, "compute_precision": "FLOAT", "explicit_dequantize": True}
        return name, [{"regex": ".*", "operation": "*", "algorithm_key": "float_casting", "op_config": config}]
    if name == INT4_RECIPE:
        # The library lets the last rule win that supports the op. Two rules need two regexes, hence the '^'.
        return name, [*published.dynamic_wi8_afp32(), {**published.dynamic_wi4_afp32()[0], "regex": "^.*"}]
    rules: Rules = getattr(published, name)()
    return name, rules


def _read_rules(path: Path) -> Rules:
    if not path.is_file():
        raise ToolError("no such recipe file", where=path)
    try:
        rules = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ToolError("the recipe is not valid JSON", where=path, got=error) from None
    if not isinstance(rules, list) or not rules:
        raise ToolError(
            "the recipe is no list of rules", where=path, got=type(rules).__name__, remedy="see AI Edge Quantizer's recipes"
        )
    whole_scopes = set()
    for number, rule in enumerate(rules, start=1):
        needed = RULE_KEYS.keys() - (
            {"op_config"} if isinstance(rule, dict) and rule.get("algorithm_key") == "no_quantize" else set()
        )
        missing = sorted(needed - rule.keys()) if isinstance(rule, dict) else sorted(needed)
        if missing:
            raise ToolError(f"rule {number} lacks {', '.join(missing)}", where=path)
        wrong = [key for key, kind in RULE_KEYS.items() if key in rule and not isinstance(rule[key], kind)]
        if wrong:
            raise ToolError(f"rule {number}: wrong type of {', '.join(wrong)}", where=path)
        try:
            re.compile(rule["regex"])
        except (re.error, RecursionError) as error:
            raise ToolError(f"rule {number}: bad regex {rule['regex']!r}: {error}", where=path) from None
        if rule["operation"] == "*" and rule["regex"] in whole_scopes:
            remedy = "write the same regex differently, e.g. with '^' before it"
            raise ToolError(
                f"rule {number} would delete an earlier '*' rule with the regex {rule['regex']!r}", where=path, remedy=remedy
            )
        whole_scopes |= {rule["regex"]} if rule["operation"] == "*" else set()
    return rules


def _quantize(source: Path, draft: Path, recipe: str, rules: Rules) -> int:
    """Write the quantized model to `draft`; return the peak memory it took, in bytes."""
    message = {"source": str(source), "draft": str(draft), "recipe": recipe, "rules": rules}
    try:
        with Child("shared.quantizer", QUANTIZE_TIMEOUT_S) as child:
            child.ask(message)
            return child.peak_rss_bytes
    except ChildError as error:
        raise ToolError(f"AI Edge Quantizer failed with recipe {recipe}", where=source, got=error) from None


def measure_coverage(before: list[OpWeights], after: list[OpWeights], rules: Rules) -> list[OpTypeCoverage]:
    """Compare the weights of two models op by op, matched by name; one row per op type, largest weights first."""
    now = {op.name: op for op in after}
    rows = []
    for op_type in dict.fromkeys(op.op_type for op in before):
        ops = [op for op in before if op.op_type == op_type]
        smaller = [op for op in ops if op.name in now and now[op.name].size_weights < op.size_weights]
        left = [op for op in ops if op not in smaller]
        reasons = Counter(_why_left(op, rules) for op in left)
        rows.append(
            OpTypeCoverage(
                op_type=op_type,
                ops=len(ops),
                quantized=len(smaller),
                weight_bytes=sum(op.size_weights for op in ops),
                quantized_weight_bytes=sum(op.size_weights for op in smaller),
                bytes_after=sum(now.get(op.name, op).size_weights for op in ops),
                dtypes=sorted({now.get(op.name, op).dtype for op in ops}),
                reason="; ".join(f"{count} x {reason}" for reason, count in reasons.most_common()),
            )
        )
    return sorted(rows, key=lambda row: -row.weight_bytes)


def _why_left(op: OpWeights, rules: Rules) -> str:
    """Return why the quantizer left an op as it was."""
    if op.dtype not in FLOATS:
        return f"weights are {op.dtype}, " + ("which the quantizer skips" if op.dtype == "FLOAT16" else "quantized already")
    if op.code_is_old:
        return "op code in the schema's old field, which the quantizer does not read"
    matching = [rule for rule in rules if rule["operation"] in ("*", op.op_type) and re.search(rule["regex"], op.name + ";")]
    if not matching:
        return "no rule matches"
    if matching[-1]["algorithm_key"] == "no_quantize":
        return "excluded by a rule"
    supporting = [rule for rule in matching if _supports(rule, op.op_type)]
    if not supporting:
        return "no rule supports this op type"
    is_small = supporting[-1].get("op_config", {}).get("min_weight_elements", 0) > 0
    return "fewer weights than the rule asks for" if is_small else "skipped by the quantizer"


def _supports(rule: dict[str, Any], op_type: str) -> bool:
    """Whether the quantizer's policy knows the rule's configuration for an op type."""
    from ai_edge_quantizer import algorithm_manager, qtyping

    try:
        config = qtyping.OpQuantizationConfig.from_dict(rule["op_config"])
        operation = qtyping.TFLOperationName(op_type)
        algorithm_manager.check_op_quantization_config(rule["algorithm_key"], operation, config)
    except (ValueError, KeyError, TypeError):
        return False
    return True


def quantize_tflite(
    model: Annotated[Path, typer.Argument(help="Float .tflite model.")],
    *,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; default: <model>_<recipe>.tflite.")] = None,
    recipe: Annotated[str, typer.Option(help=RECIPE_HELP)] = "int8",
    overwrite: Overwrite = False,
    refresh: Refresh = False,
) -> QuantizedModel:
    """Quantize a TFLite model with an AI Edge Quantizer recipe, and say what became of every layer.

    Inputs and outputs stay float32. The appended metadata is kept.

    Raises:
        ToolError: No TFLite model, unknown or unfit recipe, no op that the recipe changes, or no place to write.
    """
    check_is_tflite(model)
    expansion, rules = resolve_recipe(recipe)
    output = output or model.with_name(f"{model.stem}_{Path(recipe).stem}.tflite")
    size = model.stat().st_size

    def make(draft: Path) -> Coverage:
        require_memory(BASE_MEMORY + int(size * MEMORY_PER_BYTE), "quantize this model")
        require_disk(size, draft.parent, "write the quantized model")
        before = read_op_weights(model)
        with step(f"quantize {model.name} with {expansion}"):
            peak = _quantize(model, draft, recipe, rules)
        rows = measure_coverage(before, read_op_weights(draft), rules)
        if not any(row.quantized for row in rows):
            reasons = "; ".join(sorted({f"{row.op_type} {row.reason}" for row in rows})) or "it has no constant operands"
            raise ToolError(
                f"recipe {recipe} changes no op of this model", where=model, got=reasons, remedy="choose another recipe"
            )
        copy_appended_zip(model, draft)
        _require_loads(draft)
        return Coverage(recipe, expansion, rows, size, peak)

    arguments = {"recipe": expansion, "rules": rules}
    plan = Plan(output, "quantize_tflite", arguments, [model], PACKAGES, overwrite=overwrite, refresh=refresh)
    product, coverage = artifacts.build(plan, Coverage, make)
    reduction = 1 - product.size_bytes / coverage.size_before_bytes
    change = f"{size_text(coverage.size_before_bytes)} -> {size_text(product.size_bytes)}, {reduction:.1%} smaller"
    head = "up to date: " if product.up_to_date else ""
    message = f"{head}{coverage.recipe} = {coverage.expansion}: {change}; {product.seconds:.1f} s"
    return QuantizedModel(model, product, coverage, message)


def _require_loads(draft: Path) -> None:
    """Raise ToolError unless the runtime accepts the file; reference kernels, so that nothing is packed."""
    try:
        with open_model(ModelSource(draft), kernels="reference"):
            pass
    except ChildError as error:
        raise ToolError("the quantized model does not load; nothing was kept", got=error, remedy="choose another recipe") from None


if __name__ == "__main__":
    run(quantize_tflite)
