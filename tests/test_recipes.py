"""Every recipe has a docstring and a tag, names only existing tools, and goes through all steps."""

import shutil
from pathlib import Path

import nox.registry
import pytest

import noxfile
from shared.networks.card import load_card
from tests.conftest import ROOT

SESSIONS = nox.registry.get()
RECIPES = [name for name, session in SESSIONS.items() if "recipe" in session.tags]
SUPERRES = ["superres_int8", "superres_fp16"]
ONNX = [name for name in RECIPES if "_onnx_" in name]
PRESSING = [name for name in RECIPES if name not in {"demo", "face_landmarker_int8", *SUPERRES, *ONNX}]  # a checkpoint to TFLite


class FakeSession:
    """Records what a session would do."""

    name = "recipe"

    def __init__(self, *posargs: str) -> None:
        self.posargs = list(posargs)
        self.commands: list[list[str]] = []
        self.warnings: list[str] = []

    def install(self, *arguments: str) -> None:
        assert "constraints.txt" in arguments

    def run(self, *arguments: str | Path) -> None:
        self.commands.append([str(argument) for argument in arguments])

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def error(self, message: str) -> None:
        raise SystemExit(message)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "models").mkdir()
    for card in (ROOT / "models").glob("*.toml"):
        shutil.copy(card, tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_promised_sessions_are_there() -> None:
    detectors = {"demo", "chunkyseal_int8", "chunkyseal_fp16", "videoseal_int8", "videoseal_fp16", "pixelseal_int8"}
    assert set(RECIPES) == {*detectors, "face_landmarker_int8", *SUPERRES, "videoseal_onnx_int8", "chunkyseal_onnx_int8"}
    training = {"train_miniseal", "train_minisr"}
    assert {
        "tests",
        "lint",
        "typecheck",
        "bench",
        "bench_demo",
        "bench_onnx",
        "faults",
        "fuzz",
        *training,
        *noxfile.TOOLS,
    } <= SESSIONS.keys()


def test_only_lint_and_tests_run_by_default() -> None:
    assert {name for name, session in SESSIONS.items() if session.default} == {"lint", "tests"}


def test_every_session_has_a_docstring() -> None:
    for name, session in SESSIONS.items():
        assert session.func.__doc__, name


def test_every_tool_is_a_session_and_the_other_way_round() -> None:
    files = {path.stem for path in (ROOT / "tools").iterdir()} - {"__init__", "__pycache__"}
    assert files == set(noxfile.TOOLS)


@pytest.mark.parametrize("name", PRESSING)
def test_a_recipe_is_named_after_model_and_precision_and_has_gates(name: str) -> None:
    model, _, precision = name.rpartition("_")
    gates = load_card(model).gates[precision]
    assert gates.max_size_mb is not None
    assert gates.min_cosine is not None


@pytest.mark.parametrize("name", PRESSING)
def test_without_a_checkpoint_a_recipe_is_a_rehearsal_through_all_steps(name: str, project: Path) -> None:
    session = FakeSession()
    SESSIONS[name].func(session)  # type: ignore[arg-type]
    steps = [command[2].removeprefix("tools.") for command in session.commands]
    assert steps == ["extract_weights", "convert_detector", "quantize_tflite", "verify", "compare"]
    _, convert, quantize, verify, compare = session.commands
    assert "--rehearsal" in convert
    product = quantize[quantize.index("-o") + 1]
    assert "rehearsal" in product
    assert product in verify
    assert product in compare
    assert any(argument.startswith("--min-cosine=") for argument in compare)
    assert all("--refresh" in command for command in session.commands)
    assert session.warnings
    assert session.warnings[0].startswith("REHEARSAL")


@pytest.mark.parametrize("name", ONNX)
def test_an_onnx_recipe_calibrates_and_ends_in_the_gates_of_its_card(name: str, project: Path) -> None:
    session = FakeSession("--images", "faces")
    SESSIONS[name].func(session)  # type: ignore[arg-type]
    steps = [command[2].removeprefix("tools.") for command in session.commands]
    assert steps == ["extract_weights", "convert_detector", "prepare_calibration", "quantize_onnx", "verify", "compare"]
    _, convert, prepare, quantize, verify, compare = session.commands
    model, product = convert[convert.index("-o") + 1], quantize[quantize.index("-o") + 1]
    assert model.endswith("_rehearsal_256.onnx")
    assert product.endswith("_rehearsal_256_int8.onnx")
    assert "faces" in prepare
    assert quantize[quantize.index("--calibration") + 1] == prepare[prepare.index("-o") + 1]
    assert product in verify
    assert compare[3:5] == [model, product]
    limits = load_card(name.partition("_")[0]).gates["onnx_int8"]
    assert f"--max-size-mb={limits.max_size_mb:g}" in compare
    assert f"--min-cosine={limits.min_cosine}" in compare
    assert session.warnings[0].startswith("REHEARSAL")
    written = [command[command.index("-o") + 1] for command in session.commands]
    tflite = FakeSession()
    SESSIONS[name.replace("_onnx", "")].func(tflite)  # type: ignore[arg-type]
    assert set(written[1:]).isdisjoint(command[command.index("-o") + 1] for command in tflite.commands)


@pytest.mark.parametrize(("name", "mode"), [("superres_int8", "static"), ("superres_fp16", "fp16")])
def test_a_super_resolution_recipe_measures_minisr_against_the_truth(name: str, mode: str, project: Path) -> None:
    session = FakeSession()
    SESSIONS[name].func(session)  # type: ignore[arg-type]
    steps = [command[2].removeprefix("tools.") for command in session.commands]
    assert steps == ["prepare_calibration", "quantize_onnx", "verify", "compare"]
    prepare, quantize, _, compare = session.commands
    assert quantize[quantize.index("--mode") + 1] == mode
    assert ("--calibration" in quantize) == (mode == "static")
    assert compare[compare.index("--images") + 1] != prepare[3]  # not what was calibrated with
    assert compare[compare.index("--truth") + 1] == "models/minisr/samples/large"
    assert {"--min-psnr-gain=0.5", "--max-psnr-drop=0.3"} <= set(compare)
    assert all("--refresh" in command for command in session.commands)


def test_a_super_resolution_recipe_takes_your_model_and_images(project: Path) -> None:
    session = FakeSession("--model", "mine.onnx", "--images", "photos", "--min-psnr", "36")
    SESSIONS["superres_int8"].func(session)  # type: ignore[arg-type]
    prepare, quantize, _, compare = session.commands
    assert prepare[3] == "photos"
    assert prepare[prepare.index("--model") + 1] == "mine.onnx"
    assert "--min-psnr=36.0" in quantize
    assert "--min-psnr=36.0" in compare
    assert compare[compare.index("--images") + 1] == prepare[prepare.index("-o") + 1]
    assert "--truth" not in compare
    with pytest.raises(SystemExit, match="neither"):
        SESSIONS["superres_int8"].func(FakeSession("--model", "mine.onnx"))  # type: ignore[arg-type]


def test_minisr_is_checked_against_the_shipped_one_after_training(project: Path) -> None:
    session = FakeSession("--steps", "9")
    SESSIONS["train_minisr"].func(session)  # type: ignore[arg-type]
    assert [command[2].rpartition(".")[2] for command in session.commands] == ["train", "make_samples", "compare"]
    assert "--min-psnr-gain=0.5" in session.commands[-1]
    (project / "models" / "minisr_retrained").mkdir()
    (project / "models" / "minisr_retrained" / "minisr_x2.onnx").touch()
    again = FakeSession()
    SESSIONS["train_minisr"].func(again)  # type: ignore[arg-type]
    assert len(again.commands) == 2


def test_with_extracted_weights_it_is_the_real_thing(project: Path) -> None:
    (project / "models" / "chunkyseal_detector.safetensors").touch()
    session = FakeSession("--checkpoint", "mine.pth")
    SESSIONS["chunkyseal_int8"].func(session)  # type: ignore[arg-type]
    assert str(project / "mine.pth") in session.commands[0]
    assert session.commands[1][-5:-3] == ["--checkpoint", "models/chunkyseal_detector.safetensors"]
    assert session.commands[2][-4] == "models/chunkyseal_detector_chunkyseal_256_int8.tflite"
    assert not session.warnings


def test_the_demo_presses_all_precisions_and_compares_them_on_true_messages(project: Path) -> None:
    (project / "models" / "miniseal_detector.safetensors").touch()
    session = FakeSession()
    SESSIONS["demo"].func(session)  # type: ignore[arg-type]
    steps = [command[2].removeprefix("tools.") for command in session.commands]
    assert steps == ["extract_weights", "convert_detector", *["quantize_tflite", "verify"] * 4, "compare"]
    recipes = [command[command.index("--recipe") + 1] for command in session.commands if "--recipe" in command]
    assert recipes == ["int8", "fp16", "int8-weight-only", "int4"]
    compare = session.commands[-1]
    assert compare[4].endswith("_int8.tflite")
    assert sum(argument.startswith("--alternative=") for argument in compare) == 3
    assert "--messages=models/miniseal/samples/messages.json" in compare
    assert compare[compare.index("--html") + 1] == "models/report.html"
    assert "--min-accuracy-under=jpeg-50=0.97" in compare
    assert "--max-accuracy-drop=0.005" in compare
    assert not session.warnings


def test_training_is_followed_by_the_check_of_what_came_out(project: Path) -> None:
    session = FakeSession("--steps", "9")
    SESSIONS["train_miniseal"].func(session)  # type: ignore[arg-type]
    steps = [command[2].rpartition(".")[2] for command in session.commands]
    assert steps == ["train", "make_samples", "convert_detector", "compare"]
    assert session.commands[0][-2:] == ["--steps", "9"]
    assert "--min-bit-accuracy=0.999" in session.commands[-1]
    (project / "models" / "miniseal_retrained" / "checkpoint.safetensors").touch()
    again = FakeSession()
    SESSIONS["train_miniseal"].func(again)  # type: ignore[arg-type]
    assert [command[2].rpartition(".")[2] for command in again.commands] == steps[1:]


def test_download_is_passed_on_and_a_missing_checkpoint_then_an_error(project: Path) -> None:
    session = FakeSession("--download")
    SESSIONS["videoseal_int8"].func(session)  # type: ignore[arg-type]
    assert "--download" in session.commands[0]
    assert "--allow-missing" not in session.commands[0]


def test_unknown_arguments_are_an_error(project: Path) -> None:
    with pytest.raises(SystemExit):
        SESSIONS["videoseal_int8"].func(FakeSession("--chekpoint", "x"))  # type: ignore[arg-type]


def test_a_tool_session_passes_its_arguments_on() -> None:
    session = FakeSession("model.tflite", "--json")
    SESSIONS["verify"].func(session)  # type: ignore[arg-type]
    assert session.commands == [["python", "-m", "tools.verify", "model.tflite", "--json"]]


def test_the_face_landmarker_is_searched_on_photos_and_checked_in_mediapipe(project: Path) -> None:
    (project / "mine.task").touch()
    session = FakeSession("--bundle", "mine.task", "--photos", "photos")
    SESSIONS["face_landmarker_int8"].func(session)  # type: ignore[arg-type]
    samples, quantize, check = session.commands
    assert [command[2] for command in session.commands] == [
        "models.face_landmarker.make_samples",
        "tools.quantize_tflite",
        "models.face_landmarker.check",
    ]
    folder = samples[samples.index("-o") + 1]
    assert quantize[quantize.index("--calibration") + 1] == folder
    assert any(argument.startswith("--max-drop=") for argument in quantize)
    assert not any(argument.startswith(("--rule", "--exclude", "--only")) for argument in quantize)
    assert check[3:6] == ["mine.task", quantize[quantize.index("-o") + 1], "photos"]


def test_without_a_bundle_it_is_said_where_to_get_one(project: Path) -> None:
    with pytest.raises(SystemExit, match=r"no bundle at models/face_landmarker\.task; download https://\S+face_landmarker\.task"):
        SESSIONS["face_landmarker_int8"].func(FakeSession())  # type: ignore[arg-type]
