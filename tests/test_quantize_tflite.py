"""Every layer's fate is told, and a recipe that does nothing is an error."""

import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest

from shared.errors import ToolError
from shared.tflite import OpWeights, read_metadata, read_op_weights
from tests.conftest import REALDATA, Run

from tools.quantize_tflite import quantize_tflite

LAYERS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")


@pytest.fixture
def model(float_model: Path, tmp_path: Path) -> Path:
    """A copy, so that products fall beside it."""
    return Path(shutil.copy(float_model, tmp_path / "model.tflite"))


@pytest.mark.parametrize(
    ("recipe", "dtypes", "least", "most"),
    [
        ("int8", {"INT8"}, 0.20, 0.45),
        ("int8-weight-only", {"INT8"}, 0.20, 0.45),
        ("fp16", {"FLOAT16"}, 0.45, 0.65),
        ("int4", {"INT4", "INT8"}, 0.10, 0.38),
        ("dynamic_wi8_afp32", {"INT8"}, 0.20, 0.45),
    ],
)
def test_every_layer_is_quantized_and_told(model: Path, recipe: str, dtypes: set[str], least: float, most: float) -> None:
    result = quantize_tflite(model, recipe=recipe)
    rows = {row.op_type: row for row in result.coverage.op_types}
    for op_type in LAYERS:
        row = rows[op_type]
        assert (row.quantized, row.quantized_weight_bytes, row.reason) == (row.ops, row.weight_bytes, "")
        assert set(row.dtypes) <= dtypes
        assert row.bytes_after < row.weight_bytes
    assert rows["ADD"].quantized == 0
    assert "no rule supports this op type" in rows["ADD"].reason
    assert least < result.product.size_bytes / model.stat().st_size < most
    assert result.product.path == model.with_name(f"model_{recipe}.tflite")


def test_int4_leaves_no_depthwise_convolution_in_float(model: Path) -> None:
    quantize_tflite(model, recipe="int4")
    types = {op.op_type: op.dtype for op in read_op_weights(model.with_name("model_int4.tflite")) if op.op_type in LAYERS}
    assert types == {"CONV_2D": "INT4", "DEPTHWISE_CONV_2D": "INT8", "FULLY_CONNECTED": "INT4"}


def test_metadata_and_label_files_are_kept(model: Path) -> None:
    with zipfile.ZipFile(model, "a") as archive:
        archive.writestr("labels.txt", "cat\n")
    quantize_tflite(model)
    product = model.with_name("model_int8.tflite")
    assert read_metadata(product) == read_metadata(model)
    with zipfile.ZipFile(product) as archive:
        assert archive.read("labels.txt") == b"cat\n"


def test_the_same_input_gives_the_same_bytes(model: Path) -> None:
    one = quantize_tflite(model, output=model.with_name("one.tflite"))
    other = quantize_tflite(model, output=model.with_name("other.tflite"))
    assert one.product.sha256 == other.product.sha256


def test_a_recipe_file_of_ai_edge_quantizer_is_taken_as_it_is(model: Path) -> None:
    _, rules = resolve_recipe("int8")
    rules[0]["operation"] = "FULLY_CONNECTED"
    path = model.with_name("fc_only.json")
    path.write_text(json.dumps(rules))
    rows = {row.op_type: row for row in quantize_tflite(model, recipe=str(path)).coverage.op_types}
    assert rows["FULLY_CONNECTED"].quantized == rows["FULLY_CONNECTED"].ops
    assert rows["CONV_2D"].quantized == 0
    assert "no rule matches" in rows["CONV_2D"].reason


def test_a_recipe_that_changes_nothing_is_an_error(model: Path) -> None:
    _, rules = resolve_recipe("int8")
    rules[0]["regex"] = "no op is called this"
    path = model.with_name("nothing.json")
    path.write_text(json.dumps(rules))
    with pytest.raises(ToolError, match=r"changes no op of this model.*no rule matches"):
        quantize_tflite(model, recipe=str(path))
    assert {file.name for file in model.parent.iterdir()} == {"model.tflite", "nothing.json"}


def test_quantizing_twice_is_an_error(model: Path) -> None:
    product = quantize_tflite(model).product.path
    with pytest.raises(ToolError, match="weights are INT8, quantized already"):
        quantize_tflite(product, output=model.with_name("twice.tflite"))


def test_names_are_the_librarys_and_two_of_ours() -> None:
    names = recipe_names()
    assert {"dynamic_wi8_afp32", "dynamic_wi4_afp32", "weight_only_wi8_afp32", "static_wi8_ai8", FP16_RECIPE, INT4_RECIPE} <= set(
        names
    )
    assert set(ALIASES.values()) <= set(names)
    assert not any("gemma" in name for name in names)


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


def test_why_an_op_was_left_is_told() -> None:
    _, rules = resolve_recipe("int8")
    skip = [*rules, {"regex": "head", "operation": "*", "algorithm_key": "no_quantize", "op_config": {}}]
    before = [
        OpWeights("CONV_2D", "a", "FLOAT16", 10, 10),
        OpWeights("CONV_2D", "b", "INT8", 10, 10),
        OpWeights("FULLY_CONNECTED", "head", "FLOAT32", 40, 40),
        OpWeights("FULLY_CONNECTED", "body", "FLOAT32", 40, 40),
    ]
    after = [*before[:3], OpWeights("FULLY_CONNECTED", "body", "INT8", 10, 10)]
    rows = {row.op_type: row for row in measure_coverage(before, after, skip)}
    assert rows["CONV_2D"].reason == "1 x weights are FLOAT16, which the quantizer skips; 1 x weights are INT8, quantized already"
    fully = rows["FULLY_CONNECTED"]
    assert (fully.quantized, fully.ops, fully.weight_bytes, fully.quantized_weight_bytes, fully.bytes_after) == (1, 2, 80, 40, 50)
    assert fully.reason == "1 x excluded by a rule"


@pytest.mark.parametrize(
    "fault", ["missing", "empty", "text", "truncated", "unknown recipe", "static", "output exists", "in place"]
)
def test_bad_input_is_one_line_exit_2_and_nothing_written(fault: str, model: Path, run_tool: Run) -> None:
    output, options = model.with_name("out.tflite"), []
    match fault:
        case "missing":
            model.unlink()
        case "empty":
            model.write_bytes(b"")
        case "text":
            model.write_text("this is no model\n")
        case "truncated":
            model.write_bytes(model.read_bytes()[: model.stat().st_size // 2])
        case "unknown recipe":
            options = ["--recipe", "int9"]
        case "static":
            options = ["--recipe", "int8-static"]
        case "output exists":
            output.write_text("precious")
        case "in place":
            output, options = model, ["--overwrite"]
    before = {path.name: path.read_bytes() for path in model.parent.iterdir()}
    done = run_tool("quantize_tflite", model, "-o", output, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr)
    assert {path.name: path.read_bytes() for path in model.parent.iterdir()} == before


@pytest.mark.realdata
def test_a_real_float_model_is_quantized(tmp_path: Path) -> None:
    source = REALDATA / "tflite" / "mlperf_tiny_resnet_float.tflite"
    result = quantize_tflite(source, output=tmp_path / "m.tflite")
    assert {row.op_type: row.quantized for row in result.coverage.op_types if row.op_type in LAYERS} == {
        "CONV_2D": 9,
        "FULLY_CONNECTED": 1,
    }
    assert result.product.size_bytes < 0.5 * source.stat().st_size


@pytest.mark.realdata
def test_float16_weights_are_an_error_not_a_silent_copy(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="weights are FLOAT16, which the quantizer skips"):
        quantize_tflite(REALDATA / "mediapipe" / "selfie_segmenter.tflite", output=tmp_path / "m.tflite")
    assert not list(tmp_path.iterdir())


def test_a_rule_that_only_excludes_needs_no_configuration(model: Path) -> None:
    _, rules = resolve_recipe("int8")
    path = model.with_name("r.json")
    path.write_text(json.dumps([*rules, {"regex": "^.*", "operation": "CONV_2D", "algorithm_key": "no_quantize"}]))
    rows = {row.op_type: row for row in quantize_tflite(model, recipe=str(path)).coverage.op_types}
    assert (rows["CONV_2D"].quantized, rows["CONV_2D"].reason) == (0, "5 x excluded by a rule")


def test_rules_of_the_wrong_type_are_named(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('[{"regex": 3, "operation": "*", "algorithm_key": "a", "op_config": []}]')
    with pytest.raises(ToolError, match="rule 1: wrong type of regex, op_config"):
        resolve_recipe(str(tmp_path / "r.json"))


@pytest.mark.realdata
def test_op_codes_in_the_old_field_are_named_as_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="op code in the schema's old field"):
        quantize_tflite(REALDATA / "mediapipe" / "face_detection_front_fp32.tflite", output=tmp_path / "m.tflite")
