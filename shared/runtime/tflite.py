"""A TFLite model in this process: loaded, and run through all its signatures."""

import contextlib
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.command.errors import ToolError
from shared.formats.tensors import TensorSpec

Array = NDArray[Any]

DELEGATES = ("DELEGATE", "TfLiteXNNPackDelegate")
NUMBERS = "fiub"  # numpy's kinds: float, signed, unsigned, bool


class TfliteModel:
    """A loaded model.

    A model with several signatures runs all of them, one after the other in the file's order, as if it were one: its inputs and
    outputs are then called SIGNATURE/NAME. Signatures that share a graph count once.
    """

    def __init__(self, source: Path | bytes, threads: int, *, has_xnnpack: bool = True, keeps_tensors: bool = False) -> None:
        """Load a model.

        Args:
            source: Its file or its content.
            threads: Threads of the runtime.
            has_xnnpack: Whether XNNPACK runs it; else the plain kernels.
            keeps_tensors: Whether tensors inside can be read after a run; takes memory.

        Raises:
            RuntimeError, ValueError: It does not load.
        """
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        resolver = OpResolverType.AUTO if has_xnnpack else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        given = {"model_path": str(source)} if isinstance(source, Path) else {"model_content": source}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that preserved tensors take memory
            self.interpreter = Interpreter(
                **given,
                num_threads=threads,
                experimental_op_resolver_type=resolver,
                experimental_preserve_all_tensors=keeps_tensors,
            )
            self.interpreter.allocate_tensors()
        self._runners = _runners_apart(self.interpreter)
        self.inputs, self.outputs = model_specs(self.interpreter)
        given, made = self.interpreter.get_input_details(), self.interpreter.get_output_details()
        self._given, self._made = ([tensor["index"] for tensor in side] for side in (given, made))
        self._shapes = [tuple(map(int, tensor["shape"])) for tensor in given]
        self._graphs = [0]  # that the last run ran

    def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs by name.

        Args:
            arrays: The inputs by name; a signature is left out where inputs of it are missing.
        """
        if not self._runners:
            return self._run_main(arrays)
        outputs: dict[str, Array] = {}
        self._graphs = []
        for key, runner in self._runners.items():
            taken = [spec for spec in self.inputs if spec.signature == key]
            if all(spec.name in arrays for spec in taken):
                made = runner(**{spec.own_name: arrays[spec.name] for spec in taken})
                self._graphs.append(_graph(runner))
                outputs |= {f"{key}/{name}": value for name, value in made.items()}
        return outputs

    def _run_main(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        given = [arrays[spec.name] for spec in self.inputs]
        if (shapes := [array.shape for array in given]) != self._shapes:
            for place, shape in zip(self._given, shapes, strict=True):
                self.interpreter.resize_tensor_input(place, shape)
            self.interpreter.allocate_tensors()
            self._shapes = shapes
        for place, array in zip(self._given, given, strict=True):
            self.interpreter.set_tensor(place, array)
        self.interpreter.invoke()
        return {spec.name: self.interpreter.get_tensor(place) for spec, place in zip(self.outputs, self._made, strict=True)}

    def tensors(self, names: Collection[str]) -> dict[str, Array]:
        """Return the values of tensors by name, of those that the last run made; names must be unique in the file."""
        return {
            tensor["name"]: self.interpreter.get_tensor(tensor["index"], graph)
            for graph in self._graphs
            for tensor in self.interpreter.get_tensor_details(graph)
            if tensor["name"] in names
        }

    def ops_outside_delegate(self) -> dict[str, int]:
        """Return op type -> how many ops of the main graph run in plain kernels although a delegate, such as XNNPACK, took others.

        Inside a delegate's share of the graph tensors have no memory of their own; its own outputs are those of its node.
        """
        ops = self.interpreter._get_ops_details()  # noqa: SLF001 - shown nowhere else
        delegates = [op for op in ops if op["op_name"] in DELEGATES]
        delivered = {tensor for op in delegates for tensor in op["outputs"]}
        outside: Counter[str] = Counter()
        for op in ops:
            if delegates and op not in delegates and len(op["outputs"]) and op["outputs"][0] not in delivered:
                with contextlib.suppress(ValueError):  # no memory: inside a delegate
                    self.interpreter.get_tensor(op["outputs"][0])
                    outside[op["op_name"]] += 1
        return dict(outside)


def _runners_apart(interpreter: Any) -> dict[str, Any]:
    """Return what runs each signature, by name; empty where there is nothing to run but the main graph.

    Of several signatures of one graph the first counts. Those with texts, such as the name of a file to write, are left out.
    """
    runners = {key: interpreter.get_signature_runner(key) for key in interpreter.get_signature_list()}
    runners = {key: runner for key, runner in runners.items() if _has_numbers(runner)}
    firsts = {_graph(runner): key for key, runner in reversed(runners.items())}
    return {key: runners[key] for key in runners if firsts[_graph(runners[key])] == key} if list(firsts) not in ([], [0]) else {}


def _has_numbers(runner: Any) -> bool:
    tensors = [*runner.get_input_details().values(), *runner.get_output_details().values()]
    return all(np.dtype(tensor["dtype"]).kind in NUMBERS for tensor in tensors)


def _graph(runner: Any) -> int:
    return int(runner._subgraph_index)  # noqa: SLF001 - shown nowhere else


def model_specs(interpreter: Any) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Return a model's inputs and outputs, as `TfliteModel` names them."""
    if runners := _runners_apart(interpreter):
        sides = [
            [
                _spec(f"{key}/{name}", tensor, key)
                for key, runner in runners.items()
                for name, tensor in getattr(runner, side)().items()
            ]
            for side in ("get_input_details", "get_output_details")
        ]
        return sides[0], sides[1]
    names: dict[str, str] = {}
    for runner in map(interpreter.get_signature_runner, interpreter.get_signature_list()):
        details = {**runner.get_input_details(), **runner.get_output_details()}
        names = {tensor["name"]: name for name, tensor in details.items()} | names
    return _main_specs(interpreter.get_input_details(), names), _main_specs(interpreter.get_output_details(), names)


def _main_specs(tensors: list[dict[str, Any]], names: Mapping[str, str]) -> list[TensorSpec]:
    """Return the specs of the main graph's tensors; a name that comes twice gets its place appended."""
    specs: list[TensorSpec] = []
    for place, tensor in enumerate(tensors):
        name = names.get(tensor["name"], tensor["name"])
        is_taken = any(spec.name == name for spec in specs)
        specs.append(_spec(f"{name}:{place}" if is_taken else name, tensor))
    return specs


def _spec(name: str, tensor: Mapping[str, Any], signature: str = "") -> TensorSpec:
    """Return a tensor's spec; axes of free length are -1, the first one, of the batch, aside."""
    dtype = np.dtype(tensor["dtype"])
    if dtype.kind not in NUMBERS:
        raise ToolError(f"tensor '{name}' of the model holds {dtype.name}, not numbers; it cannot be run here")
    sizes, signed = [int(size) for size in tensor["shape"]], [int(size) for size in tensor["shape_signature"]]
    if len(signed) == len(sizes):
        sizes = [*sizes[:1], *signed[1:]]
    return TensorSpec(name, tuple(sizes), dtype.name, signature)
