"""The product of a quantizer and the files written next to it: recipe, calibration statistics, sensitivity, an HTML page."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Group as Lines
from rich.console import RenderableType

from shared.command.cli import to_json
from shared.command.errors import ToolError
from shared.command.resources import ResourceEstimate, size_text
from shared.files import artifacts
from shared.files.atomic import write_whole
from shared.files.plan import Plan, Product, is_same, require_report_free
from shared.files.provenance import read_provenance, record
from shared.html.page import STYLE, Bar, write_template
from shared.metrics.gates import check_gate
from shared.quantize.coverage import number_text, short_name
from shared.quantize.request import Request, path_next_to
from shared.quantize.result import ModelResult, QuantizationResult, candidate_cells, sentences, size_change
from shared.quantize.sensitivity import LayerSensitivity, layer_cells, node_data

TEMPLATE = Path(__file__).with_name("page.html.jinja")
LAYERS_DRAWN = 40
STATISTICS = "calibration.json"


@dataclass(frozen=True)
class Quantized:
    """Result of a quantizer; without a product where a gate was broken."""

    source: Path
    product: Product | None
    result: QuantizationResult
    message: str
    page: Product | None = None

    @property
    def ok(self) -> bool:
        """Whether every gate was kept."""
        return self.result.ok

    def __rich__(self) -> RenderableType:
        return Lines(*self.result.tables(), self.message)


@dataclass(frozen=True)
class Writing:
    """What the user says about the files to write; fields are named as the options."""

    output: Path | None = None
    html: Path | None = None
    reproducible: bool = False
    dry_run: bool = False
    overwrite: bool = False
    refresh: bool = False


@dataclass(frozen=True)
class Order:
    """What a quantizer is about to write.

    Args:
        tool: Name of the tool.
        source: The model or bundle.
        output: The product.
        requests: Name of each model -> what is asked for it.
        arguments: What else decides the product, JSON values only.
        read: Files that are read.
        packages: Distributions whose version matters.
        gates: Gate -> limit.
        needs: Tells what making the product takes.
        make: Writes the product to a draft, with a folder for intermediate files.
        reopen: Reads a draft as its consumer will, and returns the files it refers to.
        settle: Gives the files that a draft refers to their final names, once every gate is kept.
        note: A warning after the message.
    """

    tool: str
    source: Path
    output: Path
    requests: Mapping[str, Request]
    arguments: Mapping[str, object]
    read: Sequence[Path]
    packages: Sequence[str]
    gates: Mapping[str, float]
    needs: Callable[[], ResourceEstimate]
    make: Callable[[Path, Path], QuantizationResult]
    reopen: Callable[[Path], Sequence[Path]]
    settle: Callable[[Path], None] = field(default=lambda _: None)
    note: str = ""

    @property
    def names(self) -> list[str]:
        """Names of the models."""
        return list(self.requests)


@dataclass(frozen=True)
class QuantizationPage:
    """How much a page shows."""

    models: int
    layers: int


class _GateBrokenError(Exception):
    """A product broke a gate; the result comes along."""

    def __init__(self, result: QuantizationResult) -> None:
        self.result = result


def write_quantized(order: Order, writing: Writing, folder: Path) -> Quantized:
    """Make the product, or find it up to date, with the files that belong to it.

    Args:
        order: What to write.
        writing: How to treat files that are there.
        folder: A folder for intermediate files.

    Raises:
        ToolError: A file may not be written, or what `order.make` raises.
    """
    output = order.output
    beside = list(_planned_files(order))
    _require_free(output, beside, order.read, overwrite=writing.overwrite)
    if writing.html is not None:
        require_report_free(writing.html, [output, *beside, *order.read], overwrite=writing.overwrite)

    def make(draft: Path) -> QuantizationResult:
        result = _gated(order.make(draft, folder), order)
        if not result.ok:
            raise _GateBrokenError(result)
        order.settle(draft)
        return result

    plan = Plan(
        output,
        order.tool,
        {
            "models": {name: request.as_arguments() for name, request in order.requests.items()},
            "gates": dict(order.gates),
            **order.arguments,
        },
        order.read,
        order.packages,
        overwrite=writing.overwrite,
        refresh=writing.refresh,
        reproducible=writing.reproducible,
        dry_run=writing.dry_run,
        needs=order.needs,
        reopen=order.reopen,
        is_whole=lambda result: _has_statistics(order, result),
    )
    try:
        product, result = artifacts.build(plan, QuantizationResult, make)
    except _GateBrokenError as error:
        return Quantized(order.source, None, error.result, f"FAILED: {error.result.verdict()}; nothing was written")
    for path, content in _further_files(order, result, folder).items():
        write_whole(path, content)
    message = _message(order, result, product)
    page = None if writing.html is None else _write_page(order.tool, writing, order.source, result, message)
    return Quantized(order.source, product, result, f"{message}{f'; see {page.path}' if page else ''}", page)


def model_folder(folder: Path, name: str, names: Sequence[str]) -> Path:
    """Return the folder for the intermediate files of one model."""
    return folder / f"model_{list(names).index(name)}"


def _gated(result: QuantizationResult, order: Order) -> QuantizationResult:
    """Return the result with all gates and the alarm checked; in a model that the recipe does not change, nothing is covered."""
    limits = order.gates
    several = len(result.models) + len(result.resisting) > 1
    gates = [check_gate("min_coverage", 0.0, limits["min_coverage"], name) for name in result.resisting if "min_coverage" in limits]
    for model in result.models:
        values = model.gate_values(limits)
        label = model.name if several else ""
        gates += [check_gate(name, values.get(name), limit, label) for name, limit in limits.items()]
        if not order.requests[model.name].allows_large_error:
            gates += model.alarms(label)
    return replace(result, gates=gates)


def _planned_files(order: Order) -> Iterator[Path]:
    """Yield the files that may be written next to the product; see `_further_files`."""
    for name, request in order.requests.items():
        if request.settings.is_static():
            yield path_next_to(order.output, name, order.names, STATISTICS)
        if request.sensitivity:
            yield path_next_to(order.output, name, order.names, "node_data.json")
    yield order.output.with_name(f"{order.output.stem}_recipe.json")


def _further_files(order: Order, result: QuantizationResult, folder: Path) -> dict[Path, bytes]:
    """Return path -> content of the files next to the product: recipe, calibration statistics, sensitivity for Model Explorer."""
    output, names = order.output, order.names
    files = {}
    if any((by_model := {model.name: model.rules for model in result.models}).values()):
        recipe: Any = by_model if len(names) > 1 or names[0] not in by_model else by_model[names[0]]
        files[output.with_name(f"{output.stem}_recipe.json")] = (json.dumps(recipe, indent=1) + "\n").encode()
    for model in result.models:
        if model.sensitivity:
            path = path_next_to(output, model.name, names, "node_data.json")
            files[path] = (node_data(model.name, model.sensitivity) + "\n").encode()
        statistics = model_folder(folder, model.name, names) / STATISTICS
        if model.calibration_sha256 and statistics.is_file():
            files[path_next_to(output, model.name, names, STATISTICS)] = statistics.read_bytes()
    return files


def _has_statistics(order: Order, result: QuantizationResult) -> bool:
    """Return whether the calibration statistics are there; a run that was killed after writing the product leaves none."""
    expected = {
        path_next_to(order.output, model.name, order.names, STATISTICS): model.calibration_sha256 for model in result.models
    }
    return all(path.is_file() and record(path).sha256 == sha256 for path, sha256 in expected.items() if sha256)


def _message(order: Order, result: QuantizationResult, product: Product) -> str:
    head = "up to date: " if product.up_to_date else ""
    whole = [model.size_before_bytes for model in result.models if model.name == order.source.name]  # else one model of a bundle
    before = whole[0] if whole else order.source.stat().st_size
    slow = [model.name for model in result.models if model.is_slower]
    warning = f"; SLOWER than before: {', '.join(slow)}" if slow else ""
    note = f"\n{order.note}" if order.note else ""
    return f"{head}{product.path}: {size_change(before, product.size_bytes)}; {product.seconds:.1f} s{warning}{note}"


def _require_free(output: Path, beside: Sequence[Path], read: Sequence[Path], *, overwrite: bool) -> None:
    """Raise ToolError where a file next to the product would replace one that is not ours, or one that is read."""
    taken = next((path for path in beside if path.exists()), None)
    if any(is_same(path, other) for path in beside for other in read):
        raise ToolError("a file next to the output would replace one that is read", where=output, remedy="use another name with -o")
    if taken is not None and not overwrite and read_provenance(output) is None:
        remedy = "use --overwrite, or another name with -o"
        raise ToolError("a file next to the output would be replaced", where=taken, remedy=remedy)


def _write_page(tool: str, writing: Writing, source: Path, result: QuantizationResult, message: str) -> Product:
    """Write the result as one HTML page; everything it shows is inside it."""
    assert writing.html is not None
    arguments = {"result": hashlib.sha256(f"{source.name} {to_json(result)}".encode()).hexdigest()}
    overwrite, refresh = writing.overwrite, writing.refresh
    read, packages = [TEMPLATE, STYLE], ("jinja2",)
    plan = Plan(writing.html, tool, arguments, read, packages, overwrite=overwrite, refresh=refresh, is_report=True)
    product, _ = artifacts.build(plan, QuantizationPage, lambda draft: write_page(draft, source, result, message))
    return product


def write_page(path: Path, source: Path, result: QuantizationResult, message: str) -> QuantizationPage:
    """Write the page to a file."""
    models = [
        {
            "name": model.name,
            "lines": list(sentences(model)),
            "candidates": [candidate_cells(one, number) for number, one in enumerate(model.candidates)],
            "weights": list(_weight_bars(model)),
            "sensitivity": list(_sensitivity_bars(model.sensitivity)),
            "sensitivity_note": _sensitivity_note(model.sensitivity),
            "layers": [list(layer_cells(layer)) for layer in model.sensitivity],
            "rules": model.matches,
            "skipped": [(op.name, op.op_type, size_text(op.weight_bytes), op.reason) for op in model.skipped],
        }
        for model in result.models
    ]
    write_template(path, TEMPLATE, source=source.name, result=result, message=message, models=models, short=short_name)
    return QuantizationPage(len(result.models), sum(len(model.sensitivity) for model in result.models))


def _weight_bars(model: ModelResult) -> Iterator[Bar]:
    largest = max((row.weight_bytes for row in model.op_types), default=1) or 1
    for row in model.op_types:
        text = f"{size_text(row.weight_bytes)} -> {size_text(row.bytes_after)}"
        note = f"{row.quantized} of {row.ops} quantized" + (f"; {row.reason}" if row.reason else "")
        yield Bar(1 if row.quantized == row.ops else 2, row.op_type, text, 100 * row.weight_bytes / largest, note)


def _sensitivity_bars(layers: list[LayerSensitivity]) -> Iterator[Bar]:
    worst = max((layer.at_output.relative_error or 0.0 for layer in layers), default=0.0) or 1.0
    for layer in layers[:LAYERS_DRAWN]:
        error = layer.at_output.relative_error
        percent = 100.0 if error is None else 100 * error / worst
        yield Bar(1, short_name(layer.name), number_text(error, ".3%"), percent, title=layer.name)


def _sensitivity_note(layers: list[LayerSensitivity]) -> str:
    more = f"the worst {LAYERS_DRAWN} of {len(layers)} layers; " if len(layers) > LAYERS_DRAWN else ""
    return f"{more}bars relative to the worst layer"
