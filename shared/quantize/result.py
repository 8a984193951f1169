"""Result of quantizing a file: the object that the tools' tables, their JSON and their HTML page are made from."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from rich.console import RenderableType
from rich.table import Column, Table

from shared.command.resources import size_text
from shared.metrics.alarm import alarms, describe_alarms
from shared.metrics.gates import GateResult, broken, gate_table
from shared.metrics.output_error import OutputError
from shared.quantize.coverage import (
    SHOWN,
    OpTypeCoverage,
    RuleMatches,
    SkippedLayer,
    coverage_table,
    short_name,
    skipped_tables,
)
from shared.quantize.sensitivity import LayerSensitivity, sensitivity_table
from shared.runtime.benchmark import SLOWER, Measurement

SHOWN_WORST = 3  # layers to leave in float first, where a product is of no use
ORIGINAL, REFERENCE = "original", "float32"  # labels of the model as it came, and of the repaired one


@dataclass(frozen=True)
class SearchSummary:
    """How a search went; see `shared.quantize.search.SearchResult`.

    Args:
        objective: What it made small.
        share: The largest share of its limit that an output's error takes.
        layers: Layers searched.
        measured: Candidates measured in this run.
        resumed: Candidates known from an earlier run.
        left_out: Precisions left out, each with the reason.
        precisions: Precision -> layers that got it.
    """

    objective: str
    share: float
    layers: int
    measured: int
    resumed: int
    left_out: list[str]
    precisions: dict[str, int]


@dataclass(frozen=True)
class CandidateResult:
    """One file that was run: the original, the float32 reference, or what a recipe made of it.

    Args:
        label: ORIGINAL, REFERENCE, or a recipe.
        measurement: Size, times and memory; None where it did not run.
        errors: Error of each output against the reference's; empty for the reference, and where types of inputs or outputs differ.
        speed: The sentence about its speed against the reference.
        is_product: Whether it became the product.
        problem: Why it did not run or cannot be compared; empty where neither is so.
    """

    label: str
    measurement: Measurement | None
    errors: list[OutputError] = field(default_factory=list)
    speed: str = ""
    is_product: bool = False
    problem: str = ""


@dataclass(frozen=True)
class ModelResult:
    """What became of one model.

    Args:
        name: Its name in its bundle, or its file name.
        recipe: Recipe of the product as named by the user.
        expansion: Its full name, or what it does in words.
        size_before_bytes: Size of the model that was given, all its files.
        size_after_bytes: Size of the product.
        repairs: What had to be rewritten first, in words; empty where nothing had.
        rules: The recipe's rules, where the format knows rules.
        matches: How many ops each rule matches and decides.
        op_types: Coverage per op type.
        skipped: Layers with weights that stayed as they were, largest first.
        unmatched: Selectors that match no op here, though maybe in another model of the bundle.
        coverage: Share of the weight bytes that are quantized; None for a model without weights.
        corrected_biases: Layers whose bias was corrected.
        saved_name_bytes: Bytes saved by short names.
        samples: Samples there are to calibrate with; 0 without.
        measured_on: What answers were measured on, in words.
        is_made_up: Whether these are made-up inputs.
        threads: Threads of the runtime.
        interleaved: Whether the models ran in turns; else one after the other.
        candidates: The reference, the original where it was repaired, and every candidate.
        search: How the search went; None without one.
        float_layers: Layers that the search left in float.
        sensitivity: What each layer does alone, worst first.
        calibration_sha256: Of the calibration statistics written with the product; empty without.
        unmeasured: Why the product could not be run; empty where it was.
        peak_rss_bytes: Peak memory of all processes.
    """

    name: str
    recipe: str
    expansion: str
    size_before_bytes: int
    size_after_bytes: int
    repairs: str = ""
    rules: list[dict[str, object]] = field(default_factory=list)
    matches: list[RuleMatches] = field(default_factory=list)
    op_types: list[OpTypeCoverage] = field(default_factory=list)
    skipped: list[SkippedLayer] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    coverage: float | None = None
    corrected_biases: int = 0
    saved_name_bytes: int = 0
    samples: int = 0
    measured_on: str = ""
    is_made_up: bool = False
    threads: int = 0
    interleaved: bool = True
    candidates: list[CandidateResult] = field(default_factory=list)
    search: SearchSummary | None = None
    float_layers: list[str] = field(default_factory=list)
    sensitivity: list[LayerSensitivity] = field(default_factory=list)
    calibration_sha256: str = ""
    unmeasured: str = ""
    peak_rss_bytes: int = 0

    @property
    def product(self) -> CandidateResult | None:
        """What the product measured; None where it could not be run."""
        return next((candidate for candidate in self.candidates if candidate.is_product), None)

    @property
    def speedup(self) -> float | None:
        """The reference's median latency over the product's; None where one was not measured."""
        reference = self.candidates[0].measurement if self.candidates else None
        product = self.product.measurement if self.product else None
        return reference.median_ms / product.median_ms if reference and product else None

    @property
    def is_slower(self) -> bool:
        """Whether the product is clearly slower than the reference."""
        return self.product is not None and self.product.speed.startswith("SLOWER")

    def alarms(self, label: str = "") -> list[GateResult]:
        """Return a broken gate for each output that is far from the original's."""
        return alarms(self.product.errors if self.product else [], label, is_made_up=self.is_made_up)

    def gate_values(self, gates: Collection[str] = ()) -> dict[str, float | None]:
        """Return the values that gates are about.

        Args:
            gates: Names of the gates: `max_error` is about the outputs that have no gate `max_error:OUTPUT` of their own.
        """
        errors = self.product.errors if self.product else []
        measurement = self.product.measurement if self.product else None
        cosines = [error.worst_cosine for error in errors if error.worst_cosine is not None]
        decibels = [error.psnr_db for error in errors if error.psnr_db is not None]
        relative = {f"max_error:{error.output}": error.relative_error for error in errors}
        others = [value for name, value in relative.items() if name not in gates and value is not None]
        is_sound = bool(errors) and not any(error.problem for error in errors)
        return {
            "min_coverage": self.coverage,
            "min_speedup": self.speedup,
            "min_cosine": min(cosines, default=None) if is_sound else None,
            "min_psnr": min(decibels, default=None) if is_sound else None,
            "max_error": max(others, default=0.0) if is_sound else None,
            "max_size_mb": self.size_after_bytes / 2**20,
            "max_latency_ms": measurement.median_ms if measurement else None,
            **(relative if is_sound else {}),
        }


GATES = ("min_coverage", "min_speedup", "min_cosine", "min_psnr", "max_error", "max_size_mb", "max_latency_ms")


@dataclass(frozen=True)
class QuantizationResult:
    """What became of a model, or of all models in a bundle.

    Args:
        models: One entry for each model that was quantized.
        unchanged: Inner models and other entries of a bundle that were carried over byte for byte.
        resisting: Inner models among them in which the recipe changes nothing.
        gates: Gates, and whether they were kept.
    """

    models: list[ModelResult]
    unchanged: list[str] = field(default_factory=list)
    resisting: list[str] = field(default_factory=list)
    gates: list[GateResult] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every gate was kept."""
        return all(gate.ok for gate in self.gates)

    @property
    def peak_rss_bytes(self) -> int:
        """Peak memory of all processes."""
        return max((model.peak_rss_bytes for model in self.models), default=0)

    def tables(self) -> Iterator[RenderableType]:
        """Yield the tables and sentences for a terminal."""
        for model in self.models:
            yield from _model_tables(model)
        if self.unchanged:
            yield f"carried over byte for byte: {', '.join(self.unchanged)}"
        if self.gates:
            yield gate_table(self.gates)

    def verdict(self) -> str:
        """Return the broken gates in one line."""
        return broken(self.gates)


def _model_tables(model: ModelResult) -> Iterator[RenderableType]:
    full = f" = {model.expansion}" if model.recipe != model.expansion else ""
    yield coverage_table(f"{model.name}: {model.recipe}{full}", model.op_types)
    if len(model.matches) > 1:
        rules = Table(Column("rule", overflow="fold"), "op type", "precision", "ops matched", "decided")
        for rule in model.matches[:SHOWN]:
            rules.add_row(short_name(rule.regex), rule.operation, rule.precision, str(rule.matched), str(rule.decided))
        yield rules
    yield from skipped_tables(model.op_types, model.skipped)
    if model.sensitivity:
        yield sensitivity_table(model.sensitivity)
    if model.candidates:
        yield _candidate_table(model.candidates)
    yield from sentences(model)


def _candidate_table(candidates: Sequence[CandidateResult]) -> Table:
    table = Table("model", "size", "latency, median", "p90", Column("error of the outputs", overflow="fold"), "")
    for number, candidate in enumerate(candidates):
        table.add_row(*candidate_cells(candidate, number))
    return table


def candidate_cells(candidate: CandidateResult, number: int) -> list[str]:
    """Return the cells of a candidate's row: label, size, latencies, errors of its outputs, role; number 0 is the reference."""
    measured = candidate.measurement
    size = size_text(measured.size_bytes) if measured else "-"
    times = [f"{ms:.2f} ms" for ms in (measured.median_ms, measured.p90_ms)] if measured else ["-", "-"]
    errors = "; ".join(map(str, candidate.errors)) or "not compared: inputs or outputs differ in type from the reference's"
    what = candidate.problem or ("reference" if number == 0 else errors)
    return [candidate.label, size, *times, what, "product" if candidate.is_product else ""]


def sentences(model: ModelResult) -> Iterator[str]:
    """Yield in sentences what a table would not hold."""
    share = "" if model.coverage is None else f"; {model.coverage:.1%} of the weight bytes quantized"
    yield f"{model.name}: {size_change(model.size_before_bytes, model.size_after_bytes)}{share}"
    if model.repairs:
        yield f"repaired first: {model.repairs}{_repair_gain(model)}"
    if model.corrected_biases:
        yield f"biases of {model.corrected_biases} layers corrected"
    if model.saved_name_bytes:
        yield f"names of inner tensors shortened by {size_text(model.saved_name_bytes)}"
    if model.search is not None:
        yield from _search_sentences(model, model.search)
    if model.product is not None:
        yield model.product.speed
        worst = [layer.name for layer in model.sensitivity[:SHOWN_WORST]]
        yield from filter(None, [describe_alarms(model.product.errors, worst, is_made_up=model.is_made_up)])
    if model.unmeasured:
        yield f"NOT MEASURED: {model.unmeasured}"
        return
    runs = max((c.measurement.runs for c in model.candidates if c.measurement), default=0)
    order = "in turns" if model.interleaved else "one model after the other"
    yield f"{runs} runs {order}, {model.threads} threads; answers measured on {model.measured_on}"


def _repair_gain(model: ModelResult) -> str:
    """Say how much faster the repairs alone made the model; empty where they did not."""
    times = {candidate.label: candidate.measurement.median_ms for candidate in model.candidates if candidate.measurement}
    before, after = times.get(ORIGINAL), times.get(REFERENCE)
    return f"; that alone makes it {before / after:.2f} times as fast" if before and after and before > SLOWER * after else ""


def _search_sentences(model: ModelResult, search: SearchSummary) -> Iterator[str]:
    used = ", ".join(f"{count} {precision}" for precision, count in search.precisions.items())
    resumed = f", {search.resumed} known from an earlier run" if search.resumed else ""
    yield f"searched {search.layers} layers, {search.measured} candidates measured{resumed}: {used}"
    yield f"largest error takes {search.share:.1%} of its limit"
    if model.float_layers:
        names = ", ".join(map(short_name, model.float_layers[:SHOWN]))
        yield f"left in float: {names}{', ...' if len(model.float_layers) > SHOWN else ''}"
    yield from (f"not searched: {reason}" for reason in search.left_out)


def size_change(before: int, after: int) -> str:
    """Say how much smaller a model became."""
    change = 1 - after / before
    return f"{size_text(before)} -> {size_text(after)}, {abs(change):.1%} {'smaller' if change >= 0 else 'LARGER'}"
