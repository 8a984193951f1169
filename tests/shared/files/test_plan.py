"""An output that is bound to be refused is refused before the work."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from shared.command.errors import ToolError
from shared.files.artifacts import build
from shared.files.plan import Plan, is_same, require_output_free, require_report_free
from shared.files.provenance import provenance_path
from tests.shared.files.conftest import Found, Work


def write_report(path: Path, text: str = '{"ok": true}') -> Path:
    """Write a report of ours."""

    def make(draft: Path) -> Found:
        draft.write_text(text)
        return Found(1)

    build(Plan(path, "verify", {}, is_report=True), Found, make)
    return path


def test_an_output_is_free_where_nothing_or_a_product_of_ours_is(work: Work) -> None:
    output = work.plan.output
    require_output_free(output, overwrite=False)
    work.build()
    require_output_free(output, overwrite=False)
    output.write_text("edited")
    with pytest.raises(ToolError, match="the output exists"):
        require_output_free(output, overwrite=False)
    require_output_free(output, overwrite=True)


def test_an_output_whose_provenance_would_replace_another_file_is_not_free(work: Work) -> None:
    provenance_path(work.plan.output).write_text("my notes")
    with pytest.raises(ToolError, match="the provenance would replace this file"):
        require_output_free(work.plan.output, overwrite=False)
    require_output_free(work.plan.output, overwrite=True)


@pytest.mark.parametrize("name", ["report.json", "report.html"])
def test_a_report_is_free_where_nothing_or_a_report_of_ours_is(tmp_path: Path, name: str) -> None:
    report = tmp_path / name
    require_report_free(report, [], overwrite=False)
    write_report(report, '{"ok": true}' if name.endswith("json") else "<p>ok</p>")
    require_report_free(report, [], overwrite=False)
    text = report.read_text()
    report.write_text(text.replace("ok", "mine", 1))
    with pytest.raises(ToolError, match="the output exists"):
        require_report_free(report, [], overwrite=False)
    require_report_free(report, [], overwrite=True)


def test_a_report_takes_no_place_next_to_itself(tmp_path: Path) -> None:
    (tmp_path / "report.json.json").write_text("my notes")
    require_report_free(tmp_path / "report.json", [], overwrite=False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_report_replaces_neither_a_file_that_is_read_nor_its_provenance(tmp_path: Path, overwrite: bool) -> None:
    model = tmp_path / "model.tflite"
    model.write_text("weights")
    os.link(model, tmp_path / "second_name.json")
    (tmp_path / "link.json").symlink_to(model)
    for report in (model, provenance_path(model), tmp_path / "second_name.json", tmp_path / "link.json"):
        with pytest.raises(ToolError, match="the report would replace a file that is read or written"):
            require_report_free(report, [tmp_path / "other.tflite", model], overwrite=overwrite)


def test_a_report_needs_a_folder_and_is_no_folder_link_or_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for report, reason in (
        (tmp_path / "absent" / "a.html", "no such folder"),
        (tmp_path, "is a folder"),
        (tmp_path / "pipe", "no regular file"),
        (tmp_path / "link", "a symbolic link"),
        (tmp_path / "loop", "a symbolic link"),
    ):
        with pytest.raises(ToolError, match=reason):
            require_report_free(report, [tmp_path / "model"], overwrite=True)


def test_two_paths_are_the_same_file_by_name_link_or_inode(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.touch()
    (tmp_path / "link").symlink_to(file)
    (tmp_path / "loop").symlink_to("loop")
    os.link(file, tmp_path / "hard")
    for other in (file, tmp_path / "link", tmp_path / "hard", tmp_path / "." / "a", tmp_path / "sub" / ".." / "a"):
        assert is_same(file, other)
    assert is_same(tmp_path / "absent", tmp_path / "." / "absent")
    for other in (tmp_path / "b", tmp_path / "loop", tmp_path):
        assert not is_same(file, other)


def test_the_folder_of_a_plan_is_the_nearest_that_is_there(tmp_path: Path) -> None:
    plan = Plan(tmp_path / "a" / "b" / "out.txt", "verify", {})
    assert plan.folder == tmp_path / "a" / "b"
    assert replace(plan, makes_folder=True).folder == tmp_path
    (tmp_path / "a").mkdir()
    assert replace(plan, makes_folder=True).folder == tmp_path / "a"


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_product_without_the_files_written_next_to_it_is_made_again(work: Work, is_whole: bool) -> None:
    work.build()
    work.build(refresh=True, is_whole=lambda found: is_whole and found == Found(3))
    assert work.times == 2 - is_whole
