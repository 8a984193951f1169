"""The worker process of `tools.quantize_tflite`: AI Edge Quantizer, with both files memory-mapped."""

import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from shared.calibration.dataset import CalibrationSet
from shared.command.errors import ToolError, plain_reason
from shared.formats.tensors import INFINITE_FROM, by_signature
from shared.formats.tflite import constant_span, enum_names, op_type, open_flatbuffer, tensor_name
from shared.runtime.processes import Message, answer_tasks
from shared.runtime.tflite import model_specs
from shared.runtime.workarounds import large_weights_quantized
from tools.quantize_tflite.bundle import copy_appended_zip
from tools.quantize_tflite.candidates import Subject, corrected
from tools.quantize_tflite.graph.repair import cut_before_custom_ops, needed_repairs, repair, shorten_names

INFINITE_CARRIERS = {
    "ADD",
    "SUB",
    "SELECT",
    "SELECT_V2",
    "PAD",
    "PADV2",
    "CONCATENATION",
    "BROADCAST_TO",
}  # give an infinite operand on
INFINITE_CARRIERS |= {"RESHAPE", "TRANSPOSE", "SLICE", "STRIDED_SLICE", "SPLIT", "SQUEEZE", "EXPAND_DIMS", "GATHER", "TILE"}
NO_RANGE = "its values are infinite, such as those of a mask"
FED = "signatures"  # in the metadata of statistics: those that had samples
NO_SAMPLES = "the samples have no inputs for its signature"
CHUNK_BYTES = 2**24
# Op types whose constants are weights, biases or scales.
WITH_WEIGHTS = {"CONV_2D", "CONV_3D", "CONV_3D_TRANSPOSE", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV", "BATCH_MATMUL"}
WITH_WEIGHTS |= {"EMBEDDING_LOOKUP", "MUL", "DIV", "PRELU", "UNIDIRECTIONAL_SEQUENCE_LSTM", "BIDIRECTIONAL_SEQUENCE_LSTM"}
CONSTANT_CARRIERS = {"DEQUANTIZE", "DENSIFY", "RESHAPE", "TRANSPOSE", "CAST"}  # that a constant may pass on its way to a layer
NAMED = "named.tflite"  # next to a draft with short names: the same with its own


def repair_model(source: str, target: str, *, add_signature: bool) -> Message:
    """Check that a model's weights are finite; write the repaired model where there is something to repair or a signature to add.

    Returns:
        Whether there is a file, and what was repaired, in words.
    """
    require_finite(Path(source))
    needed = str(needed_repairs(Path(source)))
    if not needed and not add_signature:
        return {"written": False, "repairs": ""}
    repair(Path(source), Path(target), add_signature=add_signature)
    return {"written": True, "repairs": needed}


def require_finite(path: Path) -> None:
    """Raise ToolError where a weight, a bias or a scale of a layer is NaN or infinite; reads all once, at the speed of memory.

    Other constants may be infinite: masks of attention, limits and paddings are.
    """
    with open_flatbuffer(path) as model, path.open("rb") as file:
        kinds = [op_type(model.OperatorCodes(i)) for i in range(model.OperatorCodesLength())]
        faults = []
        for graph in (model.Subgraphs(g) for g in range(model.SubgraphsLength())):
            for tensor in (graph.Tensors(t) for t in _layer_constants(graph, kinds)):
                dtype = {"FLOAT32": np.float32, "FLOAT16": np.float16}.get(enum_names("TensorType")[tensor.Type()])
                if dtype is not None and (span := constant_span(model, tensor)) is not None:
                    bad = _count_not_finite(file, span, np.dtype(dtype))
                    faults += [f"{tensor_name(tensor)} ({bad} values)"] if bad else []
    if faults:
        got = f"{len(faults)} tensors, the first {faults[0]}"
        raise ToolError("the model holds NaN or infinite weights", where=path, got=got, remedy="train or export it again")


def _layer_constants(graph: Any, kinds: list[str]) -> list[int]:
    """Return the numbers of the tensors that layers read, and of those that ops turn into these."""
    ops = [graph.Operators(i) for i in range(graph.OperatorsLength())]
    makers = {op.Outputs(k): op for op in ops for k in range(op.OutputsLength())}
    found: dict[int, None] = {}
    waiting = [op.Inputs(k) for op in ops if kinds[op.OpcodeIndex()] in WITH_WEIGHTS for k in range(op.InputsLength())]
    while waiting:
        number = waiting.pop()
        if number < 0 or number in found:
            continue
        found[number] = None
        maker = makers.get(number)
        if maker is not None and kinds[maker.OpcodeIndex()] in CONSTANT_CARRIERS:
            waiting += [maker.Inputs(k) for k in range(maker.InputsLength())]
    return sorted(found)


def _count_not_finite(file: IO[bytes], span: tuple[int, int], dtype: np.dtype[Any]) -> int:
    bad = 0
    file.seek(span[0])
    for start in range(span[0], span[1], CHUNK_BYTES):
        values = np.frombuffer(file.read(min(CHUNK_BYTES, span[1] - start)), dtype)
        with np.errstate(all="ignore"):
            if not np.isfinite(values.sum(dtype=np.float32)):  # a sum is several times faster; it may overflow
                bad += int((~np.isfinite(values)).sum())
    return bad


def cut(source: str, target: str) -> Message:
    """Write the part of a model that runs without its custom ops; return whether there is any."""
    return {"written": cut_before_custom_ops(Path(source), Path(target))}


def calibrate(  # noqa: PLR0917 - called by name
    source: str, statistics: str, rules: list[Any], samples: dict[str, Any], threads: int, model_sha256: str
) -> Message:
    """Run the model on every sample, one at a time, and write the range of each tensor, in AI Edge Quantizer's form.

    The ranges are the smallest and the largest value seen: the library's moving average would depend on the samples' order.
    """
    from ai_edge_quantizer.calibrator import Calibrator
    from ai_edge_quantizer.recipe_manager import RecipeManager
    from ai_edge_quantizer.utils.qsv_utils import min_max_update

    manager = RecipeManager()
    manager.load_quantization_recipe(rules)
    calibrator = Calibrator(source, num_threads=threads, qsv_update_func=min_max_update)
    only = next(iter(calibrator.get_signature_list()))
    inputs, _ = model_specs(calibrator._tfl_interpreter)  # noqa: SLF001 - the library shows it nowhere else
    count, fed = 0, set()
    for sample in CalibrationSet.from_message(samples).samples(inputs):
        given = {spec: sample[spec.name] for spec in inputs if spec.name in sample}
        for group in by_signature(given):  # one by one: it makes a list of what it is given
            calibrator.calibrate({group[0].signature or only: [{spec.own_name: given[spec] for spec in group}]}, manager)
            fed.add(group[0].signature or only)
        count += 1
    noted = {"model_sha256": model_sha256, "samples": str(count), FED: json.dumps(sorted(fed))}
    calibrator.save_calibration_result(statistics, noted)
    return {"samples": count}


def find_without_range(source: str, statistics: str) -> Message:
    """Return the scopes of ops that can't be quantized by ranges, and why.

    They are at a tensor whose values are infinite, such as a mask of attention, or in the graph of a signature without samples; the
    statistics name those that had some.
    Magnitudes from INFINITE_FROM on count as infinite. Ranges of activations leave infinite values out; they follow from constants.
    """
    from ai_edge_quantizer.utils.calibration_utils import load_calibration_results

    ranges, noted = load_calibration_results(statistics)
    found = {}
    with open_flatbuffer(Path(source)) as model:
        kinds = [op_type(model.OperatorCodes(i)) for i in range(model.OperatorCodesLength())]
        unfed = _unfed_graphs(model, noted.get(FED))
        for number, graph in ((g, model.Subgraphs(g)) for g in range(model.SubgraphsLength())):
            tensors = [graph.Tensors(t) for t in range(graph.TensorsLength())]
            ops = [graph.Operators(i) for i in range(graph.OperatorsLength())]
            infinite = {place for place, tensor in enumerate(tensors) if _is_unbounded(Path(source), model, tensor, ranges)}
            for op in ops:
                outputs = [op.Outputs(k) for k in range(op.OutputsLength())]
                scope = "".join(f"{tensor_name(tensors[place])};" for place in outputs)
                if number in unfed:
                    found[scope] = NO_SAMPLES
                reads = infinite & {op.Inputs(k) for k in range(op.InputsLength())}
                if reads and kinds[op.OpcodeIndex()] in INFINITE_CARRIERS:
                    infinite |= set(outputs)
                if reads or infinite & set(outputs):
                    found[scope] = NO_RANGE
    return {"scopes": found}


def _unfed_graphs(model: Any, fed: str | None) -> set[int]:
    """Return the graphs of signatures that none of the samples was for; `fed` names the others, in JSON."""
    if fed is None:  # statistics of another tool
        return set()
    signatures = [model.SignatureDefs(i) for i in range(model.SignatureDefsLength())]
    used = {one.SubgraphIndex() for one in signatures if one.SignatureKey().decode() in json.loads(fed)}
    return {one.SubgraphIndex() for one in signatures} - used


def _is_unbounded(source: Path, model: Any, tensor: Any, ranges: Mapping[str, Any]) -> bool:
    if enum_names("TensorType")[tensor.Type()] != "FLOAT32":
        return False
    known = ranges.get(tensor_name(tensor))
    if known:
        values = np.array([np.min(known["min"]), np.max(known["max"])])
    elif span := constant_span(model, tensor):
        values = np.fromfile(source, np.float32, (span[1] - span[0]) // 4, offset=span[0])
    else:
        return False
    return not bool((np.abs(values) < INFINITE_FROM).all())  # also for NaN


def quantize(  # noqa: PLR0917 - called by name
    original: str,
    source: str,
    draft: str,
    rules: list[Any],
    statistics: str | None,
    samples: dict[str, Any] | None,
    *,
    short_names: bool,
) -> Message:
    """Quantize `source` by `rules` into `draft`, through a mapping, never in memory; correct biases where there are samples.

    Args:
        original: The model as it came, whose appended files the product gets.
        source: The repaired model.
        draft: The file to write.
        rules: Of the recipe.
        statistics: File of calibration statistics.
        samples: Samples to correct biases with.
        short_names: Whether inner tensors get short names.

    Returns:
        How many biases were corrected, and how many bytes short names saved.
    """
    from ai_edge_quantizer import quantizer
    from ai_edge_quantizer.utils.calibration_utils import load_calibration_results

    try:
        job = quantizer.Quantizer(source, rules)
        ranges = load_calibration_results(statistics)[0] if statistics else None
    except (ValueError, KeyError, TypeError) as error:
        raise ToolError("AI Edge Quantizer rejects the recipe or the model", where=source, got=plain_reason(error)) from None
    Path(draft).touch()  # else AI Edge LiteRT's writer makes it executable
    with large_weights_quantized():
        job.quantize(ranges, serialize_to_path=draft, enable_progress_bar=False, enable_progress_report=False)
    changed = 0
    if samples is not None:
        subject = Subject(Path(source), "", calibration=CalibrationSet.from_message(samples))
        with Path(draft).open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
            changed = corrected(subject, content)
    saved = 0
    if short_names:
        named = Path(draft).with_name(NAMED)
        Path(draft).replace(named)
        Path(draft).touch()
        saved = shorten_names(named, Path(draft))
    copy_appended_zip(Path(original), Path(draft))
    return {"corrected": changed, "saved": saved}


os.environ["TQDM_DISABLE"] = "1"
handle = answer_tasks(
    {"repair": repair_model, "cut": cut, "calibrate": calibrate, "without_range": find_without_range, "quantize": quantize}
)
