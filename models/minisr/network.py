"""The network: plain 3x3 convolutions at low resolution, whose last one fills in what bilinear enlargement misses.

Everything a phone's runtime needs to know are Conv, Relu, DepthToSpace, Resize, Add and Clip.

Source: sub-pixel convolution, Shi et al. 2016, arXiv:1609.05158; a plain stack of narrow layers, Du et al. 2021, arXiv:2105.10288.
"""

import itertools
from typing import TYPE_CHECKING

from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import Tensor

SCALE = 2
WIDTH = 32  # channels of the hidden layers
LAYERS = 7  # with a ReLU after each; the last one of all has none


class SuperResolution(nn.Module):
    """float32 (N, 3, H, W), RGB in [0, 1] -> float32 (N, 3, 2 H, 2 W), RGB in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, *[WIDTH] * LAYERS]
        self.body = nn.ModuleList(nn.Conv2d(before, after, 3, padding=1) for before, after in itertools.pairwise(widths))
        self.tail = nn.Conv2d(WIDTH, 3 * SCALE**2, 3, padding=1)

    def forward(self, image: "Tensor") -> "Tensor":
        x = image
        for layer in self.body:
            x = F.relu(layer(x))
        missing = F.pixel_shuffle(self.tail(x), SCALE)  # (N, 12, H, W) -> (N, 3, 2 H, 2 W)
        return (F.interpolate(image, scale_factor=SCALE, mode="bilinear") + missing).clamp(0, 1)
