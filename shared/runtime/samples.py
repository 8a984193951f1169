"""Samples for any model: made-up inputs, and images as the model takes them."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.command.errors import ToolError
from shared.formats.tensors import IMAGE_DTYPES, TensorSpec, describe, image_input, image_spec
from shared.media.images import (
    ImageForm,
    Pixels,
    image_files,
    image_form,
    read_pixels,
    stretch_image,
    to_form,
    to_image,
    to_layout,
    to_values,
)
from shared.runtime.model import Source, open_model
from shared.runtime.processes import ChildError

PHOTOS = Path(__file__).resolve().parents[2] / "models" / "miniseal" / "samples" / "unmarked"  # the photos of the demo


@dataclass(frozen=True)
class Guess:
    """What made-up inputs look like where a model does not say it.

    Args:
        length: Of free axes of inputs that are no images.
        side: Pixels of free axes of images.
        most: Largest value of integers of 32 bits and more.
    """

    length: int = 1
    side: int = 128
    most: int = 9


GUESSES = (Guess(), Guess(16), Guess(64, 64), Guess(224, 224), Guess(1, 256, 1), Guess(16, 128, 1))  # tried in turn


def sample_inputs(
    specs: list[TensorSpec], seed: int, pixel_range: tuple[float, float] = (0.0, 1.0), guess: Guess = GUESSES[0]
) -> dict[str, NDArray[Any]]:
    """Return one made-up sample for each input: a photo for images, the next one for the next seed, else uniform noise.

    Pictures span `pixel_range`, other float inputs [0, 1], integer inputs the dtype's range (int32 and wider: 0 to 9), booleans
    are true. Free axes are as `guess` says.
    """
    rng = np.random.default_rng(seed)
    samples: dict[str, NDArray[Any]] = {}
    for spec in specs:
        dtype = np.dtype(spec.dtype)
        shape = tuple(guess.length if size == -1 else size for size in spec.shape)
        form = image_form(spec.shape)
        if form is not None and spec.dtype in IMAGE_DTYPES:
            pictures = [_picture(form, seed + number, guess.side) for number in range(form.batch)]
            samples[spec.name] = to_values(np.concatenate(pictures), spec.dtype, pixel_range)
        elif dtype.kind == "f":
            samples[spec.name] = rng.random(shape).astype(dtype)
        elif dtype.kind in "iu":
            low, high = (np.iinfo(dtype).min, np.iinfo(dtype).max) if dtype.itemsize <= 2 else (0, guess.most)
            samples[spec.name] = rng.integers(low, high, shape, dtype=dtype, endpoint=True)
        elif dtype.kind == "b":
            samples[spec.name] = np.ones(shape, dtype)
        else:
            raise ToolError(f"input '{spec.name}' has a type that can't be made up", got=spec.dtype, expected="float or integer")
    return samples


def _picture(form: ImageForm, number: int, side: int) -> NDArray[np.float32]:
    """Return the photo of that number, stretched to an image's form, in [0, 1]."""
    files = _photos()
    pixels = _pixels(files[number % len(files)])
    return to_form(pixels, replace(form, height=form.height or side, width=form.width or side))


@functools.cache
def _photos() -> list[Path]:
    return image_files(PHOTOS)


@functools.lru_cache(maxsize=32)
def _pixels(file: Path) -> Pixels:
    return read_pixels(file)


def needs_guess(specs: Sequence[TensorSpec]) -> bool:
    """Return whether inputs leave open what values or lengths a model takes: free axes, and integers."""
    return any(-1 in spec.shape or np.dtype(spec.dtype).kind in "iu" for spec in specs)


def guess_inputs(source: Source, threads: int, pixel_range: tuple[float, float] = (0.0, 1.0)) -> Guess:
    """Return the first guess with which a model runs on made-up inputs.

    Raises:
        ChildError: It runs with none of them.
    """
    problem = None
    for guess in GUESSES:
        with open_model(source, threads=threads) as model:
            try:
                model.run(sample_inputs(model.inputs, 0, pixel_range, guess))
            except ChildError as error:
                problem = problem or error
            else:
                return guess
    raise ChildError(f"it does not run on made-up inputs: {problem}")


def image_sample(specs: list[TensorSpec], pixels: Pixels, pixel_range: tuple[float, float] = (0.0, 1.0)) -> dict[str, NDArray[Any]]:
    """Return pixels as the one image input of a model, stretched where it takes one size only; 0 to 255 become `pixel_range`.

    Raises:
        ChildError: The model takes something else.
    """
    if (image := image_spec(specs)) is not None:
        name, layout, size = image
        return {name: to_values(to_layout(stretch_image(to_image(pixels), size), layout), "float32", pixel_range)}
    if (found := image_input(specs)) is None:
        raise ChildError(f"it takes {describe(specs)}, not one image; compare it on made-up samples, or give an .npz")
    name, form = found
    return {name: to_values(np.concatenate([to_form(pixels, form)] * form.batch), specs[0].dtype, pixel_range)}
