"""The whole published pipeline in one graph: an image and a message in, the marked image out.

Letters in shapes: S image size, N network size, C channels of the network, K message bits.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.media import attenuation as jnd
from shared.networks.card import Card
from shared.networks.detector import resize_matrix


class Attenuation(nn.Module):
    """The just-noticeable-difference map of `shared.media.attenuation`: float32 (1, 3, S, S) in [0, 1] -> float32 (1, 1, S, S)."""

    luma: Tensor
    background: Tensor
    across: Tensor
    down: Tensor

    def __init__(self) -> None:
        super().__init__()
        across = torch.tensor(jnd.GRADIENT, dtype=torch.float32)
        for name, kernel in (
            ("luma", torch.tensor(jnd.LUMA).reshape(1, 3, 1, 1)),
            ("background", torch.tensor(jnd.BACKGROUND, dtype=torch.float32)[None, None]),
            ("across", across[None, None]),
            ("down", across.T.flip(0)[None, None]),
        ):
            self.register_buffer(name, kernel, persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        luma = jnd.LEVELS * F.conv2d(image, self.luma)
        background = F.conv2d(luma, self.background, padding=2) / jnd.BACKGROUND_SUM
        dark = jnd.DARK * (1 - (background / jnd.LUMINANCE_KNEE + jnd.EDGE).sqrt())
        bright = jnd.BRIGHT * (background - jnd.LUMINANCE_KNEE) + jnd.BRIGHT_LEAST
        luminance = torch.where(background <= jnd.LUMINANCE_KNEE, dark, bright)
        squared = F.conv2d(luma, self.across, padding=1).square() + F.conv2d(luma, self.down, padding=1).square()
        contrast = jnd.CONTRAST * squared ** (jnd.POWER / 2) / (squared + jnd.HALF**2)
        both = luminance + contrast - jnd.OVERLAP * torch.minimum(luminance, contrast)
        return both.clamp(min=0) / jnd.LEVELS


class Pipeline(nn.Module):
    """An embedder with resizing, attenuation and blending: float32 (1, 3, S, S), (1, K) -> float32 (1, 3, S, S), in [0, 1].

    Args:
        network: Luma or RGB (1, C, N, N) and a message -> watermark (1, C, N, N).
        card: Its card, with a table [pipeline].
        size: S.
    """

    luma: Tensor | None
    shrink: Tensor | None
    stretch: Tensor | None

    def __init__(self, network: nn.Module, card: Card, size: int) -> None:
        super().__init__()
        assert card.pipeline is not None and card.embedder is not None
        self.network, self.scaling = network, card.pipeline.scaling
        self.attenuation = Attenuation() if card.pipeline.attenuation == "jnd" else None
        luma = torch.tensor(jnd.LUMA).reshape(1, 3, 1, 1) if card.embedder.channels == 1 else None
        is_resized = size != card.image_size
        matrices = ("shrink", size, card.image_size), ("stretch", card.image_size, size)
        for name, source, target in matrices:
            self.register_buffer(name, resize_matrix(source, target) if is_resized else None, persistent=False)
        self.register_buffer("luma", luma, persistent=False)

    def forward(self, image: Tensor, message: Tensor) -> Tensor:
        small = _resized(image, self.shrink)
        if self.luma is not None:
            small = F.conv2d(small, self.luma)
        watermark = _resized(self.network(small, message), self.stretch)
        if self.attenuation is not None:
            watermark = self.attenuation(image) * watermark
        return (image + self.scaling * watermark).clamp(0, 1)


def _resized(image: Tensor, matrix: Tensor | None) -> Tensor:
    """Return a square image (1, C, S, S) at another size, by a matrix (T, S) for both axes; as it is without one."""
    if matrix is None:
        return image
    return F.linear(F.linear(image, matrix).transpose(2, 3), matrix).transpose(2, 3)
