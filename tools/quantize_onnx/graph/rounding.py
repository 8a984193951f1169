"""Layers whose results are rounded coarsely: the noise of 8 bits would become an error of one step."""

from collections.abc import Collection, Iterator, Mapping

import numpy as np

from shared.formats.onnx_file import Model

ROUNDING = ("Ceil", "Floor", "Round", "Sign")
FEW_INTEGERS = 32  # a range with fewer of them is rounded coarsely; at 32 noise of one step of 8 bits gives 3 % of error
# Ops whose results are about as large as their inputs.
LIKE_INPUT = {"Relu", "LeakyRelu", "PRelu", "Elu", "Softplus", "Abs", "Neg", "Clip", "Min", "Max", "Identity", "Dropout", "Erf"}
LIKE_INPUT |= {"Sigmoid", "HardSigmoid", "Tanh", "Concat", "Split", "Slice", "Pad", "Transpose", "Reshape", "Squeeze", "Unsqueeze"}
LIKE_INPUT |= {"MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMax", "ReduceMean", "Resize", "DepthToSpace", "SpaceToDepth"}
SCALING = ("Mul", "Div", "Add", "Sub")  # by constants


def before_rounding(model: Model, layers: Collection[str], ranges: Mapping[str, tuple[float, float]]) -> Iterator[str]:
    """Yield the names of layers whose results are rounded to one of few integers: the noise of 8 bits moves them to the next one.

    Args:
        model: The model.
        layers: Op types with weights.
        ranges: Smallest and largest value of activations.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    factors = _single_values(model)
    waiting = [(name, 1.0) for node in model.graph.node if node.op_type in ROUNDING for name in node.input]
    seen = {name for name, _ in waiting}
    while waiting:
        name, factor = waiting.pop()
        node = makers.get(name)
        low, high = ranges.get(name, (0.0, np.inf))
        if node is None:
            continue
        if node.op_type in layers and (high - low) * factor < FEW_INTEGERS:
            yield node.name
        by = [factors[read] for read in node.input if read in factors]
        if node.op_type in SCALING and by and by[0]:
            factor *= by[0] if node.op_type == "Mul" else 1 / by[0] if node.op_type == "Div" else 1.0
        elif node.op_type not in LIKE_INPUT:
            continue
        waiting += [(read, factor) for read in node.input if read not in seen]
        seen |= set(node.input)


def _single_values(model: Model) -> dict[str, float]:
    """Return the magnitudes of constants that hold one value."""
    from onnx import numpy_helper

    tensors = [tensor for tensor in model.graph.initializer if np.prod(tensor.dims) == 1 and tensor.data_location == 0]
    return {tensor.name: float(np.abs(numpy_helper.to_array(tensor)).item()) for tensor in tensors}
