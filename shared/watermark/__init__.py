"""Both ends of the watermark for scripts: mark images with an embedder, and read the message of an image or a video.

Example:
    from shared.watermark import WatermarkDetector, WatermarkEmbedder

    with WatermarkEmbedder("y_256b_img.pth", card="videoseal") as embedder:
        marked = embedder.embed("photo.png", message)  # uint8 (H, W, 3), at the photo's own size

    with WatermarkDetector("models/miniseal_detector_miniseal_256_int8.tflite") as detector:
        found = detector.detect("photo.png", expected="1f3a09bc")
        print(found.confidence, found.hex, found.agreement.bit_accuracy, found.agreement.p_value)

Letters in shapes: F frames, H height, W width, K message bits.
"""

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from shared.command.errors import ToolError
from shared.formats.model_file import ModelFile
from shared.formats.tensors import TensorSpec, describe, image_spec
from shared.media.images import as_image, stretch_image, to_image, to_layout
from shared.media.video import read_frames
from shared.networks.card import load_card
from shared.runtime.model import DetectorCheckpoint, Source, open_model
from shared.watermark.embedding import ImageSource, Message, WatermarkEmbedder
from shared.watermark.message import Bits, chance_of_agreement, parse_message, to_bit_string, to_hex, to_int

__all__ = ["Aggregation", "Agreement", "Detection", "ImageSource", "Message", "WatermarkDetector", "WatermarkEmbedder", "aggregate"]

Aggregation = Literal["avg", "squared_avg", "l1norm_avg", "l2norm_avg"]
FRAMES = 16  # of a video, by default


@dataclass(frozen=True)
class Agreement:
    """Agreement of a detected message with the expected message.

    Args:
        matching: Number of equal bits.
        nbits: Bits of the message.
    """

    matching: int
    nbits: int

    @property
    def bit_accuracy(self) -> float:
        """Share of matching bits; 0.5 is chance."""
        return self.matching / self.nbits

    @property
    def p_value(self) -> float:
        """Probability that a random message has at least as many matching bits."""
        return chance_of_agreement(self.matching, self.nbits)


@dataclass(frozen=True)
class Detection:
    """Output of a detector.

    Args:
        confidence_logit: Above 0: the image is marked.
        logits: float32 (K,), a logit for each bit; above 0 reads as 1.
        agreement: Agreement with the expected message, where it was given.
        frames: The detections of a video's frames, whose mean this detection is; empty for an image.
    """

    confidence_logit: float
    logits: NDArray[np.float32]
    agreement: Agreement | None = None
    frames: "tuple[Detection, ...]" = ()

    @property
    def confidence(self) -> float:
        """The confidence that the image is marked, from 0 to 1."""
        return 0.5 * (1 + math.tanh(self.confidence_logit / 2))  # the logistic function, without overflow for large logits

    @property
    def is_marked(self) -> bool:
        """Whether the confidence is above a half."""
        return self.confidence_logit > 0

    @property
    def bits(self) -> Bits:
        """The message as bool (K,)."""
        return self.logits > 0

    @property
    def bit_string(self) -> str:
        """The message as K digits `0` and `1`."""
        return to_bit_string(self.bits)

    @property
    def hex(self) -> str:
        """The message as hexadecimal digits."""
        return to_hex(self.bits)

    @property
    def int(self) -> int:
        """The message as an integer; the first bit is the highest."""
        return to_int(self.bits)


class WatermarkDetector:
    """A loaded detector, run in a process of its own; use with `with`, or call `close`.

    Message length, layout and image size come from the model itself. Images are stretched to its size, whatever their proportions.

    Args:
        model_path: A .tflite or .onnx model, or a checkpoint (.pth, .safetensors), run in torch.
        card: Model card of a checkpoint: a name such as `miniseal`, or a path to a .toml file.
        nbits: Message length of a model without edgepress's metadata.
        threads: Threads of the runtime; all CPUs when None.

    Raises:
        ToolError: The file is missing, no model, or no detector of square RGB images.
        shared.runtime.processes.ChildError: The model does not load.
    """

    def __init__(
        self, model_path: Path | str, *, card: str | None = None, nbits: int | None = None, threads: int | None = None
    ) -> None:
        path = Path(model_path)
        source: Source = ModelFile(path) if card is None else DetectorCheckpoint(path, load_card(card))
        if card is not None and not source.path.is_file():
            raise ToolError("no such checkpoint file", where=source.path)
        with contextlib.ExitStack() as stack:
            self._model = stack.enter_context(open_model(source, threads=threads))
            image = image_spec(self._model.inputs)
            if image is None:
                taken = describe(self._model.inputs)
                raise ToolError("no detector: it does not take one square RGB float32 image", where=source.path, got=taken)
            self._name, self.layout, self.image_size = image
            self.nbits = _message_length(source, self._model.outputs, nbits)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the model's process."""
        self._stack.close()

    def detect(self, image: ImageSource, *, expected: Message | None = None) -> Detection:
        """Read one image.

        Args:
            image: A file, or an array: (H, W, 3) RGB, uint8 or floating point in [0, 1], or floating point (3, H, W).
            expected: The expected message: hexadecimal or binary digits, text of K / 8 bytes, an integer, or bool (K,).

        Raises:
            ToolError: The file or the array is no image, or the expected message has the wrong length.
        """
        wanted = None if expected is None else parse_message(expected, self.nbits)
        return _detection(self._run(as_image(image)), wanted)

    def detect_batch(self, images: Iterable[ImageSource], *, expected: Message | None = None) -> list[Detection]:
        """Read several images in turn; arguments and errors as in `detect`."""
        if isinstance(images, str | Path | np.ndarray):
            raise ToolError("a batch is a list of images", got=type(images).__name__, remedy="use detect for one image")
        return [self.detect(image, expected=expected) for image in images]

    def detect_video(
        self,
        path: Path | str,
        *,
        frames: int = FRAMES,
        expected: Message | None = None,
        aggregation: Aggregation = "avg",
        on_frame: Callable[[str], object] = str,
    ) -> Detection:
        """Read frames spread evenly over a video; the confidence is the mean over them, the logits are as `aggregate` has it.

        Args:
            path: The video.
            frames: How many are read; all of a shorter video.
            expected: The message that should be in it.
            aggregation: As of `aggregate`.
            on_frame: Called after each frame.

        Raises:
            ToolError: The file is missing or no video, or the expected message has the wrong length.
        """
        wanted = None if expected is None else parse_message(expected, self.nbits)
        outputs = []
        for frame in read_frames(Path(path), frames):
            outputs.append(self._run(to_image(frame)))
            on_frame("")
        confidence = np.mean([output[0] for output in outputs], dtype=np.float32)
        logits = aggregate(np.stack([output[1:] for output in outputs]), aggregation)
        whole = np.concatenate(([confidence], logits)).astype(np.float32)
        return _detection(whole, wanted, tuple(_detection(output, wanted) for output in outputs))

    def _run(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the output float32 (1 + K,) for one image float32 (1, 3, H, W)."""
        outputs, _ = self._model.run({self._name: to_layout(stretch_image(image, self.image_size), self.layout)})
        output: NDArray[np.float32] = outputs[self._model.outputs[0].name][0]
        if not np.isfinite(output).all():
            raise ToolError("the model's output has NaN or infinite values", remedy="run verify on the model")
        return output


def aggregate(logits: NDArray[np.float32], how: Aggregation) -> NDArray[np.float32]:
    """Return the logits of a video, float32 (K,), from those of its frames, float32 (F, K).

    Args:
        logits: Of the frames.
        how: `avg` is the mean; the others give frames more weight in which the message is clear: `squared_avg` weighs each logit by
            its own magnitude, `l1norm_avg` and `l2norm_avg` by the norm of all logits of the frame.

    Source: `extract_message` of https://github.com/facebookresearch/videoseal
    """
    if how == "avg":
        weights = np.ones_like(logits)
    elif how == "squared_avg":
        weights = np.abs(logits)
    else:
        weights = np.linalg.norm(logits, ord=1 if how == "l1norm_avg" else 2, axis=1, keepdims=True)
    mean: NDArray[np.float32] = (logits * weights).mean(axis=0, dtype=np.float32)
    return mean


def _detection(output: NDArray[np.float32], expected: Bits | None, frames: tuple[Detection, ...] = ()) -> Detection:
    logits = output[1:]
    agreement = None if expected is None else Agreement(int(((logits > 0) == expected).sum()), logits.size)
    return Detection(float(output[0]), logits, agreement, frames)


def _message_length(source: Source, outputs: list[TensorSpec], given: int | None) -> int:
    """Return the given message length, else the length in the model's metadata; it must fit the model's output."""
    nbits = given or source.nbits
    if nbits is None:
        raise ToolError("the model does not tell its message length", where=source.path, remedy="pass nbits=")
    if len(outputs) != 1 or outputs[0].shape != (1, 1 + nbits):
        raise ToolError(
            f"no detector of {nbits} bits", where=source.path, got=describe(outputs), expected=f"one output (1, {1 + nbits})"
        )
    return nbits
