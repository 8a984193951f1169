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
from shared.formats.model_file import ModelFile
from shared.formats.tensors import TensorSpec
from shared.networks.card import Card, InputForm
from shared.runtime import worker
from shared.runtime.processes import Arrays, Child, ChildError

Kernels = Literal["xnnpack", "reference", "onnxruntime", "torch"]

TIMEOUT_S = 600.0  # for one load or one run; the largest network known here needs under one minute
# XNNPACK keeps a packed copy of every float weight next to the mapped file.
XNNPACK_MEMORY = 1.3  # times the file's size
ONNX_MEMORY = 2.0  # times the model's size: ONNX Runtime keeps packed weights next to the loaded ones
BASE_MEMORY = 700 * MIB  # interpreter, libraries and activations; measured with the 2.9 GiB network


@dataclass(frozen=True)
class DetectorCheckpoint:
    """The detector of a checkpoint, to be run in torch.

    Args:
        path: A .pth or .safetensors file.
        card: The card that describes the detector.
        form: How the detector takes its image; default: the card's size, nchw.
    """

    path: Path
    card: Card
    form: InputForm | None = None

    def check(self) -> None:
        """Raise ToolError unless the file is there."""
        regular_size(self.path, "checkpoint")

    @property
    def files(self) -> list[Path]:
        """The checkpoint."""
        return [self.path]

    @property
    def size_bytes(self) -> int:
        """Size of the checkpoint."""
        return self.path.stat().st_size

    @property
    def nbits(self) -> int | None:
        """Message length of the detector."""
        return self.card.nbits

    @property
    def input_range(self) -> tuple[float, float]:
        """Range of the image input."""
        return 0.0, 1.0


@dataclass(frozen=True)
class EmbedderCheckpoint:
    """The embedder of a checkpoint, to be run in torch.

    Args:
        path: A .pth or .safetensors file.
        card: The card that describes the embedder.
    """

    path: Path
    card: Card

    def check(self) -> None:
        """Raise ToolError unless the file is there."""
        regular_size(self.path, "checkpoint")


Source = ModelFile | DetectorCheckpoint


class Model:
    """A loaded model; use through `open_model`."""

    def __init__(self, child: Child, kernels: Kernels, reply: dict[str, Any]) -> None:
        self._child = child
        self.kernels = kernels
        self.load_ms: float = reply["load_ms"]
        self.inputs = [TensorSpec(name, tuple(shape), *rest) for name, shape, *rest in reply["inputs"]]
        self.outputs = [TensorSpec(name, tuple(shape), *rest) for name, shape, *rest in reply["outputs"]]

    def run(self, inputs: Arrays) -> tuple[dict[str, NDArray[Any]], float]:
        """Return the outputs by name, and the milliseconds that the model itself took."""
        reply, outputs = self._child.ask({}, inputs)
        return outputs, reply["run_ms"]

    def plain_ops(self) -> dict[str, int]:
        """Return op type -> how many ops of a TFLite model run in plain kernels although XNNPACK took others; after a run."""
        if self.kernels != "xnnpack":
            return {}
        reply, _ = self._child.ask({"ask": "outside"})
        return {str(name): int(count) for name, count in reply["outside"].items()}

    @property
    def peak_rss_bytes(self) -> int:
        """Largest resident set of the model's process so far, its mapped file included."""
        return self._child.peak_rss_bytes


@contextlib.contextmanager
def open_model(
    source: Source | EmbedderCheckpoint, *, threads: int | None = None, kernels: Kernels | None = None, timeout_s: float = TIMEOUT_S
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
    kernels = kernels or ("torch" if isinstance(source, EmbedderCheckpoint) else choose_kernels(source))
    request: dict[str, Any] = {"path": str(source.path), "threads": threads or cpu_count(), "kernels": kernels}
    if isinstance(source, DetectorCheckpoint):
        form = source.form or InputForm(source.card.image_size)
        request |= {"card": asdict(source.card), "form": asdict(form)}
    elif isinstance(source, EmbedderCheckpoint):
        request |= {"card": asdict(source.card)}
    with Child(worker, timeout_s) as child:
        try:
            reply, _ = child.ask(request)
        except ChildError as error:  # runtimes name the file by its whole path, which may be a temporary one
            raise ChildError(str(error).replace(str(source.path), source.path.name)) from None
        yield Model(child, kernels, reply)


def choose_kernels(source: Source) -> Kernels:
    """Return XNNPACK, the fast default, or reference kernels where its packed copy of the weights would not fit in memory."""
    if isinstance(source, DetectorCheckpoint):
        return "torch"
    if source.kind == "onnx":
        return "onnxruntime"
    available = available_memory_bytes()
    return "xnnpack" if available is None or memory_need_bytes(source) <= available else "reference"


def memory_need_bytes(source: Source) -> int:
    """Return the memory one loaded model is expected to take beyond its mapped file."""
    if isinstance(source, DetectorCheckpoint):
        return BASE_MEMORY
    per_byte = ONNX_MEMORY if source.kind == "onnx" else XNNPACK_MEMORY
    return int(source.size_bytes * per_byte) + BASE_MEMORY
