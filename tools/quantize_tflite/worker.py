"""The worker process of `tools.quantize_tflite`: AI Edge Quantizer, with both files memory-mapped."""

import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shared.calibration.dataset import CalibrationSet
from shared.command.errors import ToolError
from shared.formats.tensors import INFINITE_FROM, TensorSpec
from shared.formats.tflite import constant_span, enum_names, op_type, open_flatbuffer, require_finite
from shared.formats.tflite_metadata import copy_appended_zip
from shared.runtime.processes import Message, answer_tasks
from shared.runtime.workarounds import large_weights_quantized
from tools.quantize_tflite.candidates import Subject, corrected
from tools.quantize_tflite.repair import cut_before_custom_ops, needed_repairs, repair, shorten_names

CARRIERS = {"ADD", "SUB", "SELECT", "SELECT_V2", "PAD", "PADV2", "CONCATENATION", "BROADCAST_TO"}  # give an infinite operand on
CARRIERS |= {"RESHAPE", "TRANSPOSE", "SLICE", "STRIDED_SLICE", "SPLIT", "SQUEEZE", "EXPAND_DIMS", "GATHER", "TILE"}
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
    (signature, *others) = calibrator.get_signature_list()
    if others:
        remedy = "calibrate a model with one signature"
        raise ToolError("the model has several signatures", where=source, got=f"{signature}, {', '.join(others)}", remedy=remedy)
    runner = calibrator._tfl_interpreter.get_signature_runner(signature)  # noqa: SLF001 - the library shows it nowhere else
    details = runner.get_input_details()
    inputs = [TensorSpec(name, tuple(map(int, d["shape"])), d["dtype"].__name__) for name, d in details.items()]
    count = 0
    for sample in _set(samples).samples(inputs):
        calibrator.calibrate({signature: [sample]}, manager)  # one by one: it makes a list of what it is given
        count += 1
    calibrator.save_calibration_result(statistics, {"model_sha256": model_sha256, "samples": str(count)})
    return {"samples": count}


def find_unbounded(source: str, statistics: str) -> Message:
    """Return the scopes of ops at a tensor whose values are infinite, such as a mask of attention: they can't be quantized.

    Magnitudes from INFINITE_FROM on count as infinite. Ranges of activations leave infinite values out; they follow from constants.
    """
    from ai_edge_quantizer.utils.calibration_utils import load_calibration_results

    ranges = load_calibration_results(statistics)[0]
    found = []
    with open_flatbuffer(Path(source)) as model:
        kinds = [op_type(model.OperatorCodes(i)) for i in range(model.OperatorCodesLength())]
        for graph in (model.Subgraphs(g) for g in range(model.SubgraphsLength())):
            tensors = [graph.Tensors(t) for t in range(graph.TensorsLength())]
            infinite = {number for number, tensor in enumerate(tensors) if _is_unbounded(Path(source), model, tensor, ranges)}
            for op in (graph.Operators(i) for i in range(graph.OperatorsLength())):
                outputs = [op.Outputs(k) for k in range(op.OutputsLength())]
                reads = infinite & {op.Inputs(k) for k in range(op.InputsLength())}
                if reads and kinds[op.OpcodeIndex()] in CARRIERS:
                    infinite |= set(outputs)
                if reads or infinite & set(outputs):
                    found.append("".join(f"{(tensors[number].Name() or b'').decode()};" for number in outputs))
    return {"scopes": found}


def _is_unbounded(source: Path, model: Any, tensor: Any, ranges: Mapping[str, Any]) -> bool:
    if enum_names("TensorType")[tensor.Type()] != "FLOAT32":
        return False
    known = ranges.get((tensor.Name() or b"").decode())
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
        raise ToolError("AI Edge Quantizer rejects the recipe or the model", where=source, got=error) from None
    Path(draft).touch()  # else AI Edge LiteRT's writer makes it executable
    with large_weights_quantized():
        job.quantize(ranges, serialize_to_path=draft, enable_progress_bar=False, enable_progress_report=False)
    changed = 0
    if samples is not None:
        subject = Subject(Path(source), "", calibration=_set(samples))
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


def _set(samples: dict[str, Any]) -> CalibrationSet:
    return CalibrationSet(Path(samples["path"]), samples["input_range"], samples["most"], samples["part"])


os.environ["TQDM_DISABLE"] = "1"
handle = answer_tasks(
    {"repair": repair_model, "cut": cut, "calibrate": calibrate, "unbounded": find_unbounded, "quantize": quantize}
)
