"""The watermark detector: a ConvNeXt V2 encoder and a pixel decoder that reads one logit per message bit.

Reads leaf to root: layer norm, GRN, block, encoder, decoder, detector. Attribute names are the published checkpoints' keys
with the leading `detector.` removed. What only training needs (drop path, initialisation) is left out.

Letters in shapes: N images, C channels, H height, W width, K message bits.

Source:
    ConvNeXt V2, Woo et al. 2023, arXiv:2301.00808 (block, GRN); ConvNeXt, Liu et al. 2022, arXiv:2201.03545 (stem, stages);
    Video Seal, Fernandez et al. 2024, arXiv:2412.09492 (pixel decoder, message layout of the output).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-6  # of every normalisation in the published network


@dataclass(frozen=True)
class DetectorConfig:
    """Sizes of one detector network.

    Args:
        nbits: Message length K.
        depths: Blocks in each of the four stages.
        dims: Channels in each of the four stages.
        stem_stride: Stride of the first convolution; 4, or 2 for ChunkySeal.
    """

    nbits: int
    depths: tuple[int, int, int, int]
    dims: tuple[int, int, int, int]
    stem_stride: int = 4


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


class GlobalResponseNorm(nn.Module):
    """GRN of float32 (N, H, W, C): each channel scaled by how its L2 norm compares with the mean over channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        g = x.square().sum(dim=(1, 2), keepdim=True).sqrt()  # (N, 1, 1, C), L2 norm over (H, W)
        n = g / (g.mean(dim=-1, keepdim=True) + EPSILON)
        return x * (1 + self.gamma * n) + self.beta  # = gamma * (x * n) + beta + x, with one operation per pixel less


class Block(nn.Module):
    """ConvNeXt V2 block on float32 (N, C, H, W): depthwise 7x7, then an inverted bottleneck with GRN, plus the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, kernel_size=7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=EPSILON)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.grn = GlobalResponseNorm(4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dwconv(x).permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
        y = self.pwconv2(self.grn(F.gelu(self.pwconv1(self.norm(y)))))
        return x + y.permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)


class ConvNeXtV2(nn.Module):
    """The encoder: float32 (N, 3, H, W) in [-1, 1] -> float32 (N, dims[3], H / (8 * stem_stride), W / (8 * stem_stride))."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        dims = config.dims
        stem = nn.Sequential(nn.Conv2d(3, dims[0], kernel_size=4, stride=config.stem_stride), ChannelNorm(dims[0]))
        halvings = [
            nn.Sequential(ChannelNorm(dims[i]), nn.Conv2d(dims[i], dims[i + 1], kernel_size=2, stride=2)) for i in range(3)
        ]
        self.downsample_layers = nn.ModuleList([stem, *halvings])
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(dim) for _ in range(depth))) for depth, dim in zip(config.depths, dims, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return x


class UpscalingBlock(nn.Module):
    """Pad by reflection, 3x3 convolution, channel norm, GELU on float32 (N, C, H, W).

    The published block starts with a bilinear upsampling by 1, the identity, which has no weights: its place stays empty.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.upsample_block = nn.Sequential(
            nn.Identity(),
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, kernel_size=3, bias=False),
            ChannelNorm(channels),
            nn.GELU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.upsample_block(x)
        return y


class PixelDecoder(nn.Module):
    """Features float32 (N, C, H, W) -> float32 (N, 1 + K): mean over pixels of the upscaled features, then one linear layer."""

    def __init__(self, channels: int, nbits: int) -> None:
        super().__init__()
        self.output_upscaling = nn.Sequential(UpscalingBlock(channels))
        self.linear = nn.Linear(channels, 1 + nbits)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.output_upscaling(x).mean(dim=(2, 3)))
        return y


class Detector(nn.Module):
    """Image -> confidence and message logits.

    Input: float32 (N, 3, H, W), RGB in [0, 1]; mapped to [-1, 1] here, once, and nowhere else.
    Output: float32 (N, 1 + K): the confidence that the image is marked, then one logit per bit; a logit above 0 reads as 1.

    Args:
        config: Sizes of the network.
        maps_input: False only with weights of `shared.fusion`, whose stem has taken the mapping in.
    """

    def __init__(self, config: DetectorConfig, *, maps_input: bool = True) -> None:
        super().__init__()
        self.maps_input = maps_input
        self.convnext = ConvNeXtV2(config)
        self.pixel_decoder = PixelDecoder(config.dims[3], config.nbits)

    def forward(self, image: Tensor) -> Tensor:
        y: Tensor = self.pixel_decoder(self.convnext(image * 2 - 1 if self.maps_input else image))
        return y


def build_on_meta(config: DetectorConfig, *, maps_input: bool = True) -> Detector:
    """Return the network with its shapes but without memory for its weights; load them with `assign=True`."""
    with torch.device("meta"):
        return Detector(config, maps_input=maps_input).eval().requires_grad_(requires_grad=False)
