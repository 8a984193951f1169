"""Quantize a TFLite model or a MediaPipe bundle, and say what became of every layer.

Example:
    python -m tools.quantize_tflite model.tflite -o model_int8.tflite --recipe int8

Source: recipes and their names, https://github.com/google-ai-edge/ai-edge-quantizer (0.10)
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group as Lines
from rich.console import RenderableType

from shared.calibration.dataset import InputRange
from shared.command.cli import DryRun, Overwrite, Refresh, Reproducible, to_json
from shared.command.errors import ToolError
from shared.command.resources import Needs, require_disk, size_text
from shared.files import artifacts
from shared.files.artifacts import Plan, Product
from shared.files.atomic import draft_beside, workspace
from shared.files.file_type import read_head
from shared.files.provenance import provenance_path, read_provenance, record
from shared.formats.bundle import Entry, check_packed, is_bundle, models_of, pack_bundle, unpack_bundle
from shared.formats.tflite import AGAIN, check_is_tflite
from shared.metrics.gates import GateKept
from shared.runtime.executors import dask_cluster, local_processes
from tools.quantize_tflite.options import DEFAULT_RECIPE, Choices, beside
from tools.quantize_tflite.pair import Measured
from tools.quantize_tflite.pipeline import STATISTICS, Quantizer, UnchangedError, needs_of
from tools.quantize_tflite.recipes import ALIASES, read_recipe_file
from tools.quantize_tflite.request import IoDtype, Wish
from tools.quantize_tflite.result import Pressed
from tools.quantize_tflite.search import Target
from tools.quantize_tflite.sensitivity import node_data

COVERAGE = "coverage of weight bytes"
PACKAGES = ("ai-edge-quantizer", "ai-edge-litert", "numpy")
RECIPE_HELP = f"Recipe: {', '.join(ALIASES)}, a name of AI Edge Quantizer, none, or a .json file; default: {DEFAULT_RECIPE}."


@dataclass(frozen=True)
class QuantizedModel:
    """Result of quantize_tflite; without a product where a limit was broken."""

    source: Path
    product: Product | None
    found: Pressed
    message: str
    page: Product | None = None

    @property
    def ok(self) -> bool:
        """Whether every limit was kept."""
        return self.found.ok

    def __rich__(self) -> RenderableType:
        return Lines(*self.found.tables(), self.message)


class _LimitBrokenError(Exception):
    """A product broke a limit; what was found about it comes along."""

    def __init__(self, found: Pressed) -> None:
        super().__init__()
        self.found = found


def _is_bundle(model: Path) -> bool:
    """Return whether a file is a bundle; raise ToolError where it is neither that nor a TFLite model."""
    read_head(model, "model", again=AGAIN)
    if is_bundle(model):
        return True
    check_is_tflite(model)
    return False


def _press(source: Path, wishes: dict[str, Wish], entries: Sequence[Entry] | None, folder: Path, draft: Path) -> Pressed:
    """Write the product to `draft`: the pressed model, or the bundle with its models pressed; each model has its own workspace."""
    inner = [(next(iter(wishes)), source)] if entries is None else [(name, entry.path) for name, entry in models_of(entries)]
    kept = [] if entries is None else [entry.name for entry in entries if entry.entries is None and not entry.is_model]
    pressed, resisting, replaced = [], [], {}
    for name, path in inner:
        wish = wishes[name]
        if wish.in_bundle and not wish.base and not wish.rules and wish.search is None:
            kept.append(name)
            continue
        workspace = _workspace(folder, name, list(wishes))
        shutil.rmtree(workspace, ignore_errors=True)  # of the first time, where it is made twice
        workspace.mkdir()
        target = draft if entries is None else workspace / "product.tflite"
        try:
            pressed.append(Quantizer(name, path, wish, workspace).press(target))
        except UnchangedError as error:
            if not wish.in_bundle:
                raise
            kept.append(f"{name} ({error})")
            resisting.append(name)
        else:
            replaced[path] = target
    if entries is not None:
        idle = set.intersection(*(set(model.unmatched) for model in pressed)) if pressed else set()
        if idle:
            raise ToolError(f"no op of any model matches {', '.join(map(repr, sorted(idle)))}", where=source)
        if not pressed and any(wish.base or wish.rules or wish.search for wish in wishes.values()):
            raise ToolError("the recipe changes no model of the bundle", where=source, got="; ".join(kept))
        pack_bundle(entries, draft, replaced)
    return Pressed(pressed, sorted(kept), resisting)


def _workspace(folder: Path, name: str, names: Sequence[str]) -> Path:
    return folder / f"model_{list(names).index(name)}"


def _needs(models: Sequence[tuple[str, Path]], wishes: dict[str, Wish], size: int) -> Needs:
    """Return what a model or a bundle takes: its models are pressed one after the other, and written together."""
    each = [needs_of(path, wishes[name]) for name, path in models]
    product = size + sum(needs.product_bytes - path.stat().st_size for needs, (_, path) in zip(each, models, strict=True))
    return Needs(
        each[0].purpose,
        product_bytes=product,
        disk_bytes=2 * max(size, product),
        memory_bytes=max(needs.memory_bytes for needs in each),
        workspace_bytes=sum(needs.workspace_bytes for needs in each),
    )


def _gated(found: Pressed, coverage: float | None, speedup: float | None) -> Pressed:
    """Return what was found with the limits checked."""
    gates = [GateKept(name, COVERAGE, 0.0, coverage, coverage <= 0) for name in found.resisting if coverage is not None]
    for model in found.models:
        if coverage is not None:
            share = model.coverage or 0.0
            gates.append(GateKept(model.name, COVERAGE, share, coverage, share >= coverage))
        if speedup is not None:
            measured = model.measured.speedup if isinstance(model.measured, Measured) else None
            gates.append(GateKept(model.name, "speed-up", measured, speedup, measured is not None and measured >= speedup))
    return replace(found, gates=gates)


def _files_beside(output: Path, found: Pressed, names: Sequence[str], folder: Path) -> dict[Path, bytes]:
    """Return path -> content of what falls beside the product: recipe, calibration statistics, damage for Model Explorer."""
    by_model = {model.name: model.rules for model in found.models}
    recipe: Any = by_model if len(names) > 1 or names[0] not in by_model else by_model[names[0]]
    files = {output.with_name(f"{output.stem}_recipe.json"): (json.dumps(recipe, indent=1) + "\n").encode()}
    for model in found.models:
        if model.damage:
            files[beside(output, model.name, names, "node_data.json")] = (node_data(model.name, model.damage) + "\n").encode()
        if (statistics := _workspace(folder, model.name, names) / STATISTICS).is_file():
            files[beside(output, model.name, names, STATISTICS)] = statistics.read_bytes()
    return files


def _has_statistics(output: Path, found: Pressed, names: Sequence[str]) -> bool:
    """Return whether a product's calibration statistics lie beside it; a run killed after writing the product leaves none."""
    expected = {beside(output, model.name, names, STATISTICS): model.statistics_sha256 for model in found.models}
    return all(path.is_file() and record(path).sha256 == sha256 for path, sha256 in expected.items() if sha256)


def _write_page(path: Path, source: Path, found: Pressed, message: str, *, overwrite: bool, refresh: bool) -> Product:
    """Write what was found as one HTML page."""
    from shared.html.page import STYLE
    from tools.quantize_tflite.page import TEMPLATE, QuantizationPage, write_page

    arguments = {"found": hashlib.sha256(f"{source.name} {to_json(found)}".encode()).hexdigest()}
    plan = Plan(path, "quantize_tflite", arguments, [TEMPLATE, STYLE], ("jinja2",), overwrite=overwrite, refresh=refresh)
    product, _ = artifacts.build(plan, QuantizationPage, lambda draft: write_page(draft, source, found, message))
    return product


def _message(result: Pressed, product: Product, size_before: int) -> str:
    head = "up to date: " if product.up_to_date else ""
    reduction = 1 - product.size_bytes / size_before
    change = f"{abs(reduction):.1%} {'smaller' if reduction >= 0 else 'LARGER'}"
    slow = [model.name for model in result.models if isinstance(model.measured, Measured) and model.measured.is_slower]
    warning = f"; SLOWER than before: {', '.join(slow)}" if slow else ""
    size = f"{size_text(size_before)} -> {size_text(product.size_bytes)}, {change}"
    return f"{head}{product.path}: {size}; {product.seconds:.1f} s{warning}"


def quantize_tflite(
    model: Annotated[Path, typer.Argument(help="A .tflite model or a MediaPipe .task bundle.")],
    *,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; default: <model>_<recipe>.")] = None,
    recipe: Annotated[str | None, typer.Option(help=RECIPE_HELP)] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(help="SELECTOR=RECIPE: an op type, or a regex on op names; in bundles MODEL=RECIPE, MODEL:SELECTOR=RECIPE."),
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Op type or regex on op names that stays as it is.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Op type or regex on op names; the recipe holds there alone.")] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Real inputs: folder of images, manifest or .npz; for a bundle a folder with <inner model>.npz; or statistics."
        ),
    ] = None,
    input_range: Annotated[
        InputRange | None, typer.Option(help="Range of the model's image input; default: as its metadata says.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Inputs of --calibration to take; default: all to calibrate, 16 to compare.")
    ] = None,
    io_dtype: Annotated[IoDtype, typer.Option(help="Type of the inputs and outputs of static recipes.")] = "float32",
    correct_bias: Annotated[
        bool, typer.Option(help="With --calibration, take back what quantized weights shift on average; not for static recipes.")
    ] = True,
    require_coverage: Annotated[float | None, typer.Option(min=0, max=1, help="Gate: share of weight bytes quantized.")] = None,
    min_speedup: Annotated[float | None, typer.Option(min=0, help="Gate: latency before over after, of each model.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Measure what each layer alone does to the answers.")] = False,
    max_drop: Annotated[
        list[str] | None,
        typer.Option(
            help="Search mixed precision within this relative error; OUTPUT=X for one output; in bundles MODEL=X, MODEL:OUTPUT=X."
        ),
    ] = None,
    target: Annotated[Target, typer.Option(help="What the search makes small.")] = "size",
    dask: Annotated[str | None, typer.Option(help="Measure candidates on the Dask cluster at this address.")] = None,
    short_names: Annotated[
        bool, typer.Option("--short-names", help="Rename inner tensors t0, t1, ...: names can be a few per cent of a file.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Also write what was found as one HTML page.")] = None,
    reproducible: Reproducible = False,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    refresh: Refresh = False,
) -> QuantizedModel:
    """Quantize a TFLite model or a MediaPipe bundle, and say what became of every layer.

    Float16 and sparse weights are unfolded first, exactly. Inputs and outputs stay float32, metadata is kept. The product is run
    beside the original before it gets its name: latency, and how far the answers moved. The recipe falls beside it.

    Raises:
        ToolError: Damaged or hostile file, unknown or unfit recipe, a rule that matches no op, nothing changed, no place to write.
    """
    bundled = _is_bundle(model)
    choices = Choices(
        recipe,
        rule or [],
        exclude or [],
        only or [],
        max_drop or [],
        target,
        calibration,
        input_range,
        samples,
        io_dtype,
        correct_bias,
        debug,
        short_names,
        bundled,
    )
    label = "search" if max_drop else Path(recipe or DEFAULT_RECIPE).stem
    output = output or model.with_name(f"{model.stem}_{label}{'.task' if bundled else '.tflite'}")
    if dask and not (max_drop or debug):
        raise ToolError("--dask does nothing without --max-drop or --debug", remedy="leave it out, or add one of them")
    executor = partial(dask_cluster, dask) if dask else local_processes

    with workspace() as folder:
        entries = unpack_bundle(model, folder / "bundle") if bundled else None
        names = [model.name] if entries is None else [name for name, _ in models_of(entries)]
        wishes = {name: choices.wish(name, names, output, executor) for name in names}
        _require_sense(choices, wishes, model)
        read = [model, *(file for wish in wishes.values() for file in wish.files())]
        falling = _falling(output, wishes)
        kept = [*read, *choices.recipe_files()]
        _require_free(output, falling, kept, overwrite=overwrite)
        if html is not None:
            _require_page_free(html, [output, *falling, *kept], overwrite=overwrite)
        size = model.stat().st_size

        models = [(model.name, model)] if entries is None else [(name, entry.path) for name, entry in models_of(entries)]

        def reopen(draft: Path) -> None:
            if entries is None:
                check_is_tflite(draft)
            else:
                check_packed(draft, folder / "packed")

        def make(draft: Path) -> Pressed:
            found = _gated(_press(model, wishes, entries, folder, draft), require_coverage, min_speedup)
            if not found.ok:
                raise _LimitBrokenError(found)
            return found

        arguments = {
            "models": {name: wish.as_arguments() for name, wish in wishes.items()},
            "limits": {"coverage": require_coverage, "speedup": min_speedup},
        }
        plan = Plan(
            output,
            "quantize_tflite",
            arguments,
            read,
            PACKAGES,
            overwrite=overwrite,
            refresh=refresh,
            reproducible=reproducible,
            dry_run=dry_run,
            needs=lambda: _needs(models, wishes, size),
            reopen=reopen,
            is_whole=lambda found: _has_statistics(output, found, names),
        )
        try:
            product, found = artifacts.build(plan, Pressed, make)
        except _LimitBrokenError as error:
            return QuantizedModel(model, None, error.found, f"FAILED: {error.found.broken()}; nothing was written")
        for path, content in _files_beside(output, found, names, folder).items():
            _write_beside(path, content)
    message = _message(found, product, size)
    page = None if html is None else _write_page(html, model, found, message, overwrite=overwrite, refresh=refresh)
    return QuantizedModel(model, product, found, f"{message}{f'; see {page.path}' if page else ''}", page)


def _require_sense(choices: Choices, wishes: dict[str, Wish], model: Path) -> None:
    """Raise ToolError for options that contradict each other, or that lead nowhere."""
    if not wishes:
        raise ToolError(
            "the bundle holds no TFLite model", where=model, remedy="quantize_tflite is for bundles with .tflite models"
        )
    if choices.recipe is not None and choices.recipe.endswith(".json") and choices.in_bundle:
        content = read_recipe_file(Path(choices.recipe))
        if isinstance(content, dict) and (strange := sorted(content.keys() - wishes.keys())):
            expected = "some of " + ", ".join(wishes)
            raise ToolError(
                "the recipe is for models that the bundle lacks", where=choices.recipe, got=", ".join(strange), expected=expected
            )
    if choices.recipe is not None and all(wish.search for wish in wishes.values()):
        raise ToolError("--max-drop finds the recipe of every model by itself", remedy="leave out --recipe, or --max-drop")
    for option, is_given, needs in (
        ("--samples", choices.samples is not None and choices.calibration is None, "--calibration"),
        ("--target", choices.target != "size" and not choices.max_drop, "--max-drop"),
        ("--no-correct-bias", not choices.corrects_bias and choices.calibration is None, "--calibration"),
    ):
        if is_given:
            raise ToolError(f"{option} does nothing without {needs}", remedy=f"leave it out, or add {needs}")
    if any(wish.statistics and not wish.is_static() for wish in wishes.values()):
        raise ToolError(
            "calibration statistics are for static recipes", where=choices.calibration, remedy="give samples, or a static recipe"
        )
    if choices.calibration is not None and not any(wish.samples or wish.statistics for wish in wishes.values()):
        expected = ", ".join(f"{Path(name).stem}.npz" for name in wishes)
        raise ToolError("no samples for any model of the bundle", where=choices.calibration, expected=expected)


def _falling(output: Path, wishes: dict[str, Wish]) -> list[Path]:
    """Return what may fall beside the product; see `_files_beside`."""
    names = list(wishes)
    falling = [output.with_name(f"{output.stem}_recipe.json")]
    falling += [beside(output, name, names, STATISTICS) for name, wish in wishes.items() if wish.is_static() and wish.samples]
    return falling + [beside(output, name, names, "node_data.json") for name, wish in wishes.items() if wish.debug]


def _require_free(output: Path, falling: Sequence[Path], read: Sequence[Path], *, overwrite: bool) -> None:
    """Raise ToolError where a file that falls beside the product would replace one that is not ours, or one that is read."""
    taken = next((path for path in falling if path.exists()), None)
    if any(_is_same(path, other) for path in falling for other in read):
        raise ToolError("a file beside the output would replace one that is read", where=output, remedy="use another name with -o")
    if taken is not None and not overwrite and read_provenance(output) is None:
        raise ToolError(
            "a file beside the output would be replaced", where=taken, remedy="use --overwrite, or another name with -o"
        )


def _require_page_free(html: Path, others: Sequence[Path], *, overwrite: bool) -> None:
    """Raise ToolError now for what writing the page would fail on, or destroy, after all the work."""
    written = (html, provenance_path(html))
    taken = [*others, *map(provenance_path, others)]
    if any(_is_same(path, other) for path in written for other in taken):
        raise ToolError("the page would replace a file that is read or written", where=html, remedy="choose another name")
    require_disk(0, html.parent, "write the page")
    artifacts.require_not_anothers(html, overwrite=overwrite)


def _is_same(path: Path, other: Path) -> bool:
    return path.resolve() == other.resolve() or (path.exists() and other.exists() and path.samefile(other))


def _write_beside(path: Path, content: bytes) -> None:
    """Write a file that belongs to the product, unless it says the same already."""
    if not path.is_file() or path.read_bytes() != content:
        with draft_beside(path) as draft:
            draft.write_bytes(content)
            draft.replace(path)
