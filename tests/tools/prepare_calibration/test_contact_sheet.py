"""The pictures of a calibration set show every sample at its place."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from tools.prepare_calibration.contact_sheet import (
    CANDIDATE,
    CELL,
    COLUMNS,
    GAP,
    HELD,
    INK,
    MARGIN,
    PANEL,
    PAPER,
    SAMPLE,
    write_contact_sheet,
    write_coverage_plot,
)

TEXT = 12  # pixels below a thumbnail


def read(path: Path) -> np.ndarray:  # type: ignore[type-arg]
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def colours(count: int) -> list[tuple[int, int, int]]:
    return [(7 * number, 255 - 7 * number, 3 * number) for number in range(count)]


@pytest.mark.parametrize("count", [1, 5, COLUMNS, COLUMNS + 1, 2 * COLUMNS + 3])
def test_every_sample_has_its_place_on_the_sheet(tmp_path: Path, count: int) -> None:
    samples = [(f"s{number:04d}", np.full((CELL, CELL, 3), colour, np.uint8)) for number, colour in enumerate(colours(count))]
    write_contact_sheet(tmp_path / "sheet.bin", iter(samples), count)
    sheet = read(tmp_path / "sheet.bin")
    rows = -(-count // COLUMNS)
    assert sheet.shape == (rows * (CELL + GAP + TEXT) + GAP, min(count, COLUMNS) * (CELL + GAP) + GAP, 3)
    for number, colour in enumerate(colours(count)):
        left, top = GAP + number % COLUMNS * (CELL + GAP), GAP + number // COLUMNS * (CELL + GAP + TEXT)
        assert (sheet[top : top + CELL, left : left + CELL] == colour).all()
        below = sheet[top + CELL : top + CELL + TEXT, left : left + CELL]
        assert (below < 128).any(), "its name is written below it"
        assert (sheet[top : top + CELL, left - GAP : left] == 255).all()


def test_thumbnails_keep_proportions_and_small_images_keep_their_size(tmp_path: Path) -> None:
    wide, small = np.zeros((CELL, 2 * CELL, 3), np.uint8), np.zeros((10, 8, 3), np.uint8)
    write_contact_sheet(tmp_path / "sheet.png", iter([("a", wide), ("b", small)]), 2)
    sheet = read(tmp_path / "sheet.png")
    assert (sheet[GAP : GAP + CELL // 2, GAP : GAP + CELL] == 0).all()
    assert (sheet[GAP + CELL // 2 : GAP + CELL, GAP : GAP + CELL] == 255).all()
    left = GAP + CELL + GAP
    assert (sheet[GAP : GAP + 10, left : left + 8] == 0).all()
    assert (sheet[GAP + 10 : GAP + CELL, left : left + CELL] == 255).all()


def test_an_empty_sheet_is_still_a_picture(tmp_path: Path) -> None:
    write_contact_sheet(tmp_path / "sheet.png", iter([]), 0)
    assert (read(tmp_path / "sheet.png") == 255).all()


def at(plot: np.ndarray, panel: int, brightness: float, height: float) -> str:  # type: ignore[type-arg]
    """Return the colour in a panel, at a share of its height above the bottom."""
    x, y = MARGIN + panel * (PANEL + MARGIN) + brightness / 255 * PANEL, MARGIN + PANEL - height * PANEL
    return "#" + "".join(f"{int(value):02x}" for value in plot[round(y), round(x)])


def test_points_lie_where_their_values_are(tmp_path: Path) -> None:
    candidates = [(51.0, 20.0, 5.0), (204.0, 80.0, 40.0)]
    write_coverage_plot(tmp_path / "plot.png", candidates, [(102.0, 40.0, 20.0)], [(153.0, 60.0, 10.0)])
    plot = read(tmp_path / "plot.png")
    assert plot.shape == (PANEL + 2 * MARGIN, 2 * (PANEL + MARGIN) + MARGIN, 3)
    assert [at(plot, 0, 51, 0.25), at(plot, 0, 204, 1)] == [CANDIDATE, CANDIDATE]
    assert [at(plot, 1, 51, 0.125), at(plot, 1, 204, 1)] == [CANDIDATE, CANDIDATE]
    assert [at(plot, 0, 102, 0.5), at(plot, 1, 102, 0.5)] == [SAMPLE, SAMPLE]
    assert [at(plot, 0, 153, 0.75), at(plot, 1, 153, 0.25)] == [HELD, HELD]
    assert at(plot, 0, 102, 0.8) == PAPER
    assert at(plot, 0, 127, 0) == INK  # the frame


def test_samples_lie_over_candidates(tmp_path: Path) -> None:
    point = (100.0, 50.0, 9.0)
    write_coverage_plot(tmp_path / "plot.png", [point] * 50, [point], [])
    plot = read(tmp_path / "plot.png")
    assert not (plot == ImageColor.getrgb(CANDIDATE)).all(axis=2).any()
    assert (plot == ImageColor.getrgb(SAMPLE)).all(axis=2).any()


def test_a_plot_of_flat_pictures_or_of_no_pictures_is_drawn(tmp_path: Path) -> None:
    for points in ([], [(0.0, 0.0, 0.0)]):
        write_coverage_plot(tmp_path / "plot.png", points, points, [])
        assert read(tmp_path / "plot.png").shape[2] == 3
