"""Recipes: names and files in AI Edge Quantizer's schema, and how a user's choices become one list of rules.

Source: https://github.com/google-ai-edge/ai-edge-quantizer/blob/v0.10.0/ai_edge_quantizer/recipe.py (names) and
    recipe_manager.py (of the rules that match an op and support it, the last one holds; an op's scope is the names of its outputs)
"""

import difflib
import functools
import inspect
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.command.errors import ToolError, first_line
from shared.files.file_type import read_head
from shared.formats.tflite import enum_names

AGAIN = "correct it; the _recipe.json beside each product shows the form"
RULE_KEYS = {"regex": str, "operation": str, "algorithm_key": str, "op_config": dict}
NO_QUANTIZE = "no_quantize"
NONE = "none"  # leaves a model as it is
FP16_RECIPE = "weight_only_wfp16_afp32"  # ours: the library has the algorithm, but no recipe of that kind
INT4_RECIPE = "dynamic_wi4_afp32_over_wi8"  # ours: int4 where it is supported, int8 elsewhere
ALIASES = {
    "fp16": FP16_RECIPE,
    "int8": "dynamic_wi8_afp32",
    "int8-weight-only": "weight_only_wi8_afp32",
    "int8-static": "static_wi8_ai8",
    "int16x8": "static_wi8_ai16",
    "int4": INT4_RECIPE,
}
INPUT_OUTPUT = ("INPUT", "OUTPUT")  # the library's names for a model's ends

Rules = list[dict[str, Any]]


@dataclass(frozen=True)
class Selector:
    """Which ops a choice is about.

    Args:
        text: As the user wrote it.
        regex: Matches an op's scope: the names of its outputs, each followed by ';'.
        operation: The library's name of an op type, or '*'.
    """

    text: str
    regex: str
    operation: str

    def applies(self, operation: str | None, scope: str) -> bool:
        """Whether it selects an op of that operation and scope."""
        return self.operation in ("*", operation) and re.search(self.regex, scope) is not None


def recipe_names() -> list[str]:
    """Return the recipe names of AI Edge Quantizer and our own; aliases not included."""
    from ai_edge_quantizer import recipe

    published = [name for name, _ in inspect.getmembers(recipe, inspect.isfunction) if re.match(r"dynamic|weight|static", name)]
    return sorted([*published, FP16_RECIPE, INT4_RECIPE, NONE])


def resolve_recipe(recipe: str) -> tuple[str, Rules]:
    """Return the full name and the rules of an alias, a recipe name, or a JSON file in AI Edge Quantizer's schema.

    Raises:
        ToolError: Unknown name (with the near miss), or a file with a wrong rule.
    """
    from ai_edge_quantizer import recipe as published

    if recipe.endswith(".json"):
        return recipe, check_rules(read_recipe_file(Path(recipe)), Path(recipe))
    name = ALIASES.get(recipe, recipe)
    names = recipe_names()
    if name not in names:
        known = [*ALIASES, *names]
        near = difflib.get_close_matches(recipe.lower(), [name for name in known if name != NONE], n=1, cutoff=0.4)
        remedy = f"did you mean {near[0]}?" if near else "name one of them or a .json file"
        raise ToolError(f"unknown recipe '{recipe}'", expected="one of " + ", ".join(known), remedy=remedy)
    if name == NONE:
        return name, []
    if name == FP16_RECIPE:
        weights = {"num_bits": 16, "symmetric": True, "granularity": "TENSORWISE", "dtype": "FLOAT"}
        config = {"weight_tensor_config": weights, "compute_precision": "FLOAT", "explicit_dequantize": True}
        return name, [{"regex": ".*", "operation": "*", "algorithm_key": "float_casting", "op_config": config}]
    if name == INT4_RECIPE:
        return name, concatenate([*_plain(published.dynamic_wi8_afp32()), *_plain(published.dynamic_wi4_afp32())])
    return name, _plain(getattr(published, name)())


def _plain(rules: Rules) -> Rules:
    """Return rules as a recipe file holds them: the library's enumerations are texts, but don't print as such."""
    plain: Rules = json.loads(json.dumps(rules))
    return plain


def read_recipe_file(path: Path) -> Any:
    """Return the content of a JSON recipe: a list of rules, or for a bundle an object of such lists by inner model.

    Raises:
        ToolError: No such file, or no JSON.
    """
    read_head(path, "recipe", limit="text-mb", again=AGAIN)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ToolError("the recipe is not valid JSON", where=path, got=first_line(error), remedy=AGAIN) from None


def check_rules(rules: Any, path: Path) -> Rules:
    """Return rules from a file, or raise ToolError naming the first wrong one."""
    if not isinstance(rules, list) or not rules:
        kind = "an object; a recipe by inner model is for bundles" if isinstance(rules, dict) else type(rules).__name__
        raise ToolError("the recipe is no list of rules", where=path, got=kind, remedy="see AI Edge Quantizer's recipes")
    whole_scopes = set()
    for number, rule in enumerate(rules, start=1):
        needed = RULE_KEYS.keys() - (
            {"op_config"} if isinstance(rule, dict) and rule.get("algorithm_key") == NO_QUANTIZE else set()
        )
        missing = sorted(needed - rule.keys()) if isinstance(rule, dict) else sorted(needed)
        if missing:
            raise ToolError(f"rule {number} lacks {', '.join(missing)}", where=path, remedy=AGAIN)
        wrong = [key for key, kind in RULE_KEYS.items() if key in rule and not isinstance(rule[key], kind)]
        if wrong:
            raise ToolError(f"rule {number}: wrong type of {', '.join(wrong)}", where=path, remedy=AGAIN)
        try:
            re.compile(rule["regex"])
        except (re.error, RecursionError) as error:
            raise ToolError(f"rule {number}: bad regex {rule['regex']!r}: {error}", where=path, remedy=AGAIN) from None
        if rule["operation"] == "*" and rule["regex"] in whole_scopes:
            remedy = "write the same regex differently, e.g. with '^' before it"
            raise ToolError(
                f"rule {number} would delete an earlier '*' rule with the regex {rule['regex']!r}", where=path, remedy=remedy
            )
        whole_scopes |= {rule["regex"]} if rule["operation"] == "*" else set()
    return rules


def concatenate(rules: Iterable[dict[str, Any]]) -> Rules:
    """Return rules of which a later one overrides an earlier one op by op.

    The library keeps rules by regex, and a '*' rule deletes earlier ones of the same regex: so each gets a regex of its own.
    """
    taken: set[str] = set()
    apart = []
    for rule in rules:
        regex = rule["regex"]
        while regex in taken:
            regex = f"(?:{regex})"
        taken.add(regex)
        apart.append({**rule, "regex": regex})
    return apart


def operation_of(op_type: str) -> str | None:
    """Return the library's name for a builtin operator of the schema, or None where it knows none."""
    return _operations().get(op_type)


@functools.cache
def _operations() -> dict[str, str]:
    """Return operator of the schema -> operation of the library."""
    from ai_edge_quantizer.utils.tfl_flatbuffer_utils import TFL_OP_CODE_TO_NAME

    names = enum_names("BuiltinOperator")
    return {names[code]: name.value for code, name in TFL_OP_CODE_TO_NAME.items()}


def parse_selector(text: str) -> Selector:
    """Return the selector for an op type such as CONV_2D, or else for a regex that op names match.

    Raises:
        ToolError: An op type the quantizer does not know, or a bad regex.
    """
    if text in enum_names("BuiltinOperator").values():
        operation = operation_of(text)
        if operation is None:
            raise ToolError(f"AI Edge Quantizer never quantizes {text}", where=text, remedy="select other ops")
        return Selector(text, ".*", operation)
    if text in INPUT_OUTPUT or text in _operations().values():
        return Selector(text, ".*", text)
    try:
        re.compile(text)
    except (re.error, RecursionError) as error:
        raise ToolError(f"bad regex: {error}", where=text, remedy="escape its special characters with a backslash") from None
    return Selector(text, text, "*")


def build_rules(
    base: Rules, only: Sequence[Selector], rules: Sequence[tuple[Selector, str, Rules]], exclude: Sequence[Selector]
) -> Rules:
    """Return one list of rules: the base (where `only` selects), then each selector's own recipe, then the exclusions.

    Raises:
        ToolError: A recipe does not support the op type it was chosen for.
    """
    chosen: Rules = list(base) if not only else [part for selector in only for part in _narrowed(base, selector)]
    for selector, recipe, parts in rules:
        chosen += _narrowed(parts, selector) if recipe != NONE else [leave_in_float(selector.regex, selector.operation)]
    return concatenate([*chosen, *(leave_in_float(selector.regex, selector.operation) for selector in exclude)])


def _narrowed(rules: Rules, selector: Selector) -> Rules:
    """Return rules restricted to what a selector selects."""
    narrowed = []
    for rule in rules:
        if selector.operation == "*":
            narrowed.append({**rule, "regex": _both(rule["regex"], selector.regex)})
        elif rule["operation"] in ("*", selector.operation) and supports(rule, selector.operation):
            narrowed.append({**rule, "operation": selector.operation})
    if not narrowed:
        raise ToolError(f"the recipe has no rule for {selector.text}", where=selector.text, remedy="choose another recipe for it")
    return narrowed


def _both(one: str, other: str) -> str:
    """Return a regex that is found where both are."""
    return other if one in (".*", "^.*", "(?:.*)") else f"^(?=.*(?:{one}))(?=.*(?:{other}))"


def leave_in_float(regex: str, operation: str = "*") -> dict[str, Any]:
    """Return the rule that leaves ops as they are."""
    return {"regex": regex, "operation": operation, "algorithm_key": NO_QUANTIZE, "op_config": {}}


def supports(rule: dict[str, Any], operation: str) -> bool:
    """Whether the quantizer's policy knows the rule's configuration for an operation."""
    from ai_edge_quantizer import algorithm_manager, qtyping

    if rule["algorithm_key"] == NO_QUANTIZE:
        return True
    try:
        config = qtyping.OpQuantizationConfig.from_dict(rule["op_config"])
        algorithm_manager.check_op_quantization_config(rule["algorithm_key"], qtyping.TFLOperationName(operation), config)
    except (ValueError, KeyError, TypeError):
        return False
    return True


def needs_calibration(rules: Rules) -> bool:
    """Whether some rule quantizes activations by ranges measured beforehand, or weights by samples."""
    return any("activation_tensor_config" in rule.get("op_config", {}) or rule["algorithm_key"] == "gptq" for rule in rules)


def assign(precisions: dict[str, str]) -> Rules:
    """Return rules that give each op the recipe named for it.

    Args:
        precisions: Op name -> alias or recipe name; ops that are not in it stay as they are.
    """
    rules: Rules = []
    for recipe in dict.fromkeys(precisions.values()):
        scopes = [re.escape(f"{name};") for name, chosen in precisions.items() if chosen == recipe]
        if recipe != NONE:
            rules += [{**rule, "regex": f"^(?:{'|'.join(scopes)})$"} for rule in resolve_recipe(recipe)[1]]
    return concatenate(rules)


def with_ends(rules: Rules, io_dtype: str, name: str) -> Rules:
    """Return rules that leave a model's inputs and outputs in the type asked for.

    Args:
        rules: Of the recipe.
        io_dtype: `float32`, or the integer type that the rules make.
        name: The model, for messages.

    Raises:
        ToolError: The rules make another type.
    """
    if needs_calibration(rules) and io_dtype == "float32":
        return concatenate([*rules, *(leave_in_float(".*", end) for end in INPUT_OUTPUT)])
    if io_dtype != "float32":
        _require_ends(rules, io_dtype, name)
    return rules


def _require_ends(rules: Rules, io_dtype: str, name: str) -> None:
    """Raise ToolError unless the rules make inputs and outputs of the type asked for."""
    bits = {config["num_bits"] for rule in rules if (config := rule.get("op_config", {}).get("activation_tensor_config"))}
    if {f"int{number}" for number in bits} != {io_dtype}:
        made = ", ".join(f"int{number}" for number in sorted(bits)) or "float32: the recipe is not static"
        raise ToolError(f"--io-dtype {io_dtype} does not fit the recipe", where=name, got=made)
