"""Which layers must stay in float for a quantized model to keep a limit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shared.command.cli import step_progress
from shared.formats.onnx_graph import OnnxOp
from shared.metrics.fidelity import Fidelity

Measure = Callable[[frozenset[str]], Fidelity | None]  # names of nodes kept in float -> what came out; None where it does not run
Keeps = Callable[[Fidelity], bool]


@dataclass(frozen=True)
class Kept:
    """Which layers stay in float.

    Args:
        names: Nodes that stay in float; None where even with all of them in float the limit is broken.
        fidelity: What the model then answers.
        measured: How many candidates were run.
    """

    names: list[str] | None
    fidelity: Fidelity | None
    measured: int


def find_kept(layers: Sequence[OnnxOp], measure: Measure, keeps: Keeps) -> Kept:
    """Return the layers to leave in float: those that do most damage for their weights' bytes, no more than it takes.

    Each layer is quantized alone first. In the order of its squared error per byte, layers go back to float until the limit is
    kept, found by halving; then each of them, largest first, is quantized again where the limit allows it.

    Args:
        layers: Layers with weights.
        measure: Quantizes all layers but the named ones, and runs the model.
        keeps: Whether the limit is kept.
    """
    count = 0

    def run(kept: frozenset[str]) -> Fidelity | None:
        nonlocal count
        count += 1
        return measure(kept)

    everything = frozenset(op.name for op in layers)
    whole = run(frozenset())
    if whole is not None and keeps(whole):
        return Kept([], whole, count)
    damage: dict[str, float] = {}
    with step_progress("quantize each layer alone", len(layers)) as advance:
        for op in layers:
            alone = run(everything - {op.name})
            damage[op.name] = float("inf") if alone is None else alone.relative_error**2 / max(op.weight_bytes, 1)
            advance(op.name)
    order = sorted(everything, key=lambda name: (-damage[name], name))
    found: dict[int, Fidelity] = {}
    low, high = 0, len(order)  # `high` keeps the limit, as far as anything does
    while high - low > 1:
        middle = (low + high) // 2
        tried = run(frozenset(order[:middle]))
        if tried is not None and keeps(tried):
            high, found[middle] = middle, tried
        else:
            low = middle
    if high == len(order):
        return Kept(None, None, count)
    kept, best = set(order[:high]), found[high]
    bytes_of = {op.name: op.weight_bytes for op in layers}
    for name in sorted(kept, key=lambda name: (-bytes_of[name], name)):
        tried = run(frozenset(kept - {name}))
        if tried is not None and keeps(tried):
            kept.discard(name)
            best = tried
    return Kept(sorted(kept), best, count)
