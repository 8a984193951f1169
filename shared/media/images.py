"""Image files -> pixels -> arrays as models take them."""

import functools
import io
import os
import struct
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shared.command.cli import warn
from shared.command.errors import ToolError, first_line
from shared.command.limits import limit
from shared.command.watchdog import reading
from shared.files.file_type import name_kind, read_head

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
MACOS_FOLDER = "__MACOSX"  # holds attributes of files, under their names, in archives from a Mac
BACKGROUND, WHITE = "EDGEPRESS_BACKGROUND", "white"
AGAIN = "open it in an image editor and save it again, or leave it out"
END_OF_JPEG = b"\xff\xd9"
CHANNELS = 3
MOST_BATCH = 64  # images in one tensor
LEAST_SIDE = 8  # pixels; a tensor of one channel with shorter axes is no image
# Errors that Pillow raises on damaged files; its UnidentifiedImageError is an OSError.
DAMAGE = (OSError, SyntaxError, ValueError, TypeError, struct.error, EOFError, LookupError, OverflowError, ArithmeticError)
Image = NDArray[np.float32]  # (1, 3, H, W), RGB in [0, 1]
Pixels = NDArray[np.uint8]  # (H, W, 3), RGB


def image_files(folder: Path) -> list[Path]:
    """Return the image files in a folder and below, sorted.

    Raises:
        ToolError: No such folder, or no image in it.
    """
    if not folder.is_dir():
        raise ToolError("no such image folder", where=folder, remedy="check the path")
    files = sorted(visible_files(folder, SUFFIXES))
    if not files:
        expected = "files ending in " + ", ".join(SUFFIXES)
        raise ToolError("no images in this folder", where=folder, expected=expected, remedy="name another folder")
    return files


def visible_files(folder: Path, suffixes: Collection[str]) -> Iterator[Path]:
    """Yield the files with given suffixes in a folder and below; hidden ones and what macOS adds to copies are left out."""
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        is_hidden = any(part.startswith(".") or part == MACOS_FOLDER for part in parts)
        if not is_hidden and path.suffix.lower() in suffixes and path.is_file():
            yield path


def read_pixels(path: Path) -> Pixels:
    """Return an image file as uint8 (H, W, 3) RGB at its own size, turned upright by its EXIF, transparent parts on a background.

    The background is white, or the colour that `set_background` has set.

    Raises:
        ToolError: The file is no image of an accepted format, or cut off.
    """
    from PIL import Image as pillow
    from PIL import ImageOps, UnidentifiedImageError

    kind = name_kind(read_head(path, "image", limit="image-mb", again=AGAIN))
    most = int(limit("megapixels") * 1e6)
    pillow.MAX_IMAGE_PIXELS = most // 2  # it refuses twice as many
    try:
        with reading(path), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about EXIF and the like; damage is raised
            with pillow.open(path, formats=FORMATS) as file:
                _require_whole(path, file.format or "")
                if file.format == "PNG":
                    file.verify()  # checks all chunks; decoding checks some only
            with pillow.open(path, formats=FORMATS) as file:
                upright = ImageOps.exif_transpose(file)
                if upright.mode.startswith("I;16"):  # Pillow would cut off at 255
                    upright = pillow.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
                return _opaque(upright)
    except pillow.DecompressionBombError as error:
        remedy = "make it smaller, or raise the limit with --limit megapixels=VALUE"
        raise ToolError("the image has too many pixels", where=path, got=first_line(error), remedy=remedy) from None
    except UnidentifiedImageError:
        raise ToolError("unreadable image", where=path, got=kind, expected=", ".join(FORMATS), remedy=AGAIN) from None
    except DAMAGE as error:
        raise ToolError("unreadable image", where=path, got=first_line(error), remedy=AGAIN) from None


def set_background(colour: str) -> None:
    """Lay images with transparent parts on a colour from now on, in this process and in those it starts.

    Args:
        colour: A name such as black, or a code such as #808080.

    Raises:
        ToolError: No such colour.
    """
    from PIL import ImageColor

    try:
        ImageColor.getrgb(colour)
    except ValueError:
        expected = "a name such as black, or a code such as #808080"
        raise ToolError("--background is no colour", got=colour, expected=expected) from None
    os.environ[BACKGROUND] = colour


def _opaque(image: Any) -> Pixels:
    """Return a Pillow image as uint8 (H, W, 3) RGB; transparent parts are laid on the background, which is said once a process."""
    from PIL import Image as pillow
    from PIL import ImageColor

    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB"))
    cut_out = image.convert("RGBA")
    if cut_out.getextrema()[3][0] < 255:
        _say_background(os.environ.get(BACKGROUND, WHITE))
        ground = pillow.new("RGBA", cut_out.size, ImageColor.getrgb(os.environ.get(BACKGROUND, WHITE)))
        cut_out = pillow.alpha_composite(ground, cut_out)
    return np.asarray(cut_out.convert("RGB"))


@functools.cache
def _say_background(colour: str) -> None:
    warn(f"images with transparent parts are laid on {colour}")


def _require_whole(path: Path, kind: str) -> None:
    """Raise ValueError for a JPEG without its end marker: it was cut off, maybe after its last row."""
    if kind in ("JPEG", "MPO") and END_OF_JPEG not in path.read_bytes():
        raise ValueError("cut off: a JPEG without its end marker")


def stretch(pixels: Pixels, height: int, width: int | None = None) -> Pixels:
    """Return the whole image stretched to uint8 (height, width, 3), bilinear with antialiasing; itself where the size is the same.

    Nothing is cut off and proportions are not kept, as in the published detectors and embedders.
    Without a width the result is square.
    """
    from PIL import Image as pillow

    width = width or height
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(pillow.fromarray(pixels).resize((width, height), pillow.Resampling.BILINEAR))


def to_image(pixels: Pixels) -> Image:
    """Return uint8 (H, W, 3) as float32 (1, 3, H, W) in [0, 1]."""
    image: Image = (pixels.astype(np.float32) / np.float32(255)).transpose(2, 0, 1)[np.newaxis]  # (H, W, 3) -> (1, 3, H, W)
    return image


def to_png(pixels: Pixels) -> bytes:
    """Return the content of a PNG file of an image, uint8 (H, W, 3) RGB."""
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def as_image(source: object) -> Image:
    """Return a caller's image as float32 (1, 3, H, W), RGB in [0, 1].

    Args:
        source: (H, W, 3), uint8 or floating point in [0, 1]; or floating point (3, H, W); or the path of an image file.

    Raises:
        ToolError: Wrong shape or dtype, values outside the range, or NaN; the file is no image.
    """
    if isinstance(source, Path | str):
        return to_image(read_pixels(Path(source)))
    if not isinstance(source, np.ndarray):
        raise ToolError("no RGB image", got=type(source).__name__, expected="a file or a numpy array")
    array, expected = source, "uint8 (H, W, 3), or floating point in [0, 1] of shape (H, W, 3) or (3, H, W)"
    got, is_float = f"{array.dtype} {array.shape}", array.dtype.kind == "f"
    if array.ndim == 3 and array.shape[2] == CHANNELS and array.size and (is_float or array.dtype == np.uint8):
        image = to_image(np.asarray(array, np.uint8)) if not is_float else array.transpose(2, 0, 1)[np.newaxis].astype(np.float32)
    elif array.ndim == 3 and array.shape[0] == CHANNELS and array.size and is_float:
        image = array[np.newaxis].astype(np.float32)
    else:
        raise ToolError("no RGB image", got=got, expected=expected)
    if not (image.min() >= 0 and image.max() <= 1):  # also False for NaN
        raise ToolError("pixels out of range", got=f"{got} from {image.min():g} to {image.max():g}", expected=expected)
    return image


def stretch_image(image: Image, size: int) -> Image:
    """Return float32 (1, 3, H, W) stretched to (1, 3, size, size) without rounding; itself if the size is the same."""
    from PIL import Image as pillow

    if image.shape[2:] == (size, size):
        return image
    planes = [pillow.fromarray(plane).resize((size, size), pillow.Resampling.BILINEAR) for plane in image[0]]
    return np.stack([np.asarray(plane, dtype=np.float32) for plane in planes])[np.newaxis]


def resize(image: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Return float32 (N, C, H, W) stretched to (N, C, height, width), bilinear with antialiasing, as torch does it to 1e-6."""
    rows, columns = _resize_matrix(image.shape[2], height), _resize_matrix(image.shape[3], width)
    across: NDArray[np.float32] = image if columns is None else image @ columns.T
    resized: NDArray[np.float32] = across if rows is None else rows @ across
    return resized


def _resize_matrix(size: int, made: int) -> NDArray[np.float32] | None:
    """Return float32 (made, size): weights of the pixels along an axis for each new one; None where the size stays."""
    if size == made:
        return None
    scale, reach = size / made, max(size / made, 1.0)
    centres = (np.arange(made) + 0.5) * scale
    firsts = np.maximum((centres - reach + 0.5).astype(int), 0)
    ends = np.minimum((centres + reach + 0.5).astype(int), size)
    places = np.arange(size)
    weights = np.maximum(1 - np.abs(places - centres[:, None] + 0.5) / reach, 0)
    weights *= (places >= firsts[:, None]) & (places < ends[:, None])
    matrix: NDArray[np.float32] = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return matrix


def image_layout(shape: tuple[int, ...]) -> tuple[str, int] | None:
    """Return layout ('nchw' or 'nhwc') and size of a square RGB image input, or None for a different shape; the batch may be -1."""
    match shape:
        case (1 | -1, 3, height, width) if height == width > 0:
            return "nchw", height
        case (1 | -1, height, width, 3) if height == width > 0:
            return "nhwc", height
    return None


@dataclass(frozen=True)
class ImageForm:
    """Layout, channels and size of an image tensor.

    Args:
        layout: 'nchw' is (batch, channels, height, width), 'nhwc' is (batch, height, width, channels).
        channels: 3 for RGB, 1 for luma.
        height: Pixels; None where any height fits.
        width: Pixels; None where any width fits.
        batch: Images in the tensor.
    """

    layout: Literal["nchw", "nhwc"]
    channels: int
    height: int | None
    width: int | None
    batch: int = 1


def image_form(shape: tuple[int, ...]) -> ImageForm | None:
    """Return the form of an image tensor from its shape, or None where it holds no image; an axis of -1 may have any length."""
    if len(shape) != 4 or not (shape[0] == -1 or 1 <= shape[0] <= MOST_BATCH):
        return None
    layouts: tuple[tuple[Literal["nchw", "nhwc"], int, int, int], ...] = (
        ("nchw", shape[1], shape[2], shape[3]),
        ("nhwc", shape[3], shape[1], shape[2]),
    )
    for layout, channels, height, width in layouts:
        least = 1 if channels == CHANNELS else LEAST_SIDE
        if channels in (1, CHANNELS) and all(size == -1 or size >= least for size in (height, width)):
            free = [None if size == -1 else size for size in (height, width)]
            return ImageForm(layout, channels, free[0], free[1], max(shape[0], 1))
    return None


def to_form(pixels: Pixels, form: ImageForm) -> NDArray[np.float32]:
    """Return pixels, uint8 (H, W, 3) RGB, as float32 in [0, 1] in the form of a model's image input; stretched to a fixed size.

    A model with one channel gets the luma, weighted as in ITU-R BT.601 over the full range.
    """
    from PIL import Image as pillow

    pixels = stretch(pixels, form.height or pixels.shape[0], form.width or pixels.shape[1])
    if form.channels == 1:
        luma = np.asarray(pillow.fromarray(pixels).convert("L"))
        image: Image = (luma.astype(np.float32) / np.float32(255))[np.newaxis, np.newaxis]  # (H, W) -> (1, 1, H, W)
    else:
        image = to_image(pixels)
    return to_layout(image, form.layout)


def to_values(image: NDArray[np.float32], dtype: str, pixel_range: tuple[float, float]) -> NDArray[Any]:
    """Return an image in [0, 1] as a model takes it: 0 to 1 become `pixel_range`, of uint8 0 to 255, of int8 -128 to 127."""
    if dtype in ("uint8", "int8"):
        return (np.rint(image * 255) - (0 if dtype == "uint8" else 128)).astype(dtype)
    low, high = pixel_range
    return (image if (low, high) == (0, 1) else image * np.float32(high - low) + np.float32(low)).astype(dtype)


def to_layout(image: Image, layout: str) -> Image:
    """Return float32 (1, C, H, W) in the requested layout: itself, or (1, H, W, C)."""
    return image if layout == "nchw" else np.ascontiguousarray(image.transpose(0, 2, 3, 1))
