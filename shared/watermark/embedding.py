"""Mark images and videos: the published pipeline around an embedder, at full resolution, without torch.

Letters in shapes: F frames, H height, W width, K message bits.

Source: Video Seal, Fernandez et al. 2024, arXiv:2412.09492 (pipeline, videos).
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from shared.command.errors import ToolError
from shared.formats.model_file import ModelFile
from shared.formats.tensors import describe
from shared.media.attenuation import heat_map, to_luma
from shared.media.images import Image, Pixels, as_image, resize, to_image
from shared.networks.card import load_card
from shared.runtime.model import EmbedderCheckpoint, open_model
from shared.watermark.message import Bits, parse_message

ImageSource = Path | str | NDArray[Any]
Message = str | int | Bits


class WatermarkEmbedder:
    """A loaded embedder, run in a process of its own; use with `with`, or call `close`.

    Images keep their size: the network sees them at its own, and its watermark is stretched, attenuated and added at theirs.

    Args:
        model_path: A .tflite or .onnx model that takes an image and a message, or a checkpoint (.pth, .safetensors), run in torch.
        card: Model card, with tables [embedder] and [pipeline]: a name such as `videoseal`, or a path to a .toml file.
        threads: Threads of the runtime; all CPUs when None.
        attenuates_small: Attenuate the watermark by the image at the network's size, before it is stretched, as the published
            TorchScript does; else by the image itself.

    Raises:
        ToolError: The file is missing, or no embedder of this card.
        shared.runtime.processes.ChildError: The model does not load.
    """

    def __init__(self, model_path: Path | str, *, card: str, threads: int | None = None, attenuates_small: bool = False) -> None:
        path, described = Path(model_path), load_card(card)
        if described.embedder is None or described.pipeline is None:
            raise ToolError("this model's card has no embedder", where=card, remedy="add the tables [embedder] and [pipeline]")
        self.nbits, self.image_size = described.nbits, described.image_size
        self._channels, self._pipeline = described.embedder.channels, described.pipeline
        self._attenuates_small = attenuates_small
        is_model = path.suffix in (".tflite", ".onnx")
        with contextlib.ExitStack() as stack:
            source = ModelFile(path) if is_model else EmbedderCheckpoint(path, described)
            self._model = stack.enter_context(open_model(source, threads=threads))
            shapes = [(spec.shape, spec.dtype) for spec in self._model.inputs]
            size = self.image_size
            expected = [((1, self._channels, size, size), "float32"), ((1, self.nbits), "float32")]
            if shapes != expected or len(self._model.outputs) != 1:
                got = describe([*self._model.inputs, *self._model.outputs])
                raise ToolError("no embedder of this card", where=path, got=got, remedy="name the card it was made with")
            self._image_name, self._message_name = (spec.name for spec in self._model.inputs)
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
            message: Hexadecimal or binary digits, an integer, or bool (K,).

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
        return self._blend(image, self.residual(image, message))

    def residual(self, image: Image, message: Message) -> NDArray[np.float32]:
        """Return the network's output float32 (1, C, S, S) in (-1, 1), for an image float32 (1, 3, H, W)."""
        bits = parse_message(message, self.nbits).astype(np.float32)[np.newaxis]
        small = resize(image, self.image_size, self.image_size)
        if self._channels == 1:
            small = to_luma(small)
        outputs, _ = self._model.run({self._image_name: np.ascontiguousarray(small), self._message_name: bits})
        made: NDArray[np.float32] = outputs[self._model.outputs[0].name]
        if not np.isfinite(made).all():
            raise ToolError("the model's output has NaN or infinite values", remedy="run verify on the model")
        return made

    def embed_frames(self, frames: Iterable[Pixels], message: Message) -> Iterator[Pixels]:
        """Yield the frames of a video with a message in them, uint8 (H, W, 3), with a chunk of frames in memory.

        The network sees every `step_size`-th frame of a chunk; the card's `video_mode` says what the frames between get.

        Raises:
            ToolError: The message has the wrong length.
        """
        yield from map(to_pixels, self.embed_frames_float((to_image(frame) for frame in frames), message))

    def embed_frames_float(self, frames: Iterable[Image], message: Message) -> Iterator[Image]:
        """As `embed_frames`, on float32 (1, 3, H, W) in [0, 1], not rounded."""
        step, waiting = self._pipeline.step_size, iter(frames)
        while chunk := list(itertools.islice(waiting, step * self._pipeline.chunk_size)):
            keys = [self.residual(frame, message) for frame in chunk[::step]]
            for number, frame in enumerate(chunk):
                yield self._blend(frame, self._between(keys, number))

    def _between(self, keys: list[NDArray[np.float32]], number: int) -> NDArray[np.float32]:
        """Return the watermark of a chunk's frame from those of its key frames."""
        step, mode = self._pipeline.step_size, self._pipeline.video_mode
        at, after = divmod(number, step)
        if mode == "alternate" and after:
            return np.zeros_like(keys[at])
        if mode != "interpolate" or at + 1 >= len(keys) or step == 1:
            return keys[at]
        share = np.float32(after / (step - 1))
        return (1 - share) * keys[at] + share * keys[at + 1]

    def _blend(self, image: Image, residual: NDArray[np.float32]) -> Image:
        """Return an image with a watermark of the network's size added at its own."""
        is_attenuated = self._pipeline.attenuation == "jnd"
        if is_attenuated and self._attenuates_small:
            residual = heat_map(resize(image, *residual.shape[2:])) * residual
        watermark = resize(residual, *image.shape[2:])
        if is_attenuated and not self._attenuates_small:
            watermark = heat_map(image) * watermark
        return np.clip(image + np.float32(self._pipeline.scaling) * watermark, 0, 1)


def to_pixels(image: Image) -> Pixels:
    """Return float32 (1, 3, H, W) in [0, 1] as uint8 (H, W, 3), rounded."""
    pixels: Pixels = np.rint(image[0].transpose(1, 2, 0) * 255).astype(np.uint8)
    return pixels
