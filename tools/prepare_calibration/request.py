"""The options that decide the samples, and the request that follows from them and from a model's image input."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from shared.calibration.dataset import TILE_SIZE, choose_range
from shared.command.errors import ToolError
from shared.command.options import InputRange, require_useful
from shared.formats.model_file import ModelFile
from shared.formats.tensors import describe, image_input
from shared.media.images import WHITE, ImageForm, Pixels, set_background, stretch
from shared.runtime.model import open_model
from shared.runtime.processes import ChildError
from tools.prepare_calibration.sampling import Box
from tools.prepare_calibration.sources import Picture, Source, read_pictures

MAX_SIDE = 16384  # pixels of --resize
NO_MODEL = ("images", ImageForm("nchw", 3, None, None))  # name and form of the array where no model is given


@dataclass(frozen=True)
class ArrayForm:
    """How samples become arrays in an .npz.

    Args:
        name: Name of the array: the name of the model's input.
        layout: Order of the axes.
        channels: 3 for RGB, 1 for luma.
        input_range: Range that pixels 0 to 255 are mapped to.
    """

    name: str
    layout: Literal["nchw", "nhwc"]
    channels: int
    input_range: InputRange


@dataclass(frozen=True)
class SampleRequest:
    """The samples to take; fields are named as prepare_calibration's options, and are the settings in the manifest.

    Args:
        tile_size: Side of the square tiles in pixels; None with `resize`.
        resize: Height and width that whole images are stretched to; None with `tile_size`.
        background: Colour that images with transparent parts are laid on.
        arrays: Form of the arrays; None where none are written.
    """

    tile_size: int | None
    resize: tuple[int, int] | None
    tiles_per_image: int
    max_samples: int
    min_samples: int
    holdout: int
    seed: int
    frames_per_video: int
    scene_changes: bool
    background: str
    arrays: ArrayForm | None

    def pictures(self, source: Source) -> Iterator[Picture]:
        """Yield the pictures of a source."""
        return read_pictures(source, frames=self.frames_per_video, at_scene_changes=self.scene_changes, size=self.side)

    @property
    def side(self) -> int:
        """The longer side of a sample in pixels."""
        sides = self.resize or (self.tile_size,)
        return max(side for side in sides if side is not None)

    def cut(self, pixels: Pixels, box: Box | None) -> Pixels:
        """Return a sample of a picture."""
        if box is not None:
            left, top, right, bottom = box
            return np.ascontiguousarray(pixels[top:bottom, left:right])
        return stretch(pixels, *self.resize) if self.resize else pixels


@dataclass(frozen=True)
class SampleOptions:
    """The command's options that decide the samples, as given; None leaves the choice to the model or to a default."""

    tiles_per_image: int
    max_samples: int
    min_samples: int
    holdout: int
    frames_per_video: int
    scene_changes: bool
    synthetic: int
    npz: bool
    seed: int
    background: str = WHITE
    sources: Sequence[Path] = ()
    model: Path | None = None
    tile_size: int | None = None
    resize: str | None = None
    input_name: str | None = None
    input_range: InputRange | None = None
    layout: Literal["nchw", "nhwc"] | None = None
    channels: Literal["3", "1"] | None = None

    def request(self) -> SampleRequest:
        """Return the samples to take.

        Raises:
            ToolError: Options contradict each other or have no effect, or the model does not take one image.
        """
        self._require_sense()
        set_background(self.background)
        model = None if self.model is None else ModelFile(self.model)
        name, form = NO_MODEL if model is None else _image_input(model)
        value_range = self.input_range if model is None else choose_range(self.input_range, model.input_range, model.path)
        arrays = ArrayForm(
            self.input_name or name, self.layout or form.layout, int(self.channels or form.channels), value_range or "0..1"
        )
        size = _parse_size(self.resize)
        if form.height and form.width and form.height != form.width and not (size or self.tile_size):
            size = form.height, form.width
        return SampleRequest(
            tile_size=None if size else self.tile_size or form.height or form.width or TILE_SIZE,
            resize=size,
            tiles_per_image=1 if size else self.tiles_per_image,
            max_samples=self.max_samples,
            min_samples=min(self.min_samples, self.max_samples),
            holdout=self.holdout,
            seed=self.seed,
            frames_per_video=self.frames_per_video,
            scene_changes=self.scene_changes,
            background=self.background,
            arrays=arrays if self.npz else None,
        )

    def _require_sense(self) -> None:
        """Raise ToolError for options that contradict each other or have no effect."""
        if self.resize is not None and self.tile_size is not None:
            raise ToolError("--resize takes whole images, --tile-size cuts them", remedy="give only --resize or only --tile-size")
        if not self.sources and not self.synthetic:
            remedy = "name images, folders, videos or a CSV, or use --synthetic"
            raise ToolError("there is nothing to take samples from", remedy=remedy)
        require_useful(
            ("--input-name", self.input_name is not None, "--npz", self.npz),
            ("--input-range", self.input_range is not None, "--npz", self.npz),
            ("--layout", self.layout is not None, "--npz", self.npz),
            ("--channels", self.channels is not None, "--npz", self.npz),
        )


def _image_input(model: ModelFile) -> tuple[str, ImageForm]:
    """Return name and form of a model's image input."""
    try:
        with open_model(model) as opened:
            found = image_input(opened.inputs)
            if found is None:
                got = describe(opened.inputs)
                raise ToolError("the model does not take one image", where=model.path, got=got, remedy="use --tile-size instead")
            return found
    except ChildError as error:
        remedy = "run verify on the model, or use --tile-size instead"
        raise ToolError("the model does not load", where=model.path, got=error, remedy=remedy) from None


def _parse_size(text: str | None) -> tuple[int, int] | None:
    """Return height and width of `--resize`: 256, or 320x240 for width x height."""
    if text is None:
        return None
    width, _, height = text.partition("x")
    if not (width.isdecimal() and (height or width).isdecimal()):
        expected = "pixels, such as 256 or 320x240 (width x height)"
        raise ToolError("--resize is no size", got=text, expected=expected, remedy="correct it")
    sides = int(height or width), int(width)
    if not all(1 <= side <= MAX_SIDE for side in sides):
        raise ToolError("--resize is out of range", got=text, expected=f"1 to {MAX_SIDE} pixels", remedy="correct it")
    return sides
