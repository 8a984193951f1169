"""One way to load and run a model, whatever its format, in a process of its own.

A model is a program: one that crashes, hangs or eats memory takes its own process with it and becomes one error here. It also
makes peak memory a number per model, and lets two models run in turns without their thread pools meeting.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from shared.command.errors import DamagedError
from shared.command.resources import MIB, available_memory_bytes, cpu_count
from shared.files.file_type import regular_size
from shared.formats.model_file import check_is_model, format_of, read_metadata, size_bytes
from shared.formats.tensors import TensorSpec
from shared.networks.card import Card, InputForm
from shared.runtime import worker
from shared.runtime.processes import Arrays, Child, ChildError

Kernels = Literal["xnnpack", "reference", "onnxruntime", "torch"]

TIMEOUT_S = 600.0  # for one load or one run; the largest network known here needs under one minute
# XNNPACK keeps a packed copy of every float weight beside the mapped file.
XNNPACK_MEMORY = 1.3  # times the file's size
ONNX_MEMORY = 2.0  # times the model's size: ONNX Runtime keeps packed weights beside the loaded ones
BASE_MEMORY = 700 * MIB  # interpreter, libraries and activations; measured with the 2.9 GiB network


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
    with Child(worker, timeout_s) as child:
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
