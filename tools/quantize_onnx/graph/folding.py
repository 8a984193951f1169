"""Fold what does not depend on the inputs into constants: subgraphs of constants, and batch normalizations after convolutions."""

import hashlib
from pathlib import Path
from typing import Any

from shared.formats.onnx_file import Model, inner_graphs
from shared.formats.onnx_graph import readers_of

# Passes of ONNX Runtime 1.31's first level that join ops under new names; the others fold constants and drop ops without effect.
JOINING_PASSES = (
    "CommonSubexpressionElimination",
    "ConstantSharing",
    "ConvAddFusion",
    "ConvBNFusion",
    "ConvMulFusion",
    "GeluFusionL1",
    "GemmSumFusion",
    "GemmTransposeFusion",
    "LayerNormFusionL1",
    "MatMul_BatchNormalization_Fusion",
    "MatMulAddFusion",
    "Pad_Fusion",
    "ReshapeFusion",
    "TransposeOptimizer",
)
RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli")
LEAST_SHARED_BYTES = 1024  # of a constant made by folding that is looked for among the others
MOST_GROWTH, LEAST_GROWTH_BYTES = 2.0, 2**20  # of a model by folding; one that grows more stays as it is


def fold_constants(model: Model, folder: Path) -> tuple[int, Model]:
    """Return how many nodes were folded, and the model with the results of all nodes of constants as constants.

    ONNX Runtime does it: it knows the shapes of activations, too, and so folds the arithmetic on them. A model that it cannot load,
    or that grows to MOST_GROWTH times its size, stays as it is.

    Args:
        model: The model, its weights loaded.
        folder: Folder for intermediate files.
    """
    import onnx
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    if not _has_foldable(model.graph):
        return 0, model
    given, target = folder / "unfolded.onnx", folder / "folded.onnx"
    try:
        onnx.save_model(model, str(given))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(target)
        onnxruntime.InferenceSession(
            str(given), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(JOINING_PASSES)
        )
        folded = onnx.load(str(target))
        before = given.stat().st_size
    except (errors.Fail, errors.InvalidArgument, errors.InvalidGraph, errors.NotImplemented, errors.RuntimeException):
        return 0, model
    finally:
        given.unlink(missing_ok=True)
        target.unlink(missing_ok=True)
    _share_constants(folded, {tensor.name for tensor in model.graph.initializer})
    if folded.ByteSize() > MOST_GROWTH * before + LEAST_GROWTH_BYTES:
        return 0, model
    used = {node.domain for node in folded.graph.node} | {entry.domain for entry in model.opset_import}
    kept = [entry for entry in folded.opset_import if entry.domain in used]
    del folded.opset_import[:]
    folded.opset_import.extend(kept)
    folded.metadata_props.MergeFrom(() if folded.metadata_props else model.metadata_props)
    return _count(model.graph) - _count(folded.graph), folded


def _has_foldable(graph: Any) -> bool:
    """Return whether some node reads constants alone, asks for a shape, or changes nothing."""
    inputs = {value.name for value in graph.input}
    constants = {tensor.name for tensor in graph.initializer} - inputs
    for node in graph.node:
        if node.op_type == "Constant":
            constants.update(node.output)
        elif node.op_type in ("Shape", "Dropout") or (
            node.input and node.op_type not in RANDOM and all(name in constants for name in node.input if name)
        ):
            return True
    return False


def _share_constants(folded: Model, known: set[str]) -> None:
    """Keep one copy of each large constant that folding has made several times, in place."""
    places: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    same: dict[str, str] = {}
    kept = []
    outputs = {value.name for value in folded.graph.output}
    for tensor in folded.graph.initializer:
        if tensor.name in known or tensor.name in outputs or len(tensor.raw_data) < LEAST_SHARED_BYTES:
            kept.append(tensor)
            continue
        key = (tensor.data_type, tuple(tensor.dims), hashlib.sha256(tensor.raw_data).digest())
        same[tensor.name] = places.setdefault(key, tensor.name)
        if same[tensor.name] == tensor.name:
            kept.append(tensor)
    if len(kept) < len(folded.graph.initializer):
        del folded.graph.initializer[:]
        folded.graph.initializer.extend(kept)
        rename_inputs(folded.graph, same)


def rename_inputs(graph: Any, names: dict[str, str]) -> None:
    """Let all nodes of a graph, and of the graphs inside of them, read other tensors, in place."""
    for node in graph.node:
        for index, name in enumerate(node.input):
            if names.get(name, name) != name:
                node.input[index] = names[name]
        for inner in inner_graphs(node):
            rename_inputs(inner, names)


def _count(graph: Any) -> int:
    return sum(node.op_type != "Constant" for node in graph.node)


def fold_batchnorms(model: Model) -> int:
    """Fold each BatchNormalization after a Conv that nothing else reads into that Conv's weights; return how many.

    y = (conv(x) - mean) / sqrt(variance + epsilon) * scale + bias, so weights and bias take one factor per output channel.
    """
    import numpy as np
    from onnx import numpy_helper

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    readers = readers_of(graph)
    makers = {name: node for node in graph.node for name in node.output}
    folded = []
    for norm in [node for node in graph.node if node.op_type == "BatchNormalization"]:
        conv = makers.get(norm.input[0])
        held = [constants[name] for name in norm.input[1:5] if name in constants]
        if conv is None or conv.op_type != "Conv" or readers[norm.input[0]] != 1 or len(held) < 4 or len(norm.output) != 1:
            continue
        own = [name for name in conv.input[1:] if name in constants]
        if len(own) != len(conv.input) - 1 or any(readers[name] != 1 for name in own):
            continue
        scale, shift, mean, variance = (numpy_helper.to_array(tensor).astype(np.float64) for tensor in held)
        epsilon = next((attribute.f for attribute in norm.attribute if attribute.name == "epsilon"), 1e-5)
        factor = scale / np.sqrt(variance + epsilon)
        weight = constants[own[0]]
        values = numpy_helper.to_array(weight)
        bias = numpy_helper.to_array(constants[own[1]]).astype(np.float64) if len(own) > 1 else 0.0
        scaled = (values * factor.reshape(-1, *[1] * (values.ndim - 1))).astype(values.dtype)
        moved = ((bias - mean) * factor + shift).astype(values.dtype)
        weight.CopyFrom(numpy_helper.from_array(scaled, weight.name))
        if len(own) > 1:
            constants[own[1]].CopyFrom(numpy_helper.from_array(moved, own[1]))
        else:
            name = f"{own[0]}_folded_bias"
            graph.initializer.append(numpy_helper.from_array(moved, name))
            conv.input.append(name)
        conv.output[0] = norm.output[0]
        folded.append(norm)
    for norm in folded:
        graph.node.remove(norm)
    return len(folded)
