"""Write a calibration set: PNG files named by their content, arrays, and the pictures that show what is in it."""

import contextlib
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from shared.calibration.dataset import RANGES
from shared.command.options import InputRange
from shared.files.atomic import abandoned_marks, begun, draft_beside, identity, is_abandoned, kept_aside
from shared.files.provenance import provenance_path, read_provenance, record
from shared.media.images import ImageForm, Pixels, read_pixels, to_form
from tools.prepare_calibration.contact_sheet import write_contact_sheet

SAMPLE = re.compile(r"[sh]\d{4,}_[0-9a-f]{8}\.png")
UNDATED = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class ArrayForm:
    """How samples become arrays in an .npz.

    Args:
        name: Name of the array: that of the model's input.
        layout: Order of the axes.
        channels: 3 for RGB, 1 for luma.
        input_range: What pixels 0 to 255 become.
    """

    name: str
    layout: Literal["nchw", "nhwc"]
    channels: int
    input_range: InputRange


def write_sample(folder: Path, stem: str, pixels: Pixels) -> tuple[str, str]:
    """Write pixels, uint8 (H, W, 3) RGB, as PNG; return the file's name, which holds the start of its sha256, and that hash."""
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    digest = hashlib.sha256(content.getvalue()).hexdigest()
    file = folder / f"{stem}_{digest[:8]}.png"
    with draft_beside(file) as draft:
        draft.write_bytes(content.getvalue())
        draft.replace(file)
    return file.name, digest


def write_arrays(path: Path, files: Sequence[Path], form: ArrayForm) -> None:
    """Write images as one float32 array in an .npz, one sample in memory at a time; all have the first one's size."""
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
    """Write the contact sheet of samples; the number under each is that in its file's name."""
    with draft_beside(path) as draft:
        write_contact_sheet(draft, _numbered(files), len(files))
        draft.replace(path)


def _numbered(files: Sequence[Path]) -> Iterator[tuple[str, Pixels]]:
    for file in files:
        yield file.stem.rpartition("_")[0], read_pixels(file)


@dataclass(frozen=True)
class Set:
    """A calibration set's folder while it is written.

    Args:
        manifest: Its manifest, in the folder.
        extra: Names of files that are written beside the samples.
    """

    manifest: Path
    extra: Sequence[str]

    @property
    def folder(self) -> Path:
        """The folder."""
        return self.manifest.parent

    def clear_interrupted(self) -> dict[str, str]:
        """Remove what a run that was killed left behind; the mark that it began with tells that there was one.

        Returns:
            Name -> sha256 of the set that it was about to replace: what of it is no part of the next one must go with that.
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
        """Make the folder where there is none; if the work fails, what was written is gone again, and a folder that was made.

        Args:
            former: What `clear_interrupted` returned.
        """
        made = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        with kept_aside(self.folder / name for name in self.extra):
            yield from self._written(former, made=made)

    def _written(self, former: dict[str, str], *, made: bool) -> Iterator[None]:
        old = read_provenance(self.manifest)
        former = former | ({Path(item.path).name: item.sha256 for item in old.companions} if old else {})
        note = json.dumps({"before": {file.name: identity(file) for file in self.folder.iterdir()}, "former": former})
        try:
            with begun(self.manifest, note):
                try:
                    yield
                finally:
                    self._clear(json.loads(note))
        except BaseException:
            if made:
                with contextlib.suppress(OSError):
                    self.folder.rmdir()
            raise

    def _clear(self, note: dict[str, Any]) -> None:
        """Remove files named as ours that belong to no manifest that is there, and have come since, or are a former set's.

        Args:
            note: `before`, name -> identity of all files there when the run began; `former`, name -> sha256 of the set's own.
        """
        old = read_provenance(self.manifest) if self.manifest.is_file() else None
        ours = {Path(item.path).name: item.sha256 for item in old.companions} if old else {}
        if old is None and read_provenance(self.manifest) is not None:  # killed before the manifest came to its provenance
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
    """Return the samples that a manifest of ours names."""
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        return {entry["file"] for part in ("samples", "holdout") for entry in content[part]}
    except (OSError, ValueError, LookupError, TypeError):
        return set()
