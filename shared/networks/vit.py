"""The detector of VideoSeal 0.0: a vision transformer with windows and relative positions, and a pixel decoder.

Reads leaf to root: attention, block, encoder, detector. Attribute names are the published checkpoints' keys with the leading
`detector.` removed.

Letters in shapes: N images, B images times windows, D channels, n tokens along a side, d channels of a head, K message bits.

Source:
    Segment Anything, Kirillov et al. 2023, arXiv:2304.02643 (image encoder); ViTDet, Li et al. 2022, arXiv:2203.16527 (windows);
    MViTv2, Li et al. 2022, arXiv:2112.01526 (decomposed relative positions); Video Seal, arXiv:2412.09492 (pixel decoder).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.networks.blocks import ChannelNorm, PixelDecoder
from shared.networks.card import Vit


class Attention(nn.Module):
    """Attention between the tokens of float32 (B, n, n, D), with terms for their relative row and column; same shape.

    The term of a query q at row i for keys at row a is q . T[i - a + n - 1], T a table shared by all heads; columns alike.
    """

    def __init__(self, channels: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, channels // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, channels // heads))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _, channels = x.shape
        d = channels // self.heads
        parts = self.qkv(x).reshape(b, n * n, 3 * self.heads, d).transpose(1, 2)  # (B, 3 heads, n n, d)
        q, k, v = (part.reshape(b * self.heads, n * n, d) for part in parts.split(self.heads, dim=1))
        logits = (q * d**-0.5) @ k.transpose(1, 2) + self._positions(q.reshape(b * self.heads, n, n, d))
        y = (logits.softmax(dim=-1) @ v).reshape(b, self.heads, n * n, d).transpose(1, 2).reshape(b, n, n, channels)
        result: Tensor = self.proj(y)
        return result

    def _positions(self, q: Tensor) -> Tensor:
        """Return the terms of queries (B heads, n, n, d) for all pairs of tokens: (B heads, n n, n n)."""
        groups, n = q.shape[:2]
        rows = _skew(F.linear(q.transpose(1, 2), self.rel_pos_h.flip(0))).transpose(1, 2)  # (B heads, n, n, n): query, key row
        columns = _skew(F.linear(q, self.rel_pos_w.flip(0)))
        both = rows.reshape(groups, n * n, n, 1) + columns.reshape(groups, n * n, 1, n)
        return both.reshape(groups, n * n, n * n)


def _skew(y: Tensor) -> Tensor:
    """Return (G, n, n, 2n - 1) -> (G, n, n, n) with z[..., i, k] = y[..., i, k - i + n - 1], without an index."""
    groups, n = y.shape[:2]
    flat = y.reshape(groups * n, n * (2 * n - 1))[:, n - 1 : n - 1 + n * (2 * n - 2)]
    return flat.reshape(groups * n, n, 2 * n - 2)[:, :, :n].reshape(groups, n, n, n)


class Mlp(nn.Module):
    """Two linear layers with GELU between them, on the last axis."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(channels, 4 * channels)
        self.lin2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lin2(F.gelu(self.lin1(x)))
        return y


class VitBlock(nn.Module):
    """Transformer block on float32 (N, n, n, D), with attention within windows.

    Args:
        sizes: Sizes of the encoder.
        side: n.
        is_global: Whether attention is between all tokens instead.
    """

    def __init__(self, sizes: Vit, side: int, *, is_global: bool) -> None:
        super().__init__()
        self.window = 0 if is_global else sizes.window
        self.norm1 = nn.LayerNorm(sizes.channels)
        self.attn = Attention(sizes.channels, sizes.heads, self.window or side)
        self.norm2 = nn.LayerNorm(sizes.channels)
        self.mlp = Mlp(sizes.channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + (_join(self.attn(_cut(y, self.window)), x.shape) if self.window else self.attn(y))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


def _cut(x: Tensor, window: int) -> Tensor:
    """Return (N, n, n, D) as its windows (N windows, window, window, D)."""
    images, n, _, channels = x.shape
    parts = x.reshape(images * n // window, window, n // window, window * channels).transpose(1, 2)
    return parts.reshape(-1, window, window, channels)


def _join(windows: Tensor, shape: torch.Size) -> Tensor:
    """Return windows as the (N, n, n, D) they were cut of."""
    images, n, _, channels = shape
    window = windows.shape[1]
    parts = windows.reshape(images * n // window, n // window, window, window * channels).transpose(1, 2)
    return parts.reshape(shape)


class PatchEmbed(nn.Module):
    """Patches of an image as tokens: float32 (N, 3, H, W) -> (N, H / patch, W / patch, D)."""

    def __init__(self, sizes: Vit) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, sizes.channels, kernel_size=sizes.patch, stride=sizes.patch)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x).permute(0, 2, 3, 1)  # (N, D, n, n) -> (N, n, n, D)
        return y


class ImageEncoder(nn.Module):
    """float32 (N, 3, image_size, image_size) in [-1, 1] -> float32 (N, features, n, n)."""

    def __init__(self, sizes: Vit, image_size: int) -> None:
        super().__init__()
        n = image_size // sizes.patch
        self.patch_embed = PatchEmbed(sizes)
        self.pos_embed = nn.Parameter(torch.zeros(1, n, n, sizes.channels))
        self.blocks = nn.ModuleList(VitBlock(sizes, n, is_global=k in sizes.global_blocks) for k in range(sizes.blocks))
        self.neck = nn.Sequential(
            nn.Conv2d(sizes.channels, sizes.features, kernel_size=1, bias=False),
            ChannelNorm(sizes.features),
            nn.Conv2d(sizes.features, sizes.features, kernel_size=3, padding=1, bias=False),
            ChannelNorm(sizes.features),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.patch_embed(x) + self.pos_embed
        for block in self.blocks:
            y = block(y)
        features: Tensor = self.neck(y.permute(0, 3, 1, 2))  # (N, n, n, D) -> (N, D, n, n)
        return features


class VitDetector(nn.Module):
    """Image -> confidence and message logits; input and output as of `shared.networks.detector.Detector`."""

    def __init__(self, sizes: Vit, image_size: int, nbits: int) -> None:
        super().__init__()
        self.image_encoder = ImageEncoder(sizes, image_size)
        self.pixel_decoder = PixelDecoder(sizes.features, nbits)

    def forward(self, image: Tensor) -> Tensor:
        y: Tensor = self.pixel_decoder(self.image_encoder(image * 2 - 1))
        return y
