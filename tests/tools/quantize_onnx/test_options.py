"""What stays in float is what the user names, options that would do nothing are refused, and bad input is one line."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from shared.command.errors import ToolError
from shared.quantize.product import Quantized
from tests.conftest import REALDATA, Run
from tests.support.fork_server import ForkServer
from tests.support.small_onnx import PICTURE, save, save_picture_model, save_vector_model, seeded, weights_of, with_external_weights
from tests.tools.quantize_onnx.conftest import names, only
from tools.quantize_onnx import quantize_onnx
from tools.quantize_onnx.options import OnnxSettings, parse_settings

VALUES = {
    "op_types": "op types, joined by commas",
    "format": "qdq or qoperator",
    "activation_type": "int8 or uint8 or int16 or uint16",
    "weight_type": "int8 or uint8",
    "per_channel": "yes or no",
    "reduce_range": "yes or no",
    "symmetric_activations": "yes or no",
    "symmetric_weights": "yes or no",
    "calibration_method": "minmax or entropy or percentile",
}

# What stays in float.


@pytest.mark.parametrize("recipe", ["int8-static", "int8", "fp16"])
def test_excluded_nodes_stay_in_float_and_are_reported(model: Path, tiles: Path, recipe: Any) -> None:
    given = tiles if recipe == "int8-static" else None
    result = only(quantize_onnx(model, recipe=recipe, calibration=given, exclude=["^conv[02]$", "conv3"]))
    assert {op.name: op.reason for op in result.skipped} == dict.fromkeys(["conv0", "conv2", "conv3"], "excluded")
    held = weights_of(model.with_name(f"model_{recipe}.onnx"))
    floats = {name for name, values in held.items() if re.fullmatch(r"w\d", name) and values.dtype == np.float32}
    assert floats == {"w0", "w2", "w3"}


@pytest.mark.parametrize(("recipe", "exclude"), [("int8-static", "Gemm"), ("int8", "Gemm"), ("int8", "^gemm$"), ("fp16", "Gemm")])
def test_an_excluded_op_type_stays_in_float_in_every_recipe(tmp_path: Path, vectors: Path, recipe: Any, exclude: str) -> None:
    model = save_vector_model(tmp_path / "m.onnx")
    given = vectors if recipe == "int8-static" else None
    result = only(quantize_onnx(model, recipe=recipe, calibration=given, exclude=[exclude]))
    rows = {row.op_type: (row.quantized, row.reason) for row in result.op_types}
    assert (rows["Gemm"], rows["MatMul"]) == ((0, "1 x excluded"), (1, ""))
    assert weights_of(tmp_path / f"m_{recipe}.onnx")["g"].dtype == np.float32


def test_nameless_nodes_are_excluded_by_the_names_that_they_have_in_products_and_reports(tmp_path: Path, tiles: Path) -> None:
    nodes, last = [], "image"
    for number, (given, made) in enumerate([(3, 8), (8, 8), (8, 3)]):
        value = numpy_helper.from_array(seeded(made, given, 3, 3, seed=number, scale=0.1))
        nodes += [
            helper.make_node("Constant", [], [f"w{number}"], value=value),
            helper.make_node("Conv", [last, f"w{number}"], [f"c{number}"], pads=[1] * 4),
        ]
        last = f"c{number}"
    model = save(tmp_path / "m.onnx", nodes, {"image": PICTURE}, {"c2": PICTURE})
    quantize_onnx(model, recipe="fp16")
    found = [node.name for node in onnx.load(str(tmp_path / "m_fp16.onnx")).graph.node if node.op_type == "Conv"]
    for number in (1, 2):
        output = tmp_path / f"{number}.onnx"
        skipped = only(quantize_onnx(model, output=output, calibration=tiles, exclude=[f"^{found[number]}$"])).skipped
        assert [op.name for op in skipped] == [found[number]]
        assert [name for name in ("w0", "w1", "w2") if name in weights_of(output)] == [f"w{number}"]


@pytest.mark.parametrize(
    ("exclude", "says"),
    [("nobody", r"matches no node and is no op type; got op types Conv, Relu"), ("(", "--exclude is no regular expression")],
)
def test_a_selector_that_selects_nothing_is_an_error(model: Path, exclude: str, says: str) -> None:
    with pytest.raises(ToolError, match=says):
        quantize_onnx(model, recipe="int8", exclude=[exclude])
    assert names(model.parent) == {"model.onnx"}


def test_excluding_everything_is_an_error_with_the_reasons(model: Path, tiles: Path) -> None:
    with pytest.raises(ToolError, match="recipe int8-static changes no op of this model; got Conv 4 x excluded"):
        quantize_onnx(model, calibration=tiles, exclude=["Conv"])
    assert names(model.parent) == {"model.onnx"}


def test_only_op_types_that_are_asked_for_are_quantized(tmp_path: Path, vectors: Path) -> None:
    model = save_vector_model(tmp_path / "m.onnx")
    rows = {row.op_type: row for row in only(quantize_onnx(model, calibration=vectors, set_options=["op_types=MatMul"])).op_types}
    assert (rows["MatMul"].quantized, rows["Gemm"].quantized) == (1, 0)
    assert "--set op_types" in rows["Gemm"].reason


def test_quantizing_twice_is_an_error(static: Quantized, tiles: Path, tmp_path: Path) -> None:
    assert static.product is not None
    with pytest.raises(ToolError, match=r"changes no op of this model; got quantized already: DequantizeLinear, QuantizeLinear"):
        quantize_onnx(static.product.path, output=tmp_path / "twice.onnx", calibration=tiles)
    assert not names(tmp_path)


# Settings of ONNX Runtime.


def test_help_lists_every_setting_with_its_values(run_tool: Run) -> None:
    done = run_tool("quantize_onnx", "--help")
    text = " ".join(re.sub("[│|]", " ", done.stdout).split())
    assert VALUES.keys() == OnnxSettings.__dataclass_fields__.keys()
    assert [name for name, values in VALUES.items() if f"{name}: {values}" not in text] == []


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("weight_type=uint8", "weight_type", "uint8"),
        ("per_channel=no", "per_channel", False),
        ("symmetric_weights=yes", "symmetric_weights", True),
        ("op_types=Conv,Gemm", "op_types", ("Conv", "Gemm")),
        ("calibration_method=entropy", "calibration_method", "entropy"),
    ],
)
def test_a_setting_changes_that_setting_alone(text: str, name: str, value: object) -> None:
    settings, default = vars(parse_settings([text], "int8-static")), vars(OnnxSettings())
    assert {key for key in default if settings[key] != default[key]} == {name}
    assert settings[name] == value


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["weights=int8"], "--set weights=int8: no such setting; expected NAME=VALUE, NAME one of activation_type, calibration_"),
        (["weight_type"], "--set weight_type: no such setting"),
        (["weight_type=int4"], "--set weight_type=int4: no such value; expected int8 or uint8"),
        (["per_channel=perhaps"], "--set per_channel=perhaps: no such value; expected yes or no"),
        (["calibration_method=best"], "--set calibration_method=best: no such value; expected minmax or entropy or percentile"),
        (["op_types="], "--set op_types=: no such value; expected op types, joined by commas"),
        (["format="], "--set format=: no such value; expected qdq or qoperator"),
        (["per_channel=yes", "per_channel=no"], "--set per_channel=no: the setting has a value already; give one"),
        (["op_types=LSTM"], "--set op_types: the model has no LSTM; got op types Conv, Relu"),
    ],
)
def test_a_wrong_setting_is_one_line(model: Path, tiles: Path, texts: list[str], says: str) -> None:
    with pytest.raises(ToolError) as caught:
        quantize_onnx(model, calibration=tiles, set_options=texts)
    assert says in str(caught.value)
    assert str(caught.value).isprintable()
    assert names(model.parent) == {"model.onnx"}


def test_the_type_of_activations_may_not_contradict_the_recipe(model: Path, tiles: Path) -> None:
    with pytest.raises(ToolError, match="--set activation_type=uint8 contradicts recipe int16x8; expected int16 or uint16"):
        quantize_onnx(model, recipe="int16x8", calibration=tiles, set_options=["activation_type=uint8"])
    assert parse_settings(["activation_type=int16"], "int16x8").activation_type == "int16"
    assert parse_settings([], "int16x8").activation_type == "uint16"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "recipe int8-static needs a calibration set; give --calibration"),
        ({"recipe": "int16x8"}, "recipe int16x8 needs a calibration set; give --calibration"),
        ({"recipe": "auto"}, "--recipe auto needs a limit to keep; give --min-psnr, --min-cosine or --max-error"),
        ({"recipe": "int8", "set_options": ["format=qdq"]}, "--set format does nothing in recipe int8"),
        ({"recipe": "int8", "set_options": ["activation_type=uint8"]}, "--set activation_type does nothing in recipe int8"),
        ({"recipe": "int8", "set_options": ["calibration_method=minmax"]}, "--set calibration_method does nothing in recipe int8"),
        (
            {"recipe": "int8", "set_options": ["symmetric_activations=yes"]},
            "--set symmetric_activations does nothing in recipe int8",
        ),
        (
            {"recipe": "fp16", "set_options": ["weight_type=int8", "reduce_range=yes"]},
            "--set weight_type, --set reduce_range does nothing in recipe fp16",
        ),
        ({"recipe": "fp16", "set_options": ["op_types=Conv"]}, "--set op_types does nothing in recipe fp16"),
        ({"recipe": "fp16", "calibration": Path("tiles")}, "--calibration does nothing in recipe fp16"),
        ({"recipe": "int8", "range_cache": Path("ranges.json")}, "--range-cache does nothing in recipe int8"),
        ({"recipe": "int8", "objective": "latency"}, "--objective latency does nothing in recipe int8"),
        ({"objective": "latency"}, "--objective does nothing without --max-error"),
        ({"recipe": "int8", "dask": "tcp://127.0.0.1:1"}, "--dask does nothing without --max-error or --sensitivity"),
        ({"recipe": "int8", "samples": 3}, "--samples does nothing without --calibration"),
        ({"recipe": "int8", "min_psnr": float("inf")}, "--min-psnr is not finite"),
        ({"recipe": "int8", "max_error": ["no number"]}, "--max-error is no positive number; got no number"),
        ({"recipe": "int8", "gate": ["speed=1"]}, "--gate speed=1: no such gate"),
    ],
)
def test_options_that_would_do_nothing_or_are_missing_are_refused(model: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ToolError, match=says):
        quantize_onnx(model, **options)
    assert names(model.parent) == {"model.onnx"}


@pytest.mark.parametrize("overflows", [True, False])
def test_a_cpu_whose_sums_overflow_is_reported(model: Path, monkeypatch: pytest.MonkeyPatch, overflows: bool) -> None:
    monkeypatch.setattr("tools.quantize_onnx.command.saturates", lambda: overflows)
    assert ("see --set reduce_range=yes" in quantize_onnx(model, recipe="int8").message) is overflows
    reduced = quantize_onnx(model, recipe="int8", set_options=["reduce_range=yes"], overwrite=True)
    assert "reduce_range" not in reduced.message


# Bad input.


def test_an_output_that_is_not_named_as_an_onnx_model_is_refused(model: Path) -> None:
    with pytest.raises(ToolError, match=r"the output is no \.onnx file"):
        quantize_onnx(model, output=model.with_name("m.tflite"), recipe="int8")
    assert names(model.parent) == {"model.onnx"}


@pytest.mark.parametrize("name", ["model", "model.pb"])
def test_a_model_that_is_not_named_as_one_is_refused_before_the_work(tmp_path: Path, name: str) -> None:
    model = save_picture_model(tmp_path / name, opset=10)
    with pytest.raises(ToolError, match=r"the model's name must end in \.onnx"):
        quantize_onnx(model, output=tmp_path / "out.onnx", recipe="int8")
    assert names(tmp_path) == {name}


FAULTS = {
    "missing": "no such model file",
    "empty": "the model file is empty",
    "html": "an HTML page",
    "lfs": "Git LFS pointer",
    "truncated": "not an ONNX model, or a damaged one",
    "weights missing": "the model's weights are missing",
    "weights elsewhere": "external weights must lie beside the model",
    "unknown op": "the model does not load",
    "no calibration": "recipe int8-static needs a calibration set",
    "no set": "no such calibration set",
    "output exists": "use --overwrite",
    "in place": "the output is the input",
    "no folder": "no such folder|cannot write",
}


def damage(model: Path, fault: str) -> None:
    """Do to a model what the fault says, where it is one of the file."""
    match fault:
        case "missing":
            model.unlink()
        case "empty":
            model.write_bytes(b"")
        case "html":
            model.write_text("<html>no model</html>")
        case "lfs":
            model.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        case "truncated":
            model.write_bytes(model.read_bytes()[: model.stat().st_size // 2])
        case "weights missing":
            with_external_weights(model).with_name("weights.data").unlink()
        case "weights elsewhere":
            with_external_weights(model).with_name("weights.data").rename(model.parent.parent / "weights.data")
            content = onnx.load(str(model), load_external_data=False)
            for tensor in content.graph.initializer:
                tensor.external_data[0].value = "../weights.data"
            model.write_bytes(content.SerializeToString())
        case "unknown op":
            content = onnx.load(str(model))
            content.graph.node[0].op_type = "Nonsense"
            model.write_bytes(content.SerializeToString())


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_one_line_exit_2_and_nothing_written(fault: str, model: Path, fork_server: ForkServer) -> None:
    output, options = model.with_name("out.onnx"), ["--recipe", "int8"]
    damage(model, fault)
    match fault:
        case "no calibration":
            options = []
        case "no set":
            options = ["--calibration", str(model.with_name("nowhere"))]
        case "output exists":
            output.write_text("precious")
        case "in place":
            output, options = model, [*options, "--overwrite"]
        case "no folder":
            output = model.parent / "absent" / "out.onnx"
    before = {path.name: path.read_bytes() for path in model.parent.iterdir()}
    done = fork_server.run("quantize_onnx", model, "-o", output, *options, folder=model.parent)
    assert (done.code, done.stdout) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr)
    assert re.search(FAULTS[fault], done.stderr)
    assert {path.name: path.read_bytes() for path in model.parent.iterdir()} == before


def test_an_error_on_the_command_line_is_an_object_with_json(model: Path, run_tool: Run) -> None:
    done = run_tool("quantize_onnx", model, "--set", "weight_type=int4", "--recipe", "int8", "--json")
    assert done.returncode == 2
    assert "expected int8 or uint8" in done.stderr
    assert "weight_type=int4" in json.dumps(json.loads(done.stdout))


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["external_data_missing.onnx", "mangled.onnx", "html_page.task", "mangled_a.tflite"])
def test_corrupt_files_are_one_line_exit_2_and_nothing_written(name: str, tmp_path: Path, fork_server: ForkServer) -> None:
    (tmp_path / "out").mkdir()
    source, output = REALDATA / "corrupt" / name, tmp_path / "out" / "out.onnx"
    done = fork_server.run("quantize_onnx", source, "-o", output, "--recipe", "int8", folder=output.parent)
    assert (done.code, done.stdout) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr)
    assert not list(output.parent.iterdir())
