"""Files appear whole or not at all, and up to date means up to date."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from shared.command.dry_run import DryRun
from shared.command.errors import CheckError, ToolError
from shared.command.resources import ResourceEstimate
from shared.files.artifacts import build
from shared.files.plan import Plan
from shared.files.provenance import provenance_path, read_provenance, record
from tests.shared.files.conftest import Found, Work


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


def test_a_file_that_is_not_ours_needs_overwrite(work: Work) -> None:
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


def test_the_provenance_never_replaces_an_input(tmp_path: Path) -> None:
    source = tmp_path / "messages.json"
    source.write_text("truth")
    with pytest.raises(ToolError, match=r"messages\.json: the output is the input"):
        build(Plan(tmp_path / "messages", "compare", {}, [source], overwrite=True), Found, lambda _: pytest.fail("too late"))
    assert source.read_text() == "truth"


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
def test_memory_or_disk_that_does_not_suffice_is_an_error_before_the_work_and_in_a_dry_run(work: Work, what: str) -> None:
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
