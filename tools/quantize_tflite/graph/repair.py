"""Rewrite a TFLite model the way the quantizer can read it, with exactly the same answers.

Published models hold constants that AI Edge Quantizer skips without a message: float16 weights before DEQUANTIZE, sparse weights
before DENSIFY, op codes in the schema's deprecated field, tensors that share a name. The runtime itself evaluates constant ops, so
that the weights are those it would have used.

Source: https://github.com/google-ai-edge/LiteRT/blob/v2.1.6/tflite/converter/schema/schema.fbs (OperatorCode, SparsityParameters)
"""

import copy
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.command.errors import ToolError, first_line, plain_reason
from shared.formats.tflite import DAMAGE, constant_span, enum_names, open_flatbuffer

SIGNATURE = "serving_default"


@dataclass(frozen=True)
class Repairs:
    """What was rewritten.

    Args:
        float16: Constants that were float16 and are float32 now.
        sparse: Constants that were sparse and are dense now.
        op_codes: Op codes taken out of the schema's deprecated field.
        names: Tensors that got a name of their own.
    """

    float16: int = 0
    sparse: int = 0
    op_codes: int = 0
    names: int = 0

    def __str__(self) -> str:
        counts = {
            "float16 constants folded to float32": self.float16,
            "sparse constants made dense": self.sparse,
            "op codes moved out of the deprecated field": self.op_codes,
            "tensors given a name of their own": self.names,
        }
        return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


def needed_repairs(path: Path) -> Repairs:
    """Return what `repair` would rewrite; reads no weights.

    Raises:
        ToolError: No TFLite model, or a damaged one.
    """
    with open_flatbuffer(path) as model:
        codes = [model.OperatorCodes(i) for i in range(model.OperatorCodesLength())]
        kinds = [enum_names("BuiltinOperator")[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())] for code in codes]
        folded: Counter[str] = Counter()
        names: Counter[bytes] = Counter()
        for graph in (model.Subgraphs(g) for g in range(model.SubgraphsLength())):
            tensors = [graph.Tensors(t) for t in range(graph.TensorsLength())]
            names.update(tensor.Name() or b"" for tensor in tensors)
            dense: set[int] = set()  # tensors that DENSIFY makes of constants
            for op in (graph.Operators(i) for i in range(graph.OperatorsLength())):
                kind = kinds[op.OpcodeIndex()]
                if kind == "DENSIFY":
                    dense.add(op.Outputs(0))
                    folded[kind] += 1
                is_cast = kind == "DEQUANTIZE" and tensors[op.Inputs(0)].Type() == _float16()
                if is_cast and (op.Inputs(0) in dense or constant_span(model, tensors[op.Inputs(0)])):
                    folded[kind] += 1
        old = sum(code.BuiltinCode() == 0 != code.DeprecatedBuiltinCode() for code in codes)
        shared = sum(count - (name != b"") for name, count in names.items())
        return Repairs(folded["DEQUANTIZE"], folded["DENSIFY"], old, shared)


def repair(source: Path, target: Path, *, add_signature: bool = False) -> Repairs:
    """Write `source` with everything repaired to `target`; weights stay where they are in memory, mapped, unless they are folded.

    Args:
        source: A .tflite file.
        target: The file to write.
        add_signature: Give a model without signatures one, its tensors' names for names; calibration runs through signatures.

    Raises:
        ToolError: The model is damaged, or its constants can't be evaluated.
    """
    from ai_edge_litert.tools import flatbuffer_utils

    try:
        model = flatbuffer_utils.read_model(str(source))
        needed = needed_repairs(source)
        for code in model.operatorCodes:
            code.builtinCode = max(code.builtinCode, code.deprecatedBuiltinCode)
        folded = _fold_constants(model)
        _name_apart(model)
        if add_signature and not model.signatureDefs:
            model.signatureDefs = [_signature(model.subgraphs[0])]
        write_model(model, target)
    except DAMAGE as error:
        raise _damaged(source, error) from None
    return Repairs(folded["DEQUANTIZE"], folded["DENSIFY"], needed.op_codes, needed.names)


def _damaged(source: Path, error: BaseException) -> ToolError:
    return ToolError("damaged TFLite model", where=source, got=first_line(error), remedy="convert or download it again")


def cut_before_custom_ops(source: Path, target: Path) -> bool:
    """Write the part of a model that runs without its custom ops; return whether there is any.

    Custom ops exist in some runtimes only. What comes before them can be run here; its results become outputs.
    """
    from ai_edge_litert.tools import flatbuffer_utils

    try:
        model = flatbuffer_utils.read_model(str(source))
        graph = model.subgraphs[0]
        custom = {number for number, code in enumerate(model.operatorCodes) if code.customCode}
        beyond: set[int] = set()  # tensors that a custom op makes, or that depend on one
        fed = set(graph.inputs)  # tensors that depend on an input: constants are no results
        kept = []
        for op in graph.operators:
            if op.opcodeIndex in custom or beyond & set(op.inputs):
                beyond |= set(op.outputs)
                continue
            kept.append(op)
            fed |= set(op.outputs) if fed & set(op.inputs) else set()
        inside = {id(op) for op in kept}
        needed = {t for op in graph.operators if id(op) not in inside for t in op.inputs} | set(graph.outputs)
        graph.operators, graph.outputs = kept, [t for op in kept for t in op.outputs if t in needed & fed]
        model.signatureDefs, model.subgraphs = [], [graph]
        write_model(model, target)
    except DAMAGE as error:
        raise _damaged(source, error) from None
    return bool(graph.outputs)


def shorten_names(source: Path, target: Path) -> int:
    """Write a model whose inner tensors are called t0, t1, ...; return how many bytes of names that saves.

    Inputs and outputs keep their names. Converters join the names of all ops they fuse, several hundred bytes for each tensor.
    """
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model(str(source))
    saved, number = 0, 0
    taken = {graph.tensors[t].name for graph in model.subgraphs for t in (*graph.inputs, *graph.outputs)}
    for graph in model.subgraphs:
        ends = {*graph.inputs, *graph.outputs}
        for tensor in (tensor for t, tensor in enumerate(graph.tensors) if t not in ends):
            while (name := b"t%d" % number) in taken:
                number += 1
            number += 1
            saved += len(tensor.name or b"") - len(name)
            tensor.name = name
    write_model(model, target)
    return saved


def write_model(model: Any, target: Path) -> None:
    """Write a model's objects as a flatbuffer; weights after it where the whole is large, as the quantizer writes its own."""
    from ai_edge_quantizer.model_modifier import ModelModifier

    ModelModifier(model).modify_model({}, serialize_to_path=str(target))


def _float16() -> int:
    from ai_edge_litert import schema_py_generated as schema

    return int(schema.TensorType.FLOAT16)


def _fold_constants(model: Any) -> Counter[str]:
    """Replace ops that turn stored constants into dense float32 by their results; return how many of each kind."""
    folded: Counter[str] = Counter()
    kinds = [enum_names("BuiltinOperator")[code.builtinCode] for code in model.operatorCodes]
    for graph in model.subgraphs:
        constant_ops = _constant_ops(model, graph, kinds)
        if not constant_ops:
            continue
        values = _evaluate(model, graph, constant_ops)
        folded.update(kinds[op.opcodeIndex] for op in constant_ops)
        done = {id(op) for op in constant_ops}
        graph.operators = [op for op in graph.operators if id(op) not in done]
        for index, value in values.items():
            _set_constant(model, graph.tensors[index], value)
        _drop_unused_tensors(model, graph)
    return folded


def _constant_ops(model: Any, graph: Any, kinds: list[str]) -> list[Any]:
    """Return the DENSIFY ops, and the DEQUANTIZE ops whose input is float16, that depend on stored constants alone."""
    known = {t for t, tensor in enumerate(graph.tensors) if model.buffers[tensor.buffer].data is not None}
    found = []
    for op in graph.operators:
        kind = kinds[op.opcodeIndex]
        is_cast = kind == "DEQUANTIZE" and graph.tensors[op.inputs[0]].type == _float16()
        if (kind == "DENSIFY" or is_cast) and op.inputs[0] in known:
            known.add(op.outputs[0])
            found.append(op)
    return found


def _evaluate(model: Any, graph: Any, ops: list[Any]) -> dict[int, NDArray[Any]]:
    """Return what the runtime computes for ops on constants, by tensor: those of the results that the rest of the graph reads."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType
    from ai_edge_litert.tools import flatbuffer_utils

    inside, own = {op.inputs[0] for op in ops}, {id(op) for op in ops}
    rest = {t for op in graph.operators if id(op) not in own for t in op.inputs} | set(graph.outputs)
    wanted = [op.outputs[0] for op in ops if op.outputs[0] in rest or op.outputs[0] not in inside]
    alone = copy.copy(model)
    part = copy.copy(graph)
    part.operators, part.inputs, part.outputs = ops, [], wanted
    alone.subgraphs, alone.signatureDefs, alone.metadata = [part], [], []
    content = bytes(flatbuffer_utils.convert_object_to_bytearray(alone))
    resolver = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    try:
        interpreter = Interpreter(model_content=content, experimental_op_resolver_type=resolver)
        interpreter.allocate_tensors()
        interpreter.invoke()
        return {index: interpreter.get_tensor(index) for index in wanted}
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"its stored constants can't be evaluated: {plain_reason(error)}") from None


def _set_constant(model: Any, tensor: Any, value: NDArray[Any]) -> None:
    from ai_edge_litert import schema_py_generated as schema

    tensor.buffer = len(model.buffers)
    tensor.sparsity = None
    model.buffers.append(schema.BufferT(data=np.ascontiguousarray(value).reshape(-1).view(np.uint8)))


def _drop_unused_tensors(model: Any, graph: Any) -> None:
    """Remove tensors that nothing reads or writes any more, and empty their buffers; indices move up."""
    signatures = [s for s in model.signatureDefs or [] if model.subgraphs[s.subgraphIndex] is graph]
    named = [entry for signature in signatures for entry in (*signature.inputs, *signature.outputs)]
    lists = [graph.inputs, graph.outputs, *(side for op in graph.operators for side in (op.inputs, op.outputs, op.intermediates))]
    used = {t for side in lists if side is not None for t in side} | {entry.tensorIndex for entry in named}
    kept = [t for t in range(len(graph.tensors)) if t in used]
    place = {old: new for new, old in enumerate(kept)} | {-1: -1}
    dropped = {graph.tensors[t].buffer for t in range(len(graph.tensors)) if t not in used}
    graph.tensors = [graph.tensors[t] for t in kept]
    for side in lists:
        if side is not None:
            side[:] = [place[t] for t in side]
    for entry in named:
        entry.tensorIndex = place[entry.tensorIndex]
    held = {tensor.buffer for other in model.subgraphs for tensor in other.tensors}
    for buffer in dropped - held - {entry.buffer for entry in model.metadata or []}:
        model.buffers[buffer].data = None


def _name_apart(model: Any) -> None:
    """Give each tensor a name that no other has; inputs and outputs choose first."""
    ends = [graph.tensors[t] for graph in model.subgraphs for t in (*graph.inputs, *graph.outputs)]
    tensors = [*ends, *(tensor for graph in model.subgraphs for tensor in graph.tensors)]
    given = {tensor.name for tensor in tensors}
    taken: set[bytes] = set()
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        base = name = tensor.name or b"tensor"
        number = 1
        while name in taken or (number > 1 and name in given) or (not tensor.name and name in given):
            number += 1
            name = base + b"_%d" % number
        tensor.name = name
        taken.add(name)
        given.add(name)


def _signature(graph: Any) -> Any:
    """Return a signature under which a graph's inputs and outputs go by their tensors' names."""
    from ai_edge_litert import schema_py_generated as schema

    def entries(indices: list[int]) -> list[Any]:
        return [schema.TensorMapT(name=graph.tensors[index].name, tensorIndex=index) for index in indices]

    return schema.SignatureDefT(
        inputs=entries(graph.inputs), outputs=entries(graph.outputs), signatureKey=SIGNATURE.encode(), subgraphIndex=0
    )
