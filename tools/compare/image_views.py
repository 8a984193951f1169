"""Pictures of what models make of the images on which candidates do worst: cut out where they differ most, side by side."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.formats.model_file import ModelFile
from shared.media.images import Pixels, read_pixels
from shared.runtime.model import Model, open_model
from shared.runtime.samples import Guess, image_sample
from tools.compare.comparison import Findings, ImageTask
from tools.compare.image_quality import as_image

SIDE = 160  # pixels of a cut-out, in the models' output
WINDOW = 16  # pixels over which a difference is added up to find its place
GREY = 128.0
AMPLIFICATIONS = (1, 2, 5, 10, 20, 50, 100)
BRIGHT = 100.0  # grey levels that the largest difference should have at most
View = tuple[str, Pixels]


def worst_views(findings: Findings, count: int, skip: frozenset[Path] = frozenset()) -> Iterator[tuple[Path, float, list[View]]]:
    """Yield the images on which the first candidate is furthest from its reference, its PSNR there, and cut-outs of them.

    The models run again on these images. Cut-outs: the image enlarged without interpolation, what reference and candidates make of
    it, the truth where known, and the amplified difference of each candidate, 128 where there is none.

    Args:
        findings: Of models that make images, run on image files.
        count: Images to show.
        skip: Models that cannot be run again.
    """
    task = findings.images
    shown = [candidate for candidate in findings.candidates if candidate.images is not None and candidate.path not in skip]
    if task is None or not task.files or not shown:
        return
    assert shown[0].images is not None
    decibels = shown[0].images.samples
    worst = sorted(range(len(decibels)), key=lambda number: decibels[number])[:count]
    names = dict(zip((candidate.path for candidate in findings.candidates), findings.labels()[1:], strict=True))
    with ExitStack() as stack:
        models = [stack.enter_context(open_model(ModelFile(path))) for path in (findings.reference.path, *(c.path for c in shown))]
        for number in worst:
            made = [_made(model, task.files[number], task) for model in models]
            yield task.files[number], decibels[number], list(_views(task, number, made, [names[c.path] for c in shown]))


def _made(model: Model, file: Path, task: ImageTask) -> NDArray[np.float32]:
    """Return the image a model makes, (H, W, 3) in 0..255, not rounded."""
    low, high = task.output_range
    outputs, _ = model.run(image_sample(model.inputs, read_pixels(file), Guess(pixel_range=task.pixel_range)))
    image = (as_image(outputs[model.outputs[0].name]) - np.float32(low)) * np.float32(255 / (high - low))
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image


def _views(task: ImageTask, number: int, made: list[NDArray[np.float32]], names: list[str]) -> Iterator[View]:
    reference, *candidates = made
    height, width = reference.shape[:2]
    top, left = _place(np.abs(candidates[0] - reference).sum(axis=2))
    place = (slice(top, top + SIDE), slice(left, left + SIDE))
    source = read_pixels(task.files[number])
    rows = np.arange(height) * source.shape[0] // height
    columns = np.arange(width) * source.shape[1] // width
    yield "input", source[rows][:, columns][place]
    yield "reference", _pixels(reference[place])
    for name, image in zip(names, candidates, strict=True):
        yield name, _pixels(image[place])
    if task.truths:
        yield "truth", read_pixels(task.truths[number])[place]
    for name, image in zip(names, candidates, strict=True):
        difference = image[place] - reference[place]
        times = max((n for n in AMPLIFICATIONS if n * np.abs(difference).max() <= BRIGHT), default=1)
        yield f"{name} - reference, {times} times", _pixels(GREY + times * difference)


def _place(difference: NDArray[np.float32]) -> tuple[int, int]:
    """Return top and left of the cut-out whose centre differs most."""
    sums = np.pad(difference.astype(np.float64), ((1, 0), (1, 0))).cumsum(axis=0).cumsum(axis=1)
    size = min(WINDOW, *difference.shape)
    areas = sums[size:, size:] - sums[:-size, size:] - sums[size:, :-size] + sums[:-size, :-size]
    y, x = np.unravel_index(int(areas.argmax()), areas.shape)
    places = ((int(y), difference.shape[0]), (int(x), difference.shape[1]))
    top, left = (min(max(at + size // 2 - SIDE // 2, 0), max(length - SIDE, 0)) for at, length in places)
    return top, left


def _pixels(image: NDArray[np.floating]) -> Pixels:
    return np.asarray(np.clip(np.rint(image), 0, 255), np.uint8)
