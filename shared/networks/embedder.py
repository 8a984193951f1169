"""The watermark embedder: a U-Net that takes an image and a message, and gives the watermark to add.

Reads leaf to root: norms, residual block, halving, doubling, message table, U-Net, embedder. Attribute names are the published
checkpoints' keys with the leading `embedder.` removed.

Letters in shapes: N images, C channels, H height, W width, K message bits.

Source: Video Seal, Fernandez et al. 2024, arXiv:2412.09492 (U-Net with the message in its bottleneck).
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.command.errors import ToolError
from shared.networks.blocks import UpscalingBlock
from shared.networks.card import Activation, Card, EmbedderSizes, Norm

PREFIX, TABLE = "embedder.", "msg_processor.msg_embeddings.weight"  # in the keys of checkpoints
SKIP_SCALE = 2**-0.5  # of features that skip the bottleneck


class ChannelRmsNorm(nn.Module):
    """Each pixel's channels over their root mean square, times a factor per channel; float32 (N, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = F.normalize(x, dim=1) * (self.gamma * self.gamma.shape[0] ** 0.5)
        return y


def _norm(kind: Norm, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if kind == "batch" else ChannelRmsNorm(channels)


def _activation(kind: Activation) -> nn.Module:
    return nn.ReLU() if kind == "relu" else nn.SiLU()


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with norm and activation, plus a 1x1 convolution of the input: (N, C, H, W) -> (N, D, H, W)."""

    def __init__(self, channels: int, made: int, sizes: EmbedderSizes) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(channels, made, kernel_size=3, padding=1, bias=False),
            _norm(sizes.norm, made),
            _activation(sizes.activation),
            nn.Conv2d(made, made, kernel_size=3, padding=1, bias=False),
            _norm(sizes.norm, made),
            _activation(sizes.activation),
        )
        self.res_conv = nn.Conv2d(channels, made, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.double_conv(x) + self.res_conv(x)
        return y


class Down(nn.Module):
    """Half the height and width: (N, C, H, W) -> (N, D, H / 2, W / 2)."""

    def __init__(self, channels: int, made: int, sizes: EmbedderSizes) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, made, kernel_size=3, stride=2, padding=1)
        self.conv = ResidualBlock(made, made, sizes)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(self.down(x))
        return y


class Up(nn.Module):
    """Twice the height and width of features and those that skipped: (N, C, H, W), (N, C, H, W) -> (N, D, 2H, 2W)."""

    def __init__(self, channels: int, made: int, sizes: EmbedderSizes) -> None:
        super().__init__()
        self.up = UpscalingBlock(2 * channels, made, 2, _activation(sizes.activation))
        self.conv = ResidualBlock(made, made, sizes)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        y: Tensor = self.conv(self.up(torch.cat((x, skip * SKIP_SCALE), dim=1)))
        return y


class MessageTable(nn.Module):
    """A vector for each bit at 0 and at 1, summed up over the bits: float32 (N, K) of 0 and 1 -> (N, hidden).

    The published code looks rows up; the product with their differences gives the same sums, and converts to one linear layer.
    """

    def __init__(self, nbits: int, hidden: int) -> None:
        super().__init__()
        self.msg_embeddings = nn.Embedding(2 * nbits, hidden)

    def forward(self, message: Tensor) -> Tensor:
        zeros, ones = self.msg_embeddings.weight[0::2], self.msg_embeddings.weight[1::2]
        return F.linear(message, (ones - zeros).T, zeros.sum(dim=0))


class Bottleneck(nn.Module):
    """Residual blocks that keep the shape."""

    def __init__(self, channels: int, sizes: EmbedderSizes) -> None:
        super().__init__()
        self.model = nn.Sequential(*(ResidualBlock(channels, channels, sizes) for _ in range(sizes.blocks)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x)
        return y


class UNet(nn.Module):
    """Image in [-1, 1] float32 (N, C, H, W) and message float32 (N, K) -> watermark float32 (N, C, H, W) in (-1, 1)."""

    def __init__(self, sizes: EmbedderSizes, nbits: int) -> None:
        super().__init__()
        z = sizes.widths
        inner = z[3] + sizes.hidden
        self.msg_processor: nn.Module = MessageTable(nbits, sizes.hidden)
        self.inc = ResidualBlock(sizes.channels, z[0], sizes)
        self.downs = nn.ModuleList(Down(z[i], z[i + 1], sizes) for i in range(3))
        self.bottleneck = Bottleneck(inner, sizes)
        self.ups = nn.ModuleList(Up(c, d, sizes) for c, d in ((inner, z[2]), (z[2], z[1]), (z[1], z[0])))
        self.outc = nn.Conv2d(z[0], sizes.channels, kernel_size=1)

    def forward(self, x: Tensor, message: Tensor) -> Tensor:
        first = self.downs[0](self.inc(x))
        second = self.downs[1](first)
        x = self.downs[2](second)
        # A sum with features: XNNPACK broadcasts it. Of zeros the converter makes BROADCAST_TO, which a plain kernel does alone.
        spread = self.msg_processor(message)[:, :, None, None] + 0 * x[:, :1]
        inner = torch.cat((x, spread), dim=1)
        y = self.bottleneck(inner)
        for up, skip in zip(self.ups, (inner, second, first), strict=True):
            y = up(y, skip)
        return torch.tanh(self.outc(y))


class Embedder(nn.Module):
    """Image and message -> watermark.

    Input: float32 (N, C, H, W) in [0, 1], luma or RGB as the card says, H and W multiples of 8; mapped to [-1, 1] here, once, and
    nowhere else. Message: float32 (N, K), 0 or 1.
    Output: float32 (N, C, H, W) in (-1, 1): the watermark before attenuation and scaling.
    """

    def __init__(self, sizes: EmbedderSizes, nbits: int) -> None:
        super().__init__()
        self.unet = UNet(sizes, nbits)

    def forward(self, image: Tensor, message: Tensor) -> Tensor:
        y: Tensor = self.unet(image * 2 - 1, message)
        return y


def build_embedder_on_meta(card: Card) -> Embedder:
    """Return a card's embedder with its shapes but without memory for its weights; load them with `assign=True`.

    Raises:
        ToolError: The card has no table [embedder].
    """
    if card.embedder is None:
        raise ToolError("this model's card has no embedder", where=card.name, remedy="add a table [embedder] to the card")
    with torch.device("meta"):
        return Embedder(card.embedder, card.nbits).eval().requires_grad_(requires_grad=False)


def embedder_shapes(card: Card) -> dict[str, tuple[int, ...]]:
    """Return the embedder's keys, without the leading `embedder.`, and their shapes."""
    return {key: tuple(value.shape) for key, value in build_embedder_on_meta(card).state_dict().items()}


def select_embedder(state: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Return the embedder's tensors of a checkpoint, without the leading `embedder.`; those of a bare embedder as they are.

    Published checkpoints hold the message table twice.

    Raises:
        ToolError: There is no embedder, or its two message tables differ.
    """
    chosen = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    chosen = chosen or (dict(state) if any(key.startswith("unet.") for key in state) else {})
    if not chosen:
        groups = ", ".join(sorted({key.partition(".")[0] for key in state}))
        raise ToolError("the checkpoint holds no embedder", where=where, got=f"groups {groups}", remedy="give a full checkpoint")
    copied = chosen.pop(TABLE, None)
    if copied is not None and not torch.equal(copied, chosen.setdefault(f"unet.{TABLE}", copied)):
        raise ToolError("the two message tables of the checkpoint differ", where=where, remedy="get the checkpoint again")
    return chosen
