"""Arrays in an .npz are samples, or an error: never code, never a whole set in memory."""

import io
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from shared.calibration.dataset import CalibrationSet
from shared.command.errors import ToolError
from shared.formats.tensors import TensorSpec
from tests.shared.calibration.test_dataset import IMAGE, SHAPE, TWO, npz, values


def npz_with_header(folder: Path, header: str, version: int = 1, data: bytes = bytes(192)) -> Path:
    """Write an .npz of one array 'image' with the given header."""
    text = header.encode()
    length = struct.pack("<H" if version == 1 else "<L", len(text))
    with zipfile.ZipFile(folder / "set.npz", "w") as archive:
        archive.writestr("image.npy", b"\x93NUMPY" + bytes([version, 0]) + length + text + data)
    return folder / "set.npz"


@pytest.mark.parametrize("key", ["image", "images"])
@pytest.mark.parametrize("shape", [(6, 4, 4, 3), (6, 1, 4, 4, 3)])
def test_an_npz_gives_one_sample_for_each_row_with_or_without_batch_axis(tmp_path: Path, key: str, shape: tuple[int, ...]) -> None:
    array = values().reshape(shape)
    samples = list(CalibrationSet(npz(tmp_path, **{key: array})).samples(IMAGE))
    assert {(sample["image"].shape, sample["image"].dtype) for sample in samples} == {((1, 4, 4, 3), np.dtype(np.float32))}
    np.testing.assert_array_equal(np.concatenate([sample["image"] for sample in samples]), values())


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float16", "float64", ">f4", ">i2"])
def test_other_types_of_numbers_are_cast(tmp_path: Path, dtype: str) -> None:
    array = (values() * 255).astype(dtype)
    samples = list(CalibrationSet(npz(tmp_path, image=array)).samples(IMAGE))
    assert {sample["image"].dtype for sample in samples} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(np.concatenate([sample["image"] for sample in samples]), array.astype(np.float32))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_several_inputs_are_read_row_by_row_each_by_its_name(tmp_path: Path, save: object) -> None:
    assert callable(save)
    save(tmp_path / "set.npz", scale=np.arange(6.0), image=values(), unused=np.zeros((6, 2)))
    samples = list(CalibrationSet(tmp_path / "set.npz").samples(TWO))
    assert [sample["scale"].item() for sample in samples] == [0, 1, 2, 3, 4, 5]
    assert all(sample.keys() == {"image", "scale"} and sample["scale"].shape == (1, 1) for sample in samples)
    np.testing.assert_array_equal(np.concatenate([sample["image"] for sample in samples]), values())


@pytest.mark.parametrize(
    ("arrays", "inputs", "says"),
    [
        ({"image": np.full(SHAPE, np.nan, np.float32)}, IMAGE, "NaN or infinity; got sample 1, image"),
        (
            {"image": np.where(np.arange(6).reshape(6, 1, 1, 1) == 4, np.inf, values())},
            IMAGE,
            "NaN or infinity; got sample 5, image",
        ),
        ({"image": values((6, 4, 5, 3))}, IMAGE, r"does not fit input 'image'; got \(6, 4, 5, 3\) float32"),
        ({"image": values((6, 3, 4, 4))}, IMAGE, "does not fit input 'image'"),
        ({"image": values((4, 4, 3))}, IMAGE, "does not fit input 'image'"),
        ({"image": values((6, 48))}, IMAGE, "does not fit input 'image'"),
        ({"image": values((6, 2, 4, 4, 3))}, IMAGE, "does not fit input 'image'"),
        ({"image": np.zeros(SHAPE, np.complex64)}, IMAGE, "does not fit input 'image'; got .* complex64"),
        ({"image": np.zeros(SHAPE, "U3")}, IMAGE, "does not fit input 'image'"),
        ({"image": np.zeros(SHAPE, [("a", "f4")])}, IMAGE, "does not fit input 'image'"),
        ({"image": np.zeros(SHAPE, "M8[s]")}, IMAGE, "does not fit input 'image'"),
        ({"picture": values()}, IMAGE, r"lacks inputs of the model; got \['picture'\]; expected image float32"),
        ({"image": values()}, TWO, r"lacks inputs of the model.*expected .*scale"),
        ({"images": values()}, TWO, "lacks inputs of the model"),
        ({"images": values(), "labels": np.zeros((6, 1))}, IMAGE, "lacks inputs of the model"),
        ({"image": values((0, 4, 4, 3))}, IMAGE, "the calibration set is empty"),
        ({}, IMAGE, "set.npz"),
        ({"image": np.float32(1)}, IMAGE, "no list of samples"),
        ({"image": np.asfortranarray(values())}, IMAGE, "no list of samples"),
        ({"image": values(), "scale": np.zeros(5)}, TWO, r"differ in length; got \[5, 6\]"),
        ({"image": values(), "scale": np.zeros((6, 2))}, TWO, "does not fit input 'scale'"),
    ],
)
def test_a_set_that_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, arrays: dict[str, object], inputs: list[TensorSpec], says: str
) -> None:
    with pytest.raises(ToolError, match=says) as caught:
        CalibrationSet(npz(tmp_path, **arrays)).check(inputs, None)
    assert str(caught.value).isprintable()
    assert "set.npz" in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, 300.0, -1.0])
def test_values_that_an_integer_input_cannot_hold_are_refused(tmp_path: Path, value: float) -> None:
    with np.errstate(invalid="ignore"), pytest.raises(ToolError):
        CalibrationSet(npz(tmp_path, image=np.full(SHAPE, value))).check([TensorSpec("image", (1, 4, 4, 3), "uint8")], None)


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("names", [["image"], ["image", "extra"]])
def test_no_pickle_is_ever_loaded(tmp_path: Path, names: list[str]) -> None:
    touched = tmp_path / "touched"
    hostile = np.empty(6, object)
    hostile[:] = [Hostile(touched)] * 6
    path = npz(tmp_path, **{**dict.fromkeys(names, values()), names[-1]: hostile})
    with pytest.raises(ToolError, match=r"set\.npz: "):
        CalibrationSet(path).check(IMAGE, None)
    CalibrationSet(path).sha256()
    assert not touched.exists()
    np.load(path, allow_pickle=True)[names[-1]]  # what it would have done
    assert touched.exists()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, -30, -1])
def test_a_truncated_npz_is_refused(tmp_path: Path, save: object, keep: float) -> None:
    assert callable(save)
    save(tmp_path / "set.npz", image=values((50, 4, 4, 3)))
    content = (tmp_path / "set.npz").read_bytes()
    (tmp_path / "set.npz").write_bytes(content[: int(len(content) * keep) if keep == 0.5 else int(keep)])
    with pytest.raises(ToolError, match=r"set\.npz: (damaged \.npz|the calibration set file is empty)"):
        CalibrationSet(tmp_path / "set.npz").check(IMAGE, None)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_byte_is_noticed_although_only_a_part_is_taken(tmp_path: Path, save: object) -> None:
    assert callable(save)
    save(tmp_path / "set.npz", image=values((50, 4, 4, 3)))
    content = bytearray((tmp_path / "set.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "set.npz").write_bytes(content)
    with pytest.raises(ToolError, match=r"set\.npz: (damaged \.npz|the calibration set file is empty)"):
        CalibrationSet(tmp_path / "set.npz", None, 2).check(IMAGE, None)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_a_refused_npz_is_closed(tmp_path: Path) -> None:
    path = npz(tmp_path, picture=values())
    with pytest.raises(ToolError, match="lacks inputs") as caught:
        CalibrationSet(path).check(IMAGE, None)
    assert caught.tb is not None
    assert path not in [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]


@pytest.mark.parametrize(
    ("header", "version"),
    [
        ("", 1),
        ("{}", 1),
        ("[" * 150 + "]" * 150, 1),
        ("__import__('os').abort()", 1),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 4, 4, 3)}", 2),  # too few bytes are no fault of the header
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (9, 4, 4, 3)}", 1),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 4, 4, 3)}", 1),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000000000000000, 4, 4, 3)}", 1),
        ("{'descr': '<f3', 'fortran_order': False, 'shape': (1, 4, 4, 3)}", 1),
        ("{'descr': ('<f4', (2,)), 'fortran_order': False, 'shape': (1, 4, 4, 3)}", 1),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 4, -4, -3)}", 1),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 4, 4, 3)" + " " * 20_000 + "}", 1),
        ("{'descr': '<f4', ", 1),
        ("if 1:\n    a\n  b\n", 1),
        ("{'descr': 'f4,(', 'fortran_order': False, 'shape': (1, 4, 4, 3)}", 1),
    ],
)
def test_a_hostile_header_is_refused_in_one_line(tmp_path: Path, header: str, version: int) -> None:
    path = npz_with_header(tmp_path, header, version, bytes(191))
    with pytest.raises(ToolError, match=r"set\.npz: ") as caught:
        CalibrationSet(path).check(IMAGE, None)
    assert str(caught.value).isprintable()


def test_a_header_of_the_second_version_is_read(tmp_path: Path) -> None:
    path = npz_with_header(tmp_path, "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 4, 4, 3)}", 2)
    assert CalibrationSet(path).check(IMAGE, None) == 1


def test_an_npz_that_is_another_zip_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive:
        archive.writestr("image.npy", "no array")
    with pytest.raises(ToolError, match=r"damaged \.npz"):
        CalibrationSet(tmp_path / "set.npz").check(IMAGE, None)


def peak_bytes(path: Path, inputs: list[TensorSpec]) -> tuple[int, int]:
    """Return samples and the largest amount of memory while they are checked."""
    tracemalloc.start()
    try:
        return CalibrationSet(path).check(inputs, None), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_one_sample_at_a_time_is_in_memory(tmp_path: Path, save: object) -> None:
    assert callable(save)
    inputs = [TensorSpec("image", (1, 224, 224, 3), "float32")]
    array = np.zeros((340, 224, 224, 3), np.float32)
    save(tmp_path / "set.npz", image=array)
    assert array.nbytes > 200_000_000
    count, peak = peak_bytes(tmp_path / "set.npz", inputs)
    assert count == len(array)
    assert 224 * 224 * 3 * 4 < peak < 16_000_000


def test_a_header_of_a_hundred_megabytes_is_not_read(tmp_path: Path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image.npy", b"\x93NUMPY\2\0" + struct.pack("<L", 100_000_000) + b" " * 100_000_000)
    (tmp_path / "set.npz").write_bytes(file.getvalue())
    tracemalloc.start()
    try:
        with pytest.raises(ToolError, match=r"damaged \.npz"):
            CalibrationSet(tmp_path / "set.npz").check(IMAGE, None)
        assert tracemalloc.get_traced_memory()[1] < 16_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("free", "shape"), [((-1, -1, -1, 3), (8, 10, 3)), ((-1, -1, 8), (7, 8)), ((1, -1, 32, 3), (10, 32, 3)), ((-1, -1), (5,))]
)
@pytest.mark.parametrize("has_batch", [False, True])
def test_free_axes_in_front_take_the_lengths_of_arrays_too(
    tmp_path: Path, free: tuple[int, ...], shape: tuple[int, ...], has_batch: bool
) -> None:
    path = npz(tmp_path, x=values((6, 1, *shape) if has_batch else (6, *shape)))
    samples = [sample["x"] for sample in CalibrationSet(path).samples([TensorSpec("x", free, "float32")])]
    assert {sample.shape for sample in samples} == {(1, *shape)}
