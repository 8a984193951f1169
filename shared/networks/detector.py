"""The watermark detector: a ConvNeXt V2 encoder and a pixel decoder that reads one logit per message bit.

Reads leaf to root: GRN, block, encoder, detector. Attribute names are the published checkpoints' keys
with the leading `detector.` removed. Parts for training only (drop path, initialisation) are left out.

Letters in shapes: N images, C channels, H height, W width, K message bits.

Source:
    ConvNeXt V2, Woo et al. 2023, arXiv:2301.00808 (block, GRN); ConvNeXt, Liu et al. 2022, arXiv:2201.03545 (stem, stages);
    Video Seal, Fernandez et al. 2024, arXiv:2412.09492 (pixel decoder, message layout of the output).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.networks.blocks import EPSILON, ChannelNorm, PixelDecoder
from shared.networks.card import Card, ConvNeXt, InputForm, Vit
from shared.networks.vit import VitDetector

TINY = 1e-12  # in training only: keeps the gradient of a square root finite where a channel is all 0


def sum_of_squares(x: Tensor) -> Tensor:
    """Return float32 (N, H, W, C) -> (N, 1, 1, C): the sum of squares over (H, W)."""
    return x.square().sum(dim=(1, 2), keepdim=True)


def sum_of_squares_as_product(x: Tensor) -> Tensor:
    """Return `sum_of_squares` by a matrix product with ones: ONNX Runtime 1.31 sums five times slower over (1, 2)."""
    n, h, w, c = x.shape
    return (torch.ones(1, h * w) @ (x * x).reshape(n, h * w, c)).reshape(n, 1, 1, c)


class GlobalResponseNorm(nn.Module):
    """GRN of float32 (N, H, W, C): each channel is scaled by the ratio of its L2 norm to the mean over channels."""

    energy = staticmethod(sum_of_squares)  # a converter may replace it with an equal form

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        g2 = self.energy(x)
        g = (g2 + TINY if self.training else g2).sqrt()
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
        y: Tensor = self.dwconv(x).permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
        y = self.pwconv2(self.grn(F.gelu(self.pwconv1(self.norm(y)))))
        return x + y.permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)


class ConvNeXtV2(nn.Module):
    """The encoder: float32 (N, 3, H, W) in [-1, 1] -> float32 (N, dims[3], H / (8 * stem_stride), W / (8 * stem_stride))."""

    def __init__(self, sizes: ConvNeXt) -> None:
        super().__init__()
        dims = sizes.dims
        stem = nn.Sequential(nn.Conv2d(3, dims[0], kernel_size=4, stride=sizes.stem_stride), ChannelNorm(dims[0]))
        halvings = [nn.Sequential(ChannelNorm(dims[i]), nn.Conv2d(dims[i], dims[i + 1], kernel_size=2, stride=2)) for i in range(3)]
        self.downsample_layers = nn.ModuleList([stem, *halvings])
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(dim) for _ in range(depth))) for depth, dim in zip(sizes.depths, dims, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return x


class Detector(nn.Module):
    """Image -> confidence and message logits.

    Input: float32 (N, 3, H, W), RGB in [0, 1]; mapped to [-1, 1] here, once, and nowhere else.
    Output: float32 (N, 1 + K): the confidence that the image is marked, then one logit per bit; a logit above 0 reads as 1.

    Args:
        sizes: Sizes of the encoder.
        nbits: Message length K.
        maps_input: False only with weights of `tools.convert_detector.fusion`, whose stem includes the mapping.
    """

    def __init__(self, sizes: ConvNeXt, nbits: int, *, maps_input: bool = True) -> None:
        super().__init__()
        self.maps_input = maps_input
        self.convnext = ConvNeXtV2(sizes)
        self.pixel_decoder = PixelDecoder(sizes.dims[3], nbits)

    def forward(self, image: Tensor) -> Tensor:
        y: Tensor = self.pixel_decoder(self.convnext(image * 2 - 1 if self.maps_input else image))
        return y


class Deployed(nn.Module):
    """A detector with the image input of a product.

    The resize is the resize of the published pipeline: bilinear with antialiasing. It is linear, separable and of fixed size, so
    two matrices from torch's own resize replace it; converters support matrix products, but no antialiasing.

    Args:
        detector: The network.
        form: Size and layout of the image, and whether it is resized.
        network_size: Height and width of the training images.
    """

    def __init__(self, detector: nn.Module, form: InputForm, network_size: int) -> None:
        super().__init__()
        self.detector = detector
        self.is_nhwc = form.layout == "nhwc"
        self.resize: Tensor | None
        matrix = resize_matrix(form.size, network_size) if form.resize and form.size != network_size else None
        self.register_buffer("resize", matrix, persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        if self.is_nhwc:
            image = image.permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)
        if self.resize is not None:
            # As linear layers: quantizers turn a matrix on the left into a batched product that the runtime refuses.
            image = F.linear(image, self.resize).transpose(2, 3)  # (N, C, H, size) -> (N, C, network_size, H)
            image = F.linear(image, self.resize).transpose(2, 3)  # -> (N, C, network_size, network_size)
        y: Tensor = self.detector(image)
        return y


def resize_matrix(size: int, network_size: int) -> Tensor:
    """Return float32 (network_size, size): the matrix of antialiased bilinear resizing along an axis."""
    columns = torch.eye(size).reshape(1, 1, size, size)
    resized = F.interpolate(columns, size=(network_size, size), mode="bilinear", align_corners=False, antialias=True)
    return resized.reshape(network_size, size)


def build_on_meta(card: Card, *, maps_input: bool = True) -> nn.Module:
    """Return a card's network with its shapes but without memory for its weights; load them with `assign=True`.

    `maps_input` is as of `Detector`; a transformer always maps it.
    """
    with torch.device("meta"):
        sizes = card.encoder
        if isinstance(sizes, Vit):
            network: nn.Module = VitDetector(sizes, card.image_size, card.nbits)
        else:
            network = Detector(sizes, card.nbits, maps_input=maps_input)
        return network.eval().requires_grad_(requires_grad=False)


def detector_shapes(card: Card) -> dict[str, tuple[int, ...]]:
    """Return the detector's keys, without the checkpoint's prefix, and their shapes."""
    return {key: tuple(value.shape) for key, value in build_on_meta(card).state_dict().items()}
