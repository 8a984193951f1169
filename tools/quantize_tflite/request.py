"""What is wanted of one model: recipe, rules, samples, limits."""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shared.calibration.dataset import CalibrationSet, InputRange
from shared.runtime.executors import local_processes
from tools.quantize_tflite.recipes import Rules, Selector, needs_calibration, resolve_recipe
from tools.quantize_tflite.search import Target

IoDtype = Literal["float32", "int8", "int16"]


@dataclass(frozen=True)
class SearchWish:
    """What a search must keep, and where it works.

    Args:
        limits: Output name -> largest relative error allowed; '' is for all others.
        target: What to make small.
        ledger: Where its measurements are kept.
    """

    limits: dict[str, float]
    target: Target
    ledger: Path


@dataclass(frozen=True)
class Wish:
    """What is wanted of one model.

    Args:
        recipe: As the user named it.
        expansion: Its full name.
        base: Its rules.
        only: Where the base holds; everywhere when empty.
        rules: Selectors with a recipe of their own.
        exclude: What stays as it is.
        samples: Real inputs, where there are any.
        input_range: Range of the model's image input, as the user says.
        statistics: A file of calibration statistics from an earlier run.
        io_dtype: Type of inputs and outputs of a statically quantized model.
        corrects_bias: Whether biases are corrected where there are samples.
        search: Find the precisions by a search.
        debug: Measure the damage of each layer.
        short_names: Give inner tensors short names at the end.
        in_bundle: Whether selectors may be meant for other models of the same bundle.
        executor: Makes the executor that measures candidates and layers.
    """

    recipe: str
    expansion: str
    base: Rules
    only: Sequence[Selector] = ()
    rules: Sequence[tuple[Selector, str]] = ()
    exclude: Sequence[Selector] = ()
    samples: CalibrationSet | None = None
    input_range: InputRange | None = None
    statistics: Path | None = None
    io_dtype: IoDtype = "float32"
    corrects_bias: bool = True
    search: SearchWish | None = None
    debug: bool = False
    short_names: bool = False
    in_bundle: bool = False
    executor: Callable[[], AbstractContextManager[Executor]] = local_processes

    def as_arguments(self) -> dict[str, object]:
        """Return what decides the product, JSON values only."""
        search = self.search
        return {
            "expansion": self.expansion,
            "base": self.base,
            "only": [selector.text for selector in self.only],
            "rules": [[selector.text, recipe, resolve_recipe(recipe)[1]] for selector, recipe in self.rules],
            "exclude": [selector.text for selector in self.exclude],
            "samples": [str(self.samples.path), self.samples.most] if self.samples else None,
            "input_range": self.input_range,
            "io_dtype": self.io_dtype,
            "corrects_bias": self.corrects_bias,
            "search": [search.limits, search.target] if search else None,
            "debug": self.debug,
            "short_names": self.short_names,
        }

    def is_static(self) -> bool:
        """Whether ranges of activations are needed, from samples or from a file."""
        return needs_calibration([*self.base, *(rule for _, recipe in self.rules for rule in resolve_recipe(recipe)[1])])

    def files(self) -> list[Path]:
        """Return the files it reads beside the model."""
        return [*(self.samples.files() if self.samples else []), *([self.statistics] if self.statistics else [])]
