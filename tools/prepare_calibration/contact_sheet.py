"""Two pictures of a calibration set: a contact sheet, and a plot of the samples among all possible samples."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from shared.media.images import Pixels

CELL = 96  # pixels of a thumbnail
GAP = 4
COLUMNS = 12
PANEL = 360  # pixels of a plot
MARGIN = 40
INK, PAPER, CANDIDATE, SAMPLE, HELD = "#222222", "#ffffff", "#c8c8c8", "#1f77b4", "#d95f02"
Point = tuple[float, float, float]  # brightness, contrast, detail


def write_contact_sheet(path: Path, samples: Iterator[tuple[str, Pixels]], count: int) -> None:
    """Write all samples as thumbnails in rows, each with its name, as PNG.

    Args:
        path: The file to write.
        samples: Name and uint8 (H, W, 3) RGB of each sample.
        count: Number of samples.
    """
    from PIL import Image, ImageDraw

    rows = max(1, -(-count // COLUMNS))
    pitch = CELL + GAP
    sheet = Image.new("RGB", (min(max(count, 1), COLUMNS) * pitch + GAP, rows * (pitch + 12) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (name, pixels) in enumerate(samples):
        left, top = GAP + number % COLUMNS * pitch, GAP + number // COLUMNS * (pitch + 12)
        picture = Image.fromarray(pixels)
        picture.thumbnail((CELL, CELL))
        sheet.paste(picture, (left, top))
        draw.text((left, top + CELL), name, fill=INK)
    sheet.save(path, "PNG")


def write_coverage_plot(path: Path, candidates: Sequence[Point], samples: Sequence[Point], held: Sequence[Point]) -> None:
    """Write brightness against contrast and detail as PNG: candidates in grey, samples in blue, held-out samples in orange."""
    from PIL import Image, ImageDraw

    plot = Image.new("RGB", (2 * (PANEL + MARGIN) + MARGIN, PANEL + 2 * MARGIN), PAPER)
    draw = ImageDraw.Draw(plot)
    everything = np.array([*candidates, *samples, *held] or [(0.0, 0.0, 0.0)])
    for number, name in ((1, "contrast"), (2, "detail")):
        left, top = MARGIN + (number - 1) * (PANEL + MARGIN), MARGIN
        highest = float(max(everything[:, number].max(), 1.0))
        draw.rectangle((left, top, left + PANEL, top + PANEL), outline=INK)
        draw.text((left, top + PANEL + 6), "brightness 0 to 255", fill=INK)
        draw.text((left, top - 14), f"{name} up to {highest:.0f}", fill=INK)
        for points, colour, radius in ((candidates, CANDIDATE, 1), (samples, SAMPLE, 3), (held, HELD, 3)):
            for point in points:
                x, y = left + point[0] / 255 * PANEL, top + PANEL - point[number] / highest * PANEL
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    legend = f"{len(candidates)} candidates (grey), {len(samples)} samples (blue), {len(held)} held out (orange)"
    draw.text((MARGIN, PANEL + MARGIN + 22), legend, fill=INK)
    plot.save(path, "PNG")
