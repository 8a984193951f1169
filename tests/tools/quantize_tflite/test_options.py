"""Each option reaches the model of a bundle that it names, and no other."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.calibration.dataset import CalibrationSet
from shared.command.errors import ToolError
from shared.quantize.request import ALL_OUTPUTS, Limits, Request
from shared.runtime.executors import local_processes
from tools.quantize_tflite.options import TfliteOptions, TfliteSettings
from tools.quantize_tflite.recipes import resolve_recipe

HAND = "hand_landmarker.task/hand_detector.tflite"
GESTURE = "gesture.tflite"
NAMES = [HAND, GESTURE, "hand_landmarker.task/landmarks.tflite"]
RULE = {"regex": ".*", "operation": "*", "algorithm_key": "no_quantize", "op_config": {}}


def requests(names: list[str] = NAMES, *, in_bundle: bool = True, **options: object) -> dict[str, Request]:
    """Return what is asked for each model of a bundle."""
    collected = TfliteOptions(in_bundle=in_bundle, **options)  # type: ignore[arg-type]
    return {name: collected.request(name, names, Path("out/small.task")) for name in names}


def single(**options: object) -> Request:
    """Return what is asked for a .tflite file."""
    return requests(["m.tflite"], in_bundle=False, **options)["m.tflite"]


def recipes(names: list[str] = NAMES, **options: object) -> list[str]:
    return [request.recipe for request in requests(names, **options).values()]


def settings(names: list[str] = NAMES, **options: object) -> list[TfliteSettings]:
    return [request.settings for request in requests(names, **options).values()]


def test_the_default_is_int8_everywhere() -> None:
    expansion, rules = resolve_recipe("int8")
    for request in (*requests().values(), single()):
        assert (request.recipe, request.expansion, request.settings) == (
            "int8",
            expansion,
            TfliteSettings(rules, only=[], rules=[], exclude=[]),
        )
        assert (request.limits, request.ledger, request.calibration, request.holdout) == (Limits(), None, None, None)


def test_an_option_for_every_model_reaches_every_model() -> None:
    options = {
        "recipe": "fp16",
        "io_dtype": "int8",
        "correct_bias": False,
        "sensitivity": True,
        "input_range": "0..1",
        "threads": 3,
    }
    for request in requests(**options).values():
        assert (request.recipe, request.expansion) == ("fp16", "weight_only_wfp16_afp32")
        assert (request.settings.io_dtype, request.corrects_bias, request.sensitivity) == ("int8", False, True)
        assert (request.input_range, request.threads, request.in_bundle) == ("0..1", 3, True)
        assert request.executor is local_processes


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ([f"{HAND}=int4"], ["int4", "int8", "int8"]),
        (["hand_detector.tflite=int4"], ["int4", "int8", "int8"]),
        ([f"{GESTURE}=none"], ["int8", "none", "int8"]),
        ([f"{GESTURE}:=none"], ["int8", "none", "int8"]),
        (["landmarks.tflite=fp16", f"{GESTURE}=int4"], ["int8", "int4", "fp16"]),
        ([f"{GESTURE}=fp16", f"{GESTURE}=int4"], ["int8", "int4", "int8"]),
    ],
)
def test_a_model_gets_the_recipe_that_was_last_named_for_it(rule: list[str], expected: list[str]) -> None:
    assert recipes(rule=rule) == expected
    assert recipes(rule=rule, recipe="fp16") == [recipe if recipe != "int8" else "fp16" for recipe in expected]


@pytest.mark.parametrize(
    ("rule", "selected"),
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
def test_a_selector_is_for_the_model_before_it_or_for_all(rule: str, selected: list[tuple[str, str] | None]) -> None:
    found = [
        [(selector.text, selector.operation, recipe, rules) for selector, recipe, rules in one.rules]
        for one in settings(rule=[rule])
    ]
    assert found == [[] if one is None else [(*one, *resolve_recipe("fp16"))] for one in selected]
    assert recipes(rule=[rule]) == ["int8"] * 3


def test_rules_keep_their_order_next_to_the_recipe_of_the_model() -> None:
    request = requests(rule=[f"{GESTURE}:CONV_2D=int4", f"{GESTURE}=fp16", "ADD=none", f"{HAND}:ADD=int8"])[GESTURE]
    assert request.recipe == "fp16"
    expected = [("CONV_2D", *resolve_recipe("int4")), ("ADD", *resolve_recipe("none"))]
    assert [(selector.text, *recipe) for selector, *recipe in request.settings.rules] == expected


@pytest.mark.parametrize("option", ["only", "exclude"])
@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["CONV_2D", "^head"], [["CONV_2D", "^head"]] * 3),
        ([f"{HAND}:CONV_2D"], [["CONV_2D"], [], []]),
        (["landmarks.tflite:CONV_2D", f"{GESTURE}:^head", "ADD"], [["ADD"], ["^head", "ADD"], ["CONV_2D", "ADD"]]),
    ],
)
def test_only_and_exclude_go_by_model_too(option: str, texts: list[str], expected: list[list[str]]) -> None:
    found = [[selector.text for selector in getattr(one, option)] for one in settings(**{option: texts})]
    assert found == expected


def test_a_whole_model_in_only_or_exclude_leaves_models_out() -> None:
    assert recipes(exclude=[GESTURE]) == ["int8", "none", "int8"]
    assert recipes(only=[GESTURE]) == ["none", "int8", "none"]
    assert [one.changes_nothing() for one in settings(only=[GESTURE])] == [True, False, True]


def test_the_longer_of_two_names_is_taken() -> None:
    found = settings(["a.tflite", "a.tflite:b"], exclude=["a.tflite:b:ADD", "a.tflite:SUB"])
    assert [[selector.text for selector in one.exclude] for one in found] == [["SUB"], ["ADD"]]


@pytest.mark.parametrize(("name", "expected"), [("sub.task/a.tflite", ["int8", "int4"]), ("a.tflite", ["int4", "int8"])])
def test_a_whole_name_is_taken_before_the_last_part_of_another(name: str, expected: list[str]) -> None:
    assert recipes(["a.tflite", "sub.task/a.tflite"], rule=[f"{name}=int4"]) == expected


def test_the_last_part_of_several_names_is_refused() -> None:
    with pytest.raises(
        ToolError, match=r"several inner models have this name; got a\.tflite; expected one of one\.task/a\.tflite, two"
    ):
        requests(["one.task/a.tflite", "two.task/a.tflite"], rule=["a.tflite=int4"])


@pytest.mark.parametrize("rule", ["CONV_2D", "=int8", "CONV_2D=", "=", ""])
def test_a_rule_of_another_form_is_refused(rule: str) -> None:
    with pytest.raises(ToolError, match="not of the form --rule SELECTOR=RECIPE; got"):
        requests(rule=[rule])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"recipe": "in8"}, "did you mean int8"),
        ({"rule": [f"{GESTURE}=in8"]}, "did you mean int8"),
        ({"rule": ["(=int8"]}, "bad regex"),
        ({"exclude": [f"{GESTURE}:("]}, "bad regex"),
        ({"only": ["*"]}, "bad regex"),
        ({"exclude": ["CALL"]}, "never quantizes CALL"),
        ({"recipe": "absent.json"}, r"absent\.json: no such recipe file"),
        ({"rule": [f"{GESTURE}=absent.json"]}, r"absent\.json: no such recipe file"),
        ({"rule": ["CONV_2D=absent.json"]}, r"absent\.json: no such recipe file"),
    ],
)
def test_an_unknown_recipe_or_selector_is_refused_in_one_line(options: dict[str, object], says: str) -> None:
    with pytest.raises(ToolError, match=says) as caught:
        requests(**options)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("max_error", "limits"),
    [
        (["0.01"], [{ALL_OUTPUTS: 0.01}] * 3),
        (["1e-2", "logits=0.5"], [{ALL_OUTPUTS: 0.01, "logits": 0.5}] * 3),
        (["0.5", "0.01"], [{ALL_OUTPUTS: 0.01}] * 3),
        (["out:0=0.5"], [{"out:0": 0.5}] * 3),
        ([f"{GESTURE}=0.5"], [{}, {ALL_OUTPUTS: 0.5}, {}]),
        (["hand_detector.tflite=0.5"], [{ALL_OUTPUTS: 0.5}, {}, {}]),
        ([f"{GESTURE}:logits=0.5"], [{}, {"logits": 0.5}, {}]),
        (["0.01", f"{HAND}:a=b=0.5"], [{ALL_OUTPUTS: 0.01, "a=b": 0.5}, {ALL_OUTPUTS: 0.01}, {ALL_OUTPUTS: 0.01}]),
        (["0.01", f"{GESTURE}=0.5"], [{ALL_OUTPUTS: 0.01}, {ALL_OUTPUTS: 0.5}, {ALL_OUTPUTS: 0.01}]),
    ],
)
def test_a_limit_holds_for_an_output_a_model_or_all(max_error: list[str], limits: list[dict[str, float]]) -> None:
    found = requests(max_error=max_error, objective="latency")
    assert [request.limits.max_error for request in found.values()] == limits
    assert [request.recipe for request in found.values()] == ["search" if limit else "int8" for limit in limits]
    for request in found.values():
        assert not request.limits or (request.objective, request.expansion) == ("latency", "mixed precision for latency")


def test_a_least_psnr_or_cosine_holds_for_every_model_without_a_recipe_of_its_own() -> None:
    found = requests(min_psnr=40.0, min_cosine=0.99, max_error=[f"{HAND}=0.1"], rule=[f"{GESTURE}=fp16"])
    assert [request.limits for request in found.values()] == [
        Limits({ALL_OUTPUTS: 0.1}, 40.0, 0.99),
        Limits(),
        Limits({}, 40.0, 0.99),
    ]
    assert [request.recipe for request in found.values()] == ["search", "fp16", "search"]


@pytest.mark.parametrize("text", [f"{GESTURE}=-1", f"{GESTURE}:0.1"])
def test_a_limit_of_a_model_that_is_no_positive_number_is_refused(text: str) -> None:
    with pytest.raises(ToolError, match="--max-error is no positive number; got"):
        requests(max_error=[text])


@pytest.mark.parametrize("limit", [{"max_error": ["0.01"]}, {"min_cosine": 0.99}, {"min_psnr": 40.0}])
def test_a_search_decides_each_layer_by_itself(limit: dict[str, object]) -> None:
    for ask in (requests, single):
        for options in ({"rule": ["CONV_2D=int8"]}, {"only": ["CONV_2D"]}):
            with pytest.raises(ToolError, match="leave out --rule and --only, or the limit"):
                ask(**limit, **options)  # type: ignore[arg-type]
    with pytest.raises(ToolError, match="leave out --recipe, or the limit"):
        single(**limit, recipe="int8")


def test_in_a_bundle_one_model_is_searched_and_others_have_recipes() -> None:
    options = {"max_error": ["0.01"], "rule": [f"{GESTURE}=none", f"{GESTURE}:ADD=int8"], "exclude": ["^head"]}
    assert recipes(**options) == ["search", "none", "search"]
    assert [len(one.exclude) for one in settings(**options)] == [1, 1, 1]
    assert recipes(max_error=[f"{GESTURE}=0.01"], rule=[f"{HAND}:ADD=int8"], recipe="fp16") == ["fp16", "search", "fp16"]


def test_the_ledger_of_each_search_lies_next_to_the_product() -> None:
    ledgers = [request.ledger for request in requests(max_error=["0.1"]).values()]
    assert ledgers == [Path(f"out/small_{stem}_search.jsonl") for stem in ("hand_detector", "gesture", "landmarks")]
    assert single(max_error=["0.1"]).ledger == Path("out/small_search.jsonl")


def test_a_recipe_file_may_hold_the_rules_of_each_model(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps({HAND: [RULE], GESTURE: []}))
    assert [one.base for one in settings(recipe=str(path))] == [[RULE], [], []]
    assert [(request.recipe, request.expansion) for request in requests(recipe=str(path)).values()] == [(str(path), str(path))] * 3
    path.write_text(json.dumps([RULE]))
    assert [one.base for one in settings(recipe=str(path))] == [[RULE]] * 3
    assert [len(one.base) for one in settings(rule=[f"{GESTURE}={path}"], recipe="none")] == [0, 1, 0]


@pytest.mark.parametrize("rules", [[{"regex": ".*"}], {"regex": ".*"}, "int8"])
def test_a_wrong_rule_for_one_model_is_refused(tmp_path: Path, rules: object) -> None:
    (tmp_path / "r.json").write_text(json.dumps({GESTURE: rules}))
    with pytest.raises(ToolError, match=r"r\.json: (rule 1 lacks|the recipe is no list of rules)"):
        requests(recipe=str(tmp_path / "r.json"))


def test_a_recipe_by_inner_model_is_for_bundles(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps({"m.tflite": [RULE]}))
    with pytest.raises(ToolError, match="a recipe by inner model is for bundles"):
        single(recipe=str(tmp_path / "r.json"))


def test_the_samples_of_a_bundle_go_by_the_names_of_its_models(tmp_path: Path) -> None:
    np.savez(tmp_path / "hand_detector.npz", x=np.zeros((2, 3)))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    found = requests(calibration=tmp_path, input_range="0..1", samples=7)
    assert [request.calibration for request in found.values()] == [
        CalibrationSet(tmp_path / "hand_detector.npz", "0..1", 7),
        None,
        None,
    ]
    (tmp_path / "gesture").mkdir()
    found = requests(calibration=tmp_path)
    assert [request.calibration and request.calibration.path.name for request in found.values()] == [
        "hand_detector.npz",
        "gesture",
        None,
    ]


def test_samples_without_the_name_of_a_model_are_for_all(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    np.savez(tmp_path / "set.npz", x=np.zeros((2, 3)))
    for path in (tmp_path / "set.npz", tmp_path):
        assert [request.calibration for request in requests(calibration=path).values()] == [CalibrationSet(path)] * 3
        (tmp_path / "set.npz").unlink(missing_ok=True)


def test_a_tflite_file_takes_its_samples_whatever_their_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", x=np.zeros((2, 3)))
    assert single(calibration=tmp_path / "m.npz").calibration == CalibrationSet(tmp_path / "m.npz")
    assert single(calibration=tmp_path).calibration == CalibrationSet(tmp_path)


@pytest.mark.parametrize(
    ("content", "are_statistics"), [({"model_qsvs": {}}, True), ({"samples": []}, False), (["model_qsvs"], False), (None, False)]
)
def test_statistics_of_an_earlier_run_differ_from_a_manifest(tmp_path: Path, content: object, are_statistics: bool) -> None:
    path = tmp_path / "set.json"
    path.write_text(json.dumps(content))
    expected = (None, path) if are_statistics else (CalibrationSet(path), None)
    for request in (single(calibration=path), *requests(calibration=path).values()):
        assert (request.calibration, request.settings.statistics) == expected


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "\xff"])
def test_a_file_that_is_no_json_is_left_to_the_calibration_set_to_refuse(tmp_path: Path, text: str) -> None:
    path = tmp_path / "set.json"
    path.write_bytes(text.encode("latin-1"))
    assert single(calibration=path).calibration == CalibrationSet(path)
