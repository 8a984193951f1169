"""The worker process of `tools.convert_detector`: seeded weights, and the float32 export to TFLite or ONNX, all in little memory.

litert-torch holds constants as it finds them. Weights that are memory-mapped, already folded (`tools.convert_detector.fusion`) and
left alone (`shared.runtime.workarounds`) stay on disk until the exporter copies them into the model.
"""

import math
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from shared.command.errors import ToolError
from shared.networks.card import Card, InputForm
from shared.runtime.processes import Arrays, Message

if TYPE_CHECKING:
    from torch import Tensor

OPSET = 20  # has Gelu as one op; written out it takes five, slower than the layers around it
ONNX_EMBEDDED_BYTES = 1_900_000_000  # of weights; a protobuf of 2 GiB can't be written, and the graph takes some too
# Converters begin the names of tensors with a class's module. Rules and ledgers match these names: they are part of a product.
NAMES = "shared.detector"  # of detectors
SMALL = 0.02  # standard deviation of seeded biases and of the deviations from 1 in seeded norms


def rehearse(message: Message) -> Message:
    """Write a checkpoint of seeded weights with the card's keys and shapes; no tensor is constant, as none is after training."""
    from shared.networks.checkpoint import REHEARSAL, write_safetensors
    from shared.networks.detector import detector_shapes

    card = TypeAdapter(Card).validate_python(message["card"])
    shapes = {card.checkpoint.prefix + key: shape for key, shape in detector_shapes(card).items()}
    notes = {REHEARSAL: f"seed {message['seed']}: untrained"}
    write_safetensors(Path(message["draft"]), shapes, seeded_weights(shapes, message["seed"]), notes)
    return {}


def seeded_weights(shapes: Mapping[str, tuple[int, ...]], seed: int) -> "Iterator[tuple[str, Tensor]]":
    """Yield normal float32 weights that keep activations in range: layers scaled by fan-in, norms near 1, the rest near 0."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for key, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        is_scale = (len(shape) == 1 and key.endswith(("weight", "running_var"))) or (len(shape) == 3 and key.endswith("gamma"))
        is_layer = len(shape) > 1 and key.endswith("weight")
        values *= math.prod(shape[1:]) ** -0.5 if is_layer else SMALL
        yield key, values + 1 if is_scale else values


def convert(message: Message) -> Message:
    """Export the detector of a checkpoint as a float32 model; `folded` is a file for the weights in between."""
    import torch

    from shared.networks.checkpoint import (
        REHEARSAL,
        as_float32,
        open_checkpoint,
        require_match,
        require_sound,
        select_detector,
        write_safetensors,
    )
    from shared.networks.detector import Deployed, GlobalResponseNorm, build_on_meta, detector_shapes, sum_of_squares_as_product
    from tools.convert_detector.fusion import fold_affine

    card = TypeAdapter(Card).validate_python(message["card"])
    form = InputForm(**message["form"])
    weights, folded, draft = (Path(message[name]) for name in ("weights", "folded", "draft"))
    checkpoint = open_checkpoint(weights, card.checkpoint.container)
    if (REHEARSAL in checkpoint.notes) != message["rehearsal"]:
        raise ToolError("these weights are a rehearsal's, untrained", where=weights, remedy="use --rehearsal, without --checkpoint")
    state = select_detector(checkpoint, card.checkpoint.prefix)
    shapes = detector_shapes(card)
    require_match(state, shapes, weights)
    require_sound(state, weights)
    casts = sorted({str(tensor.dtype) for tensor in state.values()} - {"torch.float32"})
    size = form.size
    image = torch.zeros((1, 3, size, size) if form.layout == "nchw" else (1, size, size, 3))
    reply = {"parameters": sum(math.prod(shape) for shape in shapes.values()), "casts": casts}
    if card.vit is None:
        write_safetensors(folded, shapes, fold_affine(shapes, lambda key: as_float32(state[key])))
    else:  # layer norms of a transformer are not worth it: each has its own axis
        write_safetensors(folded, shapes, ((key, as_float32(state[key])) for key in shapes))
    network = build_on_meta(card, maps_input=False)
    network.load_state_dict(open_checkpoint(folded).state, assign=True)
    if message["format"] == "onnx":
        for module in network.modules():
            if isinstance(module, GlobalResponseNorm):
                module.energy = sum_of_squares_as_product
                module.beta = torch.nn.Parameter(torch.zeros(()), requires_grad=False)  # folded; one zero drops out, many stay
    deployed = Deployed(network, form, card.image_size).eval()
    if message["format"] == "onnx":
        if message["dynamic_batch"]:
            image = image.expand(2, -1, -1, -1).clone()  # torch takes a batch of 1 for a constant
        export_onnx(deployed, {"image": image}, draft, message["metadata"], has_free_batch=message["dynamic_batch"])
    else:
        export_tflite(deployed, {"image": image}, draft)
    return reply


def _with_fixed_names(network: Any, names: str) -> Any:
    """Return a network whose own classes give converters `names` as their module, wherever they lie."""
    for module in network.modules():
        if not type(module).__module__.startswith("torch."):
            type(module).__module__ = names
    return network


def export_onnx(
    module: Any,
    inputs: "dict[str, Tensor]",
    draft: Path,
    metadata: dict[str, object],
    *,
    names: str = NAMES,
    has_free_batch: bool = False,
) -> None:
    """Run torch's exporter; inputs keep their names, the output is `output_0`. Weights above a size go to `<draft>.data`.

    Args:
        module: The network.
        inputs: Name -> a value; names as in the module's `forward`. With a free batch, of a batch that is not 1.
        draft: File to write.
        metadata: Of the model.
        names: Module of the network's classes in the names of tensors.
        has_free_batch: Whether the model takes any number of images.
    """
    import torch

    from shared.formats.onnx_file import read_model
    from shared.formats.onnx_graph import without_traces, write_metadata

    size = sum(value.numel() * value.element_size() for value in module.state_dict().values())
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its own use of torch's trees
        program = torch.onnx.export(
            _with_fixed_names(module, names),
            tuple(inputs.values()),
            dynamo=True,
            input_names=list(inputs),
            output_names=["output_0"],
            opset_version=OPSET,
            dynamic_shapes=tuple({0: batch} for _ in inputs) if has_free_batch else None,
            verbose=False,
        )
    assert program is not None
    program.save(str(draft), external_data=size > ONNX_EMBEDDED_BYTES)
    model = read_model(draft)
    if has_free_batch and not model.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise ToolError("the exporter has fixed the batch", remedy="convert without --dynamic-batch")
    without_traces(model)
    write_metadata(model, metadata)
    draft.write_bytes(model.SerializeToString(deterministic=True))


def export_tflite(module: Any, inputs: "dict[str, Tensor]", draft: Path, names: str = NAMES) -> None:
    """Run litert-torch; inputs keep their names, the output is `output_0`; arguments as of `export_onnx`."""
    os.environ["LITERT_TORCH_SHOW_PROGRESS"] = "n"
    import litert_torch

    from shared.runtime.workarounds import weights_left_mapped

    with weights_left_mapped():
        converted = litert_torch.convert(_with_fixed_names(module, names), sample_kwargs=inputs, lightweight_conversion=True)
        converted.export(str(draft))


def handle(message: Message, _: Arrays) -> tuple[Message, Arrays]:
    """Do the task that the message names."""
    return {"rehearse": rehearse, "convert": convert}[message["task"]](message), {}
