"""TFLite through the quantization pipeline: what `shared.quantize.backend.Backend` asks of a format."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import ModuleType

from shared.calibration.dataset import CalibrationSet
from shared.command.cli import step
from shared.command.errors import ToolError
from shared.command.options import InputRange
from shared.command.resources import cpu_count, cpu_name
from shared.files.checksums import sha256_of
from shared.formats.model_file import ModelFile
from shared.formats.tensors import TensorSpec
from shared.formats.tflite import Op, TfliteContent, read_tflite
from shared.quantize.backend import Candidate, Quantization
from shared.quantize.coverage import LayerState, OpTypeCoverage, RuleMatches, SkippedLayer, measure_coverage
from shared.quantize.ledger import Job, MakeJob
from shared.quantize.request import Precisions, Request
from shared.quantize.search import SearchSpace
from shared.runtime.benchmark import SAMPLES
from shared.runtime.model import open_model
from shared.runtime.processes import ChildError, Workspace
from tools.quantize_tflite import worker
from tools.quantize_tflite.candidates import Subject, TfliteJob
from tools.quantize_tflite.coverage import (
    count_matches,
    deciding_rule,
    heavy_layers,
    layer_states,
    supported_recipes,
    unmatched_selectors,
    why_skipped,
)
from tools.quantize_tflite.options import TfliteSettings
from tools.quantize_tflite.recipes import (
    INPUT_OUTPUT,
    NO_QUANTIZE,
    Rules,
    assign,
    build_rules,
    leave_in_float,
    needs_calibration,
    operation_of,
    with_ends,
)

WORKER: ModuleType = worker
ASSUMED_RANGE: InputRange | None = None
TIMES_REPAIRED = False  # repairs are exact: the model as it came is the reference
BASE = "fp16"  # published bundles hold float16 weights; for float32 models they cost half the bytes and next to nothing else
STEPS = ("int8-weight-only", "int8", "weight_only_wi4_afp32", "dynamic_wi4_afp32")
STATISTICS = "calibration.json"


def repair(source: ModelFile, request: Request, workspace: Workspace) -> tuple[ModelFile, str]:
    """Return the model the quantizer can read, itself or a repaired copy, and the repairs in words."""
    settings: TfliteSettings = request.settings
    if settings.changes_nothing() and not request.limits:
        raise ToolError(f"recipe {request.recipe} changes nothing", where=source.path, remedy="choose another recipe")
    target = workspace.folder / "float.tflite"
    reply = workspace.run(
        "repair",
        "the model can't be repaired",
        source.path,
        source=str(source.path),
        target=str(target),
        add_signature=settings.is_static(),
    )
    if not reply["written"]:
        return source, ""
    workspace.restart()  # folded weights have taken memory
    return ModelFile(target), str(reply["repairs"])


def specs(model: ModelFile, name: str, workspace: Workspace) -> tuple[list[TensorSpec], list[TensorSpec]] | None:
    """Return inputs and outputs; None where the runtime lacks custom ops and only the part before them runs."""
    content = model.content
    assert isinstance(content, TfliteContent)
    part, lacks_ops = model, False
    try:
        if content.custom_ops:
            try:
                with open_model(model, kernels="xnnpack") as opened:  # it has some of MediaPipe's
                    return opened.inputs, opened.outputs
            except ChildError:
                lacks_ops = True
            cut = workspace.folder / "part.tflite"
            reply = workspace.run("cut", "the model can't be read", name, source=str(model.path), target=str(cut))
            if not reply["written"]:
                return None
            part = ModelFile(cut)
        with open_model(part, kernels="reference") as opened:  # nothing is packed
            return None if lacks_ops else (opened.inputs, opened.outputs)
    except ChildError as error:
        raise ToolError("the model does not load", where=name, got=error, remedy="choose another model") from None


def bounded(samples: CalibrationSet, *_: object) -> CalibrationSet:
    """Return the samples: TFLite keeps one sample's activations in an arena as large as the largest of them ask for."""
    return samples


def unmatched(model: ModelFile, request: Request, name: str) -> list[str]:
    """Return the selectors that match no op; outside a bundle that is an error."""
    settings, ops = request.settings, _ops(model)
    selectors = [*settings.only, *(selector for selector, _, _ in settings.rules), *settings.exclude]
    missing = unmatched_selectors(ops, selectors)
    if missing and not request.in_bundle:
        kinds = ", ".join(dict.fromkeys(op.op_type for op in ops))
        remedy = f"op types here: {kinds}; op names are in the --json report of a run without rules"
        raise ToolError(f"no op matches {', '.join(repr(text) for text in missing)}", where=name, remedy=remedy)
    return missing


def variants(request: Request) -> list[Request]:
    """Return the request itself: TFLite has no choice of recipes."""
    return [request]


def space(quantization: Quantization) -> SearchSpace:
    """Return float16 as the base, and the smaller precisions that each large layer supports."""
    excluded = quantization.request.settings.exclude
    ops = [op for op in _ops(quantization.model) if not any(one.applies(operation_of(op.op_type), op.scope) for one in excluded)]
    weighted = [op for op in ops if op.weight_bytes and supported_recipes(op, (BASE, *STEPS))]
    base = {op.name: BASE for op in weighted if supported_recipes(op, (BASE,))}
    return SearchSpace(base, {op.name: supported_recipes(op, STEPS) for op in heavy_layers(weighted)}, "float16")


def search_variants(quantization: Quantization) -> list[Quantization]:
    """Return the quantization itself: nothing is calibrated in a search."""
    return [quantization]


def job_maker(quantization: Quantization) -> MakeJob:
    """Return what makes the measurement of a candidate from its precisions, and whether to time it."""
    subject = _subject(quantization)
    return lambda precisions, is_timed: TfliteJob(subject, assign(precisions), is_timed=is_timed)


def identity(quantization: Quantization) -> dict[str, str]:
    """Return what the measurements of a search depend on."""
    versions = {name: metadata.version(name) for name in ("ai-edge-litert", "ai-edge-quantizer", "numpy")}
    subject = _subject(quantization)
    return {
        "model": subject.sha256,
        "samples": subject.calibration.sha256() if subject.calibration else "",
        "held": subject.held.sha256(),
        "corrects_bias": str(subject.corrects_bias),
        "cpu": cpu_name(),  # screening compares latencies
        "objective": quantization.request.objective,
        **versions,
    }


def quantize(quantization: Quantization, precisions: Precisions | None) -> Candidate:
    """Make a candidate by the rules of the recipe, or of a search."""
    name, request, settings = quantization.name, quantization.request, quantization.request.settings
    built = build_rules(settings.base, settings.only, settings.rules, settings.exclude)
    rules = with_ends(built, settings.io_dtype, name) if precisions is None else assign(precisions)
    matches = count_matches(_ops(quantization.model), rules)
    if precisions is None and not request.in_bundle:
        _require_matched(matches, name)
    statistics = _calibrated(quantization, rules) if needs_calibration(rules) else None
    reasons = _without_range(quantization, statistics)
    if settings.io_dtype != "float32" and worker.NO_SAMPLES in reasons.values():
        raise ToolError(f"--io-dtype {settings.io_dtype} needs samples of every signature", where=name, remedy="add them")
    few = _few(quantization.samples.calibration)
    corrects = few is not None and request.corrects_bias and statistics is None
    draft = quantization.workspace.folder / "product.tflite"
    reply = quantization.workspace.run(
        "quantize",
        f"AI Edge Quantizer failed with recipe {request.recipe}",
        name,
        original=str(quantization.source.path),
        source=str(quantization.model.path),
        draft=str(draft),
        rules=[*rules, *(leave_in_float(f"^(?:{re.escape(scope)})$") for scope in reasons)],
        statistics=str(statistics) if statistics else None,
        samples=few.as_message() if few and corrects else None,
        short_names=settings.short_names,
    )
    # With short names, coverage still goes by the names that the model came with.
    model = ModelFile(draft, read_tflite(draft.with_name(worker.NAMED)) if settings.short_names else None)
    return Candidate(
        request,
        model,
        corrected_biases=int(reply["corrected"]),
        saved_name_bytes=int(reply["saved"]),
        rules=rules,
        matches=matches,
        calibration=None if statistics == settings.statistics else statistics,
        float_layers={scope.removesuffix(";"): reason for scope, reason in reasons.items()},
    )


def coverage(quantization: Quantization, candidate: Candidate) -> tuple[list[OpTypeCoverage], list[SkippedLayer]]:
    """Return what became of the ops, and why layers were skipped."""
    states = layer_states(_ops(quantization.model), _ops(candidate.model), _ops(quantization.source))

    def why(state: LayerState) -> str:
        assert isinstance(state.layer, Op)
        return candidate.float_layers.get(state.layer.name) or why_skipped(state, candidate.rules)

    return measure_coverage(states, why)


def layer_jobs(quantization: Quantization, candidate: Candidate) -> dict[str, Job]:
    """Return layer -> measurement of the model with that layer alone quantized by the rule that decides it."""
    if needs_calibration(candidate.rules) and not quantization.request.sensitivity:
        return {}  # a product of no use is explained where that is possible
    if needs_calibration(candidate.rules):
        what = "--sensitivity measures layers of recipes without calibration"
        raise ToolError(what, where=quantization.name, remedy="leave out --sensitivity")
    subject = _subject(quantization)
    jobs: dict[str, Job] = {}
    for op in _ops(quantization.model):
        rule = deciding_rule(op, candidate.rules)
        if op.weight_bytes and op.dtype == "FLOAT32" and rule is not None and rule["algorithm_key"] != NO_QUANTIZE:
            jobs[op.name] = TfliteJob(subject, [{**rule, "regex": f"^(?:{re.escape(op.scope)})$"}], tensor=op.output)
    return jobs


def _ops(model: ModelFile) -> list[Op]:
    content = model.content
    assert isinstance(content, TfliteContent)
    return content.ops


def _subject(quantization: Quantization) -> Subject:
    """Return the repaired model and its samples, as candidates are made of them."""
    samples = quantization.samples
    return Subject(
        path=quantization.model.path,
        sha256=sha256_of(quantization.model.path),
        outputs=tuple(quantization.outputs),
        peaks=tuple(samples.peaks),
        held=samples.held,
        calibration=_few(samples.calibration),
        corrects_bias=quantization.request.corrects_bias,
    )


def _few(samples: CalibrationSet | None) -> CalibrationSet | None:
    """Return the samples that biases are corrected with."""
    return None if samples is None else replace(samples, most=samples.most or SAMPLES)


def _require_matched(matches: Sequence[RuleMatches], name: str) -> None:
    idle = [rule for rule in matches if not rule.matched and rule.operation not in INPUT_OUTPUT]
    if idle and len(idle) < len(matches):  # where no rule does anything, the reasons say more
        listed = ", ".join(f"{rule.operation} {rule.regex!r} ({rule.precision})" for rule in idle)
        raise ToolError(f"rules that match no op: {listed}", where=name, remedy="correct or remove them")


def _calibrated(quantization: Quantization, rules: Rules) -> Path:
    """Return calibration statistics: the file that was given, or a new one from the samples."""
    request, source = quantization.request, quantization.source.path
    given: Path | None = request.settings.statistics
    if given is not None:
        known = json.loads(given.read_text(encoding="utf-8")).get("metadata", {}).get("model_sha256")
        if known is not None and known != sha256_of(source):
            raise ToolError("the calibration statistics are of another model", where=given, remedy="calibrate again")
        return given
    samples = quantization.samples.calibration
    if samples is None:
        remedy = "give --calibration FOLDER of images, .npz or manifest; int8 needs no samples"
        raise ToolError(f"recipe {request.recipe} needs a calibration set", where=quantization.name, remedy=remedy)
    statistics = quantization.workspace.folder / STATISTICS
    with step(f"calibrate {quantization.name}"):
        quantization.workspace.run(
            "calibrate",
            "calibration failed",
            quantization.name,
            source=str(quantization.model.path),
            statistics=str(statistics),
            rules=rules,
            samples=samples.as_message(),
            threads=request.threads or cpu_count(),
            model_sha256=sha256_of(source),
        )
        quantization.workspace.restart()  # the calibrator holds the model twice
    return statistics


def _without_range(quantization: Quantization, statistics: Path | None) -> dict[str, str]:
    """Return the scopes of ops that stay in float as no range is known for them, and why."""
    if statistics is None:
        return {}
    given = {"source": str(quantization.model.path), "statistics": str(statistics)}
    reply = quantization.workspace.run("without_range", "could not read the model's constants", quantization.name, **given)
    scopes: dict[str, str] = reply["scopes"]
    return scopes
