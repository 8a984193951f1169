"""Search for the mixed precision that keeps a model's answers within a limit at the smallest size, or the lowest latency.

1. Screen: the whole model in each precision; one that makes it clearly slower, or that the runtime refuses, is left out.
2. Scan: each layer alone in each precision, the rest in float16: what it saves, and how far it moves the answers.
3. Walk: the layers' steps sorted by damage done per byte (or millisecond) saved, the most worthwhile first; the longest run of them
   that stays within the limit is found by measuring real files. Damage adds up roughly as independent errors do, so squares are
   compared; what counts is always the measured file.
4. Refine: further steps one by one, and together, while something within the limit gets better.

All measurements go through a `concurrent.futures` executor, in batches that do not depend on the number of workers, and into a
ledger: the same search gives the same recipe, and an interrupted one goes on where it was.

Source: the idea of ranking layers by measured sensitivity and walking the list is that of Wu et al., Integer quantization for deep
    learning inference, 2020, section 6.2 (partial quantization); the walk by damage per byte is ours.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from shared.command.cli import step_progress
from shared.command.errors import ToolError
from shared.files.atomic import draft_beside
from shared.formats.tflite import Op
from shared.runtime.executors import finished
from tools.quantize_tflite.candidates import Job, Outcome, RefusedError, Subject, measure_candidate
from tools.quantize_tflite.recipes import NONE, assign, operation_of, resolve_recipe, supports

Target = Literal["size", "latency"]
Precisions = dict[str, str]  # op scope -> recipe

BASE = "fp16"
STEPS = ("int8-weight-only", "int8", "weight_only_wi4_afp32", "dynamic_wi4_afp32")
TOO_SLOW = 1.3  # times the float model's latency, for the whole model in one precision; wide, for timings wander
COUNTED_WEIGHTS = 0.999  # the layers that hold this share of all weights are searched; the others stay in float16
BATCH = 6  # candidates measured side by side; fixed, so that the way through the search is
MAX_ROUNDS = 30


@dataclass(frozen=True)
class Step:
    """One layer from one precision to the next smaller one on its way.

    Args:
        scope: The layer.
        recipe: The precision it gets.
        saved: Bytes (or share of the latency) that the model gets smaller by.
        harm: By how much the square of the drop grows.
    """

    scope: str
    recipe: str
    saved: float
    harm: float


@dataclass(frozen=True)
class Found:
    """Result of a search.

    Args:
        precisions: Op scope -> recipe, for every op with weights.
        outcome: What the file with these precisions showed.
        drop: The largest relative error of an output, over what that output is allowed: at most 1.
        measured: Candidates measured in this run.
        resumed: Candidates whose measurements came from the ledger.
        layers: Layers searched.
        left_out: Precisions left out, each with the reason.
    """

    precisions: Precisions
    outcome: Outcome
    drop: float
    measured: int
    resumed: int
    layers: int
    left_out: list[str] = field(default_factory=list)


class Ledger:
    """Measurements kept in a file of JSON lines, each written before the next step depends on it.

    Args:
        path: The file; made where there is none.
        identity: What the measurements are of; a ledger of something else is started anew.
    """

    def __init__(self, path: Path, identity: dict[str, str]) -> None:
        self._known: dict[str, Outcome] = {}
        head = json.dumps({"edgepress": "search", **identity}, sort_keys=True)
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            if not _is_head(lines[:1]):
                raise ToolError(
                    "this file is no search ledger", where=path, remedy="move it away, or choose another output with -o"
                )
            if lines[0] == head:
                self._read(lines[1:])
        self.resumed = len(self._known)
        with draft_beside(path) as draft:  # what was read is written again: the last line may have been cut off
            lines = [head, *(self._line(key, outcome) for key, outcome in self._known.items())]
            draft.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            draft.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def _read(self, lines: list[str]) -> None:
        for line in lines:
            try:
                entry = json.loads(line)
                self._known[entry["key"]] = TypeAdapter(Outcome).validate_python(entry["outcome"])
            except (ValueError, KeyError, TypeError, ValidationError):
                return

    @staticmethod
    def _line(key: str, outcome: Outcome) -> str:
        return json.dumps({"key": key, "outcome": TypeAdapter(Outcome).dump_python(outcome, mode="json")})

    def _write(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def get(self, key: str) -> Outcome | None:
        """Return what was measured under a key."""
        return self._known.get(key)

    def put(self, key: str, outcome: Outcome) -> None:
        """Keep a measurement."""
        self._known[key] = outcome
        self._write(self._line(key, outcome))

    def close(self) -> None:
        """Close the file; what was put is on disk already."""
        self._file.close()


def _is_head(lines: list[str]) -> bool:
    """Whether a file's first line is that of a ledger."""
    try:
        return bool(json.loads(lines[0])["edgepress"] == "search")
    except (ValueError, LookupError, TypeError, RecursionError):
        return False


class Search:
    """One search over one model; `run` does it.

    Args:
        subject: The model and its samples.
        ops: Its ops.
        limits: For each output, the largest relative error allowed.
        target: What to make small.
        executor: Where candidates are measured.
        ledger: Where measurements are kept.
    """

    def __init__(  # noqa: PLR0917 - all of one kind: what the search is about
        self, subject: Subject, ops: Sequence[Op], limits: Sequence[float], target: Target, executor: Executor, ledger: Ledger
    ) -> None:
        self._subject, self._limits, self._target = subject, limits, target
        self._executor, self._ledger = executor, ledger
        self._weighted = [op for op in ops if op.size_weights and _choices(op, (BASE, *STEPS))]
        self._layers = _counted(self._weighted)
        self._base: Precisions = {op.scope: BASE for op in self._weighted if _choices(op, (BASE,))}
        self._measured = 0

    def run(self) -> Found:
        """Return the best precisions found.

        Raises:
            ToolError: Nothing is within the limit, not even float16; or the model has no layer to quantize.
        """
        if not self._layers:
            raise ToolError("no layer of this model can be quantized", where=self._subject.path)
        base = self._measure("measure the float16 model", [self._base])[0]
        if not self._fits(base):
            raise ToolError(
                "even float16 weights move the answers further than the limit",
                where=self._subject.path,
                got=f"relative errors of {', '.join(str(damage.relative_error) for damage in base.outputs)}",
                remedy="allow a larger --max-drop",
            )
        recipes, left_out = self._screen()
        steps = sorted(self._scan(base, recipes), key=lambda step: (step.harm / step.saved, step.scope, step.recipe))
        best, outcome = self._walk(steps, base)
        best, outcome = self._refine(steps, best, outcome)
        return Found(best, outcome, self._drop(outcome), self._measured, self._ledger.resumed, len(self._layers), left_out)

    def _screen(self) -> tuple[list[str], list[str]]:
        """Return the precisions to search, and why the others were left out."""
        whole = [{**self._base, **{op.scope: recipe for op in self._layers if _choices(op, (recipe,))}} for recipe in STEPS]
        outcomes = self._measure("screen the precisions", whole, is_timed=True)
        kept, left_out = [], []
        for recipe, outcome in zip(STEPS, outcomes, strict=True):
            slowdown = outcome.slowdown or 1.0
            if outcome.size_bytes and slowdown <= TOO_SLOW:
                kept.append(recipe)
            else:
                why = f"{slowdown:.1f} times slower than float here" if outcome.size_bytes else "the runtime refuses it"
                left_out.append(f"{recipe}: {why}")
        return kept, left_out

    def _scan(self, base: Outcome, recipes: list[str]) -> list[Step]:
        """Return each layer's steps along the lower convex hull of what it saves and the harm it does."""
        tried = [(op, recipe) for op in self._layers for recipe in _choices(op, recipes)]
        alone = [{**self._base, op.scope: recipe} for op, recipe in tried]
        outcomes = self._measure("measure each layer alone", alone, is_timed=self._target == "latency")
        steps = []
        for op in self._layers:
            points = [
                (self._cost(base) - self._cost(outcome), max(0.0, self._drop(outcome) ** 2 - self._drop(base) ** 2), recipe)
                for (other, recipe), outcome in zip(tried, outcomes, strict=True)
                if other is op and math.isfinite(self._drop(outcome))
            ]
            steps += [Step(op.scope, recipe, saved, harm) for saved, harm, recipe in _hull(points)]
        return steps

    def _walk(self, steps: list[Step], base: Outcome) -> tuple[Precisions, Outcome]:
        """Return the longest run of steps found within the limit, and what it showed."""
        low, high = 0, len(steps) + 1  # low fits; high is taken not to
        best, outcome = self._base, base
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
            ahead = [s for s in _next_steps(steps, best) if (s.scope, s.recipe) not in failed][:BATCH]
            if not ahead:
                break
            singles = self._measure("refine", [{**best, step.scope: step.recipe} for step in ahead])
            better = [s for s, found in zip(ahead, singles, strict=True) if self._fits(found) and self._is_better(found, outcome)]
            failed |= {(step.scope, step.recipe) for step in ahead if step not in better}
            if not better:
                continue
            together = [{**best, **{step.scope: step.recipe for step in better[: n + 1]}} for n in range(len(better))]
            outcomes = self._measure("refine", together)
            ranked = [n for n, found in enumerate(outcomes) if self._fits(found) and self._is_better(found, outcome)]
            best, outcome = together[ranked[-1]], outcomes[ranked[-1]]
            failed |= {(step.scope, step.recipe) for step in better if best[step.scope] != step.recipe}
        return best, outcome

    def _after(self, steps: Sequence[Step]) -> Precisions:
        return {**self._base, **{step.scope: step.recipe for step in steps}}

    def _drop(self, outcome: Outcome) -> float:
        """Return the largest share of its limit that an output's error takes; infinite where the candidate failed."""
        errors = [damage.relative_error for damage in outcome.outputs]
        if not errors or any(error is None for error in errors):
            return math.inf
        return max(error / limit for error, limit in zip(errors, self._limits, strict=True) if error is not None)

    def _fits(self, outcome: Outcome) -> bool:
        return self._drop(outcome) <= 1

    def _cost(self, outcome: Outcome) -> float:
        return float(outcome.size_bytes) if self._target == "size" else outcome.slowdown or 1.0

    def _is_better(self, outcome: Outcome, than: Outcome) -> bool:
        return self._cost(outcome) < self._cost(than)

    def _measure(self, name: str, candidates: list[Precisions], *, is_timed: bool | None = None) -> list[Outcome]:
        """Return what each candidate shows, from the ledger or measured now; one the runtime refuses has size 0."""
        timed = self._target == "latency" if is_timed is None else is_timed
        keys = [_key(candidate, timed) for candidate in candidates]
        missing = {key: c for key, c in zip(keys, candidates, strict=True) if self._ledger.get(key) is None}
        with step_progress(name, len(set(keys)), len(set(keys)) - len(missing)) as advance:
            jobs = {
                self._executor.submit(measure_safely, Job(self._subject, assign(c), is_timed=timed)): key
                for key, c in missing.items()
            }
            for key, outcome in finished(jobs):
                self._ledger.put(key, outcome)
                self._measured += 1
                advance("")
        return [known for key in keys if (known := self._ledger.get(key)) is not None]


def measure_safely(job: Job) -> Outcome:
    """Measure a candidate; one that the quantizer or the runtime refuses is told by a size of 0."""
    try:
        return measure_candidate(job)
    except RefusedError:
        return Outcome(0, [])


def _choices(op: Op, recipes: Sequence[str]) -> list[str]:
    """Return the recipes among those given that do something to an op."""
    operation = operation_of(op.op_type)
    if operation is None or op.dtype != "FLOAT32":
        return []
    return [recipe for recipe in recipes if recipe != NONE and any(supports(rule, operation) for rule in resolve_recipe(recipe)[1])]


def _counted(ops: Sequence[Op]) -> list[Op]:
    """Return the layers that together hold nearly all weights, in the order of the graph."""
    total, reached, kept = sum(op.size_weights for op in ops), 0, set()
    for op in sorted(ops, key=lambda op: (-op.size_weights, op.scope)):
        if reached >= COUNTED_WEIGHTS * total:
            break
        kept.add(op.scope)
        reached += op.size_weights
    return [op for op in ops if op.scope in kept]


def _hull(points: Sequence[tuple[float, float, str]]) -> Iterator[tuple[float, float, str]]:
    """Yield the steps along the lower convex hull of (saved, harm) from (0, 0): what each saves and harms more than the last."""
    hull: list[tuple[float, float, str]] = [(0.0, 0.0, BASE)]
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
        of_layer.setdefault(step.scope, []).append(step.recipe)
    for step in steps:
        ahead = of_layer[step.scope]
        taken = ahead.index(precisions[step.scope]) + 1 if precisions.get(step.scope) in ahead else 0
        if ahead[taken:] and ahead[taken] == step.recipe:
            yield step


def _key(precisions: Precisions, timed: bool) -> str:  # noqa: FBT001 - a part of the key
    text = json.dumps([sorted(precisions.items()), timed])
    return hashlib.sha256(text.encode()).hexdigest()[:24]
