"""Images become arrays of the documented layout and range, or an error."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.command.errors import ToolError
from shared.media.images import (
    ImageForm,
    _say_background,
    as_image,
    image_files,
    image_form,
    image_layout,
    read_pixels,
    set_background,
    stretch,
    stretch_image,
    to_form,
    to_image,
    to_layout,
    to_png,
    to_values,
)
from tests.conftest import REALDATA
from tools.compare.image_quality import from_form, images_at
from tools.prepare_calibration.sources import seeded_image


def test_an_image_is_rgb_in_0_to_1_channels_first(tmp_path: Path) -> None:
    Image.new("RGB", (40, 20), (255, 0, 51)).save(tmp_path / "a.png")
    pixels = read_pixels(tmp_path / "a.png")
    assert (pixels.shape, pixels.dtype) == ((20, 40, 3), np.uint8)
    image = to_image(pixels)
    assert (image.shape, image.dtype) == ((1, 3, 20, 40), np.float32)
    np.testing.assert_allclose(image[0, :, 8, 8], [1, 0, 0.2], atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (8, 8)).save(tmp_path / "a.png")
    assert read_pixels(tmp_path / "a.png").shape == (8, 8, 3)


def test_sixteen_bits_of_grey_become_eight(tmp_path: Path) -> None:
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(grey * 257).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_pixels(tmp_path / "a.png")[..., 1], grey)


def test_a_photograph_is_turned_upright_by_its_exif(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8))
    picture.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    picture.save(tmp_path / "a.png", exif=exif)
    assert read_pixels(tmp_path / "a.png")[7, 7, 0] == 255


@pytest.mark.parametrize("kind", ["text", "cut", "gif"])
def test_a_damaged_or_unknown_image_is_an_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path, "GIF" if kind == "gif" else "PNG")
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:2000])
    if kind == "text":
        path.write_text("not a picture")
    with pytest.raises(ToolError, match=r"a\.png: unreadable image"):
        read_pixels(path)


def test_any_damage_is_harmless_or_a_tool_error(tmp_path: Path) -> None:
    """Flip bytes of a photo with EXIF, where Pillow raises errors of many types."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x0132] = 6, "2026:11:21 00:00:00"
    for form in ("PNG", "JPEG", "WEBP", "BMP"):
        file = io.BytesIO()
        picture.save(file, form, **({} if form == "BMP" else {"exif": exif}))
        for seed in range(300):
            rng, content = np.random.default_rng(seed), bytearray(file.getvalue())
            for place in rng.integers(0, min(len(content), 400), 3):
                content[place] = rng.integers(256)
            (tmp_path / "a.bin").write_bytes(content[: int(rng.integers(20, len(content) + 1))])
            with contextlib.suppress(ToolError):
                assert read_pixels(tmp_path / "a.bin").ndim == 3


def test_a_folder_is_searched_sorted_and_must_hold_images(tmp_path: Path) -> None:
    for name in ("b.png", "sub/a.JPG", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in image_files(tmp_path)] == ["b.png", "a.JPG"]
    with pytest.raises(ToolError, match="no such image folder"):
        image_files(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ToolError, match="no images"):
        image_files(tmp_path / "empty")


def test_synthetic_pictures_repeat_and_fill_the_range() -> None:
    first, again, different = (seeded_image(32, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (first.shape, first.dtype) == ((1, 3, 32, 32), np.float32)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - different).max() > 0.1
    assert 0 <= first.min() < 0.1
    assert 0.9 < first.max() <= 1


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((1, 3, 8, 8), ("nchw", 8)), ((1, 8, 8, 3), ("nhwc", 8)), ((1, 3, 8, 9), None), ((2, 3, 8, 8), None), ((1, 146, 2), None)],
)
def test_layout_is_read_from_the_shape(shape: tuple[int, ...], layout: tuple[str, int] | None) -> None:
    assert image_layout(shape) == layout


def test_layouts_hold_the_same_pixels() -> None:
    image = seeded_image(8, np.random.default_rng(0))
    np.testing.assert_array_equal(to_layout(image, "nhwc")[0, 2, 5], image[0, :, 2, 5])
    assert to_layout(image, "nchw") is image


def test_the_whole_image_is_stretched_without_a_crop() -> None:
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :10] = 255  # the left quarter
    square = stretch(pixels, 16)
    assert square.shape == (16, 16, 3)
    assert (square[:, 1] == 255).all()
    assert (square[:, 8] == 0).all()
    assert stretch(square, 16) is square


def test_stretching_floats_is_stretching_pixels_without_rounding() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    np.testing.assert_allclose(stretch_image(to_image(pixels), 16), to_image(stretch(pixels, 16)), atol=1.5 / 255)
    image = seeded_image(16, np.random.default_rng(0))
    assert stretch_image(image, 16) is image


def test_stretching_is_torchs_antialiased_bilinear_resize() -> None:
    import torch
    from torch.nn import functional as F

    image = seeded_image(100, np.random.default_rng(0))
    expected = F.interpolate(torch.from_numpy(image), size=(32, 32), mode="bilinear", align_corners=False, antialias=True)
    np.testing.assert_allclose(stretch_image(image, 32), expected.numpy(), atol=1e-5)


def test_images_of_callers_become_arrays(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 10, 3), np.uint8)
    (tmp_path / "a.png").write_bytes(to_png(pixels))
    for path in (tmp_path / "a.png", str(tmp_path / "a.png")):
        np.testing.assert_array_equal(as_image(path), to_image(pixels))
    floats = pixels / 255
    for array in (pixels, floats, floats.astype(np.float16), floats.transpose(2, 0, 1)):
        image = as_image(array)
        assert (image.shape, image.dtype) == ((1, 3, 8, 10), np.float32)
        np.testing.assert_allclose(image, to_image(pixels), atol=1e-3)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((8, 8), np.uint8), "no RGB image"),
        (np.zeros((8, 8, 4), np.uint8), "no RGB image"),
        (np.zeros((3, 8, 8), np.uint8), "no RGB image"),
        (np.zeros((1, 3, 8, 8), np.float32), "no RGB image"),
        ([[0.0]], "no RGB image"),
        (np.zeros((8, 8, 3), np.int32), "no RGB image"),
        (np.zeros((0, 8, 3), np.float32), "no RGB image"),
        (np.full((8, 8, 3), 255.0), "out of range"),
        (np.full((8, 8, 3), -0.1), "out of range"),
        (np.full((8, 8, 3), np.nan), "out of range"),
    ],
)
def test_arrays_of_wrong_form_or_range_are_refused(array: object, reason: str) -> None:
    with pytest.raises(ToolError, match=reason):
        as_image(array)


@pytest.mark.parametrize(
    ("shape", "form"),
    [
        ((1, 3, 16, 24), ImageForm("nchw", 3, 16, 24)),
        ((1, 16, 24, 3), ImageForm("nhwc", 3, 16, 24)),
        ((-1, 1, 224, 224), ImageForm("nchw", 1, 224, 224)),
        ((1, 224, 224, 1), ImageForm("nhwc", 1, 224, 224)),
        ((1, 3, -1, -1), ImageForm("nchw", 3, None, None)),
        ((-1, -1, 32, 3), ImageForm("nhwc", 3, None, 32)),
        ((1, 3, 4, 4), ImageForm("nchw", 3, 4, 4)),
        ((2, 3, 16, 16), ImageForm("nchw", 3, 16, 16, 2)),
        ((65, 3, 16, 16), None),
        ((1, 4, 16, 16), None),
        ((1, -1, 16, 16), None),
        ((1, 1, 4, 4), None),  # attention over four tokens
        ((1, 1, 77), None),
        ((1, 0, 16, 3), None),
        ((), None),
    ],
)
def test_the_form_of_an_image_tensor_is_read_from_its_shape(shape: tuple[int, ...], form: ImageForm | None) -> None:
    assert image_form(shape) == form


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_come_back_from_the_form_of_a_model(layout: str, channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 14, 3), np.uint8)
    form = ImageForm(layout, channels, 10, 14)  # type: ignore[arg-type]
    held = to_form(pixels, form)
    assert held.shape == ((1, channels, 10, 14) if layout == "nchw" else (1, 10, 14, channels))
    assert (held.dtype, held.min() >= 0, held.max() <= 1) == (np.float32, True, True)
    expected = pixels if channels == 3 else np.asarray(Image.fromarray(pixels).convert("L"))[:, :, np.newaxis]
    np.testing.assert_array_equal(np.rint(from_form(held, form) * 255).astype(np.uint8), expected)


def test_luma_has_the_weights_of_bt_601() -> None:
    pixels = np.array([[(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]], np.uint8)
    luma = to_form(pixels, ImageForm("nchw", 1, 1, 4))
    np.testing.assert_allclose(luma.ravel(), [0.299, 0.587, 0.114, 1.0], atol=0.5 / 255)


def test_an_image_is_stretched_along_fixed_axes_only() -> None:
    pixels = np.zeros((10, 14, 3), np.uint8)
    assert to_form(pixels, ImageForm("nchw", 3, None, None)).shape == (1, 3, 10, 14)
    assert to_form(pixels, ImageForm("nchw", 3, 20, None)).shape == (1, 3, 20, 14)
    assert to_form(pixels, ImageForm("nhwc", 1, None, 7)).shape == (1, 10, 7, 1)


def test_an_image_is_stretched_to_a_given_width() -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, 4:] = 255
    wide = stretch(pixels, 8, 32)
    assert wide.shape == (8, 32, 3)
    assert (wide[:, :12].max(), wide[:, 20:].min()) == (0, 255)


@pytest.mark.realdata
def test_real_photographs_are_read() -> None:
    for path in image_files(REALDATA / "images"):
        assert read_pixels(path).std() > 2


def test_images_come_from_a_file_a_folder_or_a_pattern(tmp_path: Path) -> None:
    for name in ("b_lr.png", "a_lr.PNG", "a.png", "a_lr.txt", "sub/c_lr.jpg", "a[1].png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "d_lr.png").mkdir()

    def names(text: str) -> list[str]:
        return [path.relative_to(tmp_path).as_posix() for path in images_at(tmp_path / text)]

    assert names("a.png") == ["a.png"]
    assert names("*_lr.*") == ["a_lr.PNG", "b_lr.png"]
    assert names("?.png") == ["a.png"]
    assert names("sub") == ["sub/c_lr.jpg"]
    assert len(names(".")) == 5
    assert names("a[1].png") == ["a[1].png"], "the name of an existing file is no pattern"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("*.webp", "no images match"),
        ("absent/*.png", "no images match"),
        ("absent", "no such image folder"),
        ("empty", "no images"),
    ],
)
def test_a_path_without_images_is_an_error(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.png").touch()
    with pytest.raises(ToolError, match=reason):
        images_at(tmp_path / text)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_laid_on_the_background_and_that_is_said(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Colours that nobody sees are no part of the picture."""
    monkeypatch.setenv("EDGEPRESS_BACKGROUND", "white")
    pixels = np.random.default_rng(0).integers(0, 200, (8, 8, 4), np.uint8)
    pixels[..., 3] = 0
    pixels[:4, :, 3] = 255
    picture = Image.fromarray(pixels, "RGBA")
    if mode == "P":
        picture = picture.convert("P")
        picture.putpalette([10, 20, 30] * 256)
        picture = Image.fromarray(np.repeat(np.arange(2, dtype=np.uint8), 32).reshape(8, 8), "P")
        picture.putpalette([10, 20, 30, 200, 0, 200])
        picture.info["transparency"] = 1
    else:
        picture = picture.convert(mode)
    picture.save(tmp_path / "a.png")
    _say_background.cache_clear()
    shown = read_pixels(tmp_path / "a.png")
    assert (shown[4:] == 255).all()
    assert (shown[:4] < 255).any()
    read_pixels(tmp_path / "a.png")
    assert capsys.readouterr().err.count("transparent parts are laid on white") == 1
    set_background("#102030")
    assert (read_pixels(tmp_path / "a.png")[4:] == (16, 32, 48)).all()
    with pytest.raises(ToolError, match="--background is no colour"):
        set_background("whitish")


def test_hidden_files_and_what_macos_adds_are_no_images(tmp_path: Path) -> None:
    (tmp_path / "__MACOSX").mkdir()
    for name in ("b.png", "._b.png", "__MACOSX/._b.png", "__MACOSX/c.png", ".thumbs.png", "Thumbs.db"):
        Image.new("RGB", (8, 8)).save(tmp_path / name, "PNG")
    assert image_files(tmp_path) == [tmp_path / "b.png"] == images_at(tmp_path / "*.png")


@pytest.mark.parametrize(("dtype", "expected"), [("float32", [-1.0, 1.0]), ("float16", [-1.0, 1.0]), ("uint8", [0, 255])])
def test_an_image_becomes_values_of_the_type_that_a_model_takes(dtype: str, expected: list[float]) -> None:
    values = to_values(np.array([0, 1], np.float32), dtype, (-1.0, 1.0))
    assert (values.dtype.name, values.tolist()) == (dtype, expected)
