"""The worker process of `shared.runtime.model`: loads one model at the first message, runs it at every later one."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from shared.command.errors import ToolError
from shared.formats.tensors import MESSAGE_INPUT, TensorSpec
from shared.networks.card import Card, InputForm
from shared.runtime.processes import Arrays, Message
from shared.runtime.tflite import TfliteModel

Specs = list[tuple[str, list[int], str, str]]  # name, shape, dtype, signature
Run = Callable[[Arrays], dict[str, NDArray[Any]]]
Outside = Callable[[], dict[str, int]]

ONLY_ERRORS = 3  # of ONNX Runtime's log levels
ONNX_DTYPES = {
    f"tensor({name})": dtype
    for name, dtype in (("float", "float32"), ("double", "float64"), ("float16", "float16"), ("bool", "bool"))
} | {f"tensor({dtype})": dtype for dtype in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")}
IMAGE_INPUT, ONLY_OUTPUT = "image", "output_0"  # as our converters name them


def load_tflite(path: str, threads: int, kernels: str) -> tuple[Specs, Specs, Run, Outside]:
    """Return inputs, outputs and a run function of a TFLite model; and `Outside`."""
    model = TfliteModel(Path(path), threads, has_xnnpack=kernels == "xnnpack")
    return _as_message(model.inputs), _as_message(model.outputs), model.run, model.ops_outside_delegate


def _as_message(specs: list[TensorSpec]) -> Specs:
    return [(spec.name, list(spec.shape), spec.dtype, spec.signature) for spec in specs]


def load_onnx(path: str, threads: int) -> tuple[Specs, Specs, Run]:
    """Return inputs, outputs and a run function of an ONNX model; a free axis is -1."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = ONLY_ERRORS
    options.add_session_config_entry("session.force_spinning_stop", "1")  # else it would slow down whoever runs next
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs, outputs = _onnx_specs(session.get_inputs()), _onnx_specs(session.get_outputs())

    def run(arrays: Arrays) -> dict[str, NDArray[Any]]:
        made = session.run(None, {name: arrays[name] for name, *_ in inputs})
        return {name: np.asarray(array) for (name, *_), array in zip(outputs, made, strict=True)}

    return inputs, outputs, run


def _onnx_specs(tensors: list[Any]) -> Specs:
    specs: Specs = []
    for tensor in tensors:
        dtype = ONNX_DTYPES.get(tensor.type)
        if dtype is None:
            raise ToolError(f"tensor '{tensor.name}' of the model holds {tensor.type}, not numbers; it cannot be run here")
        specs.append((tensor.name, [size if isinstance(size, int) and size > 0 else -1 for size in tensor.shape], dtype, ""))
    return specs


def load_torch(path: Path, threads: int, card: Card, form: InputForm) -> tuple[Specs, Specs, Run]:
    """Return inputs, outputs and a run function of the detector in a checkpoint, its weights memory-mapped."""
    import torch

    from shared.networks.checkpoint import as_float32, open_checkpoint, require_match, select_detector
    from shared.networks.detector import Deployed, build_on_meta

    torch.set_num_threads(threads)
    network = build_on_meta(card)
    state = select_detector(open_checkpoint(path, card.checkpoint.container), card.checkpoint.prefix)
    require_match(state, {key: value.shape for key, value in network.state_dict().items()}, path)
    network.load_state_dict({key: as_float32(value) for key, value in state.items()}, assign=True)
    deployed = Deployed(network, form, card.image_size)

    def run(inputs: Arrays) -> dict[str, NDArray[Any]]:
        with torch.inference_mode():
            return {ONLY_OUTPUT: deployed(torch.from_numpy(inputs[IMAGE_INPUT].copy())).numpy()}

    shape = [1, 3, form.size, form.size] if form.layout == "nchw" else [1, form.size, form.size, 3]
    return [(IMAGE_INPUT, shape, "float32", "")], [(ONLY_OUTPUT, [1, 1 + card.nbits], "float32", "")], run


def load_embedder(path: Path, threads: int, card: Card) -> tuple[Specs, Specs, Run]:
    """Return inputs, outputs and a run function of the embedder in a checkpoint, its weights memory-mapped."""
    import torch

    from shared.networks.checkpoint import as_float32, open_checkpoint, require_match
    from shared.networks.embedder import build_embedder_on_meta, select_embedder

    torch.set_num_threads(threads)
    network = build_embedder_on_meta(card)
    state = select_embedder(open_checkpoint(path, card.checkpoint.container).state, path)
    require_match(state, {key: value.shape for key, value in network.state_dict().items()}, path)
    network.load_state_dict({key: as_float32(v) if v.is_floating_point() else v for key, v in state.items()}, assign=True)
    assert card.embedder is not None
    shape = [1, card.embedder.channels, card.image_size, card.image_size]

    def run(inputs: Arrays) -> dict[str, NDArray[Any]]:
        with torch.inference_mode():
            image, message = (torch.from_numpy(inputs[name].copy()) for name in (IMAGE_INPUT, MESSAGE_INPUT))
            return {ONLY_OUTPUT: network(image, message).numpy()}

    inputs = [(IMAGE_INPUT, shape, "float32", ""), (MESSAGE_INPUT, [1, card.nbits], "float32", "")]
    return inputs, [(ONLY_OUTPUT, shape, "float32", "")], run


class Worker:
    """Holds the loaded model between messages."""

    def __init__(self) -> None:
        self.run: Run | None = None
        self.outside: Outside = dict

    def handle(self, message: Message, arrays: Arrays) -> tuple[Message, Arrays]:
        """Load at the first message, run at the others; both timed without the exchange."""
        start = time.perf_counter()
        if message.get("ask") == "outside":
            return {"outside": self.outside()}, {}
        if self.run is not None:
            results = self.run(arrays)
            return {"run_ms": (time.perf_counter() - start) * 1e3}, results
        if "card" in message and "form" not in message:
            card = TypeAdapter(Card).validate_python(message["card"])
            inputs, outputs, self.run = load_embedder(Path(message["path"]), message["threads"], card)
        elif "card" in message:
            card = TypeAdapter(Card).validate_python(message["card"])
            form = InputForm(**message["form"])
            inputs, outputs, self.run = load_torch(Path(message["path"]), message["threads"], card, form)
        elif message["kernels"] == "onnxruntime":
            inputs, outputs, self.run = load_onnx(message["path"], message["threads"])
        else:
            inputs, outputs, self.run, self.outside = load_tflite(message["path"], message["threads"], message["kernels"])
        return {"inputs": inputs, "outputs": outputs, "load_ms": (time.perf_counter() - start) * 1e3}, {}


handle = Worker().handle
