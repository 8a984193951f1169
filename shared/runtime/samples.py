"""Samples for any model: seeded inputs, and images as the model takes them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.command.errors import ToolError
from shared.formats.tensors import TensorSpec, describe, image_input, image_spec
from shared.media.images import ImageForm, Pixels, image_form, seeded_image, stretch_image, to_form, to_image, to_layout
from shared.runtime.processes import ChildError

FREE_SIDE = 128  # pixels of a seeded image where any size fits


def sample_inputs(specs: list[TensorSpec], seed: int, pixel_range: tuple[float, float] = (0.0, 1.0)) -> dict[str, NDArray[Any]]:
    """Return one seeded sample for each input: a made-up picture for float32 images, else uniform noise.

    Pictures span `pixel_range`, other float inputs [0, 1], integer inputs the dtype's range (int32 and wider: 0 to 9). Free axes
    become FREE_SIDE pixels of a picture, else 1.
    """
    rng = np.random.default_rng(seed)
    samples: dict[str, NDArray[Any]] = {}
    for spec in specs:
        dtype = np.dtype(spec.dtype)
        shape = tuple(1 if size == -1 else size for size in spec.shape)
        form = image_form(spec.shape)
        if form is not None and dtype == np.float32:
            samples[spec.name] = _seeded_picture(form, rng, pixel_range)
        elif dtype.kind == "f":
            samples[spec.name] = rng.random(shape).astype(dtype)
        elif dtype.kind in "iu":
            low, high = (np.iinfo(dtype).min, np.iinfo(dtype).max) if dtype.itemsize <= 2 else (0, 9)
            samples[spec.name] = rng.integers(low, high, shape, dtype=dtype, endpoint=True)
        else:
            raise ToolError(f"input '{spec.name}' has a type that can't be made up", got=spec.dtype, expected="float or integer")
    return samples


def _seeded_picture(form: ImageForm, rng: np.random.Generator, pixel_range: tuple[float, float]) -> NDArray[Any]:
    height, width = form.height or FREE_SIDE, form.width or FREE_SIDE
    image = seeded_image(max(height, width), rng)[:, :, :height, :width]
    if form.channels == 1:
        image = image.mean(axis=1, keepdims=True)
    low, high = pixel_range
    return to_layout(image * np.float32(high - low) + np.float32(low), form.layout)


def image_sample(specs: list[TensorSpec], pixels: Pixels, pixel_range: tuple[float, float] = (0.0, 1.0)) -> dict[str, NDArray[Any]]:
    """Return pixels as the one image input of a model, stretched where it takes one size only; 0 to 255 become `pixel_range`.

    Raises:
        ChildError: The model takes something else.
    """
    if (image := image_spec(specs)) is not None:
        name, layout, size = image
        return {name: _ranged(to_layout(stretch_image(to_image(pixels), size), layout), pixel_range)}
    if (found := image_input(specs)) is None:
        raise ChildError(f"it takes {describe(specs)}, not one float32 image; compare it on seeded samples")
    name, form = found
    return {name: _ranged(to_form(pixels, form), pixel_range)}


def _ranged(image: NDArray[np.float32], pixel_range: tuple[float, float]) -> NDArray[np.float32]:
    low, high = pixel_range
    return image if (low, high) == (0, 1) else image * np.float32(high - low) + np.float32(low)
