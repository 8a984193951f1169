"""Quantize an ONNX model, and say what became of every layer, how fast it is now, and how far its outputs moved.

Example:
    python -m tools.quantize_onnx model.onnx -o model_int8.onnx --recipe int8-static --calibration images/ --gate min_coverage=0.5

Source: ONNX Runtime's quantization, https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html (1.31)
"""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

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
from shared.command.resources import GIB, ResourceEstimate, cpu_count, cpu_name, require_disk
from shared.files.atomic import workspace
from shared.files.plan import is_same
from shared.files.provenance import provenance_path
from shared.formats.model_file import ModelFile
from shared.formats.onnx_file import check_is_onnx, name_weights
from shared.formats.onnx_graph import OnnxContent
from shared.metrics.gates import parse_gates
from shared.quantize.pipeline import quantize_model
from shared.quantize.product import Order, Quantized, Writing, model_folder, write_quantized
from shared.quantize.request import Limits
from shared.quantize.result import GATES, QuantizationResult
from tools.quantize_onnx import backend
from tools.quantize_onnx.options import (
    DEFAULT_RECIPE,
    OnnxOptions,
    Recipe,
    parse_settings,
    require_op_types,
    require_useful_settings,
    settings_help,
)
from tools.quantize_onnx.ranges import RangeCache

PACKAGES = ("onnx", "onnxruntime", "numpy", "pillow")
BASE_MEMORY = int(0.5 * GIB)
MEMORY_PER_BYTE = 3.2  # the quantizer holds the model, its quantized weights, and what it writes; measured at 773.7 M parameters
WORKSPACE_PER_BYTE = 3  # on disk: the repaired model, what the library infers its shapes in, the product
SCALES_SHARE = 0.05  # of the weights' bytes: scales, zero points, biases
ROOM_BYTES = 2**17  # for nodes that are added

RecipeOption = Annotated[
    Recipe,
    typer.Option(
        "--recipe",
        help="int8-static and int16x8 need --calibration; int8 is dynamic, without samples, and slow on convolutions; auto takes "
        "the fastest of int8, fp16 and int8-static inside the limits.",
    ),
]
RangeCacheOption = Annotated[
    Path | None, typer.Option("--range-cache", help="Keep ranges of activations in this file, and take known ones from it.")
]
Settings = Annotated[  # in a panel of its own: next to other options its column is too narrow for the names
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help=settings_help(), rich_help_panel="Settings")
]
Gate = Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help=f"Limit of the product: {', '.join(GATES)}.")]


def _require_sense(model: ModelFile, options: OnnxOptions) -> None:
    """Raise ToolError for options that would do nothing, or contradict each other."""
    has_limits = bool(options.max_error) or options.min_psnr is not None or options.min_cosine is not None
    require_op_types(model, options.settings)
    statics = {"--range-cache": options.range_cache is not None, "--objective latency": options.objective != "size"}
    require_useful_settings(options.recipe, options.set_options, statics)
    if options.recipe == "fp16" and options.calibration is not None:
        raise ToolError("--calibration does nothing in recipe fp16", remedy=f"leave it out, or use --recipe {DEFAULT_RECIPE}")
    if options.recipe == "auto" and not has_limits:
        raise ToolError("--recipe auto needs a limit to keep", remedy="give --min-psnr, --min-cosine or --max-error")
    require_useful(
        ("--samples", options.samples is not None, "--calibration", options.calibration is not None),
        ("--objective", options.objective != "size", "--max-error", has_limits),
        ("--dask", options.dask is not None, "--max-error or --sensitivity", has_limits or options.sensitivity),
    )


def _needs(model: ModelFile, recipe: Recipe) -> ResourceEstimate:
    """Return what quantizing a model takes, at most."""
    content = model.content
    assert isinstance(content, OnnxContent)
    weights = sum(size for dtype, size in content.constants.values() if dtype == "FLOAT")
    share = 0.5 if recipe in ("fp16", "auto") else 0.25
    product = model.size_bytes - weights + int(weights * (share + SCALES_SHARE)) + ROOM_BYTES
    return ResourceEstimate(
        "quantize this model",
        product_bytes=product,
        disk_bytes=2 * product,
        memory_bytes=BASE_MEMORY + int(model.size_bytes * MEMORY_PER_BYTE),
        workspace_bytes=WORKSPACE_PER_BYTE * model.size_bytes,
    )


def _order(model: ModelFile, options: OnnxOptions, gates: Mapping[str, float], output: Path) -> Order:
    """Return what is to be written."""
    name = model.path.name
    request = options.request(model, output)
    read = list(dict.fromkeys([*model.files, *request.files()]))
    arguments: dict[str, Any] = {"datasets": [one.sha256() for one in request.datasets()]}
    if options.recipe == "auto" or {"min_speedup", "max_latency_ms"} & gates.keys():  # latencies decide
        arguments |= {"cpu": cpu_name(), "threads": options.threads or cpu_count()}
    if options.range_cache is not None:
        _require_cache_free(options.range_cache, [output, *read])

    def make(draft: Path, folder: Path) -> QuantizationResult:
        return QuantizationResult([quantize_model(model, name, request, backend, model_folder(folder, name, [name]), draft)])

    return Order(
        tool="quantize_onnx",
        source=model.path,
        output=output,
        requests={name: request},
        arguments=arguments,
        read=read,
        packages=PACKAGES,
        gates=_with_limits(gates, request.limits),
        needs=lambda: _needs(model, options.recipe),
        make=make,
        reopen=check_is_onnx,
        settle=lambda draft: name_weights(draft, output),
        note=_overflow_note(options),
    )


def _with_limits(gates: Mapping[str, float], limits: Limits) -> dict[str, float]:
    """Return the gates with the limits as further ones: whatever a search finds, the product itself is checked."""
    found = dict(gates)
    errors = {f"max_error:{output}" if output else "max_error": limit for output, limit in limits.max_error.items()}
    for name, limit in {"min_psnr": limits.min_psnr, "min_cosine": limits.min_cosine, **errors}.items():
        if limit is not None:
            tighter = min if name.startswith("max") else max
            found[name] = tighter(limit, found.get(name, limit))
    return found


def _overflow_note(options: OnnxOptions) -> str:
    if options.recipe == "fp16" or options.settings.reduce_range or not saturates():
        return ""
    return "this CPU lacks VNNI: its 8-bit sums overflow, and outputs are worse here than elsewhere; see --set reduce_range=yes"


def saturates() -> bool:
    """Return whether ONNX Runtime's sums of 8-bit products overflow here: x86 without VNNI adds pairs of them in 16 bits."""
    info = Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64") or not info.exists():
        return False
    flags = next((line for line in info.read_text().splitlines() if line.startswith("flags")), "avx_vnni").split()
    return not {"avx512_vnni", "avx_vnni"} & set(flags)


def _require_cache_free(cache: Path, others: list[Path]) -> None:
    """Raise ToolError where the cache would replace another file, or can't be written."""
    require_disk(0, cache.parent, "write the range cache")
    if any(is_same(cache, other) for path in others for other in (path, provenance_path(path))):
        raise ToolError("the range cache would replace another file of this run", where=cache, remedy="choose another name")
    RangeCache(cache)


def quantize_onnx(
    model: Annotated[Path, typer.Argument(help="An .onnx model; weights may lie in files of their own next to it.")],
    *,
    output: Output = None,
    recipe: RecipeOption = DEFAULT_RECIPE,
    calibration: Calibration = None,
    holdout: Holdout = None,
    samples: SampleCount = None,
    input_range: InputRangeOption = None,
    range_cache: RangeCacheOption = None,
    set_options: Settings = None,
    exclude: Exclude = None,
    correct_bias: CorrectBias = True,
    max_error: MaxError = None,
    min_psnr: MinPsnr = None,
    min_cosine: MinCosine = None,
    objective: ObjectiveOption = "size",
    sensitivity: SensitivityOption = False,
    allow_large_error: AllowLargeError = False,
    gate: Gate = None,
    dask: Dask = None,
    html: Html = None,
    threads: Threads = None,
    reproducible: Reproducible = False,
    dry_run: DryRunOption = False,
    overwrite: Overwrite = False,
    refresh: Refresh = False,
) -> Quantized:
    """Quantize an ONNX model, and say what became of every layer, how fast it is now, and how far its outputs moved.

    The model is repaired first: old opsets, weights among the inputs, nameless nodes, stale shapes. Inputs and outputs stay
    float32, metadata is kept. Original, repaired model and product are run in turns before the product gets its name.

    Raises:
        ToolError: Damaged model, samples that don't fit, a limit that no mix of layers keeps, or no place to write.
    """
    given = locals()
    source = ModelFile(model)
    check_name(source)
    options = collect(OnnxOptions, {**given, "settings": parse_settings(set_options or (), recipe)})
    _require_sense(source, options)
    target = output or model.with_name(f"{model.stem}_{recipe}.onnx")
    if target.suffix != ".onnx":
        expected, remedy = "a name ending in .onnx", "choose another with -o"
        raise ToolError("the output is no .onnx file", where=target, expected=expected, remedy=remedy)
    with workspace() as folder:
        order = _order(source, options, parse_gates(gate or (), GATES), target)
        return write_quantized(order, collect(Writing, given), folder)


def check_name(source: ModelFile) -> None:
    """Raise ToolError unless a file is an ONNX model by content and by name."""
    if source.kind != "onnx":
        check_is_onnx(source.path)
        raise ToolError("the model's name must end in .onnx", where=source.path, remedy="rename it")
    source.check()
