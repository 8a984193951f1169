"""The worker process of `shared.runtime.model`: loads one model at the first message, runs it at every later one."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from shared.command.errors import ToolError
from shared.networks.card import Card, InputForm
from shared.runtime.processes import Arrays, Message

Specs = list[tuple[str, list[int], str]]
Run = Callable[[Arrays], dict[str, NDArray[Any]]]
Outside = Callable[[], dict[str, int]]

DELEGATES = ("DELEGATE", "TfLiteXNNPackDelegate")
NUMBERS = "fiub"  # numpy's kinds: float, signed, unsigned, bool
ONLY_ERRORS = 3  # of ONNX Runtime's log levels
ONNX_DTYPES = {
    f"tensor({name})": dtype
    for name, dtype in (("float", "float32"), ("double", "float64"), ("float16", "float16"), ("bool", "bool"))
} | {f"tensor({dtype})": dtype for dtype in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")}
TORCH_INPUT, TORCH_OUTPUT = "image", "output_0"  # as litert-torch names them after conversion


def load_tflite(path: str, threads: int, kernels: str) -> tuple[Specs, Specs, Run, Outside]:
    """Return inputs, outputs and a run function of a TFLite model, named by its signature where it has just one; and `Outside`."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    resolver = OpResolverType.AUTO if kernels == "xnnpack" else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(model_path=path, num_threads=threads, experimental_op_resolver_type=resolver)
    interpreter.allocate_tensors()
    given, made = interpreter.get_input_details(), interpreter.get_output_details()
    inputs, outputs = _specs(interpreter, given), _specs(interpreter, made)

    def run(arrays: Arrays) -> dict[str, NDArray[Any]]:
        for (name, *_), tensor in zip(inputs, given, strict=True):
            interpreter.set_tensor(tensor["index"], arrays[name])
        interpreter.invoke()
        return {name: interpreter.get_tensor(tensor["index"]) for (name, *_), tensor in zip(outputs, made, strict=True)}

    return inputs, outputs, run, lambda: ops_outside_delegate(interpreter)


def ops_outside_delegate(interpreter: Any) -> dict[str, int]:
    """Return op type -> how many of a model's ops run in plain kernels although a delegate, such as XNNPACK, took others.

    Inside a delegate's share of the graph tensors have no memory of their own; its own outputs are those of its node.
    """
    ops = interpreter._get_ops_details()  # noqa: SLF001 - shown nowhere else
    delegates = [op for op in ops if op["op_name"] in DELEGATES]
    delivered = {tensor for op in delegates for tensor in op["outputs"]}
    outside: Counter[str] = Counter()
    for op in ops:
        if delegates and op not in delegates and len(op["outputs"]) and op["outputs"][0] not in delivered:
            with contextlib.suppress(ValueError):  # no memory: inside a delegate
                interpreter.get_tensor(op["outputs"][0])
                outside[op["op_name"]] += 1
    return dict(outside)


def _specs(interpreter: Any, tensors: list[dict[str, Any]]) -> Specs:
    """Return name, shape and dtype of tensors; a name that comes twice gets its place appended."""
    of_signature = signature_names(interpreter)
    specs: Specs = []
    for place, tensor in enumerate(tensors):
        name, dtype = of_signature.get(tensor["name"], tensor["name"]), np.dtype(tensor["dtype"])
        if dtype.kind not in NUMBERS:
            raise ToolError(f"tensor '{name}' of the model holds {dtype.name}, not numbers; it cannot be run here")
        taken = {other for other, *_ in specs}
        specs.append((f"{name}:{place}" if name in taken else name, [int(size) for size in tensor["shape"]], dtype.name))
    return specs


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
        specs.append((tensor.name, [size if isinstance(size, int) and size > 0 else -1 for size in tensor.shape], dtype))
    return specs


def signature_names(interpreter: Any) -> dict[str, str]:
    """Return tensor name -> name in the model's only signature; empty where it has none or several."""
    signatures = interpreter.get_signature_list()
    if len(signatures) != 1:
        return {}
    runner = interpreter.get_signature_runner(next(iter(signatures)))
    details = {**runner.get_input_details(), **runner.get_output_details()}
    return {tensor["name"]: name for name, tensor in details.items()}


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
            return {TORCH_OUTPUT: deployed(torch.from_numpy(inputs[TORCH_INPUT].copy())).numpy()}

    shape = [1, 3, form.size, form.size] if form.layout == "nchw" else [1, form.size, form.size, 3]
    return [(TORCH_INPUT, shape, "float32")], [(TORCH_OUTPUT, [1, 1 + card.nbits], "float32")], run


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
        if "card" in message:
            card = TypeAdapter(Card).validate_python(message["card"])
            form = InputForm(**message["form"])
            inputs, outputs, self.run = load_torch(Path(message["path"]), message["threads"], card, form)
        elif message["kernels"] == "onnxruntime":
            inputs, outputs, self.run = load_onnx(message["path"], message["threads"])
        else:
            inputs, outputs, self.run, self.outside = load_tflite(message["path"], message["threads"], message["kernels"])
        return {"inputs": inputs, "outputs": outputs, "load_ms": (time.perf_counter() - start) * 1e3}, {}


handle = Worker().handle
