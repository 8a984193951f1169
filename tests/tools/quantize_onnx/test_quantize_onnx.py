"""Every layer is quantized and reported, the product is measured before it gets its name, and it keeps what the model held."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from shared.command.errors import ToolError
from shared.formats import onnx_file
from shared.formats.model_file import ModelFile
from shared.formats.tensors import TensorSpec
from shared.metrics.output_error import measure_error
from shared.quantize.product import Quantized
from shared.quantize.result import ModelResult, QuantizationResult
from shared.runtime.model import open_model
from shared.runtime.processes import ChildError
from shared.runtime.samples import sample_inputs
from tests.conftest import REALDATA, ROOT, Run
from tests.support.small_onnx import (
    PICTURE,
    answer,
    kinds_of,
    save,
    save_picture_model,
    save_vector_model,
    seeded,
    weights_of,
    with_external_weights,
)
from tests.tools.quantize_onnx.conftest import (
    cut_tiles,
    error_of,
    names,
    only,
    psnr_of,
    relative_error_of,
    save_with_a_bad_layer,
    size_of,
)
from tools.quantize_onnx import quantize_onnx
from tools.quantize_onnx.command import saturates

MINISR = ROOT / "models" / "minisr" / "minisr_x2.onnx"


@pytest.mark.parametrize(
    ("options", "dtype", "least", "most", "psnr_db"),
    [
        ({"recipe": "int8-static"}, "INT8", 0.25, 0.4, 40),
        ({"recipe": "int8-static", "set_options": ["format=qoperator"]}, "INT8", 0.25, 0.4, 40),
        ({"recipe": "int8-static", "set_options": ["weight_type=uint8", "per_channel=no"]}, "UINT8", 0.25, 0.4, 40),
        ({"recipe": "int16x8"}, "INT8", 0.25, 0.4, 40),
        ({"recipe": "int8"}, "INT8", 0.25, 0.4, 40),
        ({"recipe": "fp16"}, "FLOAT16", 0.5, 0.55, 60),
    ],
)
def test_every_layer_is_quantized_reported_and_measured(
    model: Path, tiles: Path, options: dict[str, Any], dtype: str, least: float, most: float, psnr_db: float
) -> None:
    recipe = options["recipe"]
    given = {"calibration": tiles} if recipe in ("int8-static", "int16x8") else {}
    quantized = quantize_onnx(model, **given, **options)
    result, product = only(quantized), quantized.product
    assert product is not None
    assert product.path == model.with_name(f"model_{recipe}.onnx")
    assert least < product.size_bytes / model.stat().st_size < most
    (row,) = result.op_types
    assert (row.op_type, row.ops, row.quantized, row.dtypes, row.reason) == ("Conv", 4, 4, [dtype], "")
    assert (result.coverage, result.skipped) == (1.0, [])
    assert psnr_of(quantized) > psnr_db
    assert [candidate.label for candidate in result.candidates] == ["float32", recipe]
    with open_model(ModelFile(product.path)) as opened:
        assert (opened.inputs, opened.outputs) == (
            [TensorSpec("image", PICTURE, "float32")],
            [TensorSpec("made", PICTURE, "float32")],
        )


def test_the_errors_that_are_reported_are_those_of_the_product(static: Quantized, tiles: Path) -> None:
    assert static.product is not None
    pictures = [picture[np.newaxis] for picture in np.load(tiles)["image"]]
    sides = [[answer(path, image=picture)[0] for picture in pictures] for path in (static.source, static.product.path)]
    made = measure_error("made", *sides, 1.0)
    assert psnr_of(static) == pytest.approx(made.psnr_db, abs=0.5)  # on other numbers of threads sums round otherwise
    assert error_of(static).cosine == pytest.approx(made.cosine, abs=1e-5)


def test_qdq_is_the_format_unless_qoperator_is_set(static: Quantized, model: Path, tiles: Path) -> None:
    assert static.product is not None
    assert "QuantizeLinear" in kinds_of(static.product.path)
    quantize_onnx(model, calibration=tiles, set_options=["format=qoperator"])
    assert "QLinearConv" in kinds_of(model.with_name("model_int8-static.onnx"))


@pytest.mark.parametrize("options", [{"recipe": "int16x8"}, {"set_options": ["activation_type=int16"]}])
def test_16_bits_of_activations_are_nearer_than_8(static: Quantized, model: Path, tiles: Path, options: dict[str, Any]) -> None:
    wide = quantize_onnx(model, output=model.with_name("wide.onnx"), calibration=tiles, **options)
    assert relative_error_of(wide) < 0.7 * relative_error_of(static)
    zeros = {name: values.dtype for name, values in weights_of(model.with_name("wide.onnx")).items() if name == "image_zero_point"}
    assert set(zeros.values()) == {np.dtype(np.uint16 if "recipe" in options else np.int16)}


def test_weights_of_seven_bits_stay_in_them(model: Path, tiles: Path) -> None:
    quantize_onnx(model, calibration=tiles, set_options=["reduce_range=yes"])
    held = weights_of(model.with_name("model_int8-static.onnx"))
    assert {int(np.abs(values).max()) for name, values in held.items() if re.fullmatch(r"w\d_quantized", name)} <= {63, 64}


def test_metadata_is_kept(model: Path, tiles: Path) -> None:
    content = onnx.load(str(model))
    helper.set_model_props(content, {"author": "somebody", "edgepress": '{"nbits": 8}'})
    model.write_bytes(content.SerializeToString())
    for recipe in ("int8-static", "fp16"):
        quantize_onnx(model, recipe=recipe, calibration=tiles if recipe == "int8-static" else None)  # type: ignore[arg-type]
        path = model.with_name(f"model_{recipe}.onnx")
        assert {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}["author"] == "somebody"
        assert ModelFile(path).metadata == {"nbits": 8}


@pytest.mark.parametrize("recipe", ["int8-static", "int8"])
def test_the_same_input_gives_the_same_bytes(static: Quantized, model: Path, tiles: Path, recipe: Any) -> None:
    assert static.product is not None
    first = (
        static.product
        if recipe == "int8-static"
        else quantize_onnx(model, output=model.with_name("one.onnx"), recipe=recipe).product
    )
    given = tiles if recipe == "int8-static" else None
    again = quantize_onnx(model, recipe=recipe, calibration=given).product
    assert first is not None and again is not None
    assert first.sha256 == again.sha256


def test_a_product_made_twice_is_the_same(model: Path, tiles: Path) -> None:
    assert quantize_onnx(model, calibration=tiles, reproducible=True).ok


def test_the_same_command_twice_is_up_to_date_and_another_one_is_not(model: Path, tiles: Path) -> None:
    first = quantize_onnx(model, calibration=tiles)
    again = quantize_onnx(model, calibration=tiles)
    assert again.product is not None
    assert (again.product.up_to_date, again.result) == (True, first.result)
    assert again.message.startswith("up to date: ")
    changes: list[dict[str, Any]] = [
        {"samples": 3},
        {"exclude": ["conv0"]},
        {"correct_bias": False},
        {"min_psnr": 20.0},
        {"gate": ["min_coverage=0.5"]},
        {"set_options": ["reduce_range=yes"]},
    ]
    for options in changes:
        with pytest.raises(ToolError, match="exists and is out of date"):
            quantize_onnx(model, calibration=tiles, **options)
    assert only(quantize_onnx(model, calibration=tiles, samples=3, refresh=True)).samples == 3


def test_a_model_from_the_wild_is_repaired_first_and_that_is_reported(tmp_path: Path, tiles: Path) -> None:
    model = save_picture_model(tmp_path / "m.onnx", widths=[32, 32, 32], opset=10, ir=3, lists_weights=True)
    result = only(quantize_onnx(model, calibration=tiles))
    assert result.repairs == "opset 10 upgraded to 17, 8 weights taken out of the inputs"
    assert [candidate.label for candidate in result.candidates] == ["float32", "original", "int8-static"]
    assert result.candidates[1].errors[0].psnr_db > 100  # type: ignore[operator]


def test_a_repair_that_changes_the_answers_is_an_error(tmp_path: Path, tiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = save_picture_model(tmp_path / "old.onnx", opset=10)
    monkeypatch.setattr("shared.quantize.pipeline.MOST_CHANGED", -1.0)
    with pytest.raises(ToolError, match="repairing the model changes its answers; got made: relative error"):
        quantize_onnx(old, calibration=tiles)
    assert names(tmp_path) == {"old.onnx"}


def test_free_axes_stay_free(tmp_path: Path, tiles: Path) -> None:
    model = save_picture_model(tmp_path / "m.onnx", shape=("n", 3, "h", "w"))
    quantize_onnx(model, calibration=tiles)
    assert answer(tmp_path / "m_int8-static.onnx", image=seeded(2, 3, 20, 30))[0].shape == (2, 3, 20, 30)


def test_biases_are_corrected_unless_the_user_says_no(tmp_path: Path, vectors: Path) -> None:
    model = save_vector_model(tmp_path / "m.onnx")
    assert only(quantize_onnx(model, calibration=vectors)).corrected_biases == 2
    without = quantize_onnx(model, output=tmp_path / "without.onnx", calibration=vectors, correct_bias=False)
    assert only(without).corrected_biases == 0
    assert only(quantize_onnx(model, recipe="int8", calibration=vectors)).corrected_biases == 2


def test_a_prelu_and_a_product_with_bias_run_in_the_form_that_is_fast(tmp_path: Path, tiles: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["image", "w0"], ["c"], name="conv", pads=[1] * 4),
        helper.make_node("PRelu", ["c", "slope"], ["a"], name="prelu"),
        helper.make_node("Transpose", ["a"], ["t"], name="turn", perm=[0, 2, 3, 1]),
        helper.make_node("MatMul", ["t", "w1"], ["p"], name="product"),
        helper.make_node("Add", ["p", "b1"], ["made"], name="plus"),
    ]
    weights = {"w0": seeded(32, 3, 3, 3, scale=0.2), "slope": seeded(32, 1, 1), "w1": seeded(32, 3), "b1": seeded(3)}
    model = save(tmp_path / "m.onnx", nodes, {"image": ("n", 3, 16, 16)}, {"made": ("n", 16, 16, 3)}, weights)
    reduced = ["reduce_range=yes"] if saturates() else []
    quantized = quantize_onnx(model, calibration=tiles, set_options=reduced, sensitivity=True)
    kinds = kinds_of(tmp_path / "m_int8-static.onnx")
    assert "Gemm" in kinds
    assert {"PRelu", "MatMul"}.isdisjoint(kinds)
    result = only(quantized)
    found = {row.op_type: (row.ops, row.quantized) for row in result.op_types}
    assert found == {"Conv": (1, 1), "MatMul": (1, 1), "PRelu": (1, 0), "Add": (1, 0)}
    assert error_of(quantized).cosine > 0.999  # type: ignore[operator]
    assert "--set op_types" in next(op.reason for op in result.skipped if op.name == "prelu")
    assert {layer.name: (layer.at_layer.output, layer.at_layer.problem) for layer in result.sensitivity} == {
        "conv": ("c", ""),
        "product": ("made", ""),  # its Add is part of the Gemm
    }


# Sensitivity and the page.


@pytest.mark.parametrize("recipe", ["int8-static", "int8", "fp16"])
def test_the_layer_that_moves_the_outputs_most_comes_first(tmp_path: Path, tiles: Path, recipe: Any) -> None:
    model = save_with_a_bad_layer(tmp_path / "m.onnx")
    given = tiles if recipe == "int8-static" else None
    page = tmp_path / "page.html"
    quantized = quantize_onnx(model, recipe=recipe, calibration=given, sensitivity=True, html=page)
    layers = only(quantized).sensitivity
    assert sorted(layer.name for layer in layers) == ["conv0", "conv1", "conv2"]
    errors = [layer.at_output.relative_error for layer in layers]
    assert None not in errors
    assert errors == sorted(errors, reverse=True)  # type: ignore[type-var]
    assert all(layer.at_layer.relative_error for layer in layers)
    if recipe != "fp16":
        assert layers[0].name == "conv1"
        assert errors[0] > 3 * errors[1]  # type: ignore[operator]
    values = json.loads((tmp_path / f"m_{recipe}_node_data.json").read_text())["m.onnx"]["results"]
    assert values == {layer.tensor: {"value": layer.at_output.relative_error} for layer in layers}
    text = page.read_text(encoding="utf-8")
    assert all(name in text for name in ("m.onnx", "conv0", "conv1", "conv2", recipe))
    assert quantized.message.endswith(f"; see {page}")
    again = quantize_onnx(model, recipe=recipe, calibration=given, sensitivity=True, html=page)
    assert again.page is not None
    assert again.page.up_to_date


def test_a_page_may_not_replace_a_file_that_is_read(model: Path) -> None:
    for taken in (model, model.with_name("model_int8.onnx")):
        with pytest.raises(ToolError, match="would replace a file that is read or written"):
            quantize_onnx(model, recipe="int8", html=taken, overwrite=True)
    assert names(model.parent) == {"model.onnx"}


# Weights beside the model.


def test_weights_beside_the_model_are_read_and_counted(model: Path, tiles: Path) -> None:
    size = model.stat().st_size
    with_external_weights(model)
    quantized = quantize_onnx(model, calibration=tiles)
    assert only(quantized).size_before_bytes > 0.95 * size
    assert names(model.parent) == {"model.onnx", "weights.data", "model_int8-static.onnx", "model_int8-static.onnx.json"}
    assert quantize_onnx(model, calibration=tiles).product.up_to_date  # type: ignore[union-attr]
    data = bytearray(model.with_name("weights.data").read_bytes())
    data[:4] = np.float32(0.123).tobytes()
    model.with_name("weights.data").write_bytes(data)
    with pytest.raises(ToolError, match="out of date"):
        quantize_onnx(model, calibration=tiles)


def pretend_large(monkeypatch: pytest.MonkeyPatch, coverage: float = 1.0) -> None:
    """Let products have their weights beside them, as those above 2 GiB do."""
    runs = iter(range(9))

    def quantize(source: ModelFile, name: str, *rest: object) -> ModelResult:
        draft = rest[-1]
        assert isinstance(draft, Path)
        with_external_weights(save_picture_model(draft, widths=[4 + next(runs)]), f"{draft.name}.data")
        return ModelResult(name, "int8", "", 4000, 1000, coverage=coverage)

    monkeypatch.setattr("tools.quantize_onnx.command.quantize_model", quantize)


def test_weights_beside_a_product_are_named_by_their_content_and_the_former_go(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_large(monkeypatch)
    found = []
    for exclude in ("conv0", "conv1"):
        product = quantize_onnx(model, recipe="int8", exclude=[exclude], refresh=True).product
        assert product is not None
        (data,) = model.parent.glob("*.data")
        assert re.fullmatch(r"model_int8\.[0-9a-f]{8}\.data", data.name)
        assert product.size_bytes == product.path.stat().st_size + data.stat().st_size
        assert answer(product.path, image=seeded(*PICTURE))[0].shape == PICTURE
        found.append(data.name)
    assert len(set(found)) == 2


def test_a_broken_gate_leaves_no_weights_beside_the_product_either(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_large(monkeypatch, coverage=0.1)
    assert not quantize_onnx(model, recipe="int8", gate=["min_coverage=0.9"]).ok
    assert names(model.parent) == {"model.onnx"}


def test_weights_beside_a_candidate_move_with_it(model: Path, tiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole path of a model above 2 GiB, with the limit of protobuf lowered for the moment of the move."""
    move = ModelFile.move

    def move_large(candidate: ModelFile, target: Path) -> None:
        with_external_weights(candidate.path, f"{candidate.path.name}.data")
        move(ModelFile(candidate.path), target)

    monkeypatch.setattr(ModelFile, "move", move_large)
    product = quantize_onnx(model, calibration=tiles).product
    assert product is not None
    (data,) = model.parent.glob("*.data")
    assert re.fullmatch(r"model_int8-static\.[0-9a-f]{8}\.data", data.name)
    assert answer(product.path, image=seeded(*PICTURE))[0].shape == PICTURE


# What the tool itself reads and prints.


def test_a_model_is_parsed_three_times_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the tool's own process: the model, the draft before it gets its name, and the files behind the size that is reported."""
    calls: list[str] = []
    load, read_model = onnx.load, onnx_file.read_model
    reads: list[Path] = []

    def counted_load(file: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(str(file))
        return load(file, *arguments, **options)

    def counted_read(path: Path) -> Any:
        reads.append(path)
        return read_model(path)

    monkeypatch.setattr(onnx, "load", counted_load)
    monkeypatch.setattr(onnx, "load_model", counted_load)
    monkeypatch.setattr(onnx_file, "read_model", counted_read)
    assert quantize_onnx(MINISR, output=tmp_path / "half.onnx", recipe="fp16").ok
    assert 1 <= len(calls) <= 3
    assert len(reads) <= len(calls)  # each of them calls onnx.load


def test_the_report_of_the_command_line_is_one_object(model: Path, run_tool: Run) -> None:
    done = run_tool("quantize_onnx", model, "--recipe", "fp16", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    (result,) = report["result"]["models"]
    assert (report["ok"], result["recipe"], result["op_types"][0]["op_type"]) == (True, "fp16", "Conv")


def test_a_dry_run_writes_nothing(model: Path, run_tool: Run) -> None:
    done = run_tool("quantize_onnx", model, "--recipe", "fp16", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert "model_fp16.onnx" in done.stdout
    assert names(model.parent) == {"model.onnx"}


def test_the_provenance_gives_back_the_result(static: Quantized) -> None:
    assert static.product is not None
    side = json.loads(static.product.path.with_name(f"{static.product.path.name}.json").read_text())
    assert (side["tool"], side["found"]["models"][0]["recipe"]) == ("quantize_onnx", "int8-static")
    assert isinstance(static.result, QuantizationResult)


def test_a_product_that_was_cut_off_does_not_run(static: Quantized, tmp_path: Path) -> None:
    assert static.product is not None
    product = tmp_path / "cut.onnx"
    product.write_bytes(static.product.path.read_bytes()[:-200])
    with pytest.raises((ToolError, ChildError)), open_model(ModelFile(product)):
        pass


def test_a_range_cache_is_used_again_and_gives_the_same_bytes(static: Quantized, model: Path, tiles: Path) -> None:
    assert static.product is not None
    cache = model.with_name("ranges.json")
    products = [model.with_name(f"{number}.onnx") for number in range(2)]
    for product in products:
        quantize_onnx(model, output=product, calibration=tiles, range_cache=cache)
        assert product.read_bytes() == static.product.path.read_bytes()
        shutil.copyfile(cache, cache.with_name("first.json") if product == products[0] else cache.with_name("second.json"))
    assert cache.with_name("first.json").read_bytes() == cache.with_name("second.json").read_bytes()
    with pytest.raises(ToolError, match="the range cache would replace another file of this run"):
        quantize_onnx(model, output=model.with_name("2.onnx"), calibration=tiles, range_cache=model)


# Other people's models.


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "tile", "smaller", "psnr_db"),
    [
        ("super-resolution-10", 224, 0.70, 30),
        ("realesr-animevideov3", 32, 0.70, 25),
        ("srcnn_DerBurri", 224, 0.60, 30),
    ],
)
def test_other_peoples_models_become_static_and_small(name: str, tile: int, smaller: float, psnr_db: float, tmp_path: Path) -> None:
    samples = cut_tiles(tmp_path / "tiles", tile, 4, is_small=tile < 100)
    source = REALDATA / "onnx" / f"{name}.onnx"
    quantized = quantize_onnx(source, output=tmp_path / "m.onnx", calibration=samples, input_range="0..1")
    assert quantized.ok
    assert size_of(quantized) < (1 - smaller) * source.stat().st_size
    assert psnr_of(quantized) > psnr_db
    with open_model(ModelFile(tmp_path / "m.onnx")) as opened:
        outputs, _ = opened.run(sample_inputs(opened.inputs, 0))
    assert all(np.isfinite(values).all() for values in outputs.values())


@pytest.mark.realdata
def test_a_limit_of_36_db_keeps_super_resolution_small(tmp_path: Path) -> None:
    source = REALDATA / "onnx" / "super-resolution-10.onnx"
    samples = cut_tiles(tmp_path / "tiles", 224, 4)
    quantized = quantize_onnx(source, output=tmp_path / "m.onnx", calibration=samples, input_range="0..1", min_psnr=36)
    assert quantized.ok
    assert psnr_of(quantized) >= 36
    assert size_of(quantized) <= 0.35 * source.stat().st_size


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["super-resolution-10", "srcnn_DerBurri"])
def test_other_peoples_models_become_half_as_large_in_float16(name: str, tmp_path: Path) -> None:
    source = REALDATA / "onnx" / f"{name}.onnx"
    quantized = quantize_onnx(source, output=tmp_path / "m.onnx", recipe="fp16")
    assert 0.48 < size_of(quantized) / source.stat().st_size < 0.56
    assert psnr_of(quantized) >= 60
