"""Bring a model into the form that quantizers know: no functions, no sparse or half-precision constants, no weights as inputs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.command.errors import ToolError, plain_reason
from shared.formats.onnx_file import AGAIN, LAYER_CONSTANTS, Model, inner_graphs
from tools.quantize_onnx.graph.folding import rename_inputs

FIRST_OPTIONAL_IR = 4  # before it every initializer had to be an input; from here on an initializer that is an input is its default


def inline_functions(model: Model, source: Path) -> tuple[int, Model]:
    """Return how many functions of its own a model had, and the model with their bodies in place of the calls.

    Raises:
        ToolError: A function calls itself, or has no body that fits the call.
    """
    from onnx import inliner

    count = len(model.functions)
    try:
        return count, inliner.inline_local_functions(model) if count else model
    except Exception as error:  # noqa: BLE001 - it raises whatever its C++ code throws
        what, got = "the model's functions can't be inlined", plain_reason(error)
        raise ToolError(what, where=source, got=got, remedy=AGAIN) from None


def unlist_weights(model: Model) -> int:
    """Take weights out of the graph's inputs, so that they are constants and no defaults; return how many.

    An input that users may set and that has a default is none of a layer's constants, and stays; but where exporters list every
    initializer, all are taken out.
    """
    graph = model.graph
    names = {tensor.name for tensor in graph.initializer}
    listed = {value.name for value in graph.input} & names
    weights = {
        name
        for node in _nodes(graph)
        for place, name in enumerate(node.input)
        if place and place in LAYER_CONSTANTS.get(node.op_type, ())  # a matrix product's first input may be a user's
    }
    is_habit = model.ir_version < FIRST_OPTIONAL_IR or (listed == names and bool(listed & weights))
    taken = listed if is_habit else listed & weights
    kept = [value for value in graph.input if value.name not in taken]
    if taken:
        del graph.input[:]
        graph.input.extend(kept)
    model.ir_version = max(model.ir_version, FIRST_OPTIONAL_IR)
    return len(taken)


def densify(model: Model) -> int:
    """Write sparse constants out, in place; return how many."""
    graph = model.graph
    graph.initializer.extend(_dense(sparse) for sparse in graph.sparse_initializer)
    count = len(graph.sparse_initializer)
    del graph.sparse_initializer[:]
    for node in _nodes(graph):
        for attribute in node.attribute if node.op_type == "Constant" else ():
            if attribute.name == "sparse_value":
                dense = _dense(attribute.sparse_tensor)
                attribute.Clear()
                attribute.name, attribute.type = "value", attribute.TENSOR
                attribute.t.CopyFrom(dense)
                count += 1
    return count


def _dense(sparse: Any) -> Any:
    import numpy as np
    from onnx import numpy_helper

    values, places = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    dense[tuple(places.T) if places.ndim > 1 else np.unravel_index(places, dense.shape)] = values
    return numpy_helper.from_array(dense, sparse.values.name)


def separate_constant_outputs(model: Model) -> int:
    """Let a node give out each constant that is an output of the model, in place; return how many.

    Quantizers rename constants, and take an output of the same name with them.
    """
    from onnx import helper

    graph = model.graph
    outputs = {value.name for value in graph.output}
    names = {tensor.name: f"{tensor.name}_constant" for tensor in graph.initializer if tensor.name in outputs}
    if not names:
        return 0
    rename_inputs(graph, names)
    for value in graph.input:
        value.name = names.get(value.name, value.name)
    for tensor in graph.initializer:
        if tensor.name in names:
            output, tensor.name = tensor.name, names[tensor.name]
            graph.node.append(helper.make_node("Identity", [tensor.name], [output], name=f"{output}_output"))
    return len(names)


def widen_halves(model: Model) -> int:
    """Make a model compute in float32 instead of float16 or bfloat16, but for its inputs and outputs; return the widened constants.

    Every value of the narrow types is one of float32, so that the weights stay what they are.
    """
    from onnx import TensorProto, helper

    halves = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    graph = model.graph
    count = _widen(graph, halves)
    given = [value for value in graph.input if value.type.tensor_type.elem_type in halves]
    made = [value for value in graph.output if value.type.tensor_type.elem_type in halves]
    if not (count or given or made):
        return 0
    constants = {tensor.name for tensor in graph.initializer}
    names = {value.name: f"{value.name}_wide" for value in (*given, *made) if value.name not in constants}
    rename_inputs(graph, names)
    makers = {name: (node, place) for node in graph.node for place, name in enumerate(node.output)}
    casts = []
    for value in given:
        if value.name in constants:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
            continue
        wide = names[value.name]
        casts.append(helper.make_node("Cast", [value.name], [wide], name=wide, to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    for value in made:
        wide, narrow = names[value.name], value.type.tensor_type.elem_type
        if value.name in makers:
            node, place = makers[value.name]
            node.output[place] = wide
        nodes.append(helper.make_node("Cast", [wide], [value.name], name=f"{value.name}_narrow", to=narrow))
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    return count


def _widen(graph: Any, halves: tuple[int, ...]) -> int:
    """Widen the constants of a graph and of the graphs inside of it; casts to a narrow type become casts to float32."""
    from onnx import TensorProto

    tensors = [tensor for tensor in graph.initializer if tensor.data_type in halves]
    count = len(tensors)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t") and attribute.t.data_type in halves:
                tensors.append(attribute.t)
            if attribute.name in ("to", "dtype") and attribute.i in halves:
                attribute.i = TensorProto.FLOAT
            for inner in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                count += _widen(inner, halves)
                for value in (*inner.input, *inner.output, *inner.value_info):
                    if value.type.tensor_type.elem_type in halves:
                        value.type.tensor_type.elem_type = TensorProto.FLOAT
    for tensor in tensors:
        _widen_tensor(tensor)
    return count


def _widen_tensor(tensor: Any) -> None:
    import numpy as np
    from onnx import numpy_helper

    values = numpy_helper.to_array(tensor).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _nodes(graph: Any) -> Iterator[Any]:
    """Yield the nodes of a graph and of the graphs inside of it."""
    for node in graph.node:
        yield node
        for inner in inner_graphs(node):
            yield from _nodes(inner)
