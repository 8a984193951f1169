"""Measure the guide's way and ours side by side, on this machine, with seeded weights of full size.

    nox -s bench                       # both sizes; rewrites tests/bench/guide.json and the tables in README.md
    nox -s bench -- videoseal          # one size, printed only

The guide's way is plain `litert_torch.convert` of the loaded network, then AI Edge Quantizer as published. Where it fails, that
is its row. Ours are the tools. Every step runs in a process of its own; latencies of all models of one size come from one run.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from shared.command.resources import GIB, MIB, cpu_count
from shared.files.code_version import ROOT
from shared.networks.card import load_card
from shared.runtime.benchmark import Measured
from tools.compare import compare
from tools.compare.comparison import Candidate

RESULTS = Path(__file__).with_suffix(".json")
README = ROOT / "README.md"
FOLDER = Path("models")
SIZES = ("videoseal", "chunkyseal")
RECIPES = ("int8", "fp16")
POLL_S = 0.05
PACKAGES = ("torch", "litert-torch", "ai-edge-quantizer", "ai-edge-litert")

GUIDE_CONVERT = """
import sys, torch, litert_torch
from safetensors.torch import load_file
from shared.networks.card import load_card
from tools.compare.comparison import Candidate
from shared.networks.detector import Detector
name, weights, output = sys.argv[1:]
card = load_card(name)
network = Detector(card).eval()
state = {key.removeprefix(card.checkpoint.prefix): value for key, value in load_file(weights).items()}
network.load_state_dict(state)
litert_torch.convert(network, (torch.zeros(1, 3, card.image_size, card.image_size),)).export(output)
"""
GUIDE_QUANTIZE = """
import sys
from ai_edge_quantizer import quantizer, recipe
source, output = sys.argv[1:]
quantizer.Quantizer(source, recipe.dynamic_wi8_afp32()).quantize().export_model(output, overwrite=True)
"""


@dataclass(frozen=True)
class Step:
    """One process: wall time, peak resident set, peak anonymous memory (what can't be dropped), and the error if it failed."""

    seconds: float
    peak_rss_gib: float
    peak_anonymous_gib: float
    error: str | None


@dataclass(frozen=True)
class Way:
    """One way to the INT8 file at one size; latencies are medians of one comparison."""

    size: str
    way: str
    convert: Step
    quantize: Step
    float_mib: float
    int8_mib: float | None
    float_ms: float
    int8_ms: float | None


@dataclass(frozen=True)
class Product:
    """What one recipe gives; speed-up and errors against the float32 model of the same run."""

    recipe: str
    float_mib: float
    product_mib: float
    float_ms: float
    product_ms: float
    speedup: float
    cosine: float
    bit_agreement: float
    convert_seconds: float
    quantize_seconds: float


def run(*command: str | Path) -> Step:
    """Run a Python command in a session of its own and watch the memory of all its processes."""
    start = time.monotonic()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([sys.executable, *map(str, command)], stdout=log, stderr=log, start_new_session=True, env=env)
        anonymous, pid = 0, 0
        while pid == 0:
            anonymous = max(anonymous, sum(_anonymous_bytes(process.pid)))
            time.sleep(POLL_S)
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - start
        log.seek(0)
        lines = [line.strip() for line in log.read().splitlines() if line.strip()]
    error = None if process.returncode == 0 else lines[-1] if lines else f"exit {process.returncode}"
    return Step(round(seconds, 1), round(usage.ru_maxrss * 1024 / GIB, 2), round(anonymous / GIB, 2), error)


def _anonymous_bytes(session: int) -> Iterator[int]:
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                resident = re.search(r"RssAnon:\s+(\d+)", (folder / "status").read_text())
                yield int(resident[1]) * 1024 if resident else 0  # a process that has just ended has none


def measure_size(size: str) -> tuple[list[Way], list[Product]]:
    """Press one network in both ways and compare all four models in one run."""
    card = load_card(size)
    stem = FOLDER / f"{card.output_prefix}_rehearsal_{card.image_size}"
    weights = FOLDER / f"{card.output_prefix}_rehearsal_seed0.safetensors"
    guide, ours = FOLDER / f"bench_guide_{size}.tflite", stem.with_name(stem.name + ".tflite")
    guide_int8 = FOLDER / f"bench_guide_{size}_int8.tflite"
    products = {recipe: stem.with_name(f"{stem.name}_{recipe}.tflite") for recipe in RECIPES}
    for path in (guide, ours, guide_int8, *products.values()):
        path.unlink(missing_ok=True)

    say(f"{size}: ours")
    if not weights.exists():  # writing them is no part of either way: a first conversion does it, the second is timed
        run("-m", "tools.convert_detector", "--model", size, "--rehearsal", "-o", ours)
        ours.unlink()
    our_convert = run("-m", "tools.convert_detector", "--model", size, "--rehearsal", "-o", ours)
    our_quantize = {
        recipe: run("-m", "tools.quantize_tflite", ours, "-o", path, "--recipe", recipe) for recipe, path in products.items()
    }
    say(f"{size}: the guide's way")
    guide_convert = run("-c", GUIDE_CONVERT, size, weights, guide)
    guide_quantize = run("-c", GUIDE_QUANTIZE, guide, guide_int8)
    for step in (our_convert, *our_quantize.values(), guide_convert):
        if step.error:
            raise RuntimeError(step.error)

    say(f"{size}: latencies")
    candidates = [path for path in (guide, guide_int8, *products.values()) if path.exists()]
    found = compare(ours, candidates, bits=card.nbits).findings
    by_path = {candidate.path: candidate for candidate in found.candidates}
    ways = [
        _way(size, "guide", guide_convert, guide_quantize, _measured(by_path[guide]), by_path.get(guide_int8)),
        _way(size, "edgepress", our_convert, our_quantize["int8"], found.reference, by_path[products["int8"]]),
    ]
    rows = [
        _product(f"{size}_{recipe}", found.reference, by_path[path], our_convert, our_quantize[recipe])
        for recipe, path in products.items()
    ]
    for path in (guide, guide_int8):
        path.unlink(missing_ok=True)
    return ways, rows


def _measured(candidate: Candidate) -> Measured:
    if candidate.measured is None:
        raise RuntimeError(f"{candidate.path}: {candidate.error}")
    return candidate.measured


def _way(size: str, way: str, convert: Step, quantize: Step, whole: Measured, pressed: Candidate | None) -> Way:
    int8 = None if pressed is None else _measured(pressed)
    return Way(
        size=size,
        way=way,
        convert=convert,
        quantize=quantize,
        float_mib=round(whole.size_bytes / MIB, 1),
        int8_mib=None if int8 is None else round(int8.size_bytes / MIB, 1),
        float_ms=round(whole.median_ms, 1),
        int8_ms=None if int8 is None else round(int8.median_ms, 1),
    )


def _product(recipe: str, whole: Measured, pressed: Candidate, convert: Step, quantize: Step) -> Product:
    measured = _measured(pressed)
    assert pressed.speedup is not None and pressed.cosine is not None and pressed.bit_agreement is not None
    return Product(
        recipe=recipe,
        float_mib=round(whole.size_bytes / MIB, 1),
        product_mib=round(measured.size_bytes / MIB, 1),
        float_ms=round(whole.median_ms, 1),
        product_ms=round(measured.median_ms, 1),
        speedup=round(pressed.speedup, 2),
        cosine=round(pressed.cosine, 6),
        bit_agreement=round(pressed.bit_agreement, 4),
        convert_seconds=convert.seconds,
        quantize_seconds=quantize.seconds,
    )


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Return the tables of README.md by the name of their markers."""
    ways = [
        "| network | way | convert | peak memory | quantize | peak memory | float32 | INT8 | float32 run | INT8 run |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for way in results["ways"]:
        convert, quantize = way["convert"], way["quantize"]
        cells = [load_card(way["size"]).title, way["way"], f"{convert['seconds']:.0f} s", _memory(convert)]
        cells += ["**fails**", _memory(quantize)] if quantize["error"] else [f"{quantize['seconds']:.0f} s", _memory(quantize)]
        cells += [f"{way['float_mib']} MiB", "none" if way["int8_mib"] is None else f"{way['int8_mib']} MiB"]
        cells += [f"{way['float_ms']:.0f} ms", "none" if way["int8_ms"] is None else f"{way['int8_ms']:.0f} ms"]
        ways.append("| " + " | ".join(cells) + " |")
    recipes = [
        "| recipe | float32 | product | smaller by | float32 run | product run | speed-up | cosine | bits alike |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["products"]:
        cells = [
            f"`{row['recipe']}`",
            f"{row['float_mib']} MiB",
            f"{row['product_mib']} MiB",
            f"{1 - row['product_mib'] / row['float_mib']:.1%}",
        ]
        cells += [
            f"{row['float_ms']:.0f} ms",
            f"{row['product_ms']:.0f} ms",
            f"{row['speedup']:.1f}",
            f"{row['cosine']:.5f}",
            f"{row['bit_agreement']:.3f}",
        ]
        recipes.append("| " + " | ".join(cells) + " |")
    return {"ways": "\n".join(ways), "recipes": "\n".join(recipes)}


def _memory(step: dict[str, Any]) -> str:
    return f"{step['peak_anonymous_gib']:.1f} GiB"


def fill(text: str, results: dict[str, Any]) -> str:
    """Return the text with each table put between its markers."""
    for name, table in tables(results).items():
        text = replace_between(text, name, table)
    return text


def replace_between(text: str, name: str, content: str) -> str:
    """Return the text with something put between the markers of that name, `<!-- bench: NAME -->` and `<!-- end -->`."""
    pattern = rf"(<!-- bench: {name} -->\n).*?(<!-- end -->)"
    return re.sub(pattern, lambda found: f"{found[1]}{content}\n{found[2]}", text, flags=re.DOTALL)


def say(line: str) -> None:
    sys.stderr.write(line + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="nox -s bench --")
    parser.add_argument("sizes", nargs="*", choices=[*SIZES, []], help="default: both, and the results are kept")
    sizes = parser.parse_args().sizes or SIZES
    ways, products = [], []
    for size in sizes:
        more_ways, more_products = measure_size(size)
        ways += more_ways
        products += more_products
    machine = {"cpus": cpu_count(), "python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}
    results = {"machine": machine, "ways": [asdict(way) for way in ways], "products": [asdict(product) for product in products]}
    sys.stdout.write("\n\n".join(tables(results).values()) + "\n")
    if sizes == SIZES:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        README.write_text(fill(README.read_text(), results))


if __name__ == "__main__":
    main()
