"""A set's folder holds the files of its manifest, never replaces a user's file, and is left clean by a failed run."""

from pathlib import Path
from typing import Any

import pytest

from shared.command.errors import ToolError
from tests.tools.prepare_calibration.conftest import SMALL, entries, everything, manifest, picture
from tools.prepare_calibration import prepare_calibration
from tools.prepare_calibration import samples as samples_module
from tools.prepare_calibration.command import CalibrationSamples


def test_a_folder_with_unknown_files_is_refused_without_overwrite(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ToolError, match="the folder holds other files; use --overwrite"):
        prepare_calibration([photos], output=tmp_path / "mine", **SMALL)
    with pytest.raises(ToolError, match="the folder holds other files"):
        prepare_calibration([photos], output=tmp_path / "mine", refresh=True, **SMALL)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    prepare_calibration([photos], output=tmp_path / "mine", overwrite=True, **SMALL)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    assert len(entries(tmp_path / "mine")) == 12
    with pytest.raises(ToolError, match="the output is no folder"):
        prepare_calibration([photos], output=photos / "0.png", overwrite=True, **SMALL)


def test_a_manifest_of_unknown_origin_is_kept(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.json").write_text("{}")
    with pytest.raises(ToolError, match="the output exists"):
        prepare_calibration([photos], output=tmp_path / "mine", refresh=True, **SMALL)
    assert [path.read_text() for path in (tmp_path / "mine").iterdir()] == ["{}"]


def test_a_users_file_with_a_name_of_the_set_is_kept(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiles"
    prepare_calibration([photos], output=folder, **SMALL)
    (folder / "samples.npz").write_text("mine")
    with pytest.raises(ToolError, match=r"samples\.npz: this file would be replaced; use --overwrite"):
        prepare_calibration([photos], output=folder, npz=True, refresh=True, **SMALL)
    assert (folder / "samples.npz").read_text() == "mine"


def test_a_set_is_up_to_date_until_a_file_or_option_changes(photos: Path, tmp_path: Path) -> None:
    def again(**changes: Any) -> CalibrationSamples:
        return prepare_calibration([photos], output=tmp_path / "tiles", **SMALL | changes)

    first, before = again(), everything(tmp_path / "tiles")
    second = again()
    assert (first.manifest.up_to_date, second.manifest.up_to_date) == (False, True)
    assert second.message.startswith("up to date: ")
    assert second.found == first.found
    with pytest.raises(ToolError, match="the output exists and is out of date"):
        again(seed=1)
    (tmp_path / "tiles" / entries(tmp_path / "tiles")[0]["file"]).unlink()
    with pytest.raises(ToolError, match="out of date"):
        again()
    assert not again(refresh=True).manifest.up_to_date
    assert everything(tmp_path / "tiles") == before
    picture(99).save(photos / "0.png")
    with pytest.raises(ToolError, match="out of date"):
        again()
    picture(0).save(photos / "0.png")
    assert again().manifest.up_to_date
    picture(99).save(photos / "new.png")
    with pytest.raises(ToolError, match="out of date"):
        again()


def test_refresh_replaces_the_tiles_and_removes_the_former_tiles(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiles"
    prepare_calibration([photos], output=folder, holdout=3, npz=True, **SMALL)
    former = set(everything(folder))
    (folder / "notes.txt").write_text("mine")
    prepare_calibration([photos], output=folder, refresh=True, seed=3, **SMALL)
    content = manifest(folder)
    now = {*content["files"], *(entry["file"] for entry in content["samples"]), "manifest.json", "notes.txt"}
    assert set(everything(folder)) == now
    assert {"samples.npz", "holdout.npz"} <= former - now


def test_tiles_inside_a_source_folder_are_no_sources(photos: Path) -> None:
    for _ in range(2):
        result = prepare_calibration([photos], output=photos / "tiles", **SMALL)
        assert result.found.sources == 8
    assert result.manifest.up_to_date


def test_a_failed_run_leaves_no_samples(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_calibration([photos], output=tmp_path / "old", **SMALL)
    before = everything(tmp_path / "old")
    monkeypatch.setattr(samples_module, "write_sheet", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    for folder, options in (("new", {}), ("old", {"refresh": True, "seed": 3})):
        with pytest.raises(OSError, match="no space left"):
            prepare_calibration([photos], output=tmp_path / folder, **options, **SMALL)
    assert everything(tmp_path / "old") == before
    assert not (tmp_path / "new").exists()
