"""Pairs of pictures for minisr: a crop, and the same crop at half the size, as bicubic reduction makes it.

The photos and the procedural pictures are miniseal's, with the same photos held out.
"""

import numpy as np
from PIL import Image

from models.miniseal.pictures import TRAINING_PHOTOS, TRAINING_SAMPLE_IMAGES, dead_leaves, photo
from shared.media.images import Pixels

PATCH = 96  # pixels of a high-resolution patch
PROCEDURAL = 16  # pictures; photos count four times as often
SMALLEST = 0.5  # of the photo's scale: reduced photos are sharper than they came


def training_pictures(seed: int) -> list[Image.Image]:
    """Return all pictures to learn from."""
    photos = [Image.fromarray(photo(name)) for name in (*TRAINING_PHOTOS, *TRAINING_SAMPLE_IMAGES)]
    drawn = [Image.fromarray(dead_leaves(np.random.default_rng([seed, number]))) for number in range(PROCEDURAL)]
    return photos * (4 * PROCEDURAL // len(photos)) + drawn


def halved(pixels: Pixels) -> Pixels:
    """Return uint8 (2 H, 2 W, 3) as uint8 (H, W, 3), bicubic with antialiasing: how Set5's small images were made."""
    height, width = pixels.shape[:2]
    return np.asarray(Image.fromarray(pixels).resize((width // 2, height // 2), Image.Resampling.BICUBIC))


def random_pair(picture: Image.Image, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """Return a random patch at half size and at full size: any place, scale from SMALLEST to 1, mirrored, turned, recoloured."""
    side = min(PATCH / rng.uniform(SMALLEST, 1), *picture.size)
    left, top = int(rng.uniform(0, picture.width - side)), int(rng.uniform(0, picture.height - side))
    box = (left, top, left + int(side), top + int(side))
    pixels = np.asarray(picture.resize((PATCH, PATCH), Image.Resampling.BICUBIC, box))
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    pixels = np.ascontiguousarray(np.rot90(pixels, int(rng.integers(4)))[..., rng.permutation(3)])
    return halved(pixels), pixels
