"""A repaired model gives exactly the answers of the one that was given."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils
from numpy.typing import NDArray

from shared.command.errors import ToolError
from shared.formats.model_file import ModelFile
from shared.formats.tflite import enum_names, read_tflite
from shared.runtime.model import Kernels, open_model
from shared.runtime.samples import sample_inputs
from tests.conftest import REALDATA
from tools.quantize_tflite.bundle import models_of, unpack_bundle
from tools.quantize_tflite.graph.repair import Repairs, cut_before_custom_ops, needed_repairs, repair
from tools.quantize_tflite.recipes import resolve_recipe

Edit = Callable[[Any], None]
KERNELS: tuple[Kernels, ...] = ("xnnpack", "reference")
OPS = schema.BuiltinOperator


@pytest.fixture(scope="module")
def half_model(float_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small network with float16 weights behind DEQUANTIZE."""
    from ai_edge_quantizer import quantizer

    path = tmp_path_factory.mktemp("half") / "half.tflite"
    job = quantizer.Quantizer(str(float_model), resolve_recipe("fp16")[1])
    job.quantize(serialize_to_path=str(path), enable_progress_bar=False, enable_progress_report=False)
    return path


def answers(path: Path, kernels: Kernels, seeds: int = 2) -> list[dict[str, NDArray[Any]]]:
    """Return outputs of seeded samples; on one thread, for plain kernels add in another order on several if weights are stored."""
    with open_model(ModelFile(path), threads=1, kernels=kernels) as model:
        return [model.run(sample_inputs(model.inputs, seed))[0] for seed in range(seeds)]


def largest_difference(one: Path, other: Path, kernels: Kernels) -> float:
    """Return the largest difference of the outputs that both models have; every one of them finite."""
    differences = []
    for mine, its in zip(answers(one, kernels), answers(other, kernels), strict=True):
        common = mine.keys() & its.keys()
        assert common
        assert all(np.isfinite(mine[name]).all() for name in common)
        differences += [float(np.abs(mine[name].astype(np.float64) - its[name]).max()) for name in common]
    return max(differences)


def edited(source: Path, target: Path, edit: Edit) -> Path:
    model = flatbuffer_utils.read_model(str(source))
    edit(model)
    target.write_bytes(bytes(flatbuffer_utils.convert_object_to_bytearray(model)))
    return target


def read(path: Path) -> Any:
    return flatbuffer_utils.read_model(str(path))


def tensor_names(path: Path) -> list[bytes]:
    return [tensor.name for graph in read(path).subgraphs for tensor in graph.tensors]


def dead_tensors(path: Path) -> list[bytes]:
    """Return the tensors of a model that nothing reads or writes."""
    dead = []
    for graph in read(path).subgraphs:
        used = {t for op in graph.operators for t in (*op.inputs, *op.outputs)} | {*graph.inputs, *graph.outputs}
        dead += [tensor.name for t, tensor in enumerate(graph.tensors) if t not in used]
    return dead


def op_kinds(path: Path) -> Counter[int]:
    model = read(path)
    return Counter(model.operatorCodes[op.opcodeIndex].builtinCode for graph in model.subgraphs for op in graph.operators)


def kinds_by_either_code(path: Path) -> Counter[str]:
    """Return the builtin ops of a file whose codes may lie in the deprecated field."""
    model = read(path)
    codes = [enum_names("BuiltinOperator")[max(code.builtinCode, code.deprecatedBuiltinCode)] for code in model.operatorCodes]
    return Counter(codes[op.opcodeIndex] for graph in model.subgraphs for op in graph.operators)


@pytest.mark.parametrize("kernels", KERNELS)
def test_float16_weights_become_float32_and_no_answer_changes(half_model: Path, tmp_path: Path, kernels: Kernels) -> None:
    target = tmp_path / "repaired.tflite"
    done = repair(half_model, target)
    assert done.float16 == op_kinds(half_model)[OPS.DEQUANTIZE] > 20
    assert {op.dtype for op in read_tflite(target).ops if op.weight_bytes} == {"FLOAT32"}
    assert read_tflite(target).restored_types == []
    assert op_kinds(target)[OPS.DEQUANTIZE] == 0
    assert largest_difference(half_model, target, kernels) == 0.0


def test_folded_weights_are_the_stored_ones_widened(half_model: Path, float_model: Path, tmp_path: Path) -> None:
    repair(half_model, tmp_path / "repaired.tflite")
    before = {tensor.name: tensor for tensor in read(float_model).subgraphs[0].tensors}
    model, original = read(tmp_path / "repaired.tflite"), read(float_model)
    compared = 0
    for op in model.subgraphs[0].operators:
        if model.operatorCodes[op.opcodeIndex].builtinCode != OPS.CONV_2D:
            continue
        weights = model.subgraphs[0].tensors[op.inputs[1]]
        output = model.subgraphs[0].tensors[op.outputs[0]].name
        (same,) = [o for o in original.subgraphs[0].operators if original.subgraphs[0].tensors[o.outputs[0]].name == output]
        stored = original.buffers[original.subgraphs[0].tensors[same.inputs[1]].buffer].data
        exact = np.asarray(stored, np.uint8).view(np.float32)
        found = np.asarray(model.buffers[weights.buffer].data, np.uint8).view(np.float32)
        np.testing.assert_array_equal(found, exact.astype(np.float16).astype(np.float32))
        compared += 1
    assert compared == 5
    assert before.keys() >= {tensor.name for tensor in model.subgraphs[0].tensors if tensor.buffer == 0}


def test_folding_leaves_no_dead_tensors_and_no_float16_bytes(half_model: Path, float_model: Path, tmp_path: Path) -> None:
    target = tmp_path / "repaired.tflite"
    repair(half_model, target)
    assert dead_tensors(target) == []
    assert target.stat().st_size < 1.05 * float_model.stat().st_size


def test_what_is_needed_is_what_is_done(half_model: Path, tmp_path: Path) -> None:
    assert needed_repairs(half_model) == repair(half_model, tmp_path / "repaired.tflite")
    assert str(needed_repairs(half_model)) == f"{needed_repairs(half_model).float16} float16 constants folded to float32"


def test_a_repaired_model_needs_no_repair(half_model: Path, tmp_path: Path) -> None:
    repair(half_model, tmp_path / "once.tflite")
    assert needed_repairs(tmp_path / "once.tflite") == Repairs()
    assert repair(tmp_path / "once.tflite", tmp_path / "twice.tflite") == Repairs()
    assert largest_difference(tmp_path / "once.tflite", tmp_path / "twice.tflite", "xnnpack") == 0.0


def test_a_model_in_order_needs_nothing(float_model: Path) -> None:
    assert str(needed_repairs(float_model)) == str(Repairs()) == ""


def test_repairing_twice_gives_the_same_bytes(half_model: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        repair(half_model, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("kernels", KERNELS)
def test_op_codes_leave_the_deprecated_field(float_model: Path, tmp_path: Path, kernels: Kernels) -> None:
    moved = 0

    def deprecate(model: Any) -> None:
        nonlocal moved
        for code in model.operatorCodes:
            if 0 < code.builtinCode < 127:
                code.deprecatedBuiltinCode, code.builtinCode = code.builtinCode, 0
                moved += 1

    old = edited(float_model, tmp_path / "old.tflite", deprecate)
    assert needed_repairs(old) == Repairs(op_codes=moved)
    assert moved > 5
    assert repair(old, tmp_path / "new.tflite") == Repairs(op_codes=moved)
    assert {code.builtinCode for code in read(tmp_path / "new.tflite").operatorCodes} == {
        code.builtinCode for code in read(float_model).operatorCodes
    }
    assert largest_difference(old, tmp_path / "new.tflite", kernels) == 0.0
    assert largest_difference(float_model, tmp_path / "new.tflite", kernels) == 0.0


def test_float16_behind_deprecated_op_codes_is_folded_too(half_model: Path, tmp_path: Path) -> None:
    def deprecate(model: Any) -> None:
        for code in model.operatorCodes:
            if 0 < code.builtinCode < 127:
                code.deprecatedBuiltinCode, code.builtinCode = code.builtinCode, 0

    old = edited(half_model, tmp_path / "old.tflite", deprecate)
    assert repair(old, tmp_path / "new.tflite").float16 == needed_repairs(half_model).float16
    assert largest_difference(half_model, tmp_path / "new.tflite", "xnnpack") == 0.0


@pytest.mark.parametrize("name", [b"", b"same", None])
def test_tensors_that_share_a_name_get_their_own_and_the_ends_keep_theirs(
    float_model: Path, tmp_path: Path, name: bytes | None
) -> None:
    def rename(model: Any) -> None:
        graph = model.subgraphs[0]
        for index in range(len(graph.tensors)):
            if index not in (*graph.inputs, *graph.outputs):
                graph.tensors[index].name = name

    source = edited(float_model, tmp_path / "source.tflite", rename)
    count = len(read(source).subgraphs[0].tensors)
    done = repair(source, tmp_path / "target.tflite")
    assert done == needed_repairs(source) == Repairs(names=count - (2 if not name else 3))
    names = tensor_names(tmp_path / "target.tflite")
    assert len(set(names)) == len(names) == count
    assert all(names)
    before, after = read(source).subgraphs[0], read(tmp_path / "target.tflite").subgraphs[0]
    assert [before.tensors[t].name for t in (*before.inputs, *before.outputs)] == [
        after.tensors[t].name for t in (*after.inputs, *after.outputs)
    ]
    assert largest_difference(source, tmp_path / "target.tflite", "xnnpack") == 0.0


def test_ends_keep_a_name_that_inner_tensors_have_too(float_model: Path, tmp_path: Path) -> None:
    def rename(model: Any) -> None:
        graph = model.subgraphs[0]
        inner = [t for t in range(len(graph.tensors)) if t not in (*graph.inputs, *graph.outputs)]
        graph.tensors[inner[0]].name = graph.tensors[graph.inputs[0]].name
        graph.tensors[inner[-1]].name = graph.tensors[graph.outputs[0]].name

    source = edited(float_model, tmp_path / "source.tflite", rename)
    assert repair(source, tmp_path / "target.tflite") == Repairs(names=2)
    before, after = read(float_model).subgraphs[0], read(tmp_path / "target.tflite").subgraphs[0]
    assert [after.tensors[t].name for t in (after.inputs[0], after.outputs[0])] == [
        before.tensors[t].name for t in (before.inputs[0], before.outputs[0])
    ]
    names = tensor_names(tmp_path / "target.tflite")
    assert len(set(names)) == len(names)


def test_a_name_that_was_its_own_stays(float_model: Path, tmp_path: Path) -> None:
    inner: list[int] = []

    def rename(model: Any) -> None:
        graph = model.subgraphs[0]
        inner.extend(t for t in range(len(graph.tensors)) if t not in (*graph.inputs, *graph.outputs))
        for index, name in zip(inner, (b"x", b"x", b"x_2"), strict=False):
            graph.tensors[index].name = name

    source = edited(float_model, tmp_path / "source.tflite", rename)
    repair(source, tmp_path / "target.tflite")
    graph = read(tmp_path / "target.tflite").subgraphs[0]
    assert graph.tensors[inner[2]].name == b"x_2"


def test_a_model_without_signatures_gets_one_where_asked(float_model: Path, tmp_path: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    def strip(model: Any) -> None:
        model.signatureDefs = []

    source = edited(float_model, tmp_path / "source.tflite", strip)
    repair(source, tmp_path / "without.tflite")
    repair(source, tmp_path / "with.tflite", add_signature=True)
    assert Interpreter(str(tmp_path / "without.tflite")).get_signature_list() == {}
    interpreter = Interpreter(str(tmp_path / "with.tflite"))
    names = {"inputs": ["serving_default_image"], "outputs": ["serving_default_output_0_output"]}
    assert interpreter.get_signature_list() == {"serving_default": names}
    sample = np.random.default_rng(0).random((1, 3, 64, 64), np.float32)
    (answer,) = interpreter.get_signature_runner("serving_default")(serving_default_image=sample).values()
    original = Interpreter(str(float_model)).get_signature_runner("serving_default")(image=sample)["output_0"]
    np.testing.assert_array_equal(answer, original)


def test_a_signature_that_is_there_stays(half_model: Path, tmp_path: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    repair(half_model, tmp_path / "target.tflite", add_signature=True)
    expected = {"serving_default": {"inputs": ["image"], "outputs": ["output_0"]}}
    assert Interpreter(str(tmp_path / "target.tflite")).get_signature_list() == expected


@pytest.mark.parametrize("kept", [100, 4000])
@pytest.mark.parametrize("work", ["needed_repairs", "repair"])
def test_a_file_cut_off_in_its_tables_is_damaged(half_model: Path, tmp_path: Path, kept: int, work: str) -> None:
    damaged, target = tmp_path / "damaged.tflite", tmp_path / "target.tflite"
    damaged.write_bytes(half_model.read_bytes()[:kept])
    with pytest.raises(ToolError, match=r"damaged\.tflite: damaged TFLite model"):
        repair(damaged, target) if work == "repair" else needed_repairs(damaged)
    assert not target.exists()


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_float16_weights_cut_off_are_an_error_and_nothing_is_written(half_model: Path, tmp_path: Path, kept: float) -> None:
    content, target = half_model.read_bytes(), tmp_path / "target.tflite"
    damaged = tmp_path / "damaged.tflite"
    damaged.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ToolError, match=r"(stored constants can't be evaluated|a constant lies outside the file)"):
        repair(damaged, target)
    assert not target.exists()


def test_a_file_of_another_kind_is_a_tool_error(tmp_path: Path) -> None:
    (tmp_path / "a.tflite").write_text("<html>no model</html>")
    with pytest.raises(ToolError, match="HTML page"):
        needed_repairs(tmp_path / "a.tflite")
    with pytest.raises(ToolError):
        repair(tmp_path / "a.tflite", tmp_path / "b.tflite")


def make_custom(source: Path, target: Path, place: int) -> list[bytes]:
    """Make the op at a place in the graph a custom one; return the names of the tensors it reads and nothing else computes."""
    read_by: list[bytes] = []

    def edit(model: Any) -> None:
        graph = model.subgraphs[0]
        model.operatorCodes.append(schema.OperatorCodeT(builtinCode=OPS.CUSTOM, deprecatedBuiltinCode=32, customCode=b"Nobody"))
        op = graph.operators[place]
        op.opcodeIndex, op.builtinOptionsType, op.builtinOptions = len(model.operatorCodes) - 1, 0, None
        computed = {t for other in graph.operators[:place] for t in other.outputs}
        read_by.extend(graph.tensors[t].name for t in op.inputs if t in computed)

    edited(source, target, edit)
    return read_by


def test_the_part_before_custom_ops_runs_and_agrees_with_the_whole(float_model: Path, tmp_path: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    last = len(read(float_model).subgraphs[0].operators) - 1
    read_by = make_custom(float_model, tmp_path / "custom.tflite", last)
    assert read_tflite(tmp_path / "custom.tflite").custom_ops == ["Nobody"]
    assert cut_before_custom_ops(tmp_path / "custom.tflite", tmp_path / "part.tflite")
    with open_model(ModelFile(tmp_path / "part.tflite"), kernels="reference") as model:
        assert [spec.name.encode() for spec in model.outputs] == read_by
        sample = sample_inputs(model.inputs, 0)
        answer = model.run(sample)[0][read_by[0].decode()]
    whole = Interpreter(
        str(float_model),
        experimental_preserve_all_tensors=True,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    whole.allocate_tensors()
    whole.set_tensor(whole.get_input_details()[0]["index"], next(iter(sample.values())))
    whole.invoke()
    (index,) = [d["index"] for d in whole.get_tensor_details() if d["name"] == read_by[0].decode()]
    np.testing.assert_array_equal(answer, whole.get_tensor(index))


def test_nothing_is_left_where_the_first_op_is_custom(float_model: Path, tmp_path: Path) -> None:
    make_custom(float_model, tmp_path / "custom.tflite", 0)
    assert not cut_before_custom_ops(tmp_path / "custom.tflite", tmp_path / "part.tflite")


def test_a_model_without_custom_ops_is_cut_nowhere(float_model: Path, tmp_path: Path) -> None:
    assert cut_before_custom_ops(float_model, tmp_path / "part.tflite")
    assert op_kinds(tmp_path / "part.tflite") == op_kinds(float_model)
    (whole,), (part,) = answers(float_model, "xnnpack", 1), answers(tmp_path / "part.tflite", "xnnpack", 1)
    np.testing.assert_array_equal(whole["output_0"], part["serving_default_output_0_output"])


def keep_outputs(model: Any, names: set[bytes]) -> None:
    """Drop outputs that only restore a constant for the part that was cut off: XNNPACK refuses those."""
    graph = model.subgraphs[0]
    graph.outputs = [t for t in graph.outputs if graph.tensors[t].name in names]
    assert len(graph.outputs) == len(names)


@pytest.fixture(scope="module")
def real_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Other people's models with float16 weights, those of the face landmarker's bundle unpacked."""
    folder = tmp_path_factory.mktemp("bundle")
    entries = unpack_bundle(REALDATA / "mediapipe" / "face_landmarker.task", folder / "entries")
    models = {name: entry.path for name, entry in models_of(entries)}
    for name in ("pose_detection", "selfie_segmenter", "face_landmark_with_attention"):
        models[name] = REALDATA / "mediapipe" / f"{name}.tflite"
    return models


@pytest.mark.realdata
@pytest.mark.parametrize(
    "name",
    [
        "face_detector.tflite",
        "face_landmarks_detector.tflite",
        "face_blendshapes.tflite",
        "pose_detection",
        "selfie_segmenter",
        "face_landmark_with_attention",
    ],
)
def test_other_peoples_float16_models_give_the_same_answers(real_models: dict[str, Path], tmp_path: Path, name: str) -> None:
    source, target = real_models[name], tmp_path / "repaired.tflite"
    done = repair(source, target)
    assert done == needed_repairs(source)
    assert done.float16 > 10
    assert needed_repairs(target) == Repairs()
    assert read_tflite(target).restored_types == []
    assert dead_tensors(target) == []
    before, after = source, target
    if read_tflite(source).custom_ops:
        before, after = tmp_path / "before.tflite", tmp_path / "after.tflite"
        assert cut_before_custom_ops(source, before)
        assert cut_before_custom_ops(target, after)
        ends = {after_graph.tensors[t].name for after_graph in read(after).subgraphs for t in after_graph.outputs}
        before = edited(before, tmp_path / "ends.tflite", lambda model: keep_outputs(model, ends))
    for kernels in KERNELS:
        assert largest_difference(before, after, kernels) == 0.0


@pytest.mark.realdata
def test_sparse_weights_become_dense(real_models: dict[str, Path], tmp_path: Path) -> None:
    source, target = real_models["pose_detection"], tmp_path / "repaired.tflite"
    assert repair(source, target).sparse == kinds_by_either_code(source)["DENSIFY"] > 0
    assert op_kinds(target)[OPS.DENSIFY] == 0
    assert all(tensor.sparsity is None for tensor in read(target).subgraphs[0].tensors)


@pytest.mark.realdata
def test_the_custom_ops_of_real_models_come_late(real_models: dict[str, Path], tmp_path: Path) -> None:
    for name in ("selfie_segmenter", "face_landmark_with_attention"):
        assert read_tflite(real_models[name]).custom_ops
        assert cut_before_custom_ops(real_models[name], tmp_path / "part.tflite")
        assert read_tflite(tmp_path / "part.tflite").custom_ops in ([], read_tflite(real_models[name]).custom_ops)
        assert len(read(tmp_path / "part.tflite").subgraphs[0].operators) > 10
