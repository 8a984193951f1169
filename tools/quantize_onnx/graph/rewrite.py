"""Write ops in the form whose integer kernels are fast in ONNX Runtime 1.31; the answers stay the same.

A PRelu between quantized layers takes twice the time of the same in simpler ops (7.5 against 3.6 ms on uint8 (1, 64, 224, 224), two
threads). A matrix product with a bias after it is rounded to 8 bits, scaled back and added to; the same as one Gemm takes integers
in and gives floats out, which is faster and nearer to the float model. In float models neither gains anything.
"""

import collections
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.formats.onnx_file import Model, read_model
from shared.formats.onnx_graph import readers_of

AS_FLOAT = ("Gemm", "MatMul")  # op types whose outputs stay float
# Ops that ONNX Runtime computes in integers, or moves values through, between DequantizeLinear and QuantizeLinear.
FUSED = {
    "Conv",
    "ConvTranspose",
    "Gemm",
    "MatMul",
    "Add",
    "Mul",
    "Concat",
    "Where",
    "Softmax",
    "Sigmoid",
    "LeakyRelu",
    "Relu",
    "Clip",
}
FUSED |= {
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "ReduceMean",
    "Resize",
    "Split",
    "Slice",
    "Gather",
    "Pad",
    "Reshape",
    "Flatten",
}
FUSED |= {"Transpose", "Squeeze", "Unsqueeze", "Identity", "QuantizeLinear", "DepthToSpace", "SpaceToDepth"}
SHIELDED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def write_rewritten(source: Path, target: Path) -> tuple[bool, list[str]]:
    """Write a model in that form to the same folder, weights in files of their own left where they are.

    Returns:
        Whether anything changed, so that there is a file, and the names of new nodes that must stay in float.
    """
    import onnx

    model = read_model(source)
    names = expand_prelu(model, source.parent)
    products = join_biases(model)
    if names or products:
        onnx.save_model(model, str(target))
    return bool(names or products), names


def expand_prelu(model: Model, folder: Path) -> list[str]:
    """Replace, in place, each PRelu with constant slopes; return the names of the new nodes.

    y = slope x + (1 - slope) max(x, 0), which is x above 0 and slope x below, for any slope.
    """
    import numpy as np
    from onnx import helper, numpy_helper

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    names: list[str] = []
    nodes = []
    for node in graph.node:
        if node.op_type != "PRelu" or node.domain or node.input[1] not in constants:
            nodes.append(node)
            continue
        x, slope = node.input
        rest = f"{node.name}_rest"
        values = numpy_helper.to_array(constants[slope], str(folder))
        graph.initializer.append(numpy_helper.from_array(np.asarray(1 - values, values.dtype), rest))
        parts = [f"{node.name}_{part}" for part in ("sloped", "positive", "rested", "sum")]
        nodes += [
            helper.make_node("Mul", [x, slope], [parts[0]], name=parts[0]),
            helper.make_node("Relu", [x], [parts[1]], name=parts[1]),
            helper.make_node("Mul", [parts[1], rest], [parts[2]], name=parts[2]),
            helper.make_node("Add", [parts[0], parts[2]], [node.output[0]], name=parts[3]),
        ]
        names += parts
    _replace(graph, nodes)
    return names


def join_biases(model: Model) -> int:
    """Make, in place, a Gemm of each MatMul with a constant matrix and the Add of a constant bias after it; return how many.

    Rows of all leading axes become one axis before, and are restored after; only where all of them but the first are known.
    """
    from onnx import TensorProto, helper

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    shapes = {
        value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in (*graph.value_info, *graph.input)
    }
    readers = readers_of(graph)
    behind = {name: node for node in graph.node for name in node.input}
    joined: dict[str, str] = {}  # name of an Add -> name of its MatMul
    nodes: list[Any] = []
    added: list[Any] = []
    for node in graph.node:
        add = behind.get(node.output[0]) if node.op_type == "MatMul" and readers[node.output[0]] == 1 else None
        shape = shapes.get(node.input[0], [])
        bias = next((name for name in add.input if name in constants), "") if add is not None and add.op_type == "Add" else ""
        weight = constants.get(node.input[1]) if bias else None
        if weight is None or not _is_joinable(weight, constants[bias], shape):
            nodes.append(node)
            continue
        assert add is not None
        rows, product = f"{node.output[0]}_rows", f"{node.output[0]}_product"
        for name, lengths in ((f"{rows}_shape", [-1, weight.dims[0]]), (f"{product}_shape", [-1, *shape[1:-1], weight.dims[1]])):
            added.append(helper.make_tensor(name, TensorProto.INT64, [len(lengths)], lengths))
        nodes += [
            helper.make_node("Reshape", [node.input[0], f"{rows}_shape"], [rows], name=rows),
            helper.make_node("Gemm", [rows, node.input[1], bias], [product], name=node.name),
            helper.make_node("Reshape", [product, f"{product}_shape"], [add.output[0]], name=product),
        ]
        for name, width in ((rows, weight.dims[0]), (product, weight.dims[1])):
            graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, width]))
        joined[add.name] = node.name
    graph.initializer.extend(added)
    _replace(graph, [node for node in nodes if node.name not in joined])
    return len(joined)


def _is_joinable(weight: Any, bias: Any, shape: list[int]) -> bool:
    """Return whether a product of rows of this shape with a float32 matrix and its bias can be one Gemm."""
    from onnx import TensorProto

    is_float = weight.data_type == bias.data_type == TensorProto.FLOAT
    return is_float and len(weight.dims) == 2 and list(bias.dims) == [weight.dims[1]] and len(shape) > 1 and all(shape[1:])


def shield_floats(product: Model) -> int:
    """Keep ONNX Runtime from quantizing layers that were left in float, in place; return how many.

    When it loads a model it rounds the float weights of a layer between DequantizeLinear and QuantizeLinear to 8 bits itself, one
    scale for the whole weight. A step that changes nothing between the layer and what quantizes its output prevents that.
    """
    from onnx import TensorProto, helper

    graph = product.graph
    floats = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    behind: dict[str, list[Any]] = collections.defaultdict(list)
    for node in graph.node:
        for name in node.input:
            behind[name].append(node)
    nodes: list[Any] = []
    count = 0
    for node in graph.node:
        nodes.append(node)
        if node.op_type not in SHIELDED or not any(name in floats for name in node.input[1:2]):
            continue
        readers = behind[node.output[0]]
        relus = [reader for reader in readers if reader.op_type == "Relu"]
        for relu in relus:
            relu.op_type = "LeakyRelu"
            relu.attribute.append(helper.make_attribute("alpha", 0.0))
        if any(reader.op_type == "QuantizeLinear" for reader in readers):
            plain, name = f"{node.output[0]}_plain", f"{node.name}_shield"
            nodes.append(helper.make_node("LeakyRelu", [plain], [node.output[0]], name=name, alpha=1.0))
            node.output[0] = plain
        count += bool(relus) or node.output[0].endswith("_plain")
    _replace(graph, nodes)
    return count


def read_unrounded(product: Model) -> int:
    """Let ops that compute in float read float values that are there, not the same rounded for a layer, in place; return how many.

    The library puts a pair of QuantizeLinear and DequantizeLinear at a tensor for its quantized readers, and all others read it
    too: a norm then amplifies rounding that nothing asked for. Values between integer kernels are not there in float.
    """
    makers = {name: node for node in product.graph.node for name in node.output}
    given = {value.name for value in product.graph.input}
    sources: dict[str, str] = {}  # rounded -> the same in float
    for node in product.graph.node:
        quantized = makers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if quantized is None or quantized.op_type != "QuantizeLinear":
            continue
        source = quantized.input[0]
        reads = [makers[name].op_type for name in makers[source].input if name in makers] if source in makers else []
        if source in given or (source in makers and "DequantizeLinear" not in reads):
            sources[node.output[0]] = source
    count = 0
    for node in product.graph.node:
        for place, name in enumerate(node.input if node.op_type not in FUSED else ()):
            if name in sources:
                node.input[place] = sources[name]
                count += 1
    return count


def shield_cubic_resizes(product: Model) -> int:
    """Keep ONNX Runtime from turning the axes of a cubic Resize, in place; return how many.

    It moves channels last for its integer convolutions, carries that on through ops of other kinds, and then refuses a cubic Resize
    whose last axis is not the width. A DepthToSpace of blocks of one pixel changes nothing, and no transpose passes it.
    """
    from onnx import helper

    nodes: list[Any] = []
    count = 0
    for node in product.graph.node:
        modes = [attribute.s for attribute in node.attribute if attribute.name == "mode"]
        if node.op_type == "Resize" and modes == [b"cubic"]:
            before, after, made = f"{node.name}_shield", f"{node.name}_shielded", node.output[0]
            nodes.append(helper.make_node("DepthToSpace", [node.input[0]], [before], name=before, blocksize=1))
            node.input[0], node.output[0] = before, after
            nodes += [node, helper.make_node("DepthToSpace", [after], [made], name=after, blocksize=1)]
            count += 1
            continue
        nodes.append(node)
    _replace(product.graph, nodes)
    return count


def _replace(graph: Any, nodes: list[Any]) -> None:
    del graph.node[:]
    graph.node.extend(nodes)


def matrix_products(model: Model) -> Iterator[str]:
    """Yield the names of matrix products of two activations, which lose far more by 8 bits than they gain."""
    constants = {tensor.name for tensor in model.graph.initializer}
    yield from (node.name for node in model.graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] not in constants)
