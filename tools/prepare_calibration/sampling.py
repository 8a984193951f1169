"""Choose samples that spread over brightness, contrast and detail, without near-duplicates; pixels are not kept."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.media.images import Pixels

CANDIDATES = 4  # boxes drawn for each tile that an image may give
LEVELS = 3  # of brightness, contrast and detail each
TINY = 1e-6  # of a grey level; a smaller range is one level
THUMBNAIL = 8  # pixels a side, for telling near-duplicates
LEAST_DIFFERENCE = 2.0  # grey levels of 256, mean over the thumbnail; less is a near-duplicate
MOST_OVERLAP = 0.5  # of a tile with another of the same picture
Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Look:
    """What a sample looks like.

    Args:
        brightness: Mean luma, 0 to 255.
        contrast: Standard deviation of the luma.
        detail: Mean absolute difference of neighbouring pixels' luma.
        thumbnail: Luma in THUMBNAIL x THUMBNAIL cells, uint8.
    """

    brightness: float
    contrast: float
    detail: float
    thumbnail: bytes


@dataclass(frozen=True)
class Candidate:
    """A sample that could be taken.

    Args:
        source: Number of its source.
        frame: Frame number in a video.
        box: Where it lies in the picture; None for the whole.
        look: What it looks like.
        time_s: Of a video's frame.
    """

    source: int
    frame: int | None
    box: Box | None
    look: Look
    time_s: float | None = None

    @property
    def picture(self) -> tuple[int, int | None]:
        """The image or frame it comes from."""
        return self.source, self.frame


def draw_boxes(pixels: Pixels, size: int, tiles: int, rng: np.random.Generator) -> list[Box]:
    """Return random boxes of size x size pixels in a picture, CANDIDATES for each tile wanted; none where it is too small."""
    height, width = pixels.shape[:2]
    if min(height, width) < size:
        return []
    places = {(int(rng.integers(width - size + 1)), int(rng.integers(height - size + 1))): None for _ in range(CANDIDATES * tiles)}
    return [(left, top, left + size, top + size) for left, top in places]


def look_at(pixels: Pixels) -> Look:
    """Describe a sample, uint8 (H, W, 3) RGB."""
    from PIL import Image

    picture = Image.fromarray(pixels).convert("L")
    luma = np.asarray(picture, np.float32)
    steps = [np.abs(np.diff(luma, axis=axis)).mean() if luma.shape[axis] > 1 else 0.0 for axis in (0, 1)]
    thumbnail = np.asarray(picture.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX), np.uint8)
    return Look(float(luma.mean()), float(luma.std()), float(np.mean(steps)), thumbnail.tobytes())


def choose(
    candidates: Sequence[Candidate],
    count: int,
    per_picture: int,
    rng: np.random.Generator,
    *,
    avoid: Sequence[Candidate] = (),
) -> tuple[list[Candidate], int]:
    """Return up to `count` candidates and how many near-duplicates were passed over.

    The ranges of brightness, contrast and detail are cut into LEVELS equal parts each; samples come from the cells in turn, at
    random inside a cell, so that what is rare counts as much as what is common.

    Args:
        candidates: What there is.
        count: Most samples to take.
        per_picture: Most samples from one picture.
        rng: Decides among candidates alike.
        avoid: What no sample may be a near-duplicate of, beside each other.
    """
    cells: dict[tuple[int, ...], list[int]] = {}
    for number, levels in enumerate(_cells(candidates)):
        cells.setdefault(levels, []).append(number)
    order = sorted(cells)
    rng.shuffle(order)
    waiting = [[cells[levels][place] for place in rng.permutation(len(cells[levels]))] for levels in order]
    chosen: list[Candidate] = []
    taken: dict[tuple[int, int | None], list[Box | None]] = {}
    known = [_thumbnail(candidate) for candidate in avoid]
    thumbnails = np.concatenate([np.reshape(known, (-1, THUMBNAIL**2)), np.zeros((count, THUMBNAIL**2))]).astype(np.float32)
    filled, duplicates = len(known), 0
    while len(chosen) < count and any(waiting):
        for cell in waiting:
            while cell and len(chosen) < count:
                candidate = candidates[cell.pop()]
                boxes = taken.setdefault(candidate.picture, [])
                if len(boxes) >= per_picture:
                    continue
                if any(_overlap(candidate.box, other) > MOST_OVERLAP for other in boxes):
                    duplicates += 1
                    continue
                thumbnail = _thumbnail(candidate)
                if filled and np.abs(thumbnails[:filled] - thumbnail).mean(axis=1).min() < LEAST_DIFFERENCE:
                    duplicates += 1
                    continue
                thumbnails[filled] = thumbnail
                filled += 1
                chosen.append(candidate)
                boxes.append(candidate.box)
                break
    return chosen, duplicates


def _overlap(one: Box | None, other: Box | None) -> float:
    """Return which share of a box another of the same size covers; whole pictures cover each other."""
    if one is None or other is None:
        return 1.0
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0) * max(height, 0) / ((one[2] - one[0]) * (one[3] - one[1]))


def _thumbnail(candidate: Candidate) -> NDArray[np.float32]:
    return np.frombuffer(candidate.look.thumbnail, np.uint8).astype(np.float32)


def _cells(candidates: Sequence[Candidate]) -> list[tuple[int, ...]]:
    """Return for each candidate its level of brightness, contrast and detail."""
    if not candidates:
        return []
    looks = np.array([[c.look.brightness, c.look.contrast, c.look.detail] for c in candidates])
    low, high = looks.min(axis=0), looks.max(axis=0)
    levels = np.minimum((looks - low) / np.maximum(high - low, TINY) * LEVELS, LEVELS - 1).astype(int)
    return [tuple(int(level) for level in row) for row in levels]
