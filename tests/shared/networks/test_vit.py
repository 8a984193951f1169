"""VideoSeal 0.0's detector equals the published one in keys, shapes and outputs, and each plausible mistake is seen."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

from shared.networks import vit
from shared.networks.card import load_card
from shared.networks.detector import build_on_meta
from shared.networks.vit import Attention, VitDetector
from shared.watermark import Aggregation, aggregate
from tests.conftest import DATA, Small

TOLERANCE = 1e-6


@pytest.fixture
def loaded(videoseal_0_small: Small) -> tuple[VitDetector, dict[str, torch.Tensor]]:
    network = build_on_meta(load_card(str(videoseal_0_small.card)))
    with safe_open(videoseal_0_small.checkpoint, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    state = {key.removeprefix("detector."): value for key, value in tensors.items() if key.startswith("detector.")}
    network.load_state_dict(state, assign=True)
    assert isinstance(network, VitDetector)
    return network, tensors


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The published code gives the same bits on one thread only."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_keys_and_shapes_are_the_published_ones() -> None:
    published = json.loads((DATA / "checkpoint_keys_videoseal00.json").read_text())["videoseal_0.0"]["detector"]
    shapes = {f"detector.{key}": list(v.shape) for key, v in build_on_meta(load_card("videoseal_0.0")).state_dict().items()}
    assert shapes == published


def test_features_and_outputs_are_those_of_the_published_code(loaded: tuple[VitDetector, dict[str, torch.Tensor]]) -> None:
    network, tensors = loaded
    image = tensors["_parity.input"]
    torch.testing.assert_close(network(image), tensors["_parity.output"], atol=TOLERANCE, rtol=0)
    features = network.image_encoder(image * 2 - 1)
    torch.testing.assert_close(features, tensors["_parity.features"], atol=5e-5, rtol=0)


def block_norms_of_another_epsilon(network: VitDetector) -> None:
    for block in network.image_encoder.blocks:
        block.norm1.eps = block.norm2.eps = 1e-6


def rows_for_columns(network: VitDetector) -> None:
    for module in network.modules():
        if isinstance(module, Attention):
            module.rel_pos_h, module.rel_pos_w = module.rel_pos_w, module.rel_pos_h


def scaled_queries(network: VitDetector) -> None:
    for module in network.modules():
        if isinstance(module, Attention):
            scale = (module.qkv.in_features // module.heads) ** -0.5
            for name in ("rel_pos_h", "rel_pos_w"):
                setattr(module, name, nn.Parameter(getattr(module, name) * scale, requires_grad=False))


def windows_everywhere(network: VitDetector) -> None:
    for block in network.image_encoder.blocks[:1]:
        block.window = 0
        side = network.image_encoder.pos_embed.shape[1]
        for name in ("rel_pos_h", "rel_pos_w"):
            table = getattr(block.attn, name)
            wide = F.interpolate(table.T[None], size=2 * side - 1, mode="linear")[0].T
            setattr(block.attn, name, nn.Parameter(wide, requires_grad=False))


@pytest.mark.parametrize("mistake", [block_norms_of_another_epsilon, rows_for_columns, scaled_queries, windows_everywhere])
def test_a_mistake_in_the_network_is_seen(
    loaded: tuple[VitDetector, dict[str, torch.Tensor]], mistake: Callable[[VitDetector], None]
) -> None:
    network, tensors = loaded
    mistake(network)
    assert (network(tensors["_parity.input"]) - tensors["_parity.output"]).abs().max() > 10 * TOLERANCE


@contextmanager
def tanh_gelu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        exact = F.gelu
        patch.setattr(vit.F, "gelu", lambda x, **_: exact(x, approximate="tanh"))
        yield


def test_another_gelu_and_another_mapping_of_the_image_are_seen(loaded: tuple[VitDetector, dict[str, torch.Tensor]]) -> None:
    network, tensors = loaded
    image, published = tensors["_parity.input"], tensors["_parity.output"]
    with tanh_gelu():
        assert (network(image) - published).abs().max() > 10 * TOLERANCE
    for wrong in (image * 2 - 1, (image + 1) / 2):
        assert (network(wrong) - published).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("how", ["avg", "squared_avg", "l1norm_avg", "l2norm_avg"])
def test_messages_of_videos_are_those_of_the_published_code(
    loaded: tuple[VitDetector, dict[str, torch.Tensor]], how: Aggregation
) -> None:
    """The published function shrinks frames without antialiasing, other than its detection of images."""
    network, tensors = loaded
    frames = F.interpolate(tensors["_parity.video"], size=(64, 64), mode="bilinear", align_corners=False)
    found = aggregate(network(frames)[:, 1:].numpy(), how)
    published = tensors[f"_parity.video_message_{how}"].numpy()
    np.testing.assert_array_equal(found > 0, published[0] > 0)
    if not set(np.unique(published)) <= {0, 1}:
        np.testing.assert_allclose(found, published[0], atol=1e-5)
