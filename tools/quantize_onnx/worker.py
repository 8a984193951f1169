"""The process behind `tools.quantize_onnx`: onnx and onnxruntime.quantization on a stranger's model."""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from shared.calibration.dataset import CalibrationSet, Sample
from shared.command.errors import ToolError, first_line
from shared.formats.onnx_file import MAX_PROTOBUF_BYTES, external_files, read_model
from shared.formats.tensors import TensorSpec
from shared.runtime.processes import Arrays, Message
from tools.quantize_onnx.repair import NARROW, repair, write
from tools.quantize_onnx.rewrite import AS_FLOAT, matrix_products, shield_floats, write_spelled
from tools.quantize_onnx.settings import Settings


def repair_model(source: str, target: str) -> dict[str, Any]:
    """Write the repaired model; return how many things of each kind were repaired."""
    return asdict(repair(Path(source), Path(target)))


def spell(model: str, target: str) -> dict[str, Any]:
    """Write the model in the form that static quantization makes most of; see `tools.quantize_onnx.rewrite`."""
    changed, kept = write_spelled(Path(model), Path(target))
    return {"changed": changed, "kept": kept}


def find_ranges(model: str, target: str, settings: dict[str, Any], samples: dict[str, Any], inputs: list[Any]) -> dict[str, Any]:
    """Write the ranges of a model's activations, in onnxruntime.quantization's form; return how many there are."""
    from onnxruntime.quantization.calibrate import save_tensors_data

    from tools.quantize_onnx import ranges

    wanted, augmented = _settings(settings), Path(model).with_name("augmented.onnx")
    op_types = (*wanted.op_types, *(("Gemm",) if "MatMul" in wanted.op_types else ()))
    found = ranges.find_ranges(Path(model), augmented, op_types, _Samples(samples, inputs), wanted.method)
    save_tensors_data(found, target)
    augmented.unlink(missing_ok=True)
    return {"tensors": len(found.data)}


def find_means(model: str, target: str, samples: dict[str, Any], inputs: list[Any]) -> dict[str, Any]:
    """Write the mean inputs of a model's layers; return how many there are."""
    from tools.quantize_onnx.bias import mean_inputs

    augmented = Path(model).with_name("augmented.onnx")
    found = mean_inputs(Path(model), augmented, _Samples(samples, inputs))
    augmented.unlink(missing_ok=True)
    names = list(found)
    arrays: dict[str, Any] = {f"mean_{number}": found[name] for number, name in enumerate(names)}
    np.savez(target, names=np.array(json.dumps(names)), **arrays)
    return {"layers": len(found)}


def quantize(  # noqa: PLR0917 - called by name
    model: str, repaired: str, target: str, settings: dict[str, Any], ranges: str | None, means: str | None, source: str
) -> dict[str, Any]:
    """Quantize a model, the repaired one or that in another form, into `target`; return how many biases were corrected."""
    import onnx

    wanted = _settings(settings)
    try:
        with _quiet():
            if wanted.mode == "static":
                _static(Path(model), Path(target), wanted, ranges, _matrix_products(Path(repaired)))
            else:
                {"dynamic": _dynamic, "fp16": _half}[wanted.mode](Path(model), Path(target), wanted)
    except ToolError:
        raise
    except (ValueError, KeyError, TypeError, RuntimeError, NotImplementedError, AssertionError, AttributeError) as error:
        raise ToolError(f"ONNX Runtime's quantizer fails in mode {wanted.mode}", where=source, got=first_line(error)) from None
    if not Path(target).is_file():
        raise ToolError(f"ONNX Runtime's quantizer wrote nothing in mode {wanted.mode}", where=source)
    product = onnx.load(str(Path(target).absolute()))
    corrected = 0
    if means is not None and wanted.mode != "fp16":
        from tools.quantize_onnx.bias import correct

        with np.load(means) as held:
            names = json.loads(str(held["names"]))
            known = {name: held[f"mean_{number}"] for number, name in enumerate(names) if name not in wanted.kept}
        corrected = correct(Path(repaired), product, known)
    if wanted.mode == "static" and wanted.form == "qdq":
        shield_floats(product)
    del product.metadata_props[:]
    product.metadata_props.extend(read_model(Path(source)).metadata_props)
    is_large = sum(tensor.ByteSize() for tensor in product.graph.initializer) > MAX_PROTOBUF_BYTES - NARROW
    write(product, Path(target), is_large=is_large)
    return {"corrected": corrected}


def _dynamic(model: Path, target: Path, wanted: Settings) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    kinds = _kinds(wanted, "IntegerOpsRegistry")
    gemms = [node.name for node in read_model(model).graph.node if node.op_type == "Gemm"]
    kept = [name for name in gemms if name in wanted.kept or "Gemm" in wanted.kept_op_types or "Gemm" not in wanted.op_types]
    quantize_dynamic(
        model,
        target,
        op_types_to_quantize=kinds,
        per_channel=wanted.per_channel,
        reduce_range=wanted.reduce_range,
        weight_type=QuantType.from_string(f"Q{_type_name(wanted.weight_type)}"),
        nodes_to_exclude=[*wanted.kept, *(f"{name}_MatMul" for name in kept)],  # what the library makes of a Gemm first
        use_external_data_format=_is_large(model),
        extra_options={} if wanted.symmetric_weights is None else {"WeightSymmetric": wanted.symmetric_weights},
    )


def _matrix_products(model: Path) -> set[str]:
    return {node.name for node in read_model(model).graph.node if node.op_type == "MatMul"}


def _static(model: Path, target: Path, wanted: Settings, ranges: str | None, products: set[str]) -> None:
    """Quantize a model, some of whose Gemms may be `products` of the repaired one: these go by what is said of MatMul."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    options: dict[str, Any] = {"ActivationSymmetric": wanted.symmetric_activations}
    if wanted.symmetric_weights is not None:
        options["WeightSymmetric"] = wanted.symmetric_weights
    proto = read_model(model)
    kinds = _kinds(wanted, "QDQRegistry" if wanted.form == "qdq" else "QLinearOpsRegistry")
    gemms = [node.name for node in proto.graph.node if node.op_type == "Gemm"]
    idle = [name for name in gemms if ("MatMul" if name in products else "Gemm") not in kinds]
    if len(idle) < len(gemms) and "Gemm" not in kinds:
        kinds.append("Gemm")
    if wanted.form == "qdq":
        options["OpTypesToExcludeOutputQuantization"] = list(AS_FLOAT)
    quantize_static(
        model,
        target,
        None,  # the ranges are there already
        calibration_cache_path=ranges,
        calibrate_method=CalibrationMethod.MinMax,  # as `tools.quantize_onnx.ranges` has them noted
        quant_format=QuantFormat.QDQ if wanted.form == "qdq" else QuantFormat.QOperator,
        op_types_to_quantize=kinds,
        per_channel=wanted.per_channel,
        reduce_range=wanted.reduce_range,
        activation_type=QuantType.from_string(f"Q{_type_name(wanted.activation_type)}"),
        weight_type=QuantType.from_string(f"Q{_type_name(wanted.weight_type)}"),
        nodes_to_exclude=[*wanted.kept, *idle, *matrix_products(proto)],
        use_external_data_format=_is_large(model),
        extra_options=options,
    )


def _half(model: Path, target: Path, wanted: Settings) -> None:
    import onnx
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    proto = onnx.load(str(model.absolute()))
    halved = convert_float_to_float16(
        proto,
        keep_io_types=True,
        disable_shape_infer=True,  # done in the repair, and impossible above 2 GiB
        op_block_list=[*DEFAULT_OP_BLOCK_LIST, *wanted.kept_op_types],
        node_block_list=list(wanted.kept),
    )
    del halved.graph.value_info[:]  # it notes some tensors as float32 that are float16 now
    write(
        halved,
        target,
        is_large=_is_large(model) and sum(t.ByteSize() for t in halved.graph.initializer) > MAX_PROTOBUF_BYTES - NARROW,
    )


def _kinds(wanted: Settings, registry: str) -> list[str]:
    """Return the op types to quantize: those asked for that this form of the quantizer knows, in a fixed order."""
    from onnxruntime.quantization import registry as known

    names = set(getattr(known, registry)) | (set(known.QLinearOpsRegistry) if registry == "QDQRegistry" else set())
    return [name for name in wanted.op_types if name in names and name not in wanted.kept_op_types]


def _type_name(name: str) -> str:
    """Return int8 as Int8, uint8 as UInt8."""
    return name.replace("uint", "UInt").replace("int", "Int")


def _is_large(model: Path) -> bool:
    return bool(external_files(model))


def _settings(content: dict[str, Any]) -> Settings:
    return TypeAdapter(Settings).validate_python(content)


class _Samples:
    """Samples of a calibration set by input name; can be iterated over again."""

    def __init__(self, content: dict[str, Any], inputs: list[Any]) -> None:
        self._set = CalibrationSet(Path(content["path"]), content["input_range"], content["most"], content["part"])
        self._inputs = [TensorSpec(name, tuple(shape), dtype) for name, shape, dtype in inputs]

    def __iter__(self) -> Iterator[Sample]:
        return self._set.samples(self._inputs)


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


WORK: dict[str, Callable[..., dict[str, Any]]] = {
    "repair": repair_model,
    "spell": spell,
    "ranges": find_ranges,
    "means": find_means,
    "quantize": quantize,
}


def handle(message: Message, _: Arrays) -> tuple[Message, Arrays]:
    """Do one piece of work: {"do": name, its arguments}."""
    return dict(WORK[message.pop("do")](**message)), {}
