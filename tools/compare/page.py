"""One self-contained HTML page of a comparison: from the object that the JSON is written from, and the images it names."""

import base64
import io
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from shared.command.errors import ToolError
from shared.command.resources import size_text
from shared.formats.model_file import ModelFile
from shared.html.page import Bar, write_template
from shared.html.plots import line_plot, scatter_plot
from shared.media.images import Pixels, read_pixels
from shared.runtime.benchmark import Measurement
from shared.runtime.model import Model, open_model
from shared.runtime.samples import Guess, image_sample
from tools.compare.accuracy import CLEAN, Accuracy, Reading
from tools.compare.comparison import Findings, rows
from tools.compare.image_quality import ImageTask, as_image
from tools.compare.matrix import Matrix

TEMPLATE = Path(__file__).with_name("page.html.jinja")
WORST = 4  # images shown
AMPLIFY = 10  # times, the watermark's residual
HIGHEST_AXIS = 0.9  # where the axis of bits read right starts at most, so that small losses look small
LARGEST_SIDE = 384  # pixels of an embedded picture
SIDE = 160  # pixels of a cut-out, in the models' output
WINDOW = 16  # pixels over which a difference is added up to find its place
GREY = 128.0
AMPLIFICATIONS = (1, 2, 5, 10, 20, 50, 100)
BRIGHT = 100.0  # grey levels that the largest difference should have at most
View = tuple[str, Pixels]


@dataclass(frozen=True)
class Page:
    """What a page shows."""

    pictures: int
    plots: int


@dataclass(frozen=True)
class _Picture:
    title: str
    lines: list[str]
    views: list[tuple[str, str]]  # caption, data address


def write_page(path: Path, findings: Findings) -> Page:
    """Write the page; everything it shows is inside it.

    Raises:
        ToolError: An image it shows is gone.
    """
    labels = findings.labels()
    answered = [(n, labels[n], c.accuracy) for n, c in enumerate(findings.candidates, start=1) if c.accuracy is not None]
    attacks = list(_attack_plots(findings)) if findings.accuracy else []
    scatters = list(_scatter_plots(findings.accuracy, answered)) if findings.accuracy else []
    pictures = list(_pictures(answered[0][1], answered[0][2])) if answered else list(_images(findings))
    matrix = findings.matrix
    write_template(
        path,
        TEMPLATE,
        findings=findings,
        names=findings.labels(),
        rows=[(name, [reference, *map(of, findings.candidates)]) for name, reference, of in rows(findings)],
        sizes=list(_size_bars(findings, labels)),
        latencies=list(_latency_bars(findings, labels)),
        attacks=attacks,
        scatters=scatters,
        heat=list(_heat_rows(matrix)) if matrix else [],
        both=list(_both_ends(matrix)) if matrix else [],
        pictures=pictures,
        pictures_title="Images with the smallest margins" if answered else "Images furthest from the reference",
    )
    return Page(len(pictures), len(attacks) + len(scatters))


def _size_bars(findings: Findings, labels: list[str]) -> Iterator[Bar]:
    sizes = [findings.reference.size_bytes, *(candidate.size_bytes for candidate in findings.candidates)]
    for number, (label, size) in enumerate(zip(labels, sizes, strict=True)):
        note = f"{size / sizes[0]:.0%} of the reference" if number else "reference"
        yield Bar(number, label, size_text(size), 100 * size / max(sizes), note)


def _latency_bars(findings: Findings, labels: list[str]) -> Iterator[Bar]:
    shown: list[Measurement | None] = [findings.reference, *(candidate.measurement for candidate in findings.candidates)]
    slowest = max(measured.median_ms for measured in shown if measured)
    for number, (label, measured) in enumerate(zip(labels, shown, strict=True)):
        if measured is not None:
            note = f"{findings.reference.median_ms / measured.median_ms:.2f} times as fast" if number else "reference"
            yield Bar(number, label, f"{measured.median_ms:.2f} ms", 100 * measured.median_ms / slowest, note)


def _attack_plots(findings: Findings) -> Iterator[tuple[str, Markup]]:
    """Yield one plot for each kind of attack: its strengths from harmless to hard, the clean images first."""
    assert findings.accuracy is not None
    answers = [findings.accuracy, *(candidate.accuracy for candidate in findings.candidates)]
    names = [condition.attack for condition in findings.accuracy.conditions if condition.attack != CLEAN]
    for kind, members in groupby(names, key=lambda name: name.partition("-")[0]):
        shown = [CLEAN, *members]
        series = [[accuracy.under(name).bit_accuracy for name in shown] if accuracy else None for accuracy in answers]
        labels = ["clean", *(name.partition("-")[2] for name in shown[1:])]
        lowest = min(value for values in series if values for value in values)
        yield kind, line_plot(labels, series, low=math.floor(min(lowest, HIGHEST_AXIS) * 10) / 10)


def _scatter_plots(reference: Accuracy, answered: list[tuple[int, str, Accuracy]]) -> Iterator[tuple[str, Markup]]:
    across = [value for image in reference.logits for value in image]
    for number, label, accuracy in answered:
        up = [value for image in accuracy.logits for value in image]
        yield label, scatter_plot(across, up, number=number, x_name="reference", y_name="candidate")


def _pictures(candidate: str, accuracy: Accuracy) -> Iterator[_Picture]:
    """Yield the marked images that came closest to a wrong bit, or furthest over."""
    marked = [reading for reading in accuracy.readings if reading.margin is not None]
    for reading in sorted(marked, key=lambda reading: reading.margin or 0.0)[:WORST]:
        yield _Picture(
            title=reading.file.name,
            lines=[
                f"read by {candidate}",
                f"smallest margin {reading.margin:.2f}",
                f"bits read right {reading.bit_accuracy:.1%}, p-value {reading.p_value:.2g}",
                f"confidence logit {reading.confidence:.2f}",
            ],
            views=list(_views(reading)),
        )


def _heat_rows(matrix: Matrix) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield a row for each attack: its name, and for each cell text and colour."""
    for number, condition in enumerate(matrix.cells[0].conditions):
        shares = [cell.conditions[number].bit_accuracy for cell in matrix.cells]
        yield condition.attack, [(f"{share:.2%}", _heat(share)) for share in shares]


def _heat(share: float) -> str:
    """Return the colour of a share of bits: red at one half, which is chance, over yellow to green at all."""
    return f"hsl({120 * min(1.0, max(0.0, 2 * share - 1)) ** 4:.0f} 60% 45% / .35)"


def _both_ends(matrix: Matrix) -> Iterator[_Picture]:
    """Yield photos, each as every embedder marked it, and what it added."""
    for number, photo in enumerate(matrix.photos[:WORST]):
        original = _open(photo)
        views = [("original", _data_address(original, "JPEG"))]
        for row, marking in enumerate(matrix.markings, start=1):
            marked = _open(matrix.marked[row - 1][number])
            residual = np.clip((marked.astype(np.float32) - original) * AMPLIFY + 128, 0, 255).astype(np.uint8)
            views.append((f"marked by {row}, {marking.embedder.stem}", _data_address(marked, "JPEG")))
            views.append((f"watermark of {row}, {AMPLIFY} times", _data_address(residual, "PNG")))
        yield _Picture(photo.name, [], views)


def _images(findings: Findings) -> Iterator[_Picture]:
    """Yield what models make of the images on which they differ most."""
    for file, decibel, views in worst_views(findings, WORST):
        lines = [f"{decibel:.2f} dB to the reference, over the whole image; cut out where they differ most"]
        yield _Picture(file.name, lines, [(caption, _data_address(pixels, "PNG")) for caption, pixels in views])


def _views(reading: Reading) -> Iterator[tuple[str, str]]:
    marked = _open(reading.file)
    yield "marked", _data_address(marked, "JPEG")
    if reading.original is not None:
        original = _open(reading.original)
        yield "original", _data_address(original, "JPEG")
        if original.shape == marked.shape:
            residual = (marked.astype(np.float32) - original) * AMPLIFY + 128
            yield f"watermark, {AMPLIFY} times", _data_address(np.clip(residual, 0, 255).astype(np.uint8), "PNG")


def _open(path: Path) -> Pixels:
    if not path.is_file():
        raise ToolError("an image of the comparison is gone", where=path, remedy="run the comparison again with --overwrite")
    return read_pixels(path)


def _data_address(pixels: Pixels, form: str) -> str:
    """Return a picture as a data: address, made smaller where it is large."""
    from PIL import Image

    picture = Image.fromarray(pixels)
    picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    file = io.BytesIO()
    picture.save(file, form, quality=88, optimize=True)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def worst_views(findings: Findings, count: int, skip: frozenset[Path] = frozenset()) -> Iterator[tuple[Path, float, list[View]]]:
    """Yield the images on which the first candidate is furthest from its reference, its PSNR there, and cut-outs of them.

    The models run again on these images. Cut-outs: the image enlarged without interpolation, what reference and candidates make of
    it, the truth where known, and the amplified difference of each candidate, 128 where there is none.

    Args:
        findings: Of models that make images, run on image files.
        count: Images to show.
        skip: Models that cannot be run again.
    """
    task = findings.images
    shown = [candidate for candidate in findings.candidates if candidate.images is not None and candidate.path not in skip]
    if task is None or not task.files or not shown:
        return
    assert shown[0].images is not None
    decibels = shown[0].images.samples
    worst = sorted(range(len(decibels)), key=lambda number: decibels[number])[:count]
    names = dict(zip((candidate.path for candidate in findings.candidates), findings.labels()[1:], strict=True))
    with ExitStack() as stack:
        models = [stack.enter_context(open_model(ModelFile(path))) for path in (findings.reference.path, *(c.path for c in shown))]
        for number in worst:
            made = [_made(model, task.files[number], task) for model in models]
            yield task.files[number], decibels[number], list(_cut_outs(task, number, made, [names[c.path] for c in shown]))


def _made(model: Model, file: Path, task: ImageTask) -> NDArray[np.float32]:
    """Return the image a model makes, (H, W, 3) in 0..255, not rounded."""
    low, high = task.output_range
    outputs, _ = model.run(image_sample(model.inputs, read_pixels(file), Guess(pixel_range=task.pixel_range)))
    image = (as_image(outputs[model.outputs[0].name]) - np.float32(low)) * np.float32(255 / (high - low))
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image


def _cut_outs(task: ImageTask, number: int, made: list[NDArray[np.float32]], names: list[str]) -> Iterator[View]:
    reference, *candidates = made
    height, width = reference.shape[:2]
    top, left = _place(np.abs(candidates[0] - reference).sum(axis=2))
    place = (slice(top, top + SIDE), slice(left, left + SIDE))
    source = read_pixels(task.files[number])
    rows = np.arange(height) * source.shape[0] // height
    columns = np.arange(width) * source.shape[1] // width
    yield "input", source[rows][:, columns][place]
    yield "reference", _pixels(reference[place])
    for name, image in zip(names, candidates, strict=True):
        yield name, _pixels(image[place])
    if task.truths:
        yield "truth", read_pixels(task.truths[number])[place]
    for name, image in zip(names, candidates, strict=True):
        difference = image[place] - reference[place]
        times = max((n for n in AMPLIFICATIONS if n * np.abs(difference).max() <= BRIGHT), default=1)
        yield f"{name} - reference, {times} times", _pixels(GREY + times * difference)


def _place(difference: NDArray[np.float32]) -> tuple[int, int]:
    """Return top and left of the cut-out whose centre differs most."""
    sums = np.pad(difference.astype(np.float64), ((1, 0), (1, 0))).cumsum(axis=0).cumsum(axis=1)
    size = min(WINDOW, *difference.shape)
    areas = sums[size:, size:] - sums[:-size, size:] - sums[size:, :-size] + sums[:-size, :-size]
    y, x = np.unravel_index(int(areas.argmax()), areas.shape)
    places = ((int(y), difference.shape[0]), (int(x), difference.shape[1]))
    top, left = (min(max(at + size // 2 - SIDE // 2, 0), max(length - SIDE, 0)) for at, length in places)
    return top, left


def _pixels(image: NDArray[np.floating]) -> Pixels:
    return np.asarray(np.clip(np.rint(image), 0, 255), np.uint8)
