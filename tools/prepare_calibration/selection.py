"""Which samples a calibration set takes: look at every source once, keep no pixels, choose samples and what to hold out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shared.command.cli import step_progress
from shared.command.errors import ToolError
from shared.media.images import Pixels, stretch
from tools.prepare_calibration.sampling import Box, Candidate, choose, draw_boxes, look_at
from tools.prepare_calibration.sources import Picture, Source, read_pictures
from tools.prepare_calibration.writer import ArrayForm

FEW_SOURCES = 4  # below this many, pictures are held out instead of whole sources


@dataclass(frozen=True)
class Skipped:
    """A source that gave no sample, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class SamplesWish:
    """What samples are wanted: `tile_size` or `resize` says what they are; the rest are prepare_calibration's options."""

    tile_size: int | None
    resize: tuple[int, int] | None
    tiles_per_image: int
    max_samples: int
    min_samples: int
    holdout: int
    seed: int
    frames_per_video: int
    scene_changes: bool
    arrays: ArrayForm | None

    def pictures(self, source: Source) -> Iterator[Picture]:
        """Yield what a source shows."""
        return read_pictures(source, frames=self.frames_per_video, at_scene_changes=self.scene_changes, size=self.side)

    @property
    def side(self) -> int:
        """The longer side of a sample in pixels."""
        sides = self.resize or (self.tile_size,)
        return max(side for side in sides if side is not None)

    def cut(self, pixels: Pixels, box: Box | None) -> Pixels:
        """Return a sample of a picture."""
        if box is not None:
            left, top, right, bottom = box
            return np.ascontiguousarray(pixels[top:bottom, left:right])
        return stretch(pixels, *self.resize) if self.resize else pixels


def look_at_all(sources: Sequence[Source], wish: SamplesWish, hashes: Mapping[str, str]) -> tuple[list[Candidate], list[Skipped]]:
    """Return every sample that could be taken, pixels not kept, and the sources that gave none.

    Args:
        sources: What to look at.
        wish: What is wanted.
        hashes: Path -> sha256; of files with the same content only the first is looked at.
    """
    candidates: list[Candidate] = []
    skipped: list[Skipped] = []
    seen: dict[str, str] = {}
    with step_progress("look at the sources", len(sources)) as advance:
        for number, source in enumerate(sources):
            found: list[Candidate] = []
            content = f"{hashes.get(str(source.path), source.name)} {source.frames} {source.times}"
            if content in seen:
                skipped.append(Skipped(source.name, f"the same as {seen[content]}"))
                advance(source.name)
                continue
            seen[content] = source.name
            try:
                for picture in wish.pictures(source):
                    found += _candidates(number, picture, wish)
            except ToolError as error:
                skipped.append(Skipped(source.name, str(error).removeprefix(f"{source.path}: ")))
            else:
                if not found:
                    skipped.append(Skipped(source.name, f"smaller than a tile of {wish.tile_size} pixels"))
                candidates += found
            advance(source.name)
    return candidates, skipped


def _candidates(number: int, picture: Picture, wish: SamplesWish) -> list[Candidate]:
    boxes: list[Box | None] = [None]
    if wish.tile_size is not None:
        rng = np.random.default_rng([wish.seed, number, picture.frame or 0])
        boxes = list(draw_boxes(picture.pixels, wish.tile_size, wish.tiles_per_image, rng))
    return [Candidate(number, picture.frame, box, look_at(wish.cut(picture.pixels, box)), picture.time_s) for box in boxes]


@dataclass(frozen=True)
class Parts:
    """What was chosen to calibrate with, what to hold out, and how many near-duplicates were passed over."""

    samples: list[Candidate]
    holdout: list[Candidate]
    duplicates: int


def choose_parts(candidates: list[Candidate], wish: SamplesWish, origins: Sequence[str]) -> Parts:
    """Choose samples and held-out ones from different files, or pictures where files are few; as few held out as will do.

    Args:
        candidates: What could be taken.
        wish: What is wanted.
        origins: For each source what tells its content from others'.
    """
    by_file = len({origins[candidate.source] for candidate in candidates}) >= FEW_SOURCES
    group_of = {c.picture: (origins[c.source], None if by_file else c.frame) for c in candidates}
    groups = sorted(set(group_of.values()), key=str)
    if wish.holdout and len(groups) == 1:
        got = "all samples come from one picture"
        raise ToolError("nothing can be held out", got=got, remedy="give more images or frames, or leave out --holdout")
    order = np.random.default_rng([wish.seed, len(candidates)]).permutation(len(groups))
    most = len(groups) // 2 if wish.holdout else 0
    count = min(max(1, round(wish.holdout / (wish.holdout + wish.max_samples) * len(groups))), most)
    while True:
        held = {groups[place] for place in order[:count]}
        rng = np.random.default_rng([wish.seed, len(candidates), count])
        free = [c for c in candidates if group_of[c.picture] not in held]
        samples, duplicates = choose(free, wish.max_samples, wish.tiles_per_image, rng)
        kept_out = [c for c in candidates if group_of[c.picture] in held]
        holdout, more = choose(kept_out, wish.holdout, wish.tiles_per_image, rng, avoid=samples)
        if len(holdout) >= wish.holdout or count >= most:
            return Parts(samples, holdout, duplicates + more)
        count = min(count + max(1, count // 4), most)
