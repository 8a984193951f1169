"""One HTML page of a quantization: coverage, layers by damage, recipe; from the object that the JSON is written from."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shared.command.resources import size_text
from shared.html.page import Bar, write_template
from shared.quantize.coverage import number_text, short_name
from tools.quantize_tflite.result import Pressed, PressedModel, layer_cells, sentences
from tools.quantize_tflite.sensitivity import LayerDamage

TEMPLATE = Path(__file__).with_name("page.html.jinja")
LAYERS_DRAWN = 40


@dataclass(frozen=True)
class QuantizationPage:
    """What a page shows."""

    models: int
    layers: int


def write_page(path: Path, source: Path, found: Pressed, message: str) -> QuantizationPage:
    """Write the page; everything it shows is inside it."""
    models = [
        {
            "name": model.name,
            "lines": list(sentences(model)),
            "weights": list(_weight_bars(model)),
            "damage": list(_damage_bars(model.damage)),
            "damage_note": _damage_note(model.damage),
            "layers": [list(layer_cells(layer)) for layer in model.damage],
            "rules": model.matches,
            "left": [(op.name, op.op_type, size_text(op.weight_bytes), op.reason) for op in model.left],
        }
        for model in found.models
    ]
    write_template(path, TEMPLATE, source=source.name, found=found, message=message, models=models)
    return QuantizationPage(len(found.models), sum(len(model.damage) for model in found.models))


def _weight_bars(model: PressedModel) -> Iterator[Bar]:
    largest = max((row.weight_bytes for row in model.op_types), default=1) or 1
    for row in model.op_types:
        text = f"{size_text(row.weight_bytes)} -> {size_text(row.bytes_after)}"
        note = f"{row.quantized} of {row.ops} quantized" + (f"; {row.reason}" if row.reason else "")
        yield Bar(1 if row.quantized == row.ops else 2, row.op_type, text, 100 * row.weight_bytes / largest, note)


def _damage_bars(layers: list[LayerDamage]) -> Iterator[Bar]:
    worst = max((layer.output.relative_error or 0.0 for layer in layers), default=0.0) or 1.0
    for layer in layers[:LAYERS_DRAWN]:
        error = layer.output.relative_error
        percent = 100.0 if error is None else 100 * error / worst
        yield Bar(1, short_name(layer.name), number_text(error, ".3%"), percent, title=layer.name)


def _damage_note(layers: list[LayerDamage]) -> str:
    more = f"the worst {LAYERS_DRAWN} of {len(layers)} layers; " if len(layers) > LAYERS_DRAWN else ""
    return f"{more}bars relative to the worst layer"
