"""Recipes are AI Edge Quantizer's, and a user's choices become one list of rules that means what was said."""

import json
from pathlib import Path

import pytest

from shared.command.errors import ToolError
from tools.quantize_tflite.recipes import (
    ALIASES,
    FP16_RECIPE,
    INT4_RECIPE,
    NO_QUANTIZE,
    Rules,
    Selector,
    assign,
    build_rules,
    concatenate,
    needs_calibration,
    parse_selector,
    recipe_names,
    resolve_recipe,
)


def test_names_are_the_librarys_and_two_of_ours() -> None:
    names = recipe_names()
    assert {"dynamic_wi8_afp32", "dynamic_wi4_afp32", "weight_only_wi8_afp32", "static_wi8_ai8", FP16_RECIPE, INT4_RECIPE} <= set(
        names
    )
    assert set(ALIASES.values()) <= set(names)
    assert not any("gemma" in name for name in names)


@pytest.mark.parametrize("recipe", ["int8", "int8-static", "int4", "fp16"])
def test_rules_are_plain_json_that_a_recipe_file_can_hold(recipe: str) -> None:
    for rule in resolve_recipe(recipe)[1]:
        assert (type(rule["operation"]), type(rule["algorithm_key"]), str(rule["operation"])) == (str, str, "*")
        assert json.loads(json.dumps(rule)) == rule


@pytest.mark.parametrize(("recipe", "near"), [("in8", "int8"), ("dynamic_wi8", "dynamic_wi8_afp32"), ("FP16", "fp16")])
def test_an_unknown_recipe_gets_the_near_miss(recipe: str, near: str) -> None:
    with pytest.raises(ToolError, match=rf"did you mean {near}"):
        resolve_recipe(recipe)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("not json", "not valid JSON"),
        ("{}", "no list of rules"),
        ('[{"regex": ".*"}]', "rule 1 lacks algorithm_key, op_config, operation"),
        ('[{"regex": "(", "operation": "*", "algorithm_key": "a", "op_config": {}}]', "rule 1: bad regex"),
        (json.dumps([{"regex": ".*", "operation": "*", "algorithm_key": "a", "op_config": {}}] * 2), "would delete an earlier"),
    ],
)
def test_a_bad_recipe_file_names_its_fault(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(ToolError, match=rf"r\.json: .*{says}"):
        resolve_recipe(str(tmp_path / "r.json"))


def test_rules_of_the_wrong_type_are_named(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('[{"regex": 3, "operation": "*", "algorithm_key": "a", "op_config": []}]')
    with pytest.raises(ToolError, match="rule 1: wrong type of regex, op_config"):
        resolve_recipe(str(tmp_path / "r.json"))


def decided(rules: list[dict[str, object]], operation: str, scope: str) -> tuple[str, int | None]:
    """Return algorithm and weight bits that the library itself chooses for an op."""
    from ai_edge_quantizer import qtyping
    from ai_edge_quantizer.recipe_manager import RecipeManager

    manager = RecipeManager()
    manager.load_quantization_recipe(rules)
    algorithm, config = manager.get_quantization_configs(qtyping.TFLOperationName(operation), scope)
    bits = config.weight_tensor_config.num_bits if config.weight_tensor_config else None
    return str(algorithm.value if hasattr(algorithm, "value") else algorithm), bits


def chosen(selector: str, recipe: str) -> tuple[Selector, str, Rules]:
    """Return a selector with a recipe of its own, as `--rule SELECTOR=RECIPE` gives it."""
    return parse_selector(selector), *resolve_recipe(recipe)


def test_the_library_decides_as_the_choices_say() -> None:
    rules = build_rules(
        resolve_recipe("int8")[1],
        only=[],
        rules=[chosen("FULLY_CONNECTED", "int4"), chosen("stem", "fp16")],
        exclude=[parse_selector("head")],
    )
    assert decided(rules, "CONV_2D", "body;") == ("min_max_uniform_quantize", 8)
    assert decided(rules, "FULLY_CONNECTED", "body;") == ("min_max_uniform_quantize", 4)
    assert decided(rules, "CONV_2D", "stem;") == ("float_casting", 16)
    assert decided(rules, "FULLY_CONNECTED", "stem;") == ("float_casting", 16)  # the later rule holds
    assert decided(rules, "FULLY_CONNECTED", "head;")[0] == NO_QUANTIZE


def test_only_restricts_the_recipe_to_what_it_selects() -> None:
    rules = build_rules(resolve_recipe("int8")[1], [parse_selector("^body;"), parse_selector("FULLY_CONNECTED")], [], [])
    assert decided(rules, "CONV_2D", "body;")[1] == 8
    assert decided(rules, "FULLY_CONNECTED", "head;")[1] == 8
    assert decided(rules, "CONV_2D", "head;")[0] == NO_QUANTIZE


def test_none_for_a_selector_leaves_it_as_it_is() -> None:
    rules = build_rules(resolve_recipe("int8")[1], [], [chosen("CONV_2D", "none")], [])
    assert decided(rules, "CONV_2D", "a;")[0] == NO_QUANTIZE
    assert decided(rules, "FULLY_CONNECTED", "a;")[1] == 8


def test_a_selector_narrows_the_rules_of_its_recipe_by_their_own_regex(tmp_path: Path) -> None:
    [rule] = resolve_recipe("int8")[1]
    (tmp_path / "r.json").write_text(json.dumps([{**rule, "regex": "conv"}]))
    rules = build_rules([], [], [chosen("body", str(tmp_path / "r.json"))], [])
    assert decided(rules, "CONV_2D", "body/conv;")[1] == 8
    assert decided(rules, "CONV_2D", "head/conv;")[0] == NO_QUANTIZE
    assert decided(rules, "CONV_2D", "body/other;")[0] == NO_QUANTIZE


def test_int4_falls_back_to_int8_where_it_is_not_supported() -> None:
    _, rules = resolve_recipe("int4")
    assert decided(rules, "CONV_2D", "a;")[1] == 4
    assert decided(rules, "DEPTHWISE_CONV_2D", "a;")[1] == 8


def test_a_recipe_that_does_not_support_the_selected_op_type_is_refused() -> None:
    with pytest.raises(ToolError, match="DEPTHWISE_CONV_2D: the recipe has no rule"):
        build_rules([], [], [chosen("DEPTHWISE_CONV_2D", "dynamic_wi4_afp32")], [])


@pytest.mark.parametrize(
    ("text", "operation"), [("CONV_2D", "CONV_2D"), ("TRANSPOSE_CONV", "CONV_2D_TRANSPOSE"), ("INPUT", "INPUT"), ("conv_2d", "*")]
)
def test_a_selector_is_an_op_type_or_else_a_regex(text: str, operation: str) -> None:
    assert parse_selector(text).operation == operation


@pytest.mark.parametrize(("text", "says"), [("PRELU", "never quantizes PRELU"), ("(", "bad regex")])
def test_a_selector_that_can_select_nothing_is_refused(text: str, says: str) -> None:
    with pytest.raises(ToolError, match=says):
        parse_selector(text)


def test_concatenated_rules_survive_the_librarys_bookkeeping_by_regex() -> None:
    [rule] = resolve_recipe("int8")[1]
    regexes = [rule["regex"] for rule in concatenate([rule] * 3)]
    assert regexes == [".*", "(?:.*)", "(?:(?:.*))"]


def test_assigned_precisions_hold_for_exactly_their_ops() -> None:
    rules = assign({"a": "int8", "a/b": "fp16", "c(1)/d;e": "int8", "f": "none"})
    assert decided(rules, "CONV_2D", "a;")[1] == 8
    assert decided(rules, "CONV_2D", "a/b;") == ("float_casting", 16)
    assert decided(rules, "CONV_2D", "c(1)/d;e;")[1] == 8
    assert decided(rules, "CONV_2D", "f;")[0] == NO_QUANTIZE
    assert decided(rules, "CONV_2D", "aa;")[0] == NO_QUANTIZE


@pytest.mark.parametrize(("recipe", "needs"), [("int8", False), ("fp16", False), ("int8-static", True), ("int16x8", True)])
def test_static_recipes_need_calibration(recipe: str, needs: bool) -> None:
    assert needs_calibration(resolve_recipe(recipe)[1]) is needs
