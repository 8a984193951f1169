"""A limit that was checked, and the table of limits."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True)
class GateKept:
    """A limit on one model, and whether it was kept; `value` is None where it could not be measured."""

    model: str
    name: str
    value: float | None
    limit: float
    ok: bool

    def sentence(self) -> str:
        """Return model, limit and value in one line."""
        value = "not measured" if self.value is None else format(self.value, ".4g")
        return f"{self.model} {self.name} {value}, limit {self.limit:g}"


def gate_table(gates: Sequence[GateKept]) -> Table:
    """Return limits, and whether they were kept."""
    table = Table("model", "gate", "value", "limit", "")
    for gate in gates:
        value = "not measured" if gate.value is None else f"{gate.value:.4g}"
        table.add_row(gate.model, gate.name, value, f"{gate.limit:g}", "ok" if gate.ok else "FAILED")
    return table
