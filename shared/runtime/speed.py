"""Whether a model is slower than its reference, and why: the one sentence about speed of all tools."""

from collections.abc import Mapping

from shared.runtime.benchmark import SLOWER, Measurement
from shared.runtime.model import DetectorCheckpoint, Source

NO_FASTER_KERNELS = "this CPU has no faster kernels for what it computes with; measure on the target device"
FLOAT_KERNELS = "int8-weight-only and fp16 keep float kernels; --rule OP_TYPE=RECIPE changes one op type"


def speedup(reference: Measurement, candidate: Measurement) -> float:
    """Return the reference's median latency over the candidate's."""
    return reference.median_ms / candidate.median_ms


def is_slower(reference: Measurement, candidate: Measurement) -> bool:
    """Return whether a candidate is clearly slower than its reference."""
    return candidate.median_ms > SLOWER * reference.median_ms


def describe_speed(reference: Measurement, candidate: Measurement, source: Source) -> str:
    """Say how fast a candidate is against its reference; where it is not faster, why.

    Args:
        reference: Measurement of the reference.
        candidate: Measurement of the candidate.
        source: The candidate.
    """
    times = speedup(reference, candidate)
    latency = f"latency {reference.median_ms:.2f} -> {candidate.median_ms:.2f} ms"
    if times >= SLOWER:
        return f"{latency}, {times:.2f} times as fast"
    reason = _why_slow(reference.plain_ops, candidate.plain_ops, source)
    if is_slower(reference, candidate):
        return f"SLOWER: {latency}, {times:.2f} times as fast: {reason}"
    return f"{latency}, as fast as its reference: {reason}"


def _why_slow(before: Mapping[str, int], after: Mapping[str, int], source: Source) -> str:
    plain = {kind: count - before.get(kind, 0) for kind, count in after.items() if count > before.get(kind, 0)}
    if plain:
        ops = ", ".join(f"{count} {kind}" for kind, count in plain.items())
        return f"XNNPACK leaves {ops} to plain kernels; {FLOAT_KERNELS}"
    return ("" if isinstance(source, DetectorCheckpoint) else source.why_slow()) or NO_FASTER_KERNELS
