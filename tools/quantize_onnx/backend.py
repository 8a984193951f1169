"""ONNX through the quantization pipeline: what `shared.quantize.backend.Backend` asks of a format."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import TypeAdapter

from shared.calibration.dataset import CalibrationSet
from shared.command.cli import step
from shared.command.errors import ToolError
from shared.command.options import InputRange
from shared.command.resources import cpu_name
from shared.files.checksums import sha256_of
from shared.formats.model_file import ModelFile
from shared.formats.onnx_graph import OnnxContent, OnnxOp
from shared.formats.tensors import TensorSpec
from shared.quantize.backend import Candidate, Quantization
from shared.quantize.coverage import LayerState, OpTypeCoverage, SkippedLayer, measure_coverage
from shared.quantize.ledger import Job, MakeJob
from shared.quantize.request import Precisions, Request
from shared.quantize.search import SearchSpace
from shared.runtime.model import open_model
from shared.runtime.processes import ChildError, Workspace
from tools.quantize_onnx import worker
from tools.quantize_onnx.candidates import OnnxJob, Subject, comparable_tensor
from tools.quantize_onnx.memory import bound_samples
from tools.quantize_onnx.options import LAYERS, OnnxRequest
from tools.quantize_onnx.quantizing import QuantizeTask
from tools.quantize_onnx.ranges import RangeCache, cache_key

WORKER: ModuleType = worker
ASSUMED_RANGE: InputRange | None = "0..1"
TIMES_REPAIRED = True  # repairs make some models faster: the repaired float32 model is the reference
FLOAT = "float32"  # the base of a search
QUANTIZED = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul"}
QUANTIZED |= {"ConvInteger", "MatMulInteger"}
BY_SEARCH = "left in float by the search: quantized it would break the limit"


def repair(source: ModelFile, request: Request, workspace: Workspace) -> tuple[ModelFile, str]:
    """Return the repaired model, and the repairs in words."""
    if done := sorted({op.op_type for op in source.ops} & QUANTIZED):
        what = f"recipe {request.recipe} changes no op of this model"
        raise ToolError(what, where=source.path, got=f"quantized already: {', '.join(done)}", remedy="give the float model")
    target = workspace.folder / "float.onnx"
    given = {"source": str(source.path), "target": str(target), "keeps_halves": request.recipe == "fp16"}
    reply = workspace.run("repair", "could not repair the model", source.path, **given)
    return ModelFile(target, _content(reply)), str(reply["repairs"])


def specs(model: ModelFile, name: str, _: Workspace) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Return inputs and outputs of the repaired model."""
    try:
        with open_model(model) as opened:
            return opened.inputs, opened.outputs
    except ChildError as error:
        remedy = "export it again, for a runtime of today"
        raise ToolError("the model does not load", where=name, got=error, remedy=remedy) from None


def bounded(samples: CalibrationSet, model: ModelFile, inputs: Sequence[TensorSpec], name: str, work: Workspace) -> CalibrationSet:
    """Return samples whose activations take at most half of the free memory."""
    given = {"model": str(model.path), "inputs": worker.as_message(inputs)}
    reply = work.run("activations", "could not estimate the memory of activations", name, **given)
    return bound_samples(samples, inputs, int(reply["bytes"]), name)


def unmatched(model: ModelFile, request: Request, name: str) -> list[str]:
    """Raise ToolError where an excluded node is gone after the repair; selectors were matched with the model as it came."""
    names = {op.name for op in model.ops}
    if missing := [layer for layer in request.settings.float_layers if layer not in names]:
        raise ToolError(f"--exclude: the repaired model has no {', '.join(missing)}", where=name)
    return []


def variants(request: Request) -> list[Request]:
    """Return the request, or one for each recipe that `auto` chooses from."""
    wanted: OnnxRequest = request.settings
    if not wanted.is_auto:
        return [request]
    made = [replace(wanted, recipe=recipe, is_auto=False) for recipe in ("int8", "fp16", "int8-static")]
    return [replace(request, recipe=one.recipe, expansion=str(one), settings=one) for one in made]


def space(quantization: Quantization) -> SearchSpace | None:
    """Return float32 as the base, and the recipe as the choice of each layer with weights; None for recipes without ranges."""
    wanted: OnnxRequest = quantization.request.settings
    if not wanted.needs_ranges:
        return None
    _require_samples(quantization)
    kinds = [kind for kind in LAYERS if kind in wanted.settings.op_types and kind not in wanted.float_op_types]
    layers = [
        op.name
        for op in _ops(quantization.model)
        if op.op_type in kinds and op.weight and op.name not in wanted.float_layers and op.dtype == "FLOAT" and not op.is_inner
    ]
    return SearchSpace(dict.fromkeys(layers, FLOAT), {layer: [wanted.recipe] for layer in layers}, FLOAT)


def search_variants(quantization: Quantization) -> list[Quantization]:
    """Return the quantization with each calibration method, where the user names none."""
    wanted: OnnxRequest = quantization.request.settings
    if wanted.settings.calibration_method is not None:
        return [quantization]
    methods = ("minmax", "percentile")
    made = [replace(wanted, settings=replace(wanted.settings, calibration_method=method)) for method in methods]  # type: ignore[arg-type]
    return [replace(quantization, request=replace(quantization.request, settings=one, expansion=str(one))) for one in made]


def job_maker(quantization: Quantization) -> MakeJob:
    """Return what makes the measurement of a candidate from its precisions, and whether to time it."""
    subject = _subject(quantization)

    def make(precisions: Precisions, is_timed: bool) -> Job:  # noqa: FBT001 - as the protocol has it
        floats = [layer for layer, precision in precisions.items() if precision == FLOAT]
        layers = None if len(floats) == len(precisions) else _float_layers(quantization, floats)
        return OnnxJob(subject, layers, is_timed=is_timed)

    return make


def identity(quantization: Quantization) -> dict[str, str]:
    """Return what the measurements of a search depend on."""
    samples, wanted = quantization.samples, quantization.request.settings
    versions = {name: metadata.version(name) for name in ("onnx", "onnxruntime", "numpy")}
    return {
        "model": " ".join(sha256_of(file) for file in quantization.source.files),
        "samples": samples.calibration.sha256() if samples.calibration else "",
        "held": samples.held.sha256(),
        "wanted": json.dumps(asdict(replace(wanted, range_cache=None))),
        "corrects_bias": str(quantization.request.corrects_bias),
        "cpu": cpu_name(),  # kernels, and so outputs, differ from CPU to CPU
        "objective": quantization.request.objective,
        **versions,
    }


def quantize(quantization: Quantization, precisions: Precisions | None) -> Candidate:
    """Make a candidate by the recipe, some layers left in float where a search says so."""
    request, wanted = quantization.request, quantization.request.settings
    if wanted.needs_ranges:
        _require_samples(quantization)
    floats = {layer: BY_SEARCH for layer, precision in (precisions or {}).items() if precision == FLOAT}
    if precisions and len(floats) == len(precisions):
        what = f"no {request.recipe} model keeps the limits: no layer can be quantized inside them"
        raise ToolError(what, where=quantization.name, remedy="allow a larger error, or use --recipe fp16")
    task = _task(quantization, _float_layers(quantization, list(floats)))
    target = quantization.workspace.folder / f"{request.recipe}.onnx"
    reply = _run(quantization, "quantize", target=str(target), recipe=TypeAdapter(QuantizeTask).dump_python(task, mode="json"))
    return Candidate(request, ModelFile(target, _content(reply)), corrected_biases=int(reply["corrected"]), float_layers=floats)


def coverage(quantization: Quantization, candidate: Candidate) -> tuple[list[OpTypeCoverage], list[SkippedLayer]]:
    """Return what became of the ops, and why layers were skipped."""
    content = candidate.model.content
    assert isinstance(content, OnnxContent)
    ops = _ops(quantization.model)
    firsts = {op.weight: op.name for op in reversed(ops)}
    states = [
        replace(_state(op, content.constants), is_shared=op.weight is not None and firsts[op.weight] != op.name) for op in ops
    ]
    wanted: OnnxRequest = candidate.request.settings

    def why(state: LayerState) -> str:
        assert isinstance(state.layer, OnnxOp)
        return candidate.float_layers.get(state.layer.name) or wanted.why_skipped(state.layer)

    return measure_coverage(states, why)


def layer_jobs(quantization: Quantization, candidate: Candidate) -> dict[str, Job]:
    """Return layer -> measurement of the model with that layer alone quantized, for the layers that the candidate quantizes."""
    content = candidate.model.content
    assert isinstance(content, OnnxContent)
    ops = [op for op in _ops(quantization.model) if op.weight is not None]
    quantized = [op for op in ops if _state(op, content.constants).has_smaller_weights]
    subject = _subject(quantization)
    jobs: dict[str, Job] = {}
    for op in quantized:
        floats = [other.name for other in ops if other.name != op.name]
        tensor = comparable_tensor(op, _ops(quantization.model), content.ops)
        jobs[op.name] = OnnxJob(subject, _float_layers(quantization, floats), tensor=tensor)
    return jobs


def _ops(model: ModelFile) -> list[OnnxOp]:
    content = model.content
    assert isinstance(content, OnnxContent)
    return content.ops


def _content(reply: Mapping[str, Any]) -> OnnxContent:
    return TypeAdapter(OnnxContent).validate_python(reply["content"])


def _run(quantization: Quantization, task: str, **arguments: Any) -> dict[str, Any]:
    return quantization.workspace.run(task, f"could not {task} the model", quantization.source.path, **arguments)


def _require_samples(quantization: Quantization) -> None:
    if quantization.samples.calibration is None:
        remedy = "give --calibration FOLDER of images, .npz or manifest; prepare_calibration makes one"
        what = f"recipe {quantization.request.recipe} needs a calibration set"
        raise ToolError(what, where=quantization.name, remedy=remedy)


def _rewritten(quantization: Quantization) -> tuple[Path, list[str]]:
    """Return the model in the form for static quantization, and which of its nodes must stay in float."""
    folder = quantization.workspace.folder
    target, noted = folder / "rewritten.onnx", folder / "rewritten.json"
    if not noted.exists():
        reply = _run(quantization, "rewrite", model=str(quantization.model.path), target=str(target))
        noted.write_text(json.dumps(reply), encoding="utf-8")
    reply = json.loads(noted.read_text(encoding="utf-8"))
    return target if reply["changed"] else quantization.model.path, list(reply["float_layers"])


def _float_layers(quantization: Quantization, floats: list[str]) -> tuple[str, ...]:
    """Return all nodes that stay in float: those that the user excludes, those given, and those that rewriting made."""
    wanted: OnnxRequest = quantization.request.settings
    made = _rewritten(quantization)[1] if wanted.needs_ranges else []
    return tuple(sorted({*wanted.float_layers, *floats, *made}))


def _task(quantization: Quantization, float_layers: tuple[str, ...]) -> QuantizeTask:
    """Return what a candidate is made of; ranges and means are found when they are needed for the first time."""
    request, wanted = quantization.request, quantization.request.settings
    corrects = request.corrects_bias and quantization.samples.calibration is not None and wanted.recipe != "fp16"
    return QuantizeTask(
        source=quantization.source.path,
        repaired=quantization.model.path,
        rewritten=_rewritten(quantization)[0] if wanted.needs_ranges else quantization.model.path,
        wanted=replace(wanted, float_layers=float_layers),
        ranges=_ranges(quantization) if wanted.needs_ranges else None,
        means=_means(quantization) if corrects else None,
    )


def _subject(quantization: Quantization) -> Subject:
    samples = quantization.samples
    return Subject(
        task=_task(quantization, ()),
        sha256=sha256_of(quantization.model.path),
        inputs=tuple(quantization.inputs),
        outputs=tuple(quantization.outputs),
        peaks=tuple(samples.peaks),
        held=samples.held,
    )


def _ranges(quantization: Quantization) -> Path:
    """Return the file of ranges, found now, in this run, or in an earlier one."""
    wanted: OnnxRequest = quantization.request.settings
    target = quantization.workspace.folder / f"ranges_{wanted.method}.json"
    if target.exists():
        return target
    op_types = [*wanted.settings.op_types, *(("Gemm",) if "MatMul" in wanted.settings.op_types else ())]
    model, calibration = _rewritten(quantization)[0], quantization.samples.calibration
    assert calibration is not None
    cache = RangeCache(wanted.range_cache) if wanted.range_cache is not None else None
    key = cache_key(quantization.source, calibration, wanted.method, op_types) if cache is not None else ""
    known = cache.get(key) if cache is not None else None
    if known is not None:
        target.write_text(json.dumps(known), encoding="utf-8")
        return target
    with step(f"calibrate ({wanted.method})"):
        found = {"method": wanted.method, "op_types": op_types, "samples": _message(quantization)}
        _run(quantization, "ranges", model=str(model), target=str(target), **found)
    if cache is not None:
        cache.put(key, json.loads(target.read_text(encoding="utf-8")))
    return target


def _means(quantization: Quantization) -> Path:
    """Return the file of mean inputs, found now or earlier."""
    target = quantization.workspace.folder / "means.npz"
    if not target.exists():
        with step("measure the mean inputs of layers, for their biases"):
            _run(quantization, "means", model=str(quantization.model.path), target=str(target), samples=_message(quantization))
    return target


def _message(quantization: Quantization) -> dict[str, Any]:
    """Return the calibration set as a message to the worker."""
    given = quantization.samples.calibration
    assert given is not None
    return {"set": given.as_message(), "inputs": worker.as_message(quantization.inputs)}


def _state(op: OnnxOp, after: Mapping[str, tuple[str, int]]) -> LayerState:
    """Return what became of an op: its weight W is quantized where the product holds W_quantized, or W itself in float16."""
    name = str(op.weight)
    found = None if op.is_inner or op.weight is None else after.get(name, after.get(f"{name}_quantized"))
    dtype, size = found or (op.dtype, op.weight_bytes)
    return LayerState(op, dtype, size, has_smaller_weights=dtype != op.dtype and size < op.weight_bytes)
