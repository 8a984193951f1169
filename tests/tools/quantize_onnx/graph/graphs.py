"""Small graphs of the kinds that people report trouble with, and how they are quantized without the pipeline around."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.support.small_onnx import Array, answer, save, seeded
from tools.quantize_onnx.graph.repair import repair
from tools.quantize_onnx.graph.rewrite import write_rewritten
from tools.quantize_onnx.options import OnnxRequest, parse_settings
from tools.quantize_onnx.quantizing import QuantizeTask, quantize
from tools.quantize_onnx.ranges import find_ranges

Save = Callable[[Path], Path]
SAME = [1] * 4  # padding of a convolution of 3 x 3 that keeps the size
PICTURE = {"image": (1, 3, 16, 16)}
MODES: dict[str, tuple[Any, Sequence[str]]] = {
    "static": ("int8-static", ()),
    "static, uint8 weights": ("int8-static", ("weight_type=uint8",)),
    "static, QOperator": ("int8-static", ("format=qoperator",)),
    "int16x8": ("int16x8", ()),
    "dynamic": ("int8", ()),
    "fp16": ("fp16", ()),
}


def pictures(count: int, seed: int = 0) -> list[dict[str, Array]]:
    """Return pictures of noise."""
    rng = np.random.default_rng(seed)
    return [{"image": rng.random((1, 3, 16, 16), np.float32)} for _ in range(count)]


def conv(source: str, weight: str, bias: str, made: str, **attributes: Any) -> Any:
    """Return a convolution that keeps the size."""
    names = [source, weight, *([bias] if bias else [])]
    return helper.make_node("Conv", names, [made], name=f"conv_{made}", pads=SAME, **attributes)


def weights(**shapes: tuple[int, ...]) -> dict[str, Array]:
    """Return seeded weights by name; those of one axis are biases."""
    return {
        name: seeded(*shape, seed=number, scale=0.1 if len(shape) == 1 else float(np.prod(shape[1:])) ** -0.5)
        for number, (name, shape) in enumerate(shapes.items())
    }


def product_of(source: Path, folder: Path, mode: str, samples: Sequence[dict[str, Array]]) -> Path:
    """Repair, calibrate and quantize a model; return the product."""
    from onnxruntime.quantization.calibrate import save_tensors_data

    recipe, settings = MODES[mode]
    wanted = OnnxRequest(recipe, parse_settings(settings, recipe))
    folder.mkdir(exist_ok=True)
    repaired, rewritten, ranges, product = (folder / name for name in ("repaired.onnx", "rewritten.onnx", "ranges.json", "q.onnx"))
    repair(source, repaired, keeps_halves=recipe == "fp16")
    used, floats = repaired, list[str]()
    if wanted.needs_ranges:
        changed, floats = write_rewritten(repaired, rewritten)
        used = rewritten if changed else repaired
        kinds = [*wanted.settings.op_types, "Gemm"]
        save_tensors_data(find_ranges(used, folder / "augmented.onnx", kinds, samples, "minmax"), ranges)
    wanted = OnnxRequest(recipe, wanted.settings, float_layers=tuple(floats))
    quantize(QuantizeTask(source, repaired, used, wanted, ranges if wanted.needs_ranges else None), product)
    return product


def errors_of(source: Path, product: Path, samples: Sequence[dict[str, Array]]) -> list[float]:
    """Return the relative error of each output over all samples, by ONNX Runtime alone."""
    noise: list[float] = []
    signal: list[float] = []
    for sample in samples:
        pairs = list(zip(answer(source, **sample), answer(product, **sample), strict=True))
        noise = [*(noise or [0.0] * len(pairs))]
        signal = [*(signal or [0.0] * len(pairs))]
        for place, (before, after) in enumerate(pairs):
            assert (before.dtype, before.shape) == (after.dtype, after.shape)
            noise[place] += float(np.square(before.astype(np.float64) - after).sum())
            signal[place] += float(np.square(before.astype(np.float64)).sum())
    return [(one / other) ** 0.5 if one else 0.0 for one, other in zip(noise, signal, strict=True)]


def lost_output(path: Path) -> Path:
    """A convolution's result is an output of the model, and read by a Relu."""
    nodes = [conv("image", "w0", "b0", "feat"), helper.make_node("Relu", ["feat"], ["r"], name="relu"), conv("r", "w1", "b1", "y")]
    held = weights(w0=(8, 3, 3, 3), b0=(8,), w1=(4, 8, 3, 3), b1=(4,))
    return save(path, nodes, PICTURE, {"feat": (1, 8, 16, 16), "y": (1, 4, 16, 16)}, held)


def rounded(path: Path, factor: float = 1.0) -> Path:
    """A convolution's result, times a factor where that is not 1, is rounded to integers."""
    nodes = [conv("image", "w0", "b0", "feat")]
    held = weights(w0=(8, 3, 3, 3), b0=(8,))
    if factor != 1:
        nodes.append(helper.make_node("Mul", ["feat", "factor"], ["scaled"], name="scale"))
        held["factor"] = np.array(factor, np.float32)
    nodes += [helper.make_node("Ceil", ["feat" if factor == 1 else "scaled"], ["y"], name="up")]
    return save(path, nodes, PICTURE, {"y": (1, 8, 16, 16)}, held)


def clipped_output(path: Path) -> Path:
    """The same with a Clip, and outputs that are a constant, and the input itself."""
    nodes = [
        conv("image", "w0", "b0", "feat"),
        helper.make_node("Clip", ["feat", "low", "high"], ["r"], name="clip"),
        conv("r", "w1", "b1", "y"),
        helper.make_node("Identity", ["image"], ["echo"], name="echo"),
    ]
    held = weights(w0=(8, 3, 3, 3), b0=(8,), w1=(4, 8, 3, 3), b1=(4,), anchors=(5, 4))
    held |= {"low": np.array(0, np.float32), "high": np.array(6, np.float32)}
    outputs = {"feat": (1, 8, 16, 16), "anchors": (5, 4), "echo": (1, 3, 16, 16), "y": (1, 4, 16, 16)}
    return save(path, nodes, PICTURE, outputs, held)


def clipped_branch(path: Path) -> Path:
    """A tensor is clipped for one reader, and read as it is by another."""
    nodes = [
        conv("image", "w0", "b0", "c"),
        helper.make_node("Clip", ["c", "low", "high"], ["r"], name="clip"),
        helper.make_node("Add", ["c", "r"], ["s"], name="sum"),
        conv("s", "w1", "b0", "y"),
    ]
    held = weights(w0=(8, 3, 3, 3), b0=(8,), w1=(8, 8, 3, 3))
    held |= {"low": np.array(-0.1, np.float32), "high": np.array(0.2, np.float32)}
    return save(path, nodes, PICTURE, {"y": (1, 8, 16, 16), "r": (1, 8, 16, 16)}, held)


def scaled_gemm(path: Path) -> Path:
    """Gemms with factors, and with a bias of shape (1, N)."""
    nodes = [
        helper.make_node("Flatten", ["image"], ["f"], name="flat"),
        helper.make_node("Gemm", ["f", "w0", "b0"], ["g"], name="first", alpha=0.5, beta=2.0),
        helper.make_node("Relu", ["g"], ["r"], name="relu"),
        helper.make_node("Gemm", ["r", "w1", "b1"], ["y"], name="second", transB=1, beta=3.0),
    ]
    held = weights(w0=(768, 16), b0=(16,), w1=(10, 16), b1=(1, 10))
    held["b0"] = held["b0"] * 20
    return save(path, nodes, PICTURE, {"y": (1, 10)}, held)


def shared_bias(path: Path) -> Path:
    """Layers of different scale share a bias, and a weight is read along two axes."""
    nodes = [
        conv("image", "w0", "b", "c"),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        conv("r", "w1", "b", "d"),
        helper.make_node("GlobalAveragePool", ["d"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flat"),
        helper.make_node("Gemm", ["f", "m"], ["g"], name="one"),
        helper.make_node("Gemm", ["g", "m"], ["y"], name="other", transB=1),
    ]
    held = weights(w0=(8, 3, 3, 3), b=(8,), w1=(8, 8, 3, 3), m=(8, 8))
    held["w1"], held["m"] = held["w1"] * 30, held["m"] * np.logspace(-1, 1, 8, dtype=np.float32)
    return save(path, nodes, PICTURE, {"y": (1, 8)}, held)


def dead_channels(path: Path) -> Path:
    """Channels whose weights are next to nothing, or zero, and whose biases are not."""
    nodes = [
        conv("image", "w0", "b0", "c"),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        conv("r", "w1", "b1", "d", group=8),
        helper.make_node("GlobalAveragePool", ["d"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flat"),
        helper.make_node("Gemm", ["f", "m", "mb"], ["y"], name="last"),
    ]
    held = weights(w0=(8, 3, 3, 3), b0=(8,), w1=(8, 1, 3, 3), b1=(8,), m=(8, 10), mb=(1, 10))
    held["w1"][3] *= 1e-9
    held["w1"][5] = 0
    held["b1"][[3, 5]] = 5, -4
    held["m"][:, 2] *= 1e-9
    held["mb"][0, 2] = 7
    return save(path, nodes, PICTURE, {"d": (1, 8, 16, 16), "y": (1, 10)}, held)


def batched_matrix(path: Path) -> Path:
    """A matrix for each head, a weight on the left, and transposed convolutions, grouped and not."""
    nodes = [
        helper.make_node("ConvTranspose", ["image", "t0", "tb0"], ["u"], name="up", strides=[2, 2]),
        helper.make_node("Relu", ["u"], ["ur"], name="relu"),
        helper.make_node("ConvTranspose", ["ur", "t1", "tb1"], ["v"], name="grouped", strides=[2, 2], group=3),
        helper.make_node("Reshape", ["image", "rows"], ["x"], name="rows"),
        helper.make_node("MatMul", ["x", "heads"], ["h"], name="heads"),
        helper.make_node("Relu", ["h"], ["hr"], name="relu_h"),
        helper.make_node("MatMul", ["left", "hr"], ["y"], name="left"),
    ]
    held = weights(t0=(3, 12, 2, 2), tb0=(12,), t1=(12, 2, 2, 2), tb1=(6,), heads=(3, 16, 16), left=(20, 16))
    held["t0"] = held["t0"] * np.logspace(-2, 0, 12, dtype=np.float32)[None, :, None, None]
    held["rows"] = np.array([3, 16, 16])
    return save(path, nodes, PICTURE, {"v": (1, 6, 64, 64), "y": (3, 20, 16)}, held)


def masked(path: Path, mask: str = "add") -> Path:
    """Attention with a mask of 0 and -inf, added, or behind a Where."""
    keep = np.tril(np.ones((1, 16, 16), bool))
    mix = [helper.make_node("Add", ["s", "table"], ["m"], name="mask")]
    if mask == "where":
        mix = [helper.make_node("Where", ["keep", "s", "infinite"], ["m"], name="mask")]
    nodes = [
        helper.make_node("Reshape", ["image", "rows"], ["x"], name="rows"),
        *(helper.make_node("MatMul", ["x", f"w{part}"], [part], name=part) for part in "qkv"),
        helper.make_node("Transpose", ["k"], ["kt"], name="turn", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "kt"], ["s"], name="scores"),
        *mix,
        helper.make_node("Softmax", ["m"], ["p"], name="softmax", axis=-1),
        helper.make_node("MatMul", ["p", "v"], ["o"], name="mixed"),
        helper.make_node("MatMul", ["o", "wo"], ["y"], name="out"),
    ]
    held: dict[str, Array] = {**weights(wq=(48, 48), wk=(48, 48), wv=(48, 48), wo=(48, 48)), "rows": np.array([1, 16, 48])}
    held["wq"] = held["wq"] * np.float32(0.2)
    held |= {"keep": keep, "infinite": np.array(-np.inf, np.float32), "table": np.where(keep, 0, -np.inf).astype(np.float32)}
    used = {name for node in nodes for name in node.input}
    return save(path, nodes, PICTURE, {"y": (1, 16, 48)}, {name: value for name, value in held.items() if name in used})


def computed_weights(path: Path) -> Path:
    """Weights behind Transpose, Reshape, Cast, Identity and Mul, and a shape computed from a fixed one."""
    nodes = [
        helper.make_node("Transpose", ["w0"], ["w0t"], name="t", perm=[3, 2, 0, 1]),
        conv("image", "w0t", "b", "c"),
        helper.make_node("Cast", ["w1"], ["w1c"], name="cast", to=TensorProto.FLOAT),
        conv("c", "w1c", "b", "d"),
        helper.make_node("Mul", ["w2", "gain"], ["w2m"], name="norm"),
        helper.make_node("Identity", ["w2m"], ["w2i"], name="same"),
        conv("d", "w2i", "b", "e"),
        helper.make_node("Shape", ["e"], ["shape"], name="shape"),
        helper.make_node("Gather", ["shape", "first"], ["batch"], name="gather"),
        helper.make_node("Unsqueeze", ["batch", "zero"], ["batch_1"], name="unsqueeze"),
        helper.make_node("Concat", ["batch_1", "rest"], ["to"], name="concat", axis=0),
        helper.make_node("Reshape", ["e", "to"], ["f"], name="flat"),
        helper.make_node("MatMul", ["f", "m"], ["y"], name="last"),
    ]
    held: dict[str, Any] = weights(w0=(3, 3, 3, 8), b=(8,), w1=(8, 8, 3, 3), w2=(8, 8, 3, 3), m=(2048, 10))
    held |= {"w0": held["w0"] * np.float32(0.3), "w1": held["w1"].astype(np.float16), "gain": np.full((8, 1, 1, 1), 2, np.float32)}
    held |= {"first": np.array(0), "zero": np.array([0]), "rest": np.array([-1])}
    return save(path, nodes, PICTURE, {"y": (1, 10)}, held)


def with_functions(path: Path) -> Path:
    """Layers inside functions of the model's own, which share weights."""
    imports = [helper.make_opsetid("", 17)]
    body = [helper.make_node("Conv", ["x", "w", "b"], ["c"], pads=SAME), helper.make_node("Relu", ["c"], ["y"])]
    block = helper.make_function("own", "Block", ["x", "w", "b"], ["y"], body, imports)
    nodes = [
        helper.make_node("Block", ["image", "w0", "b"], ["h"], name="first", domain="own"),
        helper.make_node("Block", ["h", "w1", "b"], ["i"], name="second", domain="own"),
        conv("i", "w1", "b", "y"),
    ]
    save(path, nodes, PICTURE, {"y": (1, 8, 16, 16)}, weights(w0=(8, 3, 3, 3), b=(8,), w1=(8, 8, 3, 3)))
    model = onnx.load(str(path))
    model.functions.append(block)
    model.opset_import.append(helper.make_opsetid("own", 1))
    onnx.save_model(model, str(path))
    return path


def sparse(path: Path) -> Path:
    """A convolution whose weights are stored sparsely."""
    held = weights(w0=(8, 3, 3, 3), w1=(8, 8, 3, 3))
    full = held.pop("w1") * (np.random.default_rng(0).random((8, 8, 3, 3)) < 0.3)
    places = np.flatnonzero(full)
    nodes = [conv("image", "w0", "", "c"), helper.make_node("Relu", ["c"], ["r"], name="relu"), conv("r", "w1", "", "y")]
    save(path, nodes, PICTURE, {"y": (1, 8, 16, 16)}, held)
    model = onnx.load(str(path))
    values = numpy_helper.from_array(full.ravel()[places], "w1")
    kept = helper.make_sparse_tensor(values, numpy_helper.from_array(places.astype(np.int64), ""), list(full.shape))
    model.graph.sparse_initializer.append(kept)
    onnx.save_model(model, str(path))
    return path


def halves(path: Path) -> Path:
    """A model all in float16, its input and output as well."""
    nodes = [conv("image", "w0", "b0", "c"), helper.make_node("Relu", ["c"], ["r"], name="relu"), conv("r", "w1", "b1", "y")]
    held = {name: value.astype(np.float16) for name, value in weights(w0=(8, 3, 3, 3), b0=(8,), w1=(4, 8, 3, 3), b1=(4,)).items()}
    save(path, nodes, PICTURE, {"y": (1, 4, 16, 16)}, held)
    model = onnx.load(str(path))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save_model(model, str(path))
    return path


def cubic(path: Path) -> Path:
    """A cubic Resize between convolutions."""
    nodes = [
        conv("image", "w0", "", "c"),
        helper.make_node("Resize", ["c", "", "", "size"], ["u"], name="resize", mode="cubic"),
        conv("u", "w1", "", "y"),
    ]
    held = {**weights(w0=(8, 3, 3, 3), w1=(4, 8, 3, 3)), "size": np.array([1, 8, 20, 20])}
    return save(path, nodes, PICTURE, {"y": (1, 4, 20, 20)}, held)


GRAPHS: dict[str, Save] = {
    "an output that is read": lost_output,
    "an output that is clipped": clipped_output,
    "a branch that is clipped": clipped_branch,
    "factors of Gemms": scaled_gemm,
    "a shared bias": shared_bias,
    "dead channels": dead_channels,
    "matrices of three axes": batched_matrix,
    "a mask of -inf": masked,
    "a Where with -inf": lambda path: masked(path, "where"),
    "computed weights": computed_weights,
    "functions": with_functions,
    "sparse weights": sparse,
    "float16": halves,
    "a cubic Resize": cubic,
}


def amplified(path: Path) -> Path:
    """A batch norm's result is read by a convolution, and by a norm of each picture that amplifies small differences."""
    names = ["s", "b", "m", "v"]
    nodes = [
        helper.make_node("BatchNormalization", ["image", *names], ["n"], name="batch"),
        conv("n", "w0", "b0", "y"),
        helper.make_node("InstanceNormalization", ["n", "one", "zero"], ["z"], name="instance"),
    ]
    held = weights(w0=(8, 3, 3, 3), b0=(8,))
    held |= {"s": np.array([1, 100, 0.01], np.float32), "b": np.zeros(3, np.float32), "m": np.zeros(3, np.float32)}
    held |= {"v": np.ones(3, np.float32), "one": np.ones(3, np.float32), "zero": np.zeros(3, np.float32)}
    return save(path, nodes, PICTURE, {"y": (1, 8, 16, 16), "z": (1, 3, 16, 16)}, held)
