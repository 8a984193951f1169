"""Small networks with the published code's outputs, converted once per run, and other people's files where they are."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.support.fork_server import ForkServer

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
REALDATA = ROOT.parent / "shared" / "data"
TABLE = "bad inputs: row, tool, input, exit code, verdict, line"  # recorded by tests, printed behind their results


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let tests of faults at random moments run more often: `--rounds 50`."""
    parser.addoption("--rounds", type=int, default=2, help="Random moments, or quarters of bit flips, for each tool and format.")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests on other people's files where these are absent, and say so."""
    if not REALDATA.is_dir():
        for item in items:
            if item.get_closest_marker("realdata"):
                item.add_marker(pytest.mark.skip(reason="other people's files (../shared/data) are not here"))


@dataclass(frozen=True)
class Small:
    """A small network of the published kind: card, checkpoint, and the published code's output for one batch."""

    card: Path
    checkpoint: Path


def write_card(path: Path, **changes: object) -> Path:
    """Write a model card for a small network, with some fields changed."""
    fields: dict[str, object] = {
        "title": "Small",
        "nbits": 32,
        "depths": [1, 1, 2, 1],
        "dims": [16, 32, 48, 64],
        "stem_stride": 4,
        "image_size": 64,
        "output_prefix": f"small_detector_{path.stem}",
    }
    lines = [f"{name} = {json.dumps(value)}" for name, value in {**fields, **changes}.items()]
    path.write_text("\n".join(lines) + '\n[checkpoint]\nurl = "https://example.org/small.pth"\n')
    return path


@pytest.fixture(scope="module", autouse=True)
def few_runs() -> Iterator[None]:
    """Time every model a few times only; modules about timing replace this."""
    from shared.runtime import benchmark

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "BUDGET_S", 0.0)
        yield


@pytest.fixture(scope="session")
def videoseal_small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """VideoSeal's kind: stem stride 4, 32 bits."""
    folder = tmp_path_factory.mktemp("videoseal_small")
    return Small(write_card(folder / "videoseal_small.toml"), DATA / "parity_videoseal_small.safetensors")


VIT_CARD = """title = "Small"
nbits = 24
image_size = 64
output_prefix = "small_detector_videoseal_0.0"
[vit]
patch = 8
window = 4
channels = 48
features = 40
blocks = 4
heads = 3
global_blocks = [1, 3]
[checkpoint]
url = "https://example.org/small.pth"
"""


@pytest.fixture(scope="session")
def videoseal_0_small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """VideoSeal 0.0's kind: a vision transformer, 24 bits."""
    card = tmp_path_factory.mktemp("videoseal_0_small") / "videoseal_0_small.toml"
    card.write_text(VIT_CARD)
    return Small(card, DATA / "parity_detector_videoseal00_small.safetensors")


@pytest.fixture(scope="session")
def chunkyseal_small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """ChunkySeal's kind: stem stride 2, channels grown with the square root of the bits."""
    folder = tmp_path_factory.mktemp("chunkyseal_small")
    card = write_card(folder / "chunkyseal_small.toml", nbits=256, dims=[22, 33, 45, 67], stem_stride=2)
    return Small(card, DATA / "parity_chunkyseal_small.safetensors")


def make_once(name: str, make: Callable[[Path], None], factory: pytest.TempPathFactory) -> Path:
    """Return a folder of files that the first of pytest's workers makes, and every worker copies.

    Args:
        name: Name of the folder.
        make: Writes the files to a folder.
        factory: Of this worker's folders; those of all workers lie in one.
    """
    own, common = factory.mktemp(name), factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        common = common.parent
    shared, done = common / f"{name}_of_all", common / f"{name}_of_all.done"
    with FileLock(common / f"{name}_of_all.lock"):
        if not done.exists():
            shared.mkdir()
            make(shared)
            done.touch()
    return Path(shutil.copytree(shared, own / "copy"))


@pytest.fixture(scope="session")
def float_models(videoseal_small: Small, chunkyseal_small: Small, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both small networks as float32 TFLite models."""
    from tools.convert_detector import convert_detector

    smalls = (videoseal_small, chunkyseal_small)

    def make(folder: Path) -> None:
        for small in smalls:
            output = folder / f"{small.card.stem}.tflite"
            convert_detector(model=str(small.card), checkpoint=small.checkpoint, output=output)

    folder = make_once("models", make, tmp_path_factory)
    return {small.card.stem: folder / f"{small.card.stem}.tflite" for small in smalls}


@pytest.fixture(scope="session")
def float_model(float_models: dict[str, Path]) -> Path:
    """The small VideoSeal network as float32 TFLite model."""
    return float_models["videoseal_small"]


@dataclass(frozen=True)
class Miniseal:
    """The trained miniature that ships with the project: its checkpoint, its products, its labelled samples."""

    checkpoint: Path
    float_model: Path
    int8: Path
    messages: Path


@pytest.fixture(scope="session")
def miniseal(tmp_path_factory: pytest.TempPathFactory) -> Miniseal:
    """Convert and quantize the trained miniature."""
    from tools.convert_detector import convert_detector
    from tools.convert_detector.command import Precision

    source = ROOT / "models" / "miniseal"
    checkpoint = source / "checkpoint.safetensors"

    def make(folder: Path) -> None:
        convert_detector(model="miniseal", checkpoint=checkpoint, quantize=Precision.INT8, output=folder / "int8.tflite")

    folder = make_once("miniseal", make, tmp_path_factory)
    (float_model,) = (path for path in folder.glob("*.tflite") if path.name != "int8.tflite")
    return Miniseal(checkpoint, float_model, folder / "int8.tflite", source / "samples" / "messages.json")


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Return what runs tools fast, as their users do."""
    with ForkServer() as process:
        yield process


@pytest.fixture(scope="session")
def rounds(request: pytest.FixtureRequest) -> int:
    """Return how often tests of chance repeat themselves."""
    return int(request.config.getoption("--rounds"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what tests recorded as rows of a table, whether they passed or not."""
    reports = [report for found in terminalreporter.stats.values() for report in found if isinstance(report, pytest.TestReport)]
    rows = [row for report in reports if report.when == "call" for name, row in report.user_properties if name == TABLE]
    if rows:
        terminalreporter.section(TABLE)
        widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
        for row in rows:
            terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run_tool() -> Run:
    """Return a function that runs a tool as its users do: `run_tool("verify", "model.tflite")`."""

    def run(name: str, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", f"tools.{name}", *map(str, arguments)]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env, timeout=300)

    return run
