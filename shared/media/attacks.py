"""Changes to an image between marking and detection: recompression, resizing, cropping, light, blur, noise.

Every attack takes pixels and returns pixels, uint8 (H, W, 3) RGB, with the 8 bits of a real file.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from shared.media.images import Pixels

if TYPE_CHECKING:
    from PIL.Image import Image

Random = np.random.Generator


def jpeg(image: "Image", quality: float, _: Random) -> "Image":
    """Compress to JPEG (4:2:0 chroma) and back; quality 1 to 100."""
    from PIL import Image as pillow

    file = io.BytesIO()
    image.save(file, "JPEG", quality=round(quality))
    with pillow.open(file) as decoded:
        return decoded.convert("RGB")


def resize(image: "Image", scale: float, _: Random) -> "Image":
    """Shrink both sides by `scale` and bring them back, bilinear with antialiasing."""
    from PIL.Image import Resampling

    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Resampling.BILINEAR).resize(image.size, Resampling.BILINEAR)


def crop(image: "Image", share: float, random: Random) -> "Image":
    """Keep `share` of each side, at a random place; the detector stretches the rest to its own size."""
    width, height = max(1, round(image.width * share)), max(1, round(image.height * share))
    left, top = int(random.integers(image.width - width + 1)), int(random.integers(image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


def brightness(image: "Image", factor: float, _: Random) -> "Image":
    """Multiply all pixels."""
    from PIL import ImageEnhance

    return ImageEnhance.Brightness(image).enhance(factor)


def contrast(image: "Image", factor: float, _: Random) -> "Image":
    """Multiply the distance of all pixels from the mean grey."""
    from PIL import ImageEnhance

    return ImageEnhance.Contrast(image).enhance(factor)


def blur(image: "Image", sigma: float, _: Random) -> "Image":
    """Gaussian blur; `sigma` in pixels."""
    from PIL import ImageFilter

    return image.filter(ImageFilter.GaussianBlur(sigma))


def noise(image: "Image", sigma: float, random: Random) -> "Image":
    """Add Gaussian noise of standard deviation `sigma`, in units of the full range."""
    from PIL import Image as pillow

    pixels = np.asarray(image, dtype=np.float32)
    noisy = pixels + random.normal(0, 255 * sigma, pixels.shape)
    return pillow.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))


KINDS: "dict[str, Callable[[Image, float, Random], Image]]" = {
    "jpeg": jpeg,
    "resize": resize,
    "crop": crop,
    "brightness": brightness,
    "contrast": contrast,
    "blur": blur,
    "noise": noise,
}

LIMITS = {  # smallest and largest strength
    "jpeg": (1, 100),
    "resize": (0.01, 1),
    "crop": (0.05, 1),
    "brightness": (0, 10),
    "contrast": (0, 10),
    "blur": (0, 100),
    "noise": (0, 1),
}


@dataclass(frozen=True)
class Attack:
    """An attack at a strength, for example JPEG at quality 50.

    Args:
        kind: A name of `KINDS`.
        strength: Quality, scale, share, factor or sigma, depending on the kind.
        seed: Seed of the noise or of the place of a crop.
    """

    kind: str
    strength: float
    seed: int = 0

    @property
    def name(self) -> str:
        """The name as in `jpeg-50`."""
        return f"{self.kind}-{self.strength:.12g}"

    def __call__(self, pixels: Pixels) -> Pixels:
        """Return attacked pixels, uint8 (H, W, 3) RGB; a crop is smaller than the input."""
        from PIL import Image as pillow

        return np.asarray(KINDS[self.kind](pillow.fromarray(pixels), self.strength, np.random.default_rng(self.seed)))


# From harmless to hard, kind by kind.
STANDARD = tuple(
    Attack(kind, strength)
    for kind, strengths in {
        "jpeg": (95, 90, 80, 70, 60, 50),
        "resize": (0.75, 0.5),
        "crop": (0.95, 0.9, 0.8),
        "brightness": (1.25, 0.75),
        "contrast": (1.25, 0.75),
        "blur": (0.5, 1, 1.5),
        "noise": (0.01, 0.02, 0.04),
    }.items()
    for strength in strengths
)
