"""Mark images and videos: the published pipeline around an embedder, at full resolution, without torch.

Letters in shapes: F frames, H height, W width, K message bits.

Source: Video Seal, Fernandez et al. 2024, arXiv:2412.09492 (pipeline, videos).
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from shared.command.errors import ToolError, first_line
from shared.files.atomic import draft_beside
from shared.formats.model_file import ModelFile
from shared.formats.tensors import describe
from shared.media.attenuation import heat_map, to_luma
from shared.media.images import Image, Pixels, as_image, resize, to_image
from shared.media.transcode import transcode
from shared.networks.card import Pipeline, load_card
from shared.runtime.model import EmbedderCheckpoint, open_model
from shared.watermark.message import Bits, parse_message

ImageSource = Path | str | NDArray[Any]
Message = str | int | Bits
Frame = TypeVar("Frame")
Step = Callable[[str], object]
CRF = 17  # of videos; looks like the original


class WatermarkEmbedder:
    """A loaded embedder, run in a process of its own; use with `with`, or call `close`.

    Images keep their size: the network sees them at its own, and its watermark is stretched, attenuated and added at theirs.

    Args:
        model_path: A .tflite or .onnx model that takes an image and a message, or a checkpoint (.pth, .safetensors), run in torch.
        card: Model card, with tables [embedder] and [pipeline]: a name such as `videoseal`, or a path to a .toml file. Models of
            convert_embedder need none.
        threads: Threads of the runtime; all CPUs when None.
        attenuates_small: Attenuate the watermark by the image at the network's size, before it is stretched, as the published
            TorchScript does; else by the image itself.

    Raises:
        ToolError: The file is missing, or no embedder of this card.
        shared.runtime.processes.ChildError: The model does not load.
    """

    def __init__(
        self, model_path: Path | str, *, card: str | None = None, threads: int | None = None, attenuates_small: bool = False
    ) -> None:
        path = Path(model_path)
        about = describe_embedder(path, card)
        self.nbits, self.image_size = about.nbits, about.image_size
        self._about, self._pipeline, self._attenuates_small = about, about.pipeline, attenuates_small
        with contextlib.ExitStack() as stack:
            source = ModelFile(path) if is_model(path) else EmbedderCheckpoint(path, load_card(str(card)))
            self._model = stack.enter_context(open_model(source, threads=threads))
            specs = {spec.name: spec for spec in self._model.inputs}
            shapes = sorted((spec.shape, spec.dtype) for spec in specs.values())
            image_shape = (1, about.channels, self.image_size, self.image_size)
            expected = sorted([((1, self.nbits), "float32"), (image_shape, "float32")])
            if shapes != expected or len(self._model.outputs) != 1:
                got = describe([*self._model.inputs, *self._model.outputs])
                raise ToolError("no embedder of this card", where=path, got=got, remedy="name the card it was made with")
            self._message_name, self._image_name = sorted(specs, key=lambda name: len(specs[name].shape))
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the model's process."""
        self._stack.close()

    def embed(self, image: ImageSource, message: Message) -> Pixels:
        """Return an image with a message in it, uint8 (H, W, 3) RGB at the image's own size.

        Values are rounded to the nearest of 256 levels; published scripts that cut off instead lose half a level on average. Flat
        grey just below the middle carries hardly any watermark: nothing can be hidden there.

        Args:
            image: A file, or an array: (H, W, 3) RGB, uint8 or floating point in [0, 1], or floating point (3, H, W).
            message: Hexadecimal or binary digits, text of K / 8 bytes, an integer, or bool (K,).

        Raises:
            ToolError: The file or the array is no image, or the message has the wrong length.
        """
        return to_pixels(self.embed_float(as_image(image), message))

    def embed_batch(self, images: Iterable[ImageSource], message: Message) -> list[Pixels]:
        """Mark several images with one message, each by itself; arguments and errors as in `embed`."""
        if isinstance(images, str | Path | np.ndarray):
            raise ToolError("a batch is a list of images", got=type(images).__name__, remedy="use embed for one image")
        return [self.embed(image, message) for image in images]

    def embed_float(self, image: Image, message: Message) -> Image:
        """Return float32 (1, 3, H, W) in [0, 1], not rounded, for one image of that form; errors as in `embed`."""
        if self._about.form == "residual":
            return self._blend(image, self.residual(image, message))
        if image.shape[2:] != (self.image_size, self.image_size):
            got, expected = (f"{width}x{height}" for height, width in (image.shape[2:], (self.image_size, self.image_size)))
            remedy = "convert the embedder with --form residual, which takes any"
            raise ToolError("this embedder takes images of one size", got=got, expected=expected, remedy=remedy)
        return self._run(image, message)

    def residual(self, image: Image, message: Message) -> NDArray[np.float32]:
        """Return the network's output float32 (1, C, S, S) in (-1, 1), for an image float32 (1, 3, H, W)."""
        small = resize(image, self.image_size, self.image_size)
        return self._run(to_luma(small) if self._about.channels == 1 else small, message)

    def _run(self, image: Image, message: Message) -> NDArray[np.float32]:
        """Return the model's output for an image of its own size."""
        bits = parse_message(message, self.nbits).astype(np.float32)[np.newaxis]
        outputs, _ = self._model.run({self._image_name: np.ascontiguousarray(image), self._message_name: bits})
        made: NDArray[np.float32] = outputs[self._model.outputs[0].name]
        if not np.isfinite(made).all():
            raise ToolError("the model's output has NaN or infinite values", remedy="run verify on the model")
        return made

    def embed_video(
        self,
        source: Path | str,
        output: Path | str,
        message: Message,
        *,
        kind: str | None = None,
        crf: int = CRF,
        on_frame: Step = str,
    ) -> int:
        """Write a video with a message in its frames: H.264, the sound and the times of the frames as they were.

        Args:
            source: The video.
            output: File to write, .mp4, .mov or .mkv; whole or not at all.
            message: As of `embed`.
            kind: Ending of the video's name where `output` is to be renamed later.
            crf: Constant rate factor of the encoder, 0 (lossless) to 51; a higher one makes smaller files and costs bits.
            on_frame: Called after each frame.

        Returns:
            Number of frames.

        Raises:
            ToolError: The file is missing, no video or damaged; the output has another ending; the message has the wrong length.
        """
        source, output = Path(source), Path(output)
        parse_message(message, self.nbits)

        def change(frames: Iterator[Pixels]) -> Iterator[Pixels]:
            for frame in self.embed_frames(frames, message):
                yield frame
                on_frame("")

        with draft_beside(output) as draft:
            count = transcode(source, draft, kind or output.suffix, change, crf=crf)
            draft.replace(output)
        return count

    def embed_frames(self, frames: Iterable[Pixels], message: Message) -> Iterator[Pixels]:
        """Yield the frames of a video with a message in them, uint8 (H, W, 3); at most two groups of `step_size` are in memory.

        The network sees every `step_size`-th frame of a chunk; the card's `video_mode` says what the frames between get.

        Raises:
            ToolError: The message has the wrong length, or the model marks whole images alone.
        """
        yield from map(to_pixels, self._embed_groups(frames, to_image, message))

    def embed_frames_float(self, frames: Iterable[Image], message: Message) -> Iterator[Image]:
        """As `embed_frames`, on float32 (1, 3, H, W) in [0, 1], not rounded."""
        yield from self._embed_groups(frames, lambda frame: frame, message)

    def _embed_groups(self, frames: "Iterable[Frame]", to_float: "Callable[[Frame], Image]", message: Message) -> Iterator[Image]:
        """Yield marked frames; a group is a key frame and those up to the next one."""
        if self._about.form == "image":
            raise ToolError("this embedder is for images alone", remedy="convert it with --form residual for videos")
        waiting, size = iter(frames), self._pipeline.step_size

        def next_group() -> "tuple[list[Frame], NDArray[np.float32] | None]":
            group = list(itertools.islice(waiting, size))
            return group, self.residual(to_float(group[0]), message) if group else None

        place, (group, watermark) = 0, next_group()
        while watermark is not None:
            following, following_watermark = next_group()
            place = (place + 1) % self._pipeline.chunk_size
            after = following_watermark if place else None  # a watermark never reaches into the next chunk
            for number, frame in enumerate(group):
                yield self._blend(to_float(frame), self._between(watermark, after, number))
            group, watermark = following, following_watermark

    def _between(self, watermark: NDArray[np.float32], after: NDArray[np.float32] | None, number: int) -> NDArray[np.float32]:
        """Return the watermark of the frame `number` frames after a key frame; `after` is that of the next key frame, if any."""
        step, mode = self._pipeline.step_size, self._pipeline.video_mode
        if mode == "alternate" and number:
            return np.zeros_like(watermark)
        if mode != "interpolate" or after is None or step == 1:
            return watermark
        share = np.float32(number / (step - 1))
        return (1 - share) * watermark + share * after

    def _blend(self, image: Image, residual: NDArray[np.float32]) -> Image:
        """Return an image with a watermark of the network's size added at its own."""
        is_attenuated = self._pipeline.attenuation == "jnd"
        if is_attenuated and self._attenuates_small:
            residual = heat_map(resize(image, *residual.shape[2:])) * residual
        watermark = resize(residual, *image.shape[2:])
        if is_attenuated and not self._attenuates_small:
            watermark = heat_map(image) * watermark
        return np.clip(image + np.float32(self._pipeline.scaling) * watermark, 0, 1)


def is_model(path: Path) -> bool:
    """Return whether a file's name is that of a model, not of a checkpoint."""
    return path.suffix in (".tflite", ".onnx")


@dataclass(frozen=True)
class AboutEmbedder:
    """What is known of an embedder, from its card or from the metadata of its model.

    Args:
        nbits: Message length.
        image_size: Side of the image it takes, pixels.
        channels: Of that image: 1 is luma, 3 RGB.
        form: `residual`: it gives the watermark; `image`: the marked image.
        pipeline: What is done around it.
    """

    nbits: int
    image_size: int
    channels: int
    form: Literal["residual", "image"]
    pipeline: Pipeline


def describe_embedder(path: Path, card: str | None) -> AboutEmbedder:
    """Return what is known of an embedder.

    Raises:
        ToolError: The card has no embedder, or there is no card and the model says nothing of itself.
    """
    metadata = ModelFile(path).metadata if is_model(path) else {}
    if metadata.get("component") != "embedder":
        return _of_card(path, card)
    if card is not None and load_card(card).name != metadata.get("model"):
        remedy = "leave out the card: the model says what is around it"
        raise ToolError("the model is of another card", where=path, got=card, expected=metadata.get("model"), remedy=remedy)
    pipeline = {field.name: metadata[field.name] for field in fields(Pipeline) if field.name in metadata}
    names = ("nbits", "image_size", "channels", "form")
    try:
        return TypeAdapter(AboutEmbedder).validate_python({**{name: metadata.get(name) for name in names}, "pipeline": pipeline})
    except ValidationError as error:
        raise ToolError("the model's metadata is damaged", where=path, got=first_line(error), remedy="convert it again") from None


def _of_card(path: Path, card: str | None) -> AboutEmbedder:
    """Return what a card says of its embedder."""
    if card is None and is_model(path):
        remedy = "give an embedder; for one of other origin, name its card with --card"
        raise ToolError("the model does not say that it is an embedder", where=path, remedy=remedy)
    if card is None:
        raise ToolError("a checkpoint does not say which network it holds", where=path, remedy="name its card with --card")
    described = load_card(card)
    if described.embedder is None or described.pipeline is None:
        raise ToolError("this model's card has no embedder", where=card, remedy="add the tables [embedder] and [pipeline]")
    return AboutEmbedder(described.nbits, described.image_size, described.embedder.channels, "residual", described.pipeline)


def to_pixels(image: Image) -> Pixels:
    """Return float32 (1, 3, H, W) in [0, 1] as uint8 (H, W, 3), rounded."""
    pixels: Pixels = np.rint(image[0].transpose(1, 2, 0) * 255).astype(np.uint8)
    return pixels
