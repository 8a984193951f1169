"""A network that is to become a model: which one, from which weights, into what, and how it is checked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from numpy.typing import NDArray

from shared.command.resources import GIB, ResourceEstimate
from shared.networks.card import Card
from shared.runtime.model import DetectorCheckpoint, EmbedderCheckpoint, open_model
from shared.runtime.processes import Arrays
from shared.runtime.samples import sample_inputs
from tools.convert_detector.request import ModelFormat

BASE_MEMORY = int(0.9 * GIB)  # libraries; measured at 33.4 M and 773.7 M parameters
SCALES_SHARE, GRAPH_BYTES = 0.03, 2**19  # of a product next to its weights, at most: norms and the like; tables and names


CHECK_SEED = 1


@dataclass(frozen=True)
class Reference:
    """A sample, torch's answer to it, and the peak memory of the process."""

    sample: Arrays
    output: NDArray[Any]
    peak_rss_bytes: int


def run_in_torch(source: DetectorCheckpoint | EmbedderCheckpoint) -> Reference:
    """Run a checkpoint's network on a made-up sample; its message is other than the one that the converter saw."""
    with open_model(source) as model:
        sample = sample_inputs(model.inputs, CHECK_SEED)
        outputs, _ = model.run(sample)
        return Reference(sample, next(iter(outputs.values())), model.peak_rss_bytes)


@dataclass(frozen=True)
class Writing:
    """How to treat the files to write; fields are named as the options."""

    reproducible: bool = False
    dry_run: bool = False
    overwrite: bool = False
    refresh: bool = False
    makes_folder: bool = False  # for products under their default names


@dataclass(frozen=True)
class Network:
    """A network to convert.

    Args:
        tool: Name of the tool that converts it.
        card: Its model card.
        weights: The checkpoint; of a rehearsal the file for the seeded weights.
        seed: Of the weights of a rehearsal; None for trained weights.
        model_format: Of the product.
        weights_bytes: Of its float32 weights.
        memory_per_byte: Memory that converting takes, per byte of these.
        reference: Runs the same network in torch on a sample; the product is checked against its answer.
        exporter: The worker module: it does the tasks `rehearse` and `convert`.
        details: What the worker must know to convert it.
        metadata: Of the product.
        arguments: What decides the bytes of the product besides weights, card and format.
        exclude: Selectors of layers that stay in float where the product is quantized to integers.
        remarks: What a user must know, a line each.
    """

    tool: str
    card: Card
    weights: Path
    seed: int | None
    model_format: ModelFormat
    weights_bytes: int
    memory_per_byte: float
    reference: Callable[[], "Reference"]
    exporter: ModuleType
    details: Mapping[str, Any]
    metadata: Mapping[str, object]
    arguments: Mapping[str, object]
    exclude: Sequence[str] = ()
    remarks: Sequence[str] = ()

    @property
    def is_rehearsal(self) -> bool:
        """Whether the weights are seeded."""
        return self.seed is not None

    def needs(self) -> ResourceEstimate:
        """Return what making the float32 model takes, at most; the seeded weights of a rehearsal included."""
        size = self.weights_bytes
        disk = (3 if self.is_rehearsal and not self.weights.exists() else 2) * size + GRAPH_BYTES
        memory = BASE_MEMORY + int(size * self.memory_per_byte)
        return ResourceEstimate("convert this model", self.float_bytes, disk, memory)

    @property
    def float_bytes(self) -> int:
        """Size of the float32 model, at most."""
        return int(self.weights_bytes * (1 + SCALES_SHARE)) + GRAPH_BYTES
