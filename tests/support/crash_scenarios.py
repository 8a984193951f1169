"""What a folder must hold after a tool was disturbed in it: the old product or the new one, whole, and nothing half-written."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.files.provenance import Provenance, provenance_path, read_provenance
from tests.support.fork_server import Done, ForkServer

GONE_S = 30  # to wait for the processes of a tool that was killed
SHOWN = 400  # characters of what a tool said


@dataclass(frozen=True)
class Command:
    """A tool's command line, and what it makes.

    Args:
        name: For tables.
        tool: The tool.
        arguments: Its command line, without --refresh.
        product: The file it makes, seen from the folder in which it runs.
        inputs: Name in that folder -> the file or folder it is a copy of.
        former: The command line that makes another product under the same name; or a product that is copied with its provenance.
        is_slow: Whether a run takes seconds.
    """

    name: str
    tool: str
    arguments: tuple[str, ...]
    product: str
    inputs: dict[str, Path]
    former: tuple[str, ...] | Path = ()
    is_slow: bool = False


@dataclass(frozen=True)
class Scene:
    """Folders in which a command has not run, has run with other arguments, and has run undisturbed."""

    command: Command
    absent: Path
    old: Path
    new: Path
    seconds: float

    def set_up(self, folder: Path, *, has_old: bool) -> Path:
        """Make a folder as it is before the command runs."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.old if has_old else self.absent, folder, copy_function=shutil.copy)
        return folder

    def run(self, fork_server: ForkServer, folder: Path, **disturbed: object) -> Done:
        """Run the command, which may replace an old product of ours."""
        done = fork_server.run(self.command.tool, *self.command.arguments, "--refresh", folder=folder, **disturbed)  # type: ignore[arg-type]
        wait_until_gone(folder)
        return done

    def faults(self, folder: Path, *, has_old: bool, drafts: bool) -> Iterator[str]:
        """Yield what is neither as before nor as after an undisturbed run; `drafts` says whether these may lie there."""
        before, after, found = hashes(self.old if has_old else self.absent), hashes(self.new), hashes(folder)
        product = self.command.product
        kept = {name for name in self.command.inputs if name in before} | {
            name for name in before if name.partition("/")[0] in self.command.inputs
        }
        for name, digest in found.items():
            if name.endswith(".begun"):
                continue  # a mark for the next run
            if ".partial" in name:
                if not drafts:
                    yield f"left behind: {name}"
            elif name != product + ".json" and digest not in (before.get(name), after.get(name)):
                yield f"corrupt or strange: {name}"
        yield from (f"changed input: {name}" for name in sorted(kept) if found.get(name) != before[name])
        if product in before and product not in found:
            yield f"lost original: {product}"
        yield from self._faults_of_provenance(folder / product, found.get(product), before.get(product))

    def _faults_of_provenance(self, product: Path, digest: str | None, before: str | None) -> Iterator[str]:
        side, provenance = provenance_path(product), read_provenance(product)
        if provenance is None and (side.exists() or digest is not None):
            yield f"provenance missing or unreadable: {side.name}"
        if provenance is None or digest is None:
            return
        if digest != provenance.output.sha256 and not (digest == before and digest == provenance.replaces_sha256):
            yield f"provenance of another file: {side.name}"

    def faults_when_done(self, folder: Path) -> Iterator[str]:
        """Yield what is not as after an undisturbed run."""
        after, found = hashes(self.new), hashes(folder)
        side = self.command.product + ".json"
        differ = [name for name in sorted(after.keys() | found.keys()) if name != side and after.get(name) != found.get(name)]
        yield from (f"not as undisturbed: {name}" for name in differ)
        one, other = (read_provenance(place / self.command.product) for place in (self.new, folder))
        if one is None or other is None or _core(one) != _core(other):
            yield f"provenance not as undisturbed: {side}"


def _core(provenance: Provenance) -> object:
    """Return what of a provenance is the same for each run."""
    files = [item.sha256 for item in (*provenance.inputs, provenance.output, *provenance.companions)]
    return provenance.tool, json.dumps(provenance.arguments, sort_keys=True), files


def make_scene(command: Command, place: Path, fork_server: ForkServer) -> Scene:
    """Run a command undisturbed, with its former arguments too, and keep the folders."""
    absent, old, new = (place / name for name in ("absent", "old", "new"))
    absent.mkdir(parents=True)
    for name, source in command.inputs.items():
        (absent / name).parent.mkdir(parents=True, exist_ok=True)
        _copy(source, absent / name)
    for folder in (old, new):
        shutil.copytree(absent, folder, copy_function=shutil.copy)
    if isinstance(command.former, Path):
        _copy(command.former, old / command.product)
        _copy(provenance_path(command.former), provenance_path(old / command.product))
    elif command.former:
        _require_done(fork_server.run(command.tool, *command.former, folder=old))
    done = _require_done(fork_server.run(command.tool, *command.arguments, folder=new))
    return Scene(command, absent, old, new, done.seconds)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, copy_function=shutil.copy)
    else:
        shutil.copy(source, target)


def _require_done(done: Done) -> Done:
    assert done.code == 0, done.stderr
    return done


def hashes(folder: Path) -> dict[str, str]:
    """Return what each file below a folder holds."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def faults_of_refusal(done: Done, codes: Sequence[int] = (2,)) -> Iterator[str]:
    """Yield what is wrong with how a tool said that it could not: one line, no traceback, no table."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    if done.code not in codes:
        yield f"exit code {done.code}: {done.stderr[-SHOWN:]}"
    if len(lines) != 1 or not lines[0].startswith("error: "):
        yield f"not one line: {done.stderr[-SHOWN:]!r}"
    if done.stdout:
        yield f"printed: {done.stdout[:SHOWN]!r}"


def wait_until_gone(folder: Path) -> None:
    """Wait until no process works in a folder, nor has the number of one that did: those of a killed tool end a moment later."""
    deadline = time.monotonic() + GONE_S
    while time.monotonic() < deadline:
        writers = [Path("/proc") / draft.name.rpartition(".partial")[0].rpartition("-")[2] for draft in folder.rglob(".*.partial*")]
        if not any(_works_in(process, folder) for process in Path("/proc").glob("[0-9]*")) and not any(map(Path.exists, writers)):
            return
        time.sleep(0.005)
    raise AssertionError(f"a process lives on in {folder}")


def _works_in(process: Path, folder: Path) -> bool:
    try:
        return str(process.joinpath("cwd").readlink()) == str(folder.resolve())
    except OSError:  # it is gone, or another user's
        return False
