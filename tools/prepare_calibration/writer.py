"""Write the files of a calibration set: PNG files named by their content, arrays, the contact sheet; and keep its folder clean."""

import contextlib
import hashlib
import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from shared.calibration.dataset import RANGES
from shared.command.errors import ToolError
from shared.files.atomic import abandoned_marks, begun, draft_beside, identity, is_abandoned, kept_aside, new_folder
from shared.files.provenance import provenance_path, read_provenance, record
from shared.media.images import ImageForm, Pixels, read_pixels, to_form, to_png
from tools.prepare_calibration.contact_sheet import write_contact_sheet
from tools.prepare_calibration.request import ArrayForm

SAMPLE = re.compile(r"[sh]\d{4,}_[0-9a-f]{8}\.png")
UNDATED = (1980, 1, 1, 0, 0, 0)


def write_sample(folder: Path, stem: str, pixels: Pixels) -> tuple[str, str]:
    """Write pixels, uint8 (H, W, 3) RGB, as PNG; return the file's name, which holds the start of its sha256, and the hash."""
    content = to_png(pixels)
    digest = hashlib.sha256(content).hexdigest()
    file = folder / f"{stem}_{digest[:8]}.png"
    with draft_beside(file) as draft:
        draft.write_bytes(content)
        draft.replace(file)
    return file.name, digest


def write_arrays(path: Path, files: Sequence[Path], form: ArrayForm) -> None:
    """Write images as one float32 array in an .npz, one sample in memory at a time; all get the size of the first image."""
    first = read_pixels(files[0])
    shape = to_form(first, ImageForm(form.layout, form.channels, None, None)).shape[1:]
    low, high = RANGES[form.input_range]
    info = zipfile.ZipInfo(f"{form.name}.npy", UNDATED)
    with draft_beside(path) as draft:
        with zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED) as archive, archive.open(info, "w", force_zip64=True) as stream:
            _write_header(stream, (len(files), *shape))
            for file in files:
                image = to_form(read_pixels(file), ImageForm(form.layout, form.channels, *first.shape[:2]))
                stream.write(np.ascontiguousarray(image * np.float32(high - low) + np.float32(low)).tobytes())
        draft.replace(path)


def _write_header(stream: IO[bytes], shape: tuple[int, ...]) -> None:
    header: dict[str, Any] = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)


def write_sheet(path: Path, files: Sequence[Path]) -> None:
    """Write the contact sheet of samples; each thumbnail carries the number from its file's name."""
    with draft_beside(path) as draft:
        write_contact_sheet(draft, _numbered(files), len(files))
        draft.replace(path)


def _numbered(files: Sequence[Path]) -> Iterator[tuple[str, Pixels]]:
    for file in files:
        yield file.stem.rpartition("_")[0], read_pixels(file)


@dataclass(frozen=True)
class CalibrationFolder:
    """A calibration set's folder while the set is written.

    Args:
        manifest: The manifest, in the folder.
        extra: Names of the further files of a set, besides its samples.
    """

    manifest: Path
    extra: Sequence[str]

    @property
    def folder(self) -> Path:
        """The folder."""
        return self.manifest.parent

    def require_free(self, *, overwrite: bool) -> None:
        """Raise ToolError where writing a set would replace, or mix with, files that prepare_calibration did not write."""
        folder = self.folder
        if folder.exists() and not folder.is_dir():
            raise ToolError("the output is no folder", where=folder, remedy="choose another folder with -o")
        if folder.is_dir() and any(folder.iterdir()) and not self.manifest.exists() and not overwrite:
            remedy = "use --overwrite to write among them, or choose another folder"
            raise ToolError("the folder holds other files", where=folder, remedy=remedy)
        ours = self._recorded()
        for path in (folder / name for name in self.extra):
            if path.exists() and not overwrite and record(path).sha256 != ours.get(path.name):
                raise ToolError("this file would be replaced", where=path, remedy="use --overwrite, or choose another folder")

    def clear_interrupted(self) -> dict[str, str]:
        """Remove the files of killed runs; the mark that a run begins with shows that it was killed.

        Returns:
            Name -> sha256 of the set that a killed run was about to replace. Those of its files that are no part of the next set
            must be removed with it.
        """
        former: dict[str, str] = {}
        for mark in abandoned_marks(self.manifest):
            text = mark.read_text(encoding="utf-8")
            note = json.loads(text) if text else {"before": {}, "former": {}}
            self._clear(note)
            former |= note["former"]
            mark.unlink(missing_ok=True)
        for draft in self.folder.glob(".*.partial*"):
            if is_abandoned(draft):
                draft.unlink(missing_ok=True)
        return former

    @contextlib.contextmanager
    def written(self, former: dict[str, str]) -> Iterator[None]:
        """Make the folder where there is none; if the work fails, remove every file written, and the folder if it is new.

        Args:
            former: The result of `clear_interrupted`.
        """
        with new_folder(self.folder), kept_aside(self.folder / name for name in self.extra):
            former = former | self._recorded()
            note = json.dumps({"before": {file.name: identity(file) for file in self.folder.iterdir()}, "former": former})
            with begun(self.manifest, note):
                try:
                    yield
                finally:
                    self._clear(json.loads(note))

    def _recorded(self) -> dict[str, str]:
        """Return name -> sha256 of the set's files as its provenance records them; empty where there is no provenance."""
        old = read_provenance(self.manifest)
        return {Path(item.path).name: item.sha256 for item in old.companions} if old else {}

    def _clear(self, note: dict[str, Any]) -> None:
        """Remove files with names of a set that no present manifest lists, and that are new or belong to a former set.

        Args:
            note: `before`, name -> identity of all files there when the run began; `former`, name -> sha256 of the former set.
        """
        has_manifest = self.manifest.is_file()
        ours = self._recorded() if has_manifest else {}
        if not has_manifest and read_provenance(self.manifest) is not None:  # killed between the provenance and the manifest
            provenance_path(self.manifest).unlink()
        listed = _listed(self.manifest)
        for file in self.folder.iterdir():
            is_named_so = file.name in self.extra or SAMPLE.fullmatch(file.name)
            if not is_named_so or not file.is_file() or file.name in listed:
                continue
            sha256, is_new = record(file).sha256, list(identity(file) or ()) != note["before"].get(file.name)
            if sha256 != ours.get(file.name) and (is_new or sha256 == note["former"].get(file.name)):
                file.unlink()


def _listed(manifest: Path) -> set[str]:
    """Return the samples that a manifest of prepare_calibration names."""
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        return {entry["file"] for part in ("samples", "holdout") for entry in content[part]}
    except (OSError, ValueError, LookupError, TypeError):
        return set()
