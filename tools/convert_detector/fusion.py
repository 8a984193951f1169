"""Fold the detector's affine steps into the linear layers after them, tensor by tensor.

A converter does the same to constants, but holds every weight in memory twice while it does. Done here, on weights that come
one at a time, it costs the memory of one tensor, and the converted graph keeps one multiplication less per pixel and block.

Folded, all exact in real arithmetic because none of these layers pads its input with zeros:
    x -> 2 x - 1 before the stem convolution; layer norm before `pwconv1`; GRN's beta before `pwconv2`; channel norm before the
    2x2 convolutions. With s and t the scale and shift of the input channels, W (s x + t) + b = (W s) x + (b + W t).

The steps become the neutral element (weight 1, bias 0), which the converter drops.
"""

import re
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

Read = Callable[[str], Tensor]

STEM = "convnext.downsample_layers.0.0"
BLOCK_NORM = re.compile(r"(convnext\.stages\.\d+\.\d+)\.norm\.(weight|bias)")
BLOCK_BETA = re.compile(r"convnext\.stages\.\d+\.\d+\.grn\.beta")
BLOCK_LINEAR = re.compile(r"(convnext\.stages\.\d+\.\d+)\.(pwconv[12])\.(weight|bias)")
HALVING = re.compile(r"(convnext\.downsample_layers\.[123])\.([01])\.(weight|bias)")


def fold_affine(names: Iterable[str], read: Read) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight of a detector with its affine steps folded, in the order of `names`.

    The network that holds these weights takes the image in [0, 1] as it is: build it with `maps_input=False`.

    Args:
        names: Keys of a detector's state dict, without the leading `detector.`.
        read: Returns the float32 tensor of a key; called again for each use, so nothing is kept.
    """
    for name in names:
        yield name, _folded(name, read)


def _folded(name: str, read: Read) -> Tensor:
    if BLOCK_NORM.fullmatch(name) or BLOCK_BETA.fullmatch(name) or _is_halving(name, norm=True):
        return torch.full_like(read(name), 1.0 if name.endswith("weight") else 0.0)
    layer, kind = name.rpartition(".")[::2]
    affine = _affine_before(layer, read)
    if affine is None:
        return read(name)
    scale, shift = affine
    weight = read(f"{layer}.weight")
    if kind == "weight":
        return weight if scale is None else weight * _over_inputs(scale, weight)
    per_input = weight.reshape(*weight.shape[:2], -1).sum(dim=2)  # (O, C, H, W) or (O, C) -> (O, C)
    return read(name) + torch.mv(per_input, shift)


def _is_halving(name: str, *, norm: bool) -> bool:
    match = HALVING.fullmatch(name)
    return match is not None and match[2] == ("0" if norm else "1")


def _affine_before(layer: str, read: Read) -> tuple[Tensor | None, Tensor] | None:
    """Return scale and shift, each float32 (C,), of the input channels of a layer; None where nothing is to fold."""
    if layer == STEM:
        return torch.full((3,), 2.0), torch.full((3,), -1.0)
    if _is_halving(f"{layer}.weight", norm=False):
        norm = layer[: -len("1")] + "0"
        return read(f"{norm}.weight"), read(f"{norm}.bias")
    match = BLOCK_LINEAR.fullmatch(f"{layer}.weight")
    if match is None:
        return None
    if match[2] == "pwconv1":
        return read(f"{match[1]}.norm.weight"), read(f"{match[1]}.norm.bias")
    return None, read(f"{match[1]}.grn.beta").flatten()


def _over_inputs(vector: Tensor, weight: Tensor) -> Tensor:
    """Shape a vector (C,) to multiply the input channels of a weight (O, C) or (O, C, H, W)."""
    return vector.reshape(1, -1, *([1] * (weight.dim() - 2)))
