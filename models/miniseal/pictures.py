"""The pictures miniseal learns from, and the photos it never sees.

Photos come inside scikit-image and scikit-learn; both lists are fixed, and no photo is on both. Procedural pictures are dead
leaves: discs, boxes and stripes that cover each other, sized as objects in photographs are.

Source: dead leaves, Lee, Mumford and Huang 2001, doi:10.1023/A:1011109015675.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from shared.media.images import Pixels

SIZE = 256  # pixels of a crop
TRAINING_PHOTOS = (
    "astronaut",
    "brick",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "immunohistochemistry",
    "moon",
    "page",
    "retina",
    "stereo_motorcycle",
    "text",
)  # of scikit-image
TRAINING_SAMPLE_IMAGES = ("china.jpg", "flower.jpg")  # of scikit-learn
HELD_OUT_PHOTOS = ("camera", "chelsea", "coffee", "rocket")  # of scikit-image; all in the public domain or CC0
PROCEDURAL = 64  # pictures
PROCEDURAL_SIZE = 384  # pixels
SHAPES = 400  # per procedural picture


def photo(name: str) -> Pixels:
    """Return a photo of scikit-image or scikit-learn as uint8 (H, W, 3) RGB."""
    if name in TRAINING_SAMPLE_IMAGES:
        from sklearn.datasets import load_sample_image

        return np.asarray(load_sample_image(name), dtype=np.uint8)
    import skimage.data

    found = getattr(skimage.data, name)()
    pixels = np.asarray(found[0] if isinstance(found, tuple) else found, dtype=np.uint8)  # stereo pairs: the left one
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., np.newaxis], 3, axis=2)


def dead_leaves(rng: np.random.Generator) -> Pixels:
    """Return a procedural picture as uint8 (PROCEDURAL_SIZE, PROCEDURAL_SIZE, 3) RGB."""
    base = rng.integers(0, 256, 3)
    image = Image.new("RGB", (PROCEDURAL_SIZE, PROCEDURAL_SIZE), tuple(int(value) for value in base))
    draw = ImageDraw.Draw(image)
    for _ in range(SHAPES):
        radius = min(4 / rng.random(), PROCEDURAL_SIZE / 3)  # sizes fall with their square, as in photographs
        x, y = rng.uniform(0, PROCEDURAL_SIZE, 2)
        colour = tuple(int(value) for value in np.clip(base + rng.normal(0, 70, 3), 0, 255))
        match rng.integers(3):
            case 0:
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
            case 1:
                draw.rectangle((x - radius, y - radius * rng.uniform(0.2, 1), x + radius, y + radius), fill=colour)
            case _:
                end = (x + radius * rng.normal(), y + radius * rng.normal())
                draw.line((x, y, *end), fill=colour, width=int(rng.integers(1, 8)))
    if rng.random() < 0.7:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 2))))
    pixels = np.asarray(image, dtype=np.float32)
    ramp = np.linspace(-1, 1, PROCEDURAL_SIZE)
    shade = 1 + rng.uniform(-0.4, 0.4) * ramp[:, np.newaxis, np.newaxis] + rng.uniform(-0.4, 0.4) * ramp[np.newaxis, :, np.newaxis]
    grain = rng.normal(0, rng.uniform(0, 8), pixels.shape[:2])[..., np.newaxis]
    return np.clip(np.rint(pixels * shade + grain), 0, 255).astype(np.uint8)


def training_pictures(seed: int) -> list[Image.Image]:
    """Return all pictures to learn from; photos count as often as procedural pictures do in total."""
    photos = [Image.fromarray(photo(name)) for name in (*TRAINING_PHOTOS, *TRAINING_SAMPLE_IMAGES)]
    drawn = [Image.fromarray(dead_leaves(np.random.default_rng([seed, number]))) for number in range(PROCEDURAL)]
    return photos * (PROCEDURAL // len(photos)) + drawn


def random_crop(picture: Image.Image, rng: np.random.Generator) -> Pixels:
    """Return a crop as uint8 (SIZE, SIZE, 3) RGB: any place, any scale, mirrored, turned, channels shuffled, contrast changed."""
    side = min(picture.size) * rng.uniform(0.35, 1)
    left, top = rng.uniform(0, picture.width - side), rng.uniform(0, picture.height - side)
    box = (left, top, left + side, top + side)
    pixels = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box), dtype=np.float32)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    pixels = np.rot90(pixels, int(rng.integers(4)))[..., rng.permutation(3)]
    pixels = (pixels - 127.5) * rng.uniform(0.6, 1.2) + 127.5 + rng.normal(0, 15)
    return np.asarray(np.clip(np.rint(pixels), 0, 255), np.uint8)
