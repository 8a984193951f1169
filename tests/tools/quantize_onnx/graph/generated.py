"""Seeded graphs of random ops: random opset, random sharing of weights, outputs anywhere.

Ops that jump, such as Ceil, are left out: next to a jump the smallest noise is an error of a whole step.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.support.small_onnx import Array

SIDE, CHANNELS = 12, 4
FIRST_OPSET, LAST_OPSET = 9, 22
UNARY = (
    "Relu",
    "LeakyRelu",
    "Sigmoid",
    "Tanh",
    "Abs",
    "Neg",
    "Elu",
    "Softplus",
    "HardSigmoid",
    "Erf",
    "Identity",
    "Dropout",
    "Softsign",
)


@dataclass
class Drawn:
    """A graph in the making: its nodes, its weights, and the shape of each tensor (1, C, H, W) made so far."""

    rng: np.random.Generator
    opset: int
    nodes: list[Any] = field(default_factory=list)
    weights: dict[str, Array] = field(default_factory=dict)
    shapes: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    def pick(self) -> str:
        """Return a tensor, later ones more often."""
        names = list(self.shapes)
        return names[int(len(names) * self.rng.random() ** 0.5)]

    def constant(self, *shape: int, scale: float = 1.0) -> str:
        """Return a constant of that shape, now and then one that is there already."""
        known = [name for name, values in self.weights.items() if values.shape == shape and values.dtype == np.float32]
        if known and self.rng.random() < 0.3:
            return known[int(self.rng.integers(len(known)))]
        return self.exact((self.rng.standard_normal(shape) * scale).astype(np.float32))

    def exact(self, values: Array) -> str:
        """Return a constant of these values."""
        name = f"c{len(self.weights)}"
        self.weights[name] = values
        return name

    def add(self, op: str, inputs: list[str], shape: tuple[int, int, int], **attributes: Any) -> None:
        """Append a node with one output."""
        made = f"t{len(self.shapes)}"
        name = "" if self.rng.random() < 0.2 else f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [made], name=name, **attributes))
        self.shapes[made] = shape


def conv(drawn: Drawn) -> None:
    x = drawn.pick()
    channels, height, width = drawn.shapes[x]
    groups = channels if drawn.rng.random() < 0.3 else 1
    made = channels if groups > 1 else int(drawn.rng.choice([2, 4, 8]))
    per_group = channels // groups
    inputs = [x, drawn.constant(made, per_group, 3, 3, scale=(9 * per_group) ** -0.5)]
    if drawn.rng.random() < 0.7:
        inputs.append(drawn.constant(made, scale=0.1))
    drawn.add("Conv", inputs, (made, height, width), pads=[1] * 4, group=groups)


def transposed_conv(drawn: Drawn) -> None:
    x = drawn.pick()
    channels, height, width = drawn.shapes[x]
    if height > SIDE:
        return
    groups = 2 if channels % 2 == 0 and drawn.rng.random() < 0.5 else 1
    weight = drawn.constant(channels, 2, 2, 2, scale=(channels // groups) ** -0.5)
    drawn.add("ConvTranspose", [x, weight], (2 * groups, 2 * height, 2 * width), strides=[2, 2], group=groups)


def unary(drawn: Drawn) -> None:
    x = drawn.pick()
    drawn.add(str(drawn.rng.choice(UNARY)), [x], drawn.shapes[x])


def binary(drawn: Drawn) -> None:
    x = drawn.pick()
    same = [name for name, shape in drawn.shapes.items() if shape == drawn.shapes[x]]
    y = str(drawn.rng.choice(same)) if drawn.rng.random() < 0.7 else drawn.constant(drawn.shapes[x][0], 1, 1)
    op = str(drawn.rng.choice(["Add", "Sub", "Mul", "Max", "Min"]))
    drawn.add(op, [x, y] if drawn.rng.random() < 0.5 or op == "Sub" else [y, x], drawn.shapes[x])


def clip(drawn: Drawn) -> None:
    x = drawn.pick()
    if drawn.opset < 11:
        drawn.add("Clip", [x], drawn.shapes[x], min=-0.5, max=2.0)
    else:
        drawn.add("Clip", [x, drawn.exact(np.float32(-0.5)), drawn.exact(np.float32(2))], drawn.shapes[x])


def norm(drawn: Drawn) -> None:
    x = drawn.pick()
    channels = drawn.shapes[x][0]
    scale, shift = drawn.exact(np.full(channels, 1.5, np.float32)), drawn.constant(channels)
    if drawn.rng.random() < 0.5:
        drawn.add("InstanceNormalization", [x, scale, shift], drawn.shapes[x])
        return
    mean, variance = drawn.constant(channels, scale=0.1), drawn.exact(np.linspace(0.5, 2, channels, dtype=np.float32))
    drawn.add("BatchNormalization", [x, scale, shift, mean, variance], drawn.shapes[x])


def prelu(drawn: Drawn) -> None:
    x = drawn.pick()
    drawn.add("PRelu", [x, drawn.constant(drawn.shapes[x][0], 1, 1, scale=0.2)], drawn.shapes[x])


def pool(drawn: Drawn) -> None:
    x = drawn.pick()
    channels, height, width = drawn.shapes[x]
    if min(height, width) < 4:
        return
    op = str(drawn.rng.choice(["MaxPool", "AveragePool"]))
    drawn.add(op, [x], (channels, height // 2, width // 2), kernel_shape=[2, 2], strides=[2, 2])


def turn(drawn: Drawn) -> None:
    x = drawn.pick()
    channels, height, width = drawn.shapes[x]
    drawn.add("Transpose", [x], (channels, width, height), perm=[0, 1, 3, 2])


def join(drawn: Drawn) -> None:
    x = drawn.pick()
    channels, height, width = drawn.shapes[x]
    same = [name for name, shape in drawn.shapes.items() if shape[1:] == (height, width)]
    y = str(drawn.rng.choice(same))
    drawn.add("Concat", [x, y], (channels + drawn.shapes[y][0], height, width), axis=1)


def cut(drawn: Drawn) -> None:
    x = drawn.pick()
    channels, height, width = drawn.shapes[x]
    if drawn.opset < 10:
        drawn.add("Slice", [x], (channels, height - 1, width), axes=[2], starts=[0], ends=[height - 1])
        return
    places = [drawn.exact(np.array([value], np.int64)) for value in (0, height - 1, 2)]
    drawn.add("Slice", [x, *places], (channels, height - 1, width))


def shuffle(drawn: Drawn) -> None:
    x = drawn.pick()
    channels, height, width = drawn.shapes[x]
    if channels % 4 == 0:
        drawn.add("DepthToSpace", [x], (channels // 4, 2 * height, 2 * width), blocksize=2)
    elif height % 2 == width % 2 == 0:
        drawn.add("SpaceToDepth", [x], (channels * 4, height // 2, width // 2), blocksize=2)


def reduce(drawn: Drawn) -> None:
    x = drawn.pick()
    channels = drawn.shapes[x][0]
    if drawn.rng.random() < 0.5:
        drawn.add("GlobalAveragePool", [x], (channels, 1, 1))
    elif drawn.opset < 18:
        drawn.add("ReduceMax", [x], (channels, 1, 1), axes=[2, 3])
    else:
        drawn.add("ReduceMax", [x, drawn.exact(np.array([2, 3]))], (channels, 1, 1))


def resize(drawn: Drawn) -> None:
    x = drawn.pick()
    channels, height, width = drawn.shapes[x]
    if drawn.opset < 11 or height > SIDE:
        return
    scales = drawn.exact(np.array([1, 1, 2, 2], np.float32))
    mode = str(drawn.rng.choice(["nearest", "linear", "cubic"]))
    roi = drawn.exact(np.zeros(0, np.float32)) if drawn.opset < 13 else ""
    drawn.add("Resize", [x, roi, scales], (channels, 2 * height, 2 * width), mode=mode)


def dense(drawn: Drawn) -> None:
    """Rows of the last axis through a matrix; as a MatMul, or as Reshape, Gemm and Reshape."""
    x = drawn.pick()
    channels, height, width = drawn.shapes[x]
    matrix = drawn.constant(width, 8, scale=width**-0.5)
    if drawn.rng.random() < 0.5:
        drawn.add("MatMul", [x, matrix], (channels, height, 8))
        return
    number = len(drawn.nodes)
    rows, back = drawn.exact(np.array([-1, width])), drawn.exact(np.array([1, channels, height, 8]))
    alpha, beta = (float(drawn.rng.choice([1.0, 0.5, 2.0])) for _ in range(2))
    drawn.nodes.append(helper.make_node("Reshape", [x, rows], [f"rows{number}"]))
    inputs = [f"rows{number}", matrix, drawn.constant(8, scale=0.3)]
    drawn.nodes.append(helper.make_node("Gemm", inputs, [f"product{number}"], alpha=alpha, beta=beta))
    drawn.add("Reshape", [f"product{number}", back], (channels, height, 8))


def softmax(drawn: Drawn) -> None:
    x = drawn.pick()
    drawn.add("Softmax", [x], drawn.shapes[x], axis=3)


def masked(drawn: Drawn) -> None:
    """A constant mask of -inf before a softmax."""
    x = drawn.pick()
    width = drawn.shapes[x][2]
    mask = np.where(np.arange(width) < max(width // 2, 1), 0, -np.inf).astype(np.float32)
    number = len(drawn.nodes)
    drawn.nodes.append(helper.make_node("Add", [x, drawn.exact(mask)], [f"masked{number}"]))
    drawn.add("Softmax", [f"masked{number}"], drawn.shapes[x], axis=3)


def pad(drawn: Drawn) -> None:
    x = drawn.pick()
    channels, height, width = drawn.shapes[x]
    edges = [0, 0, 1, 0, 0, 0, 0, 1]
    if drawn.opset < 11:
        drawn.add("Pad", [x], (channels, height + 1, width + 1), pads=edges)
    else:
        drawn.add("Pad", [x, drawn.exact(np.array(edges))], (channels, height + 1, width + 1))


STEPS: tuple[tuple[Callable[[Drawn], None], int], ...] = (
    (conv, 6),
    (transposed_conv, 1),
    (unary, 6),
    (binary, 4),
    (clip, 1),
    (norm, 2),
    (prelu, 1),
    (pool, 2),
    (turn, 1),
    (join, 2),
    (cut, 1),
    (shuffle, 1),
    (reduce, 1),
    (resize, 1),
    (dense, 3),
    (softmax, 1),
    (masked, 1),
    (pad, 1),
)


def draw(path: Path, seed: int) -> Path:
    """Write the graph of a seed."""
    rng = np.random.default_rng(seed)
    drawn = Drawn(rng, int(rng.integers(FIRST_OPSET, LAST_OPSET + 1)))
    drawn.shapes["image"] = (CHANNELS, SIDE, SIDE)
    odds = np.array([weight for _, weight in STEPS]) / sum(weight for _, weight in STEPS)
    conv(drawn)
    for _ in range(int(rng.integers(5, 31))):
        STEPS[int(rng.choice(len(STEPS), p=odds))][0](drawn)
    names = [name for name in drawn.shapes if name != "image"]
    outputs = sorted({names[-1], *rng.choice(names, size=int(rng.integers(1, 4)))})
    graph = helper.make_graph(
        drawn.nodes,
        "drawn",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, (1, CHANNELS, SIDE, SIDE))],
        [helper.make_tensor_value_info(str(name), TensorProto.FLOAT, (1, *drawn.shapes[name])) for name in outputs],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in drawn.weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", drawn.opset)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    onnx.save_model(model, str(path))
    return path


def samples(count: int, seed: int) -> list[dict[str, Array]]:
    """Return inputs of a drawn graph."""
    rng = np.random.default_rng(seed)
    return [{"image": rng.random((1, CHANNELS, SIDE, SIDE), np.float32)} for _ in range(count)]
