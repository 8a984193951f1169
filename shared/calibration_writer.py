"""Write a calibration set: PNG files named by their content, arrays, and the pictures that show what is in it."""

import contextlib
import hashlib
import io
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from shared.calibration import RANGES, InputRange
from shared.drafts import abandoned_drafts, draft_beside
from shared.images import ImageForm, Pixels, read_pixels, to_form
from shared.provenance import read_provenance, record
from shared.sheets import write_contact_sheet

WRITTEN = (".png", ".npz")
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


def clear_interrupted(folder: Path, manifest: Path, extra: Sequence[str]) -> None:
    """Remove what a run that was killed left in a folder: files named as we do that are not as its manifest says.

    The draft of its manifest tells that there was one.

    Args:
        folder: The calibration set.
        manifest: Its manifest, which may be there from an earlier run.
        extra: Names of files that are written beside the samples.
    """
    drafts = abandoned_drafts(manifest)
    if not drafts:
        return
    old = read_provenance(manifest)
    ours = {Path(item.path).name: item.sha256 for item in old.companions} if old else {}
    for file in folder.iterdir():
        is_named_so = file.name in extra or SAMPLE.fullmatch(file.name)
        if is_named_so and file.is_file() and record(file).sha256 != ours.get(file.name):
            file.unlink()
    for draft in drafts:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Make a folder where there is none; if the work fails, what was written there is gone again, and a folder that was made."""
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.iterdir())
    try:
        yield
    except BaseException:
        for file in set(folder.iterdir()) - before:
            if file.suffix in WRITTEN:
                file.unlink(missing_ok=True)
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
