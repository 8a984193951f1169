"""The way of one ONNX model through quantize_onnx: repaired, calibrated, quantized, and measured before anyone gets it."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from shared.calibration import RANGES, CalibrationSet, InputRange, Sample, choose_range
from shared.child import Child, ChildError
from shared.cli import step
from shared.errors import ToolError
from shared.fidelity import Fidelity, measure_fidelity
from shared.formats import model_files, size_bytes
from shared.images import image_form
from shared.machine import GIB, MIB, available_memory_bytes, cpu_count, require_disk, require_memory
from shared.onnx_coverage import measure_coverage
from shared.onnx_graph import OnnxOp, declared_range, read_model, read_ops
from shared.onnx_pressed import PressedOnnx, Timed
from shared.onnx_repair import DATA, Repairs
from shared.onnx_search import find_kept
from shared.onnx_settings import LAYERS, Settings
from shared.range_cache import RangeCache, key_of
from shared.runtime import ModelSource, TensorSpec, image_input, memory_need_bytes, open_model, sample_inputs
from shared.trials import Inputs, Protocol, Shown, run_trials

TIMEOUT_S = 3600.0
BASE_MEMORY = int(0.5 * GIB)
MEMORY_PER_BYTE = (
    3.2  # the quantizer holds the model, its quantized weights, and what it serializes; measured at 773.7 M parameters
)
COMPARED = 16  # samples that answers are compared on, unless there are fewer
SEEDED = 4  # samples where there is no calibration set
SMALL_BYTES, LARGE_BYTES = 16 * MIB, 512 * MIB
SMALL_RUNS, RUNS, LARGE_RUNS = 20, 10, 2
FLOAT, ORIGINAL = "float32", "original"
DOING = {
    "repair": "repair the model",
    "spell": "rewrite the model",
    "ranges": "find the ranges of its activations",
    "means": "find the means of its activations",
    "quantize": "quantize the model",
}
BY_SEARCH = "left in float by the search: quantized it would break the limit"
BY_USER = "excluded"


@dataclass(frozen=True)
class OnnxWish:
    """What is wanted of a model.

    Args:
        settings: How to quantize; of mode `auto` the settings of its static candidate.
        is_auto: Whether to take the fastest mode that keeps the limits.
        tries_methods: Whether a search may take another calibration method where the first does not do.
        exclude: Node names, or op types, that stay in float; regexes are resolved before.
        samples: Real inputs to calibrate with; their range still open.
        holdout: Real inputs to measure on; None: what the calibration set itself holds out, else its own samples.
        input_range: Range of the model's image input, as the user says.
        corrects_bias: Whether biases are corrected where there are samples.
        min_psnr: Least PSNR in dB, over all samples.
        min_cosine: Least cosine of the worst sample.
        threads: Threads of the runtime.
        range_cache: Where ranges of activations are kept for later runs.
    """

    settings: Settings
    is_auto: bool = False
    tries_methods: bool = False
    exclude: tuple[str, ...] = ()
    samples: CalibrationSet | None = None
    holdout: CalibrationSet | None = None
    input_range: InputRange | None = None
    corrects_bias: bool = True
    min_psnr: float | None = None
    min_cosine: float | None = None
    threads: int | None = None
    range_cache: Path | None = None

    def has_limits(self) -> bool:
        """Whether the answers have a limit to keep."""
        return self.min_psnr is not None or self.min_cosine is not None

    def keeps(self, fidelity: Fidelity) -> bool:
        """Return whether answers are inside the limits."""
        if self.min_psnr is not None and (fidelity.psnr_db is None or fidelity.psnr_db < self.min_psnr):
            return False
        return self.min_cosine is None or fidelity.cosine >= self.min_cosine


@dataclass(frozen=True)
class _Candidate:
    """A quantized model that was tried."""

    settings: Settings
    path: Path
    corrected: int
    reasons: dict[str, str]
    searched: int = 0


class OnnxQuantizer:
    """The way of one model through the tool; `press` goes it.

    Args:
        source: The file.
        wish: What is wanted.
        workspace: An empty folder for what is needed on the way.
    """

    def __init__(self, source: Path, wish: OnnxWish, workspace: Path) -> None:
        self._source, self._wish, self._folder = source, wish, workspace
        self._float = workspace / "float.onnx"
        self._peak = 0
        self._threads = wish.threads or cpu_count()
        self._inputs: list[TensorSpec] = []
        self._ops: list[OnnxOp] = []
        self._measured_on = ""
        self._held: list[Sample] = []
        self._calibration: CalibrationSet | None = None
        self._reference: list[list[Any]] = []
        self._image_peak: float | None = None
        self._child: Child | None = None
        self._failed: list[Timed] = []
        self._static_form: tuple[Path, tuple[str, ...]] | None = None

    def press(self, draft: Path) -> PressedOnnx:
        """Write the product to `draft` and return what became of the model.

        Raises:
            ToolError: Damaged model, samples that don't fit, nothing to quantize, or no candidate inside the limits.
        """
        size = size_bytes(self._source)
        require_disk(3 * size, self._folder, "quantize this model")
        require_memory(BASE_MEMORY + int(size * MEMORY_PER_BYTE), "quantize this model")
        with self._working():
            with step(f"repair {self._source.name}"):
                repairs = Repairs(**self._work("repair", source=str(self._source), target=str(self._float)))
            self._ops = read_ops(read_model(self._float))
            self._require_matches()
            count = self._prepare_samples()
            candidates = list(self._candidates())
        chosen, models, runs = self._choose(candidates, is_repaired=bool(str(repairs)))
        product = read_model(chosen.path)
        rows, left = measure_coverage(self._ops, product, chosen.settings, chosen.reasons)
        if not any(row.quantized for row in rows):
            reasons = "; ".join(sorted({f"{row.op_type} {row.reason}" for row in rows})) or "it has no weights"
            what = f"mode {chosen.settings.mode} changes no op of this model"
            raise ToolError(what, where=self._source, got=reasons, remedy="choose another mode")
        self._place(chosen.path, draft)
        total = sum(row.weight_bytes for row in rows)
        return PressedOnnx(
            name=self._source.name,
            mode=chosen.settings.mode,
            expansion=str(chosen.settings),
            size_before_bytes=size,
            size_after_bytes=size_bytes(chosen.path),
            repairs=str(repairs),
            op_types=rows,
            left=left,
            coverage=sum(row.quantized_weight_bytes for row in rows) / total if total else None,
            corrected_biases=chosen.corrected,
            samples=count if chosen.settings.mode == "static" or chosen.corrected else 0,
            measured_on=self._measured_on,
            threads=self._threads,
            runs=runs,
            models=models,
            searched=chosen.searched,
            kept=sorted(name for name, reason in chosen.reasons.items() if reason == BY_SEARCH),
            peak_rss_bytes=self._peak,
        )

    @contextmanager
    def _working(self) -> Iterator[None]:
        with Child("shared.onnx_quantizer", TIMEOUT_S) as self._child:
            yield
        self._child = None

    def _work(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Let the child do a piece of `shared.onnx_quantizer`'s work."""
        assert self._child is not None
        try:
            reply, _ = self._child.ask({"do": what, **arguments})
        except ChildError as error:
            raise ToolError(f"could not {DOING[what]}", where=self._source, got=error) from None
        self._peak = max(self._peak, self._child.peak_rss_bytes)
        reply.pop("peak_rss_bytes")
        return reply

    def _require_matches(self) -> None:
        names = {op.name for op in self._ops} | {op.op_type for op in self._ops}
        missing = [text for text in self._wish.exclude if text not in names]
        if missing:
            kinds = ", ".join(dict.fromkeys(op.op_type for op in self._ops))
            what = f"no node or op type is called {', '.join(map(repr, missing))}"
            raise ToolError(what, where=self._source, got=f"op types {kinds}", remedy="node names are in the --json report")

    def _prepare_samples(self) -> int:
        """Load what is measured on, check what is calibrated with; return how many samples that is."""
        try:
            with open_model(ModelSource(self._float), threads=self._threads) as model:
                self._inputs, outputs = model.inputs, model.outputs
        except ChildError as error:
            raise ToolError("the model does not load", where=self._source, got=error) from None
        declared = declared_range(self._source)
        is_image = image_input(self._inputs) is not None and bool(outputs) and image_form(outputs[0].shape) is not None
        given = self._wish.samples
        known = choose_range(self._wish.input_range, declared, given.path if given else self._source)
        assumes = known is None and image_input(self._inputs) is not None and given is not None and given.path.suffix != ".npz"
        chosen: InputRange | None = "0..1" if assumes else known
        low, high = RANGES[chosen or "0..1"]
        self._image_peak = high - low if is_image else None
        if self._wish.min_psnr is not None and not is_image:
            raise ToolError("--min-psnr is for models that make images", where=self._source, remedy="use --min-cosine")
        count = 0
        if given is not None:
            self._calibration = replace(given, input_range=chosen)
            with step("check the samples"):
                count = self._calibration.check(self._inputs, RANGES[chosen] if chosen else None)
        held = self._held_set(chosen)
        if held is None:
            number = 1 if size_bytes(self._float) > LARGE_BYTES else SEEDED
            self._held = [sample_inputs(self._inputs, seed, (low, high)) for seed in range(number)]
            self._measured_on = f"{number} seeded samples"
        else:
            self._held = list(held.samples(self._inputs))
            self._measured_on = f"{len(self._held)} samples " + (
                "that were not calibrated with"
                if held.path != (given.path if given else None) or held.part == "holdout"
                else "that were calibrated with, too"
            )
        if assumes:
            self._measured_on += f"; pixels taken as {chosen}, say --input-range if the model wants another range"
        return count

    def _held_set(self, chosen: InputRange | None) -> CalibrationSet | None:
        most = 2 if size_bytes(self._float) > LARGE_BYTES else COMPARED
        if self._wish.holdout is not None:
            return replace(self._wish.holdout, input_range=chosen, most=most)
        if self._calibration is None:
            return None
        if self._calibration.has_holdout():
            return replace(self._calibration, most=most, part="holdout")
        return replace(self._calibration, most=most)

    def _candidates(self) -> Iterator[_Candidate]:
        """Yield what is quantized, in each mode that is asked for."""
        wish = self._wish
        kept = {op.name: BY_USER for op in self._ops if op.name in wish.exclude}
        kinds = tuple(text for text in wish.exclude if text in {op.op_type for op in self._ops})
        settings = replace(wish.settings, kept=tuple(sorted(kept)), kept_op_types=kinds)
        if not wish.is_auto and settings.mode != "static":
            yield self._quantized(settings, kept)
            return
        static = replace(settings, mode="static")
        if wish.is_auto:
            yield from self._each_mode(settings, static, kept)
            return
        if self._calibration is None:
            remedy = "give --calibration FOLDER of images, .npz or manifest; prepare_calibration makes one"
            raise ToolError("static quantization needs a calibration set", where=self._source, remedy=remedy)
        yield self._searched(static, kept) if wish.has_limits() else self._quantized(static, kept)

    def _each_mode(self, settings: Settings, static: Settings, kept: dict[str, str]) -> Iterator[_Candidate]:
        """Yield a candidate of each mode; one that cannot be made is noted with its reason."""
        ways: dict[str, Callable[[], _Candidate]] = {
            "dynamic": lambda: self._quantized(replace(settings, mode="dynamic"), kept),
            "fp16": lambda: self._quantized(replace(settings, mode="fp16"), kept),
        }
        if self._calibration is not None:
            ways["static"] = lambda: self._searched(static, kept)
        else:
            self._failed.append(Timed("static", 0, error="not tried without --calibration"))
        for mode, make in ways.items():
            try:
                yield make()
            except ToolError as error:
                self._failed.append(Timed(mode, 0, error=str(error).removeprefix(f"{self._source}: ")))

    def _searched(self, settings: Settings, kept: dict[str, str]) -> _Candidate:
        """Return a static model inside the limits, with as few layers in float as it takes."""
        best: tuple[Settings, Fidelity] | None = None
        tried = 0
        methods = (settings.method, "percentile") if self._wish.tries_methods else (settings.method,)
        for method in dict.fromkeys(methods):
            trial = replace(settings, method=method)  # type: ignore[arg-type]
            with step(f"quantize all layers ({method})"):
                fidelity = self._answers(self._quantized(trial, kept))
            tried += 1
            if fidelity is not None and (best is None or _better(fidelity, best[1])):
                best = trial, fidelity
        if best is None:
            raise ToolError("the statically quantized model does not run", where=self._source, remedy="try another mode")
        settings, fidelity = best
        if self._wish.keeps(fidelity):
            return replace(self._quantized(settings, kept), searched=tried)
        layers = [op for op in self._ops if op.op_type in LAYERS and op.weight and op.name not in kept and op.dtype == "FLOAT"]

        def measure(names: frozenset[str]) -> Fidelity | None:
            return self._answers(self._quantized(settings, {**kept, **dict.fromkeys(names, BY_SEARCH)}))

        found = find_kept(layers, measure, self._wish.keeps)
        tried += found.measured
        if found.names is None:
            got = f"{fidelity} with all layers quantized, and no layer can be left quantized inside the limit"
            raise ToolError("no static model keeps the limit", where=self._source, got=got, remedy="lower it, or use --mode fp16")
        return replace(self._quantized(settings, {**kept, **dict.fromkeys(found.names, BY_SEARCH)}), searched=tried)

    def _quantized(self, settings: Settings, reasons: dict[str, str]) -> _Candidate:
        """Quantize the repaired model with these settings; nodes in `reasons` stay in float."""
        model, spelled = self._spelled() if settings.mode == "static" else (self._float, ())
        settings = replace(settings, kept=tuple(sorted({*reasons, *spelled})))
        target = self._folder / f"{settings.mode}.onnx"
        ranges = str(self._ranges(settings)) if settings.mode == "static" else None
        corrects = self._wish.corrects_bias and self._calibration is not None and settings.mode != "fp16"
        means = str(self._means()) if corrects else None
        reply = self._work(
            "quantize",
            model=str(model),
            repaired=str(self._float),
            target=str(target),
            settings=asdict(settings),
            ranges=ranges,
            means=means,
            source=str(self._source),
        )
        return _Candidate(settings, target, int(reply["corrected"]), reasons)

    def _ranges(self, settings: Settings) -> Path:
        target = self._folder / f"ranges_{settings.method}.json"
        if target.exists():
            return target
        if self._wish.range_cache is None:
            self._find_ranges(settings, target)
            return target
        cache, given = RangeCache(self._wish.range_cache), self._calibration
        assert given is not None
        key = key_of(self._source, given, settings.method, settings.op_types)
        if (known := cache.get(key)) is None:
            self._find_ranges(settings, target)
            cache.put(key, json.loads(target.read_text(encoding="utf-8")))
        else:
            target.write_text(json.dumps(known), encoding="utf-8")
        return target

    def _find_ranges(self, settings: Settings, target: Path) -> None:
        model = str(self._spelled()[0])
        with step(f"calibrate ({settings.method})"):
            self._work("ranges", model=model, target=str(target), settings=asdict(settings), **self._sent_samples())

    def _spelled(self) -> tuple[Path, tuple[str, ...]]:
        """Return the model in the form for static quantization, and which of its nodes must stay in float."""
        if self._static_form is None:
            target = self._folder / "spelled.onnx"
            reply = self._work("spell", model=str(self._float), target=str(target))
            self._static_form = target if reply["changed"] else self._float, tuple(reply["kept"])
        return self._static_form

    def _means(self) -> Path:
        target = self._folder / "means.npz"
        if not target.exists():
            with step("measure what layers get, for their biases"):
                self._work("means", model=str(self._float), target=str(target), **self._sent_samples())
        return target

    def _sent_samples(self) -> dict[str, Any]:
        given = self._calibration
        assert given is not None
        samples = {"path": str(given.path), "input_range": given.input_range, "most": given.most, "part": given.part}
        return {"samples": samples, "inputs": [[spec.name, spec.shape, spec.dtype] for spec in self._inputs]}

    def _answers(self, candidate: _Candidate) -> Fidelity | None:
        """Return how near a candidate's answers are, None where it does not run."""
        if not self._reference:
            (shown,) = run_trials([ModelSource(self._float)], self._protocol(0), interleaved=True)
            if isinstance(shown, ChildError):
                raise ToolError("the model does not run", where=self._source, got=shown)
            self._reference = shown.outputs
        (shown,) = run_trials([ModelSource(candidate.path)], self._protocol(0), interleaved=True)
        return None if isinstance(shown, ChildError) else self._fidelity(shown)

    def _fidelity(self, shown: Shown) -> Fidelity | None:
        try:
            return measure_fidelity(self._reference, shown.outputs, self._image_peak)
        except ValueError:
            return None

    def _protocol(self, runs: int) -> Protocol:
        samples: Sequence[Inputs] = [partial(_given, sample) for sample in self._held]
        return Protocol(samples, max(runs, len(samples)), self._threads)

    def _choose(self, candidates: list[_Candidate], *, is_repaired: bool) -> tuple[_Candidate, list[Timed], int]:
        """Time all models in turns; return the fastest candidate inside the limits, what all showed, and the number of runs."""
        size = size_bytes(self._float)
        runs = LARGE_RUNS if size > LARGE_BYTES else SMALL_RUNS if size < SMALL_BYTES else RUNS
        protocol = self._protocol(runs)
        compared = [(ORIGINAL, self._source)] if is_repaired and size <= LARGE_BYTES else []
        compared += [(FLOAT, self._float), *((candidate.settings.mode, candidate.path) for candidate in candidates)]
        sources = [ModelSource(path) for _, path in compared]
        available = available_memory_bytes()
        together = available is None or sum(map(memory_need_bytes, sources)) <= available
        shown = run_trials(sources, protocol, interleaved=together)
        self._peak = max([self._peak, *(one.measured.peak_rss_bytes for one in shown if isinstance(one, Shown))])
        place = [label for label, _ in compared].index(FLOAT)
        reference = shown[place]
        if isinstance(reference, ChildError):
            raise ToolError("the model does not run", where=self._source, got=reference)
        self._reference = reference.outputs
        models = [self._timed(label, path, one) for (label, path), one in zip(compared, shown, strict=True)] + self._failed
        tried = list(zip(candidates, models[place + 1 :], strict=False))
        running = [(model.median_ms, candidate) for candidate, model in tried if model.median_ms is not None and model.fidelity]
        if not running:
            raise ToolError(
                "the quantized model does not run; nothing was kept",
                where=self._source,
                got="; ".join(f"{model.label}: {model.error}" for model in models[place + 1 :]),
            )
        if self._wish.is_auto:
            running = [(ms, c) for (ms, c) in running if self._wish.keeps(_fidelity_of(models, c))]
            if not running:
                got = "; ".join(f"{model.label}: {model.fidelity or model.error}" for model in models[place + 1 :])
                remedy = "lower the limit" if self._calibration else "give --calibration, so that static models can be tried"
                raise ToolError("no mode keeps the limits", where=self._source, got=got, remedy=remedy)
        chosen = min(running, key=lambda found: found[0])[1]
        models = [replace(model, is_chosen=model.label == chosen.settings.mode) for model in models]
        return chosen, models, protocol.runs

    def _timed(self, label: str, path: Path, shown: Shown | ChildError) -> Timed:
        size = size_bytes(path)
        if isinstance(shown, ChildError):
            return Timed(label, size, error=f"does not run: {shown}")
        fidelity = None if label == FLOAT else self._fidelity(shown)
        error = "its answers are of another shape, or not finite" if fidelity is None and label != FLOAT else None
        return Timed(label, size, shown.measured.median_ms, fidelity, error=error)

    def _place(self, made: Path, draft: Path) -> None:
        """Copy a product to its draft, and weights in a file of their own to where `name_weights` looks for them."""
        _, *data = model_files(made)
        shutil.copyfile(made, draft)
        for file in data:
            shutil.copyfile(file, draft.with_name(f"{draft.name}{DATA}"))


def _given(sample: Sample, _: list[TensorSpec]) -> Sample:
    return sample


def _better(one: Fidelity, other: Fidelity) -> bool:
    return one.relative_error < other.relative_error if one.psnr_db is None else one.psnr_db > (other.psnr_db or 0.0)


def _fidelity_of(models: list[Timed], candidate: _Candidate) -> Fidelity:
    found = next(model.fidelity for model in models if model.label == candidate.settings.mode)
    assert found is not None
    return found
