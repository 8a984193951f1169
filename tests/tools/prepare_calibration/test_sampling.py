"""Samples spread over brightness, contrast and detail, without duplicates, with a limited number from each picture."""

import itertools

import numpy as np
import pytest

from shared.media.images import Pixels
from tools.prepare_calibration.sampling import (
    CANDIDATES,
    MOST_OVERLAP,
    Box,
    Candidate,
    ImageStatistics,
    choose,
    draw_boxes,
    measure,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    return rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def candidate(source: int, *, box: Box | None = None, values: tuple[float, float, float] = (128, 40, 10)) -> Candidate:
    """Return a candidate with a unique thumbnail and these values of brightness, contrast and detail."""
    thumbnail = np.random.default_rng([source, *(box or ())]).bytes(64)
    return Candidate(source, None, box, ImageStatistics(*values, thumbnail))


def overlap(box: Box, second: Box) -> float:
    width, height = (max(min(box[n + 2], second[n + 2]) - max(box[n], second[n]), 0) for n in (0, 1))
    return width * height / ((box[2] - box[0]) * (box[3] - box[1]))


@pytest.mark.parametrize(("height", "width"), [(100, 60), (60, 100), (32, 33), (32, 32)])
def test_boxes_lie_inside_their_picture_and_differ(height: int, width: int) -> None:
    boxes = draw_boxes(noise(height, width), 32, 4, rng())
    assert 1 <= len(boxes) <= CANDIDATES * 4
    assert len(set(boxes)) == len(boxes)
    for left, top, right, bottom in boxes:
        assert (right - left, bottom - top) == (32, 32)
        assert min(left, top) >= 0
        assert (right <= width, bottom <= height) == (True, True)


def test_boxes_reach_every_edge() -> None:
    boxes = draw_boxes(noise(34, 34), 32, 50, rng())
    assert {(left, top) for left, top, _, _ in boxes} == set(itertools.product(range(3), repeat=2))


def test_a_picture_smaller_than_a_tile_has_no_boxes() -> None:
    assert draw_boxes(noise(31, 99), 32, 4, rng()) == []
    assert draw_boxes(noise(99, 31), 32, 4, rng()) == []


def test_statistics_are_brightness_contrast_detail_and_a_thumbnail() -> None:
    pixels = np.zeros((16, 8, 3), np.uint8)
    pixels[:, 4:] = 200
    statistics = measure(pixels)
    assert (statistics.brightness, statistics.contrast) == (100, 100)
    assert statistics.detail == pytest.approx((0 + 200 / 7) / 2)  # a step in each row among seven, no step in a column
    np.testing.assert_array_equal(np.frombuffer(statistics.thumbnail, np.uint8).reshape(8, 8)[3], [0] * 4 + [200] * 4)


def test_brightness_is_luma() -> None:
    green = np.zeros((8, 8, 3), np.uint8)
    green[..., 1] = 255
    assert measure(green).brightness == pytest.approx(0.587 * 255, abs=1)


def test_the_smallest_pictures_have_statistics() -> None:
    for height, width in ((1, 1), (1, 9), (9, 1)):
        assert np.isfinite(measure(noise(height, width)).detail)


def test_choose_takes_at_most_the_requested_count() -> None:
    candidates = [candidate(number, values=(number, number, number)) for number in range(20)]
    for count, taken in ((7, 7), (20, 20), (50, 20)):
        chosen, duplicates = choose(candidates, count, 1, rng())
        assert (len(chosen), len(set(chosen)), duplicates) == (taken, taken, 0)
    assert choose([], 5, 1, rng()) == ([], 0)


def test_a_seed_decides_the_choice() -> None:
    candidates = [candidate(number, values=(number, number, number)) for number in range(40)]
    first, again, different = (choose(candidates, 10, 1, rng(seed))[0] for seed in (3, 3, 4))
    assert first == again
    assert first != different


def test_a_picture_gives_no_more_samples_than_allowed() -> None:
    boxes = [(left, 0, left + 10, 10) for left in range(0, 100, 10)]
    candidates = [candidate(source, box=box) for source in range(2) for box in boxes]
    chosen, duplicates = choose(candidates, 99, 3, rng())
    assert [sum(sample.source == source for sample in chosen) for source in range(2)] == [3, 3]
    assert duplicates == 0


def test_frames_of_a_video_are_pictures_of_their_own() -> None:
    frames = [Candidate(0, number, None, ImageStatistics(9, 9, 9, rng(number).bytes(64))) for number in range(3)]
    assert len(choose(frames, 9, 1, rng())[0]) == 3
    assert len(choose([Candidate(0, None, None, candidate(0).statistics)] * 3, 9, 3, rng())[0]) == 1  # a whole image is taken once


def test_tiles_of_a_picture_overlap_by_half_at_most() -> None:
    boxes = draw_boxes(noise(60, 60), 32, 20, rng())
    chosen, duplicates = choose([candidate(0, box=box) for box in boxes], 99, 99, rng())
    shares = [overlap(a.box, b.box) for a, b in itertools.combinations(chosen, 2) if a.box and b.box]
    assert len(chosen) >= 3
    assert 0 < max(shares) <= MOST_OVERLAP
    assert duplicates == len(boxes) - len(chosen)
    halves = [candidate(0, box=(left, 0, left + 10, 10)) for left in (0, 5)]
    assert len(choose(halves, 9, 9, rng())[0]) == 2
    assert len(choose([*halves[:1], candidate(0, box=(4, 0, 14, 10))], 9, 9, rng())[0]) == 1


def test_near_duplicates_are_passed_over_and_counted() -> None:
    grey = np.full(64, 100, np.uint8)
    statistics = [ImageStatistics(100, 0, 0, (grey + np.uint8(more)).tobytes()) for more in (0, 1, 2, 40)]
    candidates = [Candidate(number, None, None, values) for number, values in enumerate(statistics)]
    chosen, duplicates = choose(candidates[:2], 9, 1, rng())
    assert (len(chosen), duplicates) == (1, 1)
    apart = [candidates[0], *candidates[2:]]  # a difference of two grey levels is no duplicate
    assert choose(apart, 9, 1, rng())[1] == 0
    chosen, duplicates = choose(candidates, 9, 1, rng(), avoid=candidates[:1])
    assert ({sample.source for sample in chosen}, duplicates) == ({2, 3}, 2)


def skewed(few: int, many: int, seed: int) -> list[Candidate]:
    """Return `few` bright and detailed candidates, sources 0 and up, then `many` dark and flat ones."""
    drawn = rng(seed)
    bright = drawn.normal((200, 60, 30), (10, 5, 3), (few, 3))
    dark = drawn.normal((40, 8, 2), (5, 2, 0.3), (many, 3))
    return [candidate(number, values=tuple(row)) for number, row in enumerate([*bright, *dark])]


def test_samples_come_from_every_third_of_the_brightness() -> None:
    candidates = [candidate(number, values=(number, 40, 10)) for number in range(90)]
    chosen, _ = choose(candidates, 9, 1, rng())
    assert {sample.source // 30 for sample in chosen} == {0, 1, 2}


def test_a_skewed_set_gives_rare_and_common_pictures() -> None:
    few, many, count = 5, 95, 10
    for seed in range(20):
        chosen, _ = choose(skewed(few, many, seed), count, 1, rng(seed))
        assert 0 < sum(sample.source < few for sample in chosen) < count


def test_rare_pictures_are_chosen_more_often_than_by_chance() -> None:
    few, many, count = 5, 95, 10
    taken = [sum(sample.source < few for sample in choose(skewed(few, many, seed), count, 1, rng(seed))[0]) for seed in range(50)]
    assert np.mean(taken) > 2 * count * few / (few + many)
