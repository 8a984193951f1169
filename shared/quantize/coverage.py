"""Which layers a quantizer changed, why it skipped the rest, and the tables that show both."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from rich.console import RenderableType
from rich.table import Column, Table

from shared.command.resources import size_text

SHOWN = 8  # rows of long tables; the JSON has all
LONGEST = 60  # characters of a name in a table


class Layer(Protocol):
    """One op of a model file and its largest constant operand, its weights; without one, weight_bytes is 0."""

    @property
    def op_type(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def output(self) -> str: ...


@dataclass(frozen=True)
class LayerState:
    """What became of a layer.

    Args:
        layer: The layer before.
        dtype: Type of its weights now; empty where it has none.
        weight_bytes: Bytes of its weights now.
        has_smaller_weights: Whether its weights were quantized.
        became_integer: Whether it has no weights, and integer outputs now.
        is_shared: Whether its weights are those of an earlier layer, too, which counts them.
    """

    layer: Layer
    dtype: str
    weight_bytes: int
    has_smaller_weights: bool
    became_integer: bool = False
    is_shared: bool = False


@dataclass(frozen=True)
class OpTypeCoverage:
    """What became of the layers of one op type.

    Args:
        op_type: Such as CONV_2D or Conv.
        ops: Ops of this type that have weights; all of them where activations were quantized.
        quantized: How many of them have smaller weights now, or integer outputs where they have none.
        weight_bytes: Bytes of their weights before, in float; of each op, its largest constant.
        quantized_weight_bytes: How many of these bytes belong to quantized ops.
        bytes_after: Bytes of the weights now.
        dtypes: Types of the weights now.
        reason: Why the rest was skipped; empty where nothing was.
    """

    op_type: str
    ops: int
    quantized: int
    weight_bytes: int
    quantized_weight_bytes: int
    bytes_after: int
    dtypes: list[str]
    reason: str


@dataclass(frozen=True)
class SkippedLayer:
    """A layer whose weights stayed as they were, and why."""

    op_type: str
    name: str
    weight_bytes: int
    reason: str


@dataclass(frozen=True)
class RuleMatches:
    """One rule of a recipe, and the ops it matches.

    Args:
        regex: What it matches among op scopes.
        operation: The op type it is for, or '*'.
        algorithm: How it quantizes, or 'no_quantize'.
        precision: In short, such as 'int8 weights' or 'int8 weights, int8 activations'.
        matched: Ops it matches and supports.
        decided: Ops whose precision it decided, because no later rule did.
    """

    regex: str
    operation: str
    algorithm: str
    precision: str
    matched: int
    decided: int


def measure_coverage(
    states: Sequence[LayerState], why_skipped: Callable[[LayerState], str]
) -> tuple[list[OpTypeCoverage], list[SkippedLayer]]:
    """Return one row per op type, largest weights first, and each layer with weights that was skipped.

    Args:
        states: What became of every op.
        why_skipped: Returns why an op was skipped.
    """
    rows, skipped = [], []
    for op_type in dict.fromkeys(state.layer.op_type for state in states):
        of_type = [state for state in states if state.layer.op_type == op_type]
        is_integer = any(state.became_integer for state in of_type)
        counted = of_type if is_integer else [state for state in of_type if state.layer.weight_bytes]
        if not counted:
            continue
        own = [state for state in counted if not state.is_shared]
        done = [state for state in counted if state.has_smaller_weights or state.became_integer]
        reasons = {state.layer.name: why_skipped(state) for state in counted if state not in done}
        skipped += [
            SkippedLayer(op_type, state.layer.name, state.layer.weight_bytes, reasons[state.layer.name])
            for state in counted
            if state.layer.name in reasons and state.layer.weight_bytes
        ]
        rows.append(
            OpTypeCoverage(
                op_type=op_type,
                ops=len(counted),
                quantized=len(done),
                weight_bytes=sum(state.layer.weight_bytes for state in own),
                quantized_weight_bytes=sum(state.layer.weight_bytes for state in own if state.has_smaller_weights),
                bytes_after=sum(state.weight_bytes for state in own),
                dtypes=sorted({state.dtype for state in counted} - {""}),
                reason="; ".join(f"{count} x {reason}" for reason, count in Counter(reasons.values()).most_common()),
            )
        )
    return sorted(rows, key=lambda row: -row.weight_bytes), sorted(skipped, key=lambda op: -op.weight_bytes)


def covered_share(rows: Sequence[OpTypeCoverage]) -> float | None:
    """Return the share of the weight bytes that are quantized; None for a model without weights."""
    total = sum(row.weight_bytes for row in rows)
    return sum(row.quantized_weight_bytes for row in rows) / total if total else None


def coverage_table(title: str, rows: Sequence[OpTypeCoverage]) -> Table:
    """Return what became of the ops, a row for each type."""
    table = Table("op type", "quantized", "weights before", "after", "now", Column("why not all", overflow="fold"), title=title)
    for row in rows:
        counts = f"{row.quantized} of {row.ops}"
        before, after = size_text(row.weight_bytes), size_text(row.bytes_after)
        table.add_row(row.op_type, counts, before, after, ", ".join(row.dtypes), row.reason)
    return table


def skipped_tables(rows: Sequence[OpTypeCoverage], layers: Sequence[SkippedLayer]) -> Iterator[RenderableType]:
    """Yield the skipped layers, but for those of a type none of which was quantized and whose row gives the one reason."""
    explained = {row.op_type for row in rows if row.quantized == 0 and ";" not in row.reason}
    rest = [layer for layer in layers if layer.op_type not in explained]
    if rest:
        table = Table(Column("skipped layer", overflow="fold"), "op type", "weights", Column("why", overflow="fold"))
        for layer in rest[:SHOWN]:
            table.add_row(short_name(layer.name), layer.op_type, size_text(layer.weight_bytes), layer.reason)
        yield table
        if len(rest) > SHOWN:
            yield f"and {len(rest) - SHOWN} smaller ones; --json has all"


def short_name(name: str) -> str:
    """Return the end of a long name; converters join the names of all modules and ops on the way, the nearest last."""
    return name if len(name) <= LONGEST else f"...{name[3 - LONGEST :]}"


def number_text(value: float | None, form: str, unit: str = "") -> str:
    """Return a number, or a dash where there is none."""
    return "-" if value is None else f"{value:{form}}{unit}"
