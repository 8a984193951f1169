"""The worker process of `tools.convert_embedder`: seeded weights, and the float32 export to TFLite or ONNX."""

import math
from pathlib import Path

from pydantic import TypeAdapter

from shared.command.errors import ToolError
from shared.formats.tensors import MESSAGE_INPUT
from shared.networks.card import Card
from shared.runtime.processes import Arrays, Message
from shared.runtime.worker import IMAGE_INPUT
from tools.convert_detector import export_onnx, export_tflite, seeded_weights
from tools.convert_embedder.request import EmbedderForm, require_embedder

NAMES = "shared.embedder"  # module of the network's classes in the names of tensors; rules and ledgers match these


def rehearse(message: Message) -> Message:
    """Write a checkpoint of seeded weights with the card's keys and shapes; no weight is constant, as none is after training."""
    import torch

    from shared.networks.checkpoint import REHEARSAL, write_safetensors
    from shared.networks.embedder import PREFIX, embedder_shapes

    card = TypeAdapter(Card).validate_python(message["card"])
    shapes = embedder_shapes(card)
    counters = {key for key in shapes if key.endswith("num_batches_tracked")}
    ordered = {PREFIX + key: shapes[key] for key in sorted(shapes, key=lambda key: key not in counters)}  # 8 bytes wide: first
    dtypes = {key: torch.int64 if key.removeprefix(PREFIX) in counters else torch.float32 for key in ordered}
    notes = {REHEARSAL: f"seed {message['seed']}: untrained"}
    weights = ((key, value.to(dtypes[key])) for key, value in seeded_weights(ordered, message["seed"]))
    write_safetensors(Path(message["draft"]), ordered, weights, notes, dtypes)
    return {}


def convert(message: Message) -> Message:
    """Export the embedder of a checkpoint as a float32 model; `folded` is a file for the weights in between."""
    import torch

    from shared.networks.checkpoint import (
        REHEARSAL,
        open_checkpoint,
        require_match,
        require_sound,
        write_safetensors,
    )
    from shared.networks.embedder import embedder_shapes, select_embedder
    from tools.convert_embedder.deployed import Pipeline
    from tools.convert_embedder.fusion import build_folded_on_meta, fold

    card = TypeAdapter(Card).validate_python(message["card"])
    weights, folded, draft = (Path(message[name]) for name in ("weights", "folded", "draft"))
    checkpoint = open_checkpoint(weights, card.checkpoint.container)
    if (REHEARSAL in checkpoint.notes) != message["rehearsal"]:
        raise ToolError("these weights are a rehearsal's, untrained", where=weights, remedy="use --rehearsal, without --checkpoint")
    state, shapes = select_embedder(checkpoint.state, weights), embedder_shapes(card)
    require_match(state, shapes, weights)
    require_sound(state, weights, integers=True)
    casts = sorted({str(value.dtype) for value in state.values() if value.is_floating_point()} - {"torch.float32"})
    is_mapped = message["format"] == "tflite"
    network = build_folded_on_meta(card, is_mapped=is_mapped)
    wanted = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    write_safetensors(folded, wanted, fold(wanted, state.__getitem__, is_mapped=is_mapped))
    network.load_state_dict(open_checkpoint(folded).state, assign=True)
    size, channels = message["image_size"], require_embedder(card).channels
    if message["form"] == EmbedderForm.IMAGE:
        deployed: torch.nn.Module = Pipeline(network, card, size).eval()
        channels = 3
    else:
        deployed = network
    inputs = {IMAGE_INPUT: torch.zeros(1, channels, size, size), MESSAGE_INPUT: torch.zeros(1, card.nbits)}
    if message["format"] == "onnx":
        export_onnx(deployed, inputs, draft, message["metadata"], names=NAMES)
    else:
        export_tflite(deployed, inputs, draft, names=NAMES)
    return {"parameters": sum(math.prod(shape) for shape in shapes.values()), "casts": casts}


def handle(message: Message, _: Arrays) -> tuple[Message, Arrays]:
    """Do the task that the message names."""
    return {"rehearse": rehearse, "convert": convert}[message["task"]](message), {}
