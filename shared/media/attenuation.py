"""The just-noticeable-difference map that hides a watermark: more where an image is textured, very dark or bright.

Letters in shapes: N images, H height, W width.

Source: luminance masking of Chou and Li 1995, contrast masking of Wu et al. 2017, both as Video Seal has them, arXiv:2412.09492.
    The luminance term jumps from 0 to 3 levels at LUMINANCE_KNEE: flat grey just below the middle carries hardly any watermark.
"""

import numpy as np
from numpy.typing import NDArray

LUMA = (0.299, 0.587, 0.114)  # of R, G, B
BACKGROUND = ((1, 1, 1, 1, 1), (1, 2, 2, 2, 1), (1, 2, 0, 2, 1), (1, 2, 2, 2, 1), (1, 1, 1, 1, 1))  # over BACKGROUND_SUM
BACKGROUND_SUM = 32
GRADIENT = ((-1, 0, 1), (-2, 0, 2), (-1, 0, 1))  # along the width; transposed and turned over along the height
LUMINANCE_KNEE = 127.0  # of 255 levels
DARK, EDGE = 17.0, 1e-5  # dark * (1 - sqrt(l / knee + edge)) up to the knee
BRIGHT, BRIGHT_LEAST = 3 / 128, 3.0  # bright * (l - knee) + least above it
CONTRAST, POWER, HALF = 0.117 * 16, 2.4, 26.0  # contrast * g^power / (g^2 + half^2)
OVERLAP = 0.3  # of the smaller of the two terms, which is taken off their sum
LEVELS = 255.0

Map = NDArray[np.float32]


def heat_map(image: NDArray[np.float32]) -> Map:
    """Return how much a watermark may change each pixel: float32 (N, 3, H, W), RGB in [0, 1] -> float32 (N, 1, H, W), in [0, 1]."""
    luma = np.float32(LEVELS) * to_luma(image)
    background = _filtered(luma, np.asarray(BACKGROUND, np.float32)) / np.float32(BACKGROUND_SUM)
    dark = DARK * (1 - np.sqrt(background / np.float32(LUMINANCE_KNEE) + np.float32(EDGE)))
    bright = np.float32(BRIGHT) * (background - np.float32(LUMINANCE_KNEE)) + np.float32(BRIGHT_LEAST)
    luminance = np.where(background <= LUMINANCE_KNEE, dark, bright)
    across = np.asarray(GRADIENT, np.float32)
    squared = np.square(_filtered(luma, across)) + np.square(_filtered(luma, across.T[::-1]))
    contrast = np.float32(CONTRAST) * squared ** np.float32(POWER / 2) / (squared + np.float32(HALF**2))
    both = luminance + contrast - np.float32(OVERLAP) * np.minimum(luminance, contrast)
    heat: Map = (np.maximum(both, 0) / np.float32(LEVELS)).astype(np.float32)
    return heat


def to_luma(image: NDArray[np.float32]) -> Map:
    """Return the luma of float32 (N, 3, H, W), RGB, as float32 (N, 1, H, W)."""
    luma: Map = np.tensordot(image, np.asarray(LUMA, np.float32), axes=([1], [0]))[:, np.newaxis].astype(np.float32)
    return luma


def _filtered(image: Map, kernel: NDArray[np.float32]) -> Map:
    """Return the correlation of (N, 1, H, W) with a square kernel, zeros around."""
    reach, (height, width) = len(kernel) // 2, image.shape[2:]
    padded = np.pad(image, ((0, 0), (0, 0), (reach, reach), (reach, reach)))
    result = np.zeros_like(image)
    for y, row in enumerate(kernel):
        for x, weight in enumerate(row):
            if weight:
                result += weight * padded[:, :, y : y + height, x : x + width]
    return result
