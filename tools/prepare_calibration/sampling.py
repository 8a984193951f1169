"""Choose samples that spread over brightness, contrast and detail, without near-duplicates; pixels are not kept."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.media.images import Pixels

CANDIDATES = 4  # boxes drawn for each tile that an image may give
LEVELS = 3  # of brightness, contrast and detail each
TINY = 1e-6  # of a grey level; a smaller range is one level
THUMBNAIL = 8  # pixels a side, for finding near-duplicates
LEAST_DIFFERENCE = 2.0  # grey levels of 256, mean over the thumbnail; less is a near-duplicate
MOST_OVERLAP = 0.5  # of two tiles of the same picture
Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class ImageStatistics:
    """Statistics of a sample's pixels.

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
    """A possible sample.

    Args:
        source: Number of its source.
        frame: Frame number in a video.
        box: Its place in the picture; None for the whole picture.
        statistics: Statistics of its pixels.
        time_s: Time of a video's frame.
    """

    source: int
    frame: int | None
    box: Box | None
    statistics: ImageStatistics
    time_s: float | None = None

    @property
    def picture(self) -> tuple[int, int | None]:
        """The image or frame it comes from."""
        return self.source, self.frame


def draw_boxes(pixels: Pixels, size: int, tiles: int, rng: np.random.Generator) -> list[Box]:
    """Return random boxes of size x size pixels in a picture, CANDIDATES for each requested tile; none in a smaller picture."""
    height, width = pixels.shape[:2]
    if min(height, width) < size:
        return []
    places = {(int(rng.integers(width - size + 1)), int(rng.integers(height - size + 1))): None for _ in range(CANDIDATES * tiles)}
    return [(left, top, left + size, top + size) for left, top in places]


def measure(pixels: Pixels) -> ImageStatistics:
    """Return the statistics of a sample, uint8 (H, W, 3) RGB."""
    from PIL import Image

    picture = Image.fromarray(pixels).convert("L")
    luma = np.asarray(picture, np.float32)
    steps = [np.abs(np.diff(luma, axis=axis)).mean() if luma.shape[axis] > 1 else 0.0 for axis in (0, 1)]
    thumbnail = np.asarray(picture.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX), np.uint8)
    return ImageStatistics(float(luma.mean()), float(luma.std()), float(np.mean(steps)), thumbnail.tobytes())


def choose(
    candidates: Sequence[Candidate],
    count: int,
    per_picture: int,
    rng: np.random.Generator,
    *,
    avoid: Sequence[Candidate] = (),
) -> tuple[list[Candidate], int]:
    """Return up to `count` candidates, and the number of near-duplicates among the candidates not taken.

    The ranges of brightness, contrast and detail are cut into LEVELS equal parts each. Samples come from the cells in turn, at
    random inside a cell, so that rare pictures count as much as common ones.

    Args:
        candidates: All possible samples.
        count: Most samples to take.
        per_picture: Most samples from one picture.
        rng: Decides among candidates of one cell.
        avoid: Samples taken earlier; a near-duplicate of them is not taken either.
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
                if any(_overlap(candidate.box, box) > MOST_OVERLAP for box in boxes):
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


def _overlap(box: Box | None, second: Box | None) -> float:
    """Return the share of a box that a second box of the same size covers; two whole pictures cover each other."""
    if box is None or second is None:
        return 1.0
    width = min(box[2], second[2]) - max(box[0], second[0])
    height = min(box[3], second[3]) - max(box[1], second[1])
    return max(width, 0) * max(height, 0) / ((box[2] - box[0]) * (box[3] - box[1]))


def _thumbnail(candidate: Candidate) -> NDArray[np.float32]:
    return np.frombuffer(candidate.statistics.thumbnail, np.uint8).astype(np.float32)


def _cells(candidates: Sequence[Candidate]) -> list[tuple[int, ...]]:
    """Return for each candidate its level of brightness, contrast and detail."""
    if not candidates:
        return []
    values = np.array([[c.statistics.brightness, c.statistics.contrast, c.statistics.detail] for c in candidates])
    low, high = values.min(axis=0), values.max(axis=0)
    levels = np.minimum((values - low) / np.maximum(high - low, TINY) * LEVELS, LEVELS - 1).astype(int)
    return [tuple(int(level) for level in row) for row in levels]
