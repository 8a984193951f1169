"""Select the samples of a calibration set: measure every source once, keep no pixels, choose samples and held-out samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shared.command.cli import step_progress
from shared.command.errors import ToolError
from tools.prepare_calibration.request import SampleRequest
from tools.prepare_calibration.sampling import Box, Candidate, choose, draw_boxes, measure
from tools.prepare_calibration.sources import Picture, Source

FEW_SOURCES = 4  # below this many, pictures are held out instead of whole sources


@dataclass(frozen=True)
class SkippedSource:
    """A source without a sample, and the reason."""

    source: str
    reason: str


def measure_all(
    sources: Sequence[Source], request: SampleRequest, hashes: Mapping[str, str]
) -> tuple[list[Candidate], list[SkippedSource]]:
    """Return all possible samples without their pixels, and the sources that have none.

    Args:
        sources: The sources to measure.
        request: The samples to take.
        hashes: Path -> sha256; of files with the same content only the first is measured.
    """
    candidates: list[Candidate] = []
    skipped: list[SkippedSource] = []
    seen: dict[str, str] = {}
    with step_progress("measure the sources", len(sources)) as advance:
        for number, source in enumerate(sources):
            found: list[Candidate] = []
            content = f"{hashes.get(str(source.path), source.name)} {source.frames} {source.times}"
            if content in seen:
                skipped.append(SkippedSource(source.name, f"the same as {seen[content]}"))
                advance(source.name)
                continue
            seen[content] = source.name
            try:
                for picture in request.pictures(source):
                    found += _candidates(number, picture, request)
            except ToolError as error:
                skipped.append(SkippedSource(source.name, str(error).removeprefix(f"{source.path}: ")))
            else:
                if not found:
                    skipped.append(SkippedSource(source.name, f"smaller than a tile of {request.tile_size} pixels"))
                candidates += found
            advance(source.name)
    return candidates, skipped


def _candidates(number: int, picture: Picture, request: SampleRequest) -> list[Candidate]:
    boxes: list[Box | None] = [None]
    if request.tile_size is not None:
        rng = np.random.default_rng([request.seed, number, picture.frame or 0])
        boxes = list(draw_boxes(picture.pixels, request.tile_size, request.tiles_per_image, rng))
    return [Candidate(number, picture.frame, box, measure(request.cut(picture.pixels, box)), picture.time_s) for box in boxes]


@dataclass(frozen=True)
class SampleSplit:
    """Samples to calibrate with, held-out samples, and the number of near-duplicates left out."""

    samples: list[Candidate]
    holdout: list[Candidate]
    duplicates: int


def choose_split(candidates: list[Candidate], request: SampleRequest, origins: Sequence[str]) -> SampleSplit:
    """Choose samples and held-out samples from different files, or from different pictures where files are few.

    No more files or pictures are held out than the held-out samples need.

    Args:
        candidates: All possible samples.
        request: The samples to take.
        origins: For each source a text that identifies its content.
    """
    by_file = len({origins[candidate.source] for candidate in candidates}) >= FEW_SOURCES
    group_of = {c.picture: (origins[c.source], None if by_file else c.frame) for c in candidates}
    groups = sorted(set(group_of.values()), key=str)
    if request.holdout and len(groups) == 1:
        got = "all samples come from one picture"
        raise ToolError("nothing can be held out", got=got, remedy="give more images or frames, or leave out --holdout")
    order = np.random.default_rng([request.seed, len(candidates)]).permutation(len(groups))
    most = len(groups) // 2 if request.holdout else 0
    count = min(max(1, round(request.holdout / (request.holdout + request.max_samples) * len(groups))), most)
    while True:
        held = {groups[place] for place in order[:count]}
        rng = np.random.default_rng([request.seed, len(candidates), count])
        free = [c for c in candidates if group_of[c.picture] not in held]
        samples, duplicates = choose(free, request.max_samples, request.tiles_per_image, rng)
        kept_out = [c for c in candidates if group_of[c.picture] in held]
        holdout, more = choose(kept_out, request.holdout, request.tiles_per_image, rng, avoid=samples)
        if len(holdout) >= request.holdout or count >= most:
            return SampleSplit(samples, holdout, duplicates + more)
        count = min(count + max(1, count // 4), most)
