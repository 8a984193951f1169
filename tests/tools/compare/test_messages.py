"""A detector is compared on images whose messages are known, and every gate on it trips."""

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from PIL import Image

from shared.command.errors import ToolError
from shared.files import artifacts
from shared.files.plan import Plan
from tests.conftest import ROOT, Miniseal, Run, Small
from tools.compare import compare
from tools.compare import task as module
from tools.compare.gates import GATES, OF_MARKING, flat_gates
from tools.compare.page import Page

IMAGE_GATES = {"min_psnr", "min_ssim", "max_psnr_drop", "min_psnr_gain"}  # tripped in test_images
LARGE_WEIGHTS = 4096  # bytes; in this model only int8 weights are
ACCURACY_LIMITS = {
    "min_bit_accuracy": 0.999,
    "min_auc": 0.995,
    "max_accuracy_drop": 0.005,
    "max_loss_where_read": 0.005,
    "min_accuracy_under:jpeg-90": 0.9,
}
OTHER_LIMITS = {
    "min_cosine": 0.999,
    "max_error": 0.05,
    "min_bit_agreement": 0.99,
    "min_speedup": 0.01,
    "max_size_mb": 1.0,
    "max_latency_ms": 1e4,
}
BEYOND = {"min_speedup": 1e4, "max_size_mb": 0.01, "max_latency_ms": 1e-4}


@pytest.fixture(scope="module")
def damaged(miniseal: Miniseal, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained INT8 model with all large weights replaced by noise: it loads and runs as before."""
    content, rng, replaced = bytearray(miniseal.int8.read_bytes()), np.random.default_rng(0), 0
    model = schema.Model.GetRootAs(bytes(content))
    for buffer in map(model.Buffers, range(model.BuffersLength())):
        if buffer.Size() >= LARGE_WEIGHTS:  # bytes that lie behind the flatbuffer
            noise = rng.integers(-127, 128, buffer.Size(), np.int8).tobytes()
            content[buffer.Offset() : buffer.Offset() + buffer.Size()] = noise
            replaced += len(noise)
    assert replaced > len(content) / 2
    path = tmp_path_factory.mktemp("damaged") / "int8.tflite"
    path.write_bytes(content)
    return path


def test_every_gate_passes_a_sound_model_and_trips_on_a_damaged_one(miniseal: Miniseal, damaged: Path) -> None:
    def gates(candidate: Path, limits: dict[str, float]) -> dict[str, bool]:
        given: dict[str, Any] = {"messages": miniseal.messages, "samples": 4, "attacks": "jpeg-90", "runs": 8}
        result = compare(miniseal.float_model, [candidate], gate=[f"{name}={limit}" for name, limit in limits.items()], **given)
        found = result.findings.candidates[0].gates
        assert result.ok == all(gate.ok for gate in found)
        assert ("FAILED" in result.message) is not result.ok
        assert [(gate.name, gate.limit) for gate in found] == list(limits.items())
        return {gate.name: gate.ok for gate in found}

    sound = gates(miniseal.int8, OTHER_LIMITS | ACCURACY_LIMITS)
    assert set(sound.values()) == {True}
    assert gates(damaged, OTHER_LIMITS | ACCURACY_LIMITS | BEYOND) == dict.fromkeys(sound, False)
    assert {name.partition(":")[0] for name in sound} | IMAGE_GATES | set(OF_MARKING) == set(GATES)


def test_the_cards_gates_exit_1_on_a_damaged_model_and_say_why(miniseal: Miniseal, damaged: Path, run_tool: Run) -> None:
    """As the demo calls it; a single gate replaces that of the card."""
    gates = ["--gates", "miniseal:int8", "--gate", "max_size_mb=0.01", "--json"]
    done = run_tool("compare", miniseal.float_model, damaged, "--messages", miniseal.messages, "--runs", "1", *gates)
    assert (done.returncode, done.stderr) == (1, "")
    result = json.loads(done.stdout)
    (candidate,) = result["findings"]["candidates"]
    found = {gate["name"]: gate["limit"] for gate in candidate["gates"]}
    table = tomllib.loads((ROOT / "models" / "miniseal.toml").read_text())["gates"]["int8"]
    assert found == {**flat_gates(table), "max_size_mb": 0.01}
    why = ["max_size_mb", "min_cosine", "min_bit_accuracy", "max_accuracy_drop", "min_accuracy_under:jpeg-80", "min_auc"]
    broken = result["message"].removeprefix("FAILED: ").partition(" (")[0].split("; ")
    assert [name for name in broken if name.removeprefix("int8 ") in why] == [f"int8 {name}" for name in why]


def test_the_smallest_and_the_fastest_inside_the_gates_are_recommended(miniseal: Miniseal, damaged: Path) -> None:
    found = compare(
        miniseal.float_model,
        [miniseal.float_model],
        alternatives=[miniseal.int8, damaged],
        messages=miniseal.messages,
        samples=4,
        attacks="none",
        runs=4,
        gate=["min_bit_accuracy=0.99"],
    ).findings
    assert found.ok
    assert [candidate.is_inside for candidate in found.candidates] == [True, True, False]
    assert found.smallest == miniseal.int8
    assert found.fastest in (miniseal.int8, miniseal.float_model)


def test_labelled_images_meet_the_attacks_asked_for(miniseal: Miniseal) -> None:
    result = compare(
        miniseal.checkpoint, [miniseal.int8], model="miniseal", messages=miniseal.messages, samples=2, attacks="blur-1", runs=2
    )
    found = result.findings
    assert found.accuracy is not None
    assert [condition.attack for condition in found.accuracy.conditions] == ["none", "blur-1"]
    assert (found.samples, len(found.accuracy.readings), len(found.accuracy.logits)) == (2, 4, 2)
    assert found.candidates[0].accuracy is not None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"gate": ["min_bit_accuracy=0.9"]}, "--gate min_bit_accuracy needs images whose messages are known"),
        ({"gates": "miniseal:int8"}, "--gate min_bit_accuracy needs images whose messages are known"),
        ({"gates": "miniseal:int4"}, "the card has no gates for this recipe"),
        ({"gate": ["max_size_mb=inf"]}, "the limit is no finite number"),
        ({"attacks": "jpeg-50"}, "--attacks needs"),
        ({"messages": True, "bits": 16}, "--bits contradicts --messages"),
        ({"bits": 16}, "the reference's output holds no message of 16 bits"),
        ({"messages": True, "attacks": "jpeg-90", "gate": ["min_accuracy_under:jpeg-50=0.9"]}, "this attack is not run; .*jpeg-90"),
        ({"messages": True, "attacks": "rain-1"}, "unknown attack"),
        ({"messages": True, "attacks": ""}, "unknown attack"),
        ({"messages": True, "images": Path()}, "both say which images"),
    ],
)
def test_options_that_make_no_sense_are_errors(miniseal: Miniseal, options: dict[str, Any], reason: str) -> None:
    options = {**options, **({"messages": miniseal.messages} if options.get("messages") else {})}
    with pytest.raises(ToolError, match=reason):
        compare(miniseal.float_model, [miniseal.int8], runs=1, **options)


def test_messages_of_another_length_are_an_error(float_model: Path, chunkyseal_small: Small, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "messages.json").write_text('{"nbits": 8, "images": [{"file": "a.png", "message": "1f"}]}')
    with pytest.raises(ToolError, match="the reference's output holds no message of 8 bits"):
        compare(float_model, [float_model], messages=tmp_path / "messages.json", attacks="none")
    (tmp_path / "messages.json").write_text('{"nbits": 8, "images": [{"file": "a.png", "message": null}]}')
    with pytest.raises(ToolError, match="no image carries a message"):
        compare(float_model, [float_model], messages=tmp_path / "messages.json")


def test_the_page_replaces_nothing_it_is_made_from(miniseal: Miniseal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Path(shutil.copy(miniseal.int8, tmp_path / "model.tflite"))
    monkeypatch.setattr(module, "run_benchmark", lambda *_, **__: pytest.fail("it was refused too late"))
    image = miniseal.messages.parent / "unmarked" / "00_camera.png"
    (tmp_path / "mine.html").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    messages = Path(shutil.copytree(miniseal.messages.parent, tmp_path, dirs_exist_ok=True)) / "messages.json"
    truth = messages.read_text()

    def write_old(draft: Path) -> Page:
        draft.write_text("<p>old</p>")
        return Page(0, 0)

    artifacts.build(Plan(tmp_path / "stale.html", "compare", {}, is_report=True), Page, write_old)
    for html, given, reason in (
        (model, {"overwrite": True}, "a file that is read or written"),
        (tmp_path / "model.tflite.json", {"overwrite": True}, "a file that is read or written"),
        (image, {"overwrite": True, "messages": miniseal.messages}, "a file that is read or written"),
        (messages, {"overwrite": True, "messages": messages, "attacks": "none"}, "a file that is read or written"),
        (tmp_path / "a.json", {"output": tmp_path / "a.json"}, "name the same file"),
        (tmp_path / "stale.html", {"output": tmp_path / "a.json"}, "the page exists"),
        (tmp_path / "loop", {}, "exists|no regular file|a symbolic link"),
        (tmp_path / "absent" / "a.html", {}, "no such folder"),
        (tmp_path / "mine.html", {"refresh": True, "output": tmp_path / "a.json"}, "the output exists"),
        (tmp_path / "mine.html", {}, "exists"),
    ):
        with pytest.raises(ToolError, match=reason):
            compare(miniseal.float_model, [model], html=html, **given)  # type: ignore[arg-type]
    assert (model.read_bytes(), (tmp_path / "mine.html").read_text()) == (miniseal.int8.read_bytes(), "mine")
    assert not (tmp_path / "a.json").exists()
    assert messages.read_text() == truth
