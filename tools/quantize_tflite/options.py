"""A user's choices, and which of them are meant for which model of a bundle."""

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shared.calibration.dataset import CalibrationSet, InputRange
from shared.command.errors import ToolError
from tools.quantize_tflite.recipes import NONE, Rules, check_rules, parse_selector, read_recipe_file, resolve_recipe
from tools.quantize_tflite.request import IoDtype, SearchWish, Wish
from tools.quantize_tflite.search import Target

DEFAULT_RECIPE = "int8"


@dataclass(frozen=True)
class Choices:
    """The options that decide what is done to which model; each may be meant for one inner model of a bundle."""

    recipe: str | None
    rules: list[str]
    exclude: list[str]
    only: list[str]
    max_drop: list[str]
    target: Target
    calibration: Path | None
    input_range: InputRange | None
    samples: int | None
    io_dtype: IoDtype
    corrects_bias: bool
    debug: bool
    short_names: bool
    in_bundle: bool

    def wish(self, name: str, names: Sequence[str], output: Path, executor: Callable[[], AbstractContextManager[Executor]]) -> Wish:
        """Return what is wanted of one model.

        Args:
            name: The model.
            names: All models; just the one for a .tflite file.
            output: The product, beside which files fall.
            executor: Where candidates are measured.
        """
        mine = partial(_mine, name=name, names=names)
        rules = [_split(text, "--rule SELECTOR=RECIPE") for text in self.rules]
        own = [(what, recipe) for selector, recipe in rules if (what := mine(selector)) is not None]
        whole = [recipe for what, recipe in own if what == ""]
        only, exclude = ([what for text in texts if (what := mine(text)) is not None] for texts in (self.only, self.exclude))
        is_left_out = "" in exclude or (self.only and not only)
        recipe = NONE if is_left_out else whole[-1] if whole else self.recipe or DEFAULT_RECIPE
        if is_left_out and (meant := self._meant_for(name, names)):
            raise ToolError("an option is for a model that --exclude or --only leaves out", where=name, got=", ".join(meant))
        expansion, base = _resolve(recipe, name, in_bundle=self.in_bundle)
        limits = {} if whole or is_left_out else self._limits(name, names)
        narrowed = [(parse_selector(what), chosen) for what, chosen in own if what and not is_left_out]
        if limits and (narrowed or any(only)):
            raise ToolError("--max-drop decides each layer's recipe by itself", remedy="leave out --rule and --only, or --max-drop")
        if limits and self.recipe is not None and not self.in_bundle:
            raise ToolError("--max-drop finds the recipe by itself", remedy="leave out --recipe, or --max-drop")
        samples, statistics = self._calibration(name, names)
        return Wish(
            recipe="search" if limits else recipe,
            expansion=f"mixed precision for {self.target}" if limits else expansion,
            base=base,
            only=[] if "" in only else [parse_selector(what) for what in only],
            rules=narrowed,
            exclude=[parse_selector(what) for what in exclude if what],
            samples=samples,
            input_range=self.input_range,
            statistics=statistics,
            io_dtype=self.io_dtype,
            corrects_bias=self.corrects_bias,
            search=SearchWish(limits, self.target, beside(output, name, names, "search.jsonl")) if limits else None,
            debug=self.debug,
            short_names=self.short_names,
            in_bundle=self.in_bundle,
            executor=executor,
        )

    def recipe_files(self) -> list[Path]:
        """Return the JSON files that recipes are read from."""
        recipes = [self.recipe or "", *(text.rpartition("=")[2] for text in self.rules)]
        return [Path(recipe) for recipe in recipes if recipe.endswith(".json")]

    def _meant_for(self, name: str, names: Sequence[str]) -> list[str]:
        """Return the rules and limits that name this very model."""
        texts = [text for text in (*self.rules, *self.max_drop) if "=" in text]
        said = [(text, text.rpartition("=")[0]) for text in texts]
        return [text for text, what in said if _mine(what, name=name, names=names) not in (None, what)]

    def _calibration(self, name: str, names: Sequence[str]) -> tuple[CalibrationSet | None, Path | None]:
        """Return the samples of a model, or statistics from an earlier run."""
        path = self.calibration
        if path is None:
            return None, None
        if self.in_bundle:
            stem = _file_stem(name, names)
            own = [found for found in (path / f"{stem}.npz", path / stem) if found.exists()]
            if not own and any(path.glob("*.npz")):
                return None, None
            path = own[0] if own else path
        if path.suffix == ".json" and "model_qsvs" in _json_keys(path):
            return None, path
        return CalibrationSet(path, self.input_range, self.samples), None

    def _limits(self, name: str, names: Sequence[str]) -> dict[str, float]:
        """Return output -> limit for a model; '' for all its other outputs; empty where it is not searched."""
        limits = {}
        for text in self.max_drop:
            what, value = _split(text, "--max-drop X, OUTPUT=X, MODEL=X or MODEL:OUTPUT=X") if "=" in text else ("", text)
            try:
                limit = float(value)
            except ValueError:
                limit = math.nan
            if not 0 < limit < math.inf:
                raise ToolError("--max-drop is no positive number", got=text, expected="such as 0.01, or OUTPUT=0.01")
            mine = _mine(what, name=name, names=names) if what else ""
            if mine is not None:
                limits[mine] = limit
        return limits


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


def beside(output: Path, name: str, names: Sequence[str], what: str) -> Path:
    """Return the path of a file that falls beside the product, for one model."""
    inner = f"_{_file_stem(name, names)}" if len(names) > 1 else ""
    return output.with_name(f"{output.stem}{inner}_{what}")


def _file_stem(name: str, names: Sequence[str]) -> str:
    """Return what files about one model are called: its own name without suffix, with the bundle's where another has the same."""
    stems = [Path(other).stem for other in names]
    stem = Path(name).stem
    return stem if stems.count(stem) < 2 else name.removesuffix(Path(name).suffix).replace("/", "_")
