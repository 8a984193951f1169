"""Images -> float32 arrays in a model's layout; seeded samples where there are no images."""

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.errors import ToolError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
CHANNELS = 3
Image = NDArray[np.float32]


def image_files(folder: Path) -> list[Path]:
    """Return the image files in a folder and below, sorted.

    Raises:
        ToolError: No such folder, or no image in it.
    """
    if not folder.is_dir():
        raise ToolError("no such image folder", where=folder)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise ToolError("no images in this folder", where=folder, expected="files ending in " + ", ".join(SUFFIXES))
    return files


def read_image(path: Path, size: int) -> Image:
    """Return an image as float32 (1, 3, size, size), RGB in [0, 1]: centre square, resized with antialiasing, EXIF turned.

    Raises:
        ToolError: The file is no image of an accepted format, or cut off.
    """
    from PIL import Image as pillow
    from PIL import ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            with pillow.open(path, formats=FORMATS) as file:
                upright = ImageOps.exif_transpose(file).convert("RGB")
                square = ImageOps.fit(upright, (size, size), pillow.Resampling.BICUBIC)
    except (UnidentifiedImageError, OSError, SyntaxError, pillow.DecompressionBombWarning, pillow.DecompressionBombError) as error:
        raise ToolError("unreadable image", where=path, got=error, expected=", ".join(FORMATS)) from None
    pixels = np.asarray(square, dtype=np.float32) / np.float32(255)
    return pixels.transpose(2, 0, 1)[np.newaxis]  # (H, W, 3) -> (1, 3, H, W)


def seeded_image(size: int, rng: np.random.Generator) -> Image:
    """Return a made-up picture as float32 (1, 3, size, size), RGB in [0, 1].

    Waves of falling strength over rising frequency, as photographs have, plus a little noise: enough to reach every layer with
    activations of a natural range. Not for accuracy claims.
    """
    y, x = np.mgrid[0:size, 0:size] / size
    image = np.zeros((CHANNELS, size, size))
    for frequency in (1, 2, 4, 8, 16, 32):
        for channel in range(CHANNELS):
            angle, phase = rng.uniform(0, 2 * np.pi, 2)
            wave = np.cos(2 * np.pi * frequency * (x * np.cos(angle) + y * np.sin(angle)) + phase)
            image[channel] += wave / frequency
    image += image.mean(axis=0)  # channels of photographs move together
    image = (image - image.min()) / (image.max() - image.min())
    image = np.clip(image + rng.normal(0, 0.02, image.shape), 0, 1)
    pixels: Image = image.astype(np.float32)[np.newaxis]
    return pixels


def image_layout(shape: tuple[int, ...]) -> tuple[str, int] | None:
    """Return layout ('nchw' or 'nhwc') and size of a square RGB image input, or None for any other shape."""
    match shape:
        case (1, 3, height, width) if height == width:
            return "nchw", height
        case (1, height, width, 3) if height == width:
            return "nhwc", height
    return None


def to_layout(image: Image, layout: str) -> Image:
    """Return float32 (1, 3, H, W) in the layout asked for: itself, or (1, H, W, 3)."""
    return image if layout == "nchw" else np.ascontiguousarray(image.transpose(0, 2, 3, 1))
