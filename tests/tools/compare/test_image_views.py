"""The images where models differ most, cut out where they do: every view at its place, pixel by pixel."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shared.formats.tensors import TensorSpec
from shared.media.images import Pixels, read_pixels
from shared.runtime.model import Source
from tests.tools.compare.test_comparison import FINDINGS, candidate, measured
from tests.tools.compare.test_page import parse
from tools.compare import page
from tools.compare.comparison import Candidate, Findings, ImageFindings, ImageTask
from tools.compare.page import AMPLIFICATIONS, BRIGHT, SIDE, WORST, worst_views, write_page

Maker = Callable[[np.ndarray], np.ndarray]  # type: ignore[type-arg]
HEIGHT, WIDTH = 150, 200  # pixels of the images; models make them twice as large


def doubled(image: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """Enlarge float32 (1, C, H, W)."""
    return np.repeat(np.repeat(image, 2, axis=2), 2, axis=3)


def damaged(top: int, left: int, step: float) -> Maker:
    """Return a model that enlarges, but adds `step` grey levels to 10x10 pixels."""

    def make(image: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        made = doubled(image).copy()
        made[:, :, top : top + 10, left : left + 10] += np.float32(step / 255)
        return made

    return make


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that says what the models of each name make."""

    def set_models(channels: int = 3, **makers: Maker) -> None:
        specs = [TensorSpec("x", (1, channels, -1, -1), "float32")]

        @contextlib.contextmanager
        def open_model(source: Source) -> Iterator[Any]:
            maker = makers[source.path.stem]
            yield SimpleNamespace(inputs=specs, outputs=specs, run=lambda inputs: ({"x": maker(inputs["x"])}, 1.0))

        monkeypatch.setattr(page, "open_model", open_model)

    return set_models


def made(name: str, decibels: list[float]) -> Candidate:
    images = ImageFindings(min(decibels), min(decibels), None, None, decibels)
    return replace(candidate(name, 900, 4), accuracy=None, images=images)


def findings(files: list[Path], candidates: list[Candidate], truths: list[Path] | None = None) -> Findings:
    task = ImageTask(files, truths or [], None, None)
    return replace(FINDINGS, reference=measured("model.onnx", 2000, 10), accuracy=None, candidates=candidates, images=task)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three images of noise, darker than what would be clipped."""
    for number in range(3):
        pixels = np.random.default_rng(number).integers(50, 150, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return [tmp_path / f"{number}.png" for number in range(3)]


def large(file: Path) -> Pixels:
    return np.asarray(doubled(read_pixels(file).transpose(2, 0, 1)[None])[0].transpose(1, 2, 0), np.uint8)


def test_views_are_cut_out_where_the_first_candidate_differs_most(install: Callable[..., None], files: list[Path]) -> None:
    install(model=doubled, model_a=damaged(200, 190, 30), model_b=damaged(20, 20, 90))
    found = findings(files[:1], [made("model_a.onnx", [30]), made("model_b.onnx", [40])])
    ((file, decibel, views),) = worst_views(found, 4)
    assert (file, decibel) == (files[0], 30)
    captions = ["input", "reference", "a", "b", "a - reference, 2 times", "b - reference, 100 times"]
    assert [caption for caption, _ in views] == captions
    assert all((pixels.shape, pixels.dtype) == ((SIDE, SIDE, 3), np.uint8) for _, pixels in views)
    shown = dict(views)
    rows, columns = np.nonzero(shown["a - reference, 2 times"][..., 0] != 128)
    top, left = 200 - rows.min(), 190 - columns.min()
    middle = (rows.min() + 5, columns.min() + 5)
    assert max(abs(place - SIDE // 2) for place in middle) <= 8
    expected = large(files[0])[top : top + SIDE, left : left + SIDE]
    for caption in ("input", "reference", "b"):
        np.testing.assert_array_equal(shown[caption], expected)
    change = np.zeros((SIDE, SIDE, 3), np.uint8)
    change[200 - top : 210 - top, 190 - left : 200 - left] = 1
    np.testing.assert_array_equal(shown["a"], expected + 30 * change)
    np.testing.assert_array_equal(shown["a - reference, 2 times"], 128 + 60 * change)
    assert (shown["b - reference, 100 times"] == 128).all(), "b is as the reference here"


@pytest.mark.parametrize(("top", "left"), [(0, 0), (0, 390), (290, 0), (290, 390)])
def test_a_cut_out_stays_inside_its_image(install: Callable[..., None], files: list[Path], top: int, left: int) -> None:
    install(model=doubled, model_a=damaged(top, left, -40))
    ((_, _, views),) = worst_views(findings(files[:1], [made("model_a.onnx", [30])]), 1)
    difference = dict(views)["a - reference, 2 times"]
    assert difference.shape == (SIDE, SIDE, 3)
    inside = slice(-10, None) if top else slice(10), slice(-10, None) if left else slice(10)
    assert (difference[inside] == 48).all()
    assert (difference != 128).sum() == 10 * 10 * 3


def test_small_images_are_shown_whole(install: Callable[..., None], tmp_path: Path) -> None:
    Image.new("RGB", (9, 7), (10, 20, 30)).save(tmp_path / "a.png")
    install(model=doubled, model_a=doubled)
    ((_, _, views),) = worst_views(findings([tmp_path / "a.png"], [made("model_a.onnx", [200])]), 1)
    assert {pixels.shape for _, pixels in views} == {(14, 18, 3)}
    assert views[-1][0] == "a - reference, 100 times"
    assert (views[-1][1] == 128).all()


@pytest.mark.parametrize(("step", "times"), [(100, 1), (60, 1), (45, 2), (9, 10), (3, 20), (0.4, 100), (140, 1)])
def test_differences_are_amplified_until_they_show(
    install: Callable[..., None], files: list[Path], step: float, times: int
) -> None:
    install(model=doubled, model_a=damaged(100, 100, step))
    ((_, _, views),) = worst_views(findings(files[:1], [made("model_a.onnx", [30])]), 1)
    caption, pixels = views[-1]
    assert caption == f"a - reference, {times} times"
    assert pixels.max() == pytest.approx(min(128 + times * step, 255), abs=1)
    assert times in AMPLIFICATIONS
    assert times == 1 or times * step <= BRIGHT


def test_the_truth_is_shown_where_it_is_known(install: Callable[..., None], files: list[Path], tmp_path: Path) -> None:
    truth = np.random.default_rng(9).integers(0, 256, (2 * HEIGHT, 2 * WIDTH, 3), np.uint8)
    Image.fromarray(truth).save(tmp_path / "truth.png")
    install(model=doubled, model_a=damaged(0, 0, 50))
    ((_, _, views),) = worst_views(findings(files[:1], [made("model_a.onnx", [30])], [tmp_path / "truth.png"]), 1)
    assert [caption for caption, _ in views][2:4] == ["a", "truth"]
    np.testing.assert_array_equal(dict(views)["truth"], truth[:SIDE, :SIDE])


def test_the_worst_images_come_first_and_no_more_than_asked_for(install: Callable[..., None], files: list[Path]) -> None:
    install(model=doubled, model_a=doubled)
    found = findings(files, [made("model_a.onnx", [40, 20, 30])])
    assert [(file, decibel) for file, decibel, _ in worst_views(found, 2)] == [(files[1], 20), (files[2], 30)]


def test_a_model_of_the_luma_is_shown_in_grey(install: Callable[..., None], files: list[Path]) -> None:
    install(channels=1, model=doubled, model_a=damaged(0, 0, 20))
    ((_, _, views),) = worst_views(findings(files[:1], [made("model_a.onnx", [30])]), 1)
    shown = dict(views)
    assert (np.ptp(shown["reference"], axis=2) == 0).all()
    assert (shown["a - reference, 5 times"][:10, :10] == 228).all()


def test_nothing_is_shown_of_what_makes_no_images(install: Callable[..., None], files: list[Path]) -> None:
    install()
    silent = replace(made("model_a.onnx", [30]), images=None)
    for found in (
        findings(files, [silent]),
        findings([], [made("model_a.onnx", [30])]),
        replace(findings(files, [made("model_a.onnx", [30])]), images=None),
    ):
        assert list(worst_views(found, 3)) == []
    whole = findings(files, [made("model_a.onnx", [30, 30, 30])])
    assert list(worst_views(whole, 3, skip=frozenset([Path("model_a.onnx")]))) == []


def test_a_candidate_that_makes_none_leaves_the_others_their_names(install: Callable[..., None], files: list[Path]) -> None:
    install(model=doubled, model_b=doubled)
    silent = replace(made("model_a.onnx", [30]), images=None, problem="crashed")
    ((_, _, views),) = worst_views(findings(files[:1], [silent, made("model_b.onnx", [50])]), 1)
    assert [caption for caption, _ in views] == ["input", "reference", "b", "b - reference, 100 times"]


def test_the_page_shows_the_cut_outs_with_captions(install: Callable[..., None], files: list[Path], tmp_path: Path) -> None:
    install(model=doubled, model_a=damaged(100, 100, 30))
    page = write_page(tmp_path / "r.html", findings(files, [made("model_a.onnx", [40, 20, 30])]))
    text = (tmp_path / "r.html").read_text()
    assert page.pictures == 3 <= WORST
    assert len(parse(text).sources) == 3 * 4
    assert "Images furthest from the reference" in text
    for caption in ("input", "reference", "a", "a - reference, 2 times"):
        assert text.count(f"<figcaption>{caption}</figcaption>") == 3
    assert text.index("1.png") < text.index("2.png") < text.index("0.png")
    assert "20.00 dB to the reference, over the whole image" in text
    assert "PSNR to the reference" in text
