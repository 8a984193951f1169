"""Run the demo, and keep the figures of its products in tests/bench/demo.json.

python -m tests.bench demo
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.command.resources import GIB, MIB
from shared.files.code_version import ROOT
from shared.files.provenance import read_provenance
from shared.media.images import read_pixels, to_image
from shared.metrics.metrics import psnr_db
from shared.watermark.message import read_messages
from tests.bench.tables import machine, write_results

FOLDER = Path("models/out/demo")
STEM = "miniseal_detector_miniseal_256"
TRANSCRIPT = Path("models/out/miniseal_int8.tflite")
MESSAGES = ROOT / "models" / "miniseal" / "samples" / "messages.json"


def collect(folder: Path) -> dict[str, Any]:
    """Return the figures of the products in a folder: from the comparison, and from the provenance of every step."""
    found = json.loads((folder / "compare.json").read_text())
    steps = [provenance for path in sorted(folder.iterdir()) if (provenance := read_provenance(path))]
    models = [{"name": "float32", **_figures(found["reference"], found["accuracy"])}]
    models += [_candidate(candidate) for candidate in found["candidates"]]
    return {
        "machine": machine(),
        "seconds": round(sum(step.seconds for step in steps), 1),
        "peak_rss_gib": round(max(step.peak_rss_bytes for step in steps) / GIB, 2),
        "lowest_psnr_db": round(min(_psnrs_db(MESSAGES)), 1),
        "images": len(found["accuracy"]["logits"]),
        "photos": len({entry["source"] for entry in json.loads(MESSAGES.read_text())["images"]}),
        "recommended": _name(found["smallest"]),
        "models": models,
    }


def _candidate(candidate: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": _name(candidate["path"]),
        **_figures(candidate["measurement"], candidate["accuracy"]),
        "speedup": candidate["speedup"],
        "cosine": min(error["cosine"] for error in candidate["errors"]),
        "gates": {gate["name"]: gate["value"] for gate in candidate["gates"]},
    }


def _name(path: str) -> str:
    return Path(path).stem.removeprefix(f"{STEM}_")


def _figures(measurement: dict[str, Any], accuracy: dict[str, Any]) -> dict[str, Any]:
    return {
        "size_mib": round(measurement["size_bytes"] / MIB, 2),
        "median_ms": round(measurement["median_ms"], 1),
        "bit_accuracy": {condition["attack"]: round(condition["bit_accuracy"], 4) for condition in accuracy["conditions"]},
        "auc": accuracy["conditions"][0]["auc"],
    }


def _psnrs_db(messages: Path) -> Iterator[float]:
    for image in read_messages(messages):
        if image.original is not None:
            yield psnr_db(to_image(read_pixels(image.original)), to_image(read_pixels(image.file)))


def transcribe() -> dict[str, Any]:
    """Return a command on the demo's float32 model, and its output line by line."""
    model = FOLDER / f"{STEM}.tflite"
    command = ["-m", "tools.quantize_tflite", str(model), "-o", str(TRANSCRIPT), "--recipe", "int8"]
    for path in (TRANSCRIPT, TRANSCRIPT.with_name(f"{TRANSCRIPT.stem}_recipe.json")):
        (ROOT / path).unlink(missing_ok=True)
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True, cwd=ROOT)
    return {"command": f"python {' '.join(command)}", "output": [line.rstrip() for line in done.stdout.splitlines()]}


def main() -> None:
    subprocess.run([sys.executable, "-m", "nox", "-s", "demo"], check=True, cwd=ROOT)
    write_results("demo", {**collect(ROOT / FOLDER), "transcript": transcribe()})


if __name__ == "__main__":
    main()
