"""Measure what each mode of quantize_onnx makes of several models, and keep it in tests/bench/onnx_modes.json and in the README.

nox -s bench_onnx -- --images FOLDER MODEL.onnx ...

minisr and VideoSeal's rehearsal are always measured, ChunkySeal's where its recipe has left its product.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shared.files.atomic import workspace
from shared.files.code_version import ROOT
from shared.files.provenance import read_provenance
from tests.bench.guide import README, replace_between
from tools.convert_detector import convert_detector
from tools.convert_detector.command import ModelFormat
from tools.prepare_calibration import prepare_calibration
from tools.quantize_onnx import quantize_onnx

RESULTS = Path(__file__).with_suffix(".json")
MODES = ("static", "dynamic", "fp16")
MINISR = ROOT / "models" / "minisr"
CHUNKYSEAL = ROOT / "models" / "chunkyseal_detector_chunkyseal_rehearsal_256_int8.onnx"
FACES = ROOT / "models" / "miniseal" / "samples"


def measure(model: Path, title: str, images: Path, folder: Path) -> dict[str, Any]:
    """Return size, latency and answers of a model in each mode."""
    tile = 88 if model.parent == MINISR else None
    samples = prepare_calibration(
        [images], output=folder / f"{model.stem}_tiles", model=model, tile_size=tile, max_samples=24, holdout=12
    )
    found = {}
    for mode in MODES:
        calibration = None if mode == "fp16" else samples.folder
        made = folder / f"{model.stem}_{mode}.onnx"
        found[mode] = quantize_onnx(model, output=made, mode=mode, calibration=calibration, holdout=samples.folder).found
    repaired = next(one for one in found["static"].models if one.label == "float32")
    original = next((one for one in found["static"].models if one.label == "original"), None)
    rows = [{"mode": "float32", "size_bytes": repaired.size_bytes, "median_ms": repaired.median_ms, "fidelity": None}]
    for mode, one in found.items():
        own = next(model for model in one.models if model.label == "float32")
        product = one.product
        assert product is not None and product.fidelity is not None and product.median_ms and own.median_ms
        fidelity = asdict(product.fidelity)
        rows.append({"mode": mode, "size_bytes": product.size_bytes, "median_ms": product.median_ms, "fidelity": fidelity})
        rows[-1]["speedup"] = own.median_ms / product.median_ms
    return {"title": title, "original_ms": original.median_ms if original else None, "rows": rows}


def chunkyseal() -> list[dict[str, Any]]:
    """Return what the recipe's product showed when it was made, where it is there."""
    provenance = read_provenance(CHUNKYSEAL)
    if provenance is None:
        return []
    models = {model["label"]: model for model in provenance.found["models"]}
    rows: list[dict[str, Any]] = []
    for mode in ("float32", "static"):
        one = models[mode]
        rows.append({key: one[key] for key in ("size_bytes", "median_ms", "fidelity")} | {"mode": mode})
    rows[1]["speedup"] = rows[0]["median_ms"] / rows[1]["median_ms"]
    return [{"title": "ChunkySeal's detector", "original_ms": None, "rows": rows}]


def render(results: list[dict[str, Any]]) -> str:
    """Return the README's table."""
    lines = ["| model | mode | size | one run | against float32 | answers against float32 |", "|---|---|---|---|---|---|"]
    for model in results:
        for number, row in enumerate(model["rows"]):
            title = model["title"] if number == 0 else ""
            size = row["size_bytes"] / 2**20
            run = f"{row['median_ms']:.1f} ms" if row["median_ms"] < 1000 else f"{row['median_ms'] / 1000:.1f} s"
            if number == 0:
                came = f"; as it came {model['original_ms']:.1f} ms" if model["original_ms"] else ""
                lines.append(f"| {title} | float32 | {_size(size)} | {run}{came} | | |")
                continue
            fidelity, speedup = row["fidelity"], row["speedup"]
            answers = f"cosine {fidelity['cosine']:.5f}" if fidelity["psnr_db"] is None else f"{fidelity['psnr_db']:.1f} dB"
            speed = f"{speedup:.2f} times as fast" if speedup >= 1 else f"**slower**, {speedup:.2f} times as fast"
            lines.append(f"| {title} | {row['mode']} | {_size(size)} | {run} | {speed} | {answers} |")
    return "\n".join(lines)


def _size(mebibytes: float) -> str:
    return f"{mebibytes:.1f} MiB" if mebibytes >= 1 else f"{mebibytes * 1024:.1f} KiB"


def fill(text: str, results: list[dict[str, Any]]) -> str:
    """Return the text with the figures put between their markers."""
    return replace_between(text, "onnx_modes", render(results))


def main() -> None:
    parser = argparse.ArgumentParser(prog="nox -s bench_onnx --")
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--images", type=Path, help="images for these models")
    options = parser.parse_args()
    with workspace() as folder:
        found = [measure(MINISR / "minisr_x2.onnx", "minisr", MINISR / "samples" / "large", folder)]
        found += [measure(model, f"`{model.name}`", options.images, folder) for model in options.models]
        detector = convert_detector(
            model="videoseal", rehearsal=True, model_format=ModelFormat.ONNX, output=folder / "videoseal.onnx"
        ).float_product.path
        found.append(measure(detector, "VideoSeal's detector", FACES, folder))
    found += chunkyseal()
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    README.write_text(fill(README.read_text(), found))


if __name__ == "__main__":
    main()
