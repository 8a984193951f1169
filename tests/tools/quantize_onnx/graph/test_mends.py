"""Each fault of onnxruntime.quantization that is mended is still there; a test that fails here says that its mend can go."""

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from tests.support.small_onnx import Array
from tests.tools.quantize_onnx.graph.graphs import (
    Save,
    amplified,
    batched_matrix,
    clipped_branch,
    dead_channels,
    errors_of,
    lost_output,
    pictures,
    product_of,
    rounded,
    scaled_gemm,
    shared_bias,
)

WRONG, RIGHT = 0.1, 0.03  # relative errors


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Pictures, as the library wants them."""

    def __init__(self) -> None:
        self._samples = iter(pictures(8))

    def get_next(self) -> dict[str, Array] | None:
        return next(self._samples, None)


def plain(source: Path, target: Path, **settings: Any) -> Path:
    """Quantize with the library alone."""
    quantize_static(str(source), str(target), Reader(), **{"per_channel": True, "quant_format": QuantFormat.QDQ, **settings})
    return target


@pytest.mark.parametrize(
    ("save", "mode", "settings"),
    [
        (lost_output, "static", {}),
        (lost_output, "static, QOperator", {"quant_format": QuantFormat.QOperator}),
        (clipped_branch, "static, QOperator", {"quant_format": QuantFormat.QOperator}),
        (scaled_gemm, "static", {}),
        (shared_bias, "static, QOperator", {"quant_format": QuantFormat.QOperator}),
        (dead_channels, "static", {}),
        (dead_channels, "static, uint8 weights", {"weight_type": QuantType.QUInt8}),
        (dead_channels, "static, QOperator", {"quant_format": QuantFormat.QOperator}),
        (batched_matrix, "static", {}),
        (amplified, "static", {}),
        (rounded, "static", {}),
        (rounded, "static, QOperator", {"quant_format": QuantFormat.QOperator}),
    ],
)
def test_the_library_alone_is_wrong_where_we_are_not(save: Save, mode: str, settings: dict[str, Any], tmp_path: Path) -> None:
    source = save(tmp_path / "model.onnx")
    held = pictures(4, seed=1)
    try:
        errors = errors_of(source, plain(source, tmp_path / "plain.onnx", **settings), held)
    except Exception as error:  # noqa: BLE001 - whatever it raises
        errors = [float("inf")]
        print(type(error).__name__, str(error)[:80])
    assert max(errors) > WRONG, errors
    mended = errors_of(source, product_of(source, tmp_path / "work", mode, pictures(8)), held)
    assert max(mended) < RIGHT, mended
    print(f"{save.__name__}, {mode}: {max(errors):.3f} -> {max(mended):.3f}")


@pytest.mark.parametrize(("factor", "is_quantized"), [(1, False), (3, False), (255, True)])
def test_only_layers_before_a_coarse_rounding_stay_in_float(factor: float, *, is_quantized: bool, tmp_path: Path) -> None:
    """Rounding to one of 255 levels of a pixel is as fine as 8 bits are."""
    source = rounded(tmp_path / "model.onnx", factor)
    product = product_of(source, tmp_path / "work", "static", pictures(8))
    kinds = {node.op_type for node in onnx.load(product).graph.node}
    assert ("QuantizeLinear" in kinds) == is_quantized
    assert max(errors_of(source, product, pictures(4, seed=1))) < RIGHT
