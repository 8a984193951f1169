"""What a user says is done to the model it is meant for, and to no other."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.calibration.dataset import CalibrationSet
from shared.command.errors import ToolError
from shared.runtime.executors import local_processes
from tools.quantize_tflite.options import Choices, beside
from tools.quantize_tflite.recipes import resolve_recipe
from tools.quantize_tflite.request import Wish

HAND = "hand_landmarker.task/hand_detector.tflite"
GESTURE = "gesture.tflite"
NAMES = [HAND, GESTURE, "hand_landmarker.task/landmarks.tflite"]
RULE = {"regex": ".*", "operation": "*", "algorithm_key": "no_quantize", "op_config": {}}
NOTHING = Choices(
    recipe=None,
    rules=[],
    exclude=[],
    only=[],
    max_drop=[],
    target="size",
    calibration=None,
    input_range=None,
    samples=None,
    io_dtype="float32",
    corrects_bias=True,
    debug=False,
    short_names=False,
    in_bundle=True,
)


def wishes(names: list[str] = NAMES, **said: object) -> dict[str, Wish]:
    """Return what is wanted of each model of a bundle."""
    choices = replace(NOTHING, **said)  # type: ignore[arg-type]
    return {name: choices.wish(name, names, Path("out/small.task"), local_processes) for name in names}


def single(**said: object) -> Wish:
    """Return what is wanted of a .tflite file."""
    return wishes(["m.tflite"], in_bundle=False, **said)["m.tflite"]


def recipes(**said: object) -> list[str]:
    return [wish.recipe for wish in wishes(**said).values()]


def test_who_says_nothing_gets_int8_everywhere() -> None:
    for wish in (*wishes().values(), single()):
        assert (wish.recipe, wish.expansion, wish.base) == ("int8", *resolve_recipe("int8"))
        assert (wish.only, wish.rules, wish.exclude, wish.search, wish.samples) == ([], [], [], None, None)


def test_what_is_meant_for_every_model_reaches_every_model() -> None:
    said = {"recipe": "fp16", "io_dtype": "int8", "corrects_bias": False, "debug": True, "input_range": "0..1"}
    for wish in wishes(**said).values():
        assert (wish.recipe, wish.expansion) == ("fp16", "weight_only_wfp16_afp32")
        assert (wish.io_dtype, wish.corrects_bias, wish.debug, wish.input_range, wish.in_bundle) == (
            "int8",
            False,
            True,
            "0..1",
            True,
        )
        assert wish.executor is local_processes


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([f"{HAND}=int4"], ["int4", "int8", "int8"]),
        (["hand_detector.tflite=int4"], ["int4", "int8", "int8"]),
        ([f"{GESTURE}=none"], ["int8", "none", "int8"]),
        ([f"{GESTURE}:=none"], ["int8", "none", "int8"]),
        (["landmarks.tflite=fp16", f"{GESTURE}=int4"], ["int8", "int4", "fp16"]),
        ([f"{GESTURE}=fp16", f"{GESTURE}=int4"], ["int8", "int4", "int8"]),
    ],
)
def test_a_model_gets_the_recipe_that_was_last_named_for_it(rules: list[str], expected: list[str]) -> None:
    assert recipes(rules=rules) == expected
    assert recipes(rules=rules, recipe="fp16") == [recipe if recipe != "int8" else "fp16" for recipe in expected]


@pytest.mark.parametrize(
    ("rule", "meant"),
    [
        ("CONV_2D=fp16", [("CONV_2D", "CONV_2D")] * 3),
        ("^logits;=fp16", [("^logits;", "*")] * 3),
        ("a=b=fp16", [("a=b", "*")] * 3),
        (f"{HAND}:CONV_2D=fp16", [("CONV_2D", "CONV_2D"), None, None]),
        ("hand_detector.tflite:CONV_2D=fp16", [("CONV_2D", "CONV_2D"), None, None]),
        (f"{GESTURE}:(?:a|b):0;=fp16", [None, ("(?:a|b):0;", "*"), None]),
        ("detector.tflite:x=fp16", [("detector.tflite:x", "*")] * 3),  # the name of no model, so a regex
        ("hand_landmarker.task=fp16", [("hand_landmarker.task", "*")] * 3),
    ],
)
def test_a_selector_is_for_the_model_before_it_or_for_all(rule: str, meant: list[tuple[str, str] | None]) -> None:
    found = [
        [(selector.text, selector.operation, recipe) for selector, recipe in wish.rules] for wish in wishes(rules=[rule]).values()
    ]
    assert found == [[] if one is None else [(*one, "fp16")] for one in meant]
    assert recipes(rules=[rule]) == ["int8"] * 3


def test_rules_keep_their_order_and_the_models_recipe_beside_them() -> None:
    said = [f"{GESTURE}:CONV_2D=int4", f"{GESTURE}=fp16", "ADD=none", f"{HAND}:ADD=int8"]
    wish = wishes(rules=said)[GESTURE]
    assert wish.recipe == "fp16"
    assert [(selector.text, recipe) for selector, recipe in wish.rules] == [("CONV_2D", "int4"), ("ADD", "none")]


@pytest.mark.parametrize("key", ["only", "exclude"])
@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["CONV_2D", "^head"], [["CONV_2D", "^head"]] * 3),
        ([f"{HAND}:CONV_2D"], [["CONV_2D"], [], []]),
        (["landmarks.tflite:CONV_2D", f"{GESTURE}:^head", "ADD"], [["ADD"], ["^head", "ADD"], ["CONV_2D", "ADD"]]),
    ],
)
def test_what_is_only_or_not_quantized_is_chosen_by_model_too(key: str, texts: list[str], expected: list[list[str]]) -> None:
    found = [[selector.text for selector in getattr(wish, key)] for wish in wishes(**{key: texts}).values()]
    assert found == expected


@pytest.mark.parametrize("key", ["only", "exclude"])
def test_a_whole_model_in_only_or_exclude_does_something_or_is_refused(key: str) -> None:
    try:
        said = wishes(**{key: [GESTURE]})
    except ToolError:
        return
    nothing = wishes()
    assert {name: wish.as_arguments() for name, wish in said.items()} != {
        name: wish.as_arguments() for name, wish in nothing.items()
    }


def test_the_longer_of_two_names_is_meant() -> None:
    names = ["a.tflite", "a.tflite:b"]
    said = wishes(names, exclude=["a.tflite:b:ADD", "a.tflite:SUB"])
    assert [[selector.text for selector in wish.exclude] for wish in said.values()] == [["SUB"], ["ADD"]]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("sub.task/a.tflite", ["int8", "int4"]),
        ("a.tflite", ["int4", "int8"]),
    ],
)
def test_a_whole_name_is_meant_before_the_last_part_of_another(said: str, expected: list[str]) -> None:
    names = ["a.tflite", "sub.task/a.tflite"]
    assert [wish.recipe for wish in wishes(names, rules=[f"{said}=int4"]).values()] == expected


def test_the_last_part_of_several_names_is_not_one_of_them_by_chance() -> None:
    try:
        said = [wish.recipe for wish in wishes(["one.task/a.tflite", "two.task/a.tflite"], rules=["a.tflite=int4"]).values()]
    except ToolError:
        return
    assert said == ["int4", "int4"]


@pytest.mark.parametrize("rule", ["CONV_2D", "=int8", "CONV_2D=", "=", ""])
def test_a_rule_of_another_form_is_refused(rule: str) -> None:
    with pytest.raises(ToolError, match="not of the form --rule SELECTOR=RECIPE; got"):
        wishes(rules=[rule])


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"recipe": "in8"}, "did you mean int8"),
        ({"rules": [f"{GESTURE}=in8"]}, "did you mean int8"),
        ({"rules": ["(=int8"]}, "bad regex"),
        ({"exclude": [f"{GESTURE}:("]}, "bad regex"),
        ({"only": ["*"]}, "bad regex"),
        ({"exclude": ["CALL"]}, "never quantizes CALL"),
        ({"recipe": "absent.json"}, r"absent\.json: no such recipe file"),
        ({"rules": [f"{GESTURE}=absent.json"]}, r"absent\.json: no such recipe file"),
    ],
)
def test_an_unknown_recipe_or_selector_is_refused_in_one_line(said: dict[str, object], says: str) -> None:
    with pytest.raises(ToolError, match=says) as caught:
        wishes(**said)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("max_drop", "limits"),
    [
        (["0.01"], [{"": 0.01}] * 3),
        (["1e-2", "logits=0.5"], [{"": 0.01, "logits": 0.5}] * 3),
        (["0.5", "0.01"], [{"": 0.01}] * 3),
        (["out:0=0.5"], [{"out:0": 0.5}] * 3),
        ([f"{GESTURE}=0.5"], [None, {"": 0.5}, None]),
        (["hand_detector.tflite=0.5"], [{"": 0.5}, None, None]),
        ([f"{GESTURE}:logits=0.5"], [None, {"logits": 0.5}, None]),
        (["0.01", f"{HAND}:a=b=0.5"], [{"": 0.01, "a=b": 0.5}, {"": 0.01}, {"": 0.01}]),
        (["0.01", f"{GESTURE}=0.5"], [{"": 0.01}, {"": 0.5}, {"": 0.01}]),
    ],
)
def test_a_limit_holds_for_an_output_a_model_or_all(max_drop: list[str], limits: list[dict[str, float] | None]) -> None:
    found = wishes(max_drop=max_drop, target="latency")
    assert [wish.search.limits if wish.search else None for wish in found.values()] == limits
    assert [wish.recipe for wish in found.values()] == ["int8" if limit is None else "search" for limit in limits]
    for wish in found.values():
        assert wish.search is None or (wish.search.target, wish.expansion) == ("latency", "mixed precision for latency")


@pytest.mark.parametrize(
    "text", ["0", "-0.1", "nan", "inf", "much", "", "logits=0", "logits=much", f"{GESTURE}=-1", f"{GESTURE}:0.1"]
)
def test_a_limit_that_is_no_positive_number_is_refused(text: str) -> None:
    with pytest.raises(ToolError, match="--max-drop is no positive number; got"):
        wishes(max_drop=[text])


@pytest.mark.parametrize("text", ["=0.01", "logits="])
def test_a_limit_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ToolError, match="not of the form --max-drop"):
        wishes(max_drop=[text])


@pytest.mark.parametrize("said", [{"rules": ["CONV_2D=int8"]}, {"only": ["CONV_2D"]}])
def test_a_search_decides_each_layer_by_itself(said: dict[str, object]) -> None:
    for ask in (wishes, single):
        with pytest.raises(ToolError, match="leave out --rule and --only, or --max-drop"):
            ask(max_drop=["0.01"], **said)


def test_a_search_needs_no_recipe() -> None:
    with pytest.raises(ToolError, match="leave out --recipe, or --max-drop"):
        single(max_drop=["0.01"], recipe="int8")


def test_in_a_bundle_one_model_is_searched_and_others_have_recipes() -> None:
    said = {"max_drop": ["0.01"], "rules": [f"{GESTURE}=none", f"{GESTURE}:ADD=int8"], "exclude": ["^head"]}
    found = wishes(**said)
    assert [wish.recipe for wish in found.values()] == ["search", "none", "search"]
    assert [len(wish.exclude) for wish in found.values()] == [1, 1, 1]
    assert recipes(max_drop=[f"{GESTURE}=0.01"], rules=[f"{HAND}:ADD=int8"], recipe="fp16") == ["fp16", "search", "fp16"]


def test_a_recipe_file_may_hold_the_rules_of_each_model(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps({HAND: [RULE], GESTURE: []}))
    assert [wish.base for wish in wishes(recipe=str(path)).values()] == [[RULE], [], []]
    assert [(wish.recipe, wish.expansion) for wish in wishes(recipe=str(path)).values()] == [(str(path), str(path))] * 3
    path.write_text(json.dumps([RULE]))
    assert [wish.base for wish in wishes(recipe=str(path)).values()] == [[RULE]] * 3
    assert [len(wish.base) for wish in wishes(rules=[f"{GESTURE}={path}"], recipe="none").values()] == [0, 1, 0]


@pytest.mark.parametrize("rules", [[{"regex": ".*"}], {"regex": ".*"}, "int8"])
def test_a_wrong_rule_for_one_model_is_refused(tmp_path: Path, rules: object) -> None:
    (tmp_path / "r.json").write_text(json.dumps({GESTURE: rules}))
    with pytest.raises(ToolError, match=r"r\.json: (rule 1 lacks|the recipe is no list of rules)"):
        wishes(recipe=str(tmp_path / "r.json"))


def test_a_recipe_by_inner_model_is_for_bundles(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps({"m.tflite": [RULE]}))
    with pytest.raises(ToolError, match="a recipe by inner model is for bundles"):
        single(recipe=str(tmp_path / "r.json"))


def test_the_samples_of_a_bundle_go_by_the_models_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "hand_detector.npz", x=np.zeros((2, 3)))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    found = wishes(calibration=tmp_path, input_range="0..1", samples=7)
    assert [wish.samples for wish in found.values()] == [CalibrationSet(tmp_path / "hand_detector.npz", "0..1", 7), None, None]
    (tmp_path / "gesture").mkdir()
    found = wishes(calibration=tmp_path)
    assert [wish.samples and wish.samples.path.name for wish in found.values()] == ["hand_detector.npz", "gesture", None]


def test_samples_without_a_models_name_are_for_all(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    np.savez(tmp_path / "set.npz", x=np.zeros((2, 3)))
    assert [wish.samples for wish in wishes(calibration=tmp_path / "set.npz").values()] == [
        CalibrationSet(tmp_path / "set.npz")
    ] * 3
    (tmp_path / "set.npz").unlink()
    assert [wish.samples for wish in wishes(calibration=tmp_path).values()] == [CalibrationSet(tmp_path)] * 3


def test_a_tflite_file_takes_its_samples_as_they_are_called(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", x=np.zeros((2, 3)))
    assert single(calibration=tmp_path / "m.npz").samples == CalibrationSet(tmp_path / "m.npz")
    assert single(calibration=tmp_path).samples == CalibrationSet(tmp_path)


@pytest.mark.parametrize(
    ("content", "are_statistics"), [({"model_qsvs": {}}, True), ({"samples": []}, False), (["model_qsvs"], False), (None, False)]
)
def test_statistics_of_an_earlier_run_are_told_from_a_manifest(tmp_path: Path, content: object, are_statistics: bool) -> None:
    path = tmp_path / "set.json"
    path.write_text(json.dumps(content))
    expected = (None, path) if are_statistics else (CalibrationSet(path), None)
    for wish in (single(calibration=path), *wishes(calibration=path).values()):
        assert (wish.samples, wish.statistics) == expected


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "\xff"])
def test_a_file_that_is_no_json_is_left_to_the_calibration_set_to_refuse(tmp_path: Path, text: str) -> None:
    path = tmp_path / "set.json"
    path.write_bytes(text.encode("latin-1"))
    assert single(calibration=path).samples == CalibrationSet(path)


def test_files_fall_beside_the_product_named_after_it_and_the_inner_model() -> None:
    output = Path("out/small.task")
    assert beside(output, "m.tflite", ["m.tflite"], "search.jsonl") == Path("out/small_search.jsonl")
    assert beside(output, HAND, NAMES, "search.jsonl") == Path("out/small_hand_detector_search.jsonl")
    ledgers = [wish.search.ledger for wish in wishes(max_drop=["0.1"]).values() if wish.search]
    assert ledgers == [Path(f"out/small_{stem}_search.jsonl") for stem in ("hand_detector", "gesture", "landmarks")]


def test_no_two_models_share_a_file() -> None:
    names = ["one.task/a.tflite", "two.task/a.tflite"]
    assert len({beside(Path("out.task"), name, names, "search.jsonl") for name in names}) == 2
