"""Fold the embedder's batch norms and its message table into plain layers, tensor by tensor.

With s = weight / sqrt(running_var + eps), a convolution W without bias and the batch norm after it are the convolution s W with the
bias b - s running_mean: exact in real arithmetic, computed in float64. The message table, two vectors for each bit, becomes one
linear layer: the differences are its weight, the sum of the vectors for 0 its bias.
"""

import re
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.networks.card import Card
from shared.networks.embedder import TABLE, Embedder, ResidualBlock, Up, build_embedder_on_meta

Read = Callable[[str], Tensor]
EPSILON = 1e-5  # of the batch norms
CONVOLUTION = re.compile(r"(.*\.double_conv)\.([03])\.(weight|bias)")
MESSAGE = "unet.msg_processor"


class MappedConv2d(nn.Module):
    """A convolution whose weight lies as LiteRT keeps it: (D, kH, kW, C), for C channels in and D out.

    The converter turns weights of (D, C, kH, kW) around in memory, all of them at once: 4 GB for ChunkySeal's embedder. Here its
    turning cancels against that of `forward`, and memory-mapped weights stay on disk.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.stride, self.padding = layer.stride, layer.padding
        self.weight = nn.Parameter(layer.weight.permute(0, 2, 3, 1).contiguous())
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.permute(0, 3, 1, 2), self.bias, self.stride, self.padding)


class ReflectionPad(nn.Module):
    """A border of one pixel by reflection: (N, C, H, W) -> (N, C, H + 2, W + 2).

    Slices joined, because LiteRT 2.1 has only a plain kernel for MIRROR_PAD: three of them took half of the INT8 model's time.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((x[:, :, 1:2], x, x[:, :, -2:-1]), dim=2)
        return torch.cat((x[:, :, :, 1:2], x, x[:, :, :, -2:-1]), dim=3)


def build_folded_on_meta(card: Card, *, is_mapped: bool = False) -> Embedder:
    """Return a card's embedder without batch norms, its message table a linear layer; without memory for its weights.

    Args:
        card: The card, with a table [embedder].
        is_mapped: Whether its convolutions are `MappedConv2d`.
    """
    network = build_embedder_on_meta(card)
    sizes = card.embedder
    assert sizes is not None
    with torch.device("meta"):
        network.unet.msg_processor = nn.Linear(card.nbits, sizes.hidden)
        for block in network.modules():
            if isinstance(block, ResidualBlock) and sizes.norm == "batch":
                for place in (0, 3):
                    layer = block.double_conv[place]
                    assert isinstance(layer, nn.Conv2d)
                    block.double_conv[place] = nn.Conv2d(layer.in_channels, layer.out_channels, kernel_size=3, padding=1)
                    block.double_conv[place + 1] = nn.Identity()
        for up in network.unet.ups:
            assert isinstance(up, Up)
            up.up.upsample_block[1] = ReflectionPad()
        if is_mapped:
            parents = [(module, name) for module in network.modules() for name in dict(module.named_children())]
            for parent, name in parents:
                layer = getattr(parent, name)
                if isinstance(layer, nn.Conv2d):
                    setattr(parent, name, MappedConv2d(layer))
    return network.eval().requires_grad_(requires_grad=False)


def fold(names: Iterable[str], read: Read, *, is_mapped: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of `build_folded_on_meta`'s network, float32, in the order of `names`.

    Args:
        names: Its keys.
        read: Returns the tensor of a key of the published embedder; called again for each use, so nothing is kept.
        is_mapped: As of `build_folded_on_meta`.
    """
    keys = set(names := list(names))
    for name in names:
        match = CONVOLUTION.fullmatch(name)
        if name.startswith(f"{MESSAGE}."):
            table = read(f"unet.{TABLE}").double()
            folded = (table[1::2] - table[0::2]).T if name.endswith("weight") else table[0::2].sum(dim=0)
        elif match is not None and f"{match[1]}.{match[2]}.bias" in keys:
            norm = f"{match[1]}.{int(match[2]) + 1}"
            scale = read(f"{norm}.weight").double() / (read(f"{norm}.running_var").double() + EPSILON).sqrt()
            if match[3] == "weight":
                folded = read(name).double() * scale[:, None, None, None]
            else:
                folded = read(f"{norm}.bias").double() - scale * read(f"{norm}.running_mean").double()
        else:
            folded = read(name)
        if is_mapped and folded.dim() == 4:
            folded = folded.permute(0, 2, 3, 1)
        yield name, folded.to(torch.float32).contiguous()
