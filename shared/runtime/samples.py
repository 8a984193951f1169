"""Samples for any model: made-up inputs, and images as the model takes them."""

import functools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.command.errors import ToolError
from shared.formats.input_hints import InputHints
from shared.formats.tensors import (
    IMAGE_DTYPES,
    MESSAGE_INPUT,
    TensorSpec,
    but_message,
    by_signature,
    describe,
    image_input,
    image_spec,
)
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


class MadeUpInputsError(ChildError):
    """A model runs on none of the inputs that were made up for it, which may be their fault."""


@dataclass(frozen=True)
class Guess:
    """What made-up inputs look like where a model does not say it.

    Args:
        length: Of free axes of inputs that are no images.
        side: Pixels of free axes of images.
        most: Largest value of integers of 32 bits and more.
        pixel_range: What 0 and 255 of pixels become in an image.
        largest: Input and the largest integer that it takes, where that is known.
    """

    length: int = 1
    side: int = 128
    most: int = 9
    pixel_range: tuple[float, float] = (0.0, 1.0)
    largest: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of_hints(cls, hints: InputHints, pixel_range: tuple[float, float] | None = None) -> "Guess":
        """Return the guess that follows from a model's hints.

        Args:
            hints: The hints.
            pixel_range: What is known of its image input beyond that.
        """
        return cls(pixel_range=pixel_range or hints.pixel_range or (0.0, 1.0), largest=tuple(sorted(hints.largest.items())))


GUESSES = (Guess(), Guess(16), Guess(64, 64), Guess(224, 224), Guess(1, 256, 1), Guess(16, 128, 1))  # tried in turn


def sample_inputs(specs: list[TensorSpec], seed: int, guess: Guess = GUESSES[0]) -> dict[str, NDArray[Any]]:
    """Return one made-up sample for each input: a photo for images, the next one for the next seed, else uniform noise.

    Pictures are as `guess` says, of 8 bits the pixels themselves, int8 less 128; a float called `message` holds bits, 0 or 1; other
    floats lie in [0, 1], integers between 0 and the largest that is known for the input, else in the dtype's range (32 bits and
    wider: up to `guess.most`); booleans are true.
    """
    rng, largest = np.random.default_rng(seed), dict(guess.largest)
    samples: dict[str, NDArray[Any]] = {}
    for spec in specs:
        dtype = np.dtype(spec.dtype)
        shape = tuple(guess.length if size == -1 else size for size in spec.shape)
        form = image_form(spec.shape)
        if form is not None and spec.dtype in (*IMAGE_DTYPES, "int8"):
            pictures = [_picture(form, seed + number, guess.side) for number in range(form.batch)]
            samples[spec.name] = to_values(np.concatenate(pictures), spec.dtype, guess.pixel_range)
        elif dtype.kind == "f":
            values = rng.random(shape)
            samples[spec.name] = (values < 0.5 if spec.own_name == MESSAGE_INPUT else values).astype(dtype)
        elif dtype.kind in "iu":
            low, high = (np.iinfo(dtype).min, np.iinfo(dtype).max) if dtype.itemsize <= 2 else (0, guess.most)
            low, high = (0, min(largest[spec.name], np.iinfo(dtype).max)) if spec.name in largest else (low, high)
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


def complete_inputs(
    known: Mapping[str, NDArray[Any]],
    specs: list[TensorSpec],
    seed: int,
    guess: Guess = GUESSES[0],
) -> dict[str, NDArray[Any]]:
    """Return a sample with the inputs it lacks, those of other signatures, made up; arguments as of `sample_inputs`."""
    return {**sample_inputs([spec for spec in specs if spec.name not in known], seed, guess), **known}


def needs_guess(specs: Sequence[TensorSpec]) -> bool:
    """Return whether inputs leave open what values or lengths a model takes: free axes, and integers."""
    return any(-1 in spec.shape or np.dtype(spec.dtype).kind in "iu" for spec in specs)


def guess_inputs(source: Source, specs: Sequence[TensorSpec], threads: int, hinted: Guess) -> Guess:
    """Return the first guess with which a model runs on made-up inputs.

    Args:
        source: The model.
        specs: Its inputs; where these leave nothing open, `hinted` is enough.
        threads: Threads of the runtime.
        hinted: The guess that follows from its hints.

    Raises:
        MadeUpInputsError: It runs with none of them.
    """
    if not needs_guess(specs):
        return hinted
    problem = None
    for guess in (replace(hinted, length=one.length, side=one.side, most=one.most) for one in GUESSES):
        with open_model(source, threads=threads) as model:
            try:
                model.run(sample_inputs(model.inputs, 0, guess))
            except ChildError as error:
                problem = problem or error
            else:
                return guess
    raise MadeUpInputsError(f"it does not run on made-up inputs: {problem}")


def image_sample(specs: list[TensorSpec], pixels: Pixels, guess: Guess = GUESSES[0]) -> dict[str, NDArray[Any]]:
    """Return pixels as the one image input of a model, in the range of `guess`, stretched where it takes one size only.

    Of several signatures each that takes one image gets it; inputs of the others are made up, and so is an embedder's message: each
    image has its own.

    Raises:
        ChildError: The model takes something else.
    """
    given = [sample for group in by_signature(specs) if (sample := _as_image(but_message(group), pixels, guess.pixel_range))]
    if not given:
        raise ChildError(f"it takes {describe(specs)}, not one image; compare it on made-up samples, or give an .npz")
    merged = {name: values for sample in given for name, values in sample.items()}
    return complete_inputs(merged, specs, message_seed(specs, pixels), guess)


def message_seed(specs: list[TensorSpec], pixels: Pixels) -> int:
    """Return the seed of the message that an embedder lays into an image: one for each image; 0 for other models."""
    return 0 if but_message(specs) == specs else zlib.crc32(pixels.tobytes())


def _as_image(specs: list[TensorSpec], pixels: Pixels, pixel_range: tuple[float, float]) -> dict[str, NDArray[Any]] | None:
    """Return pixels as the input of one signature; None where that is not one image."""
    if (image := image_spec(specs)) is not None:
        name, layout, size = image
        return {name: to_values(to_layout(stretch_image(to_image(pixels), size), layout), "float32", pixel_range)}
    if (found := image_input(specs)) is None:
        return None
    name, form = found
    return {name: to_values(np.concatenate([to_form(pixels, form)] * form.batch), specs[0].dtype, pixel_range)}
