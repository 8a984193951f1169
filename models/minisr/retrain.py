"""Train minisr from scratch, make its samples, and check it against the shipped one.

Example:
    python -m models.minisr.retrain

The shipped model is not touched: everything is written to models/out/minisr_retrained.
"""

import subprocess
import sys
from pathlib import Path

from shared.networks.card import PRODUCTS

FOLDER = PRODUCTS / "minisr_retrained"
SHIPPED = Path(__file__).with_name("minisr_x2.onnx")
GATES = ("--gate=min_psnr_gain=0.5", "--gate=max_psnr_drop=0.3")  # dB: above bicubic enlargement, and below the shipped one


def main(*arguments: str) -> None:
    """Train, unless a model is there and no arguments for the training are given; then check."""
    model, samples = FOLDER / "minisr_x2.onnx", FOLDER / "samples"
    FOLDER.mkdir(parents=True, exist_ok=True)
    if arguments or not model.exists():
        _run("models.minisr.train", "-o", model, *arguments)
    _run("models.minisr.make_samples", "-o", samples, "--overwrite")
    images = ("--images", samples / "small", "--ground-truth", samples / "large")
    _run("tools.compare", SHIPPED, model, *images, "-o", FOLDER / "compare.json", "--refresh", *GATES)


def _run(module: str, *arguments: str | Path) -> None:
    done = subprocess.run([sys.executable, "-m", module, *map(str, arguments)], check=False)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main(*sys.argv[1:])
