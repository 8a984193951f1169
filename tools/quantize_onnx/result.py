"""What quantizing an ONNX model found: the object behind the tool's tables, its JSON and its provenance."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.console import RenderableType
from rich.table import Column, Table

from shared.command.resources import size_text
from shared.formats.onnx_graph import SLOW_DYNAMIC, SLOW_HALF
from shared.metrics.fidelity import Fidelity
from shared.metrics.gates import GateKept, gate_table
from shared.quantize.coverage import OpLeft, OpTypeCoverage, coverage_table, left_tables, size_sentence

ORIGINAL, FLOAT = "original", "float32"  # labels of the model as it came, and repaired
SLOWER = 1.05  # times the repaired model's latency: from here on it is said, and why
WHY_SLOWER = {
    "dynamic": f"{SLOW_DYNAMIC}; take --mode static with --calibration, or --mode auto, which measures",
    "fp16": SLOW_HALF,
    "static": "integer kernels are slower than float ones on this CPU, or conversions at the ops left in float eat the gain; "
    "try --op-type for fewer or more of them, or --mode auto, which measures",
}


@dataclass(frozen=True)
class Timed:
    """What one model showed beside the others.

    Args:
        label: ORIGINAL, FLOAT, or a mode.
        size_bytes: Size with all its files.
        median_ms: Median latency, in turns with the others.
        fidelity: Its answers against the repaired float32 model's; None for that one.
        is_chosen: Whether it became the product.
        error: Why it does not run.
    """

    label: str
    size_bytes: int
    median_ms: float | None = None
    fidelity: Fidelity | None = None
    is_chosen: bool = False
    error: str | None = None


@dataclass(frozen=True)
class PressedOnnx:
    """What became of an ONNX model.

    Args:
        name: The file's name.
        mode: How it was quantized.
        expansion: The same in full.
        size_before_bytes: Size of the model that was given.
        size_after_bytes: Size of the product.
        repairs: What had to be rewritten first, in words; empty where nothing had.
        op_types: Coverage per op type.
        left: Ops with weights that stayed as they were, largest first.
        coverage: Share of the weight bytes that are quantized; None for a model without weights.
        corrected_biases: Layers whose bias was corrected.
        samples: Samples it was calibrated with.
        measured_on: What its answers were measured on, in words.
        threads: Threads of the runtime.
        runs: Timed runs of each model.
        models: The original, the repaired model, and everything that was tried.
        searched: Candidates that a search ran; 0 without.
        kept: Nodes that the search left in float.
        gates: Limits, and whether they were kept.
        peak_rss_bytes: Peak memory of all processes.
    """

    name: str
    mode: str
    expansion: str
    size_before_bytes: int
    size_after_bytes: int
    repairs: str = ""
    op_types: list[OpTypeCoverage] = field(default_factory=list)
    left: list[OpLeft] = field(default_factory=list)
    coverage: float | None = None
    corrected_biases: int = 0
    samples: int = 0
    measured_on: str = ""
    threads: int = 0
    runs: int = 0
    models: list[Timed] = field(default_factory=list)
    searched: int = 0
    kept: list[str] = field(default_factory=list)
    gates: list[GateKept] = field(default_factory=list)
    peak_rss_bytes: int = 0

    @property
    def ok(self) -> bool:
        """Whether every limit was kept."""
        return all(gate.ok for gate in self.gates)

    @property
    def product(self) -> Timed | None:
        """What the product showed."""
        return next((model for model in self.models if model.is_chosen), None)

    @property
    def speedup(self) -> float | None:
        """The repaired float32 model's latency over the product's; None where one was not measured."""
        before = self._latency(FLOAT)
        after = self.product.median_ms if self.product else None
        return before / after if before and after else None

    def _latency(self, label: str) -> float | None:
        return next((model.median_ms for model in self.models if model.label == label), None)

    def verdict(self) -> str:
        """Say how fast the product is against the repaired float32 model; where it is slower, why, and what to do."""
        speedup = self.speedup
        if speedup is None:
            return "NOT MEASURED beside float32"
        before, after = self._latency(FLOAT), self.product.median_ms if self.product else None
        text = f"latency {before:.2f} -> {after:.2f} ms, {speedup:.2f} times as fast as float32"
        return f"SLOWER: {text}: {WHY_SLOWER[self.mode]}" if speedup * SLOWER < 1 else text

    def tables(self) -> Iterator[RenderableType]:
        """Yield the tables and sentences for a terminal."""
        yield coverage_table(f"{self.name}: {self.mode}: {self.expansion}", self.op_types)
        yield from left_tables(self.op_types, self.left)
        models = Table("model", "size", "latency", Column("answers against float32", overflow="fold"), "")
        for model in self.models:
            latency = "-" if model.median_ms is None else f"{model.median_ms:.2f} ms"
            answers = model.error or ("reference" if model.fidelity is None else str(model.fidelity))
            size = size_text(model.size_bytes) if model.size_bytes else "-"
            models.add_row(model.label, size, latency, answers, "product" if model.is_chosen else "")
        yield models
        yield from self.sentences()
        if self.gates:
            yield gate_table(self.gates)

    def sentences(self) -> Iterator[str]:
        """Yield in sentences what a table would not hold."""
        yield size_sentence(self.name, self.size_before_bytes, self.size_after_bytes, self.coverage)
        if self.repairs:
            original, repaired = self._latency(ORIGINAL), self._latency(FLOAT)
            is_gain = original and repaired and original > SLOWER * repaired
            gain = f"; that alone makes it {original / repaired:.2f} times as fast" if original and repaired and is_gain else ""
            yield f"repaired first: {self.repairs}{gain}"
        if self.corrected_biases:
            yield f"biases of {self.corrected_biases} layers corrected"
        if self.searched:
            names = ", ".join(self.kept) if self.kept else "none"
            yield f"searched {self.searched} candidates; left in float: {names}"
        yield self.verdict()
        yield f"{self.runs} runs in turns, {self.threads} threads; answers measured on {self.measured_on}"

    def broken(self) -> str:
        """Return the broken limits in one line."""
        return "; ".join(gate.sentence() for gate in self.gates if not gate.ok)
