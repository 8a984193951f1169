"""Keep the figures of the demo that has just run, in tests/bench/demo.json and in README.md's section on it.

nox -s bench_demo
"""

import json
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from shared.command.resources import GIB, MIB, cpu_count
from shared.files.code_version import ROOT
from shared.media.images import read_pixels, to_image
from shared.metrics.metrics import psnr_db
from shared.watermark.message import read_messages
from tests.bench.guide import PACKAGES, replace_between

RESULTS = Path(__file__).with_suffix(".json")
README = ROOT / "README.md"
STEM = "miniseal_detector_miniseal_256"
PRECISIONS = ("int8", "int8-weight-only", "fp16", "int4")
SHOWN_ATTACKS = {
    "none": "as they are",
    "jpeg-80": "JPEG 80",
    "jpeg-50": "JPEG 50",
    "resize-0.75": "to 75% and back",
    "resize-0.5": "to 50% and back",
    "brightness-1.25": "25% brighter",
    "contrast-0.75": "25% less contrast",
    "blur-1": "blur, 1 pixel",
    "noise-0.04": "noise, 4%",
    "crop-0.9": "10% of each side cropped",
}


def collect(folder: Path) -> dict[str, Any]:
    """Return the figures of the products in a folder: from the comparison, and from the provenance of every step."""
    found = json.loads((folder / f"{STEM}_int8_compare.json").read_text())
    places = [*folder.glob("miniseal_detector*.json"), folder / "report.html.json"]
    sidecars = [path for path in places if path.with_suffix("").is_file()]  # the others are no provenance
    steps = [json.loads(path.read_text()) for path in sidecars]
    models = [{"name": "float32", **_figures(found["reference"], found["accuracy"])}]
    for candidate in found["candidates"]:
        name = Path(candidate["path"]).stem.removeprefix(f"{STEM}_")
        extra = {key: candidate[key] for key in ("speedup", "cosine")}
        extra["gates"] = {gate["name"]: gate["value"] for gate in candidate["gates"]}
        models.append({"name": name, **_figures(candidate["measured"], candidate["accuracy"]), **extra})
    messages = folder / "miniseal" / "samples" / "messages.json"
    return {
        "machine": {
            "cpus": cpu_count(),
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in PACKAGES},
        },
        "seconds": round(sum(step["seconds"] for step in steps), 1),
        "peak_rss_gib": round(max(step["peak_rss_bytes"] for step in steps) / GIB, 2),
        "lowest_psnr_db": round(min(_psnrs_db(messages)), 1),
        "images": len(found["accuracy"]["logits"]),
        "photos": len({entry["source"] for entry in json.loads(messages.read_text())["images"]}),
        "recommended": Path(found["smallest"]).stem.removeprefix(f"{STEM}_"),
        "models": models,
    }


def _psnrs_db(messages: Path) -> Iterator[float]:
    for image in read_messages(messages):
        if image.original is not None:
            yield psnr_db(to_image(read_pixels(image.original)), to_image(read_pixels(image.file)))


def _figures(measured: dict[str, Any], accuracy: dict[str, Any]) -> dict[str, Any]:
    return {
        "size_mib": round(measured["size_bytes"] / MIB, 2),
        "median_ms": round(measured["median_ms"], 1),
        "bit_accuracy": {condition["attack"]: round(condition["bit_accuracy"], 4) for condition in accuracy["conditions"]},
        "auc": accuracy["conditions"][0]["auc"],
    }


def render(results: dict[str, Any]) -> str:
    """Return the README's figures of the demo."""
    models = results["models"]
    took = f"Its steps took {results['seconds']:.0f} s together and at most {results['peak_rss_gib']:.1f} GiB of memory"
    crops = f"{results['images']} crops of {results['photos']} photos"
    seen = f"{crops} it never saw, marked at {results['lowest_psnr_db']:.1f} dB or better, and their originals"
    lines = [
        f"{took}; `{results['recommended']}` is the smallest product inside the limits.",
        f"On {seen}:",
        "",
        "| | " + " | ".join(f"`{model['name']}`" for model in models) + " |",
        "|---" * (len(models) + 1) + "|",
    ]
    rows = {
        "size": [f"{model['size_mib']:.2f} MiB" for model in models],
        "one run": [f"{model['median_ms']:.1f} ms" for model in models],
        "cosine to float32, worst": ["1", *(f"{model['cosine']:.5f}" for model in models[1:])],
        "marked told from unmarked, AUC": [f"{model['auc']:.3f}" for model in models],
    }
    for attack, title in SHOWN_ATTACKS.items():
        rows[f"bits read right, {title}"] = [f"{model['bit_accuracy'][attack]:.1%}" for model in models]
    lines += [f"| {title} | " + " | ".join(cells) + " |" for title, cells in rows.items()]
    return "\n".join(lines)


def fill(text: str, results: dict[str, Any]) -> str:
    """Return the text with the figures put between their markers."""
    return replace_between(text, "demo", render(results))


def main() -> None:
    results = collect(ROOT / "models")
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    README.write_text(fill(README.read_text(), results))


if __name__ == "__main__":
    main()
