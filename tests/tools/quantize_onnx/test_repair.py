"""A repaired model gives the answers of the one that was given, in a form that quantizers can read."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from shared.command.errors import ToolError
from shared.formats.model_file import ModelFile
from shared.runtime.model import open_model
from tests.conftest import REALDATA
from tests.support.small_onnx import Array, answer, kinds_of, save, save_picture_model, seeded, weights_of, with_external_weights
from tools.quantize_onnx.graph.repair import OPSET, Repairs, repair

SAMPLE = seeded(1, 3, 16, 16)
ROUNDING = 1e-5  # of float32 sums in another order


def norm_weights(channels: int = 4) -> dict[str, Array]:
    variance = np.abs(seeded(channels, seed=13)) + np.float32(0.5)
    return {
        "w": seeded(channels, 3, 3, 3, scale=0.3),
        "scale": seeded(channels, seed=10) + 2,
        "shift": seeded(channels, seed=11),
        "mean": seeded(channels, seed=12),
        "variance": variance,
    }


def norm_nodes(**attributes: Any) -> list[Any]:
    return [
        helper.make_node("Conv", ["image", "w"], ["c"], name="conv", pads=[1] * 4),
        helper.make_node("BatchNormalization", ["c", "scale", "shift", "mean", "variance"], ["n"], name="norm", **attributes),
    ]


def difference(source: Path, target: Path, **inputs: Array) -> float:
    """Return the largest difference of the answers, relative to the largest answer."""
    inputs = inputs or {"image": SAMPLE}
    pairs = zip(answer(source, **inputs), answer(target, **inputs), strict=True)
    return max(float(np.abs(one - other).max() / np.abs(one).max()) for one, other in pairs)


def repaired(source: Path) -> tuple[Repairs, Path]:
    target = source.with_name("repaired.onnx")
    return repair(source, target), target


def test_a_model_in_order_needs_nothing_and_stays_the_same(tmp_path: Path) -> None:
    source = save_picture_model(tmp_path / "m.onnx")
    done, target = repaired(source)
    assert (done, str(done)) == (Repairs(), "")
    assert difference(source, target) == 0


def test_an_old_model_becomes_one_that_loads_per_channel_scales(tmp_path: Path) -> None:
    source = save_picture_model(tmp_path / "m.onnx", opset=10, ir=3, lists_weights=True)
    content = onnx.load(str(source))
    for node in content.graph.node:
        node.name = ""
    source.write_bytes(content.SerializeToString())
    done, target = repaired(source)
    assert done == Repairs(opset=10, listed_weights=6, nameless=5)
    assert str(done) == f"opset 10 upgraded to {OPSET}, 6 weights taken out of the inputs, 5 nodes named"
    assert [value.name for value in onnx.load(str(target)).graph.input] == ["image"]
    assert onnx.load(str(target)).opset_import[0].version == OPSET
    assert difference(source, target) < ROUNDING


def test_repairing_twice_changes_nothing_more_and_gives_the_same_bytes(tmp_path: Path) -> None:
    source = save_picture_model(tmp_path / "m.onnx", opset=10, ir=3, lists_weights=True)
    _, once = repaired(source)
    before = once.read_bytes()
    assert repair(source, once) != Repairs()
    assert once.read_bytes() == before
    assert repair(once, tmp_path / "twice.onnx") == Repairs()


def test_metadata_survives_an_upgrade(tmp_path: Path) -> None:
    source = save_picture_model(tmp_path / "m.onnx", opset=10, ir=4, metadata={"author": "somebody"})
    _, target = repaired(source)
    assert {entry.key: entry.value for entry in onnx.load(str(target)).metadata_props} == {"author": "somebody"}


def test_an_opset_that_cannot_be_upgraded_is_an_error(tmp_path: Path) -> None:
    source = save_picture_model(tmp_path / "m.onnx", opset=8, ir=3)
    content = onnx.load(str(source))
    content.graph.node[1].op_type = "Scan"
    source.write_bytes(content.SerializeToString())
    with pytest.raises(ToolError, match=f"opset 8 can't be upgraded; .*export the model again with opset {OPSET} or newer"):
        repaired(source)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_the_long_name_of_onnxs_own_domain_becomes_the_short_one(tmp_path: Path) -> None:
    source = save_picture_model(tmp_path / "m.onnx")
    content = onnx.load(str(source))
    content.opset_import[0].domain = "ai.onnx"
    source.write_bytes(content.SerializeToString())
    _, target = repaired(source)
    assert [entry.domain for entry in onnx.load(str(target)).opset_import] == [""]
    assert difference(source, target) == 0


@pytest.mark.parametrize("names", [["", "", ""], ["same", "same", "same"], ["Relu_1", "", "Relu_1"], ["", "Conv_0", "Conv_0"]])
def test_every_node_gets_a_name_of_its_own(tmp_path: Path, names: list[str]) -> None:
    source = save_picture_model(tmp_path / "m.onnx", widths=[4])
    content = onnx.load(str(source))
    for node, name in zip(content.graph.node, names, strict=True):
        node.name = name
    source.write_bytes(content.SerializeToString())
    done, target = repaired(source)
    found = [node.name for node in onnx.load(str(target)).graph.node]
    assert done == Repairs(nameless=3)
    assert len(set(found)) == len(found) == 3
    assert all(found)
    assert difference(save_picture_model(source, widths=[4]), target) == 0  # that of shared names does not load


def test_a_name_that_was_its_own_stays(tmp_path: Path) -> None:
    source = save_picture_model(tmp_path / "m.onnx", widths=[4])
    content = onnx.load(str(source))
    for node, name in zip(content.graph.node, ["", "Conv_0", ""], strict=True):
        node.name = name
    source.write_bytes(content.SerializeToString())
    done, target = repaired(source)
    found = [node.name for node in onnx.load(str(target)).graph.node]
    assert (done, found[1], len(set(found))) == (Repairs(nameless=2), "Conv_0", 3)


def test_weights_leave_constant_nodes(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(seeded(4, 3, 3, 3), "elsewhere")),
        helper.make_node("Constant", [], ["half"], value=numpy_helper.from_array(np.float32(0.5))),
        helper.make_node("Constant", [], ["shape"], value_ints=[1, -1]),
        helper.make_node("Conv", ["image", "w"], ["c"], name="conv"),
        helper.make_node("Mul", ["c", "half"], ["m"], name="mul"),
        helper.make_node("Reshape", ["m", "shape"], ["made"], name="flat"),
    ]
    source = save(tmp_path / "m.onnx", nodes, {"image": (1, 3, 16, 16)}, {"made": (1, 784)})
    done, target = repaired(source)
    assert done.constants == 1  # of a scalar and a shape nobody wants to hear
    assert kinds_of(target) == ["Constant", "Conv", "Mul", "Reshape"]
    assert weights_of(target).keys() == {"w", "half"}
    assert difference(source, target) == 0


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("epsilon", [1e-5, 0.1])
def test_a_batch_normalization_behind_a_convolution_is_folded(tmp_path: Path, has_bias: bool, epsilon: float) -> None:
    nodes, weights = norm_nodes(epsilon=epsilon), norm_weights()
    if has_bias:
        nodes[0].input.append("b")
        weights["b"] = seeded(4, seed=20)
    source = save(tmp_path / "m.onnx", nodes, {"image": (1, 3, 16, 16)}, {"n": (1, 4, 16, 16)}, weights)
    done, target = repaired(source)
    assert done == Repairs(batchnorms=1)
    assert kinds_of(target) == ["Conv"]
    assert difference(source, target) < ROUNDING


def test_grouped_and_one_dimensional_convolutions_are_folded_too(tmp_path: Path) -> None:
    nodes, weights = norm_nodes(), norm_weights(6)
    weights["w"] = seeded(6, 1, 5)
    nodes[0] = helper.make_node("Conv", ["image", "w"], ["c"], name="conv", group=3)
    source = save(tmp_path / "m.onnx", nodes, {"image": ("n", 3, 20)}, {"n": None}, weights)
    done, target = repaired(source)
    assert done.batchnorms == 1
    assert difference(source, target, image=seeded(2, 3, 20)) < ROUNDING


@pytest.mark.parametrize("reader", ["graph", "node", "weights", "scale"])
def test_a_batch_normalization_stays_where_folding_would_change_what_others_read(tmp_path: Path, reader: str) -> None:
    nodes, weights, inputs = norm_nodes(), norm_weights(), {"image": (1, 3, 16, 16)}
    outputs: dict[str, Any] = {"n": (1, 4, 16, 16)}
    samples = {"image": SAMPLE}
    match reader:
        case "graph":
            outputs["c"] = (1, 4, 16, 16)
        case "node":
            nodes.append(helper.make_node("Relu", ["c"], ["r"], name="relu"))
            outputs["r"] = (1, 4, 16, 16)
        case "weights":
            nodes.append(helper.make_node("Conv", ["image", "w"], ["other"], name="sibling"))
            outputs["other"] = None
        case "scale":
            inputs["scale"] = (4,)  # type: ignore[assignment]
            samples["scale"] = weights.pop("scale")
    source = save(tmp_path / "m.onnx", nodes, inputs, outputs, weights)
    done, target = repaired(source)
    assert done.batchnorms == 0
    assert "BatchNormalization" in kinds_of(target)
    assert difference(source, target, **samples) == 0


def test_a_batch_normalization_stays_where_an_inner_graph_reads_the_convolution(tmp_path: Path) -> None:
    def branch(kind: str) -> Any:
        made = helper.make_tensor_value_info(kind, TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(kind, ["c"], [kind])], kind, [], [made])

    choice = helper.make_node("If", ["truth"], ["chosen"], name="if", then_branch=branch("Relu"), else_branch=branch("Neg"))
    weights = {**norm_weights(), "truth": np.array(True)}
    outputs = {"n": (1, 4, 16, 16), "chosen": None}
    source = save(tmp_path / "m.onnx", [*norm_nodes(), choice], {"image": (1, 3, 16, 16)}, outputs, weights)
    _, target = repaired(source)
    assert difference(source, target) < ROUNDING


def test_a_batch_normalization_that_is_the_first_layer_stays(tmp_path: Path) -> None:
    weights = norm_weights(3)
    node = helper.make_node("BatchNormalization", ["image", "scale", "shift", "mean", "variance"], ["made"], name="norm")
    source = save(tmp_path / "m.onnx", [node], {"image": (1, 3, 16, 16)}, {"made": (1, 3, 16, 16)}, weights)
    done, target = repaired(source)
    assert (done, kinds_of(target)) == (Repairs(), ["BatchNormalization"])


def test_stale_shapes_are_inferred_anew(tmp_path: Path) -> None:
    noted = {"c0": (1, 16, 99, 16), "r0": (1, 16, 16, 16), "c1": ("n", "c", "h", "w")}
    source = save_picture_model(tmp_path / "m.onnx", noted=noted)
    done, target = repaired(source)
    assert (done, str(done)) == (Repairs(shapes=1), "1 stale shapes inferred anew")
    shapes = {
        value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in onnx.load(target).graph.value_info
    }
    assert shapes["c0"] == shapes["c1"] == [1, 16, 16, 16]
    assert difference(source, target) == 0


def test_a_graph_of_undeclared_ops_is_an_error(tmp_path: Path) -> None:
    source = save_picture_model(tmp_path / "m.onnx")
    content = onnx.load(str(source))
    content.graph.node[1].domain = "com.nobody"  # which the model does not import
    source.write_bytes(content.SerializeToString())
    with pytest.raises(ToolError, match="shapes can't be inferred"):
        repaired(source)


@pytest.mark.parametrize("name", ["weights.data", "m.onnx.data"])
def test_weights_beside_a_small_model_move_into_it(tmp_path: Path, name: str) -> None:
    source = with_external_weights(save_picture_model(tmp_path / "m.onnx"), name)
    (tmp_path / "work").mkdir()
    target = tmp_path / "work" / "repaired.onnx"
    assert repair(source, target) == Repairs()
    assert [path.name for path in target.parent.iterdir()] == ["repaired.onnx"]
    assert difference(source, target) == 0


def test_the_weights_of_a_large_model_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = with_external_weights(save_picture_model(tmp_path / "m.onnx", metadata={"author": "somebody"}))
    monkeypatch.setattr("tools.quantize_onnx.graph.repair.MAX_PROTOBUF_BYTES", 2**20 + 1000)
    (tmp_path / "work").mkdir()
    target = tmp_path / "work" / "repaired.onnx"
    for _ in range(2):  # again: ONNX would append to the file that is there
        repair(source, target)
        assert {path.name for path in target.parent.iterdir()} == {"repaired.onnx", "repaired.onnx.data"}
        assert (target.parent / "repaired.onnx.data").stat().st_size < 1.5 * (tmp_path / "weights.data").stat().st_size
    assert difference(source, target) == 0


def test_a_large_old_model_is_refused_by_name_of_its_opset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = with_external_weights(save_picture_model(tmp_path / "m.onnx", opset=11))
    monkeypatch.setattr("tools.quantize_onnx.graph.repair.MAX_PROTOBUF_BYTES", 2**20 + 1000)
    with pytest.raises(ToolError, match="a model this large can't be upgraded; got opset 11; expected at least 13"):
        repair(source, tmp_path / "repaired.onnx")


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("super-resolution-10", (1, 1, 224, 224), Repairs(opset=10, listed_weights=2)),
        ("realesr-animevideov3", (1, 3, 24, 32), Repairs()),
        ("srcnn_DerBurri", (1, 1, 224, 224), Repairs()),
    ],
)
def test_other_peoples_models_give_the_same_answers(name: str, shape: tuple[int, ...], expected: Repairs, tmp_path: Path) -> None:
    source, target = REALDATA / "onnx" / f"{name}.onnx", tmp_path / "repaired.onnx"
    done = repair(source, target)
    assert (done.opset, done.listed_weights > 0) == (expected.opset, expected.listed_weights > 0)
    with open_model(ModelFile(source), threads=1) as model:
        (given,) = model.inputs
    assert difference(source, target, **{given.name: np.random.default_rng(0).random(shape, np.float32)}) < ROUNDING
    names = [node.name for node in onnx.load(str(target)).graph.node]
    assert all(names)
    assert len(set(names)) == len(names)


def test_an_old_resize_places_pixels_as_it_did(tmp_path: Path) -> None:
    scales = np.array([1, 1, 2, 2], np.float32)
    node = helper.make_node("Resize", ["image", "scales"], ["made"], name="resize", mode="linear")
    source = save(tmp_path / "m.onnx", [node], {"image": (1, 3, 16, 16)}, {"made": (1, 3, 32, 32)}, {"scales": scales}, opset=10)
    done, target = repaired(source)
    assert done.opset == 10
    assert difference(source, target) < 1e-6
