"""A result as the pipeline makes it, without a model: for tests of everything that is made from results."""

from collections.abc import Iterable
from dataclasses import replace
from io import StringIO
from pathlib import Path

from rich.console import Console, Group, RenderableType

from shared.metrics.output_error import OutputError
from shared.quantize.coverage import OpTypeCoverage, RuleMatches, SkippedLayer
from shared.quantize.result import REFERENCE, CandidateResult, ModelResult
from shared.quantize.sensitivity import LayerSensitivity
from shared.runtime.benchmark import Measurement

NEAR = OutputError("y", 0.01, 0.9999, 0.1, 40.0, worst_cosine=0.9999)
ROWS = [OpTypeCoverage("Conv", 3, 2, 4000, 3000, 1750, ["FLOAT", "INT8"], "1 x excluded")]
SKIPPED = [SkippedLayer("Conv", "last", 1000, "excluded")]
RULES: list[dict[str, object]] = [{"regex": ".*", "operation": "*", "algorithm_key": "min_max_uniform_quantize", "op_config": {}}]


def measured(ms: float, size_bytes: int = 4000) -> Measurement:
    return Measurement(Path("m.tflite"), size_bytes, 1.0, ms, 1.5 * ms, 20, "xnnpack", 10**8, ["float32 image of 64 pixels"])


def candidate(label: str, ms: float, *errors: OutputError, size_bytes: int = 1000, is_product: bool = False) -> CandidateResult:
    speed = f"{'SLOWER: ' if ms > 10.5 else ''}latency 10.00 -> {ms:.2f} ms"
    return CandidateResult(label, measured(ms, size_bytes), list(errors), speed, is_product)


def model_result(name: str = "m.tflite", ms: float = 5.0, error: OutputError = NEAR, **changes: object) -> ModelResult:
    """Return a model of 10 ms in float32 that takes `ms` now; its output is `error` off."""
    result = ModelResult(
        name=name,
        recipe="int8",
        expansion="dynamic_wi8_afp32",
        size_before_bytes=4000,
        size_after_bytes=1000,
        rules=RULES,
        matches=[RuleMatches(".*", "*", "min_max_uniform_quantize", "int8 weights", 3, 2)],
        op_types=ROWS,
        skipped=SKIPPED,
        coverage=0.75,
        measured_on="8 seeded samples",
        threads=2,
        candidates=[CandidateResult(REFERENCE, measured(10.0)), candidate("int8", ms, error, is_product=True)],
    )
    return replace(result, **changes)  # type: ignore[arg-type]


def sensitive_layer(name: str, error: float | None) -> LayerSensitivity:
    return LayerSensitivity(
        "Conv", name, f"{name}_out", 1000, OutputError(f"{name}_out", 0.1, 0.99, 0.1, 20.0), OutputError("y", error)
    )


def text_of(tables: Iterable[RenderableType]) -> str:
    """Return tables and sentences as a terminal shows them."""
    file = StringIO()
    Console(file=file, width=200, highlight=False, markup=False).print(Group(*tables))
    return file.getvalue()
