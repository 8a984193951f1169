"""What the first ops of a model tell about its inputs: the range of an image, and the largest integer that a table has a row for.

Networks often hold their own preprocessing: a division by 255, a mean that is subtracted, a batch normalization. It says what the
pixels are before it. Integers that choose rows of a table must stay inside the table.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Constant = Callable[[str], NDArray[Any] | None]
MOST_VALUES = 64  # of a constant that scales or shifts pixels: one for each channel
# Ops that hand values on as they are.
CARRIERS = {"CAST", "IDENTITY", "TRANSPOSE", "RESHAPE", "SQUEEZE", "UNSQUEEZE", "EXPANDDIMS", "FLATTEN", "QUANTIZE", "DEQUANTIZE"}
NORMALIZATION, LOOKUPS = "BATCHNORMALIZATION", {"GATHER": (0, 1), "EMBEDDINGLOOKUP": (1, 0)}  # places of the table and the rows
EPSILON = 1e-5  # of a normalization
RANGE_NAMES = ((r"0_?(to_?)?255", (0.0, 255.0)), (r"normalized_input|minus_?one", (-1.0, 1.0)))  # in the name of an input
# Preprocessing in use divides bytes by 255, 127.5 or about 58, or subtracts about 120; it subtracts 0.4 to 0.5 of pixels from 0 to
# 1, and (x + 1) / 2 is for pixels from -1 to 1. A product with 255 is for networks that take bytes inside.
SCALE_OF_BYTES, MEAN_OF_BYTES, MEANS_OF_UNITS, SCALE_TO_BYTES, SLACK = 0.025, 10.0, (0.2, 0.8), 100.0, 0.3
MASK_NAME = "mask"  # of integers that are 0 or 1


class GraphInput(NamedTuple):
    """An input of a graph: what the graph calls it, its name, and whether it is an image."""

    key: str
    name: str
    is_image: bool


class Step(NamedTuple):
    """An op: its type without underscores, in capitals; its inputs and outputs; the axis that a lookup goes along."""

    kind: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    axis: int = 0


@dataclass(frozen=True)
class InputHints:
    """What a model tells about its inputs.

    Args:
        pixel_range: What 0 and 255 of pixels become in its image input; None where nothing tells.
        largest: Input -> largest integer for which its tables have rows.
    """

    pixel_range: tuple[float, float] | None = None
    largest: Mapping[str, int] = field(default_factory=dict)


class _Scaled(NamedTuple):
    """A tensor that is `scale` times an input plus `shift`."""

    name: str
    scale: float = 1.0
    shift: float = 0.0


def find_hints(
    inputs: Sequence[GraphInput],
    steps: Sequence[Step],
    shapes: Mapping[str, Sequence[int]],
    constant: Constant,
) -> InputHints:
    """Return what a graph tells about its inputs, by their keys.

    Args:
        inputs: The inputs.
        steps: The ops.
        shapes: Constant -> its shape.
        constant: Returns the values of a constant, None where they are not plain numbers; called for small ones only.
    """
    readers: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        for name in step.inputs:
            readers[name].append(step)
    pixel_range, largest = None, {}
    for key, name, is_image in inputs:
        span = next((limits for pattern, limits in RANGE_NAMES if re.search(pattern, name)), None)
        rows = [1] if MASK_NAME in name.lower() else []
        waiting, seen = [_Scaled(key)], set()
        while waiting:
            tensor = waiting.pop()
            if tensor.name in seen:
                continue
            seen.add(tensor.name)
            for step in readers[tensor.name]:
                rows += _rows(step, tensor, shapes)
                after = _after(step, tensor, shapes, constant)
                waiting += [] if after is None else [after]
            span = span or _range_of(tensor)
        pixel_range = pixel_range or (span if is_image else None)
        if rows:
            largest[key] = min(rows)
    return InputHints(pixel_range, largest)


def _rows(step: Step, tensor: _Scaled, shapes: Mapping[str, Sequence[int]]) -> list[int]:
    """Return the input that chooses the last row of a table, where an op looks up rows by a tensor's values."""
    places = LOOKUPS.get(step.kind)
    if places is None or len(step.inputs) < 2 or step.inputs[places[1]] != tensor.name or tensor.scale <= 0:
        return []
    shape = shapes.get(step.inputs[places[0]], ())
    last = shape[step.axis] - 1 if -len(shape) <= step.axis < len(shape) else -1
    found = math.floor((last - tensor.shift) / tensor.scale) if last >= 0 else -1
    return [found] if found >= 0 else []


def _after(step: Step, tensor: _Scaled, shapes: Mapping[str, Sequence[int]], constant: Constant) -> _Scaled | None:
    """Return what an op makes of a scaled input; None where it does something else to it."""
    others = [name for name in step.inputs if name != tensor.name]
    if step.kind in CARRIERS and step.inputs[0] == tensor.name:
        return tensor._replace(name=step.outputs[0])
    if not others or any(name not in shapes or not 0 < math.prod(shapes[name]) <= MOST_VALUES for name in others):
        return None
    known = [constant(name) for name in others]
    values = [np.asarray(value, np.float64) for value in known if value is not None]
    if len(values) < len(others):
        return None
    if step.kind == NORMALIZATION and len(values) == 4:
        gain, bias, mean, variance = values
        gain = gain / np.sqrt(np.maximum(variance, 0) + EPSILON)
        scale, shift = float(gain.mean()), float((bias - mean * gain).mean())
        return _Scaled(step.outputs[0], scale * tensor.scale, scale * tensor.shift + shift)
    value, is_first = float(values[0].mean()), step.inputs[0] == tensor.name
    match step.kind:
        case "MUL":
            scale, shift = value, 0.0
        case "DIV" if is_first and value:
            scale, shift = 1 / value, 0.0
        case "ADD":
            scale, shift = 1.0, value
        case "SUB":
            scale, shift = (1.0, -value) if is_first else (-1.0, value)
        case _:
            return None
    return _Scaled(step.outputs[0], scale * tensor.scale, scale * tensor.shift + shift)


def _range_of(tensor: _Scaled) -> tuple[float, float] | None:
    """Return the range of pixels that becomes small values around 0 by a scale and a shift; None where that is not clear."""
    if tensor.scale <= 0 or (tensor.scale, tensor.shift) == (1, 0):
        return None
    zero = -tensor.shift / tensor.scale  # the pixel that becomes 0
    if tensor.scale < SCALE_OF_BYTES or zero > MEAN_OF_BYTES:
        return 0.0, 255.0
    if MEANS_OF_UNITS[0] <= zero <= MEANS_OF_UNITS[1] or tensor.scale > SCALE_TO_BYTES:
        return 0.0, 1.0
    return (-1.0, 1.0) if abs(zero + 1) < SLACK and tensor.scale != 1 else None  # without a scale it may be a logarithm of 1 + x
