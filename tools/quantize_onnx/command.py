"""Quantize an ONNX model, and say what became of every layer, how fast it is now, and how far its answers moved.

Example:
    python -m tools.quantize_onnx model.onnx --mode static --calibration tiles

Source: onnxruntime.quantization, https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html (1.31)
"""

import math
import os
import re
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Group as Lines
from rich.console import RenderableType

from shared.calibration.dataset import CalibrationSet, InputRange
from shared.command.cli import DryRun, Overwrite, Refresh, Reproducible, Threads
from shared.command.errors import ToolError
from shared.command.resources import cpu_count, cpu_name, require_disk, saturates, size_text
from shared.files import artifacts
from shared.files.artifacts import Plan, Product
from shared.files.atomic import workspace
from shared.files.provenance import provenance_path
from shared.formats.model_file import format_of, model_files
from shared.formats.onnx_file import check_is_onnx, external_files, name_weights, read_model, require_finite
from shared.formats.onnx_graph import read_ops
from shared.metrics.gates import GateKept
from tools.quantize_onnx.pipeline import needs_of, press
from tools.quantize_onnx.range_cache import RangeCache
from tools.quantize_onnx.ranges import CalibrationMethod
from tools.quantize_onnx.request import OnnxWish
from tools.quantize_onnx.result import SLOWER, PressedOnnx
from tools.quantize_onnx.settings import LAYERS, PASSING, RECURRENT, Form, IntegerType, Settings

PACKAGES = ("onnx", "onnxruntime", "numpy", "pillow")
ModeName = Literal["dynamic", "static", "fp16", "auto"]


@dataclass(frozen=True)
class QuantizedOnnx:
    """Result of quantize_onnx; without a product where a limit was broken."""

    source: Path
    product: Product | None
    found: PressedOnnx
    message: str

    @property
    def ok(self) -> bool:
        """Whether every limit was kept."""
        return self.found.ok

    def __rich__(self) -> RenderableType:
        return Lines(*self.found.tables(), self.message)


class _LimitBrokenError(Exception):
    """A product broke a limit; what was found about it comes along."""

    def __init__(self, found: PressedOnnx) -> None:
        super().__init__()
        self.found = found


def _require_op_types(model: Path, op_types: list[str]) -> None:
    """Raise ToolError where the model has no op of a type that is to be quantized."""
    kinds = {op.op_type for op in read_ops(read_model(model))}
    if missing := [kind for kind in op_types if kind not in kinds]:
        got = f"op types {', '.join(sorted(kinds))}"
        raise ToolError(f"--op-type: the model has no {', '.join(missing)}", where=model, got=got)


def _excluded(model: Path, exclude: list[str]) -> tuple[str, ...]:
    """Return the op types and node names that selectors select: an op type, or a regex on node names."""
    ops = read_ops(read_model(model))
    kinds = {op.op_type for op in ops}
    found: dict[str, None] = {}
    for text in exclude:
        if text in kinds:
            found[text] = None
            continue
        try:
            names = [op.name for op in ops if re.search(text, op.name)]
        except re.error as error:
            raise ToolError("--exclude is no regular expression", got=text, expected=str(error)) from None
        if not names:
            what = f"--exclude {text!r} matches no node and is no op type"
            raise ToolError(
                what, where=model, got=f"op types {', '.join(sorted(kinds))}", remedy="node names are in the --json report"
            )
        found |= dict.fromkeys(names)
    return tuple(found)


def _gated(found: PressedOnnx, limits: dict[str, float | None]) -> PressedOnnx:
    """Return what was found with the limits checked."""
    fidelity = found.product.fidelity if found.product else None
    values = {
        "coverage of weight bytes": found.coverage,
        "speed-up": found.speedup,
        "PSNR": fidelity.psnr_db if fidelity else None,
        "cosine": fidelity.cosine if fidelity else None,
    }
    gates = []
    for (name, value), limit in zip(values.items(), limits.values(), strict=True):
        if limit is not None:
            gates.append(GateKept(found.name, name, value, limit, value is not None and value >= limit))
    return replace(found, gates=gates)


def _message(found: PressedOnnx, product: Product, *, reduces_range: bool) -> str:
    head = "up to date: " if product.up_to_date else ""
    reduction = 1 - found.size_after_bytes / found.size_before_bytes
    change = f"{abs(reduction):.1%} {'smaller' if reduction >= 0 else 'LARGER'}"
    slow = "; SLOWER than float32" if found.speedup is not None and found.speedup * SLOWER < 1 else ""
    size = f"{size_text(found.size_before_bytes)} -> {size_text(found.size_after_bytes)}, {change}"
    worse = ""
    if found.mode != "fp16" and not reduces_range and saturates():
        worse = (
            "\nthis CPU lacks VNNI: its 8-bit sums overflow, and answers measured here are worse than elsewhere; see --reduce-range"
        )
    return f"{head}{product.path}: {size}; {product.seconds:.1f} s{slow}{worse}"


def _idle(mode: ModeName, options: dict[str, object]) -> list[str]:
    """Return the options given that do nothing in a mode."""
    static = ("range_cache", "form", "activation_type", "calibration_method", "symmetric_activations")
    integer = ("calibration", "weight_type", "reduce_range", "symmetric_weights", "op_type")
    if mode not in ("dynamic", "fp16"):
        return []
    idle = [name for name in (*static, *(integer if mode == "fp16" else ())) if options[name] not in (None, False)]
    if mode == "fp16" and not options["per_channel"]:
        idle.append("no_per_channel")
    return idle


def _held_out(path: Path, input_range: InputRange | None) -> CalibrationSet:
    """Return what to measure on: what a manifest holds out, or everything where it holds out nothing."""
    given = CalibrationSet(path, input_range)
    return replace(given, part="holdout") if given.has_holdout() else given


def _require_sense(mode: ModeName, options: dict[str, object]) -> None:
    """Raise ToolError for options that would do nothing, or contradict each other."""
    if idle := _idle(mode, options):
        names = ", ".join(f"--{'format' if name == 'form' else name.replace('_', '-')}" for name in idle)
        raise ToolError(f"{names} does nothing in mode {mode}", remedy="leave it out, or use --mode static")
    if mode == "auto" and options["min_psnr"] is None and options["min_cosine"] is None:
        raise ToolError("--mode auto needs a limit to keep", remedy="give --min-psnr or --min-cosine")
    if options["samples"] is not None and options["calibration"] is None:
        raise ToolError("--samples does nothing without --calibration", remedy="leave it out, or add that")
    for name in ("min_psnr", "min_cosine", "min_speedup", "require_coverage"):
        if isinstance(limit := options[name], float) and not math.isfinite(limit):
            raise ToolError(f"--{name.replace('_', '-')} is not finite", remedy="leave it out")


def _require_cache_free(cache: Path, others: list[Path]) -> None:
    """Raise ToolError where the cache would replace another file, or can't be written."""
    require_disk(0, cache.parent, "write the range cache")
    sides = [*others, *map(provenance_path, others)]
    if os.path.realpath(cache) in {os.path.realpath(path) for path in sides}:
        raise ToolError("the range cache would replace another file of this run", where=cache, remedy="choose another name")
    RangeCache(cache)


def quantize_onnx(
    model: Annotated[Path, typer.Argument(help="An .onnx model; weights may lie beside it.")],
    *,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; default: <model>_<mode>.onnx.")] = None,
    mode: Annotated[
        ModeName, typer.Option(help="static needs --calibration and is the fast one; auto takes the fastest inside the limits.")
    ] = "static",
    calibration: Annotated[
        Path | None, typer.Option(help="Real inputs: folder of images, manifest or .npz; prepare_calibration makes one.")
    ] = None,
    holdout: Annotated[
        Path | None, typer.Option(help="Real inputs to measure on; default: what the manifest of --calibration holds out.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Inputs of --calibration to take; default: all.")] = None,
    input_range: Annotated[InputRange | None, typer.Option(help="Range of the model's image input; default: 0..1.")] = None,
    calibration_method: Annotated[
        CalibrationMethod | None, typer.Option(help="How ranges are found; default: minmax, or with limits the better one.")
    ] = None,
    range_cache: Annotated[
        Path | None, typer.Option(help="Keep ranges of activations in this file, and take them from it where they are known.")
    ] = None,
    form: Annotated[Form | None, typer.Option("--format", help="Of static models; default: qdq.")] = None,
    activation_type: Annotated[
        IntegerType | None, typer.Option(help="Of static models; default: uint8, the fastest on x86.")
    ] = None,
    weight_type: Annotated[Literal["int8", "uint8"] | None, typer.Option(help="Default: int8.")] = None,
    per_channel: Annotated[bool, typer.Option(help="A scale for each output channel of a weight.")] = True,
    reduce_range: Annotated[bool, typer.Option("--reduce-range", help="7-bit weights, for x86 CPUs without VNNI.")] = False,
    symmetric_activations: Annotated[bool, typer.Option("--symmetric-activations", help="Zero in the middle of ranges.")] = False,
    symmetric_weights: Annotated[bool | None, typer.Option(help="Default: as the weights' type wants it.")] = None,
    op_type: Annotated[
        list[str] | None, typer.Option(help="What is quantized; default: layers with weights and what joins them.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Op type, or regex on node names, that stays in float.")] = None,
    correct_bias: Annotated[
        bool, typer.Option(help="With --calibration, take back what quantized weights shift on average.")
    ] = True,
    require_coverage: Annotated[float | None, typer.Option(min=0, max=1, help="Gate: share of weight bytes quantized.")] = None,
    min_speedup: Annotated[
        float | None, typer.Option(min=0, help="Gate: latency of the repaired float32 model over the product's.")
    ] = None,
    min_psnr: Annotated[float | None, typer.Option(min=0, help="Limit in dB; static finds what to leave in float.")] = None,
    min_cosine: Annotated[float | None, typer.Option(min=0, max=1, help="Limit of the worst sample; the same.")] = None,
    threads: Threads = None,
    reproducible: Reproducible = False,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    refresh: Refresh = False,
) -> QuantizedOnnx:
    """Quantize an ONNX model, and say what became of every layer, how fast it is now, and how far its answers moved.

    The model is repaired first: old opsets, weights among the inputs, nameless nodes, stale shapes. Inputs and outputs stay
    float32, metadata is kept. Original, repaired model and product are run in turns before the product gets its name.

    Raises:
        ToolError: Damaged model, samples that don't fit, a limit that no mix of layers keeps, or no place to write.
    """
    check_is_onnx(model)
    if format_of(model) != "onnx":
        raise ToolError("the model's name must end in .onnx", where=model, remedy="rename it")
    _require_op_types(model, op_type or [])
    _require_sense(mode, locals())
    settings = Settings(
        mode="static" if mode == "auto" else mode,
        op_types=tuple(op_type) if op_type else (*LAYERS, *PASSING, *RECURRENT),
        form=form or "qdq",
        activation_type=activation_type or "uint8",
        weight_type=weight_type or "int8",
        per_channel=per_channel,
        reduce_range=reduce_range,
        symmetric_activations=symmetric_activations,
        symmetric_weights=symmetric_weights,
        method=calibration_method or "minmax",
    )
    wish = OnnxWish(
        settings=settings,
        is_auto=mode == "auto",
        tries_methods=calibration_method is None,
        exclude=_excluded(model, exclude or []),
        samples=None if calibration is None else CalibrationSet(calibration, input_range, samples),
        holdout=None if holdout is None else _held_out(holdout, input_range),
        input_range=input_range,
        corrects_bias=correct_bias,
        min_psnr=min_psnr,
        min_cosine=min_cosine,
        threads=threads,
        range_cache=range_cache,
    )
    output = output or model.with_name(f"{model.stem}_{mode}.onnx")
    if output.suffix != ".onnx":
        expected, remedy = "a name ending in .onnx", "choose another with -o"
        raise ToolError("the output is no .onnx file", where=output, expected=expected, remedy=remedy)
    limits = {"coverage": require_coverage, "speedup": min_speedup, "psnr": min_psnr, "cosine": min_cosine}
    real = [given for given in (wish.samples, wish.holdout) if given]
    real += [replace(wish.samples, part="holdout")] if wish.samples and wish.samples.has_holdout() else []
    read = [*model_files(model), *dict.fromkeys(file for given in real for file in given.files())]
    if range_cache is not None:
        _require_cache_free(range_cache, [output, *read])

    with workspace() as folder:

        def make(draft: Path) -> PressedOnnx:
            require_finite(model)
            with tempfile.TemporaryDirectory(dir=folder) as inner:
                found = _gated(press(model, wish, Path(inner), draft), limits)
            if not found.ok:
                raise _LimitBrokenError(found)
            name_weights(draft, output)
            return found

        arguments = {
            **asdict(settings),
            "mode": mode,
            "methods": wish.tries_methods,
            "exclude": wish.exclude,
            "samples": samples,
            "input_range": input_range,
            "correct_bias": correct_bias,
            "limits": limits,
        }
        arguments["real"] = [(given.part, given.sha256()) for given in real]
        if mode == "auto" or min_speedup is not None:
            arguments |= {"cpu": cpu_name(), "threads": threads or cpu_count()}
        plan = Plan(
            output,
            "quantize_onnx",
            arguments,
            read,
            PACKAGES,
            overwrite=overwrite,
            refresh=refresh,
            reproducible=reproducible,
            dry_run=dry_run,
            needs=lambda: needs_of(model, mode),
            companions=external_files,
            reopen=check_is_onnx,
        )
        try:
            product, found = artifacts.build(plan, PressedOnnx, make)
        except _LimitBrokenError as error:
            return QuantizedOnnx(model, None, error.found, f"FAILED: {error.found.broken()}; nothing was written")
    return QuantizedOnnx(model, product, found, _message(found, product, reduces_range=reduce_range))
