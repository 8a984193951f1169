"""Every layer's fate is told, the product is measured before anyone gets it, and what breaks a limit is not written."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from PIL import Image
from shared.metrics.fidelity import measure_fidelity
from tools.quantize_onnx.result import PressedOnnx

from shared.command.errors import ToolError
from shared.command.resources import saturates
from shared.formats.model_file import ModelFile
from shared.formats.onnx_graph import read_metadata
from shared.formats.tensors import TensorSpec
from shared.media.images import image_files, read_pixels, seeded_image
from shared.runtime.model import open_model
from shared.runtime.processes import ChildError
from shared.runtime.samples import sample_inputs
from tests.conftest import REALDATA, Run
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
from tools.quantize_onnx import quantize_onnx

COUNT = 6  # samples of the small sets


@pytest.fixture(autouse=True)
def few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time nothing longer than it takes to see that it is timed."""
    monkeypatch.setattr("tools.quantize_onnx.evaluation.SMALL_RUNS", 2)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Four convolutions: picture in, picture out."""
    return save_picture_model(tmp_path / "model.onnx", widths=[32, 32, 32], metadata={"author": "somebody"})


@pytest.fixture
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seeded pictures as the small model takes them."""
    path = tmp_path_factory.mktemp("set") / "tiles.npz"
    specs = [TensorSpec("image", PICTURE, "float32")]
    np.savez(path, image=np.concatenate([sample_inputs(specs, seed)["image"] for seed in range(COUNT)]))
    return path


@pytest.fixture
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("set") / "vectors.npz"
    np.savez(path, vector=np.random.default_rng(0).random((COUNT, 1, 8), np.float32))
    return path


def save_manifest(folder: Path, *, holds_out: bool = True) -> Path:
    """Write a set of dark pictures that holds bright ones out of calibration."""
    folder.mkdir()
    for name, low, count in (("dark", 0, 4), ("bright", 155, 2)):
        for number in range(count):
            picture = seeded_image(16, np.random.default_rng(number))[0].transpose(1, 2, 0)
            Image.fromarray((low + 100 * picture).astype(np.uint8)).save(folder / f"{name}{number}.png")
    content = {"samples": [{"file": f"dark{number}.png"} for number in range(4)]}
    if holds_out:
        content["holdout"] = [{"file": f"bright{number}.png"} for number in range(2)]
    (folder / "manifest.json").write_text(json.dumps(content))
    return folder


def save_with_a_bad_layer(path: Path) -> Path:
    """Write a model whose second convolution has weights for a dead channel that are far larger than the others."""
    model = onnx.load(str(save_picture_model(path, widths=[32, 32])))
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor).copy()
        if tensor.name == "b0":
            values[0] = -3
        if tensor.name == "w1":
            values[:, 0] = 100
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    path.write_bytes(model.SerializeToString())
    return path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# What comes out.


@pytest.mark.parametrize(
    ("options", "dtype", "least", "most", "psnr_db"),
    [
        ({"mode": "static"}, "INT8", 0.25, 0.4, 40),
        ({"mode": "static", "form": "qoperator"}, "INT8", 0.25, 0.4, 40),
        ({"mode": "static", "weight_type": "uint8", "per_channel": False}, "UINT8", 0.25, 0.4, 40),
        ({"mode": "dynamic"}, "INT8", 0.25, 0.4, 40),
        ({"mode": "fp16"}, "FLOAT16", 0.5, 0.55, 60),
    ],
)
def test_every_layer_is_quantized_told_and_measured(
    model: Path, tiles: Path, options: dict[str, Any], dtype: str, least: float, most: float, psnr_db: float
) -> None:
    given = {"calibration": tiles} if options["mode"] == "static" else {}
    result = quantize_onnx(model, **given, **options)
    found, product = result.found, result.product
    assert product is not None
    assert product.path == model.with_name(f"model_{options['mode']}.onnx")
    assert least < product.size_bytes / model.stat().st_size < most
    (row,) = found.op_types
    assert (row.op_type, row.ops, row.quantized, row.dtypes, row.reason) == ("Conv", 4, 4, [dtype], "")
    assert (found.coverage, found.left) == (1.0, [])
    assert found.product is not None
    assert found.product.fidelity is not None
    assert found.product.fidelity.psnr_db > psnr_db  # type: ignore[operator]
    assert [made.label for made in found.models] == ["float32", options["mode"]]
    with open_model(ModelFile(product.path)) as opened:
        assert (opened.inputs, opened.outputs) == (
            [TensorSpec("image", PICTURE, "float32")],
            [TensorSpec("made", PICTURE, "float32")],
        )


def test_the_answers_that_are_told_are_those_of_the_product(model: Path, tiles: Path) -> None:
    result = quantize_onnx(model, calibration=tiles)
    pictures = [picture[np.newaxis] for picture in np.load(tiles)["image"]]
    reference = [answer(model, image=picture) for picture in pictures]
    made = measure_fidelity(reference, [answer(model.with_name("model_static.onnx"), image=picture) for picture in pictures], 1.0)
    told = result.found.product.fidelity  # type: ignore[union-attr]
    assert told is not None
    assert told.psnr_db == pytest.approx(made.psnr_db, abs=0.5)  # on other numbers of threads sums round otherwise
    assert told.cosine == pytest.approx(made.cosine, abs=1e-5)


@pytest.mark.parametrize(("form", "kind"), [("qdq", "QuantizeLinear"), ("qoperator", "QLinearConv")])
def test_the_form_is_what_was_asked_for(model: Path, tiles: Path, form: Any, kind: str) -> None:
    quantize_onnx(model, calibration=tiles, form=form)
    assert kind in kinds_of(model.with_name("model_static.onnx"))


def test_16_bits_of_activations_are_nearer_than_8(model: Path, tiles: Path) -> None:
    errors = []
    for kind in ("uint8", "int16"):
        made = quantize_onnx(model, output=model.with_name(f"{kind}.onnx"), calibration=tiles, activation_type=kind).found.product  # type: ignore[arg-type]
        errors.append(made.fidelity.relative_error)  # type: ignore[union-attr]
    assert errors[1] < 0.7 * errors[0]


def test_weights_of_seven_bits_stay_in_them(model: Path, tiles: Path) -> None:
    quantize_onnx(model, calibration=tiles, reduce_range=True)
    held = weights_of(model.with_name("model_static.onnx"))
    assert {int(np.abs(values).max()) for name, values in held.items() if re.fullmatch(r"w\d_quantized", name)} <= {63, 64}


def test_metadata_is_kept(model: Path, tiles: Path) -> None:
    content = onnx.load(str(model))
    helper.set_model_props(content, {"author": "somebody", "edgepress": '{"nbits": 8}'})
    model.write_bytes(content.SerializeToString())
    for mode in ("static", "fp16"):
        quantize_onnx(model, mode=mode, calibration=tiles if mode == "static" else None)  # type: ignore[arg-type]
        path = model.with_name(f"model_{mode}.onnx")
        assert {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}["author"] == "somebody"
        assert read_metadata(path) == {"nbits": 8}


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_the_same_input_gives_the_same_bytes(model: Path, tiles: Path, mode: Any) -> None:
    given = tiles if mode == "static" else None
    hashes = set()
    for name in ("one.onnx", "other.onnx"):
        product = quantize_onnx(model, output=model.with_name(name), mode=mode, calibration=given).product
        hashes.add(product.sha256)  # type: ignore[union-attr]
    assert len(hashes) == 1


def test_the_same_command_twice_is_up_to_date_and_another_one_is_not(model: Path, tiles: Path) -> None:
    first = quantize_onnx(model, calibration=tiles)
    again = quantize_onnx(model, calibration=tiles)
    assert (again.product.up_to_date, again.found) == (True, first.found)  # type: ignore[union-attr]
    assert again.message.startswith("up to date: ")
    for changes in ({"samples": 3}, {"exclude": ["conv0"]}, {"correct_bias": False}, {"min_psnr": 20.0}):
        with pytest.raises(ToolError, match="exists and is out of date"):
            quantize_onnx(model, calibration=tiles, **changes)  # type: ignore[arg-type]
    assert quantize_onnx(model, calibration=tiles, samples=3, refresh=True).found.samples == 3


def test_a_model_from_the_wild_is_repaired_first_and_that_is_told(tmp_path: Path, tiles: Path) -> None:
    model = save_picture_model(tmp_path / "m.onnx", widths=[32, 32, 32], opset=10, ir=3, lists_weights=True)
    result = quantize_onnx(model, calibration=tiles)
    assert result.found.repairs == "opset 10 upgraded to 17, 8 weights taken out of the inputs"
    assert [made.label for made in result.found.models] == ["original", "float32", "static"]
    assert result.found.models[0].fidelity.psnr_db > 100  # type: ignore[union-attr, operator]


def test_free_axes_stay_free(tmp_path: Path, tiles: Path) -> None:
    model = save_picture_model(tmp_path / "m.onnx", shape=("n", 3, "h", "w"))
    quantize_onnx(model, calibration=tiles)
    assert answer(tmp_path / "m_static.onnx", image=seeded(2, 3, 20, 30))[0].shape == (2, 3, 20, 30)


def test_the_gain_of_corrected_biases_is_on_unless_unwanted(tmp_path: Path, vectors: Path) -> None:
    model = save_vector_model(tmp_path / "m.onnx")
    assert quantize_onnx(model, calibration=vectors).found.corrected_biases == 2
    done = quantize_onnx(model, output=tmp_path / "without.onnx", calibration=vectors, correct_bias=False)
    assert done.found.corrected_biases == 0
    assert quantize_onnx(model, mode="dynamic", calibration=vectors).found.corrected_biases == 2


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
    result = quantize_onnx(model, calibration=tiles, reduce_range=saturates())
    kinds = kinds_of(tmp_path / "m_static.onnx")
    assert "Gemm" in kinds
    assert {"PRelu", "MatMul"}.isdisjoint(kinds)
    found = {row.op_type: (row.ops, row.quantized) for row in result.found.op_types}
    assert found == {"Conv": (1, 1), "MatMul": (1, 1), "PRelu": (1, 0), "Add": (1, 0)}
    assert result.found.product.fidelity.cosine > 0.999  # type: ignore[union-attr]
    assert "--op-type" in next(op.reason for op in result.found.left if op.name == "prelu")


# What stays in float.


@pytest.mark.parametrize("mode", ["static", "dynamic", "fp16"])
def test_excluded_nodes_stay_in_float_and_are_told(model: Path, tiles: Path, mode: Any) -> None:
    found = quantize_onnx(model, mode=mode, calibration=tiles if mode == "static" else None, exclude=["^conv[02]$", "conv3"]).found
    assert {op.name: op.reason for op in found.left} == dict.fromkeys(["conv0", "conv2", "conv3"], "excluded")
    held = weights_of(model.with_name(f"model_{mode}.onnx"))
    assert {name for name, values in held.items() if re.fullmatch(r"w\d", name) and values.dtype == np.float32} == {
        "w0",
        "w2",
        "w3",
    }


@pytest.mark.parametrize(("mode", "exclude"), [("static", "Gemm"), ("dynamic", "Gemm"), ("dynamic", "^gemm$"), ("fp16", "Gemm")])
def test_an_excluded_op_type_stays_in_float_in_every_mode(tmp_path: Path, vectors: Path, mode: Any, exclude: str) -> None:
    model = save_vector_model(tmp_path / "m.onnx")
    found = quantize_onnx(model, mode=mode, calibration=vectors if mode == "static" else None, exclude=[exclude]).found
    rows = {row.op_type: (row.quantized, row.reason) for row in found.op_types}
    assert (rows["Gemm"], rows["MatMul"]) == ((0, "1 x excluded"), (1, ""))
    assert weights_of(tmp_path / f"m_{mode}.onnx")["g"].dtype == np.float32


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
    quantize_onnx(model, mode="fp16")
    told = [node.name for node in onnx.load(str(tmp_path / "m_fp16.onnx")).graph.node if node.op_type == "Conv"]
    for number in (1, 2):
        output = tmp_path / f"{number}.onnx"
        left = quantize_onnx(model, output=output, calibration=tiles, exclude=[f"^{told[number]}$"]).found.left
        assert [op.name for op in left] == [told[number]]
        assert [name for name in ("w0", "w1", "w2") if name in weights_of(output)] == [f"w{number}"]


@pytest.mark.parametrize(
    ("exclude", "says"),
    [("nobody", r"matches no node and is no op type; got op types Conv, Relu"), ("(", "--exclude is no regular expression")],
)
def test_a_selector_that_selects_nothing_is_an_error(model: Path, exclude: str, says: str) -> None:
    with pytest.raises(ToolError, match=says):
        quantize_onnx(model, mode="dynamic", exclude=[exclude])
    assert names(model.parent) == {"model.onnx"}


def test_excluding_everything_is_an_error_with_the_reasons(model: Path, tiles: Path) -> None:
    with pytest.raises(ToolError, match="mode static changes no op of this model; got Conv 4 x excluded"):
        quantize_onnx(model, calibration=tiles, exclude=["Conv"])
    assert names(model.parent) == {"model.onnx"}


def test_only_op_types_that_are_asked_for_are_quantized(tmp_path: Path, vectors: Path) -> None:
    model = save_vector_model(tmp_path / "m.onnx")
    rows = {row.op_type: row for row in quantize_onnx(model, calibration=vectors, op_type=["MatMul"]).found.op_types}
    assert (rows["MatMul"].quantized, rows["Gemm"].quantized) == (1, 0)
    assert "--op-type" in rows["Gemm"].reason


def test_an_op_type_that_is_not_there_is_an_error_that_names_it(model: Path, tiles: Path) -> None:
    with pytest.raises(ToolError, match="LSTM"):
        quantize_onnx(model, calibration=tiles, op_type=["LSTM"])


def test_quantizing_twice_is_an_error(model: Path, tiles: Path) -> None:
    product = quantize_onnx(model, calibration=tiles).product.path  # type: ignore[union-attr]
    with pytest.raises(ToolError, match=r"changes no op of this model|quantizer fails"):
        quantize_onnx(product, output=model.with_name("twice.onnx"), calibration=tiles)
    assert "twice.onnx" not in names(model.parent)


# Limits.


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        ({"require_coverage": 0.99}, r"coverage of weight bytes 0\.\d+, limit 0.99"),
        ({"min_speedup": 1000.0}, r"speed-up .*, limit 1000"),
        ({"min_psnr": 150.0}, r"PSNR \d+\.?\d*, limit 150"),
        ({"min_cosine": 1.0}, r"cosine (1|0\.9+\d*), limit 1"),
    ],
)
def test_a_broken_limit_is_told_and_nothing_is_written(model: Path, limit: dict[str, float], says: str) -> None:
    result = quantize_onnx(model, mode="dynamic", exclude=["conv0"], **limit)  # type: ignore[arg-type]
    assert (result.ok, result.product) == (False, None)
    assert re.search(says, result.message)
    assert result.message.endswith("nothing was written")
    assert names(model.parent) == {"model.onnx"}


def test_a_broken_limit_exits_1_with_the_table_and_writes_nothing(model: Path, run_tool: Run) -> None:
    done = run_tool("quantize_onnx", model, "--mode", "dynamic", "--exclude", "conv0", "--require-coverage", "0.99")
    assert (done.returncode, done.stderr) == (1, "")
    assert "FAILED: model.onnx coverage of weight bytes" in done.stdout
    assert names(model.parent) == {"model.onnx"}


def test_limits_that_are_kept_are_told(model: Path, tiles: Path) -> None:
    result = quantize_onnx(model, calibration=tiles, require_coverage=1.0, min_psnr=30, min_cosine=0.9, min_speedup=0.0)
    assert result.ok
    assert [gate.name for gate in result.found.gates] == ["coverage of weight bytes", "speed-up", "PSNR", "cosine"]
    assert (result.found.kept, result.found.searched) == ([], 2)  # minmax and percentile


def test_a_search_leaves_the_bad_layer_in_float_and_no_other(tmp_path: Path, tiles: Path) -> None:
    model = save_with_a_bad_layer(tmp_path / "m.onnx")
    without = quantize_onnx(model, output=tmp_path / "without.onnx", calibration=tiles).found.product
    assert without.fidelity.psnr_db < 55  # type: ignore[union-attr, operator]
    result = quantize_onnx(model, calibration=tiles, min_psnr=60, reduce_range=saturates())
    assert result.ok
    assert result.found.kept == ["conv1"]
    assert [(op.name, op.reason.partition(":")[0]) for op in result.found.left] == [("conv1", "left in float by the search")]
    assert result.found.product.fidelity.psnr_db >= 60  # type: ignore[union-attr, operator]


def test_a_layer_that_is_left_in_float_is_computed_in_float(tmp_path: Path, tiles: Path) -> None:
    """ONNX Runtime quantizes float weights between quantized tensors itself when it loads a model, per tensor."""
    model = save_with_a_bad_layer(tmp_path / "m.onnx")
    errors = []
    for number, exclude in enumerate([[], ["conv1"]]):
        made = quantize_onnx(model, output=tmp_path / f"{number}.onnx", calibration=tiles, exclude=exclude).found.product
        errors.append(made.fidelity.relative_error)  # type: ignore[union-attr]
    assert errors[1] < 0.2 * errors[0]


def test_a_limit_that_no_mix_keeps_is_an_error_and_nothing_is_written(tmp_path: Path, tiles: Path) -> None:
    model = save_picture_model(tmp_path / "model.onnx", widths=[32])
    with pytest.raises(ToolError, match=r"no static model keeps the limit; got PSNR .*; lower it, or use --mode fp16"):
        quantize_onnx(model, calibration=tiles, min_psnr=150)
    assert names(model.parent) == {"model.onnx"}


def test_a_search_does_not_count_what_is_excluded_anyway(tmp_path: Path, vectors: Path) -> None:
    model = save_vector_model(tmp_path / "m.onnx")
    with pytest.raises(ToolError, match="no static model keeps the limit"):
        quantize_onnx(model, calibration=vectors, exclude=["Gemm"], min_cosine=0.999999999)


def test_psnr_of_what_is_no_image_is_refused(tmp_path: Path, vectors: Path) -> None:
    with pytest.raises(ToolError, match="--min-psnr is for models that make images; use --min-cosine"):
        quantize_onnx(save_vector_model(tmp_path / "m.onnx"), calibration=vectors, min_psnr=30)


# Mode auto.


def test_auto_takes_the_fastest_inside_the_limits(model: Path, tiles: Path) -> None:
    found = quantize_onnx(model, mode="auto", calibration=tiles, min_psnr=30).found
    assert [made.label for made in found.models] == ["float32", "dynamic", "fp16", "static"]
    tried = found.models[1:]
    assert min(tried, key=lambda made: made.median_ms or np.inf) == found.product
    assert found.mode == found.product.label  # type: ignore[union-attr]


def test_auto_takes_none_that_is_outside_the_limits(model: Path) -> None:
    found = quantize_onnx(model, mode="auto", min_psnr=80).found
    assert {made.label: made.fidelity.psnr_db > 80 for made in found.models if made.fidelity} == {"dynamic": False, "fp16": True}  # type: ignore[operator]
    assert found.mode == "fp16"


def test_auto_takes_another_mode_where_no_static_model_keeps_the_limit(tmp_path: Path, tiles: Path) -> None:
    model = save_picture_model(tmp_path / "model.onnx", widths=[32])
    assert quantize_onnx(model, mode="auto", calibration=tiles, min_psnr=85).found.mode == "fp16"


def test_auto_is_an_error_where_nothing_keeps_the_limits(model: Path) -> None:
    with pytest.raises(ToolError, match=r"no mode keeps the limits; got dynamic: PSNR .*fp16: PSNR .*give --calibration"):
        quantize_onnx(model, mode="auto", min_psnr=150)
    assert names(model.parent) == {"model.onnx"}


# Options.


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "static quantization needs a calibration set"),
        ({"mode": "auto"}, "--mode auto needs a limit to keep; give --min-psnr or --min-cosine"),
        ({"mode": "dynamic", "form": "qdq"}, "does nothing in mode dynamic"),
        ({"mode": "dynamic", "activation_type": "uint8"}, "--activation-type does nothing in mode dynamic"),
        ({"mode": "dynamic", "calibration_method": "minmax"}, "--calibration-method does nothing in mode dynamic"),
        ({"mode": "dynamic", "symmetric_activations": True}, "--symmetric-activations does nothing in mode dynamic"),
        ({"mode": "fp16", "weight_type": "int8", "reduce_range": True}, "--weight-type, --reduce-range does nothing in mode fp16"),
        ({"mode": "fp16", "op_type": ["Conv"]}, "--op-type does nothing in mode fp16"),
        ({"mode": "dynamic", "samples": 3}, "--samples does nothing without --calibration"),
        ({"mode": "dynamic", "min_psnr": float("inf")}, "--min-psnr is not finite"),
    ],
)
def test_options_that_would_do_nothing_or_are_missing_are_refused(model: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ToolError, match=says):
        quantize_onnx(model, **options)
    assert names(model.parent) == {"model.onnx"}


def test_options_are_named_as_they_are_typed(model: Path) -> None:
    with pytest.raises(ToolError, match="--format does nothing in mode dynamic"):
        quantize_onnx(model, mode="dynamic", form="qdq")


def test_an_output_that_is_not_named_as_an_onnx_model_is_refused(model: Path) -> None:
    with pytest.raises(ToolError, match=r"the output is no \.onnx file"):
        quantize_onnx(model, output=model.with_name("m.tflite"), mode="dynamic")
    assert names(model.parent) == {"model.onnx"}


def test_a_model_that_is_not_named_as_one_is_refused_before_the_work(tmp_path: Path) -> None:
    model = save_picture_model(tmp_path / "model", opset=10)
    with pytest.raises(ToolError, match=r"\.onnx"):
        quantize_onnx(model, output=tmp_path / "out.onnx", mode="dynamic")
    assert names(tmp_path) == {"model"}


# Samples.


def test_what_a_manifest_holds_out_is_what_is_measured_on(model: Path, tmp_path: Path) -> None:
    """Dark pictures are calibrated with, so bright ones come out clipped."""
    held = save_manifest(tmp_path / "held")
    found = quantize_onnx(model, calibration=held, input_range="0..1").found
    assert (found.samples, found.measured_on) == (4, "2 samples that were not calibrated with")
    shutil.rmtree(held)
    plain = save_manifest(held, holds_out=False)
    other = quantize_onnx(model, output=tmp_path / "plain.onnx", calibration=plain, input_range="0..1").found
    assert (other.samples, other.measured_on) == (4, "4 samples that were calibrated with, too")
    assert found.product.fidelity.psnr_db < other.product.fidelity.psnr_db - 10  # type: ignore[union-attr, operator]


def test_a_held_out_picture_that_changed_makes_the_product_out_of_date(model: Path, tmp_path: Path) -> None:
    held = save_manifest(tmp_path / "held")
    quantize_onnx(model, calibration=held, input_range="0..1", min_cosine=0.1)
    Image.new("RGB", (16, 16), (255, 0, 0)).save(held / "bright1.png")
    with pytest.raises(ToolError, match="out of date"):
        quantize_onnx(model, calibration=held, input_range="0..1", min_cosine=0.1)


def test_a_holdout_of_its_own_is_measured_on(model: Path, tmp_path: Path, tiles: Path) -> None:
    folder = save_manifest(tmp_path / "held", holds_out=False)
    found = quantize_onnx(model, calibration=tiles, holdout=folder, input_range="0..1").found
    assert (found.samples, found.measured_on) == (COUNT, "4 samples that were not calibrated with")


def test_without_samples_seeded_ones_are_measured_on_and_that_is_told(model: Path) -> None:
    assert quantize_onnx(model, mode="fp16").found.measured_on == "4 seeded samples"


def test_a_range_that_was_assumed_is_told(model: Path, tmp_path: Path) -> None:
    folder = save_manifest(tmp_path / "held")
    assert "pixels taken as 0..1, say --input-range" in quantize_onnx(model, calibration=folder).found.measured_on


def test_pixels_become_the_range_that_the_model_takes(model: Path, tmp_path: Path) -> None:
    folder = save_manifest(tmp_path / "held", holds_out=False)
    spans = []
    for chosen in ("0..1", "0..255"):
        output = tmp_path / f"{chosen}.onnx"
        quantize_onnx(model, output=output, calibration=folder, input_range=chosen)  # type: ignore[arg-type]
        spans.append(float(weights_of(output)["image_scale"]))
    assert spans[1] == pytest.approx(255 * spans[0], rel=1e-3)


def test_samples_of_another_range_are_refused(model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "wide.npz", image=np.linspace(0, 255, 2 * 768, dtype=np.float32).reshape(2, *PICTURE[1:]))
    with pytest.raises(ToolError, match="of another range than the model's input"):
        quantize_onnx(model, calibration=tmp_path / "wide.npz", input_range="0..1")


def test_vectors_of_any_range_are_samples(tmp_path: Path) -> None:
    """Only pictures have a range that is known beforehand."""
    np.savez(tmp_path / "set.npz", vector=seeded(COUNT, 1, 8) * 5)
    assert quantize_onnx(save_vector_model(tmp_path / "m.onnx"), calibration=tmp_path / "set.npz").found.samples == COUNT


def test_a_model_that_makes_nan_of_the_samples_is_an_error(tmp_path: Path, tiles: Path) -> None:
    model = onnx.load(str(save_picture_model(tmp_path / "m.onnx")))
    model.graph.node[1].op_type = "Log"
    model.graph.node[1].name = "logarithm"
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ToolError, match="an activation is NaN or infinite on a calibration sample; got tensor r0"):
        quantize_onnx(tmp_path / "m.onnx", calibration=tiles)


# Weights beside the model.


def test_weights_beside_the_model_are_read_and_counted(model: Path, tiles: Path) -> None:
    size = model.stat().st_size
    with_external_weights(model)
    result = quantize_onnx(model, calibration=tiles)
    assert result.found.size_before_bytes > 0.95 * size
    assert names(model.parent) == {"model.onnx", "weights.data", "model_static.onnx", "model_static.onnx.json"}
    assert quantize_onnx(model, calibration=tiles).product.up_to_date  # type: ignore[union-attr]


def test_weights_that_changed_make_the_product_out_of_date(model: Path, tiles: Path) -> None:
    with_external_weights(model)
    quantize_onnx(model, calibration=tiles)
    data = bytearray(model.with_name("weights.data").read_bytes())
    data[:4] = np.float32(0.123).tobytes()
    model.with_name("weights.data").write_bytes(data)
    with pytest.raises(ToolError, match="out of date"):
        quantize_onnx(model, calibration=tiles)


def pretend_large(monkeypatch: pytest.MonkeyPatch, coverage: float = 1.0) -> None:
    """Let products have their weights beside them, as those above 2 GiB do."""
    runs = iter(range(9))

    def press(source: Path, wish: object, workspace: Path, draft: Path) -> PressedOnnx:
        with_external_weights(save_picture_model(draft, widths=[4 + next(runs)]), f"{draft.name}.data")
        return PressedOnnx("model.onnx", "dynamic", "", 4000, 1000, coverage=coverage)

    monkeypatch.setattr("tools.quantize_onnx.command.press", press)


def test_weights_beside_a_product_are_named_by_their_content_and_the_former_go(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_large(monkeypatch)
    kept = []
    for exclude in ("conv0", "conv1"):
        product = quantize_onnx(model, mode="dynamic", exclude=[exclude], refresh=True).product
        (data,) = model.parent.glob("*.data")
        assert re.fullmatch(r"model_dynamic\.[0-9a-f]{8}\.data", data.name)
        assert product.size_bytes == product.path.stat().st_size + data.stat().st_size  # type: ignore[union-attr]
        assert answer(product.path, image=seeded(*PICTURE))[0].shape == PICTURE  # type: ignore[union-attr]
        kept.append(data.name)
    assert len(set(kept)) == 2


def test_a_broken_limit_leaves_no_weights_beside_the_product_either(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_large(monkeypatch, coverage=0.1)
    assert not quantize_onnx(model, mode="dynamic", require_coverage=0.9).ok
    assert names(model.parent) == {"model.onnx"}


# Bad input, as users meet it.

FAULTS = {
    "missing": "no such model file",
    "empty": "the model file is empty",
    "html": "an HTML page",
    "lfs": "Git LFS pointer",
    "truncated": "not an ONNX model, or a damaged one",
    "weights missing": "the model's weights are missing",
    "weights elsewhere": "external weights must lie beside the model",
    "unknown op": "the model does not load",
    "no calibration": "static quantization needs a calibration set",
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
def test_bad_input_is_one_line_exit_2_and_nothing_written(fault: str, model: Path, run_tool: Run) -> None:
    output, options = model.with_name("out.onnx"), ["--mode", "dynamic"]
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
    done = run_tool("quantize_onnx", model, "-o", output, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr)
    assert re.search(FAULTS[fault], done.stderr)
    assert {path.name: path.read_bytes() for path in model.parent.iterdir()} == before


def test_the_report_of_the_command_line_is_one_object(model: Path, run_tool: Run) -> None:
    done = run_tool("quantize_onnx", model, "--mode", "fp16", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert (report["ok"], report["found"]["mode"], report["found"]["op_types"][0]["op_type"]) == (True, "fp16", "Conv")


# Other people's models.


def cut_tiles(folder: Path, size: int, count: int, *, is_small: bool = False) -> Path:
    """Cut tiles out of real photographs."""
    folder.mkdir()
    files = [path for path in image_files(REALDATA / "images") if path.stem.endswith("x2lr") == is_small]
    for number in range(count):
        pixels = read_pixels(files[number % len(files)])
        top, left = (((length - size) * (1 + number // len(files))) // 3 for length in pixels.shape[:2])
        Image.fromarray(pixels[top : top + size, left : left + size]).save(folder / f"{number:02}.png")
    return folder


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
    result = quantize_onnx(source, output=tmp_path / "m.onnx", calibration=samples, input_range="0..1")
    assert result.ok
    assert result.product.size_bytes < (1 - smaller) * source.stat().st_size  # type: ignore[union-attr]
    assert result.found.product.fidelity.psnr_db > psnr_db  # type: ignore[union-attr, operator]
    with open_model(ModelFile(tmp_path / "m.onnx")) as opened:
        outputs, _ = opened.run(sample_inputs(opened.inputs, 0))
    assert all(np.isfinite(values).all() for values in outputs.values())


@pytest.mark.realdata
def test_a_limit_of_36_db_keeps_super_resolution_small(tmp_path: Path) -> None:
    source = REALDATA / "onnx" / "super-resolution-10.onnx"
    samples = cut_tiles(tmp_path / "tiles", 224, 4)
    result = quantize_onnx(source, output=tmp_path / "m.onnx", calibration=samples, input_range="0..1", min_psnr=36)
    assert result.ok
    assert result.found.product.fidelity.psnr_db >= 36  # type: ignore[union-attr, operator]
    assert result.product.size_bytes <= 0.35 * source.stat().st_size  # type: ignore[union-attr]


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["super-resolution-10", "srcnn_DerBurri"])
def test_other_peoples_models_become_half_as_large_in_float16(name: str, tmp_path: Path) -> None:
    source = REALDATA / "onnx" / f"{name}.onnx"
    result = quantize_onnx(source, output=tmp_path / "m.onnx", mode="fp16")
    assert 0.48 < result.product.size_bytes / source.stat().st_size < 0.56  # type: ignore[union-attr]
    assert result.found.product.fidelity.psnr_db >= 60  # type: ignore[union-attr, operator]


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["external_data_missing.onnx", "mangled.onnx", "html_page.task", "mangled_a.tflite"])
def test_corrupt_files_are_one_line_exit_2_and_nothing_written(name: str, tmp_path: Path, run_tool: Run) -> None:
    done = run_tool("quantize_onnx", REALDATA / "corrupt" / name, "-o", tmp_path / "out.onnx", "--mode", "dynamic")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr)
    assert not list(tmp_path.iterdir())


def test_a_product_that_was_cut_off_does_not_run(model: Path, tiles: Path) -> None:
    product = quantize_onnx(model, calibration=tiles).product.path  # type: ignore[union-attr]
    product.write_bytes(product.read_bytes()[:-200])
    with pytest.raises((ToolError, ChildError)), open_model(ModelFile(product)):
        pass


def test_a_repair_that_changes_the_answers_is_an_error(tmp_path: Path, tiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = save_picture_model(tmp_path / "old.onnx", opset=10)
    monkeypatch.setattr("tools.quantize_onnx.pipeline.MOST_CHANGED", -1.0)
    with pytest.raises(ToolError, match="repairing the model changes its answers; got relative error"):
        quantize_onnx(old, calibration=tiles)
    assert names(tmp_path) == {"old.onnx"}


def test_op_types_that_the_model_lacks_and_other_names_are_refused(model: Path, tiles: Path) -> None:
    with pytest.raises(ToolError, match="--op-type: the model has no LSTM"):
        quantize_onnx(model, calibration=tiles, op_type=["LSTM"])
    other = model.rename(model.with_name("model.pb"))
    with pytest.raises(ToolError, match=r"the model's name must end in \.onnx"):
        quantize_onnx(other, calibration=tiles)


def test_a_range_cache_is_used_again_and_gives_the_same_bytes(model: Path, tiles: Path) -> None:
    cache = model.with_name("ranges.json")
    products = [model.with_name(f"{number}.onnx") for number in range(2)]
    for product in products:
        quantize_onnx(model, output=product, calibration=tiles, range_cache=cache)
    assert products[0].read_bytes() == products[1].read_bytes()
    with pytest.raises(ToolError, match="the range cache would replace another file of this run"):
        quantize_onnx(model, output=model.with_name("2.onnx"), calibration=tiles, range_cache=model)


@pytest.mark.parametrize("overflows", [True, False])
def test_a_cpu_whose_sums_overflow_is_told_of(model: Path, monkeypatch: pytest.MonkeyPatch, overflows: bool) -> None:
    monkeypatch.setattr("tools.quantize_onnx.command.saturates", lambda: overflows)
    assert ("see --reduce-range" in quantize_onnx(model, mode="dynamic").message) is overflows
    assert "--reduce-range" not in quantize_onnx(model, mode="dynamic", reduce_range=True, overwrite=True).message
