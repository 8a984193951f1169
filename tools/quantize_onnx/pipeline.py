"""The way of one ONNX model through quantize_onnx: repaired, calibrated, quantized, and measured before anyone gets it."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from shared.command.errors import ToolError
from shared.command.resources import GIB, Needs, cpu_count
from shared.formats.model_file import model_files, size_bytes
from shared.formats.onnx_file import read_model, tensor_bytes, tensors
from shared.formats.onnx_graph import OnnxOp, read_ops
from shared.metrics.fidelity import Fidelity
from tools.quantize_onnx.backend import Quantized, Workshop
from tools.quantize_onnx.coverage import measure_coverage
from tools.quantize_onnx.evaluation import LARGE_BYTES, Evaluation, Samples, settle_samples
from tools.quantize_onnx.repair import DATA, OPSET
from tools.quantize_onnx.request import OnnxWish
from tools.quantize_onnx.result import FLOAT, ORIGINAL, PressedOnnx, Timed
from tools.quantize_onnx.search import find_kept
from tools.quantize_onnx.settings import LAYERS, Settings

BASE_MEMORY = int(0.5 * GIB)
MEMORY_PER_BYTE = 3.2  # the quantizer holds the model, its quantized weights, and what it writes; measured at 773.7 M parameters
WORKSPACE_PER_BYTE = 3  # on disk: the repaired model, what the library infers its shapes in, the product
FLOAT_TYPE = 1  # of onnx.TensorProto.DataType
SCALES_SHARE = 0.05  # of the weights' bytes: scales, zero points, biases
ROOM_BYTES = 2**17  # for nodes that are added
QUANTIZED = {
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "QLinearConv",
    "QLinearMatMul",
    "ConvInteger",
    "MatMulInteger",
}
MOST_CHANGED = 1e-3  # relative error between the model as it came and repaired; rounding in another order gives 1e-6
BY_SEARCH = "left in float by the search: quantized it would break the limit"
BY_USER = "excluded"


def needs_of(source: Path, mode: str) -> Needs:
    """Return what quantizing a model takes, at most."""
    size = size_bytes(source)
    weights = sum(tensor_bytes(tensor) for tensor in tensors(read_model(source)) if tensor.data_type == FLOAT_TYPE)
    share = 0.5 if mode in ("fp16", "auto") else 0.25
    product = size - weights + int(weights * (share + SCALES_SHARE)) + ROOM_BYTES
    return Needs(
        "quantize this model",
        product_bytes=product,
        disk_bytes=2 * product,
        memory_bytes=BASE_MEMORY + int(size * MEMORY_PER_BYTE),
        workspace_bytes=WORKSPACE_PER_BYTE * size,
    )


def press(source: Path, wish: OnnxWish, workspace: Path, draft: Path) -> PressedOnnx:
    """Write the product to `draft` and return what became of the model.

    Weights of a product above 2 GiB are written to `<draft>.data`, see `shared.formats.onnx_file.name_weights`.

    Args:
        source: The file.
        wish: What is wanted.
        workspace: An empty folder for what is needed on the way.
        draft: The file to write.

    Raises:
        ToolError: Damaged model, samples that don't fit, nothing to quantize, or no candidate inside the limits.
    """
    size = size_bytes(source)
    with Workshop(source, workspace) as workshop:
        repairs = str(workshop.repair())
        ops = read_ops(read_model(workshop.float_model))
        if done := sorted({op.op_type for op in ops} & QUANTIZED):
            what = f"mode {wish.settings.mode} changes no op of this model"
            raise ToolError(what, where=source, got=f"quantized already: {', '.join(done)}", remedy="give the float model")
        samples = settle_samples(source, workshop.float_model, wish, wish.threads or cpu_count())
        evaluation = Evaluation(source, workshop.float_model, samples, wish.threads)
        way = _Way(source, wish, ops, samples, workshop, evaluation)
        candidates = list(way.candidates())
    chosen, models, runs = way.choose(candidates, is_repaired=bool(repairs))
    rows, left = measure_coverage(ops, read_model(chosen.path), chosen.settings, chosen.reasons)
    if not any(row.quantized for row in rows):
        reasons = "; ".join(sorted({f"{row.op_type} {row.reason}" for row in rows})) or "it has no weights"
        what = f"mode {chosen.settings.mode} changes no op of this model"
        raise ToolError(what, where=source, got=reasons, remedy="choose another mode")
    _, *data = model_files(chosen.path)
    shutil.copyfile(chosen.path, draft)
    for file in data:
        shutil.copyfile(file, draft.with_name(f"{draft.name}{DATA}"))
    total = sum(row.weight_bytes for row in rows)
    return PressedOnnx(
        name=source.name,
        mode=chosen.settings.mode,
        expansion=str(chosen.settings),
        size_before_bytes=size,
        size_after_bytes=size_bytes(chosen.path),
        repairs=repairs,
        op_types=rows,
        left=left,
        coverage=sum(row.quantized_weight_bytes for row in rows) / total if total else None,
        corrected_biases=chosen.corrected,
        samples=samples.count if chosen.settings.mode == "static" or chosen.corrected else 0,
        measured_on=samples.told,
        threads=evaluation.threads,
        runs=runs,
        models=models,
        searched=chosen.searched,
        kept=sorted(name for name, reason in chosen.reasons.items() if reason == BY_SEARCH),
        peak_rss_bytes=max(workshop.peak_rss_bytes, evaluation.peak_rss_bytes),
    )


@dataclass
class _Way:
    """What is tried on the way, and what of it is taken.

    Args:
        source: The model as it came.
        wish: What is wanted.
        ops: Of the repaired model.
        samples: Its samples.
        workshop: Where it is quantized.
        evaluation: What it is measured on.
        failed: Modes that could not be tried.
    """

    source: Path
    wish: OnnxWish
    ops: list[OnnxOp]
    samples: Samples
    workshop: Workshop
    evaluation: Evaluation
    failed: list[Timed] = field(default_factory=list)

    def candidates(self) -> Iterator[Quantized]:
        """Yield what is quantized, in each mode that is asked for."""
        kinds = {op.op_type for op in self.ops}
        kept = {op.name: BY_USER for op in self.ops if op.name in self.wish.exclude}
        if missing := [text for text in self.wish.exclude if text not in kinds and text not in kept]:
            what = f"--exclude: the repaired model has no {', '.join(missing)}"
            raise ToolError(what, where=self.source, got=f"op types {', '.join(sorted(kinds))}")
        settings = replace(self.wish.settings, kept_op_types=tuple(text for text in self.wish.exclude if text in kinds))
        if self.wish.is_auto:
            yield from self._each_mode(settings, kept)
        elif settings.mode != "static":
            yield self._quantized(settings, kept)
        elif self.samples.calibration is None:
            remedy = "give --calibration FOLDER of images, .npz or manifest; prepare_calibration makes one"
            raise ToolError("static quantization needs a calibration set", where=self.source, remedy=remedy)
        else:
            yield self._searched(settings, kept) if self.wish.has_limits() else self._quantized(settings, kept)

    def _each_mode(self, settings: Settings, kept: dict[str, str]) -> Iterator[Quantized]:
        """Yield a candidate of each mode; one that cannot be made is noted with its reason."""
        ways: dict[str, Callable[[], Quantized]] = {
            "dynamic": lambda: self._quantized(replace(settings, mode="dynamic"), kept),
            "fp16": lambda: self._quantized(replace(settings, mode="fp16"), kept),
        }
        if self.samples.calibration is not None:
            ways["static"] = lambda: self._searched(replace(settings, mode="static"), kept)
        else:
            self.failed.append(Timed("static", 0, error="not tried without --calibration"))
        for mode, make in ways.items():
            try:
                yield make()
            except ToolError as error:
                self.failed.append(Timed(mode, 0, error=str(error).removeprefix(f"{self.source}: ")))

    def _searched(self, settings: Settings, kept: dict[str, str]) -> Quantized:
        """Return a static model inside the limits, with as few layers in float as it takes."""
        best: tuple[Settings, Fidelity] | None = None
        methods = (settings.method, "percentile") if self.wish.tries_methods else (settings.method,)
        for method in dict.fromkeys(methods):
            trial = replace(settings, method=method)  # type: ignore[arg-type]
            fidelity = self.evaluation.answers(self._quantized(trial, kept).path)
            if fidelity is not None and (best is None or _better(fidelity, best[1])):
                best = trial, fidelity
        if best is None:
            raise ToolError("the statically quantized model does not run", where=self.source, remedy="try another mode")
        settings, fidelity = best
        if self.wish.keeps(fidelity):
            return replace(self._quantized(settings, kept), searched=len(methods))
        kinds = [kind for kind in LAYERS if kind in settings.op_types and kind not in settings.kept_op_types]
        layers = [
            op
            for op in self.ops
            if op.op_type in kinds and op.weight and op.name not in kept and op.dtype == "FLOAT" and not op.is_inner
        ]

        def measure(names: frozenset[str]) -> Fidelity | None:
            trial = self._quantized(settings, {**kept, **dict.fromkeys(names, BY_SEARCH)})
            return self.evaluation.answers(trial.path)

        found = find_kept(layers, measure, self.wish.keeps)
        if found.names is None:
            got = f"{fidelity} with all layers quantized, and no layer can be left quantized inside the limit"
            raise ToolError("no static model keeps the limit", where=self.source, got=got, remedy="lower it, or use --mode fp16")
        chosen = self._quantized(settings, {**kept, **dict.fromkeys(found.names, BY_SEARCH)})
        return replace(chosen, searched=len(methods) + found.measured)

    def _quantized(self, settings: Settings, reasons: dict[str, str]) -> Quantized:
        wish = self.wish
        return self.workshop.quantize(
            settings, reasons, self.samples, corrects_bias=wish.corrects_bias, range_cache=wish.range_cache
        )

    def choose(self, candidates: list[Quantized], *, is_repaired: bool) -> tuple[Quantized, list[Timed], int]:
        """Time all models in turns; return the fastest candidate inside the limits, what all showed, and the number of runs."""
        float_model = self.workshop.float_model
        shows_original = is_repaired and size_bytes(float_model) <= LARGE_BYTES
        known = [*([(ORIGINAL, self.source)] if shows_original else []), (FLOAT, float_model)]
        models, runs = self.evaluation.time([*known, *((one.settings.mode, one.path) for one in candidates)])
        repaired = models[0].fidelity if shows_original else self.evaluation.answers(self.source) if is_repaired else None
        if repaired is not None and repaired.relative_error > MOST_CHANGED:
            got = f"relative error {repaired.relative_error:.2g}"
            remedy = f"export the model again with opset {OPSET} or newer"
            raise ToolError("repairing the model changes its answers", where=self.source, got=got, remedy=remedy)
        tried = models[len(known) :]
        told = [*tried, *self.failed]
        running = [
            (model.median_ms, model.fidelity, candidate)
            for candidate, model in zip(candidates, tried, strict=True)
            if model.median_ms is not None and model.fidelity is not None
        ]
        if not running:
            got = "; ".join(f"{model.label}: {model.error}" for model in told)
            raise ToolError("the quantized model does not run; nothing was kept", where=self.source, got=got)
        inside = [one for one in running if self.wish.keeps(one[1])] if self.wish.is_auto else running
        if not inside:
            got = "; ".join(f"{model.label}: {model.fidelity or model.error}" for model in told)
            has_samples = self.samples.calibration is not None
            remedy = "lower the limit" if has_samples else "give --calibration, so that static models can be tried"
            raise ToolError("no mode keeps the limits", where=self.source, got=got, remedy=remedy)
        chosen = min(inside, key=lambda found: found[0])[2]
        models = [replace(model, is_chosen=model.label == chosen.settings.mode) for model in models]
        return chosen, [*models, *self.failed], runs


def _better(one: Fidelity, other: Fidelity) -> bool:
    return one.relative_error < other.relative_error if one.psnr_db is None else one.psnr_db > (other.psnr_db or 0.0)
