"""What runtimes say of a failure loses their codes, places in their sources and inner names, and keeps what a user can act on."""

import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from shared.command.errors import MOST_READ, ToolError, plain_reason
from shared.runtime.processes import Workspace

ARRAY = np.zeros((3, 3), np.float32)
NOISE = ("[ONNXRuntimeError]", "onnxruntime_src", ".h:", ".cc:", "Status Message", "non-zero", "_nchwc", "\n")


def failure(node: Any, shape: list[Any], constants: dict[str, Any], feed: Any = ARRAY, opset: int = 17) -> BaseException:
    """Return what ONNX Runtime raises for a graph of one node."""
    ends = [
        [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(feed.dtype), shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    ]
    held = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph([node], "g", *ends, held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        session.run(None, {"x": feed})
    except Exception as error:  # noqa: BLE001 - each has a type of its own
        return error
    raise AssertionError("the model runs")


@pytest.mark.parametrize(
    ("node", "shape", "constants", "feed", "says"),
    [
        (
            onnx.helper.make_node("Gather", ["t", "x"], ["y"], name="look up"),
            [3],
            {"t": np.zeros((2, 4), np.float32)},
            np.array([0, 1, 9]),
            "Gather 'look up': indices element out of data bounds, idx=9",
        ),
        (
            onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="product"),
            ["a", "b"],
            {"w": np.zeros((2, 4), np.float32)},
            ARRAY,
            "MatMul 'product': ",
        ),
        (
            onnx.helper.make_node("Reshape", ["x", "s"], ["y"], name="form"),
            ["a", "b"],
            {"s": np.array([5, 5])},
            ARRAY,
            "Input shape:{3,3}, requested shape:{5,5}",
        ),
        (
            onnx.helper.make_node("Conv", ["x", "w"], ["y"]),
            [1, "c", "h", "w"],
            {"w": np.zeros((2, 4, 3, 3), np.float32)},
            np.zeros((1, 3, 8, 8), np.float32),
            "Conv 'y': Input channels C is not equal to kernel channels",
        ),
        (onnx.helper.make_node("Unheard", ["x"], ["y"], name="u"), ["a", "b"], {}, ARRAY, "Unheard 'u': No Op registered"),
        (onnx.helper.make_node("Relu", ["x"], ["y"]), [1, 4], {}, ARRAY, "input: x for the following indices index: 0 Got: 3"),
    ],
)
def test_reasons_of_onnx_runtime_are_plain(node: Any, shape: list[Any], constants: dict[str, Any], feed: Any, says: str) -> None:
    reason = plain_reason(failure(node, shape, constants, feed))
    assert says in reason
    assert not [noise for noise in NOISE if noise in reason]


def test_a_reason_of_litert_is_plain() -> None:
    raised = RuntimeError(
        "tflite/kernels/concatenation.cc:159 t->dims->data[d] != t0->dims->data[d] (3 != 4)Node number 7 (CONCATENATION) failed"
    )
    assert plain_reason(raised) == "t->dims->data[d] != t0->dims->data[d] (3 != 4). Node number 7 (CONCATENATION) failed"
    assert plain_reason(ValueError()) == "ValueError"


def test_an_error_about_an_intermediate_file_names_the_model(tmp_path: Path) -> None:
    (tmp_path / "refusing.py").write_text(
        "from shared.command.errors import ToolError\n"
        "from shared.runtime.processes import answer_tasks\n"
        "def refuse(file):\n    raise ToolError('no good', where=file)\n"
        "def fail(file):\n    raise ValueError(f'{file} is odd')\n"
        "handle = answer_tasks({'refuse': refuse, 'fail': fail})\n"
    )
    worker = ModuleType("refusing")
    folder = tmp_path / "work"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        with Workspace(folder, worker, 60) as workspace:
            with pytest.raises(ToolError, match=r"^model\.onnx: no good$"):
                workspace.run("refuse", "it failed", "model.onnx", file=str(folder / "float.onnx"))
            with pytest.raises(ToolError, match=r"^other: no good$"):
                workspace.run("refuse", "it failed", "model.onnx", file="other")
            with pytest.raises(ToolError, match=r"^model\.onnx: it failed; got float\.onnx is odd$"):
                workspace.run("fail", "it failed", "model.onnx", file=str(folder / "float.onnx"))


def test_a_name_of_any_length_is_cut_in_no_time() -> None:
    start = time.monotonic()
    assert len(plain_reason(RuntimeError("x" * 1_000_000))) <= MOST_READ
    assert time.monotonic() - start < 1
