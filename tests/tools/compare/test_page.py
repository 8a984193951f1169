"""The page is whole in itself, holds the figures of its object, and takes no names for markup."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.command.errors import ToolError
from shared.html.plots import MAX_POINTS, SERIES, line_plot, scatter_plot
from tests.tools.compare.test_comparison import FINDINGS, accuracy
from tools.compare.accuracy import Reading
from tools.compare.comparison import Candidate, Findings
from tools.compare.page import WORST, write_page

VOID = {"meta", "img", "line", "circle", "polyline", "br"}


class Balanced(HTMLParser):
    """Collects tags, and fails where one is closed that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def parse(page: str) -> Balanced:
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    return parser


@pytest.fixture
def findings(tmp_path: Path) -> Findings:
    """One candidate with six marked images, the worst first."""
    readings = []
    for number in range(6):
        for kind in ("marked", "original"):
            Image.fromarray(np.full((32, 32, 3), number, np.uint8)).save(tmp_path / f"{kind}{number}.png")
        files = tmp_path / f"marked{number}.png", tmp_path / f"original{number}.png"
        readings.append(Reading(files[0], files[1], 2.5, 0.75, 0.25, float(number - 1)))
    found: Candidate = FINDINGS.candidates[0]
    read = replace(accuracy(0.75), readings=readings)
    return replace(FINDINGS, candidates=[replace(found, accuracy=read)])


def test_the_page_is_whole_in_itself(findings: Findings, tmp_path: Path) -> None:
    made = write_page(tmp_path / "r.html", findings)
    page = (tmp_path / "r.html").read_text()
    parser = parse(page)
    assert (made.pictures, made.plots) == (WORST, 2)
    assert parser.tags.count("svg") == made.plots
    assert len(parser.sources) == 3 * WORST
    assert all(source.startswith("data:image/") for source in parser.sources)
    assert not re.search(r"https?://|@import|<script|<link", page)
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page


def test_the_page_shows_the_figures_and_the_worst_images_first(findings: Findings, tmp_path: Path) -> None:
    write_page(tmp_path / "r.html", findings)
    page = (tmp_path / "r.html").read_text()
    for text in (
        "every gate kept",
        "<h2>Gates</h2>",
        "900 B",
        "4.00 ms",
        "2.50 times as fast",
        "37.50%",
        "some CPU",
        "smallest margin -1.00",
    ):
        assert text in page, text
    shown = re.findall(r"<h3>(marked\d\.png)", page)
    assert shown == [f"marked{number}.png" for number in range(WORST)]


def test_names_are_text_never_markup(findings: Findings, tmp_path: Path) -> None:
    hostile = Path('<script>alert("x")</script>&.tflite')
    candidate = replace(findings.candidates[0], path=hostile, verdict="<b>bold</b>", problem="<i>")
    write_page(tmp_path / "r.html", replace(findings, candidates=[candidate], cpu="<u>"))
    page = (tmp_path / "r.html").read_text()
    parse(page)
    assert "<script" not in page
    assert not {"b", "i", "u"} & set(parse(page).tags) - {"i"}
    assert "<b>" not in page
    assert "&lt;b&gt;bold" in page


def test_a_page_without_messages_has_bars_and_numbers_only(tmp_path: Path) -> None:
    bare = replace(FINDINGS, accuracy=None, candidates=[replace(FINDINGS.candidates[0], accuracy=None, gates=[])])
    made = write_page(tmp_path / "r.html", bare)
    page = (tmp_path / "r.html").read_text()
    parse(page)
    assert (made.pictures, made.plots) == (0, 0)
    assert "Gates" not in page
    broken = replace(bare.candidates[0], measurement=None, problem="gone")
    write_page(tmp_path / "r.html", replace(bare, candidates=[broken]))
    assert "FAILED: a gone" in (tmp_path / "r.html").read_text()


def test_a_picture_that_is_gone_is_an_error(findings: Findings, tmp_path: Path) -> None:
    (tmp_path / "original0.png").unlink()
    with pytest.raises(ToolError, match="an image of the comparison is gone"):
        write_page(tmp_path / "r.html", findings)


def test_a_candidate_without_answers_leaves_its_colour_free(findings: Findings, tmp_path: Path) -> None:
    silent = replace(findings.candidates[0], accuracy=None, problem="crashed")
    write_page(tmp_path / "r.html", replace(findings, candidates=[silent, findings.candidates[0]]))
    page = (tmp_path / "r.html").read_text()
    assert 'class="s2" points' in page
    assert 'class="s1" points' not in page


def test_colours_start_again_when_they_are_used_up(findings: Findings, tmp_path: Path) -> None:
    write_page(tmp_path / "r.html", replace(findings, candidates=findings.candidates * SERIES))
    page = (tmp_path / "r.html").read_text()
    assert set(re.findall(r'class="(?:dot |fill )?s(\d+)', page)) == set(map(str, range(SERIES)))


def test_a_name_that_is_no_text_is_escaped(findings: Findings, tmp_path: Path) -> None:
    odd = replace(findings.candidates[0], path=Path("bad\udcff.tflite"))
    write_page(tmp_path / "r.html", replace(findings, candidates=[odd]))
    assert "bad\\udcff" in (tmp_path / "r.html").read_text()


def test_lines_lie_where_their_values_are() -> None:
    plot = line_plot(["a", "b"], [[1.0, 0.5]], low=0.5)
    points = re.search(r'points="([\d.]+),([\d.]+) ([\d.]+),([\d.]+)"', plot)
    assert points is not None
    top, bottom = float(points[2]), float(points[4])
    assert (top, bottom) == (10, 174)
    assert "b: 50.00%" in plot


def test_equal_logits_lie_on_the_diagonal_and_many_are_thinned() -> None:
    values = np.linspace(-5, 5, 4 * MAX_POINTS).tolist()
    plot = scatter_plot(values, values, number=1, x_name="x", y_name="y")
    dots = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', plot)
    assert MAX_POINTS / 2 < len(dots) <= MAX_POINTS
    across, up = np.array(dots, float).T
    assert np.corrcoef(across, up)[0, 1] < -0.9999  # up is down in pixels
