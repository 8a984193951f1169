"""The network equals the published network in keys, shapes and outputs."""

import json
from collections.abc import Mapping

import pytest
import torch
from safetensors import safe_open

from shared.networks.card import InputForm, load_card
from shared.networks.detector import Deployed, Detector, build_on_meta
from tests.conftest import DATA, Small

PUBLISHED = json.loads((DATA / "checkpoint_keys.json").read_text())
TORCH_TOLERANCE = 1e-5  # float32 sums in another order


def load(small: Small, *, maps_input: bool = True) -> tuple[Detector, Mapping[str, torch.Tensor]]:
    network = build_on_meta(load_card(str(small.card)), maps_input=maps_input)
    with safe_open(small.checkpoint, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    state = {key.removeprefix("detector."): value for key, value in tensors.items() if key.startswith("detector.")}
    network.load_state_dict(state, assign=True)
    return network, tensors


@pytest.mark.parametrize(
    ("card", "published"), [("videoseal", "videoseal_1.0"), ("pixelseal", "pixelseal"), ("chunkyseal", "chunkyseal")]
)
def test_keys_and_shapes_of_every_card_are_the_published_ones(card: str, published: str) -> None:
    shapes = {f"detector.{key}": list(value.shape) for key, value in build_on_meta(load_card(card)).state_dict().items()}
    assert shapes == PUBLISHED[published]["detector"]


@pytest.mark.parametrize("kind", ["videoseal_small", "chunkyseal_small"])
def test_the_output_equals_the_output_of_the_published_code(kind: str, request: pytest.FixtureRequest) -> None:
    """Fails also if the image is mapped to [-1, 1] never or twice: see the next test."""
    network, tensors = load(request.getfixturevalue(kind))
    torch.testing.assert_close(network(tensors["_parity.input"]), tensors["_parity.output"], atol=TORCH_TOLERANCE, rtol=0)


def test_mapping_the_image_twice_or_never_changes_the_output(videoseal_small: Small) -> None:
    network, tensors = load(videoseal_small)
    image, published = tensors["_parity.input"], tensors["_parity.output"]
    never, _ = load(videoseal_small, maps_input=False)
    for wrong in (network(image * 2 - 1), never(image)):
        assert (wrong - published).abs().max() > 100 * TORCH_TOLERANCE
    torch.testing.assert_close(never(image * 2 - 1), published, atol=TORCH_TOLERANCE, rtol=0)


def test_deployed_detector_takes_nhwc_images(videoseal_small: Small) -> None:
    network, tensors = load(videoseal_small)
    image = tensors["_parity.input"]
    deployed = Deployed(network, InputForm(64, "nhwc"), 64)
    torch.testing.assert_close(deployed(image.permute(0, 2, 3, 1)), network(image))


@pytest.mark.parametrize("size", [128, 100, 64, 40])
def test_deployed_detector_resizes_as_torch_does_with_antialiasing(videoseal_small: Small, size: int) -> None:
    network, _ = load(videoseal_small)
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    resized = torch.nn.functional.interpolate(image, size=(64, 64), mode="bilinear", align_corners=False, antialias=True)
    deployed = Deployed(network, InputForm(size, "nchw", resize=True), 64)
    torch.testing.assert_close(deployed(image), network(resized), atol=1e-5, rtol=0)
