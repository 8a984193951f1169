"""Files appear whole or not at all, and up to date means up to date."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from shared.command.dry_run import DryRun
from shared.command.errors import CheckError, ToolError
from shared.command.resources import ResourceEstimate
from shared.files import atomic
from shared.files.artifacts import build, require_not_anothers
from shared.files.atomic import draft_beside, workspace
from shared.files.checksums import write_voucher
from shared.files.plan import Plan, Product
from shared.files.provenance import provenance_path, read_provenance, record, require_vouched


@dataclass(frozen=True)
class Found:
    """What the pretended tool found."""

    letters: int
    ok: bool = True


class Work:
    """A pretended tool that counts how often it really worked."""

    def __init__(self, folder: Path) -> None:
        self.source = folder / "source.txt"
        self.source.write_text("abc")
        self.plan = Plan(folder / "out.txt", "verify", {"shout": True}, [self.source], ["numpy"])
        self.times = 0
        self.ok = True

    def make(self, draft: Path) -> Found:
        self.times += 1
        text = self.source.read_text()
        draft.write_text(text.upper())
        return Found(len(text), self.ok)

    def build(self, **changes: object) -> tuple[Product, Found]:
        return build(replace(self.plan, **changes), Found, self.make)  # type: ignore[arg-type]


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path)


def test_a_product_appears_with_its_provenance_and_nothing_else(work: Work) -> None:
    product, found = work.build()
    assert (product.path.read_text(), found, product.up_to_date) == ("ABC", Found(3), False)
    provenance = json.loads(provenance_path(product.path).read_text())
    assert provenance["tool"] == "verify"
    assert provenance["arguments"] == {"shout": True}
    assert provenance["output"]["sha256"] == product.sha256
    assert provenance["inputs"][0]["sha256"] == record(work.source).sha256
    assert {"python", "numpy", "edgepress-code"} <= provenance["versions"].keys()
    assert sorted(path.name for path in product.path.parent.iterdir()) == ["out.txt", "out.txt.json", "source.txt"]


def test_the_second_build_finds_it_up_to_date_with_what_was_found(work: Work) -> None:
    first, _ = work.build()
    second, found = work.build()
    assert (work.times, second.up_to_date, found) == (1, True, Found(3))
    assert second.sha256 == first.sha256


@pytest.mark.parametrize("changes", [{"arguments": {"shout": False}}, {"tool": "compare"}, {"packages": ["numpy", "typer"]}])
def test_other_arguments_tools_or_versions_make_it_stale(work: Work, changes: dict[str, object]) -> None:
    work.build()
    with pytest.raises(ToolError, match="out of date"):
        work.build(**changes)
    work.build(**changes, refresh=True)
    assert work.times == 2


def test_an_input_changed_to_the_same_size_and_time_makes_it_stale(work: Work) -> None:
    work.build()
    times = work.source.stat()
    work.source.write_text("xyz")
    os.utime(work.source, ns=(times.st_atime_ns, times.st_mtime_ns))
    product, _ = work.build(refresh=True)
    assert (work.times, product.path.read_text()) == (2, "XYZ")


def test_a_product_changed_by_hand_is_not_ours_any_more(work: Work) -> None:
    product, _ = work.build()
    times = product.path.stat()
    product.path.write_text("AB!")
    os.utime(product.path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ToolError, match="use --overwrite"):
        work.build(refresh=True)
    assert product.path.read_text() == "AB!"
    work.build(overwrite=True)
    assert product.path.read_text() == "ABC"


def test_a_strangers_file_needs_overwrite(work: Work) -> None:
    work.plan.output.write_text("precious")
    for refresh in (False, True):
        with pytest.raises(ToolError, match="the output exists"):
            work.build(refresh=refresh)
    assert (work.plan.output.read_text(), work.times) == ("precious", 0)


def test_a_product_that_failed_its_own_check_is_made_again(work: Work) -> None:
    work.ok = False
    work.build()
    work.build(refresh=True)
    assert work.times == 2


def test_an_error_leaves_nothing_and_keeps_what_was_there(work: Work) -> None:
    def fail(draft: Path) -> Found:
        draft.write_text("half")
        raise ToolError("no")

    with pytest.raises(ToolError):
        build(work.plan, Found, fail)
    assert not work.plan.output.exists()
    product, _ = work.build()
    with pytest.raises(ToolError):
        build(replace(work.plan, overwrite=True, arguments={}), Found, fail)
    assert product.path.read_text() == "ABC"
    assert not list(product.path.parent.glob(".*"))


def test_killed_between_provenance_and_product_the_next_run_finishes(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """The provenance is new, the product still the old one: it is known as the one to be replaced."""
    product, _ = work.build()
    work.source.write_text("xyz")
    rename = Path.replace

    def die(self: Path, target: Path) -> Path:
        if target == product.path:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            work.build(refresh=True)
    assert product.path.read_text() == "ABC"
    again, _ = work.build(refresh=True)
    assert again.path.read_text() == "XYZ"


def test_an_output_that_is_an_input_a_folder_or_a_link_is_refused(work: Work, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="the output is the input"):
        work.build(output=work.source, overwrite=True)
    with pytest.raises(ToolError, match="is a folder"):
        work.build(output=tmp_path, overwrite=True)
    link = tmp_path / "link.txt"
    link.symlink_to(tmp_path / "nowhere.txt")
    for target in (tmp_path / "nowhere.txt", work.source):
        link.unlink()
        link.symlink_to(target)
        for overwrite in (False, True):
            with pytest.raises(ToolError, match="is a symbolic link"):
                work.build(output=link, refresh=True, overwrite=overwrite)
    assert work.source.read_text() == "abc"


def test_a_folder_that_is_missing_or_no_folder_is_refused_before_the_work(work: Work, tmp_path: Path) -> None:
    for folder in (tmp_path / "absent", work.source):
        with pytest.raises(ToolError, match="cannot write here"):
            work.build(output=folder / "out.txt")
    assert work.times == 0


def test_drafts_of_dead_processes_are_cleared_away_and_others_left(tmp_path: Path) -> None:
    here = atomic._scope()
    names = [f"{here}-999999999", f"{here}-{os.getppid()}", "0123abcd-999999999", "0123abcd-999999998"]
    dead, alive, elsewhere, old = (tmp_path / f".out.txt.{name}.partial" for name in names)
    for path in (dead, alive, elsewhere, old):
        path.touch()
    os.utime(old, (time.time() - 2 * atomic.ABANDONED_S,) * 2)
    with draft_beside(tmp_path / "out.txt"):
        pass
    left = [path.exists() for path in (dead, alive, elsewhere, old)]
    assert left == [False, True, True, False], "another machine's or container's process may be alive for a day"


def test_an_unchanged_file_is_not_hashed_again(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    product, _ = work.build()

    def forbidden(*_: object) -> object:
        raise AssertionError

    monkeypatch.setattr("hashlib.file_digest", forbidden)
    assert record(product.path).sha256 == product.sha256
    assert work.build()[0].up_to_date


def test_provenance_that_is_not_ours_is_none(work: Work) -> None:
    provenance_path(work.plan.output).write_text('{"tool": "another"}')
    assert read_provenance(work.plan.output) is None


def test_a_missing_input_is_an_error(work: Work, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="no such input file"):
        work.build(inputs=[tmp_path / "absent"])


def test_another_files_place_is_not_taken_by_provenance(work: Work) -> None:
    notes = provenance_path(work.plan.output)
    notes.write_text("my notes")
    with pytest.raises(ToolError, match="the provenance would replace this file"):
        work.build(refresh=True)
    assert notes.read_text() == "my notes"
    work.build(overwrite=True)
    assert read_provenance(work.plan.output) is not None


def test_devices_and_pipes_are_neither_read_nor_replaced(work: Work, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ToolError, match="no regular file"):
        work.build(output=pipe, overwrite=True)
    with pytest.raises(ToolError, match="the input is no regular file"):
        work.build(inputs=[pipe])
    os.mkfifo(provenance_path(work.source))
    assert read_provenance(work.source) is None


@pytest.mark.parametrize("output", [".", "/", ".."])
def test_an_output_without_a_name_is_refused(work: Work, output: str) -> None:
    with pytest.raises(ToolError, match="is a folder"):
        work.build(output=Path(output))


def test_of_two_runs_at_once_the_second_keeps_the_firsts_product(work: Work) -> None:
    def overtaken(draft: Path) -> Found:
        work.build(arguments={"shout": False})
        draft.write_text("late")
        return Found(4)

    with pytest.raises(ToolError, match="another run wrote the output meanwhile"):
        build(work.plan, Found, overtaken)
    assert work.plan.output.read_text() == "ABC"
    assert work.build(arguments={"shout": False})[0].up_to_date


def test_what_is_bound_to_be_refused_is_told_beforehand(work: Work) -> None:
    output = work.plan.output
    require_not_anothers(output, overwrite=False)
    work.build()
    require_not_anothers(output, overwrite=False)
    output.write_text("edited")
    with pytest.raises(ToolError, match="the output exists"):
        require_not_anothers(output, overwrite=False)
    require_not_anothers(output, overwrite=True)


def test_the_provenance_never_replaces_an_input(tmp_path: Path) -> None:
    source = tmp_path / "messages.json"
    source.write_text("truth")
    with pytest.raises(ToolError, match=r"messages\.json: the output is the input"):
        build(Plan(tmp_path / "messages", "compare", {}, [source], overwrite=True), Found, lambda _: pytest.fail("too late"))
    assert source.read_text() == "truth"


def test_folders_that_killed_runs_left_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    stale, running = tmp_path / f"edgepress-{ended.pid}-a", tmp_path / f"edgepress-{os.getppid()}-a"
    stale.mkdir()
    running.mkdir()
    strangers = tmp_path / "edgepress-my-photos"
    strangers.mkdir()
    with workspace() as folder:
        assert folder.parent == tmp_path
        assert folder.name.startswith(f"edgepress-{os.getpid()}-")
    assert sorted(tmp_path.iterdir()) == [running, strangers]


# Files that a product refers to.


def with_weights(work: Work) -> Work:
    """Let products name the file that holds their weights, as large models do."""

    def make(draft: Path) -> Found:
        work.times += 1
        text = work.source.read_text()
        name = f"out.{hashlib.sha256(text.encode()).hexdigest()[:8]}.data"
        (draft.parent / name).write_text(text * 10)
        draft.write_text(name)
        return Found(len(text))

    work.make = make  # type: ignore[method-assign]
    work.plan = replace(work.plan, companions=lambda path: [path.parent / path.read_text()])
    return work


def weights_beside(work: Work) -> list[str]:
    return sorted(path.name for path in work.plan.output.parent.glob("*.data"))


def test_a_products_size_and_provenance_are_of_all_its_files(work: Work) -> None:
    product, _ = with_weights(work).build()
    provenance = read_provenance(product.path)
    assert provenance is not None
    assert [Path(item.path).name for item in provenance.companions] == weights_beside(work)
    assert product.size_bytes == product.path.stat().st_size + 30
    again, _ = work.build()
    assert (again.up_to_date, again.size_bytes, work.times) == (True, product.size_bytes, 1)


@pytest.mark.parametrize("fault", ["changed", "gone"])
def test_weights_that_changed_or_are_gone_make_the_product_stale(work: Work, fault: str) -> None:
    product, _ = with_weights(work).build()
    (name,) = weights_beside(work)
    weights = product.path.with_name(name)
    times = weights.stat()
    weights.write_text("z" * 30)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    if fault == "gone":
        weights.unlink()
    with pytest.raises(ToolError, match="exists and is out of date"):
        work.build()
    work.build(refresh=True)
    assert (work.times, weights.read_text()) == (2, "abc" * 10)
    assert work.build()[0].up_to_date


def test_a_refresh_removes_the_weights_of_the_former_product_and_no_others(work: Work) -> None:
    with_weights(work).build()
    (former,) = weights_beside(work)
    work.plan.output.with_name("out.00000000.data").write_text("somebody's")
    work.source.write_text("xyz")
    work.build(refresh=True)
    assert former not in weights_beside(work)
    assert len(weights_beside(work)) == 2
    assert work.plan.output.with_name("out.00000000.data").read_text() == "somebody's"


def test_former_weights_that_are_not_what_was_written_stay(work: Work) -> None:
    with_weights(work).build()
    (former,) = weights_beside(work)
    work.plan.output.with_name(former).write_text("edited")
    work.source.write_text("xyz")
    work.build(refresh=True)
    assert work.plan.output.with_name(former).read_text() == "edited"


def test_a_refresh_with_the_same_weights_keeps_them(work: Work) -> None:
    product, _ = with_weights(work).build()
    work.build(arguments={"shout": False}, refresh=True)
    assert product.path.with_name(product.path.read_text()).read_text() == "abc" * 10


def test_weights_of_drafts_of_dead_processes_are_cleared_away(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = [f".m.onnx.{atomic._scope()}-{pid}.partial.data" for pid in (ended.pid, os.getppid())]
    stale, running = (tmp_path / name for name in names)
    for path in (stale, running):
        path.touch()
    with draft_beside(tmp_path / "m.onnx"):
        assert not stale.exists()
        assert running.exists()


# What vouches for inputs.


@pytest.mark.parametrize("noted", ["provenance", "sha256", "sums"])
def test_an_input_that_is_not_what_its_checksum_says_is_refused(work: Work, noted: str) -> None:
    product, _ = work.build()
    path = product.path
    if noted != "provenance":
        provenance_path(path).unlink()
    if noted == "sha256":
        write_voucher(path, product.sha256)
    if noted == "sums":
        path.with_name("SHA256SUMS").write_text(f"{'0' * 64}  other.txt\n{product.sha256} *./{path.name}\n")
    further = replace(work.plan, output=path.with_name("further.txt"), inputs=[path])
    build(further, Found, work.make)
    by = {"provenance": f"{path.name}.json", "sha256": f"{path.name}.sha256", "sums": "SHA256SUMS"}[noted]
    provenance = read_provenance(further.output)
    assert provenance is not None
    assert [item.vouched_by for item in provenance.inputs] == [by]
    path.write_text("ABD")
    with pytest.raises(ToolError, match=rf"not the one that its checksum is of.*as {by} says; .*remove {by}"):
        build(replace(further, output=path.with_name("again.txt")), Found, work.make)
    with pytest.raises(ToolError, match="not the one that its checksum is of"):
        require_vouched([path])


def test_nothing_vouches_for_a_strangers_file_and_that_is_on_record(work: Work) -> None:
    work.build()
    provenance = read_provenance(work.plan.output)
    assert provenance is not None
    assert [item.vouched_by for item in provenance.inputs] == [""]


def test_a_note_of_a_hash_that_is_none_is_told(work: Work) -> None:
    work.source.with_name("source.txt.sha256").write_text("not a hash")
    with pytest.raises(ToolError, match="no sha256"):
        work.build()


def test_an_input_that_changes_meanwhile_leaves_nothing(work: Work) -> None:
    def slow(draft: Path) -> Found:
        found = work.make(draft)
        work.source.write_text("xyz")
        return found

    with pytest.raises(ToolError, match="changed while it was worked on; nothing was kept"):
        build(work.plan, Found, slow)
    assert not work.plan.output.exists()


# Twice, dry, and reopened.


def test_what_is_made_twice_alike_is_on_record(work: Work) -> None:
    work.build(reproducible=True)
    provenance = read_provenance(work.plan.output)
    assert provenance is not None
    assert (provenance.made_twice, work.times) == (True, 2)
    assert sorted(path.name for path in work.plan.output.parent.iterdir()) == ["out.txt", "out.txt.json", "source.txt"]


def test_what_differs_the_second_time_is_a_failed_check_and_not_kept(work: Work) -> None:
    def fickle(draft: Path) -> Found:
        work.times += 1
        draft.write_text(f"{work.times}")
        return Found(1)

    with pytest.raises(CheckError, match="made twice") as caught:
        build(replace(work.plan, reproducible=True), Found, fickle)
    assert caught.value.exit_code == 1
    assert not work.plan.output.exists()


def test_weights_that_differ_the_second_time_are_not_kept_either(work: Work) -> None:
    with_weights(work)

    def fickle(draft: Path) -> Found:
        work.source.write_text("abc" * (work.times + 1))
        return work.make(draft)

    with pytest.raises(CheckError):
        build(replace(work.plan, inputs=[], reproducible=True), Found, fickle)
    assert len(weights_beside(work)) <= 1


def test_a_dry_run_says_what_would_be_and_writes_nothing(work: Work) -> None:
    plan = replace(work.plan, needs=lambda: ResourceEstimate("shout", 10, 20, 30))
    before = sorted(work.plan.output.parent.iterdir())
    with pytest.raises(DryRun) as caught:
        build(replace(plan, dry_run=True), Found, work.make)
    (forecast,) = caught.value.result.forecasts
    assert (forecast.state, forecast.needs.disk_bytes, forecast.ok) == ("would be written", 20, True)
    assert (sorted(work.plan.output.parent.iterdir()), work.times) == (before, 0)
    build(plan, Found, work.make)
    for changes, state in (({}, "is up to date"), ({"arguments": {}, "refresh": True}, "would be replaced")):
        with pytest.raises(DryRun) as caught:
            build(replace(plan, dry_run=True, **changes), Found, work.make)
        assert caught.value.result.forecasts[0].state == state


@pytest.mark.parametrize("what", ["disk", "memory"])
def test_what_does_not_suffice_is_told_before_the_work_and_in_a_dry_run(work: Work, what: str) -> None:
    needs = ResourceEstimate("shout", **{f"{what}_bytes": 2**60})  # type: ignore[arg-type]
    with pytest.raises(ToolError, match=f"not enough free {what} to shout"):
        work.build(needs=lambda: needs)
    with pytest.raises(DryRun) as caught:
        work.build(needs=lambda: needs, dry_run=True)
    assert (caught.value.result.ok, work.times) == (False, 0)


def test_a_draft_that_its_consumer_does_not_read_never_gets_its_name(work: Work) -> None:
    def refuse(draft: Path) -> None:
        raise ToolError("unreadable", got=draft.read_text())

    with pytest.raises(ToolError, match="unreadable; got ABC"):
        work.build(reopen=refuse)
    assert not work.plan.output.exists()


def test_a_killed_process_that_nobody_has_asked_about_is_not_running(tmp_path: Path) -> None:
    zombie = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert zombie.stdout is not None
    zombie.stdout.read()  # it has ended, but for its number
    deadline = time.monotonic() + 10
    while atomic._is_running(str(zombie.pid)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not atomic._is_running(str(zombie.pid))
    os.kill(zombie.pid, 0)  # the number is still taken
    zombie.communicate()
