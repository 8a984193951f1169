"""One flipped bit in a file: it is caught, or changes nothing, or the provenance tells that nothing vouched for what was read.

With a checksum beside the file every flip is caught.
"""

import hashlib
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from shared.command.errors import ToolError
from shared.files.provenance import read_provenance
from tests.conftest import REALDATA
from tests.faults.test_interruptions import CHECKPOINT, FEW, MINISR
from tests.support import small_onnx
from tests.support.crash_scenarios import faults_of_refusal, hashes
from tests.support.fork_server import Done, ForkServer

OUTCOMES = ("caught", "harmless", "changed and told", "WRONG")


@dataclass(frozen=True)
class Format:
    """A file whose bits are flipped, and the command that makes a product of it.

    Args:
        make: Writes all that the command reads to a folder.
        flipped: The file of them.
        tool: The tool.
        arguments: Its command line.
        product: What it makes.
        has_checksums: Whether the format has checksums of its own, so that no flip changes the product.
        is_model: Whether the product's provenance tells how far its answers are from the original's.
        is_slow: Whether a run takes seconds.
    """

    make: Callable[[Path], object]
    flipped: str
    tool: str
    arguments: tuple[str, ...]
    product: str
    has_checksums: bool = False
    is_model: bool = False
    is_slow: bool = True


def _copied(*sources: Path) -> Callable[[Path], object]:
    return lambda folder: [shutil.copy(source, folder / f"in{source.suffix}") for source in sources]


def _pth(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save({"model": load_file(CHECKPOINT)}, folder / "in.pth")


def _external(folder: Path) -> None:
    small_onnx.with_external_weights(small_onnx.save_picture_model(folder / "in.onnx"))


def _npz(folder: Path) -> None:
    shutil.copy(MINISR / "minisr_x2.onnx", folder / "model.onnx")
    name = small_onnx.onnx.load(str(folder / "model.onnx")).graph.input[0].name
    np.savez(folder / "in.npz", **{name: np.abs(small_onnx.seeded(2, 3, 32, 32)).clip(0, 1)})


EXTRACT = ("extract_weights", ("in.safetensors", "-o", "out.safetensors"), "out.safetensors")
CUT = ("-o", "out", "--tile-size", "64", "--max-samples", "4", "--min-samples", "1", "--npz")
FORMATS = {
    ".pth": Format(_pth, "in.pth", "extract_weights", ("in.pth", "-o", "out.safetensors"), "out.safetensors", True, is_slow=False),
    ".safetensors": Format(_copied(CHECKPOINT), "in.safetensors", *EXTRACT, is_slow=False),
    ".tflite": Format(
        _copied(REALDATA / "tflite" / "mlperf_tiny_resnet_float.tflite"),
        "in.tflite",
        "quantize_tflite",
        ("in.tflite", "-o", "out.tflite"),
        "out.tflite",
        is_model=True,
    ),
    ".task": Format(
        _copied(REALDATA / "mediapipe" / "face_landmarker.task"),
        "in.task",
        "quantize_tflite",
        ("in.task", "-o", "out.task"),
        "out.task",
        True,
    ),
    ".onnx": Format(
        _copied(REALDATA / "onnx" / "srcnn_DerBurri.onnx"),
        "in.onnx",
        "quantize_onnx",
        ("in.onnx", "-o", "out.onnx", "--recipe", "fp16"),
        "out.onnx",
        is_model=True,
    ),
    ".onnx with weights beside": Format(
        _external, "weights.data", "quantize_onnx", ("in.onnx", "-o", "out.onnx", "--recipe", "fp16"), "out.onnx", is_model=True
    ),
    ".npz": Format(
        _npz,
        "in.npz",
        "quantize_onnx",
        ("model.onnx", "-o", "out.onnx", "--calibration", "in.npz"),
        "out.onnx",
        True,
        is_model=True,
    ),
    ".png": Format(
        _copied(REALDATA / "images" / "set5_bird_x2lr.png"),
        "in.png",
        "prepare_calibration",
        ("in.png", *CUT),
        "out/manifest.json",
        True,
        is_slow=False,
    ),
    ".jpg": Format(
        _copied(REALDATA / "images" / "videoseal_1.jpg"),
        "in.jpg",
        "prepare_calibration",
        ("in.jpg", *CUT),
        "out/manifest.json",
        is_slow=False,
    ),
    ".mp4": Format(
        _copied(REALDATA / "video" / "videoseal_1.mp4"),
        "in.mp4",
        "prepare_calibration",
        ("in.mp4", *CUT, "--frames-per-video", "2"),
        "out/manifest.json",
    ),
}
OURS = (".pth", ".safetensors", ".onnx with weights beside", ".npz")
ALL = [name if name in OURS else pytest.param(name, marks=pytest.mark.realdata) for name in FORMATS]


@dataclass(frozen=True)
class Undisturbed:
    """A folder with all that a command reads, and what it makes of it."""

    folder: Path
    content: bytes
    products: dict[str, str]

    def flip(self, bit: int, folder: Path, flipped: str) -> bytes:
        """Make a folder of it in which one bit of one file is another; return that file's content."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder, folder)
        content = bytearray(self.content)
        content[bit // 8] ^= 1 << bit % 8
        (folder / flipped).write_bytes(content)
        return bytes(content)


@pytest.fixture(scope="module")
def undisturbed(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Undisturbed]:
    """Return a function that gives what a format's command makes of the file as it is, made once."""
    made: dict[str, Undisturbed] = {}

    def find(name: str) -> Undisturbed:
        if name not in made:
            wanted, folder = FORMATS[name], tmp_path_factory.mktemp("whole") / "run"
            folder.mkdir()
            wanted.make(folder)
            done_in = folder.with_name("done")
            shutil.copytree(folder, done_in)
            done = fork_server.run(wanted.tool, *wanted.arguments, folder=done_in)
            assert done.code == 0, done.stderr
            products = _products(done_in, folder, wanted)
            made[name] = Undisturbed(folder, (folder / wanted.flipped).read_bytes(), products)
        return made[name]

    return find


def _products(folder: Path, inputs: Path, wanted: Format) -> dict[str, str]:
    """Return what a tool made, but for provenance, and for hashes of what it read in a manifest."""
    found = {name: digest for name, digest in hashes(folder).items() if not (inputs / name).exists()}
    found.pop(f"{wanted.product}.json", None)
    if wanted.product.endswith("manifest.json") and (folder / wanted.product).exists():
        manifest = json.loads((folder / wanted.product).read_text())
        for entry in (*manifest["samples"], *manifest["holdout"]):
            entry.pop("source_sha256")
        found[wanted.product] = json.dumps(manifest)
    return found


def outcome(wanted: Format, done: Done, folder: Path, content: bytes, whole: Undisturbed) -> str:
    """Return what became of a flip, or what is wrong."""
    products = _products(folder, whole.folder, wanted)
    if done.code != 0:
        wrong = [*faults_of_refusal(done, (1, 2)), *(f"written: {name}" for name in products)]
        return "caught" if not wrong else "; ".join(wrong)
    if products == whole.products:
        return "harmless"
    return _reported(wanted, folder, content)


def _reported(wanted: Format, folder: Path, content: bytes) -> str:
    """Return whether the provenance of a product that a flip changed tells of it, or what is wrong."""
    provenance = read_provenance(folder / wanted.product)
    if provenance is None:
        return "no provenance"
    digest = hashlib.sha256(content).hexdigest()
    reported = [item for item in provenance.inputs if item.sha256 == digest and item.verified_by == ""]
    if not reported:
        return "changed, and the provenance does not name the flipped file"
    if wanted.has_checksums:
        return "changed although the format has checksums"
    is_measured = not wanted.is_model or _measured(provenance.found)
    return "changed and told" if is_measured else "changed, and not measured"


def _measured(found: object) -> bool:
    """Return whether a provenance tells how far the product's answers are from those of what it was made of."""
    text = json.dumps(found)
    return '"fidelity": {' in text or '"cosine": ' in text


@pytest.mark.parametrize("name", ALL)
def test_a_flipped_bit_is_caught_or_changes_nothing_or_is_on_record(
    undisturbed: Callable[[str], Undisturbed],
    fork_server: ForkServer,
    tmp_path: Path,
    name: str,
    rounds: int,
) -> None:
    wanted, whole = FORMATS[name], undisturbed(name)
    bits, tally, wrong = random.Random(f"flip {name}"), Counter[str](), []
    for _ in range(rounds if wanted.is_slow and rounds <= FEW else 4 * rounds):
        bit = bits.randrange(8 * len(whole.content))
        content = whole.flip(bit, tmp_path / "run", wanted.flipped)
        done = fork_server.run(wanted.tool, *wanted.arguments, folder=tmp_path / "run")
        found = outcome(wanted, done, tmp_path / "run", content, whole)
        tally[found if found in OUTCOMES else "WRONG"] += 1
        if found not in OUTCOMES:
            wrong.append(f"byte {bit // 8}, bit {bit % 8}: {found}")
    print(f"\n{name}: {tally.total()} flips; " + ", ".join(f"{tally[what]} {what}" for what in OUTCOMES))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ALL)
def test_with_a_checksum_beside_it_every_flipped_bit_is_caught(
    undisturbed: Callable[[str], Undisturbed],
    fork_server: ForkServer,
    tmp_path: Path,
    name: str,
    rounds: int,
) -> None:
    wanted, whole = FORMATS[name], undisturbed(name)
    bits, tally, wrong = random.Random(f"vouched {name}"), Counter[str](), []
    for _ in range(4 * rounds):
        bit = bits.randrange(8 * len(whole.content))
        folder = tmp_path / "run"
        content = whole.flip(bit, folder, wanted.flipped)
        notes = folder / f"{wanted.flipped}.sha256"
        notes.write_text(f"{hashlib.sha256(whole.content).hexdigest()}  {wanted.flipped}\n")
        done = fork_server.run(wanted.tool, *wanted.arguments, folder=folder)
        notes.unlink()
        found = outcome(wanted, done, folder, content, whole)
        tally[found if found == "caught" else "WRONG"] += 1
        if found != "caught":
            wrong.append(f"byte {bit // 8}, bit {bit % 8}: {found}")
    print(f"\n{name} with .sha256: {tally.total()} flips; {tally['caught']} caught, {tally['WRONG']} WRONG")
    assert not wrong, "\n".join(wrong)


def test_the_judge_finds_a_change_that_nothing_tells(
    undisturbed: Callable[[str], Undisturbed],
    fork_server: ForkServer,
    tmp_path: Path,
) -> None:
    name = ".safetensors"
    wanted, whole, folder = FORMATS[name], undisturbed(name), tmp_path / "run"
    content = whole.flip(8 * (len(whole.content) - 3), folder, wanted.flipped)  # in the last weights
    done = fork_server.run(wanted.tool, *wanted.arguments, folder=folder)
    product = folder / wanted.product
    good = product.read_bytes()
    product.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert outcome(wanted, done, folder, content, whole) == "changed and told"
    assert outcome(wanted, done, folder, whole.content, whole) == "changed, and the provenance does not name the flipped file"
    assert outcome(FORMATS[".pth"], done, folder, content, whole) != "caught"
    refused = Done(2, "", "error: no\n", 0.1, 0)
    assert "written: out.safetensors" in outcome(wanted, refused, folder, content, whole)
    crashed = Done(1, "", "Traceback (most recent call last):\nValueError: x\n", 0.1, 0)
    assert "not one line" in outcome(wanted, crashed, folder, content, whole)
    product.with_name("out.safetensors.json").unlink()
    assert outcome(wanted, done, folder, content, whole) == "no provenance"


def test_the_checksums_of_a_pth_are_its_own(tmp_path: Path) -> None:
    """A flip in a tensor's bytes is caught without any note beside the file."""
    from shared.networks.checkpoint import open_checkpoint

    _pth(tmp_path)
    content = bytearray((tmp_path / "in.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "in.pth").write_bytes(content)
    with pytest.raises(ToolError):
        open_checkpoint(tmp_path / "in.pth")
