"""Every layer's fate is told, and a recipe that does nothing is an error."""

import json
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from tools.quantize_tflite.pair import Measured

from shared.command.dry_run import DryRun
from shared.command.errors import ToolError
from shared.formats.model_file import ModelFile
from shared.formats.tensors import TensorSpec
from shared.formats.tflite import declared_range, read_metadata, read_ops
from shared.media.images import image_files, read_pixels, stretch
from shared.runtime.model import open_model
from shared.runtime.samples import sample_inputs
from tests.conftest import REALDATA, Miniseal, Run
from tools.quantize_tflite import pipeline, quantize_tflite
from tools.quantize_tflite.recipes import resolve_recipe

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
    rows = {row.op_type: row for row in result.found.models[0].op_types}
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
    types = {op.op_type: op.dtype for op in read_ops(model.with_name("model_int4.tflite")) if op.op_type in LAYERS}
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
    rows = {row.op_type: row for row in quantize_tflite(model, recipe=str(path)).found.models[0].op_types}
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
    assert {row.op_type: row.quantized for row in result.found.models[0].op_types if row.op_type in LAYERS} == {
        "CONV_2D": 9,
        "FULLY_CONNECTED": 1,
    }
    assert result.product.size_bytes < 0.5 * source.stat().st_size


def test_a_rule_that_only_excludes_needs_no_configuration(model: Path) -> None:
    _, rules = resolve_recipe("int8")
    path = model.with_name("r.json")
    path.write_text(json.dumps([*rules, {"regex": "^.*", "operation": "CONV_2D", "algorithm_key": "no_quantize"}]))
    rows = {row.op_type: row for row in quantize_tflite(model, recipe=str(path)).found.models[0].op_types}
    assert (rows["CONV_2D"].quantized, rows["CONV_2D"].reason) == (0, "5 x excluded by a rule")


# From the wild.


@pytest.mark.realdata
@pytest.mark.parametrize(
    "name",
    [
        "mediapipe/selfie_segmenter.tflite",  # float16 weights, and a custom op that the runtime here lacks
        "mediapipe/face_detection_front_fp32.tflite",  # op codes in the deprecated field
        "mediapipe/pose_detection.tflite",  # sparse float16 weights
        "mediapipe/face_landmark_with_attention.tflite",  # custom ops in the middle
        "tflite/mobilenet_v1_0.25_224_float_metadata.tflite",
        "tflite/mlperf_tiny_resnet_float.tflite",
    ],
)
def test_models_from_the_wild_are_covered_by_int8_weights(name: str, tmp_path: Path) -> None:
    result = quantize_tflite(REALDATA / name, output=tmp_path / "m.tflite", recipe="int8-weight-only", require_coverage=0.99)
    assert result.ok
    assert result.found.models[0].coverage >= 0.99  # type: ignore[operator]


@pytest.mark.realdata
def test_metadata_and_labels_of_a_real_model_stay(tmp_path: Path) -> None:
    source = REALDATA / "tflite" / "mobilenet_v1_0.25_224_float_metadata.tflite"
    quantize_tflite(source, output=tmp_path / "m.tflite", recipe="int8-weight-only")
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(tmp_path / "m.tflite") as new:
        assert {name: old.read(name) for name in old.namelist()} == {name: new.read(name) for name in new.namelist()}
    assert declared_range(tmp_path / "m.tflite") == (-1.0, 1.0)


@pytest.mark.realdata
def test_what_is_quantized_already_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="weights are INT8, quantized already"):
        quantize_tflite(REALDATA / "tflite" / "mlperf_tiny_resnet_int8.tflite", output=tmp_path / "m.tflite")
    assert not list(tmp_path.iterdir())


def test_float16_weights_stay_what_they_are_and_that_is_an_error(model: Path) -> None:
    half = quantize_tflite(model, recipe="fp16").product.path  # type: ignore[union-attr]
    with pytest.raises(ToolError, match=r"changes no op of this model; got .*weights were FLOAT16 already"):
        quantize_tflite(half, output=model.with_name("again.tflite"), recipe="fp16")


@pytest.mark.realdata
@pytest.mark.parametrize("name", sorted(path.name for path in (REALDATA / "corrupt").glob("*")))
def test_corrupt_files_are_one_line_exit_2_and_nothing_written(name: str, tmp_path: Path, run_tool: Run) -> None:
    done = run_tool("quantize_tflite", REALDATA / "corrupt" / name, "-o", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr)
    assert not list(tmp_path.iterdir())


# Rules and limits.


def test_rules_change_single_op_types_and_layers(model: Path) -> None:
    result = quantize_tflite(model, rule=["FULLY_CONNECTED=fp16"], exclude=["DEPTHWISE_CONV_2D"])
    rows = {row.op_type: row for row in result.found.models[0].op_types}
    assert {kind: rows[kind].dtypes for kind in LAYERS} == {
        "CONV_2D": ["INT8"],
        "DEPTHWISE_CONV_2D": ["FLOAT32"],
        "FULLY_CONNECTED": ["FLOAT16"],
    }
    assert rows["DEPTHWISE_CONV_2D"].reason == "5 x excluded by a rule"


def test_the_written_recipe_gives_the_same_bytes_again(model: Path) -> None:
    one = quantize_tflite(model, rule=["FULLY_CONNECTED=fp16"], exclude=["DEPTHWISE_CONV_2D"])
    recipe = model.with_name("model_int8_recipe.json")
    again = quantize_tflite(model, output=model.with_name("again.tflite"), recipe=str(recipe))
    assert one.product.sha256 == again.product.sha256  # type: ignore[union-attr]


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


@pytest.mark.parametrize(
    ("limit", "says"),
    [({"require_coverage": 0.999}, "coverage of weight bytes"), ({"min_speedup": 1000.0}, "speed-up")],
)
def test_a_broken_limit_is_told_and_nothing_is_shipped(model: Path, limit: dict[str, float], says: str) -> None:
    result = quantize_tflite(model, exclude=["DEPTHWISE_CONV_2D"], **limit)  # type: ignore[arg-type]
    assert (result.ok, result.product) == (False, None)
    assert says in result.message
    assert [file.name for file in model.parent.iterdir()] == ["model.tflite"]


def test_a_broken_limit_exits_1_with_the_table(model: Path, run_tool: Run) -> None:
    done = run_tool("quantize_tflite", model, "--exclude", "CONV_2D", "--require-coverage", "0.95")
    assert done.returncode == 1
    assert "FAILED: model.tflite coverage of weight bytes" in done.stdout


def test_every_product_is_run_beside_its_original(model: Path) -> None:
    measured = quantize_tflite(model).found.models[0].measured
    assert isinstance(measured, Measured)
    assert measured.before_ms > 0
    assert [0 < answer.damage.relative_error < 0.2 for answer in measured.answers] == [True]  # type: ignore[operator]


def test_files_beside_the_product_are_not_replaced(model: Path) -> None:
    other = model.with_name("model_int8_recipe.json")
    other.write_text("precious")
    with pytest.raises(ToolError, match=r"model_int8_recipe\.json: a file beside the output would be replaced"):
        quantize_tflite(model)
    assert other.read_text() == "precious"


# Static quantization.


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    """Seeded pictures as the small network takes them."""
    path = tmp_path / "set" / "tiles.npz"
    path.parent.mkdir()
    specs = [TensorSpec("images", (1, 3, 64, 64), "float32")]
    np.savez(path, images=np.concatenate([sample_inputs(specs, seed)["images"] for seed in range(8)]))
    return path


def test_static_int8_keeps_float_ends_and_its_statistics(model: Path, tiles: Path) -> None:
    result = quantize_tflite(model, recipe="int8-static", calibration=tiles)
    pressed = result.found.models[0]
    assert {row.op_type for row in pressed.op_types if row.quantized} >= {"CONV_2D", "FULLY_CONNECTED", "ADD"}
    assert isinstance(pressed.measured, Measured)
    [answer] = pressed.measured.answers
    assert answer.damage.cosine > 0.98  # type: ignore[operator]
    statistics = model.with_name("model_int8-static_calibration.json")
    again = quantize_tflite(model, output=model.with_name("again.tflite"), recipe="int8-static", calibration=statistics)
    assert again.product.sha256 == result.product.sha256  # type: ignore[union-attr]


def test_a_product_whose_statistics_are_lost_or_changed_is_made_again(model: Path, tiles: Path) -> None:
    first = quantize_tflite(model, recipe="int8-static", calibration=tiles)
    statistics = model.with_name("model_int8-static_calibration.json")
    whole = statistics.read_bytes()
    again = quantize_tflite(model, recipe="int8-static", calibration=tiles, refresh=True)
    assert again.product.up_to_date  # type: ignore[union-attr]
    for disturb in (statistics.unlink, lambda: statistics.write_bytes(whole.replace(b"0", b"1", 1))):
        disturb()
        mended = quantize_tflite(model, recipe="int8-static", calibration=tiles, refresh=True)
        assert not mended.product.up_to_date and mended.product.sha256 == first.product.sha256  # type: ignore[union-attr]
        assert statistics.read_bytes() == whole


def test_static_int8_ends_are_integers_where_asked_for(model: Path, tiles: Path) -> None:
    quantize_tflite(model, output=model.with_name("q.tflite"), recipe="int8-static", calibration=tiles, io_dtype="int8")
    with open_model(ModelFile(model.with_name("q.tflite"))) as opened:
        assert {spec.dtype for spec in (*opened.inputs, *opened.outputs)} == {"int8"}


@pytest.mark.parametrize(("recipe", "io_dtype"), [("int8-static", "int16"), ("int16x8", "int8"), ("int8", "int8")])
def test_ends_that_do_not_fit_the_recipe_are_refused(model: Path, tiles: Path, recipe: str, io_dtype: str) -> None:
    with pytest.raises(ToolError, match=f"--io-dtype {io_dtype} does not fit the recipe"):
        quantize_tflite(model, recipe=recipe, calibration=tiles, io_dtype=io_dtype)  # type: ignore[arg-type]


def test_statistics_of_another_model_are_refused(model: Path, tiles: Path, miniseal: Miniseal) -> None:
    quantize_tflite(model, recipe="int8-static", calibration=tiles)
    statistics = model.with_name("model_int8-static_calibration.json")
    with pytest.raises(ToolError, match="statistics are of another model"):
        quantize_tflite(miniseal.float_model, output=model.with_name("m.tflite"), recipe="int8-static", calibration=statistics)


def test_samples_of_another_range_are_refused(model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "wide.npz", images=np.linspace(0, 255, 2 * 3 * 64 * 64, dtype=np.float32).reshape(2, 3, 64, 64))
    with pytest.raises(ToolError, match="of another range than the model's input; got values from 0 to 255; expected 0 to 1"):
        quantize_tflite(model, recipe="int8-static", calibration=tmp_path / "wide.npz")


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
    result = quantize_tflite(source, output=tmp_path / "m.tflite", **options)  # type: ignore[arg-type]
    assert result.product.size_bytes <= 1.1 * theirs.stat().st_size  # type: ignore[union-attr]
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


# Bundles.


@pytest.fixture
def bundle(model: Path, tmp_path: Path) -> Path:
    """A bundle with a model, a bundle in it, and something else."""
    path, inner = tmp_path / "b.task", tmp_path / "inner.task"
    with zipfile.ZipFile(inner, "w") as archive:
        archive.write(model, "second.tflite")
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(model, "first.tflite")
        archive.writestr("geometry.binarypb", b"\x00\x01\x02")
        archive.write(inner, "inner.task")
    inner.unlink()
    return path


def entries(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_bundle_without_rules_keeps_every_byte(bundle: Path, tmp_path: Path) -> None:
    result = quantize_tflite(bundle, output=tmp_path / "out.task", recipe="none")
    before, after = entries(bundle), entries(tmp_path / "out.task")
    assert (before["first.tflite"], before["geometry.binarypb"]) == (after["first.tflite"], after["geometry.binarypb"])
    (tmp_path / "in.task").write_bytes(after["inner.task"])
    assert entries(tmp_path / "in.task")["second.tflite"] == before["first.tflite"]
    assert result.found.unchanged == ["first.tflite", "geometry.binarypb", "inner.task/second.tflite"]


def test_each_model_of_a_bundle_takes_its_own_rule(bundle: Path, tmp_path: Path) -> None:
    chosen = ["inner.task/second.tflite=none", "first.tflite:FULLY_CONNECTED=fp16"]
    result = quantize_tflite(bundle, output=tmp_path / "out.task", rule=chosen)
    [pressed] = result.found.models
    dtypes = {row.op_type: row.dtypes for row in pressed.op_types}
    assert (pressed.name, dtypes["CONV_2D"], dtypes["FULLY_CONNECTED"]) == ("first.tflite", ["INT8"], ["FLOAT16"])
    assert "inner.task/second.tflite" in result.found.unchanged


def test_a_bundle_is_pressed_to_the_same_bytes_each_time_and_by_its_recipe_file(bundle: Path, tmp_path: Path) -> None:
    one = quantize_tflite(bundle, output=tmp_path / "one.task", rule=["second.tflite=fp16"])
    two = quantize_tflite(bundle, output=tmp_path / "two.task", recipe=str(tmp_path / "one_recipe.json"))
    assert one.product.sha256 == two.product.sha256  # type: ignore[union-attr]


def test_a_selector_that_no_model_of_a_bundle_knows_is_an_error(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="no op of any model matches 'nobody'"):
        quantize_tflite(bundle, output=tmp_path / "out.task", exclude=["nobody"])
    assert not (tmp_path / "out.task").exists()


def test_a_model_that_the_recipe_leaves_alone_is_carried_over_and_told(bundle: Path, tmp_path: Path) -> None:
    half = quantize_tflite(bundle, output=tmp_path / "half.task", rule=["first.tflite=fp16", "second.tflite=none"]).product
    assert half is not None
    again = quantize_tflite(half.path, output=tmp_path / "again.task", recipe="fp16")
    assert [model.name for model in again.found.models] == ["inner.task/second.tflite"]
    assert any(entry.startswith("first.tflite (") and "FLOAT16 already" in entry for entry in again.found.unchanged)
    assert entries(half.path)["first.tflite"] == entries(tmp_path / "again.task")["first.tflite"]
    with pytest.raises(ToolError, match="the recipe changes no model of the bundle"):
        quantize_tflite(tmp_path / "again.task", output=tmp_path / "third.task", recipe="fp16")


@pytest.mark.realdata
def test_the_official_bundle_is_pressed_and_carried_over(tmp_path: Path) -> None:
    source = REALDATA / "mediapipe" / "face_landmarker.task"
    result = quantize_tflite(source, output=tmp_path / "f.task", recipe="int8-weight-only", require_coverage=0.99)
    assert [model.name for model in result.found.models] == [
        "face_detector.tflite",
        "face_landmarks_detector.tflite",
        "face_blendshapes.tflite",
    ]
    before, after = entries(source), entries(tmp_path / "f.task")
    assert list(before) == list(after)
    assert before["geometry_pipeline_metadata_landmarks.binarypb"] == after["geometry_pipeline_metadata_landmarks.binarypb"]
    assert result.product.size_bytes < 2_200_000  # type: ignore[union-attr]


# Searches, layers by damage, and the page.


def test_a_search_keeps_the_limit_writes_its_recipe_and_the_page(model: Path, tiles: Path) -> None:
    page = model.with_name("page.html")
    result = quantize_tflite(model, calibration=tiles, max_drop=["0.02"], debug=True, html=page)
    [pressed] = result.found.models
    assert pressed.searched is not None
    assert pressed.searched.drop <= 1
    assert isinstance(pressed.measured, Measured)
    assert pressed.measured.answers[0].damage.relative_error <= 0.02  # type: ignore[operator]
    assert pressed.size_after_bytes < 0.5 * pressed.size_before_bytes
    again = quantize_tflite(model, output=model.with_name("again.tflite"), recipe=str(model.with_name("model_search_recipe.json")))
    assert again.product.size_bytes == result.product.size_bytes  # type: ignore[union-attr]
    errors = [layer.output.relative_error for layer in pressed.damage]
    assert errors == sorted(errors, reverse=True)  # type: ignore[type-var]
    nodes = json.loads(model.with_name("model_search_node_data.json").read_text())["model.tflite"]["results"]
    assert len(nodes) == len(pressed.damage) > 15
    assert "Error at the output, each layer quantized alone" in page.read_text()


def test_a_search_of_every_model_of_a_bundle_needs_no_recipe(bundle: Path, tiles: Path, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="leave out --recipe, or --max-drop"):
        quantize_tflite(bundle, output=tmp_path / "o.task", recipe="fp16", max_drop=["0.01"], calibration=tiles.parent)


def test_a_search_needs_real_inputs(model: Path) -> None:
    with pytest.raises(ToolError, match="a search needs real inputs"):
        quantize_tflite(model, max_drop=["0.01"])


# Nothing is replaced that is not the tool's, and no option is passed over in silence.


@pytest.mark.parametrize("page", ["model.tflite", "out.tflite", "out_recipe.json", "r.json", "nowhere/page.html"])
def test_a_page_in_the_way_of_another_file_is_refused_before_any_work(model: Path, page: str) -> None:
    _, rules = resolve_recipe("int8")
    recipe = model.with_name("r.json")
    recipe.write_text(json.dumps(rules))
    before = {path.name: path.read_bytes() for path in model.parent.iterdir()}
    with pytest.raises(ToolError, match=r"the page would replace a file|no such folder"):
        quantize_tflite(model, output=model.with_name("out.tflite"), recipe=str(recipe), html=model.parent / page, overwrite=True)
    assert {path.name: path.read_bytes() for path in model.parent.iterdir()} == before


def test_a_foreign_file_where_the_node_data_would_fall_is_kept(model: Path) -> None:
    other = model.with_name("model_int8_node_data.json")
    other.write_text("precious")
    with pytest.raises(ToolError, match="a file beside the output would be replaced"):
        quantize_tflite(model, debug=True)
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
        ({"target": "latency"}, "--target does nothing without --max-drop"),
        ({"correct_bias": False}, "--no-correct-bias does nothing without --calibration"),
        ({"dask": "tcp://127.0.0.1:1"}, "--dask does nothing without --max-drop or --debug"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(model: Path, options: dict[str, object], says: str) -> None:
    with pytest.raises(ToolError, match=says):
        quantize_tflite(model, **options)  # type: ignore[arg-type]


def test_statistics_for_a_recipe_that_is_not_static_are_refused(model: Path, tiles: Path) -> None:
    quantize_tflite(model, recipe="int8-static", calibration=tiles)
    with pytest.raises(ToolError, match="calibration statistics are for static recipes"):
        quantize_tflite(model, recipe="int8", calibration=model.with_name("model_int8-static_calibration.json"))


@pytest.mark.parametrize("option", [{"rule": ["first.tflite:CONV_2D=fp16"]}, {"max_drop": ["first.tflite=0.1"]}])
def test_an_option_for_a_model_that_is_left_out_is_refused(bundle: Path, tmp_path: Path, option: dict[str, list[str]]) -> None:
    with pytest.raises(ToolError, match="leaves out"):
        quantize_tflite(bundle, output=tmp_path / "o.task", exclude=["first.tflite"], **option)  # type: ignore[arg-type]


def test_coverage_of_a_model_that_the_recipe_cannot_change_is_none(bundle: Path, tmp_path: Path) -> None:
    half = quantize_tflite(bundle, output=tmp_path / "half.task", rule=["first.tflite=fp16", "second.tflite=none"]).product
    result = quantize_tflite(half.path, output=tmp_path / "o.task", recipe="fp16", require_coverage=0.5)  # type: ignore[union-attr]
    first = result.found.gates[0]
    assert (first.model, first.value, first.ok) == ("first.tflite", 0.0, False)
    assert not (tmp_path / "o.task").exists()


@pytest.mark.realdata
def test_custom_ops_that_the_runtime_has_are_run(tmp_path: Path) -> None:
    """XNNPACK knows MediaPipe's Convolution2DTransposeBias; the plain kernels don't."""
    source = REALDATA / "mediapipe" / "selfie_segmenter.tflite"
    result = quantize_tflite(source, output=tmp_path / "m.tflite", recipe="int8-weight-only", calibration=REALDATA / "images")
    [model] = result.found.models
    assert isinstance(model.measured, Measured)
    assert not model.measured.are_seeded
    assert model.corrected_biases > 0


def test_static_recipes_ask_for_the_memory_that_calibration_takes(model: Path, tiles: Path) -> None:
    needs = []
    for options in ({}, {"recipe": "int8-static", "calibration": tiles}):
        with pytest.raises(DryRun) as caught:
            quantize_tflite(model, **options, dry_run=True)  # type: ignore[arg-type]
        needs.append(caught.value.result.forecasts[0].needs.memory_bytes - pipeline.BASE_MEMORY)
    assert needs == [int(model.stat().st_size * factor) for factor in (0.3, 4.5)]


def test_a_device_is_no_model() -> None:
    with pytest.raises(ToolError, match="the model is no regular file"):
        quantize_tflite(Path("/dev/null"))
