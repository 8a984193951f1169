"""What a dry run tells: what would be written, how large at most, and what that takes."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Column, Table

from shared.command.resources import ResourceEstimate, size_text


@dataclass(frozen=True)
class Forecast:
    """What would become of a product. Sizes are the most that is expected.

    Args:
        output: The file it would write.
        state: What would become of it.
        needs: What making it would take.
        free_disk_bytes: In the output's folder.
        free_memory_bytes: None where the system does not tell.
    """

    output: Path
    state: str
    needs: ResourceEstimate
    free_disk_bytes: int
    free_memory_bytes: int | None

    @property
    def ok(self) -> bool:
        """Whether there is enough of everything."""
        enough_memory = self.free_memory_bytes is None or self.needs.memory_bytes <= self.free_memory_bytes
        return enough_memory and self.needs.disk_bytes <= self.free_disk_bytes

    def row(self) -> list[str]:
        """Return it as a row of a table."""
        memory = "unknown" if self.free_memory_bytes is None else size_text(self.free_memory_bytes)
        return [
            str(self.output),
            self.state,
            size_text(self.needs.product_bytes),
            f"{size_text(self.needs.disk_bytes)} of {size_text(self.free_disk_bytes)}",
            f"{size_text(self.needs.memory_bytes)} of {memory}",
            "" if self.ok else "NOT ENOUGH",
        ]


@dataclass(frozen=True)
class Forecasts:
    """What a tool would do: its result in a dry run."""

    forecasts: list[Forecast]

    @property
    def ok(self) -> bool:
        """Whether there is enough of everything for each product."""
        return all(forecast.ok for forecast in self.forecasts)

    def __rich__(self) -> RenderableType:
        table = Table(Column("product", overflow="fold"), "", "size at most", "disk needed of free", "memory needed of free", "")
        for forecast in self.forecasts:
            table.add_row(*forecast.row())
        return Lines(table, "a dry run: nothing was written")


class DryRun(Exception):  # noqa: N818 - no error: it ends a dry run
    """A dry run came to where it would begin to write; `result` tells what it would do."""

    def __init__(self, *forecasts: Forecast) -> None:
        super().__init__("a dry run writes nothing")
        self.result = Forecasts(list(forecasts))
