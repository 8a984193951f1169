"""Quantize a TFLite model or a MediaPipe bundle, and say what became of every layer.

Example:
    python -m tools.quantize_tflite model.tflite -o model_int8.tflite --recipe int8

Source: recipes and their names, https://github.com/google-ai-edge/ai-edge-quantizer (0.10)
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from shared.command.errors import ToolError
from shared.command.options import (
    AllowLargeError,
    Calibration,
    CorrectBias,
    Dask,
    DryRunOption,
    Exclude,
    Holdout,
    Html,
    InputRangeOption,
    MaxError,
    MinCosine,
    MinPsnr,
    ObjectiveOption,
    Output,
    Overwrite,
    Refresh,
    Reproducible,
    SampleCount,
    SensitivityOption,
    Threads,
    collect,
    require_useful,
)
from shared.command.resources import MIB, ResourceEstimate
from shared.files.atomic import workspace
from shared.files.file_type import read_head
from shared.formats.model_file import ModelFile
from shared.formats.tflite import AGAIN, IDENTIFIER, TfliteContent
from shared.metrics.gates import parse_gates
from shared.quantize.backend import UnchangedError
from shared.quantize.pipeline import quantize_model
from shared.quantize.product import Order, Quantized, Writing, model_folder, write_quantized
from shared.quantize.request import Request
from shared.quantize.result import GATES, QuantizationResult
from tools.quantize_tflite import backend
from tools.quantize_tflite.bundle import Entry, check_packed, is_bundle, models_of, pack_bundle, unpack_bundle
from tools.quantize_tflite.options import DEFAULT_RECIPE, IoDtype, TfliteOptions
from tools.quantize_tflite.recipes import ALIASES, read_recipe_file

PACKAGES = ("ai-edge-quantizer", "ai-edge-litert", "numpy")
# Measured at 33.4 M and 773.7 M parameters: libraries, and the weights already quantized.
BASE_MEMORY = 300 * MIB
MEMORY_PER_BYTE = 0.3
REPAIR_MEMORY_PER_BYTE = 2.0  # folded weights take twice their bytes
STATIC_MEMORY_PER_BYTE = 4.5  # the calibrator holds the model twice next to XNNPACK's copy; measured at 134 M parameters
ROOM_BYTES = 2**16  # for what the quantizer adds next to scales

Recipe = Annotated[
    str | None,
    typer.Option(
        help=f"Recipe: {', '.join(ALIASES)}, a name of AI Edge Quantizer, none, or a .json file; default: {DEFAULT_RECIPE}."
    ),
]
Rule = Annotated[
    list[str] | None,
    typer.Option(help="SELECTOR=RECIPE: an op type, or a regex on op names; in bundles MODEL=RECIPE, MODEL:SELECTOR=RECIPE."),
]
Only = Annotated[list[str] | None, typer.Option(help="Op type or regex on op names; the recipe holds there alone.")]
IoDtypeOption = Annotated[IoDtype, typer.Option(help="Type of the inputs and outputs of static recipes.")]
ShortNames = Annotated[
    bool, typer.Option("--short-names", help="Rename inner tensors t0, t1, ...: names can be a few per cent of a file.")
]
Gate = Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help=f"Limit of the product: {', '.join(GATES)}.")]


def _order(model: Path, options: TfliteOptions, gates: Mapping[str, float], output: Path, folder: Path) -> Order:
    """Return what is to be written: one model, or a bundle of several."""
    entries = unpack_bundle(model, folder / "bundle") if options.in_bundle else None
    models = {name: ModelFile(entry.path) for name, entry in models_of(entries)} if entries else {model.name: ModelFile(model)}
    requests = {name: options.request(name, list(models), output) for name in models}
    _require_sense(options, requests, model)
    read = [model, *(file for request in requests.values() for file in _files(request))]

    def reopen(draft: Path) -> Sequence[Path]:
        if options.in_bundle:
            check_packed(draft, folder / "packed")
        else:
            ModelFile(draft).check()
        return ()

    return Order(
        tool="quantize_tflite",
        source=model,
        output=output,
        requests=requests,
        arguments={},
        read=list(dict.fromkeys([*read, *options.recipe_files()])),
        packages=PACKAGES,
        gates=gates,
        needs=lambda: _needs(models, requests, model.stat().st_size),
        make=partial(_make, model, models, requests, entries),
        reopen=reopen,
    )


def _make(  # noqa: PLR0917 - the last two come from the caller
    source: Path,
    models: Mapping[str, ModelFile],
    requests: Mapping[str, Request],
    entries: Sequence[Entry] | None,
    draft: Path,
    folder: Path,
) -> QuantizationResult:
    """Write the product to `draft`: the quantized model, or the bundle with its models quantized."""
    kept = [entry.name for entry in entries or () if entry.entries is None and not entry.is_model]
    results, resisting, replaced = [], [], {}
    for name, model in models.items():
        request = requests[name]
        if request.in_bundle and request.settings.changes_nothing() and not request.limits:
            kept.append(name)
            continue
        inner = model_folder(folder, name, list(models))
        target = draft if entries is None else inner.with_name(f"{inner.name}.tflite")
        try:
            results.append(quantize_model(model, name, request, backend, inner, target))
        except UnchangedError as error:
            if not request.in_bundle:
                raise
            kept.append(f"{name} ({error})")
            resisting.append(name)
        else:
            replaced[model.path] = target
    if entries is not None:
        idle = set.intersection(*(set(result.unmatched) for result in results)) if results else set()
        if idle:
            raise ToolError(f"no op of any model matches {', '.join(map(repr, sorted(idle)))}", where=source)
        if not results and any(not request.settings.changes_nothing() or request.limits for request in requests.values()):
            raise ToolError("the recipe changes no model of the bundle", where=source, got="; ".join(kept))
        pack_bundle(entries, draft, replaced)
    return QuantizationResult(results, sorted(kept), resisting)


def _files(request: Request) -> list[Path]:
    """Return the files that a request reads besides the model."""
    statistics = request.settings.statistics
    return [*request.files(), *([statistics] if statistics else [])]


def _needs(models: Mapping[str, ModelFile], requests: Mapping[str, Request], size: int) -> ResourceEstimate:
    """Return what a model or a bundle takes: its models are quantized one after the other, and written together."""
    each = [_model_needs(model, requests[name]) for name, model in models.items()]
    product = size + sum(needs.product_bytes - model.size_bytes for needs, model in zip(each, models.values(), strict=True))
    return ResourceEstimate(
        each[0].purpose,
        product_bytes=product,
        disk_bytes=2 * max(size, product),
        memory_bytes=max(needs.memory_bytes for needs in each),
        workspace_bytes=sum(needs.workspace_bytes for needs in each),
    )


def _model_needs(model: ModelFile, request: Request) -> ResourceEstimate:
    """Return what quantizing one model takes, at most."""
    content = model.content
    assert isinstance(content, TfliteContent)
    is_static, is_repaired = request.settings.is_static(), content.has_sparse or "float16" in content.restored_types
    per_byte = STATIC_MEMORY_PER_BYTE if is_static else REPAIR_MEMORY_PER_BYTE if is_repaired else MEMORY_PER_BYTE
    product = _largest_product(model, request)
    return ResourceEstimate(
        "quantize this model",
        product_bytes=product,
        memory_bytes=BASE_MEMORY + int(model.size_bytes * per_byte),
        workspace_bytes=(is_repaired or is_static) * 2 * model.size_bytes + (1 + request.settings.short_names) * product,
    )


def _largest_product(model: ModelFile, request: Request) -> int:
    """Return the size of a product all of whose float weights become as small as its widest rule says; a mix is no larger."""
    settings, kinds = request.settings, {"FLOAT32": 32, "FLOAT16": 16}
    ops = [op for op in model.ops if op.dtype in kinds]
    configs = [rule.get("op_config", {}).get("weight_tensor_config") or {} for rule in settings.base]
    bits = 16 if request.limits else max((int(config.get("num_bits", 16)) for config in configs), default=32)
    is_plain = not (settings.rules or settings.exclude or settings.only)
    saved = sum(op.weight_bytes * max(0, 1 - bits / kinds[op.dtype]) for op in ops) if is_plain else 0
    return model.size_bytes - int(saved) + sum(op.weight_bytes for op in ops) // 64 + ROOM_BYTES


def _require_sense(options: TfliteOptions, requests: Mapping[str, Request], model: Path) -> None:
    """Raise ToolError for options that contradict each other, or that lead nowhere."""
    if not requests:
        remedy = "quantize_tflite is for bundles with .tflite models"
        raise ToolError("the bundle holds no TFLite model", where=model, remedy=remedy)
    if options.recipe is not None and options.recipe.endswith(".json") and options.in_bundle:
        content = read_recipe_file(Path(options.recipe))
        if isinstance(content, dict) and (strange := sorted(content.keys() - requests.keys())):
            what, expected = "the recipe is for models that the bundle lacks", "some of " + ", ".join(requests)
            raise ToolError(what, where=options.recipe, got=", ".join(strange), expected=expected)
    if options.recipe is not None and all(request.limits for request in requests.values()):
        what = "a search for limits finds the recipe of every model by itself"
        raise ToolError(what, remedy="leave out --recipe, or the limit")
    has_real, has_limits = options.calibration is not None, options.has_limits()
    require_useful(
        ("--samples", options.samples is not None, "--calibration", has_real),
        ("--objective", options.objective != "size", "--max-error", has_limits),
        ("--no-correct-bias", not options.correct_bias, "--calibration", has_real),
        ("--dask", options.dask is not None, "--max-error or --sensitivity", has_limits or options.sensitivity),
    )
    if any(request.settings.statistics and not request.settings.is_static() for request in requests.values()):
        what, remedy = "calibration statistics are for static recipes", "give samples, or a static recipe"
        raise ToolError(what, where=options.calibration, remedy=remedy)
    if has_real and not any(request.calibration or request.settings.statistics for request in requests.values()):
        expected = ", ".join(f"{Path(name).stem}.npz" for name in requests)
        raise ToolError("no samples for any model of the bundle", where=options.calibration, expected=expected)


def _is_bundle(model: Path) -> bool:
    """Return whether a file is a bundle; raise ToolError where it is neither that nor a TFLite model."""
    head = read_head(model, "model", again=AGAIN)
    if head[4:8] == IDENTIFIER or not is_bundle(model):
        ModelFile(model).check() if head[4:8] != IDENTIFIER else None
        return False
    return True


def quantize_tflite(
    model: Annotated[Path, typer.Argument(help="A .tflite model or a MediaPipe .task bundle.")],
    *,
    output: Output = None,
    recipe: Recipe = None,
    rule: Rule = None,
    exclude: Exclude = None,
    only: Only = None,
    calibration: Calibration = None,
    holdout: Holdout = None,
    input_range: InputRangeOption = None,
    samples: SampleCount = None,
    io_dtype: IoDtypeOption = "float32",
    correct_bias: CorrectBias = True,
    max_error: MaxError = None,
    min_psnr: MinPsnr = None,
    min_cosine: MinCosine = None,
    objective: ObjectiveOption = "size",
    sensitivity: SensitivityOption = False,
    allow_large_error: AllowLargeError = False,
    gate: Gate = None,
    dask: Dask = None,
    short_names: ShortNames = False,
    html: Html = None,
    threads: Threads = None,
    reproducible: Reproducible = False,
    dry_run: DryRunOption = False,
    overwrite: Overwrite = False,
    refresh: Refresh = False,
) -> Quantized:
    """Quantize a TFLite model or a MediaPipe bundle, and say what became of every layer.

    Float16 and sparse weights are unfolded first, exactly. Inputs and outputs stay float32, metadata is kept. The product is run
    next to the original before it gets its name: latency, and how far the outputs moved. The recipe is written next to it.

    Raises:
        ToolError: Damaged or hostile file, unknown or unfit recipe, a rule that matches no op, nothing changed, no place to write.
    """
    given = locals()
    bundled = _is_bundle(model)
    options, writing = collect(TfliteOptions, {**given, "in_bundle": bundled}), collect(Writing, given)
    label = "search" if options.has_limits() else Path(recipe or DEFAULT_RECIPE).stem
    target = output or model.with_name(f"{model.stem}_{label}{'.task' if bundled else '.tflite'}")
    with workspace() as folder:
        order = _order(model, options, parse_gates(gate or (), GATES), target, folder)
        return write_quantized(order, writing, folder)
