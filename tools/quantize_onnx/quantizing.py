"""Quantize a model with ONNX Runtime's tools: what is asked for, in their terms, and what they leave to be done around them."""

import contextlib
import io
import json
import logging
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.command.errors import ToolError, plain_reason
from shared.formats.onnx_file import MAX_PROTOBUF_BYTES, Model, external_files, read_model
from tools.quantize_onnx.bias import correct
from tools.quantize_onnx.graph import mends
from tools.quantize_onnx.graph.repair import NARROW, write
from tools.quantize_onnx.graph.rewrite import AS_FLOAT, matrix_products, read_unrounded, shield_cubic_resizes, shield_floats
from tools.quantize_onnx.graph.rounding import before_rounding
from tools.quantize_onnx.graph.weights_only import quantize_weights_only, weights_only
from tools.quantize_onnx.options import LAYERS, OnnxRequest
from tools.quantize_onnx.ranges import read_ranges, unranged


@dataclass(frozen=True)
class QuantizeTask:
    """One model to be quantized, everything by its path.

    Args:
        source: The model as it came, whose metadata the product keeps.
        repaired: The repaired float32 model.
        rewritten: The same in the form for static quantization; for other recipes the repaired one.
        wanted: How to quantize it, and what stays in float.
        ranges: File of the ranges of activations, for static recipes.
        means: File of the mean inputs of layers; None leaves biases as they are.
    """

    source: Path
    repaired: Path
    rewritten: Path
    wanted: OnnxRequest
    ranges: Path | None = None
    means: Path | None = None


def quantize(task: QuantizeTask, target: Path) -> int:
    """Quantize a model into a file; return how many biases were corrected.

    Raises:
        ToolError: ONNX Runtime's quantizer fails.
    """
    import onnx

    wanted = task.wanted
    try:
        with _quiet():
            if wanted.needs_ranges:
                _static(task, target)
            elif wanted.recipe == "fp16":
                _half(task.repaired, target, wanted)
            else:
                _dynamic(task.repaired, target, wanted)
    except ToolError:
        raise
    except (ValueError, KeyError, TypeError, RuntimeError, NotImplementedError, AssertionError, AttributeError) as error:
        what = f"ONNX Runtime's quantizer fails with recipe {wanted.recipe}"
        raise ToolError(what, where=task.source, got=plain_reason(error)) from None
    if not target.is_file():
        raise ToolError(f"ONNX Runtime's quantizer wrote nothing with recipe {wanted.recipe}", where=task.source)
    product = onnx.load(str(target.absolute()))
    corrected = 0
    if task.means is not None and wanted.recipe != "fp16":
        with np.load(task.means) as held:
            names = json.loads(str(held["names"]))
            known = {name: held[f"mean_{number}"] for number, name in enumerate(names) if name not in wanted.float_layers}
        corrected = correct(task.repaired, product, known)
    if wanted.recipe != "fp16":
        quantize_weights_only(product, weights_only(read_model(task.repaired)), _floats(wanted, task.repaired))
    if wanted.needs_ranges:
        shield_cubic_resizes(product)
    if wanted.needs_ranges and wanted.settings.format == "qdq":
        read_unrounded(product)
        shield_floats(product)
    del product.metadata_props[:]
    product.metadata_props.extend(read_model(task.source).metadata_props)
    is_large = sum(tensor.ByteSize() for tensor in product.graph.initializer) > MAX_PROTOBUF_BYTES - NARROW
    write(product, target, is_large=is_large)
    return corrected


def _dynamic(model: Path, target: Path, wanted: OnnxRequest) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    settings, kinds, proto = wanted.settings, _kinds(wanted, "IntegerOpsRegistry"), read_model(model)
    gemms = [node.name for node in proto.graph.node if node.op_type == "Gemm"]
    is_gemm_float = "Gemm" in wanted.float_op_types or "Gemm" not in settings.op_types
    float_gemms = [name for name in gemms if name in wanted.float_layers or is_gemm_float]
    with _alias(model) as source:
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=kinds,
            per_channel=settings.per_channel,
            reduce_range=settings.reduce_range,
            weight_type=QuantType.from_string(f"Q{_type_name(settings.weight_type)}"),
            # The library makes a MatMul of each Gemm first, and names it so.
            nodes_to_exclude=[*wanted.float_layers, *weights_only(proto), *(f"{name}_MatMul" for name in float_gemms)],
            use_external_data_format=_is_large(model),
            extra_options={} if settings.symmetric_weights is None else {"WeightSymmetric": settings.symmetric_weights},
        )


def _static(task: QuantizeTask, target: Path) -> None:
    """Quantize a rewritten model, some of whose Gemms may be matrix products of the repaired one: MatMul's settings hold there."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    wanted, settings = task.wanted, task.wanted.settings
    products = {node.name for node in read_model(task.repaired).graph.node if node.op_type == "MatMul"}
    options: dict[str, Any] = {"ActivationSymmetric": settings.symmetric_activations}
    if settings.symmetric_weights is not None:
        options["WeightSymmetric"] = settings.symmetric_weights
    proto = read_model(task.rewritten)
    is_qdq = settings.format == "qdq"
    kinds = _kinds(wanted, "QDQRegistry" if is_qdq else "QLinearOpsRegistry")
    gemms = [node.name for node in proto.graph.node if node.op_type == "Gemm"]
    idle = [name for name in gemms if ("MatMul" if name in products else "Gemm") not in kinds]
    if len(idle) < len(gemms) and "Gemm" not in kinds:
        kinds.append("Gemm")
    if is_qdq:
        options["OpTypesToExcludeOutputQuantization"] = list(AS_FLOAT)
    assert task.ranges is not None
    ranges = read_ranges(task.ranges)
    left = {
        *wanted.float_layers,
        *idle,
        *matrix_products(proto),
        *mends.kept_activations(proto, is_qdq=is_qdq),
        *weights_only(proto),
    }
    left |= set(unranged(proto, kinds, ranges)) | set(before_rounding(proto, LAYERS, ranges))
    types = settings.weight_type, settings.activation_type
    raised = mends.raise_dead_channels(proto, task.rewritten.parent, ranges, *types, per_channel=settings.per_channel)
    with _alias(task.rewritten, proto if raised else None) as source:
        quantize_static(
            source,
            target,
            None,  # the ranges are there already
            calibration_cache_path=str(task.ranges),
            calibrate_method=CalibrationMethod.MinMax,  # as `tools.quantize_onnx.ranges` notes them
            quant_format=QuantFormat.QDQ if is_qdq else QuantFormat.QOperator,
            op_types_to_quantize=kinds,
            per_channel=settings.per_channel,
            reduce_range=settings.reduce_range,
            activation_type=QuantType.from_string(f"Q{_type_name(settings.activation_type)}"),
            weight_type=QuantType.from_string(f"Q{_type_name(settings.weight_type)}"),
            nodes_to_exclude=sorted(left),
            use_external_data_format=_is_large(task.rewritten),
            extra_options=options,
        )


def _floats(wanted: OnnxRequest, model: Path) -> set[str]:
    """Return the nodes that stay in float, by name or by op type."""
    kinds = {*wanted.float_op_types, *({"ConvTranspose", "MatMul"} - set(wanted.settings.op_types))}
    return {*wanted.float_layers, *(node.name for node in read_model(model).graph.node if node.op_type in kinds)}


@contextlib.contextmanager
def _alias(model: Path, changed: Model | None = None) -> Iterator[Path]:
    """Yield a second name of a model in its folder, or a file of what it has been changed to, for one call of the quantizer.

    ONNX Runtime 1.31 writes `<name>-inferred.onnx` next to the model and deletes it: candidates that are made at the same time from
    one name take it from each other. Can go when the library writes to a folder of its own.
    """
    alias = model.with_name(f"{uuid.uuid4().hex}.onnx")
    if changed is None:
        alias.symlink_to(model.name)
    else:
        alias.write_bytes(changed.SerializeToString())
    try:
        yield alias
    finally:
        for path in (alias, alias.with_name(f"{alias.stem}-inferred.onnx")):
            path.unlink(missing_ok=True)


def _half(model: Path, target: Path, wanted: OnnxRequest) -> None:
    import onnx
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    proto = onnx.load(str(model.absolute()))
    halved = convert_float_to_float16(
        proto,
        keep_io_types=True,
        disable_shape_infer=True,  # done in the repair, and impossible above 2 GiB
        op_block_list=[*DEFAULT_OP_BLOCK_LIST, *wanted.float_op_types],
        node_block_list=list(wanted.float_layers),
    )
    mends.drop_repeated_nodes(halved)
    del halved.graph.value_info[:]  # it notes some tensors as float32 that are float16 now
    write(
        halved,
        target,
        is_large=_is_large(model) and sum(t.ByteSize() for t in halved.graph.initializer) > MAX_PROTOBUF_BYTES - NARROW,
    )


def _kinds(wanted: OnnxRequest, registry: str) -> list[str]:
    """Return the op types to quantize: those asked for that this form of the quantizer knows, in a fixed order."""
    from onnxruntime.quantization import registry as known

    names = set(getattr(known, registry)) | (set(known.QLinearOpsRegistry) if registry == "QDQRegistry" else set())
    return [name for name in wanted.settings.op_types if name in names and name not in wanted.float_op_types]


def _type_name(name: str) -> str:
    """Return int8 as Int8, uint8 as UInt8."""
    return name.replace("uint", "UInt").replace("int", "Int")


def _is_large(model: Path) -> bool:
    return bool(external_files(model))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's advice to run what has been run already off the log, and its progress off stdout."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
