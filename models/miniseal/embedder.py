"""miniseal's embedder: one small learned pattern per message bit, added to the image's brightness.

Letters in shapes: N images, K message bits, S image size, T tile size.
"""

import torch
from torch import Tensor, nn

TILE = 32  # pixels; the detector's total stride, so that every tile meets the detector in the same place
STRENGTH = 0.0115  # root mean square of the watermark, image range 1: 38.8 dB before rounding to 8 bits


class Embedder(nn.Module):
    """Message -> watermark: the patterns summed with the signs of the bits, limited by tanh, brought to one strength, tiled.

    Message: bool (N, K). Watermark: float32 (N, 1, S, S), root mean square 1; the same for red, green and blue, so that it
    survives the subsampled chroma of JPEG.
    """

    def __init__(self, nbits: int) -> None:
        super().__init__()
        self.patterns = nn.Parameter(torch.randn(nbits, TILE, TILE) / nbits**0.5)

    def forward(self, message: Tensor, size: int) -> Tensor:
        signs = message.to(self.patterns.dtype) * 2 - 1  # bool (N, K) -> -1 or 1
        tile = torch.einsum("nk,kyx->nyx", signs, self.patterns).tanh()  # (N, T, T)
        tile = tile / tile.square().mean(dim=(1, 2), keepdim=True).sqrt()
        tiles = -(-size // TILE)
        return tile.repeat(1, tiles, tiles)[:, None, :size, :size]  # (N, T, T) -> (N, 1, S, S)


def embed(embedder: Embedder, image: Tensor, message: Tensor, strength: float = STRENGTH) -> Tensor:
    """Return the marked image.

    Args:
        embedder: A trained embedder.
        image: float32 (N, 3, S, S), RGB in [0, 1].
        message: bool (N, K).
        strength: Root mean square of what is added; PSNR is -20 log10 of it, more where pixels are cut off at 0 or 1.
    """
    watermark: Tensor = embedder(message, image.shape[-1])
    return (image + strength * watermark).clamp(0, 1)
