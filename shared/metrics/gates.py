"""Gates: limits that a product must keep, how users name them, and what came of each."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rich.table import Table

from shared.command.errors import ToolError


@dataclass(frozen=True)
class GateResult:
    """One gate of one model.

    Args:
        name: Such as `min_speedup`; names that begin with `max` are upper limits, all others lower ones.
        value: The measured value; None where it could not be measured.
        limit: The limit.
        ok: Whether the gate was kept; a value that could not be measured breaks it.
        model: The model's name, where there are several.
    """

    name: str
    value: float | None
    limit: float
    ok: bool
    model: str = ""

    def __str__(self) -> str:
        value = "not measured" if self.value is None else format(self.value, ".4g")
        return f"{self.model} {self.name} {value}, limit {self.limit:g}".strip()


def check_gate(name: str, value: float | None, limit: float, model: str = "") -> GateResult:
    """Compare a value with its limit."""
    is_kept = value is not None and (value <= limit if name.startswith("max") else value >= limit)
    return GateResult(name, value, limit, is_kept, model)


def parse_gates(texts: Sequence[str], known: Collection[str]) -> dict[str, float]:
    """Return gate -> limit of options such as `min_speedup=1.5`; `min_accuracy_under:jpeg-50=0.97` names a part of a gate.

    Raises:
        ToolError: No such gate, no number, or two limits for one gate.
    """
    found: dict[str, float] = {}
    for text in texts:
        name, _, value = text.rpartition("=")
        option = f"--gate {text}"
        if name.partition(":")[0] not in known:
            raise ToolError(f"{option}: no such gate", expected=f"NAME=VALUE, NAME one of {', '.join(sorted(known))}")
        if name in found:
            raise ToolError(f"{option}: the gate has a limit already", remedy="give one")
        found[name] = _number(option, value)
    return found


def _number(option: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ToolError(f"{option}: the limit is no finite number", expected="NAME=VALUE, such as min_speedup=1.5")
    return number


def broken(gates: Sequence[GateResult]) -> str:
    """Return the gates that were not kept, in one line."""
    return "; ".join(str(gate) for gate in gates if not gate.ok)


def gate_table(gates: Sequence[GateResult]) -> Table:
    """Return all gates as a table."""
    has_models = any(gate.model for gate in gates)
    table = Table(*(("model",) if has_models else ()), "gate", "value", "limit", "")
    for gate in gates:
        value = "not measured" if gate.value is None else f"{gate.value:.6g}"
        model = (gate.model,) if has_models else ()
        table.add_row(*model, gate.name, value, f"{gate.limit:g}", "ok" if gate.ok else "FAILED")
    return table
