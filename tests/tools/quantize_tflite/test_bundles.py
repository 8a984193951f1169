"""Each model of a bundle is quantized by its own rule, and everything else is carried over byte for byte."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from shared.command.cli import to_json
from shared.command.errors import ToolError
from shared.quantize.product import Quantized
from tests.conftest import REALDATA
from tools.quantize_tflite import quantize_tflite

INNER = "inner.task/second.tflite"


def write_bundle(path: Path, models: dict[str, Path]) -> Path:
    """Write a bundle with a model, a bundle in it with another, and something else."""
    inner = path.with_name("inner.task")
    with zipfile.ZipFile(inner, "w") as archive:
        archive.write(models[INNER], "second.tflite")
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(models["first.tflite"], "first.tflite")
        archive.writestr("geometry.binarypb", b"\x00\x01\x02")
        archive.write(inner, "inner.task")
    inner.unlink()
    return path


@pytest.fixture
def bundle(float_model: Path, tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "b.task", {"first.tflite": float_model, INNER: float_model})


@pytest.fixture(scope="module")
def mixed(float_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """A bundle whose first model is float16 and whose second is float32."""
    folder = tmp_path_factory.mktemp("mixed")
    source = write_bundle(folder / "b.task", {"first.tflite": float_model, INNER: float_model})
    return quantize_tflite(source, output=folder / "half.task", rule=["first.tflite=fp16", "second.tflite=none"])


def path_of(done: Quantized) -> Path:
    assert done.product is not None
    return done.product.path


def entries(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def inner_model(path: Path) -> bytes:
    """Return the model in the bundle inside a bundle."""
    inside = path.with_name("inside.task")
    inside.write_bytes(entries(path)["inner.task"])
    return entries(inside)["second.tflite"]


def test_a_bundle_without_rules_keeps_every_byte(bundle: Path, float_model: Path, tmp_path: Path) -> None:
    done = quantize_tflite(bundle, output=tmp_path / "out.task", recipe="none")
    before, after = entries(bundle), entries(tmp_path / "out.task")
    assert (before["first.tflite"], before["geometry.binarypb"]) == (after["first.tflite"], after["geometry.binarypb"])
    assert inner_model(tmp_path / "out.task") == float_model.read_bytes()
    assert done.result.unchanged == ["first.tflite", "geometry.binarypb", INNER]


def test_each_model_of_a_bundle_takes_its_own_rule(bundle: Path, tmp_path: Path) -> None:
    done = quantize_tflite(bundle, output=tmp_path / "out.task", rule=[f"{INNER}=none", "first.tflite:FULLY_CONNECTED=fp16"])
    [model] = done.result.models
    dtypes = {row.op_type: row.dtypes for row in model.op_types}
    assert (model.name, dtypes["CONV_2D"], dtypes["FULLY_CONNECTED"]) == ("first.tflite", ["INT8"], ["FLOAT16"])
    assert INNER in done.result.unchanged


def test_a_bundle_gives_the_same_bytes_each_time_and_by_its_recipe_file(bundle: Path, tmp_path: Path) -> None:
    one = quantize_tflite(bundle, output=tmp_path / "one.task", rule=["second.tflite=fp16"])
    recipe = json.loads((tmp_path / "one_recipe.json").read_text())
    assert list(recipe) == ["first.tflite", INNER]
    two = quantize_tflite(bundle, output=tmp_path / "two.task", recipe=str(tmp_path / "one_recipe.json"))
    assert path_of(one).read_bytes() == path_of(two).read_bytes()


def test_a_selector_that_no_model_of_a_bundle_knows_is_an_error(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="no op of any model matches 'nobody'"):
        quantize_tflite(bundle, output=tmp_path / "out.task", exclude=["nobody"])
    assert not (tmp_path / "out.task").exists()


def test_a_model_that_the_recipe_cannot_change_is_carried_over_with_the_reason(mixed: Quantized, tmp_path: Path) -> None:
    again = quantize_tflite(path_of(mixed), output=tmp_path / "again.task", recipe="fp16")
    assert [model.name for model in again.result.models] == [INNER]
    assert any(entry.startswith("first.tflite (") and "FLOAT16 already" in entry for entry in again.result.unchanged)
    assert entries(path_of(mixed))["first.tflite"] == entries(path_of(again))["first.tflite"]
    with pytest.raises(ToolError, match="the recipe changes no model of the bundle"):
        quantize_tflite(path_of(again), output=tmp_path / "third.task", recipe="fp16")


def test_coverage_of_a_model_that_the_recipe_cannot_change_is_none(mixed: Quantized, tmp_path: Path) -> None:
    done = quantize_tflite(path_of(mixed), output=tmp_path / "o.task", recipe="fp16", gate=["min_coverage=0.5"])
    assert [(gate.model, gate.value, gate.ok) for gate in done.result.gates[:1]] == [("first.tflite", 0.0, False)]
    assert done.product is None
    assert not (tmp_path / "o.task").exists()


def shape_of(value: Any) -> Any:
    """Return the names in a JSON value, all entries of a list as one; numbers and texts as such."""
    match value:
        case dict():
            return {name: shape_of(entry) for name, entry in value.items()}
        case list():
            shapes = {json.dumps(shape_of(entry), sort_keys=True) for entry in value}
            return [json.loads(shape) for shape in sorted(shapes)]
        case None:
            return None
        case int() | float():
            return "number"
        case _:
            return type(value).__name__


def test_a_model_and_a_bundle_give_results_of_one_schema(float_model: Path, tmp_path: Path) -> None:
    """The same model, in a file of its own and in a bundle, gives the same JSON but for names, sizes and times."""
    with zipfile.ZipFile(tmp_path / "b.task", "w") as archive:
        archive.write(float_model, "model.tflite")
    options: dict[str, Any] = {"exclude": ["FULLY_CONNECTED"], "gate": ["max_error=1"], "sensitivity": True}
    single = quantize_tflite(float_model, output=tmp_path / "one.tflite", html=tmp_path / "one.html", **options)
    bundle = quantize_tflite(tmp_path / "b.task", output=tmp_path / "two.task", html=tmp_path / "two.html", **options)
    assert shape_of(json.loads(to_json(single))) == shape_of(json.loads(to_json(bundle)))
    assert entries(tmp_path / "two.task")["model.tflite"] == path_of(single).read_bytes()


def test_a_search_of_every_model_of_a_bundle_needs_no_recipe(bundle: Path, tiles: Path, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="leave out --recipe, or the limit"):
        quantize_tflite(bundle, output=tmp_path / "o.task", recipe="fp16", max_error=["0.01"], calibration=tiles.parent)


@pytest.mark.parametrize("option", [{"rule": ["first.tflite:CONV_2D=fp16"]}, {"max_error": ["first.tflite=0.1"]}])
def test_an_option_for_a_model_that_is_left_out_is_refused(bundle: Path, tmp_path: Path, option: dict[str, list[str]]) -> None:
    with pytest.raises(ToolError, match="leaves out"):
        quantize_tflite(bundle, output=tmp_path / "o.task", exclude=["first.tflite"], **option)  # type: ignore[arg-type]


@pytest.mark.realdata
def test_the_official_bundle_is_quantized_and_carried_over(tmp_path: Path) -> None:
    source = REALDATA / "mediapipe" / "face_landmarker.task"
    done = quantize_tflite(source, output=tmp_path / "f.task", recipe="int8-weight-only", gate=["min_coverage=0.99"])
    assert [model.name for model in done.result.models] == [
        "face_detector.tflite",
        "face_landmarks_detector.tflite",
        "face_blendshapes.tflite",
    ]
    before, after = entries(source), entries(tmp_path / "f.task")
    assert list(before) == list(after)
    assert before["geometry_pipeline_metadata_landmarks.binarypb"] == after["geometry_pipeline_metadata_landmarks.binarypb"]
    assert path_of(done).stat().st_size < 2_200_000
