"""Each workaround does its job; and each bug is still there: a failure of the second kind says that the workaround can go."""

import numpy as np
import pytest

from shared.runtime import workarounds
from shared.runtime.workarounds import large_weights_quantized, weights_left_mapped


def quantize(weights: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    from ai_edge_quantizer import qtyping
    from ai_edge_quantizer.algorithms.uniform_quantize import uniform_quantize_tensor

    scale = np.abs(weights).max(axis=tuple(range(1, weights.ndim)), keepdims=True) / 127
    params = qtyping.UniformQuantParams(
        num_bits=8, quantized_dimension=0, scale=scale, zero_point=np.zeros_like(scale, np.int32), symmetric=True
    )
    return uniform_quantize_tensor.uniform_quantize(weights, params)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def large() -> np.ndarray:  # type: ignore[type-arg]
    """float32 (70, 2, 2, 32768): 35 MiB, a convolution's weights."""
    return np.random.default_rng(0).standard_normal((70, 2, 2, 32768), np.float32)


def test_the_quantizers_bug_with_weights_over_32_mib_is_still_there(large: np.ndarray) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match="axis remapping"):
        quantize(large)


def test_weights_over_32_mib_are_quantized_by_channel(large: np.ndarray) -> None:  # type: ignore[type-arg]
    with large_weights_quantized():
        quantized = quantize(large)
    scale = np.abs(large).max(axis=(1, 2, 3), keepdims=True) / 127
    assert quantized.dtype == np.int8
    assert np.abs(quantized * scale - large).max() <= scale.max() * 0.501
    assert (np.abs(quantized).max(axis=(1, 2, 3)) == 127).all()


def test_slices_give_the_same_bytes_as_the_published_function(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = np.random.default_rng(0).standard_normal((7, 3, 3, 5), np.float32)
    published = quantize(weights)
    monkeypatch.setattr(workarounds, "CHUNK_BYTES", 400)  # two channels
    with large_weights_quantized():
        np.testing.assert_array_equal(quantize(weights), published, strict=True)


def test_the_published_function_is_back_afterwards() -> None:
    from ai_edge_quantizer.algorithms.uniform_quantize import uniform_quantize_tensor as module

    published = module.uniform_quantize
    with large_weights_quantized():
        assert module.uniform_quantize is not published
    assert module.uniform_quantize is published


@pytest.mark.filterwarnings("ignore")  # litert-torch's own imports warn
def test_litert_torch_still_writes_to_the_weights_and_not_inside_the_workaround() -> None:
    import torch
    from litert_torch.backend import inline_consts

    weights = torch.tensor([1.0, float("inf")])
    with weights_left_mapped():
        inline_consts._clamp_inf_values(weights)
    assert weights[1] == float("inf")
    inline_consts._clamp_inf_values(weights)
    assert weights[1] < float("inf")
