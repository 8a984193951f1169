"""A pressed model beside the one it was made from, both run for real: how fast, and how far the answers moved."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shared.calibration.dataset import Sample
from shared.command.resources import MIB, available_memory_bytes, cpu_count
from shared.formats.tensors import TensorSpec, describe
from shared.metrics.output_error import Damage, measure_damage
from shared.runtime.model import ModelSource, memory_need_bytes, open_model
from shared.runtime.processes import ChildError
from shared.runtime.samples import sample_inputs
from tools.quantize_tflite.candidates import SEEDED

SLOWER = 1.1  # times the original's latency: from here on it is said, and why
RUNS, LARGE_RUNS = 40, 2
LARGE_BYTES = 64 * MIB


@dataclass(frozen=True)
class Answers:
    """How far one output moved."""

    output: str
    damage: Damage


@dataclass(frozen=True)
class Measured:
    """What running both models showed.

    Args:
        before_ms: Median latency of the original.
        after_ms: Median latency of the product, in turns with the original.
        runs: Timed runs of each.
        threads: Threads of the runtime.
        samples: Inputs whose answers were compared.
        are_seeded: Whether they were made up.
        answers: For each output, how far it moved; empty where inputs or outputs differ in type.
        outside: Op type -> ops of the product that left XNNPACK, beyond those of the original; only where it is slower.
    """

    before_ms: float
    after_ms: float
    runs: int
    threads: int
    samples: int
    are_seeded: bool
    answers: list[Answers]
    outside: dict[str, int] = field(default_factory=dict)

    @property
    def speedup(self) -> float:
        """The original's latency over the product's."""
        return self.before_ms / self.after_ms

    @property
    def is_slower(self) -> bool:
        """Whether it is clearly slower than the original."""
        return self.after_ms > SLOWER * self.before_ms

    def sentence(self) -> str:
        """Say how fast it is; where it is slower, why, and what to do."""
        text = f"latency {self.before_ms:.2f} -> {self.after_ms:.2f} ms, {self.speedup:.2f} times as fast"
        if not self.is_slower:
            return text
        left = ", ".join(f"{count} {kind}" for kind, count in self.outside.items())
        why = f": XNNPACK leaves {left} to plain kernels" if left else ": its kernels for this precision are slower here"
        remedy = "int8-weight-only or fp16 keep float kernels; --rule OP_TYPE=RECIPE changes one op type"
        return f"SLOWER: {text}{why}; {remedy}"


def measure_pair(
    original: Path, product: Path, samples: Sequence[Sample], pixel_range: tuple[float, float] = (0.0, 1.0)
) -> Measured | str:
    """Run both models in turns on the samples, or on seeded ones where there are none; or say why that can't be done.

    A product that seems slower is measured twice more, and the middle one counts: other programs disturb single measurements.

    Args:
        original: A .tflite file.
        product: What was made of it.
        samples: Inputs of the original.
        pixel_range: Of seeded pictures.

    Raises:
        ChildError: The product does not run although the original does.
    """
    first = _measure_once(original, product, samples, pixel_range)
    if isinstance(first, str) or not first.is_slower or original.stat().st_size > LARGE_BYTES:
        return first
    again = [_measure_once(original, product, samples, pixel_range) for _ in range(2)]
    ranked = sorted([first, *(found for found in again if isinstance(found, Measured))], key=lambda found: found.speedup)
    return ranked[len(ranked) // 2]


def _measure_once(original: Path, product: Path, samples: Sequence[Sample], pixel_range: tuple[float, float]) -> Measured | str:
    sources = [ModelSource(original), ModelSource(product)]
    available = available_memory_bytes()
    if available is not None and sum(map(memory_need_bytes, sources)) > available:
        return "not run beside the original: too little free memory for both; compare runs one after the other"
    is_large = original.stat().st_size > LARGE_BYTES
    threads = cpu_count()
    try:
        with open_model(sources[0], threads=threads) as before, open_model(sources[1], threads=threads) as after:
            given = samples or [sample_inputs(before.inputs, seed, pixel_range) for seed in range(1 if is_large else SEEDED)]
            is_alike = [s.dtype for s in before.inputs] == [s.dtype for s in after.inputs]
            fed = [(sample, _renamed(sample, before.inputs, after.inputs) if is_alike else None) for sample in given]
            outputs: list[tuple[list[object], list[object]]] = []
            times: tuple[list[float], list[float]] = ([], [])
            runs = max(len(fed), LARGE_RUNS if is_large else RUNS)
            made_up = sample_inputs(after.inputs, 0)
            for number in range(-1, runs):  # the first run allocates
                sample, same = fed[max(number, 0) % len(fed)]
                one, ms_before = before.run(sample)
                other, ms_after = after.run(same or made_up)
                if number >= 0:
                    times[0].append(ms_before)
                    times[1].append(ms_after)
                if 0 <= number < len(fed):
                    outputs.append(([one[s.name] for s in before.outputs], [other[s.name] for s in after.outputs]))
            medians = [statistics.median(of) for of in times]
            outside: dict[str, int] = {}
            if medians[1] > SLOWER * medians[0]:
                ours, theirs = after.ops_outside_delegate(), before.ops_outside_delegate()
                outside = {kind: count - theirs.get(kind, 0) for kind, count in ours.items() if count > theirs.get(kind, 0)}
            comparable = is_alike and [s.dtype for s in before.outputs] == [s.dtype for s in after.outputs]
            answers = [
                Answers(spec.name, measure_damage([o[place] for o, _ in outputs], [p[place] for _, p in outputs]))  # type: ignore[misc]
                for place, spec in enumerate(before.outputs)
                if comparable and spec.dtype.startswith("float")
            ]
            return Measured(medians[0], medians[1], runs, threads, len(fed), not samples, answers, outside)
    except ChildError as error:
        if "custom op" in str(error):
            return f"not run: {str(error).rstrip('.')}, which only some runtimes have"
        raise


def _renamed(sample: Sample, before: list[TensorSpec], after: list[TensorSpec]) -> Sample:
    """Return a sample under the other model's input names; the order is the same."""
    assert len(before) == len(after), (describe(before), describe(after))
    return {to.name: sample[of.name] for of, to in zip(before, after, strict=True)}
