"""Where an ONNX model is worked on: each piece of work once, in a process of its own, its result in a folder of the run."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from shared.calibration.dataset import CalibrationSet
from shared.command.cli import step
from shared.command.errors import ToolError
from shared.runtime.processes import Child, ChildError
from tools.quantize_onnx import worker
from tools.quantize_onnx.evaluation import Samples
from tools.quantize_onnx.range_cache import RangeCache, key_of
from tools.quantize_onnx.repair import Repairs
from tools.quantize_onnx.settings import Settings

TIMEOUT_S = 3600.0
DOING = {
    "repair": "repair the model",
    "spell": "rewrite the model",
    "ranges": "find the ranges of its activations",
    "means": "find the means of its activations",
    "quantize": "quantize the model",
}


@dataclass(frozen=True)
class Quantized:
    """A quantized model.

    Args:
        settings: How it was quantized.
        path: The file; the next one of this mode takes its place.
        corrected: Layers whose bias was corrected.
        reasons: Name of a node that stays in float -> why.
        searched: Candidates that a search ran to find it.
    """

    settings: Settings
    path: Path
    corrected: int
    reasons: dict[str, str]
    searched: int = 0


class Workshop:
    """Does `tools.quantize_onnx.worker`'s work; use with `with`.

    Args:
        source: The model as it came.
        folder: An empty folder.
    """

    def __init__(self, source: Path, folder: Path) -> None:
        self.float_model = folder / "float.onnx"
        self.peak_rss_bytes = 0
        self._source, self._folder = source, folder
        self._child = Child(worker, TIMEOUT_S)
        self._static_form: tuple[Path, tuple[str, ...]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._child.__exit__(kind, error, trace)

    def repair(self) -> Repairs:
        """Write `float_model`, and return what was repaired."""
        with step(f"repair {self._source.name}"):
            return Repairs(**self._work("repair", source=str(self._source), target=str(self.float_model)))

    def quantize(
        self, settings: Settings, reasons: dict[str, str], samples: Samples, *, corrects_bias: bool, range_cache: Path | None
    ) -> Quantized:
        """Quantize the repaired model; nodes in `reasons` stay in float."""
        is_static = settings.mode == "static"
        model, spelled = self._spelled() if is_static else (self.float_model, ())
        settings = replace(settings, kept=tuple(sorted({*reasons, *spelled})))
        target = self._folder / f"{settings.mode}.onnx"
        corrects = corrects_bias and samples.calibration is not None and settings.mode != "fp16"
        reply = self._work(
            "quantize",
            model=str(model),
            repaired=str(self.float_model),
            target=str(target),
            settings=asdict(settings),
            ranges=str(self._ranges(settings, samples, range_cache)) if is_static else None,
            means=str(self._means(samples)) if corrects else None,
            source=str(self._source),
        )
        return Quantized(settings, target, int(reply["corrected"]), reasons)

    def _work(self, what: str, **arguments: Any) -> dict[str, Any]:
        try:
            reply, _ = self._child.ask({"do": what, **arguments})
        except ChildError as error:
            raise ToolError(f"could not {DOING[what]}", where=self._source, got=error) from None
        self.peak_rss_bytes = max(self.peak_rss_bytes, self._child.peak_rss_bytes)
        reply.pop("peak_rss_bytes")
        return reply

    def _spelled(self) -> tuple[Path, tuple[str, ...]]:
        """Return the model in the form for static quantization, and which of its nodes must stay in float."""
        if self._static_form is None:
            target = self._folder / "spelled.onnx"
            reply = self._work("spell", model=str(self.float_model), target=str(target))
            self._static_form = target if reply["changed"] else self.float_model, tuple(reply["kept"])
        return self._static_form

    def _ranges(self, settings: Settings, samples: Samples, cache_path: Path | None) -> Path:
        """Return the file of ranges, found now, in this run, or in an earlier one."""
        target = self._folder / f"ranges_{settings.method}.json"
        if target.exists():
            return target
        if cache_path is None:
            self._find_ranges(settings, samples, target)
            return target
        cache = RangeCache(cache_path)
        key = key_of(self._source, _given(samples), settings.method, settings.op_types)
        if (known := cache.get(key)) is None:
            self._find_ranges(settings, samples, target)
            cache.put(key, json.loads(target.read_text(encoding="utf-8")))
        else:
            target.write_text(json.dumps(known), encoding="utf-8")
        return target

    def _find_ranges(self, settings: Settings, samples: Samples, target: Path) -> None:
        model = str(self._spelled()[0])
        with step(f"calibrate ({settings.method})"):
            self._work("ranges", model=model, target=str(target), settings=asdict(settings), **_sent(samples))

    def _means(self, samples: Samples) -> Path:
        """Return the file of mean inputs, found now or earlier."""
        target = self._folder / "means.npz"
        if not target.exists():
            with step("measure what layers get, for their biases"):
                self._work("means", model=str(self.float_model), target=str(target), **_sent(samples))
        return target


def _given(samples: Samples) -> CalibrationSet:
    assert samples.calibration is not None
    return samples.calibration


def _sent(samples: Samples) -> dict[str, Any]:
    given = _given(samples)
    content = {"path": str(given.path), "input_range": given.input_range, "most": given.most, "part": given.part}
    return {"samples": content, "inputs": [[spec.name, spec.shape, spec.dtype] for spec in samples.inputs]}
