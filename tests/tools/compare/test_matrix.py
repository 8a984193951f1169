"""Both ends of a watermark: photos are marked by embedders, read by detectors, and every number is that of the runtimes alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from models.miniseal.embedder import STRENGTH
from models.miniseal.embedder import Embedder as Patterns
from shared.command.errors import ToolError
from shared.media.images import read_pixels
from tests.conftest import ROOT, Miniseal, Run
from tools.compare import compare
from tools.convert_detector import export_onnx

PHOTOS = ROOT / "models" / "miniseal" / "samples" / "unmarked"
ABOUT = {"component": "embedder", "model": "patterns", "nbits": 32, "form": "residual", "image_size": 256, "channels": 1}
PIPELINE = {"attenuation": "none", "scaling": 5 * STRENGTH, "step_size": 4, "chunk_size": 32, "video_mode": "repeat"}
ATTACKS = "jpeg-50,crop-0.9"


class Network(nn.Module):
    """miniseal's patterns as an embedder's network: a watermark of root mean square 0.2, whatever the image."""

    def __init__(self, patterns: Patterns, loss: float) -> None:
        super().__init__()
        self.patterns, self.loss = patterns, loss

    def forward(self, image: torch.Tensor, message: torch.Tensor) -> torch.Tensor:
        return 0.2 * self.patterns(message, 256) * (1 - self.loss) + 0 * image


@pytest.fixture(scope="module")
def embedders(miniseal: Miniseal, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A trained embedder, and one whose watermark is too weak to be read."""
    state = {key: value for key, value in load_file(miniseal.checkpoint).items() if key.startswith("embedder.")}
    patterns, folder = Patterns(32), tmp_path_factory.mktemp("embedders")
    patterns.load_state_dict({key.removeprefix("embedder."): value for key, value in state.items()})
    paths = folder / "sound.onnx", folder / "weak.onnx"
    for path, loss in zip(paths, (0.0, 0.95), strict=True):
        inputs = {"image": torch.zeros(1, 1, 256, 256), "message": torch.zeros(1, 32)}
        export_onnx(Network(patterns, loss).eval(), inputs, path, {**ABOUT, **PIPELINE, "rehearsal": False})
    return paths


def test_a_matrix_holds_what_the_runtimes_say(miniseal: Miniseal, embedders: tuple[Path, Path], tmp_path: Path) -> None:
    given: dict[str, Any] = {"images": PHOTOS, "samples": 4, "attacks": ATTACKS, "runs": 3}
    gates = ["max_marking_drop=0.01", "min_marked_psnr=38"]
    output = tmp_path / "ends.json"
    result = compare(miniseal.float_model, [miniseal.int8], embedder=[embedders[0]], gate=gates, output=output, **given)
    matrix = result.findings.matrix
    assert matrix is not None
    assert result.ok
    assert [(cell.embedder, cell.detector) for cell in matrix.cells] == [(0, 0), (0, 1)]
    assert all(cell.conditions[0].bit_accuracy > 0.99 for cell in matrix.cells)
    assert [condition.attack for condition in matrix.cells[0].conditions] == ["none", "jpeg-50", "crop-0.9"]
    marked = sorted((tmp_path / "ends_marked" / "0_sound").iterdir())
    assert matrix.marked == [marked]
    messages = np.random.default_rng(1).random((4, 32)) < 0.5
    interpreter = Interpreter(str(miniseal.int8), num_threads=1)
    run = interpreter.get_signature_runner()
    right = []
    for path, message, photo in zip(marked, messages, sorted(PHOTOS.iterdir()), strict=False):
        pixels = read_pixels(path)
        (logits,) = run(image=pixels.transpose(2, 0, 1)[np.newaxis].astype(np.float32) / 255).values()
        right.append(((logits[0, 1:] > 0) == message).mean())
        assert -20 * np.log10((pixels / 255.0 - read_pixels(photo) / 255.0).std()) > 38
    assert matrix.cells[1].conditions[0].bit_accuracy == pytest.approx(np.mean(right))
    content = json.loads(output.read_text())
    assert content["matrix"]["cells"][1]["conditions"][0]["bit_accuracy"] == matrix.cells[1].conditions[0].bit_accuracy


def test_a_weak_embedder_breaks_the_gates_and_shows_it(
    miniseal: Miniseal, embedders: tuple[Path, Path], tmp_path: Path, run_tool: Run
) -> None:
    both = [argument for path in embedders for argument in ("--embedder", path)]
    limits = ("--gate", "max_marking_drop=0.005", "--gate", "min_marking_psnr=60")
    page = tmp_path / "ends.html"
    done = run_tool(
        "compare", miniseal.int8, *both, "--images", PHOTOS, "--samples", "3", "--attacks", ATTACKS, *limits, "--html", page
    )
    assert done.returncode == 1, done.stderr
    assert "embedders max_marking_drop" in done.stdout
    assert "min_marking_psnr" in done.stdout
    content = page.read_text()
    assert content.count("<figure>") >= 3 * 5  # original, and two of each embedder
    assert "hsl(120 " in content  # all bits right
    assert "marked by 2, weak" in content


def test_the_same_embedder_twice_makes_the_same_rows(miniseal: Miniseal, embedders: tuple[Path, Path], tmp_path: Path) -> None:
    again = tmp_path / "again.onnx"
    again.write_bytes(embedders[0].read_bytes())
    given: dict[str, Any] = {"images": PHOTOS, "samples": 2, "attacks": ATTACKS, "runs": 3}
    matrix = compare(miniseal.float_model, embedder=[embedders[0], again], **given).findings.matrix
    assert matrix is not None
    first, second = matrix.cells
    assert first.conditions == second.conditions
    assert matrix.markings[1].to_first_db == 200


def test_embedders_of_other_message_lengths_are_refused(miniseal: Miniseal, embedders: tuple[Path, Path], tmp_path: Path) -> None:
    other, patterns = tmp_path / "other.onnx", Patterns(16)
    inputs = {"image": torch.zeros(1, 1, 256, 256), "message": torch.zeros(1, 16)}
    export_onnx(Network(patterns, 0).eval(), inputs, other, {**ABOUT, **PIPELINE, "nbits": 16, "rehearsal": False})
    with pytest.raises(
        ToolError, match="messages of different lengths; got 16 bits; expected 32 bits; compare embedders of one model"
    ):
        compare(miniseal.float_model, embedder=[embedders[0], other], images=PHOTOS, samples=1, attacks="none")


def test_what_makes_no_sense_is_refused(miniseal: Miniseal, embedders: tuple[Path, Path], tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    Image.fromarray(np.zeros((0 + 8, 8, 3), np.uint8)).save(small / "tiny.png")
    for says, given in (
        ("both say which images are marked", {"embedder": [embedders[0]], "messages": miniseal.messages}),
        ("nothing to compare the reference with", {}),
        ("--gate min_marked_psnr needs embedders", {"candidates": [miniseal.int8], "gate": ["min_marked_psnr=38"]}),
        ("does not say that it is an embedder", {"embedder": [miniseal.int8]}),
        ("does not say which network it holds", {"embedder": [miniseal.checkpoint]}),
        ("--gate min_cosine is for candidates, and there is none", {"embedder": [embedders[0]], "gate": ["min_cosine=0.9"]}),
        ("no such folder", {"embedder": [embedders[0]], "output": tmp_path / "absent" / "ends.json"}),
    ):
        with pytest.raises(ToolError, match=says):
            compare(miniseal.float_model, **{"candidates": [], **given})  # type: ignore[arg-type]


def test_a_reference_that_reads_nothing_is_named_and_its_losses_are_none(
    miniseal: Miniseal, embedders: tuple[Path, Path], tmp_path: Path
) -> None:
    given: dict[str, Any] = {"images": PHOTOS, "samples": 2, "attacks": "none", "runs": 3, "embedder": [embedders[1]]}
    result = compare(miniseal.float_model, [miniseal.int8], gate=["max_marking_drop=0", "max_loss_where_read=0"], **given)
    assert result.ok
    assert "BUT the reference reads no message better than chance" in result.message
    assert not compare(miniseal.float_model, [miniseal.int8], gate=["max_accuracy_drop=0"], **given).ok


def test_an_alternative_may_break_the_gates_of_the_matrix(miniseal: Miniseal, embedders: tuple[Path, Path], tmp_path: Path) -> None:
    blind = tmp_path / "blind.onnx"
    network = nn.Sequential(nn.Conv2d(3, 33, kernel_size=256))
    torch.manual_seed(0)
    export_onnx(nn.Sequential(network, nn.Flatten()).eval(), {"image": torch.zeros(1, 3, 256, 256)}, blind, {"nbits": 32})
    given: dict[str, Any] = {"images": PHOTOS, "samples": 2, "attacks": "none", "runs": 3, "embedder": [embedders[0]]}
    gate = ["max_marking_drop=0.01"]
    assert compare(miniseal.float_model, [miniseal.int8], alternatives=[blind], gate=gate, **given).ok
    assert not compare(miniseal.float_model, [blind], gate=gate, **given).ok
