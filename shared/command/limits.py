"""Limits on what is read, so that no file takes all memory or time; like those of a shell's `ulimit`, they hold for a process.

`--limit NAME=VALUE` raises one; EDGEPRESS_LIMITS in the environment holds all that were raised, for the processes a tool starts and
for scripts: `EDGEPRESS_LIMITS='megapixels=400 video-gb=50'`.
"""

import math
import os
from pathlib import Path

from shared.command.errors import ToolError

VARIABLE = "EDGEPRESS_LIMITS"
GB = 10**9
DEFAULTS: dict[str, float] = {
    "model-gb": 64,  # one file of weights: checkpoint, model, bundle, external data
    "image-mb": 256,  # one image file
    "megapixels": 178,  # one image; twice what Pillow warns at, and 0.5 GB as RGB
    "video-gb": 16,  # one video file
    "text-mb": 64,  # one JSON, CSV or TOML file
    "read-seconds": 120,  # to parse one file, or to decode one frame; large files get more
    "read-memory-gb": 6,  # that parsing one file may take, beyond the file's own size twice
}


def limit(name: str) -> float:
    """Return a limit, as it was raised or by default.

    Raises:
        ToolError: The environment holds something else than limits.
    """
    return _raised(os.environ.get(VARIABLE, "")).get(name, DEFAULTS[name])


def raise_limits(texts: list[str]) -> None:
    """Set limits for this process and those it starts, from texts such as 'megapixels=400'.

    Raises:
        ToolError: No such limit, or no positive number.
    """
    os.environ[VARIABLE] = " ".join(f"{name}={value:g}" for name, value in _raised(os.environ.get(VARIABLE, ""), *texts).items())


def _raised(*texts: str) -> dict[str, float]:
    found = {}
    for text in (word for given in texts for word in given.split()):
        name, _, value = text.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if name not in DEFAULTS or not 0 < number < math.inf:
            known = ", ".join(f"{known}={value:g}" for known, value in DEFAULTS.items())
            raise ToolError("no such limit", got=text, expected=f"NAME=VALUE, as {known}", remedy="correct --limit")
        found[name] = number
    return found


def require_size(path: Path, size_bytes: int, name: str) -> None:
    """Raise ToolError where a file is larger than a limit of that name, which ends in -gb or -mb, allows."""
    unit, most = name.rpartition("-")[2], limit(name)
    if size_bytes > most * (GB if unit == "gb" else 10**6):
        got = f"{size_bytes / (GB if unit == 'gb' else 10**6):.1f} {unit.upper()}"
        remedy = f"if it is meant to be so large, raise the limit with --limit {name}=VALUE"
        raise ToolError("the file is larger than the limit", where=path, got=got, expected=f"at most {most:g}", remedy=remedy)
