"""Make the float32 model in a process of its own, and check it against torch before it gets its name."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

from shared.command.cli import step
from shared.command.errors import ToolError
from shared.files import artifacts
from shared.files.plan import Plan
from shared.formats.model_file import ModelFile
from shared.formats.onnx_file import name_weights
from shared.formats.tflite_metadata import append_metadata
from shared.metrics.metrics import cosine, max_abs_error, relative_error
from shared.networks.card import Card
from shared.runtime.model import DetectorCheckpoint, Kernels, open_model
from shared.runtime.processes import Child, ChildError, Message
from shared.runtime.samples import sample_inputs
from tools.convert_detector import export
from tools.convert_detector.request import ConvertRequest, ModelFormat

CONVERT_TIMEOUT_S = 3600.0
MAX_RELATIVE_ERROR = 1e-4  # float32 rounding in another order gives 1e-6; a wrong layer gives 1e-1
CHECK_SEED = 1


@dataclass(frozen=True)
class Agreement:
    """How far the float32 model is from torch on one image, and what the check took."""

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


def rehearsal_path(card: Card, folder: Path, seed: int) -> Path:
    """Return where the seeded weights of a card lie."""
    return folder / f"{card.output_prefix}_rehearsal_seed{seed}.safetensors"


def write_rehearsal(card: Card, output: Path, seed: int, *, overwrite: bool) -> None:
    """Write the seeded weights of a card, unless they are up to date."""

    def make(draft: Path) -> Rehearsal:
        with step(f"write seeded weights to {output.name}"):
            reply = _in_child({"task": "rehearse", "card": asdict(card), "seed": seed, "draft": str(draft)}, output)
        return Rehearsal(seed, reply["peak_rss_bytes"])

    arguments = {"card": card.as_arguments(), "seed": seed}
    plan = Plan(output, "convert_detector", arguments, [], ("torch",), overwrite=overwrite, refresh=True)
    artifacts.build(plan, Rehearsal, make)


def _in_child(message: Message, where: Path) -> Message:
    """Let `tools.convert_detector.export` do a task in a process of its own."""
    try:
        with Child(export, CONVERT_TIMEOUT_S) as child:
            return child.ask(message)[0]
    except ChildError as error:
        raise ToolError(f"could not {message['task']} the network", where=where, got=error) from None


def convert(request: ConvertRequest, draft: Path, folded: Path, output: Path) -> FloatModel:
    """Write the float32 model to `draft`, by way of `folded`, and check it; weights of a large ONNX model go next to `output`."""
    start = time.monotonic()
    message = {"task": "convert", "card": asdict(request.card), "form": asdict(request.form), "rehearsal": request.rehearsal}
    message |= {"format": request.model_format.value, "dynamic_batch": request.dynamic_batch, "metadata": request.metadata()}
    with step(f"convert to float32 {request.model_format.value}"):
        reply = _in_child({**message, "weights": str(request.weights), "folded": str(folded), "draft": str(draft)}, request.weights)
        folded.unlink()
    if request.model_format is ModelFormat.TFLITE:
        append_metadata(draft, request.metadata())
    seconds = round(time.monotonic() - start, 3)
    with step("check against torch"):
        agreement = _check(DetectorCheckpoint(request.weights, request.card, request.form), ModelFile(draft))
    if request.model_format is ModelFormat.ONNX:
        name_weights(draft, output)
    peak = max(reply["peak_rss_bytes"], agreement.peak_rss_bytes)
    return FloatModel(reply["parameters"], seconds, agreement, reply["casts"], peak)


def _check(torch_model: DetectorCheckpoint, converted: ModelFile) -> Agreement:
    """Run both on one image, one after the other, and raise ToolError unless they agree."""
    start = time.monotonic()
    try:
        with open_model(torch_model) as model:
            image = sample_inputs(model.inputs, CHECK_SEED)
            reference = next(iter(model.run(image)[0].values()))
            torch_peak = model.peak_rss_bytes
        with open_model(converted) as model:
            candidate = next(iter(model.run(image)[0].values()))
            peak, kernels = max(torch_peak, model.peak_rss_bytes), model.kernels
        error = relative_error(reference, candidate)
    except (ChildError, ValueError) as problem:
        raise ToolError("the converted model could not be checked against torch; nothing was kept", got=problem) from None
    if error > MAX_RELATIVE_ERROR:
        raise ToolError(
            "the converted model disagrees with torch; nothing was kept",
            got=f"relative error {error:.2g}",
            expected=f"at most {MAX_RELATIVE_ERROR:g}",
        )
    seconds = round(time.monotonic() - start, 3)
    return Agreement(error, max_abs_error(reference, candidate), cosine(reference, candidate), kernels, seconds, peak)
