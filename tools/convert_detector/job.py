"""Convert a network: the float32 model, made and checked, and from it the quantized one."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table

from shared.command.cli import warn
from shared.command.resources import ResourceEstimate, size_text
from shared.files import artifacts
from shared.files.atomic import draft_beside, new_folder
from shared.files.plan import Plan, Product
from shared.formats.model_file import ModelFile
from shared.quantize.result import QuantizationResult
from tools.convert_detector.conversion import FloatModel, convert, write_rehearsal
from tools.convert_detector.network import GRAPH_BYTES, Network, Writing
from tools.convert_detector.request import SHARES, ModelFormat, Precision, require_outputs_free
from tools.quantize_tflite import quantize_tflite

ONNX_PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime")
PACKAGES = ("litert-torch", "litert-converter", "ai-edge-litert", "torch")
UNTRAINED = "seeded, untrained weights; size, speed and memory are real, messages are not"


@dataclass(frozen=True)
class Conversion:
    """Result of a conversion: the float32 model, and the quantized one if asked for."""

    model: str
    rehearsal: bool
    float_model: FloatModel
    float_product: Product
    quantized_product: Product | None
    coverage: QuantizationResult | None
    message: str

    def __rich__(self) -> RenderableType:
        table = Table(
            "product", "size", "smaller by", "time", "", title=f"{self.model}, {self.float_model.parameters / 1e6:.1f} M parameters"
        )
        for product in (self.float_product, self.quantized_product):
            if product is not None:
                saved = 1 - product.size_bytes / self.float_product.size_bytes
                state = "up to date" if product.up_to_date else "written"
                table.add_row(str(product.path), size_text(product.size_bytes), f"{saved:.1%}", f"{product.seconds:.1f} s", state)
        return Lines(table, self.message)


def convert_network(network: Network, float_path: Path, target: Path, quantize: Precision, writing: Writing) -> Conversion:
    """Write the float32 model of a network and, where asked for, the quantized one.

    Args:
        network: The network.
        float_path: The float32 model's file.
        target: The product's file; the same for a product in float32.
        quantize: Precision of the product.
        writing: How to treat files.

    Raises:
        ToolError: Unusable weights, too little memory or disk, or a model that disagrees with torch.
    """
    wants_float = quantize is Precision.NONE
    outputs = {float_path, target}
    require_outputs_free(
        outputs, network.weights, wants_float=wants_float, overwrite=writing.overwrite, makes_folder=writing.makes_folder
    )
    if writing.dry_run:
        _forecast(network, float_path, target, quantize, writing)
    with new_folder(target.parent) if writing.makes_folder else contextlib.nullcontext():
        float_product, found = _make_float(network, float_path, writing)
    remarks, title = _remarks(network, found, up_to_date=float_product.up_to_date), network.card.title
    if wants_float:
        return Conversion(title, network.is_rehearsal, found, float_product, None, None, remarks)
    quantized = quantize_tflite(
        float_path,
        output=target,
        recipe=quantize.value,
        exclude=list(network.exclude) or None,
        reproducible=writing.reproducible,
        overwrite=writing.overwrite,
        refresh=writing.refresh,
    )
    message = f"{quantized.message}\n{remarks}"
    return Conversion(title, network.is_rehearsal, found, float_product, quantized.product, quantized.result, message)


def _plan(network: Network, output: Path, writing: Writing) -> Plan:
    """Return what decides the bytes of the float32 model."""
    is_onnx = network.model_format is ModelFormat.ONNX
    return Plan(
        output,
        network.tool,
        {**network.arguments, "rehearsal": network.is_rehearsal, "format": network.model_format.value},
        [network.weights] if network.weights.exists() or not network.is_rehearsal else [],
        ONNX_PACKAGES if is_onnx else PACKAGES,
        overwrite=writing.overwrite,
        refresh=writing.refresh,
        reproducible=writing.reproducible,
        needs=network.needs,
        reopen=lambda draft: ModelFile(draft).files[1:],
        makes_folder=writing.makes_folder,
    )


def _forecast(network: Network, float_path: Path, target: Path, quantize: Precision, writing: Writing) -> NoReturn:
    """End a dry run with what would be written."""
    plans = [_plan(network, float_path, writing)]
    if quantize is not Precision.NONE:
        largest, memory = network.float_bytes, network.needs().memory_bytes
        needs = ResourceEstimate("quantize this model", int(largest * SHARES[quantize]) + GRAPH_BYTES, 2 * largest, memory)
        plans.append(
            Plan(
                target,
                "quantize_tflite",
                {},
                overwrite=writing.overwrite,
                refresh=writing.refresh,
                needs=lambda: needs,
                makes_folder=writing.makes_folder,
            )
        )
    artifacts.end_dry_run(*plans)


def _make_float(network: Network, output: Path, writing: Writing) -> tuple[Product, FloatModel]:
    """Write the float32 model, of a rehearsal its weights first, or find both up to date."""
    if network.is_rehearsal:
        if not network.weights.exists():
            network.needs().require(output.parent)
        write_rehearsal(network, overwrite=writing.overwrite)

    def make(draft: Path) -> FloatModel:
        if network.is_rehearsal:
            warn(f"REHEARSAL: {network.card.title} with {UNTRAINED}")
        with draft_beside(output.with_suffix(".folded")) as folded:
            return convert(network, draft, folded, output)

    return artifacts.build(_plan(network, output, writing), FloatModel, make)


def _remarks(network: Network, found: FloatModel, *, up_to_date: bool) -> str:
    """Say what a user must know of the float32 model, a line each."""
    check = found.agreement
    took = "" if up_to_date else f"; converted in {found.convert_seconds:.1f} s, checked in {check.seconds:.1f} s"
    lines = [f"float32 agrees with torch to {check.relative_error:.1g} (relative; {check.kernels} kernels){took}"]
    if found.casts:
        lines.append(f"the weights were {', '.join(found.casts)} and became float32")
    lines += network.remarks
    if network.is_rehearsal:
        lines.append(f"REHEARSAL: {UNTRAINED}")
    return "\n".join(lines)
