"""What is asked of a quantizer for one model, whatever its format: recipe, samples, limits, objective."""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shared.calibration.dataset import CalibrationSet
from shared.command.errors import ToolError
from shared.command.options import InputRange, Objective
from shared.metrics.output_error import OutputError, size_of
from shared.runtime.executors import local_processes

Precisions = dict[str, str]  # layer name -> precision, the name of a recipe
ALL_OUTPUTS = ""  # in max_error: the limit of every output that has none of its own


@dataclass(frozen=True)
class Limits:
    """Limits on the error of a quantized model's outputs that a search keeps.

    Args:
        max_error: Output name -> largest relative error; ALL_OUTPUTS is for all others.
        min_psnr: Least PSNR of outputs that are images, dB.
        min_cosine: Least cosine of the worst sample.
    """

    max_error: Mapping[str, float] = field(default_factory=dict)
    min_psnr: float | None = None
    min_cosine: float | None = None

    def __post_init__(self) -> None:
        for option, limit in (("--min-psnr", self.min_psnr), ("--min-cosine", self.min_cosine)):
            if limit is not None and not math.isfinite(limit):
                raise ToolError(f"{option} is not finite", remedy="leave it out")

    def __bool__(self) -> bool:
        return bool(self.max_error) or self.min_psnr is not None or self.min_cosine is not None

    def keeps(self, errors: Sequence[OutputError]) -> bool:
        """Return whether outputs are inside the limits."""
        return self.share(errors) <= 1

    def share(self, errors: Sequence[OutputError]) -> float:
        """Return the largest share of its limit that an output's error takes; infinite where an output cannot be compared.

        A share of noise amplitude, so that its square adds up as independent errors do: of the relative error itself, of the noise
        that a PSNR stands for, and of the angle that a cosine stands for.
        """
        if not errors or any(error.problem for error in errors):
            return math.inf
        return max(share for error in errors for share in self._shares(error))

    def _shares(self, error: OutputError) -> list[float]:
        shares = [0.0]
        limit = self.max_error.get(error.output, self.max_error.get(ALL_OUTPUTS))
        if limit is not None:
            shares.append(size_of(error) / limit)
        if self.min_psnr is not None and error.psnr_db is not None:
            shares.append(10 ** ((self.min_psnr - error.psnr_db) / 20))
        if self.min_cosine is not None and error.worst_cosine is not None:
            allowed = math.sqrt(1 - self.min_cosine)
            angle = math.sqrt(1 - error.worst_cosine)
            shares.append(angle / allowed if allowed else math.inf if angle else 0.0)
        return shares

    def require_outputs(self, names: Sequence[str], images: Sequence[bool], where: str) -> None:
        """Raise ToolError where a limit names an output that is not there, or an output has no limit.

        Args:
            names: Of the model's outputs.
            images: Which of them are images.
            where: The model, for messages.
        """
        if unknown := sorted(self.max_error.keys() - set(names) - {ALL_OUTPUTS}):
            raise ToolError("no such output", where=where, got=", ".join(unknown), expected="one of " + ", ".join(names))
        if self.max_error and ALL_OUTPUTS not in self.max_error and (lacking := [n for n in names if n not in self.max_error]):
            remedy = "give it one with --max-error"
            raise ToolError("an output has no limit", where=where, got=", ".join(lacking), remedy=remedy)
        if self.min_psnr is not None and not any(images):
            raise ToolError("--min-psnr is for models that make images", where=where, remedy="use --min-cosine")


@dataclass(frozen=True)
class Request:
    """What is asked for one model.

    Args:
        recipe: The recipe as the user named it.
        expansion: Its full name, or what it does in words.
        settings: What only one format knows: a frozen dataclass of its quantizer.
        calibration: Real inputs to calibrate with; their range is still open.
        holdout: Real inputs to measure on; None: what the calibration set holds out, else its own samples.
        input_range: Range of the model's image input, as the user says.
        corrects_bias: Whether biases are corrected where there are samples.
        limits: Limits on the outputs' errors; a search finds the precision of each layer.
        objective: What the search makes small.
        ledger: File that a search keeps its measurements in.
        sensitivity: Whether to measure what each layer alone does to the outputs.
        allows_large_error: Whether the product is written although its outputs are far from the original's.
        threads: Threads of the runtime; all CPUs when None.
        in_bundle: Whether the model is one of several; selectors may then be meant for others.
        executor: Makes the executor that measures candidates and layers, from the memory in bytes that each takes.
    """

    recipe: str
    expansion: str
    settings: Any
    calibration: CalibrationSet | None = None
    holdout: CalibrationSet | None = None
    input_range: InputRange | None = None
    corrects_bias: bool = True
    limits: Limits = field(default_factory=Limits)
    objective: Objective = "size"
    ledger: Path | None = None
    sensitivity: bool = False
    allows_large_error: bool = False
    threads: int | None = None
    in_bundle: bool = False
    executor: Callable[[int], AbstractContextManager[Executor]] = local_processes

    def as_arguments(self) -> dict[str, object]:
        """Return what decides the product, JSON values only; files count by their content elsewhere."""
        return {
            "expansion": self.expansion,
            "settings": asdict(self.settings),
            "samples": [[str(part.path), part.most, part.part] for part in self.datasets()],
            "input_range": self.input_range,
            "corrects_bias": self.corrects_bias,
            "limits": asdict(self.limits),
            "objective": self.objective,
            "sensitivity": self.sensitivity,
            "allows_large_error": self.allows_large_error,
        }

    def datasets(self) -> list[CalibrationSet]:
        """Return the sets of real inputs that are read."""
        return [given for given in (self.calibration, self.holdout) if given is not None]

    def files(self) -> list[Path]:
        """Return the files of the real inputs, those that a manifest holds out included."""
        found = [file for given in self.datasets() for file in given.all_files()]
        return list(dict.fromkeys(found))


def parse_max_error(texts: Sequence[str]) -> dict[str, float]:
    """Return output (of a bundle's model: MODEL, or MODEL:OUTPUT) -> limit of options such as `0.01` or `Identity=0.01`.

    Raises:
        ToolError: No positive number, or no output before it.
    """
    found = {}
    for text in texts:
        output, equals, value = text.rpartition("=")
        if equals and not (output and value):
            raise ToolError("not of the form --max-error X or OUTPUT=X", got=text)
        try:
            limit = float(value)
        except ValueError:
            limit = math.nan
        if not 0 < limit < math.inf:
            raise ToolError("--max-error is no positive number", got=text, expected="such as 0.01, or OUTPUT=0.01")
        found[output] = limit
    return found


def path_next_to(output: Path, name: str, names: Sequence[str], what: str) -> Path:
    """Return the path of a file about one model that is written next to the product."""
    inner = f"_{file_stem(name, names)}" if len(names) > 1 else ""
    return output.with_name(f"{output.stem}{inner}_{what}")


def file_stem(name: str, names: Sequence[str]) -> str:
    """Return the stem of files about one model: its own name without suffix, with the bundle's where another has the same."""
    stems = [Path(other).stem for other in names]
    stem = Path(name).stem
    return stem if stems.count(stem) < 2 else name.removesuffix(Path(name).suffix).replace("/", "_")
