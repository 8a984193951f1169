"""Run the face landmarker's recipe, and keep what it measured in tests/bench/face_landmarker.json.

python -m tests.bench face_landmarker --bundle FILE --photos FOLDER
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from shared.files.code_version import ROOT
from shared.files.provenance import Provenance, read_provenance
from shared.quantize.result import ModelResult, QuantizationResult
from tests.bench.tables import write_results

SESSION = "face_landmarker_int8"


def collect(folder: Path) -> dict[str, Any]:
    """Return the figures of the products in a folder; of the photos those of the one that is furthest off."""
    checked = json.loads((folder / "check.json").read_text())
    product = read_provenance(folder / f"{SESSION}.task")
    if product is None:
        raise FileNotFoundError(f"{folder}: no {SESSION}.task with its provenance")
    worst = max(checked["photos"], key=lambda entry: entry["landmark_error_percent"] or 0.0)
    return {
        "photo": worst["name"],
        "photos": sum(entry["faces_before"] > 0 for entry in checked["photos"]),
        "size_before_bytes": checked["size_before_bytes"],
        "size_after_bytes": checked["size_after_bytes"],
        "faces_before": worst["faces_before"],
        "faces_after": worst["faces_after"],
        "landmark_error_percent": round(worst["landmark_error_percent"], 3),
        "blendshape_error": round(worst["blendshape_error"], 4),
        "slowdown": round(checked["after_ms"] / checked["before_ms"], 2),
        "seconds": round(product.seconds),
        "models": [_figures(model) for model in _result(product).models],
    }


def _result(product: Provenance) -> QuantizationResult:
    return TypeAdapter(QuantizationResult).validate_python(product.found)


def _figures(model: ModelResult) -> dict[str, Any]:
    assert model.speedup is not None and model.search is not None
    return {
        "name": model.name,
        "size_before_bytes": model.size_before_bytes,
        "size_after_bytes": model.size_after_bytes,
        "speedup": round(model.speedup, 2),
        "precisions": model.search.precisions,
    }


def main() -> None:
    subprocess.run([sys.executable, "-m", "nox", "-s", SESSION, "--", *sys.argv[1:]], check=True, cwd=ROOT)
    write_results("face_landmarker", collect(ROOT / "models" / "out" / SESSION))


if __name__ == "__main__":
    main()
