"""The one path of a model through a quantizer, whatever its format.

repair -> settle samples -> plan or search -> calibrate -> quantize -> benchmark next to the original -> result. The two formats
differ in their backends, `tools.quantize_tflite.backend` and `tools.quantize_onnx.backend`.
"""

import shutil
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path

from shared.calibration.samples import HeldSamples, KnownRange, Samples, guess_held, sample_for, settle_samples
from shared.command.cli import step
from shared.command.errors import ToolError
from shared.command.resources import GIB, MIB, cpu_count
from shared.formats.model_file import ModelFile
from shared.formats.tensors import by_signature
from shared.metrics.alarm import alarms
from shared.metrics.output_error import measure_errors, size_of, worst_error
from shared.quantize.backend import Backend, Candidate, Quantization, UnchangedError
from shared.quantize.coverage import covered_share
from shared.quantize.ledger import Ledger, measure_safely
from shared.quantize.request import Limits, Request
from shared.quantize.result import ORIGINAL, REFERENCE, CandidateResult, ModelResult, SearchSummary
from shared.quantize.search import Search, SearchSpace
from shared.quantize.sensitivity import LayerSensitivity, measure_sensitivity
from shared.runtime import benchmark
from shared.runtime.benchmark import ModelRun, run_benchmark
from shared.runtime.executors import finished
from shared.runtime.processes import ChildError, Workspace
from shared.runtime.speed import describe_speed

TASK_TIMEOUT_S = 3600.0
# Relative error between a model as it came and repaired: rounding in another order gives 1e-6, in float16 more.
MOST_CHANGED, MOST_CHANGED_HALVES = 1e-3, 5e-2
JOB_BASE_BYTES, JOB_BYTES_PER_BYTE = int(0.5 * GIB), 4  # memory of a candidate that is measured: libraries; times the model's size
MOST_EXPLAINED_BYTES = 64 * MIB  # of a model whose layers are measured one by one because its product is of no use


def quantize_model(  # noqa: PLR0917 - source, what to do, how, and where to
    source: ModelFile, name: str, request: Request, backend: Backend, folder: Path, target: Path
) -> ModelResult:
    """Write the product to `target` and return what became of the model.

    Args:
        source: The model.
        name: What to call it.
        request: What is asked for.
        backend: Of its format.
        folder: Folder for intermediate files; made anew.
        target: The file to write; weights of a large ONNX model go to `<target>.data`.

    Raises:
        ToolError: Damaged model, selectors that match nothing, samples that don't fit, a product that fails, or limits that no
            candidate keeps.
        UnchangedError: The recipe changes nothing.
    """
    shutil.rmtree(folder, ignore_errors=True)  # of the first time, where a product is made twice
    folder.mkdir(parents=True)
    with Workspace(folder, backend.WORKER, TASK_TIMEOUT_S) as workspace:
        with step(f"check {name}"):
            model, repairs = backend.repair(source, request, workspace)
        unmatched = backend.unmatched(model, request, name)
        quantization = _settle(name, source, model, request, backend, workspace)
        candidates, failures = _candidates(quantization, backend)
        results, interleaved = _measure(quantization, backend, candidates, is_repaired=bool(repairs))
        chosen, results = _choose(quantization, candidates, results, failures)
        rows, skipped = backend.coverage(quantization, chosen)
        if not any(row.quantized for row in rows):
            got = "; ".join(sorted({f"{row.op_type} {row.reason}" for row in rows})) or "it has no constant operands"
            what = f"recipe {chosen.request.recipe} changes no op of this model"
            raise UnchangedError(what, where=name, got=got, remedy="choose another recipe")
        sensitivity = _sensitivity(quantization, backend, chosen, results)
        peaks = [result.measurement.peak_rss_bytes for result in results if result.measurement]
        result = ModelResult(
            name=name,
            size_before_bytes=source.size_bytes,
            repairs=repairs,
            op_types=rows,
            skipped=skipped,
            unmatched=unmatched,
            coverage=covered_share(rows),
            samples=quantization.samples.count,
            measured_on=quantization.samples.note,
            is_made_up=quantization.is_made_up,
            threads=request.threads or cpu_count(),
            interleaved=interleaved,
            candidates=[*results, *failures],
            sensitivity=sensitivity,
            unmeasured="" if results else "the runtime here lacks ops of this model",
            peak_rss_bytes=max([workspace.peak_rss_bytes, *peaks]),
            **chosen.facts(),
        )
        chosen.model.move(target)
    return result


def _settle(  # noqa: PLR0917 - what a quantization is made of
    name: str, source: ModelFile, model: ModelFile, request: Request, backend: Backend, workspace: Workspace
) -> Quantization:
    """Return the quantization with its samples settled."""
    specs = backend.specs(model, name, workspace)
    if specs is None:
        for is_asked, what in (
            (bool(request.datasets()), "samples can't be run through it"),
            (bool(request.limits), "a search can't run it"),
            (request.sensitivity, "its layers can't be measured"),
        ):
            if is_asked:
                remedy = "leave out --calibration, --max-error and --sensitivity for it"
                raise ToolError(f"the runtime here lacks ops of this model: {what}", where=name, remedy=remedy)
        return Quantization(name, source, model, request, Samples(None, 0, HeldSamples(None, 0), "", []), workspace, [], [])
    inputs, outputs = specs
    given = [one and backend.bounded(one, model, inputs, name, workspace) for one in (request.calibration, request.holdout)]
    samples = settle_samples(
        inputs,
        outputs,
        size_bytes=model.size_bytes,
        where=source.path,
        calibration=given[0],
        holdout=given[1],
        known=KnownRange(request.input_range, source.input_range, model.hints, backend.ASSUMED_RANGE),
    )
    if samples.held.dataset is None or len(by_signature(inputs)) > 1:
        samples = replace(samples, held=guess_held(samples.held, model, inputs, name, request.threads or cpu_count()))
    names = [spec.name for spec in outputs]
    request.limits.require_outputs(names, [peak is not None for peak in samples.peaks], name)
    return Quantization(name, source, model, request, samples, workspace, inputs, names)


def _candidates(quantization: Quantization, backend: Backend) -> tuple[list[Candidate], list[CandidateResult]]:
    """Return a candidate for each variant of the request; of several, those that cannot be made are returned with the reason."""
    variants = backend.variants(quantization.request)
    if len(variants) == 1:
        return [_candidate(replace(quantization, request=variants[0]), backend)], []
    candidates, failures = [], []
    for variant in variants:
        try:
            candidates.append(_candidate(replace(quantization, request=variant), backend))
        except ToolError as error:
            problem = str(error).removeprefix(f"{quantization.name}: ").removeprefix(f"{quantization.source.path}: ")
            failures.append(CandidateResult(variant.recipe, None, problem=problem))
    return candidates, failures


def _candidate(quantization: Quantization, backend: Backend) -> Candidate:
    """Make one candidate, with the precision of each layer found by a search where there are limits to keep."""
    request = quantization.request
    space = backend.space(quantization) if request.limits else None
    if space is None:
        with step(f"quantize {quantization.name} with {request.expansion}"):
            return backend.quantize(quantization, None)
    if quantization.samples.held.dataset is None:
        what, remedy = "a search needs real inputs to measure on", "give --calibration FOLDER of images, .npz or manifest"
        raise ToolError(what, where=quantization.name, remedy=remedy)
    need = JOB_BASE_BYTES + JOB_BYTES_PER_BYTE * quantization.model.size_bytes
    with request.executor(need) as executor:
        quantization = _best_calibration(quantization, backend, space, executor)
        ledger = Ledger(request.ledger, backend.identity(quantization))
        try:
            found = Search(
                space,
                backend.job_maker(quantization),
                request.limits,
                request.objective,
                executor,
                ledger,
            ).run()
        except ToolError as error:
            raise type(error)(**{"where": quantization.name, **error.parts}) from None
        finally:
            ledger.close()
    used, counts = dict(sorted(Counter(found.precisions.values()).items())), (found.layers, found.measured, found.resumed)
    summary = SearchSummary(request.objective, found.share, *counts, found.left_out, used)
    try:
        with step(f"quantize {quantization.name} as found"):
            return replace(backend.quantize(quantization, found.precisions), search=summary)
    except ToolError as error:
        if not found.left_out:
            raise
        raise type(error)(**{"got": "; ".join(found.left_out), **error.parts}) from None


def _best_calibration(quantization: Quantization, backend: Backend, space: SearchSpace, executor: Executor) -> Quantization:
    """Return the way to calibrate with which the whole model, in its first choices, takes the smallest share of the limits."""
    variants = backend.search_variants(quantization)
    if len(variants) == 1:
        return variants[0]
    whole = {**space.base, **{layer: precisions[0] for layer, precisions in space.choices.items() if precisions}}
    limits = quantization.request.limits
    jobs = {executor.submit(measure_safely, backend.job_maker(one)(whole, False)): number for number, one in enumerate(variants)}
    shares = {number: limits.share(outcome.errors) for number, outcome in finished(jobs)}
    return variants[min(shares, key=lambda number: (shares[number], number))]


def _measure(
    quantization: Quantization, backend: Backend, candidates: Sequence[Candidate], *, is_repaired: bool
) -> tuple[list[CandidateResult], bool]:
    """Run the reference and all candidates; return what each measured, the reference first, and whether they ran in turns."""
    if not quantization.runs_here:
        return [], True
    source, model = quantization.source, quantization.model
    labelled = [(REFERENCE, model)] if backend.TIMES_REPAIRED else [(ORIGINAL, source)]
    labelled += [(ORIGINAL, source)] if backend.TIMES_REPAIRED and is_repaired else []
    known, request = len(labelled), quantization.request
    labelled += [(candidate.request.recipe, candidate.model) for candidate in candidates]
    with step(f"run {quantization.name} before and after"):
        given = [sample_for(sample, quantization.inputs) for sample in quantization.samples.held.load(quantization.inputs)]
        protocol = benchmark.Protocol(given, request.threads or cpu_count())
        done = run_benchmark([one for _, one in labelled], protocol)
    reference = done.runs[0]
    if isinstance(reference, ChildError):
        raise ToolError("the model does not run", where=quantization.name, got=reference, remedy="see what verify says of it")
    results = [CandidateResult(labelled[0][0], reference.measurement)]
    for (label, one), run in zip(labelled[1:], done.runs[1:], strict=True):
        results.append(_compared(label, one, run, reference, quantization.samples.peaks))
    for result in results[1:known]:
        _require_same_answers(quantization, result)
    return results, done.interleaved


def _compared(
    label: str, model: ModelFile, run: ModelRun | ChildError, reference: ModelRun, peaks: Sequence[float | None]
) -> CandidateResult:
    """Return what a model measured against the reference."""
    if isinstance(run, ChildError):
        return CandidateResult(label, None, problem=f"does not run: {run}")
    speed = describe_speed(reference.measurement, run.measurement, model)
    if run.input_types != reference.input_types or _types(run) != _types(reference):
        return CandidateResult(label, run.measurement, speed=speed)
    errors = measure_errors(reference.output_names, reference.outputs, run.outputs, peaks)
    problems = "; ".join(f"{error.output}: {error.problem}" for error in errors if error.problem)
    return CandidateResult(label, run.measurement, errors, speed, problem=problems)


def _types(run: ModelRun) -> list[str]:
    return [output.dtype.name for output in run.outputs[0]]


def _require_same_answers(quantization: Quantization, original: CandidateResult) -> None:
    """Raise ToolError where repairing the model changed its outputs."""
    most = MOST_CHANGED_HALVES if any(op.dtype.endswith("FLOAT16") for op in quantization.source.ops) else MOST_CHANGED
    if original.errors and size_of(worst := worst_error(original.errors)) > most:
        remedy = "export the model again, with a newer opset"
        raise ToolError("repairing the model changes its answers", where=quantization.source.path, got=str(worst), remedy=remedy)


def _choose(
    quantization: Quantization,
    candidates: Sequence[Candidate],
    results: list[CandidateResult],
    failures: Sequence[CandidateResult],
) -> tuple[Candidate, list[CandidateResult]]:
    """Return the only candidate, or the fastest of several inside the limits, and the results with the product marked."""
    if not quantization.runs_here:
        return candidates[0], results
    tried = results[len(results) - len(candidates) :]
    running = [
        (result.measurement.median_ms, result, one)
        for result, one in zip(tried, candidates, strict=True)
        if result.measurement is not None and not result.problem
    ]
    got = "; ".join(f"{one.label}: {one.problem or '; '.join(map(str, one.errors))}" for one in (*tried, *failures))
    if not running:
        raise ToolError("the quantized model does not run; nothing was kept", where=quantization.name, got=got)
    limits = quantization.request.limits if len(candidates) + len(failures) > 1 else Limits()
    inside = [one for one in running if limits.keeps(one[1].errors)] if limits else running
    inside = [one for one in inside if not alarms(one[1].errors, is_made_up=quantization.is_made_up)] or inside
    if not inside:
        remedy = "allow a larger error" if quantization.samples.calibration else "give --calibration, for static recipes"
        raise ToolError("no recipe keeps the limits", where=quantization.name, got=got, remedy=remedy)
    _, product, chosen = min(inside, key=lambda one: one[0])
    return chosen, [replace(result, is_product=result is product) for result in results]


def _sensitivity(
    quantization: Quantization, backend: Backend, chosen: Candidate, results: Sequence[CandidateResult]
) -> list[LayerSensitivity]:
    """Return what each quantized layer does alone, where the user asks for it, or a small model's product is of no use."""
    request = quantization.request
    errors = next((result.errors for result in results if result.is_product), [])
    is_useless = not request.allows_large_error and bool(alarms(errors, is_made_up=quantization.is_made_up))
    if not (request.sensitivity or (is_useless and quantization.model.size_bytes <= MOST_EXPLAINED_BYTES)):
        return []
    quantization = replace(quantization, request=chosen.request)
    jobs = backend.layer_jobs(quantization, chosen)
    need = JOB_BASE_BYTES + JOB_BYTES_PER_BYTE * quantization.model.size_bytes
    with quantization.request.executor(need) as executor:
        return measure_sensitivity(quantization.model.ops, jobs, executor)
