"""Calibration sets: real inputs for one model, from images or arrays, one sample in memory at a time.

A set is a folder of images, a manifest naming images, or an .npz with one array per model input, first axis the samples. Images
become what the model takes only when the range of its input is known: from the model's own metadata, or from the user.
"""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from shared.calibration.arrays import AGAIN, Sample, UnfitError, npz_length, read_npz, single_specs
from shared.command.errors import ToolError
from shared.command.options import InputRange
from shared.files.file_type import is_regular, read_head
from shared.formats.tensors import TensorSpec, by_signature, describe, image_input
from shared.media.images import ImageForm, Pixels, image_files, read_pixels, to_form, to_values
from shared.metrics.output_error import USUAL_RANGES
from shared.runtime.samples import complete_inputs, message_seed

RANGES: dict[InputRange, tuple[float, float]] = dict(zip(("0..1", "-1..1", "0..255"), USUAL_RANGES, strict=True))
TOLERANCE = 0.05  # of the range's width: interpolation overshoots, and normalisation constants are rounded
LEAST_SPAN = 0.1  # of the range's width: below it, all samples together are likelier of another scale
TILE_SIZE, TILE_STEP = 256, 16  # pixels of a tile; networks halve sides a few times
MANIFEST_NAME = "manifest.json"
Part = Literal["samples", "holdout"]
PARTS: dict[Part, tuple[str, ...]] = {"samples": ("samples", "tiles"), "holdout": ("holdout",)}  # names in a manifest


@dataclass(frozen=True)
class CalibrationSet:
    """Where samples come from, and how they become a model's inputs; small enough to be sent to other processes.

    Args:
        path: A folder of images, a manifest (.json), or an .npz.
        input_range: Range of the model's image input where it is known.
        most: Samples to take, spread evenly over the set; all when None.
        part: Which part of a manifest: what to calibrate with, or what was held out to measure on.
        tile: Pixels of a side of images for a model that takes any size, at most.
    """

    path: Path
    input_range: InputRange | None = None
    most: int | None = None
    part: Part = "samples"
    tile: int = TILE_SIZE

    def files(self) -> list[Path]:
        """Return the files that the set is made of.

        Raises:
            ToolError: There is no such set.
        """
        if self.path.suffix == ".npz":
            if not self.path.is_file():
                raise _no_set(self.path)
            return [self.path]
        manifests = [path for path in (self.path, self.path / MANIFEST_NAME) if path.is_file()]
        return [*manifests, *_listed_images(self.path, self.part)]

    def as_message(self) -> dict[str, Any]:
        """Return the set as JSON can hold it, for another process."""
        return {**vars(self), "path": str(self.path)}

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> "CalibrationSet":
        """Return the set that `as_message` made a message of."""
        return cls(**{**message, "path": Path(message["path"])})

    def all_files(self) -> list[Path]:
        """Return the files of every part of the set: what a manifest holds out, too."""
        parts: tuple[Part, ...] = ("samples", "holdout") if self.has_holdout() else (self.part,)
        return list(dict.fromkeys(file for part in parts for file in replace(self, part=part).files()))

    def images(self) -> list[Path]:
        """Return the image files of a folder or manifest, in order."""
        return _listed_images(self.path, self.part)

    def has_holdout(self) -> bool:
        """Return whether a manifest names samples that were held out of calibration."""
        manifest = self.path / MANIFEST_NAME if self.path.is_dir() else self.path
        with contextlib.suppress(ValueError, OSError, RecursionError):
            content = json.loads(manifest.read_text(encoding="utf-8")) if manifest.suffix == ".json" else {}
            return isinstance(content, dict) and bool(content.get("holdout"))
        return False

    def sha256(self) -> str:
        """Return a hash of everything that decides the samples."""
        whole = hashlib.sha256(f"{self.input_range} {self.most} {self.part} {self.tile}".encode())
        for path in self.files():
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        return whole.hexdigest()

    def samples(self, inputs: list[TensorSpec]) -> Iterator[Sample]:
        """Yield the samples one by one, each input in its spec's shape and dtype, values as the model takes them.

        Of a model with several signatures a set may fit some only: then a sample has the inputs of these.

        Raises:
            ToolError: The set does not fit the model, is damaged, or holds NaN.
        """
        groups = by_signature(inputs)
        if self.path.suffix == ".npz":
            npz_length(self.path)  # damage is no misfit
        fitting = groups if len(groups) == 1 else [group for group in groups if self._fits(group)]
        if not fitting:
            what, remedy = "the calibration set fits no signature of the model", "name arrays SIGNATURE/INPUT"
            raise ToolError(what, where=self.path, expected=describe(inputs), remedy=remedy)
        for parts in zip(*map(self._of_one, fitting), strict=False):  # batches of several sizes: as many as the fewest
            yield {name: values for part in parts for name, values in part.items()}

    def _fits(self, inputs: list[TensorSpec]) -> bool:
        """Return whether the set has a sample for the inputs of one signature."""
        if self.path.suffix != ".npz":
            return image_input(inputs) is not None
        try:
            return next(self._of_one(inputs), None) is not None
        except UnfitError:
            return False

    def _of_one(self, inputs: list[TensorSpec]) -> Iterator[Sample]:
        """Yield the samples for the inputs of one signature."""
        if self.path.suffix == ".npz":
            singles = single_specs(self.path, inputs)
            single = _spread(read_npz(self.path, singles or inputs), npz_length(self.path), self.most)
            yield from single if singles is None else _batches(single, inputs[0].shape[0])
            return
        files, found = _listed_images(self.path, self.part), image_input(inputs)
        images = (_from_image(file, inputs, self.input_range, self.tile) for file in _spread(iter(files), len(files), self.most))
        yield from _batches(images, 1 if found is None else found[1].batch)

    def check(self, inputs: list[TensorSpec], declared: tuple[float, float] | None) -> int:
        """Read every sample once, and raise ToolError unless they fit the model; return how many there are.

        Args:
            inputs: The model's inputs.
            declared: Range that the model's metadata gives for its image input.
        """
        known = RANGES[self.input_range] if self.input_range else declared
        count, low, high = 0, np.inf, -np.inf
        images = {found[0] for group in by_signature(inputs) if (found := image_input(group)) is not None}
        for sample in self.samples(inputs):
            count += 1
            for name, values in sample.items():
                if not np.isfinite(values).all():
                    got = f"sample {count}, {name}"
                    raise ToolError("a calibration sample holds NaN or infinity", where=self.path, got=got, remedy=AGAIN)
                if name in images:
                    low, high = min(low, float(values.min())), max(high, float(values.max()))
        if count == 0:
            raise ToolError("the calibration set is empty", where=self.path, remedy=AGAIN)
        if known is not None and low <= high:
            _require_range(self.path, (low, high), known)
        return count


def holdout_of(path: Path) -> CalibrationSet:
    """Return what a set is good for to measure on: what its manifest holds out, or everything where it holds out nothing."""
    given = CalibrationSet(path)
    return replace(given, part="holdout") if given.has_holdout() else given


def choose_range(name: str | None, declared: tuple[float, float] | None, where: Path) -> InputRange | None:
    """Return the range of a model's image input: as the user says, else as its metadata does; None where neither does.

    Raises:
        ToolError: The two differ.
    """
    near = name_of_range(declared)
    if name is not None and near is not None and name != near:
        what, remedy = "--input-range differs from the model's own metadata", "leave it out"
        raise ToolError(what, where=where, got=name, expected=near, remedy=remedy)
    return name or near  # type: ignore[return-value]


def name_of_range(limits: tuple[float, float] | None) -> InputRange | None:
    """Return the name of a range, or of one that is nearly the same; None for any other."""
    near = (name for name, known in RANGES.items() if limits and np.allclose(known, limits, atol=0.02 * np.ptp(known)))
    return next(near, None)


def _no_set(path: Path) -> ToolError:
    expected = "a folder of images, a manifest or an .npz"
    return ToolError("no such calibration set", where=path, expected=expected, remedy="prepare_calibration makes one")


def _require_range(path: Path, found: tuple[float, float], known: tuple[float, float]) -> None:
    width = known[1] - known[0]
    outside = found[0] < known[0] - TOLERANCE * width or found[1] > known[1] + TOLERANCE * width
    if outside or found[1] - found[0] < LEAST_SPAN * width:
        raise ToolError(
            "the calibration samples are of another range than the model's input",
            where=path,
            got=f"values from {found[0]:.4g} to {found[1]:.4g}",
            expected=f"{known[0]:g} to {known[1]:g}",
            remedy="scale them as the model takes them, or correct --input-range",
        )


def _spread(items: Iterator[Any], length: int, most: int | None) -> Iterator[Any]:
    """Yield `most` of the items, evenly spread; all where there are no more."""
    if most is None or length <= most:
        yield from items
        return
    wanted = {number * length // most for number in range(most)}
    yield from (item for number, item in enumerate(items) if number in wanted)


def _listed_images(path: Path, part: Part = "samples") -> list[Path]:
    """Return the images in a folder, or those that a manifest names, relative to itself."""
    if path.is_dir():
        manifest = path / MANIFEST_NAME
        return _listed_images(manifest, part) if manifest.is_file() else image_files(path)
    if not path.is_file():
        raise _no_set(path)
    read_head(path, "manifest", limit="text-mb")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = next(content[key] for key in PARTS[part] if key in content)
        names = [entry["file"] for entry in entries]
        assert all(isinstance(name, str) for name in names)
    except (ValueError, KeyError, TypeError, StopIteration, AssertionError, RecursionError):
        expected = 'JSON such as {"samples": [{"file": "tile_0.png"}]}'
        raise ToolError("no calibration manifest", where=path, expected=expected, remedy=AGAIN) from None
    strange = [name for name in names if not name.isprintable() or name.startswith("/") or ".." in PurePosixPath(name).parts]
    if strange or not names:
        raise ToolError("the manifest names no files beside it", where=path, got=strange[:1] or "none", remedy=AGAIN)
    files = [path.parent / name for name in names]
    if missing := [file for file in files if not is_regular(file)]:
        got = f"{len(missing)}, the first {missing[0]}"
        raise ToolError("the manifest names files that are not there", where=path, got=got, remedy=AGAIN)
    return files


def _from_image(file: Path, inputs: list[TensorSpec], input_range: InputRange | None, tile: int) -> Sample:
    found = image_input(inputs)
    if found is None:
        remedy = "give an .npz with one array per input"
        raise ToolError("images don't fit this model's inputs", where=file.parent, got=describe(inputs), remedy=remedy)
    name, form = found
    (dtype,) = (spec.dtype for spec in inputs if spec.name == name)
    if dtype == "uint8":
        input_range = "0..255"
    if input_range is None:
        remedy = "say --input-range 0..1, -1..1 or 0..255"
        raise ToolError("the model does not tell the range of its input", where=file.parent, remedy=remedy)
    pixels = _tile(read_pixels(file), form, tile)
    image = {name: to_values(to_form(pixels, form), dtype, RANGES[input_range])}
    return complete_inputs(image, inputs, message_seed(inputs, pixels))


def _tile(pixels: Pixels, form: ImageForm, size: int) -> Pixels:
    """Return the middle of an image along axes of free length: `size` pixels, or as many as it has, a multiple of TILE_STEP."""
    sides = [slice(None), slice(None)]
    for axis, fixed in enumerate((form.height, form.width)):
        length = pixels.shape[axis]
        if fixed is None and length >= TILE_STEP:
            side = min(size, length // TILE_STEP * TILE_STEP)
            sides[axis] = slice((length - side) // 2, (length - side) // 2 + side)
    return np.ascontiguousarray(pixels[tuple(sides)])


def _batches(samples: Iterator[Sample], size: int) -> Iterator[Sample]:
    """Yield samples joined to batches; the last one is filled up with its last sample."""
    if size == 1:
        yield from samples
        return
    while batch := list(itertools.islice(samples, size)):
        filled = [*batch, *[batch[-1]] * (size - len(batch))]
        yield {name: np.concatenate([sample[name] for sample in filled]) for name in filled[0]}
