"""How good images are that models make: against the reference's, and against the truth where it is known.

Against the truth as super-resolution papers measure: PSNR and SSIM of the luma, rounded to 8 bits, without a border as wide as the
image was enlarged; bicubic enlargement next to it, the least that a network must beat.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.command.errors import ToolError
from shared.media.images import SUFFIXES, ImageForm, Pixels, image_files, image_form, read_pixels, visible_files
from shared.metrics.output_error import MOST_DB

LUMA = np.array([65.481, 128.553, 24.966]) / 255  # of ITU-R BT.601, to 16..235, from RGB in 0..255
LUMA_OFFSET = 16.0
PEAK = 255.0
SSIM_WINDOW = 11  # pixels; a Gaussian of 1.5 pixels, as Wang et al. 2004, doi:10.1109/TIP.2003.819861
SSIM = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
Array = NDArray[Any]


@dataclass(frozen=True)
class ImageScore:
    """How near one image is to another.

    Args:
        psnr_db: Peak signal-to-noise ratio, at most MOST_DB.
        ssim: Structural similarity; None where the image is smaller than its window.
    """

    psnr_db: float
    ssim: float | None


@dataclass(frozen=True)
class TruthScores:
    """How near a model's images are to the truth.

    Args:
        psnr_db: Mean over the images.
        ssim: Mean over the images; None where one is too small.
        images: Of each image, in their order.
    """

    psnr_db: float
    ssim: float | None
    images: list[ImageScore]


@dataclass(frozen=True)
class ImageFindings:
    """How good the images are that a candidate makes.

    Args:
        psnr_db: Against the reference's, over all samples together.
        worst_psnr_db: Of the worst sample.
        ssim: Mean over the samples; None where one is too small.
        truth: Against the truth, where that is known.
        samples: PSNR against the reference's, of each sample.
    """

    psnr_db: float
    worst_psnr_db: float
    ssim: float | None
    truth: TruthScores | None
    samples: list[float]


@dataclass(frozen=True)
class ImageTask:
    """The images that went in, where models make images.

    Args:
        files: One for each sample; empty for seeded samples.
        truths: What each should become, where known.
        reference: How near the reference's are to that.
        bicubic: How near plain enlargement is.
        pixel_range: What 0 and 255 become in the models' inputs.
        output_range: What they are in the images that the models make.
    """

    files: list[Path]
    truths: list[Path]
    reference: TruthScores | None
    bicubic: TruthScores | None
    pixel_range: tuple[float, float] = (0.0, 1.0)
    output_range: tuple[float, float] = (0.0, 1.0)


def find_truths(files: Sequence[Path], folder: Path) -> list[Path]:
    """Return for each image the one in a folder that it should become: of its name, or of the longest that its name begins with.

    A name continues after a character that is no letter or digit: img1_lr belongs to img1, img10 does not.

    Raises:
        ToolError: There is none for an image.
    """
    known: dict[str, list[Path]] = {}
    for path in images_at(folder):
        known.setdefault(path.stem, []).append(path)
    found, missing = [], []
    for file in files:
        stem = file.stem
        stems = (stem[:end] for end in range(len(stem), 0, -1) if end == len(stem) or not stem[end].isalnum())
        named = [path for stem in stems for path in _nearest(known.get(stem, []), file)]
        others = [path for path in named if path.resolve() != file.resolve()]
        found += others[:1]
        missing += [] if others else [file.name]
    if missing:
        expected = "an image of the same name, or of a name that its own begins with"
        raise ToolError("images have no truth", where=folder, got=", ".join(missing[:5]), expected=expected)
    return found


def _nearest(paths: Sequence[Path], file: Path) -> list[Path]:
    """Return files of one name, first the one most of whose folders, from it upwards, are called like those of another file."""

    def alike(path: Path) -> int:
        pairs = zip(reversed(path.absolute().parent.parts), reversed(file.absolute().parent.parts), strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    return sorted(paths, key=alike, reverse=True)


def score(one: Array, other: Array, peak: float) -> ImageScore:
    """Compare two images, (H, W, C) or (H, W), whose values span `peak`.

    Raises:
        ValueError: They differ in shape, or hold NaN.
    """
    from skimage.metrics import structural_similarity

    from shared.metrics.metrics import psnr_db

    decibel = min(psnr_db(one, other, peak), MOST_DB)
    if min(one.shape[:2]) < SSIM_WINDOW:
        return ImageScore(decibel, None)
    axis = 2 if one.ndim == 3 else None
    similarity = structural_similarity(one.astype(np.float64), other.astype(np.float64), data_range=peak, channel_axis=axis, **SSIM)
    return ImageScore(decibel, float(similarity))


def as_image(output: Array) -> Array:
    """Return a model's image output, (1, C, H, W) or (1, H, W, C), as (H, W, C).

    Raises:
        ValueError: It is none.
    """
    form = image_form(output.shape)
    if form is None:
        raise ValueError(f"an output of {output.shape} is no image, or a very small one")
    return from_form(output, form)


def score_against_truth(outputs: Sequence[Array], files: Sequence[Path], truths: Sequence[Path]) -> TruthScores:
    """Compare a model's images, values in [0, 1], with the truth.

    Raises:
        ValueError: An image is not of its truth's size.
    """
    scores = [
        _luma_score(np.rint(np.clip(as_image(output), 0, 1) * PEAK), read_pixels(truth), read_pixels(file).shape[0])
        for output, file, truth in zip(outputs, files, truths, strict=True)
    ]
    return _mean(scores)


def bicubic_scores(files: Sequence[Path], truths: Sequence[Path], channels: int = 3) -> TruthScores:
    """Compare the images themselves, enlarged by bicubic interpolation, with the truth, as images of so many channels are."""
    from PIL import Image

    scores = []
    for file, truth in zip(files, truths, strict=True):
        small, large = read_pixels(file), read_pixels(truth)
        picture = Image.fromarray(small).resize((large.shape[1], large.shape[0]), Image.Resampling.BICUBIC)
        made = np.asarray(picture if channels > 1 else picture.convert("L"), np.float64)
        scores.append(_luma_score(made.reshape(*made.shape[:2], -1), large, small.shape[0]))
    return _mean(scores)


def _luma_score(made: Array, truth: Pixels, small_height: int) -> ImageScore:
    """Compare uint8 values; a model of the luma alone makes it over the full range, as it gets it."""
    if made.shape[:2] != truth.shape[:2]:
        raise ValueError(f"an image is {made.shape[1]}x{made.shape[0]} pixels, its truth {truth.shape[1]}x{truth.shape[0]}")
    border = max(round(truth.shape[0] / small_height), 0)
    if made.shape[2] == 1:
        from PIL import Image

        one, other = made[..., 0], np.asarray(Image.fromarray(truth).convert("L"), np.float64)
    else:
        one, other = (image.astype(np.float64) @ LUMA + LUMA_OFFSET for image in (made, truth))
    inside = (slice(border, -border or None),) * 2
    return score(one[inside], other[inside], PEAK)


def _mean(scores: list[ImageScore]) -> TruthScores:
    similarities = [one.ssim for one in scores if one.ssim is not None]
    ssim = float(np.mean(similarities)) if len(similarities) == len(scores) else None
    return TruthScores(float(np.mean([one.psnr_db for one in scores])), ssim, scores)


def images_at(path: Path) -> list[Path]:
    """Return an image file, the image files in a folder and below, or the files that match `photos/*_small.png`, sorted.

    Raises:
        ToolError: There is no image.
    """
    if path.is_file():
        return [path]
    if not path.is_dir() and any(sign in path.name for sign in "*?["):
        matching = set(path.parent.glob(path.name))
        if files := sorted(file for file in visible_files(path.parent, SUFFIXES) if file in matching):
            return files
        expected = "files ending in " + ", ".join(SUFFIXES)
        raise ToolError("no images match", where=path, expected=expected, remedy="correct the pattern")
    return image_files(path)


def from_form(values: NDArray[np.float32], form: ImageForm) -> NDArray[np.float32]:
    """Return an image tensor of any layout as (H, W, channels)."""
    image: NDArray[np.float32] = values[0].transpose(1, 2, 0) if form.layout == "nchw" else values[0]
    return image
