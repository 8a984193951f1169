"""Make a network's float32 model in a process of its own, and check it against torch before it gets its name."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.command.cli import step
from shared.command.errors import ToolError
from shared.files import artifacts
from shared.files.plan import Plan
from shared.formats.model_file import ModelFile
from shared.formats.onnx_file import name_weights
from shared.formats.tflite_metadata import append_metadata
from shared.metrics.metrics import cosine, max_abs_error, relative_error
from shared.runtime.model import Kernels, Model, open_model
from shared.runtime.processes import Arrays, Child, ChildError, Message
from tools.convert_detector.network import Network
from tools.convert_detector.request import ModelFormat

CONVERT_TIMEOUT_S = 3600.0
MAX_RELATIVE_ERROR = 1e-4  # float32 rounding in another order gives 1e-6; a wrong layer gives 1e-1


@dataclass(frozen=True)
class Agreement:
    """How far the float32 model is from torch on one sample, and what the check took."""

    relative_error: float
    max_abs_error: float
    cosine: float
    kernels: Kernels
    seconds: float
    peak_rss_bytes: int


@dataclass(frozen=True)
class FloatModel:
    """What was found out about the float32 model."""

    parameters: int
    convert_seconds: float
    agreement: Agreement
    casts: list[str]
    peak_rss_bytes: int


@dataclass(frozen=True)
class Rehearsal:
    """Seed of the weights that stand in for trained ones."""

    seed: int
    peak_rss_bytes: int


def rehearsal_path(prefix: str, folder: Path, seed: int) -> Path:
    """Return where seeded weights lie; `prefix` is the beginning of their products' names."""
    return folder / f"{prefix}_rehearsal_seed{seed}.safetensors"


def write_rehearsal(network: Network, *, overwrite: bool) -> None:
    """Write the seeded weights of a rehearsal, unless they are up to date."""
    card, output, seed = asdict(network.card), network.weights, network.seed
    assert seed is not None

    def make(draft: Path) -> Rehearsal:
        with step(f"write seeded weights to {output.name}"):
            message = {"task": "rehearse", "card": card, "seed": seed, "draft": str(draft)}
            reply = _in_child(network.exporter, message, output)
        return Rehearsal(seed, reply["peak_rss_bytes"])

    arguments = {"card": network.arguments["card"], "seed": seed}
    plan = Plan(output, network.tool, arguments, [], ("torch",), overwrite=overwrite, refresh=True)
    artifacts.build(plan, Rehearsal, make)


def _in_child(exporter: ModuleType, message: Message, where: Path) -> Message:
    """Let a worker module do a task in a process of its own."""
    try:
        with Child(exporter, CONVERT_TIMEOUT_S) as child:
            return child.ask(message)[0]
    except ChildError as error:
        raise ToolError(f"could not {message['task']} the network", where=where, got=error) from None


def convert(network: Network, draft: Path, folded: Path, output: Path) -> FloatModel:
    """Write the float32 model to `draft`, by way of `folded`, and check it; weights of a large ONNX model go next to `output`."""
    start = time.monotonic()
    message = {"task": "convert", "card": asdict(network.card), "rehearsal": network.is_rehearsal, **network.details}
    message |= {"format": network.model_format.value, "metadata": dict(network.metadata)}
    message |= {"weights": str(network.weights), "folded": str(folded), "draft": str(draft)}
    with step(f"convert to float32 {network.model_format.value}"):
        reply = _in_child(network.exporter, message, network.weights)
        folded.unlink()
    if network.model_format is ModelFormat.TFLITE:
        append_metadata(draft, network.metadata)
    seconds = round(time.monotonic() - start, 3)
    with step("check against torch"):
        agreement = _check(network, ModelFile(draft))
    if network.model_format is ModelFormat.ONNX:
        name_weights(draft, output)
    peak = max(reply["peak_rss_bytes"], agreement.peak_rss_bytes)
    return FloatModel(reply["parameters"], seconds, agreement, reply["casts"], peak)


def _check(network: Network, converted: ModelFile) -> Agreement:
    """Run torch and the model on one sample, one after the other, and raise ToolError unless they agree."""
    start = time.monotonic()
    try:
        reference = network.reference()
        with open_model(converted) as model:
            candidate = _only_output(model, reference.sample)
            peak, kernels = max(reference.peak_rss_bytes, model.peak_rss_bytes), model.kernels
            error = relative_error(reference.output, candidate)
            ignored = _ignored_inputs(model, reference.sample, candidate) if error > MAX_RELATIVE_ERROR else []
    except (ChildError, ValueError) as problem:
        raise ToolError("the converted model could not be checked against torch; nothing was kept", got=problem) from None
    if ignored:
        raise ToolError("the converted model answers the same for any input; nothing was kept", got=", ".join(ignored))
    if error > MAX_RELATIVE_ERROR:
        raise ToolError(
            "the converted model disagrees with torch; nothing was kept",
            got=f"relative error {error:.2g}",
            expected=f"at most {MAX_RELATIVE_ERROR:g}",
        )
    seconds = round(time.monotonic() - start, 3)
    output = reference.output
    return Agreement(error, max_abs_error(output, candidate), cosine(output, candidate), kernels, seconds, peak)


def _only_output(model: Model, sample: Arrays) -> NDArray[Any]:
    outputs, _ = model.run(sample)
    return next(iter(outputs.values()))


def _ignored_inputs(model: Model, sample: Arrays, output: NDArray[Any]) -> list[str]:
    """Return the inputs whose values, turned around, change nothing."""
    turned = {name: np.ascontiguousarray(1 - values) for name, values in sample.items()}
    return [name for name, values in turned.items() if np.array_equal(_only_output(model, {**sample, name: values}), output)]
