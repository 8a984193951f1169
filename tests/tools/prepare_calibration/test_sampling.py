"""Samples spread over what there is, none twice, never more of one picture than asked for."""

import itertools

import numpy as np
import pytest

from shared.media.images import Pixels
from tools.prepare_calibration.sampling import CANDIDATES, MOST_OVERLAP, Box, Candidate, Look, choose, draw_boxes, look_at


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    return rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def candidate(source: int, *, box: Box | None = None, look: tuple[float, float, float] = (128, 40, 10)) -> Candidate:
    """Return a candidate whose thumbnail is like no other's."""
    thumbnail = np.random.default_rng([source, *(box or ())]).bytes(64)
    return Candidate(source, None, box, Look(*look, thumbnail))


def overlap(one: Box, other: Box) -> float:
    width, height = (max(min(one[n + 2], other[n + 2]) - max(one[n], other[n]), 0) for n in (0, 1))
    return width * height / ((one[2] - one[0]) * (one[3] - one[1]))


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


def test_a_look_is_brightness_contrast_detail_and_a_thumbnail() -> None:
    pixels = np.zeros((16, 8, 3), np.uint8)
    pixels[:, 4:] = 200
    look = look_at(pixels)
    assert (look.brightness, look.contrast) == (100, 100)
    assert look.detail == pytest.approx((0 + 200 / 7) / 2)  # one of seven steps to the right, none down
    np.testing.assert_array_equal(np.frombuffer(look.thumbnail, np.uint8).reshape(8, 8)[3], [0] * 4 + [200] * 4)


def test_brightness_is_luma() -> None:
    green = np.zeros((8, 8, 3), np.uint8)
    green[..., 1] = 255
    assert look_at(green).brightness == pytest.approx(0.587 * 255, abs=1)


def test_the_smallest_pictures_have_a_look() -> None:
    for height, width in ((1, 1), (1, 9), (9, 1)):
        assert np.isfinite(look_at(noise(height, width)).detail)


def test_no_more_than_asked_for_and_all_where_there_are_fewer() -> None:
    candidates = [candidate(number, look=(number, number, number)) for number in range(20)]
    for count, taken in ((7, 7), (20, 20), (50, 20)):
        chosen, duplicates = choose(candidates, count, 1, rng())
        assert (len(chosen), len(set(chosen)), duplicates) == (taken, taken, 0)
    assert choose([], 5, 1, rng()) == ([], 0)


def test_a_seed_decides_the_choice() -> None:
    candidates = [candidate(number, look=(number, number, number)) for number in range(40)]
    one, again, other = (choose(candidates, 10, 1, rng(seed))[0] for seed in (3, 3, 4))
    assert one == again
    assert one != other


def test_one_picture_gives_no_more_than_its_share() -> None:
    boxes = [(left, 0, left + 10, 10) for left in range(0, 100, 10)]
    candidates = [candidate(source, box=box) for source in range(2) for box in boxes]
    chosen, duplicates = choose(candidates, 99, 3, rng())
    assert [sum(one.source == source for one in chosen) for source in range(2)] == [3, 3]
    assert duplicates == 0


def test_frames_of_a_video_are_pictures_of_their_own() -> None:
    look = candidate(0).look
    frames = [Candidate(0, number, None, Look(9, 9, 9, rng(number).bytes(64))) for number in range(3)]
    assert len(choose(frames, 9, 1, rng())[0]) == 3
    assert len(choose([Candidate(0, None, None, look)] * 3, 9, 3, rng())[0]) == 1  # the whole image is itself


def test_tiles_of_one_picture_overlap_by_half_at_most() -> None:
    boxes = draw_boxes(noise(60, 60), 32, 20, rng())
    chosen, duplicates = choose([candidate(0, box=box) for box in boxes], 99, 99, rng())
    shares = [overlap(one.box, other.box) for one, other in itertools.combinations(chosen, 2) if one.box and other.box]
    assert len(chosen) >= 3
    assert 0 < max(shares) <= MOST_OVERLAP
    assert duplicates == len(boxes) - len(chosen)
    halves = [candidate(0, box=(left, 0, left + 10, 10)) for left in (0, 5)]
    assert len(choose(halves, 9, 9, rng())[0]) == 2
    assert len(choose([*halves[:1], candidate(0, box=(4, 0, 14, 10))], 9, 9, rng())[0]) == 1


def test_near_duplicates_are_passed_over_and_counted() -> None:
    grey = np.full(64, 100, np.uint8)
    looks = [Look(100, 0, 0, (grey + np.uint8(more)).tobytes()) for more in (0, 1, 2, 40)]
    candidates = [Candidate(number, None, None, look) for number, look in enumerate(looks)]
    chosen, duplicates = choose(candidates[:2], 9, 1, rng())
    assert (len(chosen), duplicates) == (1, 1)
    apart = [candidates[0], *candidates[2:]]  # two grey levels are no duplicate any more
    assert choose(apart, 9, 1, rng())[1] == 0
    chosen, duplicates = choose(candidates, 9, 1, rng(), avoid=candidates[:1])
    assert ({one.source for one in chosen}, duplicates) == ({2, 3}, 2)


def skewed(few: int, many: int, seed: int) -> list[Candidate]:
    """Return `few` bright and detailed candidates, sources 0 and up, then `many` dark and flat ones."""
    drawn = rng(seed)
    bright = drawn.normal((200, 60, 30), (10, 5, 3), (few, 3))
    dark = drawn.normal((40, 8, 2), (5, 2, 0.3), (many, 3))
    return [candidate(number, look=tuple(row)) for number, row in enumerate([*bright, *dark])]


def test_every_third_of_brightness_is_chosen_from() -> None:
    candidates = [candidate(number, look=(number, 40, 10)) for number in range(90)]
    chosen, _ = choose(candidates, 9, 1, rng())
    assert {one.source // 30 for one in chosen} == {0, 1, 2}


def test_a_skewed_set_gives_of_its_few_bright_ones_and_of_its_many_dark_ones() -> None:
    few, many, count = 5, 95, 10
    for seed in range(20):
        chosen, _ = choose(skewed(few, many, seed), count, 1, rng(seed))
        assert 0 < sum(one.source < few for one in chosen) < count


def test_what_is_rare_is_chosen_more_often_than_by_chance() -> None:
    few, many, count = 5, 95, 10
    taken = [sum(one.source < few for one in choose(skewed(few, many, seed), count, 1, rng(seed))[0]) for seed in range(50)]
    assert np.mean(taken) > 2 * count * few / (few + many)
