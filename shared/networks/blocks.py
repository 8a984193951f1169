"""Parts that detectors and embedders of the VideoSeal family share: channel norm, upscaling block, pixel decoder.

Attribute names are the published checkpoints' keys. Letters in shapes: N images, C channels, H height, W width, K message bits.

Source: Video Seal, Fernandez et al. 2024, arXiv:2412.09492 (pixel decoder, upscaling).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-6  # of the layer norms over channels


class ChannelNorm(nn.Module):
    """Layer norm over the channels of float32 (N, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
        x = F.layer_norm(x, self.weight.shape, self.weight, self.bias, EPSILON)
        return x.permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)


class UpscalingBlock(nn.Module):
    """Bilinear upsampling, padding by reflection, 3x3 convolution, channel norm, activation: (N, C, H, W) -> (N, D, fH, fW).

    Args:
        channels: C.
        made: D.
        factor: f; by 1 nothing is upsampled.
        activation: The last layer.
    """

    def __init__(self, channels: int, made: int, factor: int, activation: nn.Module) -> None:
        super().__init__()
        self.upsample_block = nn.Sequential(
            nn.Identity() if factor == 1 else nn.Upsample(scale_factor=factor, mode="bilinear", align_corners=False),
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, made, kernel_size=3, bias=False),
            ChannelNorm(made),
            activation,
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.upsample_block(x)
        return y


class PixelDecoder(nn.Module):
    """Features float32 (N, C, H, W) -> float32 (N, 1 + K): mean over pixels of the upscaled features, then one linear layer."""

    def __init__(self, channels: int, nbits: int) -> None:
        super().__init__()
        self.output_upscaling = nn.Sequential(UpscalingBlock(channels, channels, 1, nn.GELU()))
        self.linear = nn.Linear(channels, 1 + nbits)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.output_upscaling(x).mean(dim=(2, 3)))
        return y
