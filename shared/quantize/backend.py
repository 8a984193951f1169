"""What the quantizer of a format does in its own way, and what it is handed: the protocol that both backend modules keep."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from shared.calibration.dataset import CalibrationSet
from shared.calibration.samples import Samples
from shared.command.errors import ToolError
from shared.command.options import InputRange
from shared.files.checksums import sha256_of
from shared.formats.model_file import ModelFile
from shared.formats.tensors import TensorSpec
from shared.quantize.coverage import OpTypeCoverage, RuleMatches, SkippedLayer
from shared.quantize.ledger import Job, MakeJob
from shared.quantize.request import Precisions, Request
from shared.quantize.result import SearchSummary
from shared.quantize.search import SearchSpace
from shared.runtime.processes import Workspace


@dataclass(frozen=True)
class Quantization:
    """One model that is being quantized, as its backend gets it.

    Args:
        name: What to call the model.
        source: The model as it came.
        model: The repaired model.
        request: What is asked for.
        samples: Its samples.
        workspace: Folder and process for the work.
        inputs: Its inputs; empty where the runtime here lacks its ops.
        outputs: Names of its outputs; the same.
    """

    name: str
    source: ModelFile
    model: ModelFile
    request: Request
    samples: Samples
    workspace: Workspace
    inputs: list[TensorSpec]
    outputs: list[str]

    @property
    def runs_here(self) -> bool:
        """Whether the runtime here has all its ops."""
        return bool(self.outputs)

    @property
    def is_made_up(self) -> bool:
        """Whether answers are measured on made-up inputs."""
        return self.samples.held.dataset is None


@dataclass(frozen=True)
class Candidate:
    """A quantized model.

    Args:
        request: What it was asked for.
        model: Its file, in the workspace.
        corrected_biases: Layers whose bias was corrected.
        saved_name_bytes: Bytes saved by short names.
        rules: The recipe's rules, where the format knows rules.
        matches: What each rule matched.
        calibration: The file of calibration statistics that is written with the product; None without.
        float_layers: Layer -> why it stays in float.
        search: How a search found it.
    """

    request: Request
    model: ModelFile
    corrected_biases: int = 0
    saved_name_bytes: int = 0
    rules: list[dict[str, Any]] = field(default_factory=list)
    matches: list[RuleMatches] = field(default_factory=list)
    calibration: Path | None = None
    float_layers: dict[str, str] = field(default_factory=dict)
    search: SearchSummary | None = None

    def facts(self) -> dict[str, Any]:
        """Return the fields of `shared.quantize.result.ModelResult` that the candidate decides."""
        return {
            "recipe": self.request.recipe,
            "expansion": self.request.expansion,
            "size_after_bytes": self.model.size_bytes,
            "corrected_biases": self.corrected_biases,
            "saved_name_bytes": self.saved_name_bytes,
            "rules": self.rules,
            "matches": self.matches,
            "search": self.search,
            "float_layers": sorted(self.float_layers) if self.search else [],
            "calibration_sha256": sha256_of(self.calibration) if self.calibration else "",
        }


class UnchangedError(ToolError):
    """The recipe changes nothing in this model; in a bundle it is carried over as it is."""


class Backend(Protocol):
    """What a format does in its own way; the backend module of each tool has these functions."""

    WORKER: ModuleType  # its process does the heavy work
    ASSUMED_RANGE: InputRange | None  # of image inputs where neither the user nor the model says one
    TIMES_REPAIRED: bool  # whether the repaired model is the reference; else the model as it came

    def repair(self, source: ModelFile, request: Request, workspace: Workspace) -> tuple[ModelFile, str]:
        """Return the model that the quantizer can read, and what was repaired, in words."""

    def specs(self, model: ModelFile, name: str, workspace: Workspace) -> tuple[list[TensorSpec], list[TensorSpec]] | None:
        """Return inputs and outputs; None where the runtime here lacks ops of the model. Raises where it does not load."""

    def bounded(
        self, samples: CalibrationSet, model: ModelFile, inputs: Sequence[TensorSpec], name: str, workspace: Workspace, /
    ) -> CalibrationSet:
        """Return the samples in a size at which one takes a bounded part of the free memory; raises where none does."""

    def unmatched(self, model: ModelFile, request: Request, name: str) -> list[str]:
        """Return the selectors that match no op; raises where that is an error."""

    def variants(self, request: Request) -> list[Request]:
        """Return the requests to make candidates for: one, or one for each recipe to choose from."""

    def space(self, quantization: Quantization) -> SearchSpace | None:
        """Return what a search may choose from; None where the recipe leaves no choice."""

    def search_variants(self, quantization: Quantization) -> list[Quantization]:
        """Return the ways to calibrate that a search may choose from, the first by default."""

    def job_maker(self, quantization: Quantization) -> MakeJob:
        """Return what makes the measurement of a candidate from its precisions, and whether to time it."""

    def identity(self, quantization: Quantization) -> dict[str, str]:
        """Return what measurements of candidates depend on."""

    def quantize(self, quantization: Quantization, precisions: Precisions | None) -> Candidate:
        """Make a candidate: calibrated, quantized, biases corrected. None: as the recipe says, without a search."""

    def coverage(self, quantization: Quantization, candidate: Candidate) -> tuple[list[OpTypeCoverage], list[SkippedLayer]]:
        """Return what became of the ops, and why layers were skipped."""

    def layer_jobs(self, quantization: Quantization, candidate: Candidate) -> dict[str, Job]:
        """Return layer -> measurement of the model with it alone quantized, for each layer that the candidate quantizes."""
