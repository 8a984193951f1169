"""Compare quantized models with their reference on the same inputs: size, speed, and how far the outputs moved.

Example:
    python -m tools.compare model.tflite model_int8.tflite --gate min_cosine=0.999 --gate min_speedup=1.5

TFLite, ONNX and torch (a checkpoint, with --model) in any mix. With --messages a detector's outputs are compared with the true
messages too, with --embedder on photos that each embedder marks; models that make images are compared image by image, with
--ground-truth against what they should make.
"""

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group as Lines
from rich.console import RenderableType

from shared.calibration.dataset import RANGES
from shared.command.cli import to_json
from shared.command.errors import DamagedError, ToolError
from shared.command.options import Overwrite, Refresh, Seed, Threads
from shared.command.resources import cpu_count, cpu_name
from shared.files import artifacts
from shared.files.plan import Plan, Product, is_same, require_report_free
from shared.files.provenance import require_checksums
from shared.formats.input_hints import InputHints
from shared.formats.model_file import ModelFile
from shared.media.attacks import Attack
from shared.networks.card import load_card
from shared.runtime.benchmark import sample_count
from shared.runtime.model import DetectorCheckpoint, Source
from shared.runtime.samples import PHOTOS, Guess
from shared.watermark.embedding import is_model
from tools.compare.accuracy import choose_labelled, parse_attacks
from tools.compare.comparison import Findings
from tools.compare.gates import read_gates, require_measurable
from tools.compare.image_quality import find_truths, images_at
from tools.compare.matrix import mark_photos, require_place_for_marks
from tools.compare.options import (
    Alternatives,
    Attacks,
    Bits,
    CardGates,
    CardName,
    Embedders,
    Gate,
    GroundTruth,
    Html,
    Images,
    Messages,
    Output,
    PixelRange,
    Runs,
    Samples,
    require_sense,
)
from tools.compare.task import CompareTask, choose_guess, choose_samples, message_length

PACKAGES = ("ai-edge-litert", "onnxruntime", "torch", "numpy", "pillow", "scikit-image")
MOST_PHOTOS = 16  # to be marked
ALL = 10**6  # samples; with a ground truth every image counts


@dataclass(frozen=True)
class Comparison:
    """Result of compare."""

    findings: Findings
    report: Product | None
    html: Product | None
    message: str

    @property
    def ok(self) -> bool:
        """Whether every candidate that is no alternative ran and kept every gate."""
        return self.findings.ok

    def __rich__(self) -> RenderableType:
        return Lines(*self.findings.tables(), self.message)


def _sources(given: Mapping[str, Any]) -> list[Source]:
    """Return the reference and all candidates, each checked as far as that does not need to run it."""
    paths = [*(given["candidates"] or ()), *(given["alternatives"] or ())]
    if twice := next((path for number, path in enumerate(paths) if path in paths[:number]), None):
        raise ToolError("a candidate is named twice", where=twice)
    card = None if given["model"] is None else load_card(given["model"])
    is_checkpoint = card is not None and not is_model(given["reference"])
    reference: Source = DetectorCheckpoint(given["reference"], card) if card and is_checkpoint else ModelFile(given["reference"])
    sources = [reference, *map(ModelFile, paths)]
    for source in sources:
        with contextlib.suppress(DamagedError):  # reported as a model that does not run
            source.check()
        require_checksums(_files(source))
    return sources


def _files(source: Source) -> list[Path]:
    try:
        return source.files
    except DamagedError:
        return [source.path]


@contextlib.contextmanager
def _marked_folder(given: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the folder for marked photos: next to the JSON file, else a temporary one."""
    output = given["output"]
    if given["embedder"] and output is not None:
        require_place_for_marks(output, replaces=given["overwrite"] or given["refresh"])
        yield output.with_name(f"{output.stem}_marked")
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _task(given: Mapping[str, Any], attacks: Sequence[Attack], folder: Path) -> CompareTask:
    """Return what is compared, from the command's parameters; photos are marked into `folder`."""
    sources, threads = _sources(given), given["threads"] or cpu_count()
    marked = None
    if given["embedder"]:
        photos = images_at(given["images"] or PHOTOS)[: given["samples"] or MOST_PHOTOS]
        marked = mark_photos(given["embedder"], given["model"], photos, folder, threads)
    labelled = marked.of(0) if marked else choose_labelled(given["messages"], given["samples"])
    images, truth = given["images"], given["ground_truth"]
    count = given["samples"] or (ALL if truth else sample_count(sources[0].size_bytes, is_seeded=images is None))
    known = RANGES[given["input_range"]] if given["input_range"] else _declared(sources[0])
    guess = _hinted(sources[0], known)
    guess = choose_guess(sources[0], threads, guess, is_made_up=images is None and not labelled)
    inputs, files = choose_samples(images, labelled, seed=given["seed"], count=count, guess=guess)
    return CompareTask(
        sources=sources,
        alternatives=len(given["alternatives"] or ()),
        nbits=message_length(given["bits"], labelled, sources),
        samples=inputs,
        runs=given["runs"],
        threads=threads,
        files=files,
        truths=find_truths(files, truth) if truth else [],
        labelled=labelled,
        attacks=[None, *attacks],
        pixel_range=guess.pixel_range,
        is_range_known=known is not None,
        marked=marked,
    )


def _declared(source: Source) -> tuple[float, float] | None:
    """Return the range of the reference's image input, as its metadata gives it."""
    try:
        return source.input_range
    except DamagedError:  # reported as a model that does not run
        return None


def _hinted(source: Source, known: tuple[float, float] | None) -> Guess:
    """Return the guess that follows from the reference's hints and from what is known of its range."""
    try:
        hints = source.hints if isinstance(source, ModelFile) else InputHints()
    except DamagedError:
        hints = InputHints()
    return Guess.of_hints(hints, known)


def compare(
    reference: Annotated[Path, typer.Argument(help="A .tflite or .onnx model, or a checkpoint with --model.")],
    candidates: Annotated[list[Path] | None, typer.Argument(help="One or more .tflite or .onnx models.")] = None,
    *,
    alternatives: Alternatives = None,
    output: Output = None,
    html: Html = None,
    model: CardName = None,
    images: Images = None,
    ground_truth: GroundTruth = None,
    input_range: PixelRange = None,
    messages: Messages = None,
    embedder: Embedders = None,
    attacks: Attacks = None,
    samples: Samples = None,
    runs: Runs = None,
    threads: Threads = None,
    bits: Bits = None,
    seed: Seed = 0,
    gates: CardGates = None,
    gate: Gate = None,
    overwrite: Overwrite = False,
    refresh: Refresh = False,
) -> Comparison:
    """Compare quantized models with their reference on the same inputs: size, speed, and how far the outputs moved.

    Models are run in turns while they fit in memory together, else one after the other. Each runs in a process of its own.

    Raises:
        ToolError: A file is missing or of another kind, or the reference itself does not run.
    """
    given = locals()
    limits = read_gates(gates, gate or ())
    require_sense(given)
    has_marks = messages is not None or embedder is not None
    met = parse_attacks("standard" if attacks is None else attacks) if has_marks else []
    kinds = {"has_messages": has_marks, "has_ground_truth": ground_truth is not None, "has_embedders": bool(embedder)}
    require_measurable(limits, met, **kinds, has_candidates=bool(candidates or alternatives))
    with _marked_folder(given) as folder:
        return _compare(given, _task(given, met, folder), limits)


def _compare(given: Mapping[str, Any], task: CompareTask, limits: Mapping[str, float]) -> Comparison:
    """Run the task and write what is asked for."""
    messages, images, html, output = given["messages"], given["images"], given["html"], given["output"]
    overwrite, refresh = given["overwrite"], given["refresh"]
    read = [*(file for source in task.sources for file in _files(source)), *([messages] if messages else []), *task.pictures()]
    read += [images] if images is not None and images.suffix == ".npz" else []
    read += given["embedder"] or []
    if html is not None:
        _require_page_free(html, output, read, overwrite=overwrite, refresh=refresh)
    plan = None if output is None else _plan(given, task, limits, read)
    findings, report = _build(plan, partial(task.find, limits))
    page = None if html is None else _write_page(html, findings, task.pictures(), overwrite=overwrite, refresh=refresh)
    return Comparison(findings, report, page, _message(findings, report, page))


def _plan(given: Mapping[str, Any], task: CompareTask, gates: Mapping[str, float], read: Sequence[Path]) -> Plan:
    """Return what decides the JSON file: latencies of one machine say nothing of another, and paths are shown."""
    card = None if given["model"] is None else load_card(given["model"])
    arguments = {
        "runs": task.runs,
        "samples": len(task.samples),
        "threads": task.threads,
        "bits": task.nbits,
        "seed": given["seed"],
        "cpu": cpu_name(),
        "gates": dict(gates),
        "card": card and {**card.as_arguments(), "ends": asdict(card) if given["embedder"] else None},
        "alternatives": task.alternatives,
        "pixel_range": list(task.pixel_range),
        "truths": len(task.truths),
        "embedders": len(given["embedder"] or ()),
        "attacks": [attack.name for attack in task.attacks if attack],
        "files": [str(path.resolve()) for path in read],
    }
    return Plan(
        given["output"],
        "compare",
        arguments,
        read,
        PACKAGES,
        overwrite=given["overwrite"],
        refresh=given["refresh"],
        is_report=True,
    )


def _require_page_free(html: Path, output: Path | None, read: Sequence[Path], *, overwrite: bool, refresh: bool) -> None:
    """Raise ToolError now for what writing the page would fail on after all the work."""
    if output is not None and is_same(html, output):
        raise ToolError("--html and --output name the same file", where=html, remedy="choose other names")
    require_report_free(html, read, overwrite=overwrite)
    if html.exists() and not (overwrite or refresh) and (output is None or not output.exists()):
        raise ToolError("the page exists", where=html, remedy="use --overwrite to replace it, or choose another name")


def _build(plan: Plan | None, find: Callable[[], Findings]) -> tuple[Findings, Product | None]:
    """Return what is found, and the JSON file where one is asked for."""
    if plan is None:
        return find(), None

    def make(draft: Path) -> Findings:
        found = find()
        draft.write_text(to_json(found) + "\n", encoding="utf-8")
        return found

    product, findings = artifacts.build(plan, Findings, make)
    return findings, product


def _write_page(path: Path, findings: Findings, pictures: list[Path], *, overwrite: bool, refresh: bool) -> Product:
    """Write the findings as one HTML page."""
    from shared.html.page import STYLE
    from tools.compare.page import TEMPLATE, Page, write_page

    arguments = {"findings": hashlib.sha256(to_json(findings).encode()).hexdigest()}
    read, packages = [TEMPLATE, STYLE, *pictures], ("jinja2", "pillow")
    plan = Plan(path, "compare", arguments, read, packages, overwrite=overwrite, refresh=refresh, is_report=True)
    product, _ = artifacts.build(plan, Page, lambda draft: write_page(draft, findings))
    return product


def _message(findings: Findings, report: Product | None, page: Product | None) -> str:
    head = f"up to date, see {report.path}: " if report is not None and report.up_to_date else ""
    see = f"; see {page.path}" if page is not None else ""
    return f"{head}{findings.verdict()} ({findings.how()}){see}"
