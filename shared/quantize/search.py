"""Search for the precision of each layer that keeps a model's outputs within limits at the smallest size, or the lowest latency.

1. Screen: the whole model in each precision; one that makes it clearly slower, or that the runtime refuses, is left out. Where only
   one precision is left and the whole model in it keeps the limits, the search ends.
2. Scan: each layer alone in each precision, the rest as in the base: what it saves, and how far it moves the outputs.
3. Walk: the layers' steps sorted by error per byte (or millisecond) saved, the most worthwhile first; the longest run of them that
   stays within the limits is found by measuring real files. Errors add up roughly as independent ones do, so squares are compared;
   what counts is always the measured file.
4. Refine: further steps one by one, and together, while something within the limits gets better.

All measurements go through a `concurrent.futures` executor, in batches that do not depend on the number of workers, and into a
ledger: the same search gives the same precisions, and an interrupted one goes on where it was.

Source: the idea of ranking layers by measured sensitivity and walking the list is that of Wu et al., Integer quantization for deep
    learning inference, 2020, section 6.2 (partial quantization); the walk by error per byte is ours.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from itertools import pairwise

from shared.command.cli import step_progress
from shared.command.errors import ToolError
from shared.command.options import Objective
from shared.quantize.ledger import Ledger, MakeJob, Outcome, measure_safely
from shared.quantize.request import Limits, Precisions
from shared.runtime.executors import finished

TOO_SLOW = 1.3  # times the float model's latency, for the whole model in one precision; wide, for timings wander
BATCH = 6  # candidates measured side by side; fixed, so that the steps taken do not depend on the machine
MAX_ROUNDS = 30


@dataclass(frozen=True)
class SearchSpace:
    """What a search may choose from.

    Args:
        base: The precision of each layer before any step: the most exact.
        choices: Layer name -> smaller precisions that the layer can have; in the order of the graph.
        base_name: The base in words, such as 'float16'.
    """

    base: Precisions
    choices: Mapping[str, Sequence[str]]
    base_name: str

    @property
    def precisions(self) -> list[str]:
        """Every precision that a layer can have."""
        return list(dict.fromkeys(precision for of_layer in self.choices.values() for precision in of_layer))


@dataclass(frozen=True)
class Step:
    """One layer from one precision to the next smaller one.

    Args:
        layer: Name of the layer.
        precision: The precision it gets.
        saved: Bytes (or share of the latency) that the model gets smaller by.
        harm: By how much the square of the limits' share grows.
    """

    layer: str
    precision: str
    saved: float
    harm: float


@dataclass(frozen=True)
class SearchResult:
    """Result of a search.

    Args:
        precisions: Layer name -> precision, for every layer of the base.
        outcome: What the file with these precisions measured.
        share: The largest share of its limit that an output's error takes: at most 1.
        measured: Candidates measured in this run.
        resumed: Candidates whose measurements came from the ledger.
        layers: Layers searched.
        left_out: Precisions left out, each with the reason.
    """

    precisions: Precisions
    outcome: Outcome
    share: float
    measured: int
    resumed: int
    layers: int
    left_out: list[str] = field(default_factory=list)


@dataclass
class Search:
    """One search over one model; `run` does it.

    Args:
        space: What may be chosen.
        make_job: Makes the measurement of one candidate.
        limits: What outputs must keep.
        objective: What to make small.
        executor: Where candidates are measured.
        ledger: Where measurements are kept.
    """

    space: SearchSpace
    make_job: MakeJob
    limits: Limits
    objective: Objective
    executor: Executor
    ledger: Ledger
    _measured: int = field(default=0, init=False)

    def run(self) -> SearchResult:
        """Return the best precisions found.

        Raises:
            ToolError: The base itself is outside the limits, or the model has no layer to quantize.
        """
        if not self.space.choices:
            raise ToolError("no layer of this model can be quantized")
        base = self._measure(f"measure the {self.space.base_name} model", [self.space.base])[0]
        if not self._fits(base):
            got = "; ".join(str(error) for error in base.errors) or "it does not run"
            raise ToolError(f"even the {self.space.base_name} model is outside the limits", got=got, remedy="allow a larger error")
        kept, left_out, whole = self._screen()
        best, outcome = whole if whole is not None else self._mixed(base, kept)
        layers, share = len(self.space.choices), self._share(outcome)
        return SearchResult(best, outcome, share, self._measured, self.ledger.resumed, layers, left_out)

    def _screen(self) -> tuple[list[str], list[str], tuple[Precisions, Outcome] | None]:
        """Return the precisions to search, why others were left out, and the whole model in the only one left where it fits."""
        precisions = self.space.precisions
        whole = {
            precision: {**self.space.base, **{name: precision for name, of in self.space.choices.items() if precision in of}}
            for precision in precisions
        }
        is_timed = len(precisions) > 1 or self.objective == "latency"
        outcomes = dict(
            zip(precisions, self._measure("screen the precisions", list(whole.values()), is_timed=is_timed), strict=True)
        )
        left_out = {}
        for precision, outcome in outcomes.items():
            slowdown = outcome.slowdown or 1.0
            if not outcome.size_bytes:
                if len(precisions) > 1:  # else a single layer may be the reason; the scan finds it
                    left_out[precision] = "the runtime refuses it"
            elif slowdown > TOO_SLOW:
                left_out[precision] = f"{slowdown:.1f} times slower than float here"
        kept = [precision for precision in precisions if precision not in left_out]
        reasons = [f"{precision}: {why}" for precision, why in left_out.items()]
        if len(kept) == 1 and self._fits(outcomes[kept[0]]):
            return kept, reasons, (whole[kept[0]], outcomes[kept[0]])
        return kept, reasons, None

    def _mixed(self, base: Outcome, precisions: Sequence[str]) -> tuple[Precisions, Outcome]:
        steps = sorted(self._scan(base, precisions), key=lambda step: (step.harm / step.saved, step.layer, step.precision))
        return self._refine(steps, *self._walk(steps, base))

    def _scan(self, base: Outcome, precisions: Sequence[str]) -> list[Step]:
        """Return each layer's steps along the lower convex hull of what it saves and the harm it does."""
        tried = [(layer, p) for layer, of_layer in self.space.choices.items() for p in of_layer if p in precisions]
        alone = [{**self.space.base, layer: precision} for layer, precision in tried]
        outcomes = self._measure("measure each layer alone", alone, is_timed=self.objective == "latency")
        steps = []
        for layer in self.space.choices:
            points = [
                (self._cost(base) - self._cost(outcome), max(0.0, self._share(outcome) ** 2 - self._share(base) ** 2), precision)
                for (other, precision), outcome in zip(tried, outcomes, strict=True)
                if other == layer and math.isfinite(self._share(outcome))
            ]
            steps += [Step(layer, precision, saved, harm) for saved, harm, precision in _hull(points)]
        return steps

    def _walk(self, steps: list[Step], base: Outcome) -> tuple[Precisions, Outcome]:
        """Return the longest run of steps found within the limits, and what it measured."""
        low, high = 0, len(steps) + 1  # low fits; high is taken not to
        best, outcome = self.space.base, base
        while high - low > 1:
            gap = high - low
            places = sorted({low + max(1, gap * part // (BATCH + 1)) for part in range(1, BATCH + 1)} - {high})
            tried = [self._after(steps[:place]) for place in places]
            outcomes = self._measure("walk the list", tried)
            fitting = [number for number, found in enumerate(outcomes) if self._fits(found)]
            if fitting:
                last = fitting[-1]
                low, best, outcome = places[last], tried[last], outcomes[last]
            high = min([place for place in places if place > low], default=high)
        return best, outcome

    def _refine(self, steps: list[Step], best: Precisions, outcome: Outcome) -> tuple[Precisions, Outcome]:
        """Return something better still: steps beyond the walk's end, one by one and then together."""
        failed: set[tuple[str, str]] = set()
        for _ in range(MAX_ROUNDS):
            ahead = [s for s in _next_steps(steps, best) if (s.layer, s.precision) not in failed][:BATCH]
            if not ahead:
                break
            singles = self._measure("refine", [{**best, step.layer: step.precision} for step in ahead])
            better = [s for s, found in zip(ahead, singles, strict=True) if self._fits(found) and self._is_better(found, outcome)]
            failed |= {(step.layer, step.precision) for step in ahead if step not in better}
            if not better:
                continue
            together = [{**best, **{step.layer: step.precision for step in better[: n + 1]}} for n in range(len(better))]
            outcomes = self._measure("refine", together)
            ranked = [n for n, found in enumerate(outcomes) if self._fits(found) and self._is_better(found, outcome)]
            best, outcome = together[ranked[-1]], outcomes[ranked[-1]]
            failed |= {(step.layer, step.precision) for step in better if best[step.layer] != step.precision}
        return best, outcome

    def _after(self, steps: Sequence[Step]) -> Precisions:
        return {**self.space.base, **{step.layer: step.precision for step in steps}}

    def _share(self, outcome: Outcome) -> float:
        return self.limits.share(outcome.errors)

    def _fits(self, outcome: Outcome) -> bool:
        return self._share(outcome) <= 1

    def _cost(self, outcome: Outcome) -> float:
        return float(outcome.size_bytes) if self.objective == "size" else outcome.slowdown or 1.0

    def _is_better(self, outcome: Outcome, than: Outcome) -> bool:
        return self._cost(outcome) < self._cost(than)

    def _measure(self, name: str, candidates: list[Precisions], *, is_timed: bool | None = None) -> list[Outcome]:
        """Return what each candidate measures, from the ledger or now; a refused one has size 0."""
        timed = self.objective == "latency" if is_timed is None else is_timed
        keys = [_key(candidate, timed) for candidate in candidates]
        missing = {key: c for key, c in zip(keys, candidates, strict=True) if self.ledger.get(key) is None}
        with step_progress(name, len(set(keys)), len(set(keys)) - len(missing)) as advance:
            jobs = {self.executor.submit(measure_safely, self.make_job(c, timed)): key for key, c in missing.items()}
            for key, outcome in finished(jobs):
                self.ledger.put(key, outcome)
                self._measured += 1
                advance("")
        return [known for key in keys if (known := self.ledger.get(key)) is not None]


def _hull(points: Sequence[tuple[float, float, str]]) -> Iterator[tuple[float, float, str]]:
    """Yield the steps along the lower convex hull of (saved, harm) from (0, 0): what each saves and harms more than the last."""
    hull: list[tuple[float, float, str]] = [(0.0, 0.0, "")]
    for point in sorted(point for point in points if point[0] > 0):
        if point[0] == hull[-1][0]:  # sorted by harm: the earlier one is better
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    for before, after in pairwise(hull):
        yield after[0] - before[0], max(0.0, after[1] - before[1]), after[2]


def _slope(one: tuple[float, float, str], other: tuple[float, float, str]) -> float:
    return (other[1] - one[1]) / (other[0] - one[0])


def _next_steps(steps: Sequence[Step], precisions: Precisions) -> Iterator[Step]:
    """Yield for each layer the first of its steps that it has not taken, most worthwhile first."""
    of_layer: dict[str, list[str]] = {}
    for step in sorted(steps, key=lambda step: step.harm / step.saved):
        of_layer.setdefault(step.layer, []).append(step.precision)
    for step in steps:
        ahead = of_layer[step.layer]
        taken = ahead.index(precisions[step.layer]) + 1 if precisions.get(step.layer) in ahead else 0
        if ahead[taken:] and ahead[taken] == step.precision:
            yield step


def _key(precisions: Precisions, timed: bool) -> str:  # noqa: FBT001 - a part of the key
    text = json.dumps([sorted(precisions.items()), timed])
    return hashlib.sha256(text.encode()).hexdigest()[:24]
