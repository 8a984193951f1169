"""The files next to a product belong to it, nothing else is replaced, and the page holds all of the result."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from shared.command.errors import ToolError
from shared.command.resources import ResourceEstimate
from shared.metrics.gates import check_gate
from shared.metrics.output_error import OutputError
from shared.quantize.coverage import RuleMatches, SkippedLayer, short_name
from shared.quantize.product import STATISTICS, Order, Quantized, Writing, model_folder, write_page, write_quantized
from shared.quantize.request import Request, path_next_to
from shared.quantize.result import ModelResult, QuantizationResult
from tests.shared.quantize.results import RULES, model_result, sensitive_layer

HAND = "hand_landmarker.task/hand_detector.tflite"
NAMES = [HAND, "gesture.tflite", "hand_landmarker.task/landmarks.tflite"]


@dataclass(frozen=True)
class Settings:
    """What a format's settings say of themselves."""

    static: bool = False

    def is_static(self) -> bool:
        return self.static


@dataclass
class Factory:
    """Products that take no time: a file of 1000 bytes, and any result.

    Args:
        folder: Where source and product lie.
        models: Of the result.
        is_static: Whether the recipe needs calibration statistics, which are the text "statistics" then.
        sensitivity: Whether layers are ranked.
        gates: Gate -> limit.
    """

    folder: Path
    models: list[ModelResult]
    is_static: bool = False
    sensitivity: bool = False
    gates: dict[str, float] | None = None
    resisting: tuple[str, ...] = ()
    made: int = 0

    @property
    def product(self) -> Path:
        return self.folder / "out.tflite"

    def write(self, **writing: object) -> Quantized:
        source = self.folder / "model.tflite"
        source.write_bytes(b"0" * 4000) if not source.exists() else None
        request = Request("int8", "dynamic", Settings(self.is_static), sensitivity=self.sensitivity)
        work = self.folder.parent / "work"
        names = [model.name for model in self.models]

        def make(draft: Path, folder: Path) -> QuantizationResult:
            self.made += 1
            draft.write_bytes(b"1" * 1000)
            for name in names if self.is_static else ():
                path = model_folder(folder, name, names) / STATISTICS
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("statistics")
            return QuantizationResult(self.models, resisting=list(self.resisting))

        order = Order(
            "quantize_tflite",
            source,
            self.product,
            dict.fromkeys(names, request),
            {},
            [source, self.folder / "recipe_that_is_read.json"] if (self.folder / "recipe_that_is_read.json").exists() else [source],
            ("numpy",),
            self.gates or {},
            ResourceEstimate,
            make,
            lambda _: (),
        )
        return write_quantized(order, Writing(**writing), work)  # type: ignore[arg-type]

    def files(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()} - {"model.tflite"}


Make = Callable[..., Factory]


@pytest.fixture
def factory(tmp_path: Path) -> Make:
    folder = tmp_path / "files"
    folder.mkdir()

    def make(*models: ModelResult, **options: object) -> Factory:
        return Factory(folder, list(models) or [model_result()], **options)  # type: ignore[arg-type]

    return make


def test_names_of_files_next_to_a_product_are_made_of_its_own_and_the_inner_model() -> None:
    output = Path("out/small.task")
    assert path_next_to(output, "m.tflite", ["m.tflite"], "search.jsonl") == Path("out/small_search.jsonl")
    assert path_next_to(output, HAND, NAMES, "search.jsonl") == Path("out/small_hand_detector_search.jsonl")


def test_no_two_models_share_a_file() -> None:
    names = ["one.task/a.tflite", "two.task/a.tflite"]
    assert len({path_next_to(Path("out.task"), name, names, "search.jsonl") for name in names}) == 2


def test_the_product_is_written_with_its_recipe_and_a_message(factory: Make) -> None:
    made = factory()
    done = made.write()
    assert done.ok and done.product is not None and done.page is None
    assert re.fullmatch(r".*out\.tflite: 3\.9 KiB -> 1000 B, 75\.0% smaller; \d+\.\d s", done.message)
    assert made.files() == {"out.tflite", "out.tflite.json", "out_recipe.json"}
    assert json.loads((made.folder / "out_recipe.json").read_text()) == RULES


def test_the_recipe_of_a_bundle_goes_by_inner_model(factory: Make) -> None:
    made = factory(model_result("a.tflite"), model_result("b.tflite", rules=[]))
    made.write()
    assert json.loads((made.folder / "out_recipe.json").read_text()) == {"a.tflite": RULES, "b.tflite": []}


def test_a_format_without_rules_writes_no_recipe(factory: Make) -> None:
    made = factory(model_result(rules=[]))
    made.write()
    assert made.files() == {"out.tflite", "out.tflite.json"}


def test_an_up_to_date_product_is_not_made_again(factory: Make) -> None:
    made = factory()
    first, again = made.write(), made.write()
    assert made.made == 1
    assert again.message.startswith("up to date: ")
    assert again.result == first.result


def test_ranked_layers_are_written_for_model_explorer(factory: Make) -> None:
    made = factory(model_result(sensitivity=[sensitive_layer("a", 0.5)]), sensitivity=True)
    made.write()
    assert json.loads((made.folder / "out_node_data.json").read_text())["m.tflite"]["results"] == {"a_out": {"value": 0.5}}


def static(factory: Make) -> Factory:
    sha256 = hashlib.sha256(b"statistics").hexdigest()
    return factory(model_result(calibration_sha256=sha256), is_static=True)


def test_a_product_whose_statistics_are_lost_or_changed_is_made_again(factory: Make) -> None:
    made = static(factory)
    made.write()
    statistics = made.folder / "out_calibration.json"
    assert statistics.read_text() == "statistics"
    assert made.write(refresh=True).product.up_to_date  # type: ignore[union-attr]
    for number, disturb in enumerate((statistics.unlink, lambda: statistics.write_text("others")), start=2):
        disturb()
        assert not made.write(refresh=True).product.up_to_date  # type: ignore[union-attr]
        assert (made.made, statistics.read_text()) == (number, "statistics")


@pytest.mark.parametrize("name", ["out_recipe.json", "out_calibration.json", "out_node_data.json", "out.tflite"])
def test_a_file_of_others_in_as_is_kept_before_any_work(factory: Make, name: str) -> None:
    made = factory(is_static=True, sensitivity=True)
    (made.folder / name).write_text("precious")
    what = "a file next to the output would be replaced" if name != "out.tflite" else "the output exists"
    with pytest.raises(ToolError, match=rf"{re.escape(name)}: {what}"):
        made.write()
    assert (made.made, (made.folder / name).read_text()) == (0, "precious")
    made.write(overwrite=True)
    assert made.made == 1


def test_a_file_that_is_read_is_never_written_over(factory: Make) -> None:
    made = factory()
    (made.folder / "recipe_that_is_read.json").write_text("rules")
    (made.folder / "out_recipe.json").symlink_to(made.folder / "recipe_that_is_read.json")
    with pytest.raises(ToolError, match="would replace one that is read"):
        made.write(overwrite=True)
    assert (made.made, (made.folder / "recipe_that_is_read.json").read_text()) == (0, "rules")


@pytest.mark.parametrize("name", ["model.tflite", "out.tflite", "out.tflite.json", "out_recipe.json", "nowhere/page.html"])
def test_a_page_in_as_of_another_file_is_refused_before_any_work(factory: Make, name: str) -> None:
    made = factory()
    with pytest.raises(ToolError, match=r"the report would replace a file|no such folder"):
        made.write(html=made.folder / name, overwrite=True)
    assert (made.made, made.files()) == (0, set())


# Gates.


@pytest.mark.parametrize(
    ("gates", "verdict"),
    [
        ({"min_coverage": 0.8}, "min_coverage 0.75, limit 0.8"),
        ({"min_speedup": 3.0, "max_size_mb": 1.0}, "min_speedup 2, limit 3"),
        ({"min_psnr": 40.0}, "min_psnr not measured, limit 40"),
        ({"max_error": 0.009, "min_cosine": 1.0}, "max_error 0.01, limit 0.009; min_cosine 0.9999, limit 1"),
        ({"max_error:other": 1.0}, "max_error:other not measured, limit 1"),
    ],
)
def test_a_broken_gate_is_reported_and_nothing_is_written(factory: Make, gates: dict[str, float], verdict: str) -> None:
    made = factory(gates=gates)
    done = made.write()
    assert (done.ok, done.product, made.files()) == (False, None, set())
    assert done.message == f"FAILED: {verdict}; nothing was written"
    assert [gate.name for gate in done.result.gates] == list(gates)


def test_gates_hold_for_every_model_and_say_which(factory: Make) -> None:
    done = factory(model_result("a"), model_result("b", ms=20.0), gates={"min_speedup": 1.0}).write()
    assert [(gate.model, gate.value, gate.ok) for gate in done.result.gates] == [("a", 2.0, True), ("b", 0.5, False)]
    assert done.message == "FAILED: b min_speedup 0.5, limit 1; nothing was written"


def test_the_coverage_of_a_model_that_the_recipe_cannot_change_is_none(factory: Make) -> None:
    done = factory(gates={"min_coverage": 0.5}, resisting=("first.tflite",)).write()
    assert [(gate.model, gate.value, gate.ok) for gate in done.result.gates] == [
        ("first.tflite", 0.0, False),
        ("m.tflite", 0.75, True),
    ]
    assert done.product is None


def test_kept_gates_are_part_of_the_result(factory: Make) -> None:
    done = factory(gates={"min_speedup": 1.0, "max_latency_ms": 6.0, "max_error": 0.02}).write()
    assert done.ok and done.product is not None
    assert [gate.ok for gate in done.result.gates] == [True] * 3


def test_a_slower_product_is_named_in_the_message(factory: Make) -> None:
    assert "; SLOWER than before: b" in factory(model_result("a"), model_result("b", ms=20.0)).write().message


# The page.


def page_of(tmp_path: Path, *models: ModelResult, **changes: object) -> str:
    result = replace(QuantizationResult(list(models)), **changes)  # type: ignore[arg-type]
    path = tmp_path / "page.html"
    shown = write_page(path, Path("source.tflite"), result, "the message")
    assert shown.models == len(models)
    return path.read_text()


def test_the_page_shows_everything_in_the_result(tmp_path: Path) -> None:
    layers = [sensitive_layer(f"layer{number}", 1 / (1 + number)) for number in range(50)]
    model = model_result(repairs="3 float16 constants folded to float32", sensitivity=layers, corrected_biases=4)
    gates = [
        check_gate("min_psnr", 39.0, 40.0, "m.tflite"),
        check_gate("min_speedup", None, 1.0),
        check_gate("max_error", 0.01, 0.02),
    ]
    text = page_of(tmp_path, model, model_result("slow.tflite", ms=20.0), unchanged=["geometry.binarypb"], gates=gates)
    parts = """
        source.tflite, quantized
        the message
        Carried over byte for byte: geometry.binarypb
        <h2>slow.tflite</h2>
        repaired first: 3 float16 constants folded to float32
        biases of 4 layers corrected
        10.00 ms
        y: relative error 1.000%
        Weights per op type
        2 of 3 quantized; 1 x excluded
        the worst 40 of 50 layers; bars relative to the worst layer
        All layers by sensitivity
        layer49
        The recipe, rule by rule
        Skipped: 1 layers
        not measured
        min_psnr
    """
    assert [part for part in map(str.strip, parts.strip().splitlines()) if part not in text] == []
    assert '<p class="bad">SLOWER: latency 10.00 -&gt; 20.00 ms</p>' in text
    assert (text.count('class="bad">39<'), text.count('class="good">0.01<')) == (1, 1)


def test_a_page_without_sensitivity_or_gates_has_no_empty_sections(tmp_path: Path) -> None:
    text = page_of(tmp_path, model_result(matches=[], skipped=[]))
    for part in ("Gates", "quantized alone", "All layers", "rule by rule", "Skipped", "Carried over"):
        assert part not in text


def test_a_long_name_is_cut_on_the_page_and_whole_under_the_pointer(tmp_path: Path) -> None:
    name, regex = "module/" * 50 + "conv", "^(?:" + "layer;|" * 50 + ")$"
    rule = RuleMatches(regex, "*", "min_max_uniform_quantize", "int8 weights", 3, 2)
    text = page_of(tmp_path, model_result(matches=[rule], skipped=[SkippedLayer("CONV_2D", name, 4, "excluded")]))
    assert f'<td title="{name}">{short_name(name)}</td>' in text
    assert f'<td title="{regex}">{short_name(regex)}</td>' in text


def test_the_page_loads_nothing_and_shows_names_as_text(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>"
    error = OutputError(name, 0.01, 0.99, 0.1)
    text = page_of(tmp_path, model_result(name, error=error, sensitivity=[sensitive_layer(name, None)]), unchanged=[name])
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert not re.search(r"(?:src|href)\s*=|https?://|url\(|@import", text)


def test_the_page_is_written_next_to_the_product_with_its_provenance_inside(factory: Make) -> None:
    made = factory()
    done = made.write(html=made.folder / "page.html")
    assert done.page is not None and done.message.endswith(f"; see {made.folder / 'page.html'}")
    assert made.files() == {"out.tflite", "out.tflite.json", "out_recipe.json", "page.html"}
    assert "edgepress" in (made.folder / "page.html").read_text()
    again = made.write(html=made.folder / "page.html")
    assert again.product is not None and again.product.up_to_date
