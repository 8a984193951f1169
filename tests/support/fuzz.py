"""Try our readers of strangers' files on files that were changed at random, and keep those that they don't survive.

python -m tests.support.fuzz onnx --seconds 60           # one format
python -m tests.support.fuzz --all --seconds 60 --jobs 2 # all, two at a time

A reader may return or raise ToolError. Any other exception, a crash, a hang or a hunger for memory is a finding: its input is kept
in tests/data/fuzz, which tests/faults/test_fuzz.py replays. With atheris installed, inputs that reach new lines of ours, of zipfile
or of tomllib are changed further, and memory is watched; without it they are changed blindly.

Source: https://github.com/google/atheris, https://llvm.org/docs/LibFuzzer.html (options, names of what is kept)
"""

import argparse
import contextlib
import faulthandler
import hashlib
import importlib.util
import math
import random
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from shared.calibration.dataset import CalibrationSet
from shared.command.errors import ToolError, first_line, one_line
from shared.formats import onnx_file, onnx_graph, tflite
from shared.formats.model_file import ModelFile
from shared.formats.tensors import TensorSpec
from shared.media.images import read_pixels
from shared.networks.card import load_card
from shared.networks.checkpoint import open_checkpoint, require_sound
from shared.networks.pth_check import check_pth
from tests.support import corruptions, small_files
from tests.support.corruptions import Mutate, scramble
from tools.prepare_calibration.sources import Columns, find_sources
from tools.quantize_tflite.bundle import copy_appended_zip, is_bundle, models_of, pack_bundle, unpack_bundle
from tools.quantize_tflite.graph.repair import needed_repairs
from tools.quantize_tflite.worker import require_finite

ROOT = Path(__file__).resolve().parent.parent.parent
FOUND = ROOT / "tests" / "data" / "fuzz"
TIMEOUT_S = 20  # for one input
MEMORY_MB = 4096
LARGEST = 65536  # bytes of an input
START_S = 120  # a child has to import torch, and to end
MOST_DEATHS = 20  # of a target's children
INPUTS = [TensorSpec("image", (1, 3, 2, 2), "float32")]
PLAIN = "from tests.support import fuzz\n"
GUIDED = """import atheris
with atheris.instrument_imports(include=["shared", "tools", "zipfile", "tomllib"]):
    from tests.support import fuzz
"""


@dataclass(frozen=True)
class Target:
    """A reader to try.

    Args:
        read: Gets a file's content; may raise ToolError.
        seeds: Makes valid contents.
        bend: Changes one; may fail where it can't be taken apart.
    """

    read: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    bend: Mutate

    def mutate(self, data: bytes, rng: random.Random) -> bytes:
        """Return the content changed: as one of its format, mostly, or byte by byte."""
        with contextlib.suppress(Exception):  # whatever a changed file can do to what takes it apart
            if rng.random() < 0.8:
                return self.bend(data, rng)[:LARGEST]
        return scramble(data, rng)[:LARGEST]

    def attempt(self, data: bytes) -> BaseException | None:
        """Read the content; return what came out of it that no reader may raise, or None."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.read(data)
        except (ToolError, KeyboardInterrupt) as error:
            if isinstance(error, KeyboardInterrupt):
                raise
        except BaseException as error:  # noqa: BLE001 - a panic in Rust is no Exception
            return error
        return None


@dataclass
class Outcome:
    """What came of a target.

    Args:
        executions: Inputs tried.
        coverage: Edges of our code that were reached, where they are counted.
        findings: Name of the kept input, and what happened.
    """

    executions: int = 0
    coverage: int | None = None
    findings: dict[str, str] = field(default_factory=dict)


@contextlib.contextmanager
def file_of(data: bytes, name: str) -> Iterator[Path]:
    """Yield a file of that content in a folder of its own: what is known of a path is known of one file only."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        yield path


def read_bundle(data: bytes) -> None:
    """Unpack a bundle; what can be unpacked must come out the same when it was packed again."""
    with file_of(data, "a.task") as path:
        is_bundle(path)
        entries = unpack_bundle(path, path.with_name("one"))
        again = path.with_name("b.task")
        pack_bundle(entries, again, {})
        try:
            same = unpack_bundle(again, path.with_name("other"))
        except ToolError as error:
            raise AssertionError(f"what was packed again can't be unpacked: {error}") from error
        for (one, before), (other, after) in zip(models_of(entries), models_of(same), strict=True):
            assert one == other and before.path.read_bytes() == after.path.read_bytes()


def read_checkpoint(data: bytes) -> None:
    """Open a checkpoint, and touch all of its tensors."""
    with file_of(data, "a.pth") as path:
        with contextlib.suppress(ToolError):
            check_pth(path)
        checkpoint = open_checkpoint(path)
        for tensors in (checkpoint.state, *({str(n): t for n, t in enumerate(more)} for more in checkpoint.beside.values())):
            with contextlib.suppress(ToolError):
                require_sound(tensors, path, integers=True)


def read_tflite(data: bytes) -> None:
    """Read all that a TFLite file holds besides its weights, and check these."""
    with file_of(data, "a.tflite") as path:
        tflite.check_is_tflite(path)
        target = path.with_name("b.tflite")
        target.write_bytes(b"model")
        for read in (tflite.read_tflite, needed_repairs, require_finite):
            with contextlib.suppress(ToolError):
                read(path)
        copy_appended_zip(path, target)


def read_onnx(data: bytes) -> None:
    """Read all that an ONNX file holds besides its weights, and check these, weights in a file of their own included."""
    with file_of(data, "a.onnx") as path:
        path.with_name("weights.data").write_bytes(bytes(4096))
        onnx_graph.read_onnx(path)
        with contextlib.suppress(ToolError):
            onnx_file.check_constants(path)
            onnx_file.require_finite(path)
        onnx_graph.readers_of(onnx_file.read_model(path).graph)
        ModelFile(path).why_slow()


def read_card(data: bytes) -> None:
    """Load a model card."""
    with file_of(data, "a.toml") as path:
        card = load_card(str(path))
        card.find_checkpoint()
        card.as_arguments()


def read_list(data: bytes) -> None:
    """Find what a CSV names."""
    with file_of(data, "a.csv") as path:
        find_sources([path], Columns())


def read_arrays(data: bytes) -> None:
    """Read a calibration set of arrays."""
    with file_of(data, "a.npz") as path:
        CalibrationSet(path).check(INPUTS, (0.0, 1.0))


def read_manifest(data: bytes) -> None:
    """Read what a calibration manifest names."""
    with file_of(data, "manifest.json") as path:
        path.with_name("tile.png").write_bytes(TILE)
        CalibrationSet(path).has_holdout()
        with contextlib.suppress(ToolError):
            list(CalibrationSet(path, "0..1", part="holdout").samples(INPUTS))
        list(CalibrationSet(path, "0..1").samples(INPUTS))


def read_image(data: bytes) -> None:
    """Decode an image."""
    with file_of(data, "a.png") as path:
        read_pixels(path)


TILE = small_files.images()[0]
TARGETS = {
    "bundle": Target(read_bundle, small_files.bundles, corruptions.bend_zip(corruptions.bend_bundle_entry)),
    "checkpoint": Target(read_checkpoint, small_files.checkpoints, corruptions.bend_checkpoint),
    "tflite": Target(read_tflite, small_files.tflites, corruptions.bend_tflite),
    "onnx": Target(read_onnx, small_files.onnxes, corruptions.bend_onnx),
    "card": Target(read_card, small_files.cards, corruptions.bend_text(corruptions.TOML)),
    "csv": Target(read_list, small_files.lists, corruptions.bend_text(corruptions.CSV)),
    "npz": Target(read_arrays, small_files.arrays, corruptions.bend_zip(corruptions.bend_array)),
    "manifest": Target(read_manifest, small_files.manifests, corruptions.bend_json),
    "image": Target(read_image, small_files.images, corruptions.bend_image),
}


def describe(error: BaseException) -> str:
    """Return type, place in our code and first line of an error."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [str(ROOT / package) for package in ("shared", "tools")]
    ours = [frame for frame in frames if frame.filename.startswith(tuple(own))] or list(frames)
    place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
    return one_line(f"{type(error).__name__} in {place}: {first_line(error)[:200]}")


def name_of(data: bytes, kind: str = "crash") -> str:
    """Return what an input is kept under."""
    return f"{kind}-{hashlib.sha1(data, usedforsecurity=False).hexdigest()[:8]}"


class Notebook:
    """What a child notes: one input for each kind of error, and the error in its log.

    Args:
        target: What is tried.
        folder: Where inputs go.
    """

    def __init__(self, target: Target, folder: Path) -> None:
        self._target, self._folder, self._seen = target, folder, set[str]()

    def attempt(self, data: bytes) -> None:
        """Try one input, and note a new kind of error."""
        error = self._target.attempt(data)
        if error is None:
            return
        what = describe(error)
        if (kind := what.partition(": ")[0]) not in self._seen:
            self._seen.add(kind)
            (self._folder / name_of(data)).write_bytes(data)
            sys.stderr.write(f"finding {name_of(data)} {what}\n{''.join(traceback.format_exception(error))}")


def explore(arguments: Sequence[str]) -> None:
    """Try inputs until time is up; runs in a child, which may die of one."""
    name, place, seconds, seed = arguments
    target, folder = TARGETS[name], Path(place)
    (folder / "started").touch()
    notebook = Notebook(target, folder / "found")
    if "atheris" in sys.modules:
        _explore_guided(target, notebook, folder, int(seconds), int(seed))
    else:
        _explore_blindly(target, notebook, folder, int(seconds), int(seed))


def _explore_guided(target: Target, notebook: Notebook, folder: Path, seconds: int, seed: int) -> None:
    import atheris

    def bend(data: bytes, most: int, number: int) -> bytes:
        rng = random.Random(number)
        return target.mutate(data, rng)[:most] if rng.random() < 0.7 else bytes(atheris.Mutate(data, most))

    options = {"timeout": TIMEOUT_S, "rss_limit_mb": MEMORY_MB, "max_len": LARGEST, "max_total_time": seconds, "seed": seed + 1}
    quiet = {"detect_leaks": 0, "report_slow_units": 1000, "artifact_prefix": f"{folder / 'found'}/"}
    flags = [f"-{option}={value}" for option, value in {**options, **quiet}.items()]
    atheris.Setup(["fuzz", *flags, str(folder / "corpus")], notebook.attempt, custom_mutator=bend)
    atheris.Fuzz()


def _explore_blindly(target: Target, notebook: Notebook, folder: Path, seconds: int, seed: int) -> None:
    rng = random.Random(seed)
    corpus = [path.read_bytes() for path in sorted((folder / "corpus").iterdir())]
    waiting, count, end = list(corpus), 0, time.monotonic() + seconds
    while waiting or time.monotonic() < end:
        data = waiting.pop() if waiting else target.mutate(rng.choice(corpus), rng)
        (folder / "current").write_bytes(data)
        faulthandler.dump_traceback_later(TIMEOUT_S, exit=True)
        notebook.attempt(data)
        count += 1
        if count % 100 == 0:
            sys.stderr.write(f"#{count}\n")
    faulthandler.cancel_dump_traceback_later()
    (folder / "current").unlink(missing_ok=True)
    sys.stderr.write(f"#{count} DONE\n")


def pursue(name: str, seconds: int, seed: int = 0, *, keep: Path = FOUND, child: str | None = None) -> Outcome:
    """Try a target for some seconds, in children that are started again when one dies.

    Args:
        name: Of the target.
        seconds: How long.
        seed: The same seed, the same first inputs.
        keep: Where to keep inputs, in a folder of the target's name.
        child: Program of the children; default: guided where atheris is installed.
    """
    program = child or (GUIDED if importlib.util.find_spec("atheris") else PLAIN)
    outcome, left = Outcome(), float(seconds)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for part in ("corpus", "found"):
            (folder / part).mkdir()
        former = [path.read_bytes() for path in sorted((FOUND / name).glob("*"))]
        for data in (*TARGETS[name].seeds(), *former):
            (folder / "corpus" / hashlib.sha1(data, usedforsecurity=False).hexdigest()).write_bytes(data)
        for life in range(MOST_DEATHS):
            command = [sys.executable, "-c", f"import sys\n{program}fuzz.explore(sys.argv[1:])"]
            code, log, lived = _live(command, name, folder, max(round(left), 1), seed + life)
            _take_stock(outcome, code, log, folder, keep / name)
            left -= lived
            if code == 0 or left <= 0:
                break
    return outcome


def _live(command: list[str], name: str, folder: Path, seconds: int, seed: int) -> tuple[int, str, float]:
    """Run a child to its end; return its exit code, its log, and how many seconds it tried inputs."""
    started = folder / "started"
    started.unlink(missing_ok=True)
    with (folder / "log").open("w+b") as log:
        arguments = [*command, name, str(folder), str(seconds), str(seed)]
        with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=log, cwd=ROOT) as process:
            try:
                code = process.wait(seconds + START_S + TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
        log.seek(0)
        # A child that can't start is not tried again.
        lived = time.time() - started.stat().st_mtime if started.exists() else math.inf
        return code, log.read().decode(errors="replace"), lived


def _take_stock(outcome: Outcome, code: int, log: str, folder: Path, keep: Path) -> None:
    """Add what a child did, and keep its findings; what it died of is not tried again."""
    counts = [int(count) for count in re.findall(r"^#(\d+)", log, re.MULTILINE)]
    outcome.executions += max(counts, default=0)
    reached = [int(edges) for edges in re.findall(r"^#\d+.* cov: (\d+)", log, re.MULTILINE)]
    outcome.coverage = max([*reached, outcome.coverage or 0]) or None
    reported = dict(re.findall(r"^finding (\S+) (.*)", log, re.MULTILINE))
    if code and (current := folder / "current").exists():
        current.rename(folder / "found" / f"{'timeout' if 'Timeout (' in log else 'crash'}-current")
    deaths = 0
    for path in sorted((folder / "found").iterdir()):
        data, kind = path.read_bytes(), path.name.partition("-")[0]
        deaths += path.name not in reported
        said = reported.get(path.name) or f"{kind}: the child ended with {code}"
        known = {other.partition(": ")[0] for other in outcome.findings.values()}
        if path.name not in reported or said.partition(": ")[0] not in known:
            keep.mkdir(parents=True, exist_ok=True)
            (keep / name_of(data, kind)).write_bytes(data)
            outcome.findings[name_of(data, kind)] = said
        (folder / "corpus" / hashlib.sha1(data, usedforsecurity=False).hexdigest()).unlink(missing_ok=True)
        path.unlink()
    if code and not deaths:
        last = next((line for line in reversed(log.splitlines()) if line.strip()), "")
        outcome.findings[f"no input ({code})"] = f"the fuzzer ended with {code}: {one_line(last)[:300]}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="nox -s fuzz --")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--all", action="store_true", help="all targets, one after the other")
    parser.add_argument("--seconds", type=int, default=60, help="for each target; default: 60")
    parser.add_argument("--jobs", type=int, default=1, help="targets at a time; default: 1")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    names = list(TARGETS) if options.all else options.targets
    if not names or not set(names) <= TARGETS.keys():
        parser.error(f"name targets out of {', '.join(TARGETS)}, or say --all")
    found = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for name, outcome in zip(names, pool.map(lambda name: pursue(name, options.seconds, options.seed), names), strict=True):
            reached = "" if outcome.coverage is None else f", coverage {outcome.coverage}"
            print(f"{name}: {outcome.executions} executions{reached}, {len(outcome.findings)} findings", flush=True)
            for kept, said in outcome.findings.items():
                print(f"  tests/data/fuzz/{name}/{kept}: {said}", flush=True)
            found += len(outcome.findings)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
