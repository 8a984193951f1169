"""A tool that is killed or interrupted at any moment leaves the old product or the new one, whole, and the next run completes."""

import random
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.crash_scenarios import Command, Scene, faults_of_refusal, make_scene
from tests.support.fork_server import Done, ForkServer
from tools.quantize_tflite.bundle import Entry, pack_bundle

FEW = 3  # rounds; with more, everything is tried, however long it takes
BEGUN_S = 0.05  # from here on the tool listens to signals; before, it ends as Python does
CHECKPOINT = ROOT / "models" / "miniseal" / "checkpoint.safetensors"
MINISR = ROOT / "models" / "minisr"

Scenes = Callable[[str], Scene]


@pytest.fixture(scope="module")
def scenes(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Scenes:
    """Return a function that gives a command's scene by its name, made once."""
    made: dict[str, Scene] = {}
    place = tmp_path_factory.mktemp("scenes")

    def scene(name: str) -> Scene:
        if name not in made:
            made[name] = make_scene(command_of(name, place, request), place / name, fork_server)
        return made[name]

    return scene


def command_of(name: str, place: Path, request: pytest.FixtureRequest) -> Command:
    weights = {"in.safetensors": CHECKPOINT}
    match name:
        case "extract_weights":
            arguments = ("in.safetensors", "-o", "out.safetensors")
            return Command(name, name, arguments, "out.safetensors", weights, (*arguments, "--prefix", "embedder."))
        case "convert_detector":
            arguments = ("--model", "miniseal", "--checkpoint", "in.safetensors", "-o", "out.tflite")
            former = request.getfixturevalue("float_model")
            return Command(name, name, arguments, "out.tflite", weights, former, is_slow=True)
        case "quantize_tflite":
            inputs = {"in.tflite": request.getfixturevalue("float_model")}
            arguments = ("in.tflite", "-o", "out.tflite")
            return Command(name, name, arguments, "out.tflite", inputs, (*arguments, "--recipe", "fp16"))
        case "quantize_tflite bundle":
            models = request.getfixturevalue("float_models")
            pack_bundle([Entry(f"{stem}.tflite", path) for stem, path in models.items()], place / "in.task", {})
            arguments = ("in.task", "-o", "out.task")
            return Command(
                name, "quantize_tflite", arguments, "out.task", {"in.task": place / "in.task"}, (*arguments, "--recipe", "fp16")
            )
        case "quantize_onnx dynamic" | "quantize_onnx static":
            inputs = {"in.onnx": MINISR / "minisr_x2.onnx", "calibration": MINISR / "samples" / "calibration"}
            of_mode = {"dynamic": ("--recipe", "int8"), "static": ("--calibration", "calibration", "--samples", "2")}
            arguments = ("in.onnx", "-o", "out.onnx", *of_mode[name.split()[1]])
            former = ("in.onnx", "-o", "out.onnx", "--recipe", "fp16")
            return Command(name, "quantize_onnx", arguments, "out.onnx", inputs, former, is_slow=True)
        case "prepare_calibration":
            inputs = {"in": MINISR / "samples" / "small"}
            arguments = ("in", "-o", "out", "--tile-size", "32", "--max-samples", "4", "--min-samples", "2", "--npz")
            product = "out/manifest.json"
            return Command(name, name, arguments, product, inputs, (*arguments, "--seed", "1", "--holdout", "1"))
    raise AssertionError(name)


def reported(name: str, tally: Counter[str], faults: list[str]) -> None:
    """Print one line on a command's rounds."""
    reported = [re.sub(r"^step \d+: ", "", fault) for fault in faults]
    lost = sum(fault.startswith("lost original") for fault in reported)
    corrupt = sum(fault.startswith(("corrupt", "provenance")) for fault in reported)
    unfinished = sum(fault.startswith(("not completed", "not as")) for fault in reported)
    counts = ", ".join(f"{count} {what}" for what, count in tally.items())
    print(f"\n{name}: {counts}; {corrupt} corrupt, {lost} lost originals, {unfinished} not completed after, {len(faults)} faults")


def faults_after(scene: Scene, fork_server: ForkServer, folder: Path, *, has_old: bool, drafts: bool = True) -> Iterator[str]:
    """Yield what is wrong in a folder now, and after one more run of the command."""
    yield from scene.faults(folder, has_old=has_old, drafts=drafts)
    again = scene.run(fork_server, folder)
    if again.code != 0:
        yield f"not completed: {again.stderr}"
    yield from scene.faults_when_done(folder)


KILLED = [
    "extract_weights",
    "convert_detector",
    "quantize_tflite",
    "quantize_tflite bundle",
    "quantize_onnx dynamic",
    "quantize_onnx static",
    "prepare_calibration",
]


@pytest.mark.parametrize("name", KILLED)
def test_a_tool_killed_at_any_moment_loses_nothing_and_completes_next_time(
    scenes: Scenes, fork_server: ForkServer, tmp_path: Path, name: str, rounds: int
) -> None:
    scene = scenes(name)
    moments, tally, faults = random.Random(f"kill {name}"), Counter[str](), []
    for turn in range(1 if scene.command.is_slow and rounds <= FEW else rounds):
        has_old = turn % 2 == 1
        folder = scene.set_up(tmp_path / "run", has_old=has_old)
        done = scene.run(fork_server, folder, kill_after_s=moments.uniform(0, scene.seconds))
        tally["killed" if done.code == -signal.SIGKILL else "done before"] += 1
        faults += faults_after(scene, fork_server, folder, has_old=has_old)
    reported(name, tally, faults)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("only_worker", [False, True], ids=["all", "worker"])
@pytest.mark.parametrize("name", ["extract_weights", "prepare_calibration", "quantize_tflite"])
def test_a_tool_killed_at_any_step_loses_nothing_and_completes_next_time(
    scenes: Scenes, fork_server: ForkServer, tmp_path: Path, name: str, only_worker: bool, rounds: int
) -> None:
    """SQLite's method: at the first step, the second, and on until a run ends undisturbed; at a few where rounds are few."""
    scene = scenes(name)
    tally, faults = Counter[str](), []
    for number in steps_of(scene, fork_server, tmp_path, rounds):
        has_old = number % 2 == 1
        folder = scene.set_up(tmp_path / "run", has_old=has_old)
        done = scene.run(fork_server, folder, patch=f"kill_at [{number}, {str(only_worker).lower()}]")
        tally["killed" if done.code else "done"] += 1
        if done.code and only_worker:
            faults += [f"step {number}: {fault}" for fault in faults_of_refusal(done)]
        elif done.code not in (0, -signal.SIGKILL):
            faults.append(f"step {number}: {done.code} {done.stderr}")
        found = faults_after(scene, fork_server, folder, has_old=has_old, drafts=not only_worker)
        faults += [f"step {number}: {fault}" for fault in found]
    reported(f"{name}, {'worker' if only_worker else 'all'} killed at each step", tally, faults)
    assert done.code == 0, "the last number is beyond the last step"
    assert not faults, "\n".join(faults)


def steps_of(scene: Scene, fork_server: ForkServer, tmp_path: Path, rounds: int) -> list[int]:
    """Return the steps to disturb, and the first number that there is no step for."""
    folder = scene.set_up(tmp_path / "counted", has_old=True)
    assert scene.run(fork_server, folder, patch=f'count_steps ["{tmp_path / "steps"}"]').code == 0
    steps = (tmp_path / "steps").read_text().splitlines()
    numbers = list(range(1, len(steps) + 1))
    if rounds <= FEW:
        few = random.Random(scene.command.name).sample(numbers, min(4 * rounds, len(steps)))
        renamed = steps.index(str((folder / scene.command.product).parent)) + 1  # the folder is synced behind that
        numbers = sorted({*few[: 1 if scene.seconds > 1 else None], renamed - 1, renamed})
    return [*numbers, len(steps) + 20]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("name", ["extract_weights", "quantize_tflite", "prepare_calibration"])
def test_an_interrupted_tool_says_so_in_one_line_and_leaves_nothing_half_written(
    scenes: Scenes, fork_server: ForkServer, tmp_path: Path, name: str, number: signal.Signals, rounds: int
) -> None:
    scene = scenes(name)
    moments, tally, faults = random.Random(f"{number} {name}"), Counter[str](), []
    for turn in range(rounds):
        has_old = turn % 2 == 1
        folder = scene.set_up(tmp_path / "run", has_old=has_old)
        done = scene.run(
            fork_server, folder, patch=f"signal_after [{int(number)}, {moments.uniform(BEGUN_S, BEGUN_S + scene.seconds)}]"
        )
        tally["interrupted" if done.code else "done before"] += 1
        faults += faults_of_interruption(scene, folder, done, number, has_old=has_old)
    reported(f"{name}, {number.name}", tally, faults)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", ["extract_weights", "quantize_tflite", "prepare_calibration"])
def test_a_tool_interrupted_within_any_step_leaves_nothing_half_written(
    scenes: Scenes, fork_server: ForkServer, tmp_path: Path, name: str, rounds: int
) -> None:
    """A file that was made is removed even where the signal comes before the tool has heard that it is there."""
    scene = scenes(name)
    tally, faults = Counter[str](), []
    for has_old in (True, False):
        folder = scene.set_up(tmp_path / "counted", has_old=has_old)
        assert scene.run(fork_server, folder, patch=f'count_within ["{tmp_path / "steps"}"]').code == 0
        steps = list(enumerate((tmp_path / "steps").read_text().splitlines(), start=1))
        (tmp_path / "steps").unlink()
        if rounds <= FEW:
            draft = next(step for step in steps if step[1].startswith("os.open "))
            steps = [draft, *random.Random(name).sample(steps, 1 if scene.seconds > 1 else 4 * rounds)]
        for number, step in steps:
            folder = scene.set_up(tmp_path / "run", has_old=has_old)
            done = scene.run(fork_server, folder, patch=f"signal_within [{number}, {int(signal.SIGTERM)}]")
            tally["interrupted" if done.code else "done"] += 1
            found = faults_of_interruption(scene, folder, done, signal.SIGTERM, has_old=has_old)
            faults += [f"step {number}: {fault} ({step})" for fault in found]
    reported(f"{name}, interrupted within each step", tally, faults)
    assert tally["interrupted"] > 1  # a run may take fewer steps than the counted one: not all measure speed as often
    assert not faults, "\n".join(faults)


def faults_of_interruption(scene: Scene, folder: Path, done: Done, number: signal.Signals, *, has_old: bool) -> Iterator[str]:
    """Yield what is wrong after a tool got a signal; one that had begun to tell what it has done must have done it."""
    finished = list(scene.faults_when_done(folder)) if done.stdout or not done.code else []
    if done.code:
        yield from faults_of_refusal(replace(done, stdout=""), [128 + number])
    yield from finished
    yield from scene.faults(folder, has_old=has_old, drafts=False)


@pytest.mark.parametrize("name", ["extract_weights", "prepare_calibration"])
@pytest.mark.parametrize("same", [True, False], ids=["same", "another"])
def test_of_two_runs_at_once_on_one_output_one_is_kept_whole(
    scenes: Scenes, fork_server: ForkServer, tmp_path: Path, name: str, same: bool, rounds: int
) -> None:
    """Both end well, or one is told that the other was faster; the product is one's, with its own provenance."""
    scene = scenes(name)
    assert isinstance(scene.command.former, tuple)
    other = Scene(scene.command, scene.absent, scene.new, scene.old, scene.seconds)
    delays, tally, faults = random.Random(f"two {name} {same}"), Counter[str](), []
    lines = [scene.command.arguments, scene.command.arguments if same else scene.command.former]
    with ForkServer() as second:
        for turn in range(max(10, rounds)):
            folder = scene.set_up(tmp_path / "run", has_old=False)
            codes = _run_both([fork_server, second], scene, lines, folder, delays.uniform(0, scene.seconds), faults)
            tally[f"ended {' and '.join(map(str, sorted(codes)))}"] += 1
            if codes.count(0) == 0:
                faults.append(f"round {turn}: none ended well")
            ends = [list(one.faults_when_done(folder)) for one in (scene, other)]
            if all(ends):
                faults.append(f"round {turn}: neither one's product: {min(ends, key=len)}")
    reported(f"{name}, two at once with {'the same' if same else 'other'} arguments", tally, faults)
    assert not faults, "\n".join(faults)


def _run_both(
    zygotes: list[ForkServer], scene: Scene, lines: list[tuple[str, ...]], folder: Path, delay: float, faults: list[str]
) -> list[int]:
    codes = [99, 99]

    def run_one(place: int) -> None:
        # what each of them prints is kept beside its own folder: the second one's is a link
        at = folder if place == 0 else folder.with_name("link")
        if place == 1:
            at.unlink(missing_ok=True)
            at.symlink_to(folder)
            waiting.wait(delay)
        done = zygotes[place].run(scene.command.tool, *lines[place], "--refresh", folder=at)
        codes[place] = done.code
        if done.code:
            faults.extend(faults_of_refusal(done))

    waiting = threading.Event()
    threads = [threading.Thread(target=run_one, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return codes


def test_the_judge_finds_what_a_bad_tool_would_leave(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("extract_weights")
    folder = scene.set_up(tmp_path / "run", has_old=True)
    product, side = folder / "out.safetensors", folder / "out.safetensors.json"
    assert not list(scene.faults(folder, has_old=True, drafts=False))
    whole = product.read_bytes()
    product.write_bytes(whole[:-1])
    assert {fault.partition(":")[0] for fault in scene.faults(folder, has_old=True, drafts=False)} == {
        "corrupt or strange",
        "provenance of another file",
    }
    product.unlink()
    assert list(scene.faults(folder, has_old=True, drafts=False)) == ["lost original: out.safetensors"]
    product.write_bytes(whole)
    side.write_text(side.read_text()[:-20])
    assert list(scene.faults(folder, has_old=True, drafts=False)) == ["provenance missing or unreadable: out.safetensors.json"]
    (folder / "in.safetensors").write_bytes(b"")
    (folder / ".out.safetensors.1.partial").write_bytes(b"")
    found = list(scene.faults(folder, has_old=True, drafts=False))
    assert "changed input: in.safetensors" in found
    assert "left behind: .out.safetensors.1.partial" in found
    assert "not as undisturbed: out.safetensors" in list(scene.faults_when_done(folder))
