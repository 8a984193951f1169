"""Measure the published guide's method and ours, on this machine, with seeded weights of full size.

    python -m tests.bench guide                # both networks; rewrites tests/bench/guide.json and the tables made of it
    python -m tests.bench guide videoseal      # one network, printed only

The guide's method is plain `litert_torch.convert` of the loaded network, then AI Edge Quantizer as published. Where it fails, its
row says so. Our method is the tools. Every step runs in a process of its own; latencies of all models of one network come from one
comparison.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shared.command.resources import GIB, MIB
from shared.files.code_version import ROOT
from shared.networks.card import Card, load_card
from shared.runtime.benchmark import Measurement
from tests.bench.tables import machine, write_results
from tools.compare import compare
from tools.compare.comparison import Candidate, Findings

FOLDER = ROOT / "models" / "out" / "bench"
NETWORKS = ("videoseal", "chunkyseal")
RECIPES = ("int8", "fp16")
POLL_S = 0.05

GUIDE_CONVERT = """
import sys, torch, litert_torch
from safetensors.torch import load_file
from shared.networks.card import load_card
from shared.networks.detector import Detector
name, weights, output = sys.argv[1:]
card = load_card(name)
network = Detector(card.encoder, card.nbits).eval()
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
    """One process: wall time, peak resident set, peak anonymous memory (which cannot be dropped), and the error if it failed."""

    seconds: float
    peak_rss_gib: float
    peak_anonymous_gib: float
    error: str | None


@dataclass(frozen=True)
class Method:
    """One method that makes the INT8 file of one network; latencies are medians of one comparison."""

    network: str
    method: str
    convert: Step
    quantize: Step
    float_mib: float
    int8_mib: float | None
    float_ms: float
    int8_ms: float | None


@dataclass(frozen=True)
class RecipeFigures:
    """Figures of one recipe; speed-up and errors against the float32 model of the same comparison."""

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


@dataclass(frozen=True)
class Files:
    """The files of one network: seeded weights, the float32 models of both methods, and their products."""

    weights: Path
    ours: Path
    products: dict[str, Path]  # recipe -> ours
    guide: Path
    guide_int8: Path


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


def measure(network: str) -> tuple[list[Method], list[RecipeFigures]]:
    """Make the models of one network with both methods, and compare all of them in one comparison."""
    card = load_card(network)
    files = _files(card)
    say(f"{network}: ours")
    our_convert = _convert(network, files)
    our_quantize = {
        recipe: _run_or_raise("-m", "tools.quantize_tflite", files.ours, "-o", path, "--recipe", recipe)
        for recipe, path in files.products.items()
    }
    say(f"{network}: the guide's method")
    guide_convert = _run_or_raise("-c", GUIDE_CONVERT, network, files.weights, files.guide)
    guide_quantize = run("-c", GUIDE_QUANTIZE, files.guide, files.guide_int8)  # may fail: that is a result

    say(f"{network}: latencies")
    paths = [path for path in (files.guide, files.guide_int8, *files.products.values()) if path.exists()]
    found = compare(files.ours, paths, bits=card.nbits).findings
    by_path = {candidate.path: candidate for candidate in found.candidates}
    guide = _measured(by_path[files.guide])
    methods = [
        _method(network, "guide", guide_convert, guide_quantize, guide, by_path.get(files.guide_int8)),
        _method(network, "edgepress", our_convert, our_quantize["int8"], found.reference, by_path[files.products["int8"]]),
    ]
    recipes = [
        _recipe(f"{network}_{recipe}", found, by_path[path], our_convert, our_quantize[recipe])
        for recipe, path in files.products.items()
    ]
    return methods, recipes


def _files(card: Card) -> Files:
    """Return where the files of a network go; products of an earlier run are removed."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    stem = f"{card.output_prefix}_rehearsal_{card.image_size}"
    files = Files(
        weights=FOLDER / f"{card.output_prefix}_rehearsal_seed0.safetensors",
        ours=FOLDER / f"{stem}.tflite",
        products={recipe: FOLDER / f"{stem}_{recipe}.tflite" for recipe in RECIPES},
        guide=FOLDER / f"guide_{card.name}.tflite",
        guide_int8=FOLDER / f"guide_{card.name}_int8.tflite",
    )
    for path in (files.ours, *files.products.values(), files.guide, files.guide_int8):
        path.unlink(missing_ok=True)
        path.with_name(f"{path.stem}_recipe.json").unlink(missing_ok=True)
    return files


def _convert(network: str, files: Files) -> Step:
    """Convert with our tool; a first, untimed conversion writes the seeded weights, which belong to neither method."""
    command = ("-m", "tools.convert_detector", "--model", network, "--rehearsal", "-o", files.ours)
    if not files.weights.exists():
        _run_or_raise(*command)
        files.ours.unlink()
    return _run_or_raise(*command)


def _run_or_raise(*command: str | Path) -> Step:
    step = run(*command)
    if step.error:
        raise RuntimeError(step.error)
    return step


def _measured(candidate: Candidate) -> Measurement:
    if candidate.measurement is None:
        raise RuntimeError(f"{candidate.path}: {candidate.problem}")
    return candidate.measurement


def _method(
    network: str, method: str, convert: Step, quantize: Step, reference: Measurement, candidate: Candidate | None
) -> Method:
    int8 = None if candidate is None else _measured(candidate)
    return Method(
        network=network,
        method=method,
        convert=convert,
        quantize=quantize,
        float_mib=round(reference.size_bytes / MIB, 1),
        int8_mib=None if int8 is None else round(int8.size_bytes / MIB, 1),
        float_ms=round(reference.median_ms, 1),
        int8_ms=None if int8 is None else round(int8.median_ms, 1),
    )


def _recipe(recipe: str, found: Findings, candidate: Candidate, convert: Step, quantize: Step) -> RecipeFigures:
    reference, measurement = found.reference, _measured(candidate)
    assert candidate.speedup is not None and candidate.cosine is not None and candidate.bit_agreement is not None
    return RecipeFigures(
        recipe=recipe,
        float_mib=round(reference.size_bytes / MIB, 1),
        product_mib=round(measurement.size_bytes / MIB, 1),
        float_ms=round(reference.median_ms, 1),
        product_ms=round(measurement.median_ms, 1),
        speedup=round(candidate.speedup, 2),
        cosine=round(candidate.cosine, 6),
        bit_agreement=round(candidate.bit_agreement, 4),
        convert_seconds=convert.seconds,
        quantize_seconds=quantize.seconds,
    )


def say(line: str) -> None:
    sys.stderr.write(line + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench guide")
    parser.add_argument("networks", nargs="*", choices=[*NETWORKS, []], help="default: both, and the results are kept")
    networks = parser.parse_args().networks or NETWORKS
    measured = [measure(network) for network in networks]
    results: dict[str, Any] = {
        "machine": machine(),
        "methods": [asdict(method) for methods, _ in measured for method in methods],
        "products": [asdict(figures) for _, recipes in measured for figures in recipes],
    }
    if networks == NETWORKS:
        write_results("guide", results)
    else:
        sys.stdout.write(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
