"""Measure what each recipe of quantize_onnx makes of several models, and keep it in tests/bench/onnx_recipes.json.

python -m tests.bench onnx_recipes --images FOLDER MODEL.onnx ...

minisr and VideoSeal's rehearsal are always measured, ChunkySeal's where its recipe has left its product.
"""

import argparse
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from shared.files.atomic import workspace
from shared.files.code_version import ROOT
from shared.files.provenance import read_provenance
from shared.metrics.output_error import worst_error
from shared.quantize.result import ORIGINAL, CandidateResult, ModelResult, QuantizationResult
from shared.runtime.benchmark import Measurement
from tests.bench.tables import write_results
from tools.convert_detector import convert_detector
from tools.convert_detector.command import ModelFormat
from tools.prepare_calibration import prepare_calibration
from tools.quantize_onnx import quantize_onnx
from tools.quantize_onnx.options import Recipe

RECIPES: tuple[Recipe, ...] = ("int8-static", "int8", "fp16")
MINISR = ROOT / "models" / "minisr"
MINISR_TILE = 88  # pixels, the side of its samples
CHUNKYSEAL = ROOT / "models/out/chunkyseal_onnx_int8/chunkyseal_detector_chunkyseal_rehearsal_256_int8.onnx"
FACES = ROOT / "models" / "miniseal" / "samples"


def measure(model: Path, title: str, images: Path, folder: Path) -> dict[str, Any]:
    """Return size, latency and output errors of a model in each recipe."""
    tile = MINISR_TILE if model.parent == MINISR else None
    samples = prepare_calibration(
        [images], output=folder / f"{model.stem}_tiles", model=model, tile_size=tile, max_samples=24, holdout=12
    )
    rows: list[dict[str, Any]] = []
    original_ms = None
    for recipe in RECIPES:
        calibration = None if recipe == "fp16" else samples.folder
        output = folder / f"{model.stem}_{recipe}.onnx"
        done = quantize_onnx(model, output=output, recipe=recipe, calibration=calibration, holdout=samples.folder)
        found = done.result.models[0]
        if not rows:
            rows.append(_reference_row(found))
            original_ms = _original_ms(found)
        rows.append(_product_row(found))
    return {"title": title, "original_ms": original_ms, "rows": rows}


def _measured(candidate: CandidateResult | None) -> Measurement:
    if candidate is None or candidate.measurement is None:
        raise RuntimeError(f"not measured: {candidate}")
    return candidate.measurement


def _reference_row(found: ModelResult) -> dict[str, Any]:
    reference = _measured(found.candidates[0])
    return {"recipe": "float32", "size_bytes": reference.size_bytes, "median_ms": reference.median_ms, "error": None}


def _product_row(found: ModelResult) -> dict[str, Any]:
    product = _measured(found.product)
    assert found.product is not None
    worst = worst_error(found.product.errors)
    error = {name: getattr(worst, name) for name in ("psnr_db", "worst_psnr_db", "cosine")}
    row = {"recipe": found.recipe, "size_bytes": product.size_bytes, "median_ms": product.median_ms, "error": error}
    return {**row, "speedup": found.speedup}


def _original_ms(found: ModelResult) -> float | None:
    """Return the latency of a model before its repairs, where these changed it and the reference is the repaired one."""
    others = (candidate.measurement for candidate in found.candidates[1:] if candidate.label == ORIGINAL)
    return next((measurement.median_ms for measurement in others if measurement), None)


def chunkyseal() -> list[dict[str, Any]]:
    """Return what the recipe's product measured when it was made, where it is there."""
    provenance = read_provenance(CHUNKYSEAL)
    if provenance is None:
        return []
    found = TypeAdapter(QuantizationResult).validate_python(provenance.found).models[0]
    return [{"title": "ChunkySeal's detector", "original_ms": None, "rows": [_reference_row(found), _product_row(found)]}]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench onnx_recipes")
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--images", type=Path, help="images for these models")
    options = parser.parse_args()
    if options.models and options.images is None:
        parser.error("give --images for the models")
    with workspace() as folder:
        results = [measure(MINISR / "minisr_x2.onnx", "minisr", MINISR / "samples" / "large", folder)]
        results += [measure(model, f"`{model.name}`", options.images, folder) for model in options.models]
        output = folder / "videoseal.onnx"
        convert_detector(model="videoseal", rehearsal=True, model_format=ModelFormat.ONNX, output=output)
        results.append(measure(output, "VideoSeal's detector", FACES, folder))
    write_results("onnx_recipes", results + chunkyseal())


if __name__ == "__main__":
    main()
