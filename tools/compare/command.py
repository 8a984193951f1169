"""Compare quantized models with their reference on the same inputs: size, speed, and how far the answers moved.

Example:
    python -m tools.compare model.tflite model_int8.tflite --min-cosine 0.999 --min-speedup 1.5

TFLite, ONNX and torch (a checkpoint, with --model) in any mix. With --messages a detector's answers meet the truth too; models that
make images are compared image by image, with --truth against what they should make.
"""

import contextlib
import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Group as Lines
from rich.console import RenderableType

from shared.calibration.dataset import MANIFEST_NAME, RANGES, CalibrationSet, InputRange
from shared.command.cli import Overwrite, Refresh, Seed, Threads, to_json
from shared.command.errors import DamagedError, ToolError
from shared.command.resources import MIB, available_memory_bytes, cpu_count, cpu_name, require_disk
from shared.files import artifacts
from shared.files.artifacts import Plan, Product
from shared.files.provenance import provenance_path, require_vouched
from shared.formats.model_file import declared_range, format_of, model_files
from shared.formats.onnx_graph import why_slower
from shared.formats.tensors import TensorSpec
from shared.formats.tflite import read_dequantized_types
from shared.media.attacks import Attack, parse_attacks
from shared.media.images import images_at, read_pixels
from shared.metrics import metrics
from shared.metrics.fidelity import measure_fidelity
from shared.networks.card import load_card
from shared.runtime.benchmark import Inputs, Protocol, Shown, run_trials
from shared.runtime.model import ModelSource, memory_need_bytes
from shared.runtime.processes import ChildError
from shared.runtime.samples import image_sample, sample_inputs
from shared.watermark.message import Labelled, read_messages
from tools.compare.accuracy import Accuracy, labelled_inputs, read_accuracy
from tools.compare.comparison import Candidate, Findings, ImageFindings, ImageTask
from tools.compare.gates import Limits, limits_under_attack
from tools.compare.image_quality import TruthScores, as_image, bicubic_scores, find_truths, score, score_against_truth

PACKAGES = ("ai-edge-litert", "onnxruntime", "torch", "numpy", "pillow", "scikit-image")
LARGE_BYTES = 512 * MIB  # models above this take seconds a run
SMALL_BYTES = 16 * MIB  # models below this take milliseconds a run, and more runs to tell anything
SAMPLES, LARGE_SAMPLES = 8, 3
ALL = 10**6  # samples; with a truth every image counts
SMALL_RUNS, RUNS, LARGE_RUNS = 200, 20, 3
SLOWER = 0.97  # speed-ups below this count as slower; repeated runs of one model differ by less
MEMORY_SHARE = 0.8  # of the free memory that models loaded side by side may take

Array = NDArray[Any]


@dataclass(frozen=True)
class Comparison:
    """Result of compare."""

    findings: Findings
    report: Product | None
    html: Product | None
    message: str

    @property
    def ok(self) -> bool:
        """Whether every candidate that is no alternative ran and kept every limit."""
        return self.findings.ok

    def __rich__(self) -> RenderableType:
        return Lines(*self.findings.tables(), self.message)


def _against(reference: Shown, number: int, shown: Shown | ChildError, task: "_Task") -> Candidate:
    """Compare the candidate of that number, counted from 1, with the reference, without gates."""
    source = task.sources[number]
    size = source.size_bytes
    is_alternative = number > len(task.sources) - 1 - task.alternatives
    candidate = Candidate(source.path, size, 1 - size / reference.measured.size_bytes, is_alternative)
    if isinstance(shown, ChildError):
        return replace(candidate, error=str(shown), verdict=f"does not run: {shown}")
    measured, speedup = shown.measured, reference.measured.median_ms / shown.measured.median_ms
    if not task.files and measured.inputs != reference.measured.inputs:  # image files are the same inputs at any size
        error = f"it takes {', '.join(measured.inputs)}, its reference {', '.join(reference.measured.inputs)}"
        return replace(candidate, measured=measured, error=error, verdict=f"cannot be compared: {error}")
    try:
        are_images = reference.makes_images and shown.makes_images and task.nbits is None
        pairs = [
            (_flat(one, is_image=are_images), _flat(other, is_image=are_images))
            for one, other in zip(reference.outputs, shown.outputs, strict=True)
        ]
        return replace(
            candidate,
            measured=measured,
            speedup=speedup,
            cosine=min(metrics.cosine(one, other) for one, other in pairs),
            relative_error=max(metrics.relative_error(one, other) for one, other in pairs),
            max_abs_error=max(metrics.max_abs_error(one, other) for one, other in pairs),
            bit_agreement=None if task.nbits is None else _bit_agreement(reference.outputs, shown.outputs, task.nbits),
            accuracy=task.accuracy(shown),
            images=task.images(reference, shown),
            verdict=_verdict(source, speedup),
        )
    except ValueError as error:
        return replace(candidate, measured=measured, speedup=speedup, error=str(error), verdict=f"cannot be compared: {error}")


def _flat(outputs: list[Array], *, is_image: bool) -> Array:
    """Return all outputs of one sample as one vector; an image is the same in either layout."""
    first, *rest = outputs
    return np.concatenate([output.astype(np.float64).ravel() for output in (as_image(first) if is_image else first, *rest)])


def _bit_agreement(reference: list[list[Array]], candidate: list[list[Array]], nbits: int) -> float:
    """Return the share of bits read alike over all samples; the message is the first output, (1, 1 + nbits)."""
    one, other = (np.concatenate([outputs[0] for outputs in samples]) for samples in (reference, candidate))
    if one.shape[1:] != (1 + nbits,):
        raise ValueError(f"the output {one.shape[1:]} holds no message of {nbits} bits")
    return metrics.bit_agreement(one, other)


def _verdict(source: ModelSource, speedup: float) -> str:
    """Say in words whether the candidate is faster, and if not, why."""
    if speedup >= 1 / SLOWER:
        return f"{speedup:.2f} times faster than its reference"
    relation = f"slower than its reference ({speedup:.2f} times as fast)" if speedup < SLOWER else "as fast as its reference"
    is_tflite = source.card is None and format_of(source.path) == "tflite"
    unpacked = sorted(read_dequantized_types(source.path)) if is_tflite else []
    if unpacked:
        weights = ", ".join(unpacked)
        return f"{relation}: its {weights} weights are unpacked to float32, which saves size, not time; for speed take int8"
    if source.card is None and not is_tflite and (why := why_slower(source.path)):
        return f"{relation}: {why}"
    return f"{relation}: this CPU has no faster kernels for what it computes with; measure on the target device"


@dataclass(frozen=True)
class _Task:
    """What is compared, on which samples.

    Args:
        sources: The reference, then all candidates.
        alternatives: How many of the candidates, the last ones, may break limits.
        nbits: Message length of detectors; None for other models.
        samples: Inputs of the timed runs.
        runs: Timed runs per model.
        threads: Threads of the runtime.
        files: The images the samples come from; empty for seeded samples.
        truths: What each of them should become; empty where that is not known.
        pixel_range: What 0 and 255 become in the models' images.
        labelled: The images whose messages are known.
        attacks: None, then what these meet too.
    """

    sources: list[ModelSource]
    alternatives: int
    nbits: int | None
    samples: list[Inputs]
    runs: int
    threads: int
    files: list[Path]
    truths: list[Path]
    labelled: list[Labelled]
    attacks: list[Attack | None]
    pixel_range: tuple[float, float] = (0.0, 1.0)

    def protocol(self) -> Protocol:
        """Return how every model is run."""
        further = labelled_inputs(self.labelled, self.attacks) if self.labelled else []
        return Protocol(self.samples, self.runs, self.threads, further)

    def accuracy(self, shown: Shown) -> Accuracy | None:
        """Return what a model read on the labelled images."""
        if not self.labelled:
            return None
        return read_accuracy(self.labelled, self.attacks, [outputs[0] for outputs in shown.answers])

    def images(self, reference: Shown, shown: Shown) -> ImageFindings | None:
        """Return how good a model's images are, where it makes any and its reference does."""
        if not (reference.makes_images and shown.makes_images) or self.nbits is not None:
            return None
        pairs = [(as_image(one[0]), as_image(other[0])) for one, other in zip(reference.outputs, shown.outputs, strict=True)]
        peak = self.pixel_range[1] - self.pixel_range[0]
        scores = [score(one, other, peak) for one, other in pairs]
        whole = measure_fidelity([[one] for one, _ in pairs], [[other] for _, other in pairs], peak)
        similarities = [one.ssim for one in scores if one.ssim is not None]
        assert whole.psnr_db is not None and whole.worst_psnr_db is not None
        return ImageFindings(
            psnr_db=whole.psnr_db,
            worst_psnr_db=whole.worst_psnr_db,
            ssim=float(np.mean(similarities)) if len(similarities) == len(scores) else None,
            truth=self.truth(shown),
            samples=[one.psnr_db for one in scores],
        )

    def truth(self, shown: Shown) -> TruthScores | None:
        """Return how near a model's images are to the truth."""
        if not self.truths:
            return None
        low, high = self.pixel_range
        return score_against_truth([(outputs[0] - low) / (high - low) for outputs in shown.outputs], self.files, self.truths)

    def image_task(self, reference: Shown) -> ImageTask | None:
        """Return what went in and how good the reference's images are, where it makes any."""
        if not reference.makes_images or self.nbits is not None:
            return None
        channels = as_image(reference.outputs[0][0]).shape[2]
        plain = bicubic_scores(self.files, self.truths, channels) if self.truths else None
        return ImageTask(self.files, self.truths, self.truth(reference), plain, self.pixel_range)

    def pictures(self) -> list[Path]:
        """Return every image that is read or shown, once."""
        originals = [image.original for image in self.labelled if image.original is not None]
        return list(dict.fromkeys([*self.files, *self.truths, *(image.file for image in self.labelled), *originals]))

    def find(self, limits: Limits) -> Findings:
        """Run all models and compare them."""
        available = available_memory_bytes()
        interleaved = available is None or sum(map(memory_need_bytes, self.sources)) <= MEMORY_SHARE * available
        first, *others = run_trials(self.sources, self.protocol(), interleaved=interleaved)
        reference = self.sources[0].path
        if isinstance(first, ChildError):
            remedy = "see what verify says of it"
            raise ToolError("the reference does not run", where=reference, got=first, remedy=remedy)
        if self.nbits is not None and (shape := first.outputs[0][0].shape) != (1, 1 + self.nbits):
            raise ToolError(f"the reference's output holds no message of {self.nbits} bits", where=reference, got=shape)
        try:
            accuracy, images = self.accuracy(first), self.image_task(first)
        except ValueError as error:
            raise ToolError("the reference's answers can't be read", where=reference, got=error) from None
        compared = [_against(first, number, shown, self) for number, shown in enumerate(others, start=1)]
        compared = [replace(candidate, gates=limits.gates(candidate, accuracy, images)) for candidate in compared]
        if self.truths and images is None:
            raise ToolError("--truth is for models that make images", where=reference, remedy="leave it out")
        count = len(self.samples)
        found = Findings(first.measured, accuracy, compared, count, self.threads, interleaved, cpu_name(), images=images)
        return _recommend(found)


def _declared(reference: ModelSource) -> tuple[float, float]:
    """Return the range that a reference's metadata tells of its image input, 0 to 1 where it tells none."""
    return (declared_range(reference.path) if reference.card is None else None) or (0.0, 1.0)


def _samples(
    images: Path | None, labelled: list[Labelled], seed: int, count: int, pixel_range: tuple[float, float]
) -> tuple[list[Inputs], list[Path]]:
    """Return the inputs of the timed runs, and the files they come from.

    Of labelled images these are the marked ones: the logits of an unmarked image are noise around 0, whose direction means nothing.
    """
    if labelled:
        marked = [image for image in labelled if image.message is not None]
        return labelled_inputs(marked, [None]), [image.file for image in marked]
    if images is None:
        return [partial(sample_inputs, seed=seed + number, pixel_range=pixel_range) for number in range(count)], []
    files = _listed(images)[:count]
    return [partial(_from_file, file=file, pixel_range=pixel_range) for file in files], files


def _listed(images: Path) -> list[Path]:
    """Return image files; of a calibration set those that were held out, or else its samples."""
    if images.suffix == ".npz":
        raise ToolError("arrays can't be compared on", where=images, remedy="give images, a folder, a pattern or a manifest")
    given = CalibrationSet(images, part="holdout") if CalibrationSet(images).has_holdout() else CalibrationSet(images)
    is_set = (images / MANIFEST_NAME).is_file() or (images.suffix == ".json" and images.is_file())
    return given.images() if is_set else images_at(images)


def _from_file(specs: list[TensorSpec], file: Path, pixel_range: tuple[float, float]) -> dict[str, Array]:
    return image_sample(specs, read_pixels(file), pixel_range)


def _labelled(messages: Path | None, samples: int | None) -> list[Labelled]:
    """Return the labelled images, the first `samples` of the marked and of the unmarked where there is a limit."""
    if messages is None:
        return []
    images = read_messages(messages.absolute())
    marked = [image for image in images if image.message is not None][:samples]
    if not marked:
        raise ToolError("no image carries a message", where=messages)
    return marked + [image for image in images if image.message is None][:samples]


def _recommend(findings: Findings) -> Findings:
    """Name the best of several candidates inside all limits."""
    inside = [(c.size_bytes, c.measured.median_ms, c.path) for c in findings.candidates if c.is_inside and c.measured]
    if len(findings.candidates) < 2 or not inside:
        return findings
    return replace(findings, smallest=min(inside)[2], fastest=min(inside, key=lambda found: found[1])[2])


def compare(
    reference: Annotated[Path, typer.Argument(help="A .tflite or .onnx model, or a checkpoint with --model.")],
    candidates: Annotated[list[Path], typer.Argument(help="One or more .tflite or .onnx models.")],
    *,
    alternatives: Annotated[
        list[Path] | None, typer.Option("--alternative", help="A further candidate that may break limits; can be repeated.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the comparison as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write the comparison as one HTML page.")] = None,
    model: Annotated[str | None, typer.Option(help="Model card of a reference that is a checkpoint.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Image, folder, pattern or calibration manifest; default: seeded samples.")
    ] = None,
    truth: Annotated[
        Path | None, typer.Option(help="Folder or pattern of what --images should become, by name; for super-resolution.")
    ] = None,
    input_range: Annotated[
        InputRange | None, typer.Option(help="Range of the models' images; default: as the reference's metadata says, else 0..1.")
    ] = None,
    messages: Annotated[Path | None, typer.Option(help="JSON file of images and their messages; in place of --images.")] = None,
    attacks: Annotated[
        str | None, typer.Option(help="What images of --messages meet: standard (default), none, or as jpeg-50,crop-0.9.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Inputs; default: 8, 3 for large models, all of --messages.")] = None,
    runs: Annotated[
        int | None, typer.Option(min=1, help="Timed runs per model; default: 20, 200 for small models, 3 for large ones.")
    ] = None,
    threads: Threads = None,
    bits: Annotated[int | None, typer.Option(min=1, help="Message bits of detectors without our metadata.")] = None,
    seed: Seed = 0,
    min_bit_agreement: Annotated[float | None, typer.Option(min=0, max=1, help="Gate: share of bits read alike.")] = None,
    min_cosine: Annotated[float | None, typer.Option(min=0, max=1, help="Gate: cosine of the worst sample's outputs.")] = None,
    min_speedup: Annotated[float | None, typer.Option(min=0, help="Gate: reference's median latency over the candidate's.")] = None,
    max_size_mb: Annotated[float | None, typer.Option(min=0, help="Gate: size in MB of 2^20 bytes.")] = None,
    max_latency_ms: Annotated[float | None, typer.Option(min=0, help="Gate: median latency.")] = None,
    min_bit_accuracy: Annotated[float | None, typer.Option(min=0, max=1, help="Gate: share of bits read right.")] = None,
    min_accuracy_under: Annotated[list[str] | None, typer.Option(help="Gate under an attack, as jpeg-50=0.97.")] = None,
    max_accuracy_drop: Annotated[
        float | None, typer.Option(min=0, max=1, help="Gate: share of bits lost under any attack that leaves some to lose.")
    ] = None,
    min_psnr: Annotated[float | None, typer.Option(min=0, help="Gate: PSNR of images to the reference's, in dB.")] = None,
    min_ssim: Annotated[float | None, typer.Option(min=0, max=1, help="Gate: mean SSIM of images to the reference's.")] = None,
    max_psnr_drop: Annotated[float | None, typer.Option(help="Gate: luma PSNR to the truth lost, in dB.")] = None,
    min_psnr_gain: Annotated[float | None, typer.Option(help="Gate: luma PSNR to the truth above bicubic's, in dB.")] = None,
    min_auc: Annotated[float | None, typer.Option(min=0, max=1, help="Gate: how well confidence tells marked images.")] = None,
    overwrite: Overwrite = False,
    refresh: Refresh = False,
) -> Comparison:
    """Compare quantized models with their reference on the same inputs: size, speed, and how far the answers moved.

    Models are run in turns while they fit in memory together, else one after the other. Each runs in a process of its own.

    Raises:
        ToolError: A file is missing or of another kind, or the reference itself does not run.
    """
    _require_sense(locals())
    met = parse_attacks("standard" if attacks is None else attacks) if messages else []
    limits = Limits(
        {
            "min_bit_agreement": min_bit_agreement,
            "min_cosine": min_cosine,
            "min_speedup": min_speedup,
            "max_size_mb": max_size_mb,
            "max_latency_ms": max_latency_ms,
            "min_bit_accuracy": min_bit_accuracy,
            "max_accuracy_drop": max_accuracy_drop,
            "min_auc": min_auc,
            "min_psnr": min_psnr,
            "min_ssim": min_ssim,
            "max_psnr_drop": max_psnr_drop,
            "min_psnr_gain": min_psnr_gain,
        },
        limits_under_attack(min_accuracy_under or [], met),
    )
    card, alternatives = None if model is None else load_card(model), alternatives or []
    pressed = [*candidates, *alternatives]
    sources = [ModelSource(reference, card), *map(ModelSource, pressed)]
    if twice := next((path for number, path in enumerate(pressed) if path in pressed[:number]), None):
        raise ToolError("a candidate is named twice", where=twice)
    for source in sources:
        with contextlib.suppress(DamagedError):  # told as a model that does not run
            source.check()
        require_vouched(_files(source))
    size = sources[0].size_bytes
    is_large, is_small = size > LARGE_BYTES, size < SMALL_BYTES and images is None
    labelled = _labelled(messages, samples)
    wanted = samples or (ALL if truth else LARGE_SAMPLES if is_large else SAMPLES)
    pixel_range = RANGES[input_range] if input_range else _declared(sources[0])
    inputs, files = _samples(images, labelled, seed, wanted, pixel_range)
    task = _Task(
        sources=sources,
        alternatives=len(alternatives),
        nbits=_message_length(bits, labelled, sources),
        samples=inputs,
        runs=max(len(inputs), runs or (LARGE_RUNS if is_large else SMALL_RUNS if is_small else RUNS)),
        threads=threads or cpu_count(),
        files=files,
        truths=find_truths(files, truth) if truth else [],
        labelled=labelled,
        attacks=[None, *met],
        pixel_range=pixel_range,
    )
    read = [*(file for source in sources for file in _files(source)), *([messages] if messages else []), *task.pictures()]
    if html is not None:
        _require_page_writable(html, output, read, overwrite=overwrite, refresh=refresh)

    plan = None
    if output is not None:
        arguments: dict[str, object] = {"runs": task.runs, "samples": len(inputs), "threads": task.threads, "bits": task.nbits}
        arguments |= {"seed": seed, "cpu": cpu_name()}  # latencies of one machine say nothing of another
        arguments |= {"limits": limits.__dict__, "card": card and card.as_arguments(), "alternatives": len(alternatives)}
        arguments |= {"pixel_range": list(pixel_range), "truths": len(task.truths)}
        arguments |= {"attacks": [attack.name for attack in met], "files": [str(path.resolve()) for path in read]}  # they are shown
        plan = Plan(output, "compare", arguments, read, PACKAGES, overwrite=overwrite, refresh=refresh)
    findings, report = _build(plan, partial(task.find, limits))
    page = None if html is None else _write_page(html, findings, task.pictures(), overwrite=overwrite, refresh=refresh)
    return Comparison(findings, report, page, _message(findings, report, page))


def _require_sense(options: dict[str, Any]) -> None:
    """Raise ToolError for options that contradict each other."""
    if options["images"] is not None and options["messages"] is not None:
        raise ToolError("--images and --messages both say which images", remedy="leave out --images")
    limits = {name: value for name, value in options.items() if name.startswith(("min_", "max_")) and value is not None}
    if any(isinstance(limit, float) and not math.isfinite(limit) for limit in limits.values()):
        raise ToolError("a limit is not finite", remedy="leave it out")
    if options["truth"] is not None and options["images"] is None:
        raise ToolError("--truth needs the images to make it from", remedy="give --images")
    for name in ("max_psnr_drop", "min_psnr_gain"):
        if options[name] is not None and options["truth"] is None:
            raise ToolError(f"--{name.replace('_', '-')} needs the truth", remedy="give --images and --truth")
    for name in ("attacks", "min_bit_accuracy", "min_accuracy_under", "max_accuracy_drop", "min_auc"):
        if options[name] is not None and options["messages"] is None:
            raise ToolError(f"--{name.replace('_', '-')} needs images whose messages are known", remedy="give --messages FILE")


def _files(source: ModelSource) -> list[Path]:
    return model_files(source.path) if source.card is None else [source.path]


def _message_length(bits: int | None, labelled: list[Labelled], sources: list[ModelSource]) -> int | None:
    """Return the message length that was given, else of the labelled images, else the first that a model tells."""
    known = next((image.message.size for image in labelled if image.message is not None), None)
    if bits is not None and known is not None and bits != known:
        raise ToolError("--bits contradicts --messages", got=bits, expected=known, remedy="leave out --bits")
    return bits or known or next((found for source in sources if (found := source.nbits())), None)


def _require_page_writable(html: Path, output: Path | None, read: list[Path], *, overwrite: bool, refresh: bool) -> None:
    """Raise ToolError now for what writing the page would fail on after all the work."""
    written = {os.path.realpath(path) for path in (html, provenance_path(html))}
    reports = () if output is None else (output, provenance_path(output))
    if written & {os.path.realpath(path) for path in reports}:
        raise ToolError("--html and --output name the same file, or one's provenance", where=html, remedy="choose other names")
    if any(os.path.samefile(path, other) for path in written if os.path.exists(path) for other in read):  # noqa: PTH110, PTH121
        raise ToolError("the page would replace a file it is made from", where=html, remedy="choose another name")
    require_disk(0, html.parent, "write the page")
    artifacts.require_not_anothers(html, overwrite=overwrite)
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
    packages = ("jinja2", "pillow")
    plan = Plan(path, "compare", arguments, [TEMPLATE, STYLE, *pictures], packages, overwrite=overwrite, refresh=refresh)
    product, _ = artifacts.build(plan, Page, lambda draft: write_page(draft, findings))
    return product


def _message(findings: Findings, report: Product | None, page: Product | None) -> str:
    head = f"up to date, see {report.path}: " if report is not None and report.up_to_date else ""
    see = f"; see {page.path}" if page is not None else ""
    return f"{head}{findings.verdict()} ({findings.how()}){see}"
