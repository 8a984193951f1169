"""A disk that is full, a quota, a file size limit: one line, exit 2, and everything as it was."""

import contextlib
import errno
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.test_interruptions import FEW, command_of, reported
from tests.support import small_onnx
from tests.support.crash_scenarios import Command, Scene, faults_of_refusal, hashes, make_scene
from tests.support.fork_server import Done, ForkServer

KIB = 1024
TELEMETRY = ".ses"  # ONNX Runtime 1.31.1 leaves it in the folder of temporary files
WRITERS = [
    "extract_weights",
    "convert_detector",
    "quantize_tflite",
    "quantize_tflite bundle",
    "quantize_onnx dynamic",
    "prepare_calibration",
    "verify",
    "compare",
    "compare html",
]

Scenes = Callable[[str], Scene]


@pytest.fixture(scope="module")
def scenes(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Scenes:
    """Return a function that gives a command's scene by its name, made once."""
    made: dict[str, Scene] = {}
    place = tmp_path_factory.mktemp("full")

    def scene(name: str) -> Scene:
        if name not in made:
            command = checking(name, place) if name.startswith(("verify", "compare")) else command_of(name, place, request)
            made[name] = make_scene(command, place / name, fork_server)
        return made[name]

    return scene


def checking(name: str, place: Path) -> Command:
    """Return a command of verify or compare on small models."""
    one = small_onnx.save_picture_model(place / "one.onnx")
    other = small_onnx.save_picture_model(place / "other.onnx", widths=(8, 8))
    inputs = {"one.onnx": one, "other.onnx": other}
    short = ("--runs", "3", "--samples", "2")
    match name:
        case "verify":
            return Command(name, name, ("one.onnx", "-o", "out.json"), "out.json", inputs, ("other.onnx", "-o", "out.json"))
        case "compare":
            arguments = ("one.onnx", "other.onnx", "-o", "out.json", *short)
            return Command(name, name, arguments, "out.json", inputs, (*arguments, "--seed", "1"))
        case "compare html":
            arguments = ("one.onnx", "other.onnx", "--html", "out.html", *short)
            return Command(name, "compare", arguments, "out.html", inputs, (*arguments, "--seed", "1"))
    raise AssertionError(name)


def faults(scene: Scene, done: Done, folder: Path, before: dict[str, str]) -> Iterator[str]:
    """Yield what is wrong with a run that may find room for everything, or must leave everything as it was."""
    if done.code == 0:
        if scene.command.tool in ("verify", "compare"):  # what they measure is never the same
            yield from (f"left behind: {name}" for name in hashes(folder) if ".partial" in name)
        else:
            yield from scene.faults_when_done(folder)
        return
    yield from faults_of_refusal(done)
    if "disk" not in done.stderr and "No usable temporary directory" not in done.stderr:
        yield f"no word of the disk: {done.stderr!r}"
    after = hashes(folder)
    yield from (f"not as before: {name}" for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name))


def wholly(scene: Scene) -> int:
    """Return the bytes of a product."""
    return (scene.new / scene.command.product).stat().st_size


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_size_limit_is_one_line_and_leaves_all_as_it_was(
    scenes: Scenes,
    fork_server: ForkServer,
    tmp_path: Path,
    name: str,
    rounds: int,
) -> None:
    scene = scenes(name)
    tally, found = Counter[str](), []
    hurried = scene.command.is_slow and rounds <= FEW
    sizes = [wholly(scene) // 2] if hurried else [0, 4 * KIB, wholly(scene) // 2]
    for number, size in enumerate(sizes):
        for has_old in [number % 2 == 1] if rounds <= FEW else [False, True]:
            folder = scene.set_up(tmp_path / "run", has_old=has_old)
            before = hashes(folder)
            done = scene.run(fork_server, folder, patch=f"limit_file_size [{size}]")
            tally["refused" if done.code else "done"] += 1
            found += [f"{size} bytes, {'old' if has_old else 'absent'}: {fault}" for fault in faults(scene, done, folder, before)]
            if done.code == 0 and size < wholly(scene):
                found.append(f"{size} bytes: written although that is too little")
    reported(f"{name}, file size limit", tally, found)
    assert not found, "\n".join(found)


@contextlib.contextmanager
def small_disk(place: Path, size_kib: int) -> Iterator[Path]:
    """Yield a folder on a disk of its own, of that size."""
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(place)],  # noqa: S607 - wherever it is
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting a disk is not permitted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)  # noqa: S607


def used_kib(folder: Path) -> int:
    """Return what a folder takes on a tmpfs, whole pages."""
    return sum(4 * -(-path.stat().st_size // 4096) if path.is_file() else 4 for path in [folder, *folder.rglob("*")])


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a disk takes root")
@pytest.mark.parametrize("knows", [False, True], ids=["unforeseen", "foreseen"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_line_and_leaves_all_as_it_was(
    scenes: Scenes,
    fork_server: ForkServer,
    tmp_path: Path,
    name: str,
    knows: bool,
    rounds: int,
) -> None:
    scene = scenes(name)
    tally, found = Counter[str](), []
    patch = "fresh_tempdir" if knows else "plenty_of_disk"
    rooms = [0, wholly(scene) // 2 // KIB] if not (scene.command.is_slow and rounds <= FEW) else [wholly(scene) // 2 // KIB]
    for number, room in enumerate(rooms):
        for has_old in [number % 2 == 1] if rounds <= FEW else [False, True]:
            with small_disk(tmp_path / f"{number} {has_old}", used_kib(scene.old if has_old else scene.absent) + 8 + room) as disk:
                folder = scene.set_up(disk / "run", has_old=has_old)
                _fill(disk, room)
                before = hashes(folder)
                at = tmp_path / "link"  # what is printed is kept beside it, not on the small disk
                at.unlink(missing_ok=True)
                at.symlink_to(folder)
                done = scene.run(fork_server, at, patch=patch)
                tally["refused" if done.code else "done"] += 1
                found += [f"{room} KiB, {'old' if has_old else 'absent'}: {fault}" for fault in faults(scene, done, folder, before)]
    reported(f"{name}, full disk {'' if knows else 'not '}foreseen", tally, found)
    assert tally["refused"]
    assert not found, "\n".join(found)


def _fill(disk: Path, room_kib: int) -> None:
    """Leave just so much room on a disk."""
    filler = disk / "filler"
    filler.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - room_kib * KIB)))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a disk takes root")
@pytest.mark.parametrize("name", [name for name in WRITERS if name != "convert_detector"])
def test_a_full_disk_for_temporary_files_is_one_line_and_leaves_all_as_it_was(
    scenes: Scenes,
    fork_server: ForkServer,
    tmp_path: Path,
    name: str,
) -> None:
    """Tools that need no temporary files are done all the same."""
    scene = scenes(name)
    tally, found = Counter[str](), []
    with small_disk(tmp_path / "disk", 16) as disk:
        for has_old in (False, True):
            folder = scene.set_up(tmp_path / "run", has_old=has_old)
            before = hashes(folder)
            done = scene.run(fork_server, folder, patch="plenty_of_disk", env={"TMPDIR": str(disk)})
            tally["refused" if done.code else "done"] += 1
            found += list(faults(scene, done, folder, before))
            found += [f"left behind: {path.name}" for path in disk.iterdir() if path.name != TELEMETRY]
    reported(f"{name}, no room for temporary files", tally, found)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", ["extract_weights", "prepare_calibration"])
def test_a_disk_that_is_full_from_any_step_on_leaves_all_as_it_was(
    scenes: Scenes,
    fork_server: ForkServer,
    tmp_path: Path,
    name: str,
    rounds: int,
) -> None:
    """The first step fails, the second, and on until a run ends normally."""
    scene = scenes(name)
    tally, found = Counter[str](), []
    number, stride, done = 1, 1 if rounds > FEW or scene.seconds < 0.3 else 3, None
    while done is None or done.code:
        has_old = number % 2 == 1
        folder = scene.set_up(tmp_path / "run", has_old=has_old)
        before = hashes(folder)
        done = scene.run(fork_server, folder, patch=f"fail_at [{number}, {errno.ENOSPC}]")
        tally["refused" if done.code else "done"] += 1
        found += [f"step {number}, {'old' if has_old else 'absent'}: {fault}" for fault in faults(scene, done, folder, before)]
        number += stride
    reported(f"{name}, full from each step on", tally, found)
    assert tally["refused"] * stride > 5
    assert not found, "\n".join(found)
