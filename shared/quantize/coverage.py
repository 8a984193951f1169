"""Which ops a quantizer changed, why it left the rest, and the tables that show both."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import RenderableType
from rich.table import Column, Table

from shared.command.resources import size_text

SHOWN = 8  # rows of long tables; the JSON has all
LONGEST = 60  # characters of a name in a table


@dataclass(frozen=True)
class OpTypeCoverage:
    """What became of the ops of one type.

    Args:
        op_type: Builtin operator, such as CONV_2D.
        ops: Ops of this type that have weights; all of them where activations were quantized.
        quantized: How many of them have smaller weights now, or integer outputs where they have none.
        weight_bytes: Bytes of their weights before, as float32; of each op, its largest constant.
        quantized_weight_bytes: How many of these bytes belong to quantized ops.
        bytes_after: Bytes of the weights now.
        dtypes: Types of the weights now.
        reason: Why the rest stayed as it was; empty where nothing did.
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
class OpLeft:
    """An op whose weights stayed as they were, and why."""

    op_type: str
    name: str
    weight_bytes: int
    reason: str


def coverage_table(title: str, rows: Sequence[OpTypeCoverage]) -> Table:
    """Return what became of the ops, a row for each type."""
    table = Table("op type", "quantized", "weights before", "after", "now", Column("why not all", overflow="fold"), title=title)
    for row in rows:
        counts = f"{row.quantized} of {row.ops}"
        before, after = size_text(row.weight_bytes), size_text(row.bytes_after)
        table.add_row(row.op_type, counts, before, after, ", ".join(row.dtypes), row.reason)
    return table


def left_tables(rows: Sequence[OpTypeCoverage], ops: Sequence[OpLeft]) -> Iterator[RenderableType]:
    """Yield the ops that were left, but for those of a type none of which was quantized and whose row gives the one reason."""
    told = {row.op_type for row in rows if row.quantized == 0 and ";" not in row.reason}
    rest = [op for op in ops if op.op_type not in told]
    if rest:
        left = Table(Column("left as it was", overflow="fold"), "op type", "weights", Column("why", overflow="fold"))
        for op in rest[:SHOWN]:
            left.add_row(short_name(op.name), op.op_type, size_text(op.weight_bytes), op.reason)
        yield left
        if len(rest) > SHOWN:
            yield f"and {len(rest) - SHOWN} smaller ones; --json has all"


def short_name(name: str) -> str:
    """Return the end of a long name; converters join the names of all modules and ops on the way, the nearest last."""
    return name if len(name) <= LONGEST else f"...{name[3 - LONGEST :]}"


def number_text(value: float | None, form: str, unit: str = "") -> str:
    """Return a number, or a dash where there is none."""
    return "-" if value is None else f"{value:{form}}{unit}"


def size_sentence(name: str, before: int, after: int, coverage: float | None) -> str:
    """Say how much smaller a model became, and how much of its weights is quantized."""
    change = 1 - after / before
    kept = "" if coverage is None else f"; {coverage:.1%} of the weight bytes quantized"
    return f"{name}: {size_text(before)} -> {size_text(after)}, {abs(change):.1%} {'smaller' if change >= 0 else 'LARGER'}{kept}"
