"""Options of quantize_tflite, and what they ask for each model of a bundle."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from shared.calibration.dataset import CalibrationSet, holdout_of
from shared.command.errors import ToolError
from shared.command.options import InputRange, Objective
from shared.quantize.request import ALL_OUTPUTS, Limits, Request, file_stem, parse_max_error, path_next_to
from shared.runtime.executors import choose_executor
from tools.quantize_tflite.recipes import (
    NONE,
    Rules,
    Selector,
    check_rules,
    needs_calibration,
    parse_selector,
    read_recipe_file,
    resolve_recipe,
)

DEFAULT_RECIPE = "int8"
IoDtype = Literal["float32", "int8", "int16"]


@dataclass(frozen=True)
class TfliteSettings:
    """What only TFLite's quantizer is asked for.

    Args:
        base: Rules of the recipe.
        only: Where the base holds; everywhere when empty.
        rules: Selectors with a recipe of their own: selector, name of the recipe, its rules.
        exclude: What stays as it is.
        statistics: A file of calibration statistics from an earlier run.
        io_dtype: Type of inputs and outputs of a statically quantized model.
        short_names: Give inner tensors short names at the end.
    """

    base: Rules = field(default_factory=list)
    only: Sequence[Selector] = ()
    rules: Sequence[tuple[Selector, str, Rules]] = ()
    exclude: Sequence[Selector] = ()
    statistics: Path | None = None
    io_dtype: IoDtype = "float32"
    short_names: bool = False

    def is_static(self) -> bool:
        """Whether ranges of activations are needed, from samples or from a file."""
        return needs_calibration([*self.base, *(rule for _, _, rules in self.rules for rule in rules)])

    def changes_nothing(self) -> bool:
        """Whether no rule is there."""
        return not self.base and not self.rules


@dataclass(frozen=True)
class TfliteOptions:
    """The options that decide what is done to which model; each may be meant for one inner model of a bundle."""

    recipe: str | None = None
    rule: Sequence[str] = ()
    exclude: Sequence[str] = ()
    only: Sequence[str] = ()
    max_error: Sequence[str] = ()
    min_psnr: float | None = None
    min_cosine: float | None = None
    objective: Objective = "size"
    calibration: Path | None = None
    holdout: Path | None = None
    input_range: InputRange | None = None
    samples: int | None = None
    io_dtype: IoDtype = "float32"
    correct_bias: bool = True
    sensitivity: bool = False
    allow_large_error: bool = False
    short_names: bool = False
    threads: int | None = None
    dask: str | None = None
    in_bundle: bool = False

    def request(self, name: str, names: Sequence[str], output: Path) -> Request:
        """Return what is asked for one model.

        Args:
            name: The model.
            names: All models; just the one for a .tflite file.
            output: The product; the ledger of a search lies next to it.
        """
        mine = partial(_mine, name=name, names=names)
        rules = [_split(text, "--rule SELECTOR=RECIPE") for text in self.rule]
        own = [(what, recipe) for selector, recipe in rules if (what := mine(selector)) is not None]
        whole = [recipe for what, recipe in own if what == ""]
        only, exclude = ([what for text in texts if (what := mine(text)) is not None] for texts in (self.only, self.exclude))
        is_left_out = "" in exclude or (bool(self.only) and not only)
        recipe = NONE if is_left_out else whole[-1] if whole else self.recipe or DEFAULT_RECIPE
        if is_left_out and (meant := self._meant_for(name, names)):
            raise ToolError("an option is for a model that --exclude or --only leaves out", where=name, got=", ".join(meant))
        expansion, base = _resolve(recipe, name, in_bundle=self.in_bundle)
        limits = Limits() if whole or is_left_out else self._limits(name, names)
        narrowed = [(parse_selector(what), chosen) for what, chosen in own if what and not is_left_out]
        if limits and (narrowed or any(only)):
            remedy = "leave out --rule and --only, or the limit"
            raise ToolError("a search for limits decides each layer's recipe by itself", remedy=remedy)
        if limits and self.recipe is not None and not self.in_bundle:
            raise ToolError("a search for limits finds the recipe by itself", remedy="leave out --recipe, or the limit")
        calibration, statistics = self._calibration(name, names)
        return Request(
            recipe="search" if limits else recipe,
            expansion=f"mixed precision for {self.objective}" if limits else expansion,
            settings=TfliteSettings(
                base=base,
                only=[] if "" in only else [parse_selector(what) for what in only],
                rules=[(selector, *resolve_recipe(chosen)) for selector, chosen in narrowed],
                exclude=[parse_selector(what) for what in exclude if what],
                statistics=statistics,
                io_dtype=self.io_dtype,
                short_names=self.short_names,
            ),
            calibration=calibration,
            holdout=None if self.holdout is None else holdout_of(self.holdout),
            input_range=self.input_range,
            corrects_bias=self.correct_bias,
            limits=limits,
            objective=self.objective,
            ledger=path_next_to(output, name, names, "search.jsonl") if limits else None,
            sensitivity=self.sensitivity,
            allows_large_error=self.allow_large_error,
            threads=self.threads,
            in_bundle=self.in_bundle,
            executor=choose_executor(self.dask),
        )

    def recipe_files(self) -> list[Path]:
        """Return the JSON files that recipes are read from."""
        recipes = [self.recipe or "", *(text.rpartition("=")[2] for text in self.rule)]
        return [Path(recipe) for recipe in recipes if recipe.endswith(".json")]

    def has_limits(self) -> bool:
        """Whether a search is asked for."""
        return bool(self.max_error) or self.min_psnr is not None or self.min_cosine is not None

    def _meant_for(self, name: str, names: Sequence[str]) -> list[str]:
        """Return the rules and limits that name this very model."""
        texts = [text for text in (*self.rule, *self.max_error) if "=" in text]
        said = [(text, text.rpartition("=")[0]) for text in texts]
        return [text for text, what in said if _mine(what, name=name, names=names) not in (None, what)]

    def _calibration(self, name: str, names: Sequence[str]) -> tuple[CalibrationSet | None, Path | None]:
        """Return the samples of a model, or statistics from an earlier run."""
        path = self.calibration
        if path is None:
            return None, None
        if self.in_bundle:
            stem = file_stem(name, names)
            own = [found for found in (path / f"{stem}.npz", path / stem) if found.exists()]
            if not own and any(path.glob("*.npz")):
                return None, None
            path = own[0] if own else path
        if path.suffix == ".json" and "model_qsvs" in _json_keys(path):
            return None, path
        return CalibrationSet(path, self.input_range, self.samples), None

    def _limits(self, name: str, names: Sequence[str]) -> Limits:
        """Return the limits of a model: the common ones, and the errors that are meant for it."""
        errors = {}
        for what, limit in parse_max_error(self.max_error).items():
            output = _mine(what, name=name, names=names) if what else ALL_OUTPUTS
            if output is not None:
                errors[output] = limit
        return Limits(errors, self.min_psnr, self.min_cosine)


def _resolve(recipe: str, name: str, *, in_bundle: bool) -> tuple[str, Rules]:
    """Return the full name and the rules of a recipe for one model; a file may hold rules by inner model."""
    if recipe.endswith(".json"):
        content = read_recipe_file(Path(recipe))
        if isinstance(content, dict) and in_bundle:
            return recipe, check_rules(content[name], Path(recipe)) if content.get(name) else []
    return resolve_recipe(recipe)


def _split(text: str, form: str) -> tuple[str, str]:
    what, equals, value = text.rpartition("=")
    if not equals or not what or not value:
        raise ToolError(f"not of the form {form}", got=text)
    return what, value


def _mine(text: str, *, name: str, names: Sequence[str]) -> str | None:
    """Return what an option says for one model: '' for the whole of it, else a selector; None where it is about another.

    Inner models are named as in the bundle, or by the last part of that name: MODEL, or MODEL:SELECTOR.
    """
    lasts = [other.rpartition("/")[2] for other in names]
    called = [(other, other) for other in sorted(names, key=len, reverse=True)]
    called += sorted(zip(lasts, names, strict=True), key=lambda pair: -len(pair[0]))
    for short, other in called:
        if text == short or text.startswith(f"{short}:"):
            if short != other and lasts.count(short) > 1:
                full = ", ".join(full for full, last in zip(names, lasts, strict=True) if last == short)
                raise ToolError("several inner models have this name", got=text, expected=f"one of {full}")
            return text[len(short) + 1 :] if other == name else None
    return text


def _json_keys(path: Path) -> set[str]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_text(encoding="utf-8"))
        return set(content) if isinstance(content, dict) else set()
    return set()
