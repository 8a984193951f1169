"""Keep what `nox -s face_landmarker_int8` has just measured, in tests/bench/face_landmarker.json and in the README.

nox -s bench_face_landmarker -- --bundle FILE --photos FOLDER
"""

import json
from pathlib import Path
from typing import Any

from shared.files.code_version import ROOT
from tests.bench.guide import README, replace_between

RESULTS = Path(__file__).with_suffix(".json")
PRODUCT = "face_landmarker_int8"


def collect(folder: Path) -> dict[str, Any]:
    """Return the figures of the last run, from the files that its steps left; of the photo that suffered most."""
    checked = json.loads((folder / f"{PRODUCT}_check.json").read_text())
    product = json.loads((folder / f"{PRODUCT}.task.json").read_text())
    shown = max(checked["photos"], key=lambda entry: entry["landmark_error_percent"] or 0.0)
    models = [
        {
            "name": model["name"],
            "size_before_bytes": model["size_before_bytes"],
            "size_after_bytes": model["size_after_bytes"],
            "speedup": round(model["measured"]["before_ms"] / model["measured"]["after_ms"], 2),
            "precisions": model["searched"]["precisions"],
        }
        for model in product["found"]["models"]
    ]
    return {
        "photo": shown["name"],
        "photos": sum(entry["faces_before"] > 0 for entry in checked["photos"]),
        "size_before_bytes": checked["size_before_bytes"],
        "size_after_bytes": checked["size_after_bytes"],
        "faces_before": shown["faces_before"],
        "faces_after": shown["faces_after"],
        "landmark_error_percent": round(shown["landmark_error_percent"], 3),
        "blendshape_error": round(shown["blendshape_error"], 4),
        "slowdown": round(checked["after_ms"] / checked["before_ms"], 2),
        "seconds": round(product["seconds"]),
        "models": models,
    }


def render(results: dict[str, Any]) -> str:
    """Return the README's table."""
    lines = ["| inner model | before | after | speed-up | precisions found |", "|---|---|---|---|---|"]
    for model in results["models"]:
        used = ", ".join(f"{count} {recipe}" for recipe, count in model["precisions"].items())
        sizes = " | ".join(f"{model[key] / 1024:.0f} KiB" for key in ("size_before_bytes", "size_after_bytes"))
        lines.append(f"| `{model['name']}` | {sizes} | {model['speedup']:.2f} | {used} |")
    reduction = 1 - results["size_after_bytes"] / results["size_before_bytes"]
    sizes = f"{results['size_before_bytes']:,} to {results['size_after_bytes']:,} bytes, {reduction:.1%} smaller"
    faces = f"{results['faces_before']} face before and {results['faces_after']} after"
    moved = f"landmarks move by {results['landmark_error_percent']:.2f} % of the face's width"
    rest = f"blendshape scores by {results['blendshape_error']:.3f}, {results['slowdown']:.2f} times the latency"
    lines += ["", f"The bundle: {sizes}; searched and written in {results['seconds']} s on two cores."]
    lines += [f"In MediaPipe on `{results['photo']}`, the worst of {results['photos']} photos: {faces}, {moved}, {rest}."]
    return "\n".join(lines)


def fill(text: str, results: dict[str, Any]) -> str:
    """Return the text with the figures put between their markers."""
    return replace_between(text, "face_landmarker", render(results))


def main() -> None:
    results = collect(ROOT / "models")
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    README.write_text(fill(README.read_text(), results))


if __name__ == "__main__":
    main()
