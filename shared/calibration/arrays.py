"""Samples in an .npz: one array per model input, named after the input, first axis the samples. Read as they are needed."""

import contextlib
import io
import struct
import tokenize
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from shared.command.errors import ToolError, first_line
from shared.command.watchdog import reading
from shared.files.file_type import read_head
from shared.files.zip_layout import ZIP_DAMAGE
from shared.formats.tensors import TensorSpec, describe

Sample = dict[str, NDArray[Any]]
IMAGES_KEY = "images"  # the name of the only array in an .npz that need not be the input's
MAX_HEADER_BYTES = 10_000  # of an array; numpy writes about 100
AGAIN = "make the calibration set again"
_Array = tuple[IO[bytes], tuple[int, ...], np.dtype[Any]]


class UnfitError(ToolError):
    """A set lacks an input of a model, or its samples have another shape."""


def _npz_arrays(archive: zipfile.ZipFile, path: Path, streams: contextlib.ExitStack) -> dict[str, _Array]:
    """Return stream, shape and dtype of each array of an .npz, positioned at its first value."""
    found = {}
    for name in archive.namelist():
        stream = streams.enter_context(archive.open(name))
        shape, is_fortran, dtype = _npy_header(stream)
        if dtype.hasobject:
            what = "the calibration set holds Python objects, which are never loaded"
            raise ToolError(what, where=path, got=name, remedy=AGAIN)
        if is_fortran or not shape:
            remedy = "save numpy.ascontiguousarray of samples along the first axis"
            raise ToolError(
                "an array of the calibration set is no list of samples", where=path, got=f"{name} {shape}", remedy=remedy
            )
        found[name.removesuffix(".npy")] = stream, shape, dtype
    return found


def _npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, order and dtype of a .npy stream; its header is read only if it is as short as real ones are."""
    version = np.lib.format.read_magic(stream)
    form = "<H" if version == (1, 0) else "<I"
    length = stream.read(struct.calcsize(form))
    if len(length) < struct.calcsize(form) or struct.unpack(form, length)[0] > MAX_HEADER_BYTES:
        raise ValueError("no header of an array")
    header = io.BytesIO(length + stream.read(struct.unpack(form, length)[0]))
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about headers as Python 2 wrote them
            shape, is_fortran, dtype = read(header)
    except (SyntaxError, tokenize.TokenError, MemoryError, TypeError) as error:
        raise ValueError(f"no header of an array: {error}") from None
    return shape, is_fortran, dtype


def npz_length(path: Path) -> int:
    """Return how many samples an .npz holds; raise ToolError where it is damaged or its arrays differ in length."""
    try:
        read_head(path, "calibration set")
        with reading(path), zipfile.ZipFile(path) as archive, contextlib.ExitStack() as streams:
            lengths = {shape[0] for _, shape, _ in _npz_arrays(archive, path, streams).values()}
    except ZIP_DAMAGE as error:
        raise ToolError("damaged .npz", where=path, got=first_line(error), remedy=AGAIN) from None
    if not lengths:
        raise ToolError("the calibration set is empty", where=path, remedy=AGAIN)
    if len(lengths) != 1:
        raise ToolError("the arrays of the calibration set differ in length", where=path, got=sorted(lengths), remedy=AGAIN)
    return int(lengths.pop())


def single_specs(path: Path, inputs: list[TensorSpec]) -> list[TensorSpec] | None:
    """Return the specs of one sample, where a model takes several at once and the set holds them one by one; else None."""
    batches = {spec.shape[0] if spec.shape else 1 for spec in inputs}
    if len(batches) != 1 or max(batches) <= 1:
        return None
    singles = [replace(spec, shape=(1, *spec.shape[1:])) for spec in inputs]
    with contextlib.suppress(*ZIP_DAMAGE, ToolError), zipfile.ZipFile(path) as archive, contextlib.ExitStack() as streams:
        arrays = _npz_arrays(archive, path, streams)
        known = arrays.get(inputs[0].name, arrays.get(inputs[0].own_name, arrays.get(IMAGES_KEY)))
        if known is not None and len(known[1]) <= len(inputs[0].shape):
            return singles
    return None


def read_npz(path: Path, inputs: list[TensorSpec]) -> Iterator[Sample]:
    """Yield the samples of an .npz; reads as it goes, so that a set may be larger than memory."""
    try:
        with zipfile.ZipFile(path) as archive, contextlib.ExitStack() as streams:
            arrays = _npz_arrays(archive, path, streams)
            source = {spec.name: spec.name if spec.name in arrays else spec.own_name for spec in inputs}
            if len(inputs) == 1 and len(arrays) == 1 and inputs[0].name not in arrays and IMAGES_KEY in arrays:
                source = {inputs[0].name: IMAGES_KEY}
            missing = [spec.name for spec in inputs if source[spec.name] not in arrays]
            if missing:
                what, got = "the calibration set lacks inputs of the model", sorted(arrays)
                raise UnfitError(what, where=path, got=got, expected=describe(inputs), remedy="name arrays as the inputs")
            for spec in inputs:
                _require_fits(path, spec, *arrays[source[spec.name]][1:])
            for _ in range(arrays[source[inputs[0].name]][1][0]):
                yield {spec.name: _next_sample(path, spec, *arrays[source[spec.name]]) for spec in inputs}
    except ZIP_DAMAGE as error:
        raise ToolError("damaged .npz", where=path, got=first_line(error), remedy=AGAIN) from None


def _require_fits(path: Path, spec: TensorSpec, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Raise ToolError unless an array's samples have an input's shape, with or without its batch axis of one."""
    extra, wanted = max(len(shape) - 1 - len(spec.shape), 0), spec.shape
    fits = all(size == 1 for size in shape[1 : 1 + extra])
    fits = fits and all(free in (size, -1) for size, free in zip(_padded(shape[1:], len(wanted)), wanted, strict=True))
    if not fits or dtype.kind not in "fiu":
        expected = f"({shape[0]}, {', '.join(map(str, wanted))}) {spec.dtype}"
        what, got = f"the calibration set does not fit input '{spec.name}'", f"{shape} {dtype}"
        raise UnfitError(what, where=path, got=got, expected=expected, remedy=AGAIN)


def _next_sample(path: Path, spec: TensorSpec, stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    size = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
    data = stream.read(size)
    if len(data) < size:
        raise EOFError("an array ends early")
    values = np.frombuffer(data, dtype)
    with np.errstate(invalid="ignore", over="ignore"):  # values that do not fit are reported below
        sample = values.astype(spec.dtype)
        is_same = sample.dtype.kind == "f" or bool(np.array_equal(sample, values))
    if not is_same:
        raise ToolError(f"a calibration sample does not fit the {spec.dtype} of input '{spec.name}'", where=path, remedy=AGAIN)
    return sample.reshape(_settled(spec.shape, shape[1:]))


def _settled(free: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return an input's shape with its free axes as long as a sample's; the sample may lack leading axes of one."""
    padded = _padded(shape, len(free))
    return tuple(size if wanted == -1 else wanted for wanted, size in zip(free, padded, strict=True))


def _padded(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Return a shape with ones before it, or its leading axes off, so that it has so many axes."""
    return (1,) * (rank - len(shape)) + tuple(shape)[max(len(shape) - rank, 0) :]
