"""A model in the form that integer kernels like gives the same answers."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from shared.formats.onnx_file import read_model
from tests.support.small_onnx import Array, Shape, answer, kinds_of, save, save_picture_model, seeded, with_external_weights
from tools.quantize_onnx.graph.repair import repair
from tools.quantize_onnx.graph.rewrite import matrix_products, write_rewritten


def rewritten(source: Path) -> tuple[bool, list[str], Path]:
    """Repair a model and write it with its ops replaced; return the result of `write_rewritten`, and the file."""
    repair(source, source.with_name("float.onnx"))
    target = source.with_name("rewritten.onnx")
    return *write_rewritten(source.with_name("float.onnx"), target), target


def save_prelu(path: Path, slope: Array, shape: Shape) -> Path:
    nodes = [helper.make_node("Neg", ["x"], ["n"], name="neg"), helper.make_node("PRelu", ["n", "slope"], ["y"], name="prelu")]
    return save(path, nodes, {"x": shape}, {"y": shape}, {"slope": slope})


def save_dense(path: Path, shape: Shape, *, bias_first: bool = False, **changes: Any) -> Path:
    """Write Relu, MatMul, Add, Relu on the last axis."""
    weights = {"w": seeded(8, 5), "b": seeded(5, seed=1)} | changes.pop("weights", {})
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="before"),
        helper.make_node("MatMul", ["r", "w"], ["p"], name="product"),
        helper.make_node("Add", ["b", "p"] if bias_first else ["p", "b"], ["s"], name="plus"),
        helper.make_node("Relu", ["s"], ["y"], name="behind"),
        *changes.pop("more", []),
    ]
    outputs = {"y": None, **changes.pop("outputs", {})}
    return save(path, nodes, {"x": shape}, outputs, weights, **changes)


@pytest.mark.parametrize(
    "slope",
    [
        seeded(4, 1, 1),
        np.full((4, 1, 1), -0.5, np.float32),
        np.full((4, 1, 1), 2.5, np.float32),
        np.float32([0.25]),
        seeded(4, 6, 6),
    ],
)
def test_a_prelu_of_any_slope_is_written_in_simpler_ops(tmp_path: Path, slope: Array) -> None:
    source = save_prelu(tmp_path / "m.onnx", slope, ("n", 4, 6, 6))
    changed, kept, target = rewritten(source)
    assert changed
    assert kinds_of(target) == ["Neg", "Mul", "Relu", "Mul", "Add"]
    assert kept == [node.name for node in onnx.load(str(target)).graph.node][1:]
    sample = seeded(3, 4, 6, 6, seed=5)
    np.testing.assert_allclose(answer(target, x=sample)[0], answer(source, x=sample)[0], rtol=1e-5, atol=1e-6)


def test_two_prelus_may_share_their_slopes(tmp_path: Path) -> None:
    nodes = [helper.make_node("PRelu", ["x", "slope"], ["h"]), helper.make_node("PRelu", ["h", "slope"], ["y"])]
    source = save(tmp_path / "m.onnx", nodes, {"x": (2, 4)}, {"y": (2, 4)}, {"slope": seeded(4)})
    _, kept, target = rewritten(source)
    assert len(set(kept)) == 8
    np.testing.assert_allclose(answer(target, x=seeded(2, 4))[0], answer(source, x=seeded(2, 4))[0], rtol=1e-5)


def test_a_prelu_of_computed_slopes_stays(tmp_path: Path) -> None:
    source = save(tmp_path / "m.onnx", [helper.make_node("PRelu", ["x", "z"], ["y"])], {"x": (2, 4), "z": (4,)}, {"y": (2, 4)})
    changed, kept, target = rewritten(source)
    assert (changed, kept, target.exists()) == (False, [], False)


@pytest.mark.parametrize("bias_first", [False, True])
@pytest.mark.parametrize(
    ("shape", "sample"),
    [((2, 8), (2, 8)), (("n", 8), (3, 8)), (("n", 4, 8), (2, 4, 8)), (("n", 2, 3, 8), (4, 2, 3, 8)), ((1, 2, 3, 8), (1, 2, 3, 8))],
)
def test_a_product_and_its_bias_become_one_gemm_whatever_the_rank(
    tmp_path: Path, shape: Shape, sample: tuple[int, ...], bias_first: bool
) -> None:
    source = save_dense(tmp_path / "m.onnx", shape, bias_first=bias_first)
    changed, kept, target = rewritten(source)
    assert (changed, kept) == (True, [])
    assert kinds_of(target) == ["Relu", "Reshape", "Gemm", "Reshape", "Relu"]
    assert [node.name for node in onnx.load(str(target)).graph.node if node.op_type == "Gemm"] == ["product"]
    values = seeded(*sample, seed=7)
    (before,), (after,) = answer(source, x=values), answer(target, x=values)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6, strict=True)


def test_a_product_of_one_row_keeps_its_shape(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "m.onnx", (8,))
    changed, _, target = rewritten(source)
    values = seeded(8)
    np.testing.assert_allclose(
        answer(target if changed else source, x=values)[0], answer(source, x=values)[0], rtol=1e-5, atol=1e-6, strict=True
    )


def test_products_whose_shape_is_open_stay(tmp_path: Path) -> None:
    changed, _, _ = rewritten(save_dense(tmp_path / "m.onnx", ("n", "m", 8)))
    assert not changed


@pytest.mark.parametrize("why", ["output", "two readers", "bias of rows", "stack of matrices"])
def test_products_that_are_no_gemm_stay(tmp_path: Path, why: str) -> None:
    changes: dict[str, Any] = {}
    match why:
        case "output":
            changes = {"outputs": {"p": None}}
        case "two readers":
            changes = {"outputs": {"z": None}, "more": [helper.make_node("Neg", ["p"], ["z"], name="neg")]}
        case "bias of rows":
            changes = {"weights": {"b": seeded(2, 1)}}
        case "stack of matrices":
            changes = {"weights": {"w": seeded(3, 8, 5)}}
    source = save_dense(tmp_path / "m.onnx", (2, 8), **changes)
    changed, _, target = rewritten(source)
    assert (changed, target.exists()) == (False, False)


def test_a_product_that_an_inner_graph_reads_stays(tmp_path: Path) -> None:
    def branch(kind: str) -> Any:
        made = helper.make_tensor_value_info(kind, TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(kind, ["p"], [kind])], kind, [], [made])

    choice = helper.make_node("If", ["truth"], ["z"], name="if", then_branch=branch("Abs"), else_branch=branch("Neg"))
    source = save_dense(tmp_path / "m.onnx", (2, 8), more=[choice], outputs={"z": None}, weights={"truth": np.array(True)})
    changed, _, target = rewritten(source)
    for one, other in zip(answer(target if changed else source, x=seeded(2, 8)), answer(source, x=seeded(2, 8)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_a_product_of_doubles_still_loads(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "m.onnx", (2, 8))
    content = onnx.load(str(source))
    for value in (*content.graph.input, *content.graph.output):
        value.type.tensor_type.elem_type = TensorProto.DOUBLE
    for tensor in content.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    source.write_bytes(content.SerializeToString())
    changed, _, target = rewritten(source)
    values = seeded(2, 8).astype(np.float64)
    np.testing.assert_allclose(answer(target if changed else source, x=values)[0], answer(source, x=values)[0])


def test_weights_in_files_of_their_own_stay_there(tmp_path: Path) -> None:
    source = with_external_weights(save_dense(tmp_path / "m.onnx", (2, 8)))
    content = onnx.shape_inference.infer_shapes(onnx.load(str(source), load_external_data=False))
    source.write_bytes(content.SerializeToString())
    changed, _ = write_rewritten(source, tmp_path / "rewritten.onnx")
    assert changed
    assert {path.name for path in tmp_path.iterdir()} == {"m.onnx", "weights.data", "rewritten.onnx"}
    np.testing.assert_allclose(answer(tmp_path / "rewritten.onnx", x=seeded(2, 8))[0], answer(source, x=seeded(2, 8))[0], rtol=1e-5)


def test_a_model_of_neither_is_left_alone(tmp_path: Path) -> None:
    assert write_rewritten(save_picture_model(tmp_path / "m.onnx"), tmp_path / "rewritten.onnx") == (False, [])
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_products_of_two_activations_are_distinguished_from_those_with_weights(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"], name="layer"),
        helper.make_node("Transpose", ["p"], ["t"], name="turn"),
        helper.make_node("MatMul", ["p", "t"], ["y"], name="attention"),
        helper.make_node("Gemm", ["p", "t"], ["z"], name="gemm"),
    ]
    path = save(tmp_path / "m.onnx", nodes, {"x": (2, 8)}, {"y": (2, 2), "z": (2, 2)}, {"w": seeded(8, 5)})
    assert list(matrix_products(read_model(path))) == ["attention", "gemm"]
