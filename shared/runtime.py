"""One way to load and run a model, whatever its format, in a process of its own.

A model is a program: one that crashes, hangs or eats memory takes its own process with it and becomes one error here. It also
makes peak memory a number per model, and lets two models run in turns without their thread pools meeting.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shared.cards import Card
from shared.child import Arrays, Child, ChildError
from shared.errors import DamagedError, ToolError
from shared.formats import check_is_model, format_of, read_metadata, size_bytes
from shared.images import ImageForm, image_form, image_layout, seeded_image, to_layout
from shared.machine import MIB, available_memory_bytes, cpu_count
from shared.sniffing import regular_size

Kernels = Literal["xnnpack", "reference", "onnxruntime", "torch"]
Layout = Literal["nchw", "nhwc"]

TIMEOUT_S = 600.0  # for one load or one run; the largest network known here needs under one minute
# XNNPACK keeps a packed copy of every float weight beside the mapped file.
XNNPACK_MEMORY = 1.3  # times the file's size
ONNX_MEMORY = 2.0  # times the model's size: ONNX Runtime keeps packed weights beside the loaded ones
FREE_SIDE = 128  # pixels of a made-up image where any size fits
BASE_MEMORY = 700 * MIB  # interpreter, libraries and activations; measured with the 2.9 GiB network


@dataclass(frozen=True)
class InputForm:
    """How a deployed detector takes its image.

    Args:
        size: Height and width in pixels.
        layout: 'nchw' is float32 (1, 3, size, size), 'nhwc' is float32 (1, size, size, 3).
        resize: Whether the graph resizes the image to the network's own size.
    """

    size: int
    layout: Layout = "nchw"
    resize: bool = False


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of one input or output; an axis of -1 may have any length."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class ModelSource:
    """A model to run.

    Args:
        path: A .tflite or .onnx file, or a checkpoint (.pth, .safetensors) of the detector that `card` describes.
        card: Needed for a checkpoint; None for other files.
        form: How the detector of a checkpoint takes its image; default: the card's size, nchw.
    """

    path: Path
    card: Card | None = None
    form: InputForm | None = None

    def check(self) -> None:
        """Raise ToolError unless the file is there and is of its kind."""
        if self.card is None:
            check_is_model(self.path)
        else:
            regular_size(self.path, "checkpoint")

    @property
    def size_bytes(self) -> int:
        """Size of the model, weights in files of their own included."""
        return size_bytes(self.path) if self.card is None else self.path.stat().st_size

    def nbits(self) -> int | None:
        """Return the message length the model itself tells, or None: not a detector, or not one of ours."""
        if self.card is not None:
            return self.card.nbits
        nbits = read_metadata(self.path).get("nbits")
        return nbits if isinstance(nbits, int) and nbits > 0 else None


class Model:
    """A loaded model; use through `open_model`."""

    def __init__(self, child: Child, kernels: Kernels, reply: dict[str, Any]) -> None:
        self._child = child
        self.kernels = kernels
        self.load_ms: float = reply["load_ms"]
        self.inputs = [TensorSpec(name, tuple(shape), dtype) for name, shape, dtype in reply["inputs"]]
        self.outputs = [TensorSpec(name, tuple(shape), dtype) for name, shape, dtype in reply["outputs"]]

    def run(self, inputs: Arrays) -> tuple[dict[str, NDArray[Any]], float]:
        """Return the outputs by name, and the milliseconds that the model itself took."""
        reply, outputs = self._child.ask({}, inputs)
        return outputs, reply["run_ms"]

    def ops_outside_delegate(self) -> dict[str, int]:
        """Return op type -> how many ops of a TFLite model run in plain kernels although XNNPACK took others; after a run."""
        reply, _ = self._child.ask({"ask": "outside"})
        return {str(name): int(count) for name, count in reply["outside"].items()}

    @property
    def peak_rss_bytes(self) -> int:
        """Largest resident set of the model's process so far, its mapped file included."""
        return self._child.peak_rss_bytes


@contextlib.contextmanager
def open_model(
    source: ModelSource, *, threads: int | None = None, kernels: Kernels | None = None, timeout_s: float = TIMEOUT_S
) -> Iterator[Model]:
    """Load a model in a process of its own, and end that process afterwards.

    Args:
        source: The model.
        threads: Threads of the runtime; all CPUs when None.
        kernels: Which kernels run it; `choose_kernels` when None.
        timeout_s: Limit for loading, and for each run.

    Raises:
        ToolError: The file is missing or of another format.
        ChildError: The model does not load, or later does not run.
    """
    try:
        source.check()
    except DamagedError as error:
        raise ChildError(str(error)) from None  # as if it had crashed its process, which it is spared
    kernels = kernels or choose_kernels(source)
    request: dict[str, Any] = {"path": str(source.path), "threads": threads or cpu_count(), "kernels": kernels}
    if source.card is not None:
        form = source.form or InputForm(source.card.image_size)
        request |= {"card": asdict(source.card), "form": asdict(form)}
    with Child("shared.worker", timeout_s) as child:
        reply, _ = child.ask(request)
        yield Model(child, kernels, reply)


def choose_kernels(source: ModelSource) -> Kernels:
    """Return XNNPACK, the fast default, or reference kernels where its packed copy of the weights would not fit in memory."""
    if source.card is not None:
        return "torch"
    if format_of(source.path) == "onnx":
        return "onnxruntime"
    available = available_memory_bytes()
    return "xnnpack" if available is None or memory_need_bytes(source) <= available else "reference"


def memory_need_bytes(source: ModelSource) -> int:
    """Return the memory one loaded model is expected to take beyond its mapped file."""
    if source.card is not None:
        return BASE_MEMORY
    per_byte = ONNX_MEMORY if format_of(source.path) == "onnx" else XNNPACK_MEMORY
    return int(source.size_bytes * per_byte) + BASE_MEMORY


def describe(specs: list[TensorSpec]) -> str:
    """Return names, dtypes and shapes in one line."""
    return "; ".join(f"{spec.name} {spec.dtype} {spec.shape}" for spec in specs) or "none"


def image_spec(specs: list[TensorSpec]) -> tuple[str, str, int] | None:
    """Return name, layout and size of a model's input, or None where it does not take just one square RGB float32 image."""
    if len(specs) != 1 or specs[0].dtype != "float32" or (layout := image_layout(specs[0].shape)) is None:
        return None
    return specs[0].name, *layout


def image_input(specs: list[TensorSpec]) -> tuple[str, ImageForm] | None:
    """Return name and form of a model's input, or None where it does not take just one float32 image, RGB or luma, of any size."""
    if len(specs) != 1 or specs[0].dtype != "float32" or (form := image_form(specs[0].shape)) is None:
        return None
    return specs[0].name, form


def sample_inputs(specs: list[TensorSpec], seed: int, pixel_range: tuple[float, float] = (0.0, 1.0)) -> dict[str, NDArray[Any]]:
    """Return one seeded sample for each input: a made-up picture for float32 images, else uniform noise.

    Pictures span `pixel_range`, other float inputs [0, 1], integer inputs the dtype's range (int32 and wider: 0 to 9). Free axes
    become FREE_SIDE pixels of a picture, else 1.
    """
    rng = np.random.default_rng(seed)
    samples: dict[str, NDArray[Any]] = {}
    for spec in specs:
        dtype = np.dtype(spec.dtype)
        shape = tuple(1 if size == -1 else size for size in spec.shape)
        form = image_form(spec.shape)
        if form is not None and dtype == np.float32:
            samples[spec.name] = _seeded_picture(form, rng, pixel_range)
        elif dtype.kind == "f":
            samples[spec.name] = rng.random(shape).astype(dtype)
        elif dtype.kind in "iu":
            low, high = (np.iinfo(dtype).min, np.iinfo(dtype).max) if dtype.itemsize <= 2 else (0, 9)
            samples[spec.name] = rng.integers(low, high, shape, dtype=dtype, endpoint=True)
        else:
            raise ToolError(f"input '{spec.name}' has a type that can't be made up", got=spec.dtype, expected="float or integer")
    return samples


def _seeded_picture(form: ImageForm, rng: np.random.Generator, pixel_range: tuple[float, float]) -> NDArray[Any]:
    height, width = form.height or FREE_SIDE, form.width or FREE_SIDE
    image = seeded_image(max(height, width), rng)[:, :, :height, :width]
    if form.channels == 1:
        image = image.mean(axis=1, keepdims=True)
    low, high = pixel_range
    return to_layout(image * np.float32(high - low) + np.float32(low), form.layout)
