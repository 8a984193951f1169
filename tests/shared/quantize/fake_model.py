"""A model whose quantized sizes and errors are arithmetic, so that a search over it takes no time."""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from shared.command.options import Objective
from shared.metrics.output_error import OutputError
from shared.quantize.ledger import Ledger, Outcome, RefusedError
from shared.quantize.request import ALL_OUTPUTS, Limits, Precisions
from shared.quantize.search import Search, SearchResult, SearchSpace

FLOAT = "float32"
SIZES = {FLOAT: 1.0, "fp16": 0.5, "int8": 0.25, "int4": 0.125}  # of a weight, over its size in float32
Harm = Mapping[tuple[str, str], float]  # (layer, precision) -> relative error of the model with that layer alone quantized


def independent(harm: Harm) -> Callable[[Precisions], float]:
    """Return the error of a model whose squared errors add up over the layers."""
    return lambda precisions: math.sqrt(sum(harm.get(step, 0.0) ** 2 for step in precisions.items()))


@dataclass
class FakeModel:
    """A model to search.

    Args:
        sizes: Layer -> bytes in float32.
        error: Of the only output, from the precisions.
        choices: Precisions that every layer can have.
        base: Precision of every layer before the search.
        speed: Precision -> times the float model's latency with the whole model in it.
        refuses: Whether the runtime refuses a candidate.
    """

    sizes: Mapping[str, int]
    error: Callable[[Precisions], float]
    choices: Sequence[str] = ("int8",)
    base: str = FLOAT
    speed: Mapping[str, float] = field(default_factory=dict)
    refuses: Callable[[Precisions], bool] = lambda _: False
    seen: list[Precisions] = field(default_factory=list)

    def space(self) -> SearchSpace:
        return SearchSpace(dict.fromkeys(self.sizes, self.base), dict.fromkeys(self.sizes, self.choices), self.base)

    def job(self, precisions: Precisions, is_timed: bool) -> "FakeJob":
        return FakeJob(self, precisions, is_timed)

    def search(
        self,
        limits: Limits | float,
        objective: Objective = "size",
        executor: Executor | None = None,
        ledger: Path | None = None,
    ) -> SearchResult:
        """Search for the precisions; limits may be the relative error of all outputs."""
        settled = limits if isinstance(limits, Limits) else Limits({ALL_OUTPUTS: limits})
        kept = Ledger(ledger, {"model": "fake"})
        try:
            with ThreadPoolExecutor(1) as alone:
                return Search(self.space(), self.job, settled, objective, executor or alone, kept).run()
        finally:
            kept.close()


@dataclass(frozen=True)
class FakeJob:
    """One candidate of a fake model."""

    model: FakeModel
    precisions: Precisions
    is_timed: bool

    def measure(self) -> Outcome:
        model = self.model
        model.seen.append(self.precisions)
        if model.refuses(self.precisions):
            raise RefusedError("the runtime does not load the candidate")
        size = sum(int(model.sizes[layer] * SIZES[precision]) for layer, precision in self.precisions.items())
        total = sum(model.sizes.values())
        slowdown = sum(model.sizes[name] / total * model.speed.get(p, 1.0) for name, p in self.precisions.items())
        error = model.error(self.precisions)
        angle = 1 - error**2 / 2
        errors = [OutputError("y", error, angle, error, worst_cosine=angle)]
        return Outcome(size, errors, None, slowdown if self.is_timed else None)
