"""An .onnx file's ops and metadata are read without its weights, and files that it refers to lie next to it or are refused."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from shared.command.errors import ToolError
from shared.formats.model_file import ModelFile
from shared.formats.onnx_file import check_is_onnx, external_files, name_weights, read_model, tensor_bytes
from shared.formats.onnx_graph import METADATA_KEY, read_onnx, read_ops, without_traces, write_metadata
from tests.conftest import REALDATA
from tests.support.small_onnx import answer, save, save_picture_model, seeded, with_external_weights

EXTERNAL = "w.data"
NOTED = "/home/somebody/net.py:3"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_picture_model(tmp_path / "m.onnx")


@pytest.fixture
def external(model: Path) -> Path:
    """The same with weights in a file beside it."""
    return with_external_weights(model, EXTERNAL)


def edited(path: Path, edit: Callable[[Any], None]) -> Path:
    model = onnx.load(str(path), load_external_data=False)
    edit(model)
    path.write_bytes(model.SerializeToString())
    return path


def set_entry(path: Path, key: str, value: str) -> Path:
    """Change where each weight is said to lie."""

    def edit(model: Any) -> None:
        for tensor in model.graph.initializer:
            found = [entry for entry in tensor.external_data if entry.key == key]
            entry = found[0] if found else tensor.external_data.add(key=key)
            entry.value = value

    return edited(path, edit)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such model file"),
        (b"", "the model file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "an HTML page"),
        (b"PK\3\4" + bytes(60), "a zip file"),
        (b"\x1c\0\0\0TFL3" + bytes(60), "a TFLite model"),
        (b"no model at all, honestly\n", "not an ONNX model, or a damaged one"),
        (bytes(64), "not an ONNX model, or a damaged one"),
    ],
)
def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ToolError, match=says) as caught:
        check_is_onnx(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_a_truncated_model_is_refused(model: Path, kept: float) -> None:
    content = model.read_bytes()
    model.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ToolError, match="not an ONNX model, or a damaged one"):
        check_is_onnx(model)


def test_a_graph_without_nodes_is_refused(model: Path) -> None:
    edited(model, lambda content: content.graph.ClearField("node"))
    with pytest.raises(ToolError, match="no graph with nodes"):
        check_is_onnx(model)


def test_a_file_larger_than_any_model_is_not_read(model: Path) -> None:
    os.truncate(model, 2**31)  # sparse: takes no disk
    with pytest.raises(ToolError, match="larger than any ONNX model can be"):
        read_model(model)


def test_a_model_in_order_passes(model: Path) -> None:
    check_is_onnx(model)
    assert external_files(model) == []


def test_weights_beside_a_model_are_found_and_not_loaded(external: Path) -> None:
    check_is_onnx(external)
    assert external_files(external) == [external.with_name(EXTERNAL)]
    assert {len(tensor.raw_data) for tensor in read_model(external).graph.initializer} == {0}


@pytest.mark.parametrize(
    "location",
    ["../w.data", "..", "/etc/passwd", "sub/w.data", "", ".", "w\n.data", "./../w.data"],
)
def test_weights_that_lie_elsewhere_are_refused_in_one_line(external: Path, location: str) -> None:
    (external.parent.parent / EXTERNAL).write_bytes(external.with_name(EXTERNAL).read_bytes())
    (external.parent / "sub").mkdir()
    (external.parent / "sub" / EXTERNAL).write_bytes(external.with_name(EXTERNAL).read_bytes())
    set_entry(external, "location", location)
    with pytest.raises(ToolError, match="external weights must lie beside the model") as caught:
        check_is_onnx(external)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(("key", "value"), [("offset", "-1"), ("offset", "far"), ("length", "-4"), ("length", "1e3")])
def test_places_that_are_no_places_are_refused(external: Path, key: str, value: str) -> None:
    set_entry(external, key, value)
    with pytest.raises(ToolError, match="external weights must lie beside the model"):
        external_files(external)


def test_missing_weights_are_named(external: Path) -> None:
    external.with_name(EXTERNAL).unlink()
    with pytest.raises(ToolError, match=rf"{EXTERNAL}: the model's weights are missing; put {EXTERNAL} beside m\.onnx"):
        check_is_onnx(external)


@pytest.mark.parametrize("without_length", [False, True])
def test_weights_that_are_cut_off_are_refused(external: Path, without_length: bool) -> None:
    if without_length:

        def edit(model: Any) -> None:
            for tensor in model.graph.initializer:
                kept = [entry for entry in tensor.external_data if entry.key != "length"]
                del tensor.external_data[:]
                tensor.external_data.extend(kept)

        edited(external, edit)
    check_is_onnx(external)
    data = external.with_name(EXTERNAL)
    os.truncate(data, data.stat().st_size - 1)
    with pytest.raises(ToolError, match=rf"cut off; got {data.stat().st_size}; expected at least {data.stat().st_size + 1} bytes"):
        check_is_onnx(external)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_weights_that_are_a_link_are_refused(external: Path, tmp_path: Path, link: Callable[[Path, Path], None]) -> None:
    data = external.with_name(EXTERNAL)
    data.rename(tmp_path / "elsewhere")
    link(tmp_path / "elsewhere", data)
    with pytest.raises(ToolError, match="weights are a link, which ONNX does not follow"):
        check_is_onnx(external)


def test_weights_of_constant_nodes_and_of_inner_graphs_are_found_too(tmp_path: Path) -> None:
    def outside(name: str, location: str) -> Any:
        tensor = numpy_helper.from_array(seeded(4), name)
        onnx.external_data_helper.set_external_data(tensor, location)
        tensor.ClearField("raw_data")
        return tensor

    made = [helper.make_tensor_value_info("then", onnx.TensorProto.FLOAT, [4])]
    branch = helper.make_graph([helper.make_node("Constant", [], ["then"], value=outside("c", "inner.data"))], "branch", [], made)
    nodes = [
        helper.make_node("Constant", [], ["held"], value=outside("held", "constant.data")),
        helper.make_node("If", ["truth"], ["chosen"], then_branch=branch, else_branch=branch),
        helper.make_node("Add", ["held", "chosen"], ["y"]),
    ]
    path = save(tmp_path / "m.onnx", nodes, {"x": (4,)}, {"y": (4,)}, {"truth": np.array(True)})
    for name in ("inner.data", "constant.data"):
        (tmp_path / name).write_bytes(bytes(16))
    assert [file.name for file in external_files(path)] == ["constant.data", "inner.data"]
    (tmp_path / "inner.data").unlink()
    with pytest.raises(ToolError, match=r"inner\.data: the model's weights are missing"):
        external_files(path)


def test_ops_have_their_weights_types_and_names(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(seeded(4, 3, 3, 3), "w")),
        helper.make_node("Conv", ["x", "w", "b"], ["c"], name="first"),
        helper.make_node("Reshape", ["c", "shape"], ["r"]),
        helper.make_node("Gelu", ["r"], ["y"], domain="com.example"),
    ]
    weights = {"b": seeded(4), "shape": np.array([1, -1])}
    ops = read_ops(read_model(save(tmp_path / "m.onnx", nodes, {"x": (1, 3, 8, 8)}, {"y": None}, weights)))
    assert [op.name for op in ops] == ["Constant_0", "first", "Reshape_2", "Gelu_3"]
    assert [op.op_type for op in ops] == ["Constant", "Conv", "Reshape", "com.example.Gelu"]
    conv, reshape = ops[1], ops[2]
    assert (conv.weights, conv.weight, conv.weight_bytes, conv.dtype) == ({"w": 432, "b": 16}, "w", 432, "FLOAT")
    assert (reshape.weight, reshape.weight_bytes, reshape.dtype) == (None, 0, "")


@pytest.mark.parametrize(
    ("dtype", "dims", "size"),
    [
        ("FLOAT", [3, 5], 60),
        ("FLOAT16", [3, 5], 30),
        ("INT8", [3, 5], 15),
        ("INT4", [3, 5], 8),
        ("INT64", [], 8),
        ("FLOAT", [0], 0),
    ],
)
def test_sizes_of_tensors_follow_from_their_types(dtype: str, dims: list[int], size: int) -> None:
    tensor = onnx.TensorProto(data_type=onnx.TensorProto.DataType.Value(dtype), dims=dims)
    assert tensor_bytes(tensor) == size


def test_metadata_comes_back_and_others_entries_stay(model: Path) -> None:
    content = onnx.load(str(model))
    helper.set_model_props(content, {"author": "somebody", METADATA_KEY: "old"})
    write_metadata(content, {"nbits": 32})
    model.write_bytes(content.SerializeToString())
    assert ModelFile(model).metadata == {"nbits": 32}
    assert ModelFile(model).nbits == 32
    assert {entry.key: entry.value for entry in content.metadata_props} == {"author": "somebody", METADATA_KEY: '{"nbits": 32}'}


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "[" * 60_000, '{"a": "' + "x" * 2**16 + '"}'])
def test_metadata_that_is_not_ours_is_none(model: Path, text: str) -> None:
    edited(model, lambda content: helper.set_model_props(content, {METADATA_KEY: text}))
    found = read_onnx(model)
    assert (found.metadata, found.input_range) == ({}, None)


@pytest.mark.parametrize(
    ("content", "declared"),
    [
        ({}, None),
        ({"nbits": 32}, (0.0, 1.0)),
        ({"input_range": "-1..1"}, (-1.0, 1.0)),
        ({"input_range": "0..255", "nbits": 32}, (0.0, 255.0)),
        ({"input_range": "some"}, None),
        ({"input_range": "a..b"}, None),
    ],
)
def test_the_range_of_the_image_is_what_the_metadata_says(
    model: Path, content: dict[str, object], declared: tuple[float, float] | None
) -> None:
    edited(model, lambda proto: write_metadata(proto, content))
    assert read_onnx(model).input_range == declared


def test_traces_of_the_exporter_are_taken_out_and_nothing_else(model: Path) -> None:
    before = answer(model, image=seeded(1, 3, 16, 16))[0]

    def leave_traces(content: Any) -> None:
        content.graph.doc_string = NOTED
        content.graph.metadata_props.add(key="trace", value=NOTED)
        for item in (*content.graph.node, *content.graph.input, *content.graph.initializer):
            item.doc_string = NOTED
            item.metadata_props.add(key="trace", value=NOTED)

    assert NOTED.encode() in edited(model, leave_traces).read_bytes()
    assert NOTED.encode() not in edited(model, without_traces).read_bytes()
    np.testing.assert_array_equal(answer(model, image=seeded(1, 3, 16, 16))[0], before)


def test_weights_get_a_name_of_their_content_and_the_model_runs(tmp_path: Path) -> None:
    sample = seeded(1, 3, 16, 16)
    draft, output = save_picture_model(tmp_path / ".m.onnx.1.partial"), tmp_path / "m.onnx"
    expected = answer(draft, image=sample)[0]
    with_external_weights(draft, f"{draft.name}.data")
    digest = hashlib.sha256((tmp_path / f"{draft.name}.data").read_bytes()).hexdigest()
    name_weights(draft, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == [draft.name, f"m.{digest[:8]}.data"]
    assert external_files(draft) == [tmp_path / f"m.{digest[:8]}.data"]
    draft.rename(output)
    np.testing.assert_array_equal(answer(output, image=sample)[0], expected)


def test_new_weights_never_replace_those_of_the_model_before(tmp_path: Path) -> None:
    sample, output = seeded(1, 3, 16, 16), tmp_path / "m.onnx"
    answers = []
    for width in (4, 8):
        draft = with_external_weights(save_picture_model(tmp_path / "draft", widths=[width]), "draft.data")
        name_weights(draft, output)
        if width == 4:
            draft.rename(output)
        answers.append(answer(output, image=sample)[0])
    assert len(list(tmp_path.glob("m.*.data"))) == 2
    np.testing.assert_array_equal(*answers)


def test_a_model_that_holds_its_weights_is_left_alone(model: Path) -> None:
    before = model.read_bytes()
    name_weights(model, model.with_name("other.onnx"))
    assert model.read_bytes() == before
    assert [path.name for path in model.parent.iterdir()] == ["m.onnx"]


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "says"),
    [("external_data_missing.onnx", "the model's weights are missing"), ("mangled.onnx", "not an ONNX model; got an HTML page")],
)
def test_other_peoples_broken_models_are_refused(name: str, says: str) -> None:
    with pytest.raises(ToolError, match=says):
        check_is_onnx(REALDATA / "corrupt" / name)
