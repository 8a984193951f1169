"""Check that a TFLite or ONNX model loads, runs, repeats itself and stays in range.

Example:
    python -m tools.verify model.tflite

Nothing here says whether the model is any good: that takes a reference, see compare.
"""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table

from shared.calibration.dataset import CalibrationSet
from shared.command.cli import run, step, to_json
from shared.command.errors import DamagedError
from shared.command.options import Overwrite, Refresh, Seed, Threads
from shared.command.resources import cpu_count, size_text
from shared.files import artifacts
from shared.files.plan import Plan, Product
from shared.files.provenance import require_checksums
from shared.formats.model_file import ModelFile
from shared.formats.tensors import MESSAGE_INPUT, TensorSpec, by_signature, describe
from shared.metrics.metrics import message_bits
from shared.runtime.model import Model, open_model
from shared.runtime.processes import ChildError
from shared.runtime.samples import GUESSES, Guess, MadeUpInputsError, complete_inputs, guess_inputs, sample_inputs

PACKAGES = ("ai-edge-litert", "onnxruntime", "numpy")
REPEATS = 3
MAX_ABS = 1e4  # logits, coordinates and pixels stay far below; an overflow in some layer does not
MAX_THREADS_ERROR = 1e-5  # relative to the largest output; threads may only change the order of float sums
SHOWN_BITS = 32
FREE = -1  # an axis of any length

Outputs = list[NDArray[Any]]


@dataclass(frozen=True)
class Check:
    """One row: what was checked, what was found, what is allowed."""

    name: str
    value: str
    limit: str
    ok: bool


@dataclass(frozen=True)
class Findings:
    """All checks of one model."""

    checks: list[Check]
    load_ms: float
    run_ms: float
    peak_rss_bytes: int

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in self.checks)


@dataclass(frozen=True)
class Verification:
    """Result of verify."""

    model: Path
    findings: Findings
    report: Product | None
    message: str

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return self.findings.ok

    def __rich__(self) -> RenderableType:
        table = Table("check", "value", "limit", "", title=f"{self.model}")
        for check in self.findings.checks:
            table.add_row(check.name, check.value, check.limit, "ok" if check.ok else "FAILED")
        return Lines(table, self.message)


@dataclass(frozen=True)
class _Inputs:
    """Where inputs come from.

    Args:
        seed: Of made-up inputs.
        guess: What these look like.
        file: An .npz with real inputs, one array for each; None for made-up ones.
    """

    seed: int
    guess: Guess = GUESSES[0]
    file: Path | None = None

    def make(self, specs: list[TensorSpec], number: int) -> dict[str, NDArray[Any]]:
        """Return the inputs of one sample; of a file, those after the last are the first again."""
        if self.file is None:
            return sample_inputs(specs, self.seed + number, self.guess)
        samples = list(itertools.islice(CalibrationSet(self.file).samples(specs), number + 1))
        return complete_inputs(samples[number % len(samples)], specs, self.seed + number, self.guess)


def _run(model: Model, inputs: _Inputs, number: int = 0) -> tuple[Outputs, float]:
    """Run one sample; outputs in the model's order, and milliseconds."""
    outputs, run_ms = model.run(inputs.make(model.inputs, number))
    return [outputs[spec.name] for spec in model.outputs], run_ms


def _check_message(model: Model, sample: dict[str, NDArray[Any]], first: Outputs) -> Iterator[Check]:
    """Yield the check of an embedder's message, if there is one: all bits turned over, the output must change."""
    names = [spec.name for spec in model.inputs if spec.own_name == MESSAGE_INPUT and spec.dtype == "float32"]
    if names:
        outputs, _ = model.run({**sample, **{name: 1 - sample[name] for name in names}})
        reaction = _largest_difference(first, [outputs[spec.name] for spec in model.outputs])
        value = f"the opposite message changes the output by {reaction:.4g}"
        yield Check("reacts to its message", value, "more than 0", reaction > 0)


def _largest(outputs: Outputs) -> float:
    """Return the largest magnitude in all outputs; NaN if there is one."""
    return float(np.max([np.abs(output.astype(np.float64)).max(initial=0) for output in outputs], initial=0))


def _largest_difference(one: Outputs, other: Outputs) -> float:
    """Return the largest difference between two runs; NaN if there is one, infinite where their shapes differ."""
    if [output.shape for output in one] != [output.shape for output in other]:
        return float("inf")
    with np.errstate(invalid="ignore"):  # infinite minus infinite is NaN, which no limit lets pass
        return _largest([a.astype(np.float64) - b.astype(np.float64) for a, b in zip(one, other, strict=True)])


def _check_outputs(first: Outputs, other: Outputs, repeats: list[Outputs]) -> Iterator[Check]:
    """Yield the checks on outputs: `first` and `repeats` from one sample, `other` from another."""
    bad = sum(int((~np.isfinite(output)).sum()) for outputs in (first, other, *repeats) for output in outputs)
    yield Check("finite", f"{bad} NaN or infinite in {2 + len(repeats)} runs", "0", bad == 0)
    largest = float(np.max([_largest(first), _largest(other)]))
    yield Check("range", f"largest magnitude {largest:.4g}", f"{MAX_ABS:g}", largest <= MAX_ABS)
    reaction = _largest_difference(first, other)
    yield Check("reacts to its input", f"another sample changes the output by {reaction:.4g}", "more than 0", reaction > 0)
    drift = float(np.max([_largest_difference(first, again) for again in repeats]))
    yield Check("repeats", f"{REPEATS} runs differ by {drift:.4g}", "0", drift == 0)


def _check_detector(output: NDArray[Any], nbits: int) -> Iterator[Check]:
    """Yield the checks on a detector's output, float32 (1, 1 + nbits)."""
    fits = output.shape == (1, 1 + nbits)
    yield Check("detector output", f"{output.shape}", f"(1, {1 + nbits})", fits)
    if fits:
        bits = message_bits(output)[0]
        ones = int(bits.sum())
        yield Check("confidence", f"logit {output[0, 0]:.4f}", "finite", bool(np.isfinite(output[0, 0])))
        yield Check(f"first {SHOWN_BITS} bits", "".join("01"[bit] for bit in bits[:SHOWN_BITS].astype(int)), "", ok=True)
        yield Check("bits that are one", f"{ones} of {nbits}", f"1 to {nbits - 1}", 0 < ones < nbits)


def _verify(source: ModelFile, threads: int, inputs: _Inputs, nbits: int | None) -> Findings:
    """Go through the checks in order; stop at the first that makes the next ones pointless."""
    checks: list[Check] = []
    load_ms = run_ms = 0.0
    peak = 0
    stage = "loads"
    try:
        with step(f"load and run with {threads} threads"), open_model(source, threads=threads) as model:
            load_ms = model.load_ms
            checks.append(Check("loads", f"{load_ms:.0f} ms, {model.kernels} kernels", "", ok=True))
            for name, specs in (("inputs", model.inputs), ("outputs", model.outputs)):
                known = bool(specs) and all(size > 0 or size == FREE for spec in specs for size in spec.shape)
                checks.append(Check(name, describe(specs), "at least one; -1 is any size", known))
            if not all(check.ok for check in checks):
                return Findings(checks, load_ms, run_ms, model.peak_rss_bytes)
            stage = "runs"
            if inputs.file is None or len(by_signature(model.inputs)) > 1:
                guess = Guess.of_hints(source.hints, source.input_range)
                inputs = replace(inputs, guess=guess_inputs(source, model.inputs, threads, guess))
            first, _ = _run(model, inputs)
            timed = [_run(model, inputs) for _ in range(REPEATS - 1)]
            other, _ = _run(model, inputs, 1)
            on_message = list(_check_message(model, inputs.make(model.inputs, 0), first))
            run_ms, peak = min(ms for _, ms in timed), model.peak_rss_bytes
            checks.append(Check("runs", f"{run_ms:.1f} ms", "", ok=True))
        checks += [*_check_outputs(first, other, [outputs for outputs, _ in timed]), *on_message]
        stage = "threads"
        if threads > 1:
            with step("run with 1 thread"), open_model(source, threads=1) as model:
                alone, _ = _run(model, inputs)
            error = _largest_difference(first, alone) / (_largest(first) or 1.0)
            value = f"1 and {threads} threads differ by {error:.2g} of the largest output"
            checks.append(Check("threads", value, f"{MAX_THREADS_ERROR:g}", error <= MAX_THREADS_ERROR))
    except ChildError as error:
        hint = "; give real inputs with --inputs FILE.npz" if isinstance(error, MadeUpInputsError) else ""
        checks.append(Check(stage, f"{error}{hint}", "", ok=False))
        return Findings(checks, load_ms, run_ms, peak)
    if nbits is not None:
        checks += _check_detector(first[0], nbits)
    return Findings(checks, load_ms, run_ms, peak)


def _files(source: ModelFile) -> list[Path]:
    try:
        return source.files
    except DamagedError:  # a failed check, once it is to be loaded
        return [source.path]


def _nbits(source: ModelFile) -> int | None:
    try:
        return source.nbits
    except DamagedError:
        return None


def verify(
    model: Annotated[Path, typer.Argument(help="The .tflite or .onnx model.")],
    *,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the checks as JSON.")] = None,
    threads: Threads = None,
    inputs: Annotated[Path | None, typer.Option(help="An .npz with one array for each input; default: made-up inputs.")] = None,
    bits: Annotated[int | None, typer.Option(min=1, help="Message bits of a detector without our metadata.")] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    refresh: Refresh = False,
) -> Verification:
    """Check that a TFLite or ONNX model loads, runs, repeats itself and stays in range.

    The model runs in a process of its own: one that crashes the runtime is a failed check.

    Raises:
        ToolError: The file is missing or no model.
    """
    source = ModelFile(model)
    with contextlib.suppress(DamagedError):  # a failed check, once it is to be loaded
        source.check()
    require_checksums(_files(source))
    count, taken = threads or cpu_count(), _Inputs(seed, file=inputs)
    nbits = bits or _nbits(source)
    if output is None:
        findings, report = _verify(source, count, taken, nbits), None
    else:

        def make(draft: Path) -> Findings:
            found = _verify(source, count, taken, nbits)
            draft.write_text(to_json(found) + "\n", encoding="utf-8")
            return found

        arguments = {"threads": count, "seed": seed, "bits": nbits}
        read = [*_files(source), *([inputs] if inputs else [])]
        plan = Plan(output, "verify", arguments, read, PACKAGES, overwrite=overwrite, refresh=refresh, is_report=True)
        report, findings = artifacts.build(plan, Findings, make)
    failed = [check.name for check in findings.checks if not check.ok]
    verdict = f"FAILED: {', '.join(failed)}" if failed else f"all {len(findings.checks)} checks passed"
    if report is not None and report.up_to_date:
        verdict = f"up to date: {verdict}, see {report.path}"
    peak = f"; peak memory {size_text(findings.peak_rss_bytes)}, the mapped file included" if findings.peak_rss_bytes else ""
    return Verification(model, findings, report, verdict + peak)


if __name__ == "__main__":
    run(verify)
