"""Train miniseal from scratch, make its samples, convert it, and check it against its card's gates.

Example:
    python -m models.miniseal.retrain

The shipped weights are not touched: everything is written to models/out/miniseal_retrained. An interrupted training goes on.
"""

import subprocess
import sys
from pathlib import Path

from shared.networks.card import PRODUCTS

FOLDER = PRODUCTS / "miniseal_retrained"


def main(*arguments: str) -> None:
    """Train, unless a checkpoint is there and no arguments for the training are given; then check."""
    checkpoint, samples, float_model = FOLDER / "checkpoint.safetensors", FOLDER / "samples", FOLDER / "float32.tflite"
    FOLDER.mkdir(parents=True, exist_ok=True)
    if arguments or not checkpoint.exists():
        _run("models.miniseal.train", "-o", checkpoint, *arguments)
    _run("models.miniseal.make_samples", checkpoint, "-o", samples, "--overwrite")
    _run("tools.convert_detector", "--model", "miniseal", "--checkpoint", checkpoint, "-o", float_model, "--refresh")
    images = ("--model", "miniseal", "--messages", samples / "messages.json", "--gates=miniseal:fp32")
    _run("tools.compare", checkpoint, float_model, *images, "-o", FOLDER / "compare.json", "--refresh")


def _run(module: str, *arguments: str | Path) -> None:
    done = subprocess.run([sys.executable, "-m", module, *map(str, arguments)], check=False)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main(*sys.argv[1:])
