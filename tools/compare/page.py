"""One self-contained HTML page of a comparison: from the object that the JSON is written from, and the images it names."""

import base64
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from markupsafe import Markup

from shared.command.errors import ToolError
from shared.command.resources import size_text
from shared.html.page import Bar, write_template
from shared.html.plots import line_plot, scatter_plot
from shared.media.images import Pixels, read_pixels
from shared.runtime.benchmark import Measurement
from tools.compare.accuracy import CLEAN, Accuracy, Reading
from tools.compare.comparison import Findings, rows
from tools.compare.image_views import worst_views

TEMPLATE = Path(__file__).with_name("page.html.jinja")
WORST = 4  # images shown
AMPLIFY = 10  # times, the watermark's residual
HIGHEST_AXIS = 0.9  # where the axis of bits read right starts at most, so that small losses look small
LARGEST_SIDE = 384  # pixels of an embedded picture


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
