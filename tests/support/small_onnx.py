"""Small seeded ONNX models for tests, and what they answer."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]
Shape = Sequence[int | str]
PICTURE = (1, 3, 16, 16)


def seeded(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    """Return normal float32 values."""
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def save(
    path: Path,
    nodes: Sequence[Any],
    inputs: Mapping[str, Shape],
    outputs: Mapping[str, Shape | None],
    weights: Mapping[str, Array] | None = None,
    *,
    opset: int = 17,
    ir: int = 8,
    lists_weights: bool = False,
    noted: Mapping[str, Shape] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a model of float inputs and outputs.

    Args:
        path: Where to.
        nodes: In their order.
        inputs: Name -> shape; letters are free axes.
        outputs: The same; None where the shape is unknown.
        weights: Name -> initializer.
        opset: Of the default domain.
        ir: Version of the file format.
        lists_weights: Whether weights are inputs, too, as old exporters had it.
        noted: Shapes of inner tensors that the file notes.
        metadata: Its metadata_props.
    """
    weights = weights or {}
    listed = {name: value.shape for name, value in weights.items()} if lists_weights else {}
    graph = helper.make_graph(
        list(nodes),
        "small",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in {**inputs, **listed}.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
        value_info=[helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (noted or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    helper.set_model_props(model, dict(metadata or {}))
    onnx.save_model(model, str(path))
    return path


def save_picture_model(path: Path, *, shape: Shape = PICTURE, widths: Sequence[int] = (16, 16), **changes: Any) -> Path:
    """Write convolutions with ReLUs between them that make a picture of a picture: conv0, relu0, conv1, ..."""
    channels = [int(shape[1]), *widths, int(shape[1])]
    nodes, weights, last = [], {}, "image"
    for number, (given, made) in enumerate(itertools.pairwise(channels)):
        weights[f"w{number}"] = seeded(made, given, 3, 3, seed=number, scale=0.5 / (3 * given**0.5))
        weights[f"b{number}"] = seeded(made, seed=100 + number, scale=0.05)
        is_last = number == len(channels) - 2
        output = "made" if is_last else f"c{number}"
        nodes.append(helper.make_node("Conv", [last, f"w{number}", f"b{number}"], [output], name=f"conv{number}", pads=[1] * 4))
        if not is_last:
            nodes.append(helper.make_node("Relu", [output], [f"r{number}"], name=f"relu{number}"))
            last = f"r{number}"
    return save(path, nodes, {"image": shape}, {"made": shape}, weights, **changes)


def save_vector_model(path: Path, *, depth: int = 16, opset: int = 17) -> Path:
    """Write MatMul + Add, Relu, Gemm with transB: vector (batch, 8) -> (batch, 4)."""
    nodes = [
        helper.make_node("MatMul", ["vector", "m"], ["mx"], name="product"),
        helper.make_node("Add", ["mx", "mb"], ["h"], name="plus"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("Gemm", ["r", "g", "gb"], ["out"], name="gemm", transB=1),
    ]
    weights = {"m": seeded(8, depth), "mb": seeded(depth, seed=1), "g": seeded(4, depth, seed=2), "gb": seeded(4, seed=3)}
    return save(path, nodes, {"vector": ("batch", 8)}, {"out": ("batch", 4)}, weights, opset=opset)


def with_external_weights(path: Path, location: str = "weights.data", *, least: int = 0) -> Path:
    """Put a model's weights of at least so many bytes into a file beside it."""
    model = onnx.load(str(path))
    (path.parent / location).unlink(missing_ok=True)
    onnx.save_model(model, str(path), save_as_external_data=True, location=location, size_threshold=least)
    return path


def answer(path: Path, **inputs: Array) -> list[Array]:
    """Return what ONNX Runtime makes of inputs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [np.asarray(made) for made in session.run(None, inputs)]


def weights_of(path: Path) -> dict[str, Array]:
    """Return a model's initializers."""
    model = onnx.load(str(path))
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def kinds_of(path: Path) -> list[str]:
    """Return the op types of a model in their order."""
    return [node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node]
