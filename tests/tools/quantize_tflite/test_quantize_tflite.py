"""There is a reason for every layer that stays, a recipe that does nothing is an error, and every product is measured."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter

from shared.command.dry_run import DryRun
from shared.command.errors import ToolError
from shared.files.checksums import sha256_of
from shared.formats.model_file import ModelFile
from shared.formats.tflite import read_tflite
from shared.media.images import image_files, read_pixels, stretch
from shared.quantize.product import Quantized
from shared.quantize.result import ModelResult
from shared.runtime.model import open_model
from tests.conftest import REALDATA, ROOT, Miniseal, Run
from tests.support.fork_server import ForkServer
from tools.quantize_tflite import command, quantize_tflite
from tools.quantize_tflite.recipes import resolve_recipe

LAYERS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
LABELS = {"labels.txt": b"cat\n"}


Recipes = Callable[[str], Quantized]


@pytest.fixture(scope="module")
def quantized(float_model: Path, tiles: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipes:
    """Return a function that gives the product of a recipe, made once, of the small network with labels in its file."""
    folder, made = tmp_path_factory.mktemp("products"), dict[str, Quantized]()
    source = Path(shutil.copy(float_model, folder / "model.tflite"))
    with zipfile.ZipFile(source, "a") as archive:
        for name, content in LABELS.items():
            archive.writestr(name, content)

    def product(recipe: str) -> Quantized:
        if recipe not in made:
            made[recipe] = quantize_tflite(source, recipe=recipe, calibration=tiles if recipe == "int8-static" else None)
        return made[recipe]

    return product


def path_of(done: Quantized) -> Path:
    assert done.product is not None
    return done.product.path


def result_of(done: Quantized) -> ModelResult:
    [result] = done.result.models
    return result


def rows_of(done: Quantized) -> dict[str, Any]:
    return {row.op_type: row for row in result_of(done).op_types}


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
def test_every_layer_is_quantized_and_every_other_has_a_reason(
    quantized: Recipes, recipe: str, dtypes: set[str], least: float, most: float
) -> None:
    done = quantized(recipe)
    rows = rows_of(done)
    for op_type in LAYERS:
        row = rows[op_type]
        assert (row.quantized, row.quantized_weight_bytes, row.reason) == (row.ops, row.weight_bytes, "")
        assert set(row.dtypes) <= dtypes
        assert row.bytes_after < row.weight_bytes
    assert rows["ADD"].quantized == 0
    assert "no rule supports this op type" in rows["ADD"].reason
    assert least < path_of(done).stat().st_size / done.source.stat().st_size < most
    assert path_of(done) == done.source.with_name(f"model_{recipe}.tflite")


def test_int4_leaves_no_depthwise_convolution_in_float(quantized: Recipes) -> None:
    types = {op.op_type: op.dtype for op in read_tflite(path_of(quantized("int4"))).ops if op.op_type in LAYERS}
    assert types == {"CONV_2D": "INT4", "DEPTHWISE_CONV_2D": "INT8", "FULLY_CONNECTED": "INT4"}


def test_metadata_and_label_files_are_kept(quantized: Recipes) -> None:
    done = quantized("int8")
    assert ModelFile(path_of(done)).metadata == ModelFile(done.source).metadata != {}
    with zipfile.ZipFile(path_of(done)) as archive:
        assert {name: archive.read(name) for name in LABELS} == LABELS


@pytest.mark.parametrize("short_names", [False, True])
def test_a_product_is_no_executable_file(model: Path, short_names: bool) -> None:
    done = quantize_tflite(model, recipe="fp16", short_names=short_names)
    assert path_of(done).stat().st_mode & 0o111 == 0
    assert (result_of(done).saved_name_bytes > 0) is short_names
    assert {row.op_type: row.quantized for row in result_of(done).op_types if row.quantized} == {
        "CONV_2D": 5,
        "DEPTHWISE_CONV_2D": 5,
        "FULLY_CONNECTED": 11,
    }


def test_the_same_input_gives_the_same_bytes(quantized: Recipes, tmp_path: Path) -> None:
    first = quantized("int8")
    again = quantize_tflite(first.source, output=tmp_path / "again.tflite")
    assert path_of(again).read_bytes() == path_of(first).read_bytes()


def test_every_product_is_run_beside_its_original(quantized: Recipes) -> None:
    result = result_of(quantized("int8"))
    assert [candidate.label for candidate in result.candidates] == ["original", "int8"]
    assert all(candidate.measurement and candidate.measurement.median_ms > 0 for candidate in result.candidates)
    assert result.product is not None
    assert [0 < (error.relative_error or 0) < 0.2 for error in result.product.errors] == [True]
    assert (result.interleaved, result.measured_on, result.unmeasured) == (True, "8 seeded samples", "")


def test_the_models_run_on_the_threads_that_are_asked_for(model: Path) -> None:
    assert result_of(quantize_tflite(model, threads=1, recipe="fp16")).threads == 1


def test_a_recipe_file_of_ai_edge_quantizer_is_taken_as_it_is(model: Path) -> None:
    _, rules = resolve_recipe("int8")
    rules[0]["operation"] = "FULLY_CONNECTED"
    path = model.with_name("fc_only.json")
    path.write_text(json.dumps(rules))
    rows = rows_of(quantize_tflite(model, recipe=str(path)))
    assert rows["FULLY_CONNECTED"].quantized == rows["FULLY_CONNECTED"].ops
    assert rows["CONV_2D"].quantized == 0
    assert "no rule matches" in rows["CONV_2D"].reason


def test_a_rule_that_only_excludes_needs_no_configuration(model: Path) -> None:
    _, rules = resolve_recipe("int8")
    path = model.with_name("r.json")
    path.write_text(json.dumps([*rules, {"regex": "^.*", "operation": "CONV_2D", "algorithm_key": "no_quantize"}]))
    rows = rows_of(quantize_tflite(model, recipe=str(path)))
    assert (rows["CONV_2D"].quantized, rows["CONV_2D"].reason) == (0, "5 x excluded by a rule")


def test_a_recipe_that_changes_nothing_is_an_error(model: Path) -> None:
    _, rules = resolve_recipe("int8")
    rules[0]["regex"] = "no op is called this"
    path = model.with_name("nothing.json")
    path.write_text(json.dumps(rules))
    with pytest.raises(ToolError, match=r"changes no op of this model.*no rule matches"):
        quantize_tflite(model, recipe=str(path))
    assert {file.name for file in model.parent.iterdir()} == {"model.tflite", "nothing.json"}


@pytest.mark.parametrize(
    ("before", "recipe", "says"),
    [
        ("int8", "int8", "weights are INT8, quantized already"),
        ("fp16", "fp16", r"changes no op of this model; got .*weights were FLOAT16 already"),
    ],
)
def test_quantizing_twice_is_an_error(quantized: Recipes, tmp_path: Path, before: str, recipe: str, says: str) -> None:
    with pytest.raises(ToolError, match=says):
        quantize_tflite(path_of(quantized(before)), output=tmp_path / "twice.tflite", recipe=recipe)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "fault", ["missing", "empty", "text", "truncated", "unknown recipe", "static", "output exists", "in place"]
)
def test_bad_input_is_one_line_exit_2_and_nothing_written(fault: str, model: Path, fork_server: ForkServer) -> None:
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
    done = fork_server.run("quantize_tflite", model, "-o", output, *options, folder=model.parent)
    assert (done.code, done.stdout) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr)
    assert {path.name: path.read_bytes() for path in model.parent.iterdir()} == before


@pytest.mark.realdata
@pytest.mark.parametrize("name", sorted(path.name for path in (REALDATA / "corrupt").glob("*")))
def test_corrupt_files_are_one_line_exit_2_and_nothing_written(name: str, tmp_path: Path, fork_server: ForkServer) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    done = fork_server.run("quantize_tflite", REALDATA / "corrupt" / name, "-o", folder / "out", folder=folder)
    assert (done.code, done.stdout) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr)
    assert not list(folder.iterdir())


def test_a_device_is_no_model() -> None:
    with pytest.raises(ToolError, match="the model is no regular file"):
        quantize_tflite(Path("/dev/null"))


COUNT_OPENS = """
import sys
from pathlib import Path

model, product, opens = sys.argv[1], sys.argv[2], []
sys.addaudithook(lambda event, args: opens.append(1) if event == "open" and str(args[0]) == model else None)
from tools.quantize_tflite import quantize_tflite
quantize_tflite(Path(model), output=Path(product), recipe="int8")
print(len(opens))
"""


def test_the_tool_opens_a_model_three_times_at_most(model: Path) -> None:
    """To tell its type, to hash it, and to parse it; the work is done in processes of its own."""
    run = [sys.executable, "-c", COUNT_OPENS, str(model), str(model.with_name("out.tflite"))]
    done = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT)
    assert 1 <= int(done.stdout) <= 3


# From the wild.


@pytest.mark.realdata
def test_a_real_float_model_is_quantized(tmp_path: Path) -> None:
    source = REALDATA / "tflite" / "mlperf_tiny_resnet_float.tflite"
    done = quantize_tflite(source, output=tmp_path / "m.tflite")
    counts = {op_type: row.quantized for op_type, row in rows_of(done).items() if op_type in LAYERS}
    assert counts == {"CONV_2D": 9, "FULLY_CONNECTED": 1}
    assert path_of(done).stat().st_size < 0.5 * source.stat().st_size


@pytest.mark.realdata
@pytest.mark.parametrize(
    "name",
    [
        "mediapipe/selfie_segmenter.tflite",  # float16 weights, and a custom op that the plain kernels lack
        "mediapipe/face_detection_front_fp32.tflite",  # op codes in the deprecated field
        "mediapipe/pose_detection.tflite",  # sparse float16 weights
        "mediapipe/face_landmark_with_attention.tflite",  # custom ops in the middle
        "tflite/mobilenet_v1_0.25_224_float_metadata.tflite",
        "tflite/mlperf_tiny_resnet_float.tflite",
    ],
)
def test_models_from_the_wild_are_covered_by_int8_weights(name: str, tmp_path: Path) -> None:
    source, output = REALDATA / name, tmp_path / "m.tflite"
    done = quantize_tflite(source, output=output, recipe="int8-weight-only", gate=["min_coverage=0.99"])
    assert done.ok
    assert (result_of(done).coverage or 0) >= 0.99
    assert ModelFile(output).input_range == ModelFile(source).input_range
    if "metadata" in name:
        assert ModelFile(output).input_range == (-1.0, 1.0)
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(output) as new:
            assert {entry: old.read(entry) for entry in old.namelist()} == {entry: new.read(entry) for entry in new.namelist()}


@pytest.mark.realdata
def test_a_model_from_the_wild_that_is_quantized_already_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="weights are INT8, quantized already"):
        quantize_tflite(REALDATA / "tflite" / "mlperf_tiny_resnet_int8.tflite", output=tmp_path / "m.tflite")
    assert not list(tmp_path.iterdir())


@pytest.mark.realdata
def test_custom_ops_that_the_runtime_has_are_run(tmp_path: Path) -> None:
    """XNNPACK knows MediaPipe's Convolution2DTransposeBias; the plain kernels don't."""
    source = REALDATA / "mediapipe" / "selfie_segmenter.tflite"
    done = quantize_tflite(source, output=tmp_path / "m.tflite", recipe="int8-weight-only", calibration=REALDATA / "images")
    result = result_of(done)
    assert result.product is not None and result.product.errors
    assert "samples that were calibrated with, too" in result.measured_on
    assert result.corrected_biases > 0


@pytest.mark.realdata
def test_custom_ops_that_the_runtime_lacks_leave_a_model_unmeasured(tmp_path: Path) -> None:
    source = REALDATA / "mediapipe" / "face_landmark_with_attention.tflite"
    result = result_of(quantize_tflite(source, output=tmp_path / "m.tflite"))
    assert (result.unmeasured, result.candidates) == ("the runtime here lacks ops of this model", [])
    with pytest.raises(ToolError, match="lacks ops of this model: samples can't be run through it"):
        quantize_tflite(source, output=tmp_path / "n.tflite", calibration=REALDATA / "images")


# Rules and gates.


def test_rules_change_single_op_types_and_the_written_recipe_gives_the_same_bytes(model: Path) -> None:
    done = quantize_tflite(model, rule=["FULLY_CONNECTED=fp16"], exclude=["DEPTHWISE_CONV_2D"])
    rows = rows_of(done)
    assert {kind: rows[kind].dtypes for kind in LAYERS} == {
        "CONV_2D": ["INT8"],
        "DEPTHWISE_CONV_2D": ["FLOAT32"],
        "FULLY_CONNECTED": ["FLOAT16"],
    }
    assert rows["DEPTHWISE_CONV_2D"].reason == "5 x excluded by a rule"
    recipe = model.with_name("model_int8_recipe.json")
    again = quantize_tflite(model, output=model.with_name("again.tflite"), recipe=str(recipe))
    assert path_of(again).read_bytes() == path_of(done).read_bytes()


@pytest.mark.parametrize("option", ["rule", "exclude", "only"])
def test_a_selector_that_matches_no_op_is_an_error(model: Path, option: str) -> None:
    chosen = "nobody=fp16" if option == "rule" else "nobody"
    with pytest.raises(ToolError, match="no op matches 'nobody'; op types here: "):
        quantize_tflite(model, **{option: [chosen]})  # type: ignore[arg-type]


def test_a_rule_of_a_file_that_matches_no_op_is_an_error(model: Path) -> None:
    _, rules = resolve_recipe("int8")
    path = model.with_name("r.json")
    path.write_text(json.dumps([*rules, {**rules[0], "regex": "nobody"}]))
    with pytest.raises(ToolError, match=r"rules that match no op: \* 'nobody'"):
        quantize_tflite(model, recipe=str(path))


def test_broken_gates_are_reported_and_nothing_is_written(model: Path) -> None:
    gates = ["min_coverage=0.999", "min_speedup=1000", "min_cosine=0.5", "max_size_mb=0.001", "max_error=1", "min_psnr=1"]
    done = quantize_tflite(model, exclude=["DEPTHWISE_CONV_2D"], gate=gates)
    assert (done.ok, done.product) == (False, None)
    assert {gate.name: gate.ok for gate in done.result.gates} == {
        "min_coverage": False,
        "min_speedup": False,
        "min_cosine": True,
        "max_size_mb": False,
        "max_error": True,
        "min_psnr": False,  # it makes no images
    }
    assert re.match(
        r"FAILED: min_coverage 0\.\d+, limit 0\.999; min_speedup .*min_psnr not measured, limit 1; nothing", done.message
    )
    assert [file.name for file in model.parent.iterdir()] == ["model.tflite"]


def test_a_gate_may_be_about_one_output(model: Path) -> None:
    done = quantize_tflite(model, gate=["max_error=1", "max_error:output_0=1e-9"])
    assert [(gate.name, gate.ok) for gate in done.result.gates] == [("max_error", True), ("max_error:output_0", False)]


def test_an_unknown_gate_is_refused(model: Path) -> None:
    with pytest.raises(ToolError, match=r"--gate min_beauty=1: no such gate; expected NAME=VALUE, NAME one of max_error, "):
        quantize_tflite(model, gate=["min_beauty=1"])


def test_a_broken_gate_exits_1_with_the_table(model: Path, run_tool: Run) -> None:
    done = run_tool("quantize_tflite", model, "--exclude", "CONV_2D", "--gate", "min_coverage=0.95")
    assert done.returncode == 1
    assert "FAILED: min_coverage 0." in done.stdout
    assert "excluded by a rule" in done.stdout


# Static quantization.


def test_static_int8_keeps_float_ends_and_its_statistics(quantized: Recipes, tmp_path: Path) -> None:
    done = quantized("int8-static")
    result = result_of(done)
    assert {row.op_type for row in result.op_types if row.quantized} >= {"CONV_2D", "FULLY_CONNECTED", "ADD"}
    assert result.product is not None
    [error] = result.product.errors
    assert error.cosine is not None and error.cosine > 0.98
    statistics = path_of(done).with_name("model_int8-static_calibration.json")
    assert result.calibration_sha256 == sha256_of(statistics)
    again = quantize_tflite(done.source, output=tmp_path / "again.tflite", recipe="int8-static", calibration=statistics)
    assert path_of(again).read_bytes() == path_of(done).read_bytes()


def test_static_int8_ends_are_integers_where_asked_for(model: Path, tiles: Path) -> None:
    done = quantize_tflite(model, recipe="int8-static", calibration=tiles, io_dtype="int8")
    with open_model(ModelFile(path_of(done))) as opened:
        assert {spec.dtype for spec in (*opened.inputs, *opened.outputs)} == {"int8"}
    result = result_of(done)
    assert result.product is not None
    assert (result.product.errors, result.product.problem) == ([], "")  # of other types than the reference's


@pytest.mark.parametrize(("recipe", "io_dtype"), [("int8-static", "int16"), ("int16x8", "int8"), ("int8", "int8")])
def test_ends_that_do_not_fit_the_recipe_are_refused(model: Path, tiles: Path, recipe: str, io_dtype: str) -> None:
    with pytest.raises(ToolError, match=f"--io-dtype {io_dtype} does not fit the recipe"):
        quantize_tflite(model, recipe=recipe, calibration=tiles, io_dtype=io_dtype)  # type: ignore[arg-type]


def test_statistics_that_fit_neither_the_model_nor_the_recipe_are_refused(
    quantized: Recipes, miniseal: Miniseal, tmp_path: Path
) -> None:
    done = quantized("int8-static")
    statistics = path_of(done).with_name("model_int8-static_calibration.json")
    with pytest.raises(ToolError, match="statistics are of another model"):
        quantize_tflite(miniseal.float_model, output=tmp_path / "m.tflite", recipe="int8-static", calibration=statistics)
    with pytest.raises(ToolError, match="calibration statistics are for static recipes"):
        quantize_tflite(done.source, output=tmp_path / "m.tflite", recipe="int8", calibration=statistics)


def test_samples_of_another_range_are_refused(model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "wide.npz", images=np.linspace(0, 255, 2 * 3 * 64 * 64, dtype=np.float32).reshape(2, 3, 64, 64))
    with pytest.raises(ToolError, match="of another range than the model's input; got values from 0 to 255; expected 0 to 1"):
        quantize_tflite(model, recipe="int8-static", calibration=tmp_path / "wide.npz")


def test_static_recipes_ask_for_the_memory_that_calibration_takes(model: Path, tiles: Path) -> None:
    needs = []
    for options in ({}, {"recipe": "int8-static", "calibration": tiles}):
        with pytest.raises(DryRun) as caught:
            quantize_tflite(model, **options, dry_run=True)  # type: ignore[arg-type]
        needs.append(caught.value.result.forecasts[0].needs.memory_bytes - command.BASE_MEMORY)
    assert needs == [int(model.stat().st_size * factor) for factor in (0.3, 4.5)]


@pytest.mark.realdata
def test_static_int8_is_as_small_and_as_true_as_mlperfs_own(tmp_path: Path) -> None:
    source, theirs = (REALDATA / "tflite" / f"mlperf_tiny_resnet_{kind}.tflite" for kind in ("float", "int8"))
    rng = np.random.default_rng(0)
    tiles = []
    for file in image_files(REALDATA / "images"):
        pixels = read_pixels(file)
        for _ in range(20):
            size = int(rng.integers(32, min(pixels.shape[:2]) // 2))
            y, x = (int(rng.integers(0, side - size)) for side in pixels.shape[:2])
            tiles.append(stretch(pixels[y : y + size, x : x + size], 32))
    tiles = list(rng.permutation(np.stack(tiles)))
    np.savez(tmp_path / "tiles.npz", images=np.stack(tiles[:-50]))
    options = {"recipe": "int8-static", "calibration": tmp_path / "tiles.npz", "input_range": "0..255"}
    done = quantize_tflite(source, output=tmp_path / "m.tflite", **options)  # type: ignore[arg-type]
    assert path_of(done).stat().st_size <= 1.1 * theirs.stat().st_size
    exact, ours, mlperf = (_answers(path, tiles[-50:]) for path in (source, tmp_path / "m.tflite", theirs))
    assert _cosine(exact, ours) >= _cosine(exact, mlperf)


def _answers(path: Path, tiles: list[np.ndarray]) -> np.ndarray:
    """Return float answers, inputs and outputs scaled as an integer model's file says."""
    interpreter = Interpreter(model_path=str(path))
    interpreter.allocate_tensors()
    [given], [made] = interpreter.get_input_details(), interpreter.get_output_details()
    answers = []
    for tile in tiles:
        values = tile[np.newaxis].astype(np.float32)
        if given["dtype"] == np.int8:
            scale, zero = given["quantization"]
            values = np.clip(np.round(values / scale + zero), -128, 127).astype(np.int8)
        interpreter.set_tensor(given["index"], values)
        interpreter.invoke()
        answer = interpreter.get_tensor(made["index"]).astype(np.float32).ravel()
        scale, zero = made["quantization"] if made["dtype"] == np.int8 else (1, 0)
        answers.append((answer - zero) * scale)
    return np.array(answers)


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float((one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other))


# Nothing is replaced that is not the tool's, and no option is passed over in silence.


@pytest.mark.parametrize("page", ["model.tflite", "out.tflite", "out_recipe.json", "r.json", "nowhere/page.html"])
def test_a_page_in_as_of_another_file_is_refused_before_any_work(model: Path, page: str) -> None:
    recipe = model.with_name("r.json")
    recipe.write_text(json.dumps(resolve_recipe("int8")[1]))
    before = {path.name: path.read_bytes() for path in model.parent.iterdir()}
    with pytest.raises(ToolError, match=r"the report would replace a file|no such folder"):
        quantize_tflite(model, output=model.with_name("out.tflite"), recipe=str(recipe), html=model.parent / page, overwrite=True)
    assert {path.name: path.read_bytes() for path in model.parent.iterdir()} == before


@pytest.mark.parametrize("name", ["model_int8_recipe.json", "model_int8_node_data.json"])
def test_a_file_of_others_next_to_the_product_is_kept(model: Path, name: str) -> None:
    other = model.with_name(name)
    other.write_text("precious")
    with pytest.raises(ToolError, match=rf"{re.escape(name)}: a file next to the output would be replaced"):
        quantize_tflite(model, sensitivity=True)
    assert other.read_text() == "precious"


def test_a_recipe_that_is_read_is_not_written_over(model: Path) -> None:
    recipe = model.with_name("out_recipe.json")
    recipe.write_text(json.dumps(resolve_recipe("int8")[1]))
    with pytest.raises(ToolError, match="would replace one that is read"):
        quantize_tflite(model, output=model.with_name("out.tflite"), recipe=str(recipe), overwrite=True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"samples": 3}, "--samples does nothing without --calibration"),
        ({"objective": "latency"}, "--objective does nothing without --max-error"),
        ({"correct_bias": False}, "--no-correct-bias does nothing without --calibration"),
        ({"dask": "tcp://127.0.0.1:1"}, "--dask does nothing without --max-error or --sensitivity"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(model: Path, options: dict[str, object], says: str) -> None:
    with pytest.raises(ToolError, match=says):
        quantize_tflite(model, **options)  # type: ignore[arg-type]
