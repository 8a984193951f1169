"""What a comparison found: the object that compare's table, JSON and HTML page are made from."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import RenderableType
from rich.table import Column, Table

from shared.command.resources import size_text
from shared.metrics.gates import GateResult
from shared.metrics.output_error import OutputError, size_of
from shared.runtime.benchmark import Measurement
from tools.compare.accuracy import Accuracy
from tools.compare.image_quality import ImageFindings, ImageTask, TruthScores
from tools.compare.matrix import Matrix, matrix_tables

UNDER = "bits read right under"
SHOWN_OUTPUTS = 8  # rows of single outputs; the JSON has all
NOTHING_READ = "the reference reads no message better than chance: what quantization costs is not known"
CHANCE_NOTE = " (chance)"  # the reference reads no better than a coin


@dataclass(frozen=True)
class Candidate:
    """A candidate against the reference.

    Args:
        path: The model.
        size_bytes: Its size.
        reduction: By which share of the reference's size it is smaller.
        is_alternative: Whether it may break gates.
        measurement: Times and memory; None where it does not run.
        speedup: The reference's median latency over its own.
        errors: Error of each output against the reference's.
        bit_agreement: Share of message bits read alike, over all samples.
        accuracy: What it read on images whose messages are known.
        images: How good the images are that it makes.
        problem: Why it does not run or cannot be compared; None where it can.
        gates: Gates, and whether they were kept.
        verdict: In words, whether it is faster, and where not, why.
    """

    path: Path
    size_bytes: int
    reduction: float
    is_alternative: bool = False
    measurement: Measurement | None = None
    speedup: float | None = None
    errors: list[OutputError] = field(default_factory=list)
    bit_agreement: float | None = None
    accuracy: Accuracy | None = None
    images: ImageFindings | None = None
    problem: str | None = None
    gates: list[GateResult] = field(default_factory=list)
    verdict: str = ""

    @property
    def is_inside(self) -> bool:
        """Whether it ran and kept every gate."""
        return self.problem is None and all(gate.ok for gate in self.gates)

    @property
    def cosine(self) -> float | None:
        """Smallest cosine of an output and a sample."""
        return min((error.worst_cosine for error in self.errors if error.worst_cosine is not None), default=None)

    @property
    def relative_error(self) -> float | None:
        """Largest relative error of an output, over the samples."""
        return max((error.relative_error for error in self.errors if error.relative_error is not None), default=None)

    @property
    def max_abs_error(self) -> float | None:
        """Largest absolute difference of a value."""
        return max((error.max_abs_error for error in self.errors if error.max_abs_error is not None), default=None)


@dataclass(frozen=True)
class Findings:
    """The reference, its candidates, and how they were measured.

    `smallest` and `fastest` are the best of several candidates inside all gates; None where there is just one, or none inside.
    """

    reference: Measurement
    accuracy: Accuracy | None
    candidates: list[Candidate]
    samples: int
    threads: int
    interleaved: bool
    cpu: str
    smallest: Path | None = None
    fastest: Path | None = None
    images: ImageTask | None = None
    matrix: Matrix | None = None

    @property
    def peak_rss_bytes(self) -> int:
        """Largest resident set of any model."""
        return max([self.reference.peak_rss_bytes, *(c.measurement.peak_rss_bytes for c in self.candidates if c.measurement)])

    @property
    def ok(self) -> bool:
        """Whether every candidate that is no alternative ran and kept every gate, and the embedders theirs."""
        return (self.matrix is None or self.matrix.ok) and all(one.is_inside or one.is_alternative for one in self.candidates)

    @property
    def reads_nothing(self) -> bool:
        """Whether the reference reads no marked image better than chance: then nothing is known of what a candidate loses."""
        accuracy = self.accuracy
        return accuracy is not None and all(accuracy.is_chance(condition) for condition in accuracy.conditions)

    def tables(self) -> Iterator[RenderableType]:
        """Yield the tables and sentences for a terminal."""
        names = self.labels()
        columns = [f"{name}\n{self.role(number)}" for number, name in enumerate(names)]
        table, attacks = (Table(title, *(Column(name, overflow="fold") for name in columns)) for title in ("", UNDER))
        for name, reference, of in rows(self):
            table.add_row(name, reference, *(of(candidate) for candidate in self.candidates))
        yield table
        if self.accuracy is not None:
            for condition in self.accuracy.conditions:
                values = [_accuracy_under(candidate, condition.attack) for candidate in self.candidates]
                title = condition.attack + CHANCE_NOTE * self.accuracy.is_chance(condition)
                attacks.add_row(title, f"{condition.bit_accuracy:.2%}", *values)
            yield attacks
        if self.matrix is not None:
            yield from matrix_tables(self.matrix)
        gates = Table("candidate", "gate", "value", "limit", "")
        for name, candidate in zip(names[1:], self.candidates, strict=True):
            broken = "outside" if candidate.is_alternative else "FAILED"
            for gate in candidate.gates:
                value = "none" if gate.value is None else f"{gate.value:.6g}"
                gates.add_row(name, gate.name, value, f"{gate.limit:g}", "ok" if gate.ok else broken)
        if gates.row_count:
            yield gates
        yield from (f"{name}: {candidate.verdict}" for name, candidate in zip(names[1:], self.candidates, strict=True))
        yield from self.advice()

    def labels(self) -> list[str]:
        """Return short names of the reference and each candidate: what a file's name adds to the reference's, else the name."""
        stem = self.reference.path.stem
        names = [stem, *(candidate.path.stem.removeprefix(f"{stem}_") or candidate.path.stem for candidate in self.candidates)]
        paths = [self.reference.path, *(candidate.path for candidate in self.candidates)]
        return [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]

    def role(self, number: int) -> str:
        """Return what the model of that label is: reference, candidate or alternative."""
        return "reference" if number == 0 else "alternative" if self.candidates[number - 1].is_alternative else "candidate"

    def verdict(self) -> str:
        """Return in one line whether the gates were kept, and which were not."""
        failed = [
            (label, candidate)
            for label, candidate in zip(self.labels()[1:], self.candidates, strict=True)
            if not (candidate.is_inside or candidate.is_alternative)
        ]
        broken = [f"{label} {gate.name}" for label, candidate in failed for gate in candidate.gates if not gate.ok]
        broken += [f"embedders {gate.name}" for gate in (self.matrix.gates if self.matrix else []) if not gate.ok]
        broken += [f"{label} {candidate.problem}" for label, candidate in failed if candidate.problem is not None]
        if broken:
            return f"FAILED: {'; '.join(broken)}"
        has_gates = any(one.gates for one in self.candidates) or bool(self.matrix and self.matrix.gates)
        kept = "every gate kept" if has_gates else "no gates set"
        return f"{kept}, BUT {NOTHING_READ}" if self.reads_nothing else kept

    def how(self) -> str:
        """Return in one line how it was measured."""
        order = "in turns" if self.interleaved else "one model at a time"
        return f"{self.reference.runs} runs {order}, {self.samples} samples, {self.threads} threads"

    def advice(self) -> list[str]:
        """Return which candidate to take, where there is a choice."""
        if len(self.candidates) < 2:
            return []
        if self.smallest is None or self.fastest is None:
            return ["recommended: none, no candidate is inside the gates"]
        labels = {candidate.path: label for candidate, label in zip(self.candidates, self.labels()[1:], strict=True)}
        smallest, fastest = labels[self.smallest], labels[self.fastest]
        if smallest == fastest:
            return [f"recommended: {smallest}, the smallest and the fastest inside the gates"]
        return [f"recommended: {smallest}, the smallest inside the gates; {fastest} is the fastest"]


def recommend(findings: Findings) -> Findings:
    """Name the best of several candidates inside all gates."""
    inside = [(c.size_bytes, c.measurement.median_ms, c.path) for c in findings.candidates if c.is_inside and c.measurement]
    if len(findings.candidates) < 2 or not inside:
        return findings
    return replace(findings, smallest=min(inside)[2], fastest=min(inside, key=lambda found: found[1])[2])


def _accuracy_under(candidate: Candidate, attack: str) -> str:
    return "-" if candidate.accuracy is None else f"{candidate.accuracy.under(attack).bit_accuracy:.2%}"


def rows(findings: Findings) -> Iterator[tuple[str, str, Callable[[Candidate], str]]]:
    """Yield the rows of the table: name, the reference's value, and how to get a candidate's."""
    reference, accuracy = findings.reference, findings.accuracy

    def measured(text: Callable[[Measurement], str]) -> Callable[[Candidate], str]:
        return lambda c: text(c.measurement) if c.measurement else "-"

    def number(pick: Callable[[Candidate], float | None], form: str) -> Callable[[Candidate], str]:
        return lambda c: "-" if (value := pick(c)) is None else format(value, form)

    yield "file", reference.path.name, lambda c: c.path.name
    yield "size", size_text(reference.size_bytes), lambda c: f"{size_text(c.size_bytes)} ({_change(c.reduction)})"
    yield "load", f"{reference.load_ms:.0f} ms", measured(lambda m: f"{m.load_ms:.0f} ms")
    yield "latency, median", f"{reference.median_ms:.1f} ms", measured(lambda m: f"{m.median_ms:.1f} ms")
    yield "latency, p90", f"{reference.p90_ms:.1f} ms", measured(lambda m: f"{m.p90_ms:.1f} ms")
    yield "speed-up", "1", number(lambda c: c.speedup, ".2f")
    yield "peak memory", size_text(reference.peak_rss_bytes), measured(lambda m: size_text(m.peak_rss_bytes))
    yield "kernels", reference.kernels, measured(lambda m: m.kernels)
    yield "bit agreement", "1", number(lambda c: c.bit_agreement, ".4f")
    yield "cosine, worst output", "1", number(lambda c: c.cosine, ".6f")
    yield "relative error, worst output", "0", number(lambda c: c.relative_error, ".3g")
    yield "largest difference", "0", number(lambda c: c.max_abs_error, ".3g")
    yield from _output_rows(findings.candidates)
    if findings.images is not None:
        yield from _image_rows(findings.images)
    if accuracy is None:
        return

    def answered(text: Callable[[Accuracy], str]) -> tuple[str, Callable[[Candidate], str]]:
        return text(accuracy), lambda c: text(c.accuracy) if c.accuracy else "-"

    yield "bits read right", *answered(lambda a: f"{a.clean.bit_accuracy:.2%}")
    yield "p-value, worst", *answered(lambda a: f"{a.worst('p_value'):.2g}")
    yield "margin, worst", *answered(lambda a: f"{a.worst('margin'):.2f}")
    yield "marked and detected", *answered(lambda a: f"{a.clean.detected:.1%}")
    if accuracy.clean.auc is not None:
        yield "unmarked but detected", *answered(lambda a: f"{a.clean.false_positives:.1%}")
        yield "AUC of the confidence", *answered(lambda a: f"{a.clean.auc:.4f}")


def _output_rows(candidates: Sequence[Candidate]) -> Iterator[tuple[str, str, Callable[[Candidate], str]]]:
    """Yield a row for each of several outputs: relative error and cosine; of many outputs those that are furthest off."""
    errors = [error for candidate in candidates for error in candidate.errors]
    sizes = {one.output: max(size_of(error) for error in errors if error.output == one.output) for one in errors}
    if len(sizes) < 2:
        return
    worst = sorted(sizes, key=lambda name: -sizes[name])[:SHOWN_OUTPUTS]

    def of_output(name: str) -> Callable[[Candidate], str]:
        def text(candidate: Candidate) -> str:
            error = next((error for error in candidate.errors if error.output == name), OutputError(name, problem="-"))
            if error.relative_error is None:
                return error.problem or "empty"
            return f"{error.relative_error:.3g}" + ("" if error.worst_cosine is None else f", {error.worst_cosine:.6f}")

        return text

    yield from ((f"{name}: relative error, cosine", "0, 1", of_output(name)) for name in sizes if name in worst)


def _image_rows(task: ImageTask) -> Iterator[tuple[str, str, Callable[[Candidate], str]]]:
    def of_images(text: Callable[[ImageFindings], str]) -> Callable[[Candidate], str]:
        return lambda c: text(c.images) if c.images else "-"

    yield "PSNR to the reference", "-", of_images(lambda i: f"{i.psnr_db:.2f} dB")
    yield "PSNR, worst sample", "-", of_images(lambda i: f"{i.worst_psnr_db:.2f} dB")
    yield "SSIM to the reference", "-", of_images(lambda i: "-" if i.ssim is None else f"{i.ssim:.5f}")
    if task.reference is None or task.bicubic is None:
        return
    plain, reference = task.bicubic, task.reference

    def against(scores: TruthScores | None) -> str:
        return "-" if scores is None else f"{scores.psnr_db:.2f} dB ({scores.psnr_db - plain.psnr_db:+.2f} to bicubic)"

    yield "luma PSNR to the truth", against(reference), of_images(lambda i: against(i.truth))
    yield "luma SSIM to the truth", _similar(reference), of_images(lambda i: _similar(i.truth))


def _similar(scores: TruthScores | None) -> str:
    return "-" if scores is None or scores.ssim is None else f"{scores.ssim:.4f}"


def _change(reduction: float) -> str:
    return f"{abs(reduction):.1%} {'smaller' if reduction >= 0 else 'larger'}"
