"""Workarounds for bugs of the libraries we build on; each names version and symptom, and has a test that fails once it can go."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PATCHING = threading.RLock()
CHUNK_BYTES = 32 * 2**20  # above this size the quantizer works in chunks


@contextlib.contextmanager
def large_weights_quantized() -> Iterator[None]:
    """Let ai-edge-quantizer 0.10 quantize weights of rank 3 and more that are larger than 32 MiB.

    Symptom: 'input operand has more dimensions than allowed by the axis remapping'. Its chunked path flattens the data but not
    the per-channel scales. Here the channels come in slices small enough that the chunked path is never taken.
    """
    if not metadata.version("ai-edge-quantizer").startswith("0.10."):
        yield
        return
    from ai_edge_quantizer.algorithms.uniform_quantize import uniform_quantize_tensor as module

    with _PATCHING:  # threads of a Dask worker would put back each other's
        yield from _patched(module)


def _patched(module: Any) -> Iterator[None]:
    published = module.uniform_quantize

    def uniform_quantize(tensor_data: NDArray[Any], quantization_params: Any, is_blockwise_quant: bool = False) -> NDArray[Any]:  # noqa: FBT001, FBT002 - published signature
        scale, zero = quantization_params.scale, quantization_params.zero_point
        by_channel = np.ndim(tensor_data) > 2 and np.shape(scale)[:1] == tensor_data.shape[:1] and scale.size == len(scale)
        if is_blockwise_quant or not by_channel or tensor_data.nbytes <= CHUNK_BYTES:
            whole: NDArray[Any] = published(tensor_data, quantization_params, is_blockwise_quant)
            return whole
        step = max(1, CHUNK_BYTES // tensor_data[0].nbytes)
        return np.concatenate(
            [
                published(
                    tensor_data[i : i + step],
                    replace(quantization_params, scale=scale[i : i + step], zero_point=zero[i : i + step]),
                )
                for i in range(0, len(tensor_data), step)
            ]
        )

    module.uniform_quantize = uniform_quantize
    try:
        yield
    finally:
        module.uniform_quantize = published


@contextlib.contextmanager
def weights_left_mapped() -> Iterator[None]:
    """Keep litert-torch 0.10 from writing to memory-mapped weights.

    Symptom: converting takes as much memory as the weights are large, because every constant is clamped to finite values in
    place. Only for weights that were checked to be finite.
    """
    if not metadata.version("litert-torch").startswith("0.10."):
        yield
        return
    from litert_torch.backend import inline_consts

    published = inline_consts._clamp_inf_values
    inline_consts._clamp_inf_values = lambda tensor: tensor
    try:
        yield
    finally:
        inline_consts._clamp_inf_values = published
