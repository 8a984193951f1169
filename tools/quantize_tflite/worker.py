"""The process behind `tools.quantize_tflite`: AI Edge Quantizer, with both files memory-mapped."""

import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.calibration.dataset import CalibrationSet
from shared.command.errors import ToolError
from shared.formats.tensors import TensorSpec
from shared.runtime.processes import Arrays, Message
from shared.runtime.workarounds import large_weights_quantized
from tools.quantize_tflite.candidates import Subject, corrected
from tools.quantize_tflite.repair import repair, shorten_names


def repair_model(source: str, target: str, *, add_signature: bool) -> dict[str, int]:
    """Write the repaired model; return how many things of each kind were repaired."""
    return vars(repair(Path(source), Path(target), add_signature=add_signature))


def calibrate(  # noqa: PLR0917 - called by name
    source: str, statistics: str, rules: list[Any], samples: dict[str, Any], threads: int, model_sha256: str
) -> dict[str, int]:
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


def quantize(source: str, draft: str, rules: list[Any], statistics: str | None, samples: dict[str, Any] | None) -> dict[str, int]:
    """Quantize `source` by `rules` into `draft`, through a mapping, never in memory; correct biases where there are samples."""
    from ai_edge_quantizer import quantizer
    from ai_edge_quantizer.utils.calibration_utils import load_calibration_results

    try:
        job = quantizer.Quantizer(source, rules)
        ranges = load_calibration_results(statistics)[0] if statistics else None
    except (ValueError, KeyError, TypeError) as error:
        raise ToolError("AI Edge Quantizer rejects the recipe or the model", where=source, got=error) from None
    with large_weights_quantized():
        job.quantize(ranges, serialize_to_path=draft, enable_progress_bar=False, enable_progress_report=False)
    if samples is None:
        return {"corrected": 0}
    subject = Subject(Path(source), "", _set(samples))  # our parent's own file: nobody compares its hash
    with Path(draft).open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        return {"corrected": corrected(subject, content)}


def _set(samples: dict[str, Any]) -> CalibrationSet:
    return CalibrationSet(Path(samples["path"]), samples["input_range"], samples["most"])


def shorten(source: str, target: str) -> dict[str, int]:
    """Write the model with short names for its inner tensors."""
    return {"saved": shorten_names(Path(source), Path(target))}


WORK: dict[str, Callable[..., dict[str, int]]] = {
    "repair": repair_model,
    "calibrate": calibrate,
    "quantize": quantize,
    "shorten": shorten,
}


def handle(message: Message, _: Arrays) -> tuple[Message, Arrays]:
    """Do one piece of work: {"do": name, its arguments}."""
    os.environ["TQDM_DISABLE"] = "1"
    return dict(WORK[message.pop("do")](**message)), {}
