"""What the first ops of a model tell about its inputs: the range of an image, and the largest integer that a table has a row for.

Networks often hold their own preprocessing: a division by 255, a mean that is subtracted, a batch normalization. It says what the
pixels are before it. Integers that choose rows of a table must stay inside the table.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
MOST_VALUES = 64  # of a constant that scales or shifts pixels: one for each channel
# Ops that hand values on as they are.
CARRIERS = {"CAST", "IDENTITY", "TRANSPOSE", "RESHAPE", "SQUEEZE", "UNSQUEEZE", "EXPANDDIMS", "FLATTEN", "QUANTIZE", "DEQUANTIZE"}
NORMALIZATION, LOOKUPS = "BATCHNORMALIZATION", {"GATHER": (0, 1), "EMBEDDINGLOOKUP": (1, 0)}  # places of the table and the rows
EPSILON = 1e-5  # of a normalization
RANGE_NAMES = ((r"0_?(to_?)?255", (0.0, 255.0)), (r"normalized_input|minus_?one", (-1.0, 1.0)))  # in the name of an input
MASK_NAME = "mask"  # of integers that are 0 or 1


class Step(NamedTuple):
    """An op: its type without underscores, in capitals; names of its inputs and outputs."""

    kind: str
    inputs: Sequence[str]
    outputs: Sequence[str]


@dataclass(frozen=True)
class InputHints:
    """What a model tells about its inputs.

    Args:
        pixel_range: What 0 and 255 of pixels become in its image input; None where nothing tells.
        largest: Input -> largest integer that it takes.
    """

    pixel_range: tuple[float, float] | None = None
    largest: Mapping[str, int] = field(default_factory=dict)


class _Scaled(NamedTuple):
    """A tensor that is `scale` times an input plus `shift`."""

    name: str
    scale: float = 1.0
    shift: float = 0.0


def find_hints(
    inputs: Sequence[str], steps: Sequence[Step], shapes: Mapping[str, Sequence[int]], constant: Callable[[str], Array]
) -> InputHints:
    """Return what a graph tells about its inputs.

    Args:
        inputs: Their names.
        steps: The ops.
        shapes: Name of each constant -> its shape.
        constant: Returns the values of a constant; called for small ones only.
    """
    readers: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        for name in step.inputs:
            readers[name].append(step)
    pixel_range, largest = None, {}
    for name in inputs:
        span = next((limits for pattern, limits in RANGE_NAMES if re.search(pattern, name)), None)
        rows = [1] if MASK_NAME in name.lower() else []
        waiting, seen = [_Scaled(name)], set()
        while waiting:
            tensor = waiting.pop()
            if tensor.name in seen:
                continue
            seen.add(tensor.name)
            for step in readers[tensor.name]:
                rows += _rows(step, tensor.name, shapes)
                after = _after(step, tensor, shapes, constant)
                waiting += [] if after is None else [after]
            span = span or _range_of(tensor)
        pixel_range = pixel_range or span
        if rows:
            largest[name] = min(rows)
    return InputHints(pixel_range, largest)


def _rows(step: Step, name: str, shapes: Mapping[str, Sequence[int]]) -> list[int]:
    """Return the largest number of a row that an op looks up by a tensor's values."""
    places = LOOKUPS.get(step.kind)
    if places is None or len(step.inputs) < 2 or step.inputs[places[1]] != name:
        return []
    shape = shapes.get(step.inputs[places[0]])
    return [shape[0] - 1] if shape else []


def _after(step: Step, tensor: _Scaled, shapes: Mapping[str, Sequence[int]], constant: Callable[[str], Array]) -> _Scaled | None:
    """Return what an op makes of a scaled input; None where it does something else to it."""
    others = [name for name in step.inputs if name != tensor.name]
    if step.kind in CARRIERS and step.inputs[0] == tensor.name:
        return tensor._replace(name=step.outputs[0])
    if not others or any(name not in shapes or not 0 < int(np.prod(shapes[name])) <= MOST_VALUES for name in others):
        return None
    values = [np.asarray(constant(name), np.float64) for name in others]
    if step.kind == NORMALIZATION and len(values) == 4:
        gain, bias, mean, variance = values
        gain = gain / np.sqrt(variance + EPSILON)
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
    """Return the range of pixels that such a scale and shift are for: networks want values around 0 of a size around 1."""
    if tensor.scale <= 0 or (tensor.scale, tensor.shift) == (1, 0):
        return None
    zero = -tensor.shift / tensor.scale  # the pixel that becomes 0
    if tensor.scale < 0.05 or zero > 10:  # / 255, / 127.5, / 58; - 123 without a division
        return 0.0, 255.0
    if 0.2 <= zero <= 0.8 or tensor.scale > 100:  # (x - 0.485) / 0.229; * 255 in front of a network for 0 to 255
        return 0.0, 1.0
    return (-1.0, 1.0) if -1.3 <= zero <= -0.7 else None
