"""Quantize one TFLite model from the wild: repair it, quantize it, and measure what came out before anyone gets it."""

import hashlib
import json
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from shared.calibration.dataset import RANGES, CalibrationSet, Sample, choose_range
from shared.command.cli import step
from shared.command.errors import ToolError
from shared.command.resources import MIB, Needs, cpu_count, cpu_name
from shared.formats.tensors import TensorSpec
from shared.formats.tflite import Op, check_is_tflite, copy_appended_zip, custom_ops, declared_range, read_ops, require_finite
from shared.runtime.model import Kernels, ModelSource, open_model
from shared.runtime.processes import Child, ChildError
from tools.quantize_tflite import worker
from tools.quantize_tflite.candidates import Subject
from tools.quantize_tflite.coverage import RuleMatches, count_matches, measure_coverage, unmatched
from tools.quantize_tflite.pair import Measured, measure_pair
from tools.quantize_tflite.recipes import (
    INPUT_OUTPUT,
    NO_QUANTIZE,
    Rules,
    assign,
    build_rules,
    concatenate,
    needs_calibration,
    operation_of,
)
from tools.quantize_tflite.repair import Repairs, cut_before_custom_ops, needed_repairs
from tools.quantize_tflite.request import Wish
from tools.quantize_tflite.result import PressedModel, Searched
from tools.quantize_tflite.search import Ledger, Search, Target
from tools.quantize_tflite.sensitivity import LayerDamage, measure_layers

# Measured at 33.4 M and 773.7 M parameters: libraries, and the weights already quantized.
BASE_MEMORY = 300 * MIB
MEMORY_PER_BYTE = 0.3
QUANTIZE_TIMEOUT_S = 3600.0
REPAIR_MEMORY_PER_BYTE = 2.0  # folded weights take twice their bytes
STATIC_MEMORY_PER_BYTE = 4.5  # the calibrator holds the model twice beside XNNPACK's copy; measured at 134 M parameters
COMPARED = 16  # samples, unless the user says how many, for bias correction, searches, layers' damage and the product's answers

ROOM_BYTES = 2**16  # for what the quantizer adds beside scales

STATISTICS = "calibration.json"  # in the workspace, where samples were calibrated with


def needs_of(source: Path, wish: Wish) -> Needs:
    """Return what quantizing one model takes, at most."""
    size = source.stat().st_size
    is_repaired = bool(str(needed_repairs(source)))
    per_byte = STATIC_MEMORY_PER_BYTE if wish.is_static() else REPAIR_MEMORY_PER_BYTE if is_repaired else MEMORY_PER_BYTE
    copies = (is_repaired or wish.is_static()) * 2 + wish.short_names
    return Needs(
        "quantize this model",
        product_bytes=_largest_product(source, wish),
        disk_bytes=2 * size,
        memory_bytes=BASE_MEMORY + int(size * per_byte),
        workspace_bytes=copies * size,
    )


def _largest_product(source: Path, wish: Wish) -> int:
    """Return the size of a product all of whose float weights become as small as its widest rule says; a mix is no larger."""
    size = source.stat().st_size
    kinds = {"FLOAT32": 32, "FLOAT16": 16}
    ops = [op for op in read_ops(source) if op.dtype in kinds]
    configs = [rule.get("op_config", {}).get("weight_tensor_config") or {} for rule in wish.base]
    bits = 16 if wish.search else max((int(config.get("num_bits", 16)) for config in configs), default=32)
    is_plain = not (wish.rules or wish.exclude or wish.only)
    saved = sum(op.size_weights * max(0, 1 - bits / kinds[op.dtype]) for op in ops) if is_plain else 0
    scales = sum(op.size_weights for op in ops) // 64
    return size - int(saved) + scales + ROOM_BYTES


class UnchangedError(ToolError):
    """The recipe changes nothing in this model; in a bundle it is carried over as it is."""


class Quantizer:
    """The way of one model through the tool; `press` goes it.

    Args:
        name: What to call the model.
        source: The file.
        wish: What is wanted.
        workspace: A folder for what is needed on the way.
    """

    def __init__(self, name: str, source: Path, wish: Wish, workspace: Path) -> None:
        check_is_tflite(source)
        self._name, self._source, self._wish, self._workspace = name, source, wish, workspace
        self._peak = 0
        self._kernels: Kernels = "reference"  # nothing is packed; XNNPACK where that has ops the others lack

    def press(self, draft: Path) -> PressedModel:
        """Write the product to `draft` and return what became of the model.

        Raises:
            ToolError: Damaged model, rules that match nothing or do nothing, samples that don't fit, or a product that fails.
        """
        wish = self._wish
        size = self._source.stat().st_size
        if not wish.base and not wish.rules and wish.search is None:
            raise ToolError(f"recipe {wish.recipe} changes nothing", where=self._name, remedy="choose another recipe")
        self._require_runs(self._source, "the model does not load")
        with step(f"check the weights of {self._name}"):
            require_finite(self._source)
        needed = needed_repairs(self._source)
        source = self._repaired(needed, is_static=wish.is_static())
        ops = read_ops(source)
        missing = self._unmatched(ops)
        samples, count = self._checked_samples(source)
        pixels = declared_range(self._source) or RANGES[wish.input_range or "0..1"]
        is_sent = wish.search is not None or wish.debug  # to other processes; else a hash of gigabytes serves nobody
        subject = Subject(source, _sha256(source) if is_sent else "", self._few(samples), wish.corrects_bias, pixels)
        searched, rules = self._rules(ops, subject)
        matches = count_matches(ops, rules)
        if wish.search is None and not wish.in_bundle:
            self._require_matched(matches)
        statistics = self._calibrated(source, rules, samples) if needs_calibration(rules) else None
        with step(f"quantize {self._name} with {wish.expansion}"):
            corrected = self._quantized(source, draft, rules, statistics, subject)
        stored = {op.scope: op.dtype for op in read_ops(self._source)}
        rows, left = measure_coverage(ops, read_ops(draft), rules, stored)
        if not any(row.quantized for row in rows):
            reasons = "; ".join(sorted({f"{row.op_type} {row.reason}" for row in rows})) or "it has no constant operands"
            what = f"recipe {wish.recipe} changes no op of this model"
            raise UnchangedError(what, where=self._name, got=reasons, remedy="choose another recipe")
        saved = self._shortened(draft) if wish.short_names else 0
        copy_appended_zip(self._source, draft)
        measured = self._measured(draft, subject)
        if isinstance(measured, str):
            self._require_runs(draft, "the quantized model does not load; nothing was kept")
        total = sum(row.weight_bytes for row in rows)
        return PressedModel(
            name=self._name,
            recipe=wish.recipe,
            expansion=wish.expansion,
            size_before_bytes=size,
            size_after_bytes=draft.stat().st_size,
            repairs=str(needed),
            rules=rules,
            matches=matches,
            op_types=rows,
            left=left,
            unmatched=missing,
            coverage=sum(row.quantized_weight_bytes for row in rows) / total if total else None,
            corrected_biases=corrected,
            saved_name_bytes=saved,
            samples=count,
            measured=measured,
            searched=searched,
            damage=self._damage(ops, rules, subject) if wish.debug else [],
            statistics_sha256=_sha256(statistics) if statistics not in (None, wish.statistics) else "",
            peak_rss_bytes=self._peak,
        )

    def _work(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Let a process of its own do a piece of `tools.quantize_tflite.worker`'s work."""
        try:
            with Child(worker, QUANTIZE_TIMEOUT_S) as child:
                reply, _ = child.ask({"do": what, **arguments})
                self._peak = max(self._peak, child.peak_rss_bytes)
                return reply
        except ChildError as error:
            raise ToolError(f"AI Edge Quantizer failed with recipe {self._wish.recipe}", where=self._name, got=error) from None

    def _repaired(self, needed: Repairs, *, is_static: bool) -> Path:
        """Return the model the quantizer can read: itself, or a repaired copy."""
        if not str(needed) and not is_static:
            return self._source
        target = self._workspace / "float.tflite"
        with step(f"repair {self._name}"):
            self._work("repair", source=str(self._source), target=str(target), add_signature=is_static)
        return target

    def _unmatched(self, ops: list[Op]) -> list[str]:
        """Return the selectors that match no op; outside a bundle that is an error."""
        wish = self._wish
        missing = unmatched(ops, [*wish.only, *(selector for selector, _ in wish.rules), *wish.exclude])
        if missing and not wish.in_bundle:
            kinds = ", ".join(dict.fromkeys(op.op_type for op in ops))
            remedy = f"op types here: {kinds}; op names are in the --json report of a run without rules"
            raise ToolError(f"no op matches {', '.join(repr(text) for text in missing)}", where=self._name, remedy=remedy)
        return missing

    def _require_matched(self, matches: list[RuleMatches]) -> None:
        idle = [rule for rule in matches if not rule.matched and rule.operation not in INPUT_OUTPUT]
        if idle and len(idle) < len(matches):  # where no rule does anything, the reasons say more
            told = ", ".join(f"{rule.operation} {rule.regex!r} ({rule.precision})" for rule in idle)
            raise ToolError(f"rules that match no op: {told}", where=self._name, remedy="correct or remove them")

    def _checked_samples(self, source: Path) -> tuple[CalibrationSet | None, int]:
        """Return the samples with the range of the model's input settled, and how many there are."""
        given = self._wish.samples
        if given is None:
            return None, 0
        self._require_own_ops("samples can't be run through it")
        declared = declared_range(self._source)
        settled = CalibrationSet(given.path, choose_range(self._wish.input_range, declared, given.path), given.most)
        with step(f"check the samples of {self._name}"):
            count = settled.check(self._inputs(source), RANGES[settled.input_range] if settled.input_range else declared)
        return settled, count

    def _inputs(self, path: Path) -> list[TensorSpec]:
        with open_model(ModelSource(path), kernels=self._kernels) as model:
            return model.inputs

    def _few(self, samples: CalibrationSet | None) -> CalibrationSet | None:
        if samples is None:
            return None
        return CalibrationSet(samples.path, samples.input_range, samples.most or COMPARED)

    def _rules(self, ops: list[Op], subject: Subject) -> tuple[Searched | None, Rules]:
        """Return the rules to quantize with, found by a search where one is asked for."""
        wish = self._wish
        if wish.search is None:
            rules = build_rules(wish.base, wish.only, wish.rules, wish.exclude)
            if needs_calibration(rules) and wish.io_dtype == "float32":
                rules = concatenate([*rules, *map(_float_end, INPUT_OUTPUT)])
            elif wish.io_dtype != "float32":
                self._require_ends(rules)
            return None, rules
        self._require_own_ops("a search can't run it")
        if subject.samples is None:
            remedy = "give --calibration FOLDER of images, .npz or manifest"
            raise ToolError("a search needs real inputs to measure on", where=self._name, remedy=remedy)
        outputs = self._outputs(subject.path)
        unknown = sorted(wish.search.limits.keys() - set(outputs) - {""})
        if unknown:
            raise ToolError("no such output", where=self._name, got=", ".join(unknown), expected="one of " + ", ".join(outputs))
        limits = [wish.search.limits.get(name, wish.search.limits.get("", 0.0)) for name in outputs]
        if not all(limits):
            lacking = [name for name, limit in zip(outputs, limits, strict=True) if not limit]
            raise ToolError(
                "an output has no limit", where=self._name, got=", ".join(lacking), remedy="give it one with --max-drop"
            )
        searched = [op for op in ops if not any(s.applies(operation_of(op.op_type), op.scope) for s in wish.exclude)]
        ledger = Ledger(wish.search.ledger, _identity(subject, subject.samples, wish.search.target))
        try:
            with wish.executor() as executor:
                found = Search(subject, searched, limits, wish.search.target, executor, ledger).run()
        finally:
            ledger.close()
        used: dict[str, int] = {}
        for recipe in found.precisions.values():
            used[recipe] = used.get(recipe, 0) + 1
        summary = Searched(
            wish.search.target, found.drop, found.layers, found.measured, found.resumed, found.left_out, dict(sorted(used.items()))
        )
        return summary, assign(found.precisions)

    def _require_ends(self, rules: Rules) -> None:
        """Raise ToolError unless the rules make inputs and outputs of the type asked for."""
        bits = {config["num_bits"] for rule in rules if (config := rule.get("op_config", {}).get("activation_tensor_config"))}
        if {f"int{number}" for number in bits} != {self._wish.io_dtype}:
            made = ", ".join(f"int{number}" for number in sorted(bits)) or "float32: the recipe is not static"
            raise ToolError(f"--io-dtype {self._wish.io_dtype} does not fit the recipe", where=self._name, got=made)

    def _outputs(self, path: Path) -> list[str]:
        with open_model(ModelSource(path), kernels=self._kernels) as model:
            return [spec.name for spec in model.outputs]

    def _calibrated(self, source: Path, rules: Rules, samples: CalibrationSet | None) -> Path:
        """Return calibration statistics: the file that was given, or a new one from the samples."""
        if (given := self._wish.statistics) is not None:
            known = json.loads(given.read_text(encoding="utf-8")).get("metadata", {}).get("model_sha256")
            if known is not None and known != _sha256(self._source):
                raise ToolError("the calibration statistics are of another model", where=given, remedy="calibrate again")
            return given
        if samples is None:
            remedy = "give --calibration FOLDER of images, .npz or manifest; int8 needs no samples"
            raise ToolError(f"recipe {self._wish.recipe} needs a calibration set", where=self._name, remedy=remedy)
        statistics = self._workspace / STATISTICS
        with step(f"calibrate {self._name}"):
            self._work(
                "calibrate",
                source=str(source),
                statistics=str(statistics),
                rules=rules,
                samples=_sent(samples),
                threads=cpu_count(),
                model_sha256=_sha256(self._source),
            )
        return statistics

    def _quantized(self, source: Path, draft: Path, rules: Rules, statistics: Path | None, subject: Subject) -> int:
        few = subject.samples
        correct = few is not None and subject.corrects_bias and statistics is None
        sent = _sent(few) if few and correct else None
        given = str(statistics) if statistics else None
        reply = self._work("quantize", source=str(source), draft=str(draft), rules=rules, statistics=given, samples=sent)
        return int(reply["corrected"])

    def _shortened(self, draft: Path) -> int:
        """Give the draft's inner tensors short names; return how many bytes that saves."""
        short = self._workspace / "short.tflite"
        saved = int(self._work("shorten", source=str(draft), target=str(short))["saved"])
        shutil.copyfile(short, draft)
        return saved

    def _require_runs(self, path: Path, failure: str) -> None:
        """Raise ToolError unless the runtime accepts the file; of a model with ops it lacks, the part before them."""
        try:
            if custom_ops(path):
                if self._loads(path, "xnnpack"):  # it has some of MediaPipe's
                    self._kernels = "xnnpack"
                    return
                part = self._workspace / "part.tflite"
                if not cut_before_custom_ops(path, part):
                    return
                path = part
            with open_model(ModelSource(path), kernels="reference"):
                pass
        except ChildError as error:
            raise ToolError(failure, where=self._name, got=error, remedy="choose another recipe or model") from None

    @staticmethod
    def _loads(path: Path, kernels: Kernels) -> bool:
        try:
            with open_model(ModelSource(path), kernels=kernels):
                return True
        except ChildError:
            return False

    def _require_own_ops(self, consequence: str) -> None:
        if (custom := custom_ops(self._source)) and not self._loads(self._source, "xnnpack"):
            raise ToolError(
                f"the runtime here lacks ops of this model: {consequence}",
                where=self._name,
                got=", ".join(custom),
                remedy="leave out --calibration, --max-drop and --debug for it",
            )

    def _measured(self, draft: Path, subject: Subject) -> Measured | str:
        with step(f"run {self._name} before and after"):
            given: list[Sample] = list(subject.samples.samples(self._inputs(self._source))) if subject.samples else []
            try:
                return measure_pair(self._source, draft, given, subject.pixel_range)
            except ChildError as error:
                raise ToolError("the quantized model does not run; nothing was kept", where=self._name, got=error) from None

    def _damage(self, ops: list[Op], rules: Rules, subject: Subject) -> list[LayerDamage]:
        """Return what each quantized layer does alone, worst at the output first."""
        self._require_own_ops("its layers can't be measured")
        if needs_calibration(rules):
            raise ToolError("--debug measures layers of recipes without calibration", where=self._name, remedy="leave out --debug")
        with self._wish.executor() as executor:
            return measure_layers(ops, rules, subject, executor)


def _identity(subject: Subject, samples: CalibrationSet, target: Target) -> dict[str, str]:
    """Return what the measurements of a search depend on."""
    versions = {name: metadata.version(name) for name in ("ai-edge-litert", "ai-edge-quantizer", "numpy")}
    return {
        "model": subject.sha256,
        "samples": samples.sha256(),
        "corrects_bias": str(subject.corrects_bias),
        "cpu": cpu_name(),  # screening compares latencies
        "target": target,
        **versions,
    }


def _sent(samples: CalibrationSet) -> dict[str, Any]:
    """Return a set as a message to `tools.quantize_tflite.worker`."""
    return {"path": str(samples.path), "input_range": samples.input_range, "most": samples.most}


def _float_end(operation: str) -> dict[str, Any]:
    return {"regex": ".*", "operation": operation, "algorithm_key": NO_QUANTIZE, "op_config": {}}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
