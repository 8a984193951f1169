"""Every recipe has a docstring and a tag, runs existing tools with existing options, and goes through all steps to its gates."""

import importlib
import shutil
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nox.registry
import pytest
import typer
import typer.main

import noxfile
from models.miniseal import retrain as miniseal_retrain
from models.minisr import retrain as minisr_retrain
from shared.command.cli import _with_common_options
from shared.networks.card import load_card
from shared.quantize.request import parse_max_error
from tests.conftest import ROOT
from tools.compare.gates import read_gates

SESSIONS = nox.registry.get()
RECIPES = [name for name, session in SESSIONS.items() if "recipe" in session.tags]
SUPERRES = ["superres_int8", "superres_fp16"]
CARDS = {"videoseal_0": "videoseal_0.0"}  # name of a recipe -> card, where they differ
ONNX = [name for name in RECIPES if "_onnx_" in name]
EMBEDDERS = ["videoseal_embedder_int8", "chunkyseal_embedder_int8"]
OTHERS = {"demo", "face_landmarker_int8", *SUPERRES, *ONNX, *EMBEDDERS}
TFLITE = [name for name in RECIPES if name not in OTHERS]  # a checkpoint's detector to TFLite
FACE = ("--bundle", "face_landmarker.task", "--photos", "photos")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@dataclass(frozen=True)
class Line:
    """One run of a module: its name, its arguments, and the values of its parameters as the command line reads them."""

    module: str
    arguments: list[str]
    values: dict[str, Any]

    @property
    def step(self) -> str:
        """The last part of the module's name."""
        return self.module.rpartition(".")[2]


class FakeSession:
    """Records what a session would run; a virtualenv is an empty folder."""

    interactive = True

    def __init__(self, name: str, *posargs: str) -> None:
        self.name, self.posargs = name, list(posargs)
        self.commands: list[list[str]] = []
        self.warnings: list[str] = []

    def run(self, *arguments: str | Path, silent: bool = False) -> None:
        command = [str(argument) for argument in arguments]
        self.commands.append(command)
        if command[1:3] == ["-m", "virtualenv"]:
            Path(command[-1]).mkdir(parents=True, exist_ok=True)

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def error(self, message: str) -> None:
        raise SystemExit(message)

    def lines(self) -> list[Line]:
        """Return the runs of the project's modules."""
        found = [(command[2], command[3:]) for command in self.commands if command[2].startswith(("tools.", "models."))]
        return [Line(module, arguments, parse_command(module, arguments)) for module, arguments in found]


def parse_command(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the values of a tool's parameters; an option it does not have, or a value of another type, is an error."""
    function = getattr(importlib.import_module(module), module.rpartition(".")[2])
    app = typer.Typer(add_completion=False)
    app.command()(_with_common_options(function))
    return typer.main.get_command(app).make_context(module, list(arguments)).params


def run_session(name: str, *posargs: str) -> FakeSession:
    """Run a session of the noxfile without effect."""
    session = FakeSession(name, *posargs)
    SESSIONS[name].func(session)  # type: ignore[arg-type]
    return session


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that a session reads, in an empty folder."""
    (tmp_path / "models" / "face_landmarker").mkdir(parents=True)
    for card in (ROOT / "models").glob("*.toml"):
        shutil.copy(card, tmp_path / "models")
    shutil.copy(ROOT / "models" / "face_landmarker" / "recipe.toml", tmp_path / "models" / "face_landmarker")
    (tmp_path / "face_landmarker.task").touch()
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_promised_sessions_are_there() -> None:
    detectors = {"demo", "chunkyseal_int8", "chunkyseal_fp16", "videoseal_int8", "videoseal_fp16", "pixelseal_int8"}
    detectors |= {"videoseal_0_int8"}
    detectors |= {"videoseal_onnx_int8", "chunkyseal_onnx_int8"}
    assert set(RECIPES) == {*detectors, "face_landmarker_int8", *SUPERRES, *EMBEDDERS}
    chores = {"tests", "lint", "typecheck", "bench", "faults", "fuzz", "train_miniseal", "train_minisr"}
    assert SESSIONS.keys() == {*RECIPES, *noxfile.TOOLS, *chores}


def test_only_lint_and_tests_run_by_default() -> None:
    assert {name for name, session in SESSIONS.items() if session.default} == {"lint", "tests"}


def test_every_session_has_a_docstring() -> None:
    for name, session in SESSIONS.items():
        assert session.func.__doc__, name


def test_every_tool_is_a_session_and_the_other_path_round() -> None:
    places = {path.stem for path in (ROOT / "tools").iterdir() if path.suffix == ".py" or (path / "__main__.py").is_file()}
    assert places - {"__init__"} == set(noxfile.TOOLS)


def test_a_set_of_packages_is_one_environment_and_installed_once(project: Path) -> None:
    first, second = run_session("demo"), run_session("videoseal_int8")
    setup = [command[1:] for command in first.commands[:2]]
    assert setup[0] == ["-m", "virtualenv", "--quiet", ".nox/recipe"]
    assert setup[1] == ["-m", "pip", "install", "--constraint", "constraints.txt", "--editable", ".[recipe]"]
    assert not [command for command in second.commands if command[2] in {"virtualenv", "pip"}]
    python = first.commands[1][0]
    assert python == ".nox/recipe/bin/python"
    assert {command[0] for command in [*first.commands[1:], *second.commands]} == {python}


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_an_environment_is_made_anew_when_its_versions_change(name: str, project: Path) -> None:
    run_session("verify")
    with (project / name).open("a") as file:
        file.write("# changed\n")
    assert [command[2] for command in run_session("verify").commands] == ["virtualenv", "pip", "tools.verify"]


def test_an_environment_whose_installation_failed_is_installed_again(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: FakeSession, *arguments: str | Path, silent: bool = False) -> None:
        if "pip" in arguments:
            raise SystemExit("pip failed")

    with monkeypatch.context() as patch:
        patch.setattr(FakeSession, "run", fail)
        with pytest.raises(SystemExit, match="pip failed"):
            run_session("verify")
    assert [command[2] for command in run_session("verify").commands] == ["virtualenv", "pip", "tools.verify"]


def test_every_session_names_packages_that_the_project_declares(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(noxfile, "environment", lambda session, packages: asked.append(packages) or (lambda *_: None))
    for name in SESSIONS:
        run_session(name, *(FACE if name == "face_landmarker_int8" else ()))
    assert len(asked) == len(SESSIONS)
    assert set(asked) <= PROJECT["optional-dependencies"].keys()


@pytest.mark.parametrize("name", RECIPES)
def test_every_line_of_a_recipe_is_one_its_tool_accepts_and_writes_into_the_recipes_folder(name: str, project: Path) -> None:
    lines = run_session(name, *(FACE if name == "face_landmarker_int8" else ())).lines()
    assert lines
    for line in lines:
        written = [line.values[key] for key in ("output", "html") if line.values.get(key)]
        assert written, line.arguments
        assert all(path.is_relative_to(f"models/out/{name}") for path in written), line.arguments
        assert line.values["refresh" if line.step != "make_samples" else "overwrite"], line.arguments


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_ends_in_gates(name: str, project: Path) -> None:
    last = run_session(name, *(FACE if name == "face_landmarker_int8" else ())).lines()[-1]
    if name == "face_landmarker_int8":
        assert last.module == "models.face_landmarker.check"
        assert all(last.values[limit] > 0 for limit in ("max_landmark_error", "max_blendshape_error", "max_slowdown"))
        return
    assert last.module == "tools.compare"
    gates = read_gates(last.values["gates"], last.values["gate"])
    assert gates.keys() & {"min_cosine", "min_psnr"}
    if name not in SUPERRES:
        assert last.values["gates"] is not None
        assert gates["max_size_mb"] > 0


@pytest.mark.parametrize("name", TFLITE)
def test_without_a_checkpoint_a_recipe_is_a_rehearsal_through_all_steps(name: str, project: Path) -> None:
    session = run_session(name)
    lines = session.lines()
    assert [line.step for line in lines] == ["extract_weights", "convert_detector", "quantize_tflite", "verify", "compare"]
    extract, convert, quantize, verify, compare = (line.values for line in lines)
    assert extract["allow_missing"]
    assert convert["rehearsal"]
    product = quantize["output"]
    assert "rehearsal" in product.name
    assert quantize["model"] == compare["reference"] == convert["output"]
    assert verify["model"] == product
    assert compare["candidates"] == [product]
    model, _, precision = name.rpartition("_")
    assert quantize["recipe"] == precision
    assert compare["gates"] == f"{CARDS.get(model, model)}:{precision}"
    assert session.warnings
    assert session.warnings[0].startswith("REHEARSAL")


@pytest.mark.parametrize("name", ONNX)
def test_an_onnx_recipe_calibrates_and_ends_in_the_gates_of_its_card(name: str, project: Path) -> None:
    session = run_session(name, "--images", "faces")
    lines = session.lines()
    steps = ["extract_weights", "convert_detector", "prepare_calibration", "quantize_onnx", "verify", "compare"]
    assert [line.step for line in lines] == steps
    _, convert, prepare, quantize, verify, compare = (line.values for line in lines)
    model, product = convert["output"], quantize["output"]
    assert model.name.endswith("_rehearsal_256.onnx")
    assert product.name.endswith("_rehearsal_256_int8.onnx")
    assert prepare["sources"] == [Path("faces")]
    assert prepare["model"] == quantize["model"] == model
    assert quantize["calibration"] == prepare["output"]
    assert quantize["recipe"] == "int8-static"
    assert verify["model"] == product
    assert (compare["reference"], compare["candidates"]) == (model, [product])
    assert compare["gates"] == f"{name.partition('_')[0]}:onnx_int8"
    assert session.warnings[0].startswith("REHEARSAL")


@pytest.mark.parametrize(("name", "recipe"), [("superres_int8", "int8-static"), ("superres_fp16", "fp16")])
def test_a_super_resolution_recipe_measures_minisr_against_the_ground_truth(name: str, recipe: str, project: Path) -> None:
    lines = run_session(name).lines()
    assert [line.step for line in lines] == ["prepare_calibration", "quantize_onnx", "verify", "compare"]
    prepare, quantize, verify, compare = (line.values for line in lines)
    assert quantize["recipe"] == recipe
    assert quantize["calibration" if recipe == "int8-static" else "holdout"] == prepare["output"]
    assert verify["model"] == quantize["output"]
    assert compare["images"] not in prepare["sources"]  # not the images of the calibration
    assert compare["ground_truth"] == Path("models/minisr/samples/large")
    assert {"min_psnr_gain": 0.5, "max_psnr_drop": 0.3, "min_psnr": quantize["min_psnr"]} == read_gates(None, compare["gate"])


def test_a_super_resolution_recipe_takes_your_model_and_images(project: Path) -> None:
    given = ("--model", "mine.onnx", "--images", "photos", "--min-psnr", "36", "--input-range", "0..255")
    prepare, quantize, _, compare = (line.values for line in run_session("superres_int8", *given).lines())
    assert prepare["sources"] == [Path("photos")]
    assert prepare["model"] == Path("mine.onnx")
    assert quantize["min_psnr"] == 36
    assert quantize["input_range"] == compare["input_range"] == "0..255"
    assert read_gates(None, compare["gate"]) == {"min_psnr": 36}
    assert compare["images"] == prepare["output"]
    assert compare["ground_truth"] is None
    with pytest.raises(SystemExit, match="neither"):
        run_session("superres_int8", "--model", "mine.onnx")


def test_with_extracted_weights_it_is_the_real_thing(project: Path) -> None:
    folder = Path("models/out/chunkyseal_int8")
    folder.mkdir(parents=True)
    (folder / "chunkyseal_detector.safetensors").touch()
    session = run_session("chunkyseal_int8", "--checkpoint", "mine.pth")
    extract, convert, quantize, *_ = (line.values for line in session.lines())
    assert extract["checkpoint"] == project / "mine.pth"
    assert extract["output"] == convert["checkpoint"] == folder / "chunkyseal_detector.safetensors"
    assert not convert["rehearsal"]
    assert quantize["output"] == folder / "chunkyseal_detector_chunkyseal_256_int8.tflite"
    assert session.lines()[-1].values["messages"] is None
    assert [warning.partition(":")[0] for warning in session.warnings] == ["no embedder"]


@pytest.mark.parametrize("name", ["chunkyseal_int8", "videoseal_onnx_int8"])
def test_with_a_full_checkpoint_photos_are_marked_and_the_bits_read_right_are_compared(name: str, project: Path) -> None:
    folder, model = Path("models/out") / name, name.partition("_")[0]
    folder.mkdir(parents=True)
    for component in ("detector", "embedder"):
        (folder / f"{model}_{component}.safetensors").touch()
    session = run_session(name, "--checkpoint", "full.pth", "--images", "photos")
    steps = {line.step: line.values for line in session.lines()}
    *_, extract, mark, compare = (line.values for line in session.lines())
    assert (extract["component"].value, extract["allow_missing"]) == ("embedder", True)
    assert mark["source"] == Path("photos")
    assert mark["embedder"] == extract["output"] == folder / f"{model}_embedder.safetensors"
    assert mark["card"] == model
    assert compare["messages"] == mark["output"] / "messages.json"
    assert read_gates(compare["gates"], compare["gate"])["max_loss_where_read"] == 0.005
    assert (mark["samples"], compare["samples"]) == ((4, 4) if model == "chunkyseal" else (None, None))
    assert "prepare_calibration" not in steps or steps["prepare_calibration"]["sources"] == [Path("photos")]
    assert not session.warnings


@pytest.mark.parametrize("name", EMBEDDERS)
def test_an_embedders_recipe_is_a_rehearsal_or_ends_in_both_ends(name: str, project: Path) -> None:
    model, folder = name.partition("_")[0], Path("models/out") / name
    session = run_session(name)
    extract, convert, verify, compare = (line.values for line in session.lines())
    assert extract["component"].value == "embedder"
    assert convert["rehearsal"]
    assert convert["quantize"].value == "int8"
    assert convert["output"] == verify["model"] == compare["candidates"][0]
    assert compare["reference"] == folder / f"{model}_embedder_{model}_rehearsal_256.tflite"
    gates = load_card(model).gates["embedder_int8"]
    assert read_gates(compare["gates"], compare["gate"])["max_size_mb"] == gates.max_size_mb
    assert session.warnings[0].startswith("REHEARSAL")
    for component in ("detector", "embedder"):
        (folder / f"{model}_{component}.safetensors").touch()
    *_, ends = (line.values for line in run_session(name, "--checkpoint", "full.pth").lines())
    assert (ends["reference"], ends["model"]) == (folder / f"{model}_detector.safetensors", model)
    assert ends["embedder"] == [folder / f"{model}_embedder_{model}_256{end}.tflite" for end in ("", "_int8")]
    assert read_gates(ends["gates"], ends["gate"]) == {"max_marking_drop": 0.005}


def test_a_named_checkpoint_without_the_component_is_an_error_and_no_rehearsal(project: Path) -> None:
    for name, component in (("videoseal_int8", "detector"), ("videoseal_embedder_int8", "embedder")):
        extract = run_session(name, "--checkpoint", "mine.pth").lines()[0].values
        assert (extract["component"].value, extract["allow_missing"]) == (component, False)


def test_the_demo_makes_all_precisions_and_compares_them_on_true_messages(project: Path) -> None:
    folder = Path("models/out/demo")
    folder.mkdir(parents=True)
    (folder / "miniseal_detector.safetensors").touch()
    session = run_session("demo")
    lines = session.lines()
    assert [line.step for line in lines] == ["extract_weights", "convert_detector", *["quantize_tflite", "verify"] * 4, "compare"]
    recipes = [line.values["recipe"] for line in lines if line.step == "quantize_tflite"]
    assert recipes == ["int8", "fp16", "int8-weight-only", "int4"]
    compare = lines[-1].values
    products = [line.values["output"] for line in lines if line.step == "quantize_tflite"]
    assert [*compare["candidates"], *compare["alternatives"]] == products
    assert compare["messages"] == Path("models/miniseal/samples/messages.json")
    assert compare["html"] == folder / "report.html"
    gates = read_gates(compare["gates"], compare["gate"])
    assert gates["min_accuracy_under:jpeg-50"] == 0.97
    assert gates["max_accuracy_drop"] == 0.005
    assert not session.warnings


def test_download_is_passed_on_and_a_missing_checkpoint_then_an_error(project: Path) -> None:
    extract = run_session("videoseal_int8", "--download").lines()[0].values
    assert extract["download"]
    assert not extract["allow_missing"]


def test_unknown_arguments_are_an_error(project: Path) -> None:
    with pytest.raises(SystemExit):
        run_session("videoseal_int8", "--chekpoint", "x")


def test_an_option_that_a_tool_does_not_have_is_noticed() -> None:
    with pytest.raises(Exception, match="No such option"):
        parse_command("tools.verify", ["model.tflite", "--refrehs"])


@pytest.mark.parametrize("tool", noxfile.TOOLS)
def test_a_tool_session_runs_in_the_tools_own_environment_and_passes_its_arguments_on(tool: str, project: Path) -> None:
    session = run_session(tool, "model.tflite", "--json")
    packages = tool.replace("_", "-")
    assert session.commands[-1] == [f".nox/{packages}/bin/python", "-m", f"tools.{tool}", "model.tflite", "--json"]


@pytest.mark.parametrize("name", ["typecheck", "faults", "fuzz", "bench", "train_miniseal", "train_minisr", "lint", "tests"])
def test_a_chore_passes_its_arguments_on(name: str, project: Path) -> None:
    commands = [command for command in run_session(name, "--some", "thing").commands if command[2] not in {"virtualenv", "pip"}]
    assert "--some thing" in " ".join(commands[0])


def test_the_face_landmarker_is_searched_on_photos_and_checked_in_mediapipe(project: Path) -> None:
    (project / "mine.task").touch()
    lines = run_session("face_landmarker_int8", "--bundle", "mine.task", "--photos", "photos").lines()
    names = ["models.face_landmarker.make_samples", "tools.quantize_tflite", "models.face_landmarker.check"]
    assert [line.module for line in lines] == names
    samples, quantize, check = (line.values for line in lines)
    assert quantize["calibration"] == samples["output"]
    assert len(parse_max_error(quantize["max_error"])) == 5
    assert not any(quantize[option] for option in ("recipe", "rule", "exclude", "only"))
    assert (check["original"], check["candidate"], check["photos"]) == (Path("mine.task"), quantize["output"], Path("photos"))


def test_without_a_bundle_the_message_says_where_to_get_one(project: Path) -> None:
    with pytest.raises(SystemExit, match=r"no bundle at models/face_landmarker\.task; download https://\S+face_landmarker\.task"):
        run_session("face_landmarker_int8")


@pytest.mark.parametrize("name", TFLITE)
def test_a_recipe_is_named_after_model_and_precision_and_has_gates(name: str) -> None:
    model, _, precision = name.rpartition("_")
    gates = load_card(CARDS.get(model, model)).gates[precision]
    assert gates.max_size_mb is not None
    assert gates.min_cosine is not None


Trained = Callable[..., list[Line]]


@pytest.fixture
def retrain(project: Path, monkeypatch: pytest.MonkeyPatch) -> Trained:
    """Return a function that runs a training's steps without effect, and returns them."""

    def run(module: Any, *arguments: str) -> list[Line]:
        lines: list[Line] = []

        def record(command: list[str], *, check: bool) -> SimpleNamespace:
            lines.append(Line(command[2], command[3:], parse_command(command[2], command[3:])))
            return SimpleNamespace(returncode=0)

        monkeypatch.setattr("subprocess.run", record)
        module.main(*arguments)
        return lines

    return run


@pytest.mark.parametrize(
    ("module", "checkpoint", "steps"),
    [
        (miniseal_retrain, "checkpoint.safetensors", ["train", "make_samples", "convert_detector", "compare"]),
        (minisr_retrain, "minisr_x2.onnx", ["train", "make_samples", "compare"]),
    ],
    ids=["miniseal", "minisr"],
)
def test_training_is_followed_by_the_check_of_its_result(module: Any, checkpoint: str, steps: list[str], retrain: Trained) -> None:
    lines = retrain(module, "--steps", "9")
    assert [line.step for line in lines] == steps
    assert lines[0].values["steps"] == 9
    assert lines[0].values["output"] == module.FOLDER / checkpoint
    compare = lines[-1].values
    gates = read_gates(compare["gates"], compare["gate"])
    assert gates.get("min_bit_accuracy", 0.999) == 0.999
    assert gates.get("min_psnr_gain", 0.5) == 0.5
    assert gates.keys() & {"min_bit_accuracy", "min_psnr_gain"}
    assert all(line.values["output"].is_relative_to(f"models/out/{module.FOLDER.name}") for line in lines)
    (module.FOLDER / checkpoint).touch()
    assert [line.step for line in retrain(module)] == steps[1:]


def test_a_failed_step_of_a_training_ends_it_with_its_exit_code(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.run", lambda command, *, check: SimpleNamespace(returncode=3))
    for module in (miniseal_retrain, minisr_retrain):
        with pytest.raises(SystemExit) as ended:
            module.main()
        assert ended.value.code == 3


def test_minisr_keeps_the_same_gates_in_its_recipe_and_after_training() -> None:
    assert noxfile.MINISR_GATES == minisr_retrain.GATES


def test_the_noxfile_refuses_pythons_that_the_dependencies_lack() -> None:
    assert PROJECT["requires-python"] == ">=3.11,<3.14"
    source = (ROOT / "noxfile.py").read_text()
    assert source.index("sys.exit(") < source.index("import argparse")
