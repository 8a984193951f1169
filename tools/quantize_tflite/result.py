"""What quantizing a file found: the object behind the tool's tables, its JSON and its HTML page."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.console import RenderableType
from rich.table import Column, Table

from shared.command.resources import size_text
from shared.metrics.gates import GateKept, gate_table
from shared.quantize.coverage import (
    SHOWN,
    OpLeft,
    OpTypeCoverage,
    coverage_table,
    left_tables,
    number_text,
    short_name,
    size_sentence,
)
from tools.quantize_tflite.coverage import RuleMatches
from tools.quantize_tflite.pair import Measured
from tools.quantize_tflite.recipes import Rules
from tools.quantize_tflite.sensitivity import LayerDamage


@dataclass(frozen=True)
class Searched:
    """How a search went; see `tools.quantize_tflite.search.Found`."""

    target: str
    drop: float
    layers: int
    measured: int
    resumed: int
    left_out: list[str]
    precisions: dict[str, int]


@dataclass(frozen=True)
class PressedModel:
    """What became of one model.

    Args:
        name: Its name in its bundle, or its file name.
        recipe: Recipe as named by the user.
        expansion: Its full name.
        size_before_bytes: Size of the file that was given.
        size_after_bytes: Size of the product.
        repairs: What had to be rewritten first, in words; empty where nothing had.
        rules: The recipe's rules, as AI Edge Quantizer takes them.
        matches: How many ops each rule matches and decides.
        op_types: Coverage per op type.
        left: Ops with weights that stayed as they were, largest first.
        unmatched: Selectors that match no op here, though maybe in another model of the bundle.
        coverage: Share of the weight bytes that are quantized; None for a model without weights.
        corrected_biases: Layers whose bias was corrected.
        saved_name_bytes: Bytes saved by short names.
        samples: Calibration samples there are, 0 without; a search and bias correction take the first few, spread evenly.
        measured: Speed and answers beside the original; a sentence where they could not be measured.
        searched: How the search went.
        damage: Layers by the damage they do, worst first.
        statistics_sha256: Of the calibration statistics that fall beside the product; empty where none do.
        peak_rss_bytes: Peak memory of the quantizer.
    """

    name: str
    recipe: str
    expansion: str
    size_before_bytes: int
    size_after_bytes: int
    repairs: str = ""
    rules: Rules = field(default_factory=list)
    matches: list[RuleMatches] = field(default_factory=list)
    op_types: list[OpTypeCoverage] = field(default_factory=list)
    left: list[OpLeft] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    coverage: float | None = None
    corrected_biases: int = 0
    saved_name_bytes: int = 0
    samples: int = 0
    measured: Measured | str | None = None
    searched: Searched | None = None
    damage: list[LayerDamage] = field(default_factory=list)
    statistics_sha256: str = ""
    peak_rss_bytes: int = 0


@dataclass(frozen=True)
class Pressed:
    """What became of a model, or of all models in a bundle.

    Args:
        models: One entry for each model that was quantized.
        unchanged: Inner models and other entries of a bundle that were carried over byte for byte.
        resisting: Inner models among them in which the recipe changes nothing.
        gates: Limits, and whether they were kept.
    """

    models: list[PressedModel]
    unchanged: list[str] = field(default_factory=list)
    resisting: list[str] = field(default_factory=list)
    gates: list[GateKept] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every limit was kept."""
        return all(gate.ok for gate in self.gates)

    @property
    def peak_rss_bytes(self) -> int:
        """Peak memory of the quantizer's processes."""
        return max((model.peak_rss_bytes for model in self.models), default=0)

    def tables(self) -> Iterator[RenderableType]:
        """Yield the tables and sentences for a terminal."""
        for model in self.models:
            yield from _model_tables(model)
        if self.unchanged:
            yield f"carried over byte for byte: {', '.join(self.unchanged)}"
        if self.gates:
            yield gate_table(self.gates)

    def broken(self) -> str:
        """Return the broken limits in one line."""
        return "; ".join(gate.sentence() for gate in self.gates if not gate.ok)


def _model_tables(model: PressedModel) -> Iterator[RenderableType]:
    title = (
        f"{model.name}: {model.recipe} = {model.expansion}" if model.recipe != model.expansion else f"{model.name}: {model.recipe}"
    )
    yield coverage_table(title, model.op_types)
    if len(model.matches) > 1:
        rules = Table(Column("rule", overflow="fold"), "op type", "precision", "ops matched", "decided")
        for rule in model.matches[:SHOWN]:
            rules.add_row(short_name(rule.regex), rule.operation, rule.precision, str(rule.matched), str(rule.decided))
        yield rules
    yield from left_tables(model.op_types, model.left)
    if model.damage:
        yield _damage_table(model)
    yield from sentences(model)


def _damage_table(model: PressedModel) -> Table:
    table = Table(
        Column("layer, worst first", overflow="fold"),
        "op type",
        "weights",
        "error at the layer",
        "SNR",
        "error at the output",
        "cosine",
        title="what each layer does alone",
    )
    for layer in model.damage[:SHOWN]:
        table.add_row(*layer_cells(layer))
    return table


def layer_cells(layer: LayerDamage) -> Iterator[str]:
    """Yield the cells of a layer's row."""
    yield short_name(layer.name)
    yield layer.op_type
    yield size_text(layer.weight_bytes)
    yield number_text(layer.layer.relative_error, ".2%")
    yield number_text(layer.layer.snr_db, ".1f", " dB")
    yield number_text(layer.output.relative_error, ".3%")
    yield number_text(layer.output.cosine, ".6f")


def sentences(model: PressedModel) -> Iterator[str]:
    """Yield in sentences what a table would not hold."""
    yield size_sentence(model.name, model.size_before_bytes, model.size_after_bytes, model.coverage)
    if model.repairs:
        yield f"repaired first: {model.repairs}"
    if model.corrected_biases:
        yield f"biases of {model.corrected_biases} layers corrected"
    if model.saved_name_bytes:
        yield f"names of inner tensors shortened by {size_text(model.saved_name_bytes)}"
    if model.searched is not None:
        found = model.searched
        used = ", ".join(f"{count} {recipe}" for recipe, count in found.precisions.items())
        resumed = f", {found.resumed} known from an earlier run" if found.resumed else ""
        yield f"searched {found.layers} layers, {found.measured} candidates measured{resumed}: {used}"
        yield f"largest error takes {found.drop:.1%} of its limit"
        yield from (f"not searched: {reason}" for reason in found.left_out)
    if isinstance(model.measured, Measured):
        yield model.measured.sentence()
        yield answers_text(model.measured)
    elif model.measured is not None:
        yield f"NOT MEASURED: {model.measured}"


def answers_text(measured: Measured) -> str:
    """Say how far the answers moved."""
    if not measured.answers:
        return "answers not compared: inputs or outputs differ in type from the original's"
    what = "seeded samples" if measured.are_seeded else "samples"
    moved = ", ".join(
        f"{answer.output} {number_text(answer.damage.relative_error, '.3%')} (cosine {number_text(answer.damage.cosine, '.6f')})"
        for answer in measured.answers
    )
    return f"relative error of the worst of {measured.samples} {what}: {moved}"
