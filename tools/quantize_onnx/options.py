"""Options of quantize_onnx: recipes, ONNX Runtime's own settings after `--set`, and what they ask for a model."""

import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from shared.calibration.dataset import CalibrationSet, holdout_of
from shared.command.errors import ToolError
from shared.command.options import InputRange, Objective
from shared.formats.model_file import ModelFile
from shared.formats.onnx_graph import OnnxOp
from shared.quantize.request import Limits, Request, parse_max_error, path_next_to
from shared.runtime.executors import choose_executor
from tools.quantize_onnx.ranges import CalibrationMethod

Recipe = Literal["int8-static", "int8", "int16x8", "fp16", "auto"]
IntegerType = Literal["int8", "uint8", "int16", "uint16"]

DEFAULT_RECIPE: Recipe = "int8-static"
LAYERS = ("Conv", "ConvTranspose", "MatMul", "Gemm")  # where weights and time are
# Ops between layers that pass 8 bits through: left in float they would cost a conversion on either side.
PASSING = ("Relu", "Clip", "MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "Gather")
RECURRENT = ("LSTM", "Attention", "EmbedLayerNormalization")  # known to dynamic quantization only
STATIC = ("int8-static", "int16x8")


@dataclass(frozen=True)
class OnnxSettings:
    """ONNX Runtime's own settings, one for each `--set NAME=VALUE`.

    Args:
        op_types: What is quantized; by default layers with weights and what joins them.
        format: `qdq` puts pairs of QuantizeLinear and DequantizeLinear around float ops, `qoperator` integer ops in their place.
        activation_type: Of static recipes; uint8 is the fastest on x86.
        weight_type: Of all recipes but fp16.
        per_channel: Whether each output channel of a weight has a scale of its own.
        reduce_range: Whether weights take 7 bits, for x86 CPUs without VNNI, whose 8-bit sums overflow.
        symmetric_activations: Whether zero is the middle of an activation's range.
        symmetric_weights: The same for weights; by default as their type wants it.
        calibration_method: How ranges of activations are found; by default minmax, or with limits the better of the two.
    """

    op_types: tuple[str, ...] = (*LAYERS, *PASSING, *RECURRENT)
    format: Literal["qdq", "qoperator"] = "qdq"
    activation_type: IntegerType = "uint8"
    weight_type: Literal["int8", "uint8"] = "int8"
    per_channel: bool = True
    reduce_range: bool = False
    symmetric_activations: bool = False
    symmetric_weights: bool | None = None
    calibration_method: CalibrationMethod | None = None


STATIC_ALONE = ("format", "activation_type", "symmetric_activations", "calibration_method")  # no meaning in other recipes
WIDE_TYPES = ("int16", "uint16")  # of activations in recipe int16x8


@dataclass(frozen=True)
class OnnxRequest:
    """How to quantize a model: the recipe with its settings, and what stays in float.

    Args:
        recipe: The recipe; of `auto` the first one tried.
        settings: ONNX Runtime's own.
        is_auto: Whether to take the fastest recipe that keeps the limits.
        float_layers: Names of nodes that stay in float.
        float_op_types: Op types that stay in float.
        range_cache: Where ranges of activations are kept for later runs.
    """

    recipe: Recipe
    settings: OnnxSettings = field(default_factory=OnnxSettings)
    is_auto: bool = False
    float_layers: tuple[str, ...] = ()
    float_op_types: tuple[str, ...] = ()
    range_cache: Path | None = None

    def is_static(self) -> bool:
        """Whether ranges of activations are needed beforehand, without being written next to the product."""
        return False

    @property
    def needs_ranges(self) -> bool:
        """Whether ranges of activations are needed beforehand."""
        return self.recipe in STATIC

    @property
    def method(self) -> CalibrationMethod:
        """How ranges are found."""
        return self.settings.calibration_method or "minmax"

    def why_skipped(self, op: OnnxOp) -> str:
        """Return why an op with weights stays as it is."""
        if op.is_inner:
            return "inside a branch or loop, which the quantizer does not enter"
        if op.name in self.float_layers or op.op_type in self.float_op_types:
            return "excluded"
        if op.dtype not in ("FLOAT", "DOUBLE"):
            return f"weights are {op.dtype} already"
        if self.recipe == "fp16":
            return "float16 is not safe or not known for this op"
        if op.op_type not in self.settings.op_types:
            return "not among the op types to quantize, see --set op_types"
        reasons = "an activation at it is infinite or always empty, or its result is rounded to few integers"
        return f"recipe {self.recipe} has no form for it, or {reasons}; fp16 may"

    def __str__(self) -> str:
        settings = self.settings
        if self.is_auto:
            return "the fastest of int8, fp16 and int8-static inside the limits"
        if self.recipe == "fp16":
            return "weights and activations float16, inputs and outputs float32"
        weights = f"weights {settings.weight_type} {'per channel' if settings.per_channel else 'per tensor'}"
        if settings.reduce_range:
            weights += ", 7 bits"
        if self.recipe == "int8":
            return f"dynamic, {weights}, activations uint8 with ranges found at run time"
        form = "QDQ" if settings.format == "qdq" else "QOperator"
        return f"{form}, {weights}, activations {settings.activation_type} with ranges found beforehand ({self.method})"


@dataclass(frozen=True)
class OnnxOptions:
    """The options that decide what is done to the model; fields are named as the options."""

    recipe: Recipe = DEFAULT_RECIPE
    calibration: Path | None = None
    holdout: Path | None = None
    samples: int | None = None
    input_range: InputRange | None = None
    range_cache: Path | None = None
    settings: OnnxSettings = field(default_factory=OnnxSettings)
    set_options: Sequence[str] = ()
    exclude: Sequence[str] = ()
    correct_bias: bool = True
    max_error: Sequence[str] = ()
    min_psnr: float | None = None
    min_cosine: float | None = None
    objective: Objective = "size"
    sensitivity: bool = False
    allow_large_error: bool = False
    dask: str | None = None
    threads: int | None = None

    def request(self, model: ModelFile, output: Path) -> Request:
        """Return what is asked for the model; the ledger of a search lies next to the output."""
        names, kinds = select(model, self.exclude)
        limits = Limits(parse_max_error(self.max_error), self.min_psnr, self.min_cosine)
        wanted = OnnxRequest(self.recipe, self.settings, self.recipe == "auto", names, kinds, self.range_cache)
        is_searched = bool(limits) and self.recipe in (*STATIC, "auto")
        return Request(
            recipe=self.recipe,
            expansion=str(wanted),
            settings=wanted,
            calibration=None if self.calibration is None else CalibrationSet(self.calibration, self.input_range, self.samples),
            holdout=None if self.holdout is None else holdout_of(self.holdout),
            input_range=self.input_range,
            corrects_bias=self.correct_bias,
            limits=limits,
            objective=self.objective,
            ledger=path_next_to(output, model.path.name, [model.path.name], "search.jsonl") if is_searched else None,
            sensitivity=self.sensitivity,
            allows_large_error=self.allow_large_error,
            threads=self.threads,
            executor=choose_executor(self.dask),
        )


def parse_settings(texts: Sequence[str], recipe: Recipe) -> OnnxSettings:
    """Return the settings of options such as `weight_type=uint8`, `op_types=Conv,Gemm` or `per_channel=no`.

    Args:
        texts: The options.
        recipe: Whose defaults hold for settings that are not given.

    Raises:
        ToolError: No such setting, a value that it cannot have, or two values for one setting.
    """
    hints = typing.get_type_hints(OnnxSettings)
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if name not in hints or not equals:
            raise ToolError(f"--set {text}: no such setting", expected=f"NAME=VALUE, NAME one of {', '.join(sorted(hints))}")
        if name in found:
            raise ToolError(f"--set {text}: the setting has a value already", remedy="give one")
        content: object = tuple(filter(None, value.split(","))) if name == "op_types" else value
        try:
            found[name] = TypeAdapter(hints[name]).validate_python(content)
        except ValidationError:
            content = None
        if not content:
            raise ToolError(f"--set {text}: no such value", expected=describe_setting(name))
    if recipe == "int16x8" and found.setdefault("activation_type", "uint16") not in WIDE_TYPES:
        what = f"--set activation_type={found['activation_type']} contradicts recipe int16x8"
        raise ToolError(what, expected=" or ".join(WIDE_TYPES), remedy="leave it out, or use --recipe int8-static")
    return OnnxSettings(**found)


def describe_setting(name: str) -> str:
    """Return the values that a setting can have, in words."""
    hint = typing.get_type_hints(OnnxSettings)[name]
    is_optional = typing.get_origin(hint) in (typing.Union, types.UnionType)
    choices = [choice for choice in typing.get_args(hint) if choice is not type(None)] if is_optional else [hint]
    literals = [value for choice in choices for value in typing.get_args(choice) if isinstance(value, str)]
    if literals:
        return " or ".join(literals)
    return "yes or no" if bool in choices else "op types, joined by commas"


def settings_help() -> str:
    """Return the names and values of all settings, for --help."""
    listed = "; ".join(f"{entry.name}: {describe_setting(entry.name)}" for entry in fields(OnnxSettings))
    return f"Setting of ONNX Runtime's quantizer; repeatable. {listed}."


def unused_settings(recipe: Recipe, texts: Sequence[str]) -> list[str]:
    """Return the names of the settings given, as of `parse_settings`, that do nothing in a recipe."""
    if recipe in (*STATIC, "auto"):
        return []
    given = [text.partition("=")[0] for text in texts]
    return [name for name in given if recipe == "fp16" or name in STATIC_ALONE]


def select(model: ModelFile, selectors: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the node names and the op types that selectors select: an op type, or a regex on node names.

    Raises:
        ToolError: A selector that is no regular expression, or selects nothing.
    """
    kinds = sorted({op.op_type for op in model.ops})
    names: dict[str, None] = {}
    for text in selectors:
        if text in kinds:
            continue
        try:
            found = [op.name for op in model.ops if re.search(text, op.name)]
        except re.error as error:
            raise ToolError("--exclude is no regular expression", got=text, expected=str(error)) from None
        if not found:
            what, remedy = f"--exclude {text!r} matches no node and is no op type", "node names are in the --json report"
            raise ToolError(what, where=model.path, got=f"op types {', '.join(kinds)}", remedy=remedy)
        names |= dict.fromkeys(found)
    return tuple(names), tuple(text for text in selectors if text in kinds)


def require_op_types(model: ModelFile, settings: OnnxSettings) -> None:
    """Raise ToolError where op types are named of which the model has none."""
    if settings.op_types == OnnxSettings().op_types:
        return
    kinds = {op.op_type for op in model.ops}
    if missing := [kind for kind in settings.op_types if kind not in kinds]:
        got = f"op types {', '.join(sorted(kinds))}"
        raise ToolError(f"--set op_types: the model has no {', '.join(missing)}", where=model.path, got=got)


def require_useful_settings(recipe: Recipe, texts: Sequence[str], others: Mapping[str, bool]) -> None:
    """Raise ToolError for settings and options that would do nothing in a recipe.

    Args:
        recipe: The recipe.
        texts: The settings given, as of `parse_settings`.
        others: Further options that only static recipes know -> whether they are given.
    """
    idle = [f"--set {name}" for name in unused_settings(recipe, texts)]
    idle += [name for name, is_given in others.items() if is_given and recipe not in (*STATIC, "auto")]
    if idle:
        what = f"{', '.join(idle)} does nothing in recipe {recipe}"
        raise ToolError(what, remedy=f"leave it out, or use --recipe {DEFAULT_RECIPE}")
