"""Folding changes weights, not answers."""

import torch

from shared.networks.card import load_card
from shared.networks.detector import build_on_meta
from tests.conftest import Small
from tests.shared.networks.test_detector import load
from tools.convert_detector.fusion import fold_affine


def test_folded_weights_give_the_same_output_without_the_input_mapping(chunkyseal_small: Small) -> None:
    network, tensors = load(chunkyseal_small)
    state = network.state_dict()
    folded = build_on_meta(load_card(str(chunkyseal_small.card)), maps_input=False)
    folded.load_state_dict(dict(fold_affine(state, state.__getitem__)), assign=True)
    image = tensors["_parity.input"]
    torch.testing.assert_close(folded(image), network(image), atol=1e-5, rtol=0)


def test_folded_steps_are_neutral_and_the_others_untouched(chunkyseal_small: Small) -> None:
    state = load(chunkyseal_small)[0].state_dict()
    folded = dict(fold_affine(state, state.__getitem__))
    assert list(folded) == list(state)
    assert (folded["convnext.stages.2.1.norm.weight"] == 1).all()
    assert (folded["convnext.stages.2.1.norm.bias"] == 0).all()
    assert (folded["convnext.stages.2.1.grn.beta"] == 0).all()
    assert (folded["convnext.downsample_layers.3.0.weight"] == 1).all()
    kept = ["convnext.downsample_layers.0.1.weight", "convnext.stages.0.0.dwconv.weight", "pixel_decoder.linear.bias"]
    for key in kept:
        assert torch.equal(folded[key], state[key])


def test_nothing_of_the_checkpoint_is_written_to(chunkyseal_small: Small) -> None:
    state = load(chunkyseal_small)[0].state_dict()
    before = {key: value.clone() for key, value in state.items()}
    dict(fold_affine(state, state.__getitem__))
    assert all(torch.equal(state[key], before[key]) for key in state)
