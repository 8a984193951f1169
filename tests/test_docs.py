"""The documentation describes the code as it is, and its figures are the measured ones."""

import ast
import contextlib
import importlib
import importlib.util
import inspect
import io
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pytest

import noxfile
from models.face_landmarker.check import check
from shared.metrics.alarm import LEAST_COSINE, LEAST_MADE_UP_COSINE, LEAST_PSNR_DB
from shared.networks.card import Gates, load_card
from shared.quantize.result import GATES as QUANTIZER_GATES
from shared.runtime.benchmark import SLOWER
from tests.bench import guide, tables
from tests.conftest import ROOT, Run
from tests.test_recipes import RECIPES, SESSIONS, parse_command
from tools.compare.gates import GATES as COMPARE_GATES
from tools.compare.gates import flat_gates
from tools.quantize_onnx.options import OnnxSettings, Recipe, parse_settings
from tools.quantize_tflite.recipes import ALIASES

TOOLS = sorted(noxfile.TOOLS)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MARKDOWN = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "tools").glob("*.md"), *(ROOT / "models").glob("*.md"), *(ROOT / "models").glob("[!o]*/*.md")]
)
README, TOOLS_README, MODELS_README = ROOT / "README.md", ROOT / "tools" / "README.md", ROOT / "models" / "README.md"
CONTRIBUTING, BENCHMARKS = ROOT / "CONTRIBUTING.md", tables.BENCHMARKS
GUIDES = (README, TOOLS_README, MODELS_README, BENCHMARKS, CONTRIBUTING)
MOST_README_LINES = 160
HEAVY = {"torch", "litert_torch", "ai_edge_litert", "ai_edge_quantizer", "safetensors", "PIL", "jinja2", "cv2"}
FIGURE = re.compile(r"\d[\d.,]*(?: |-)?(?:%|[KMG]i?B\b|ms\b|s\b|dB\b|times\b|seconds\b|minutes\b)")
FRACTION = re.compile(r"\b(?:half|third|quarter|eighth|tenth|twice)\b[^.]{0,30}\b(?:size|fast|large|small|memory)")
# The largest protobuf message; above it a product counts as slower; below it an image is of no use.
UNMEASURED = {"2 GiB", f"{SLOWER:g} times", f"{LEAST_PSNR_DB:g} dB"}
FORBIDDEN = {"wish", "workshop", "pressed", "pressing", "spelled", "told", "vouched", "sniffing", "strangers"}
HISTORY = {"CHANGELOG.md", "DECISIONS.md"}  # written in the words of their day


def identified(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(text: str, language: str) -> list[str]:
    """Return the contents of fenced blocks."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def without_blocks(text: str) -> str:
    """Return a document without fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """Return a document without generated sections, fenced blocks and inline code."""
    return re.sub(r"`[^`]*`", "", without_blocks(tables.MARKED.sub("", text)))


def commands(path: Path) -> Iterator[list[str]]:
    """Yield the commands of a document's shell blocks and transcripts, word by word."""
    text = path.read_text()
    lines = [line for block in blocks(text, "sh") for line in block.splitlines()]
    lines += [line.removeprefix("$ ") for block in blocks(text, "console") for line in block.splitlines() if line.startswith("$ ")]
    for line in lines:
        yield from (shlex.split(part, comments=True) for part in line.split("&&"))


def snippet_of(path: Path, part: str) -> str:
    """Return the Python block of a document that contains a text."""
    (found,) = [snippet for snippet in blocks(path.read_text(), "python") if part in snippet]
    return found


@dataclass(frozen=True)
class ReadmeRun:
    """A run of the README's Python: its folder, in which products lie in models/out, and its output."""

    folder: Path
    printed: str


@pytest.fixture(scope="module")
def readme_run(tmp_path_factory: pytest.TempPathFactory) -> ReadmeRun:
    """Run the README's Python in a folder that holds no product."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "models").mkdir()
    (folder / "models" / "miniseal").symlink_to(ROOT / "models" / "miniseal")
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(snippet_of(README, "from tools.compare"), {})  # noqa: S102 - our own text
    return ReadmeRun(folder, printed.getvalue())


def anchor(heading: str) -> str:
    """Return a heading's anchor as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("tool", TOOLS)
def test_help_shows_the_summary_and_the_example_and_loads_nothing_heavy(tool: str) -> None:
    script = f"""
import atexit, runpy, sys
sys.argv = ["{tool}", "--help"]
atexit.register(lambda: print(sorted({HEAVY} & sys.modules.keys())))
runpy.run_module("tools.{tool}", run_name="__main__", alter_sys=True)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    *text, loaded = done.stdout.splitlines()
    summary = inspect.getdoc(getattr(importlib.import_module(f"tools.{tool}"), tool)).splitlines()[0]  # type: ignore[union-attr]
    shown = " ".join(" ".join(text).split())
    assert summary in shown
    assert f"Example: python -m tools.{tool}" in shown
    assert "Raises" not in shown
    assert loaded == "[]"


@pytest.mark.parametrize("tool", TOOLS)
def test_the_example_of_a_tool_parses(tool: str) -> None:
    module = inspect.getmodule(getattr(importlib.import_module(f"tools.{tool}"), tool))
    assert module is not None
    example = re.search(r"Example:\n +python -m tools\.(\w+) (.+)", module.__doc__ or "")
    assert example is not None
    assert example[1] == tool
    parse_command(f"tools.{tool}", shlex.split(example[2]))


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_has_a_dependency_set_a_readme_row_and_a_section(tool: str) -> None:
    assert tool.replace("_", "-") in PROJECT["optional-dependencies"]
    assert f"| `{tool}` |" in README.read_text()
    assert f"\n## {tool}\n" in TOOLS_README.read_text()


def test_the_readme_is_short_and_begins_with_one_sentence_and_two_commands() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= MOST_README_LINES
    title, sentence, *_ = text.split("\n\n")
    assert title == f"# {PROJECT['name']}"
    assert sentence.count(". ") == 0
    assert sentence.endswith(".")
    assert [name for name in ("demo", "chunkyseal_int8") if f"nox -s {name}" in blocks(text, "sh")[0]] == [
        "demo",
        "chunkyseal_int8",
    ]
    assert len(blocks(text, "sh")[0].splitlines()) == 2


@pytest.mark.parametrize("path", MARKDOWN, ids=identified)
def test_every_command_in_a_document_parses(path: Path) -> None:
    for words in commands(path):
        if words[:3] == ["nox", "-s", "tests"] or words[:2] != ["nox", "-s"]:
            module = words[2] if words[:2] == ["python", "-m"] else ""
            if module.startswith("tools."):
                parse_command(module, words[3:])
            continue
        rest = words[words.index("--") + 1 :] if "--" in words else []
        names = words[2 : words.index("--")] if "--" in words else words[2:]
        assert set(names) <= SESSIONS.keys(), words
        for name in set(names) & set(TOOLS):
            parse_command(f"tools.{name}", rest)


@pytest.mark.parametrize("path", MARKDOWN, ids=identified)
def test_every_session_a_document_names_exists(path: Path) -> None:
    if path.name in HISTORY:
        return
    for words in re.findall(r"nox -s ([a-z_0-9 ]+)", path.read_text()):
        for name in words.split():
            assert name in SESSIONS, name


@pytest.mark.parametrize("path", MARKDOWN, ids=identified)
def test_links_resolve(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(path.read_text())):
        if target.startswith("https://"):
            continue
        name, _, fragment = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), target
        if fragment:
            assert fragment in {anchor(line.lstrip("#")) for line in file.read_text().splitlines() if line.startswith("#")}, target


@pytest.mark.parametrize("path", GUIDES, ids=identified)
def test_every_path_and_dotted_name_in_a_guide_exists(path: Path) -> None:
    for span in re.findall(r"`([^`\n]+)`", without_blocks(path.read_text())):
        is_path = re.fullmatch(r"(?:tools|shared|tests|models)/[\w./]+", span) and not re.search("NAME|verb_noun", span)
        if is_path and not span.startswith(("models/out", "models/checkpoints")):
            assert (ROOT / span).exists(), span
        if re.fullmatch(r"(?:tools|shared)(?:\.\w+)+", span):
            module, _, name = span.rpartition(".")
            assert hasattr(importlib.import_module(module), name) or importlib.util.find_spec(span), span


@pytest.mark.parametrize(
    ("place", "holds"),
    [
        ("tools/quantize_onnx/bias.py", "bias"),
        ("shared/runtime/speed.py", "def is_slower"),
        ("shared/media/attacks.py", "KINDS"),
        ("shared/networks/detector.py", "nn.Module"),
        ("shared/quantize/pipeline.py", "def quantize_model"),
        ("shared/metrics/gates.py", "def check_gate"),
        ("shared/files/artifacts.py", "def build"),
        ("shared/quantize/search.py", "class Search"),
    ],
)
def test_the_map_of_the_code_leads_to_the_right_file(place: str, holds: str) -> None:
    assert place in README.read_text() + CONTRIBUTING.read_text()
    assert holds in (ROOT / place).read_text()


@pytest.mark.parametrize("document", [README, BENCHMARKS], ids=identified)
def test_generated_sections_are_what_the_result_files_say(document: Path) -> None:
    text = document.read_text()
    assert tables.fill(text) == text


def test_every_generated_section_is_shown_once() -> None:
    found = [name for document in (README, BENCHMARKS) for _, name, _ in tables.MARKED.findall(document.read_text())]
    assert sorted(found) == sorted(tables.SECTIONS)


def test_a_changed_figure_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    results = tables.read_results("demo")
    results["models"][1]["size_mib"] += 1
    monkeypatch.setattr(tables, "read_results", lambda name: results)
    assert tables.render("demo") not in BENCHMARKS.read_text()


def test_every_recipe_has_a_row_with_its_products_figures() -> None:
    text = tables.render("sessions")
    rows = {name: next(line for line in text.splitlines() if line.startswith(f"| `{name}` |")) for name in RECIPES}
    assert all(row.count(" | ") == 3 for row in rows.values())
    assert {name for name, row in rows.items() if tables.NOT_MEASURED in row} <= {
        "pixelseal_int8",
        "videoseal_0_int8",
        "chunkyseal_onnx_int8",
    }


def test_pixelseals_network_is_videoseals() -> None:
    one, other = load_card("pixelseal"), load_card("videoseal")
    assert all(getattr(one, name) == getattr(other, name) for name in ("nbits", "depths", "dims", "stem_stride", "image_size"))


@pytest.mark.parametrize("path", GUIDES, ids=identified)
def test_a_figure_in_prose_is_one_of_a_measured_table(path: Path) -> None:
    text = prose(path.read_text())
    measured = " ".join(map(tables.render, tables.SECTIONS))
    assert [figure for figure in FIGURE.findall(text) if figure not in measured and figure not in UNMEASURED] == []
    assert FRACTION.findall(text) == []


def test_a_figure_in_prose_without_a_table_is_noticed() -> None:
    assert FIGURE.findall(prose("`a 1 GB` It saves 43.21% and 3 MiB, 5 times as fast.")) == ["43.21%", "3 MiB", "5 times"]
    assert FRACTION.findall("an eighth of the size")


def test_the_measured_products_keep_the_gates_of_their_cards() -> None:
    products = tables.read_results("guide")["products"]
    assert {row["recipe"] for row in products} == {f"{name}_{recipe}" for name in guide.NETWORKS for recipe in guide.RECIPES}
    for row in products:
        model, _, precision = row["recipe"].rpartition("_")
        gates = load_card(model).gates[precision]
        assert gates.max_size_mb is not None
        assert row["product_mib"] <= gates.max_size_mb
        assert row["cosine"] >= (gates.min_cosine or 0)
        assert row["bit_agreement"] >= (gates.min_bit_agreement or 0)
        assert row["speedup"] >= (gates.min_speedup or 0)


def test_the_demos_product_kept_its_gates() -> None:
    products = {model["name"]: model for model in tables.read_results("demo")["models"]}
    limits = {name: limit for name, limit in flat_gates(asdict(load_card("miniseal").gates["int8"])).items() if limit is not None}
    values = products["int8"]["gates"]
    assert values.keys() == limits.keys()
    for name, limit in limits.items():
        assert values[name] <= limit if name.startswith("max") else values[name] >= limit, name


def test_the_face_landmarker_kept_its_limits() -> None:
    results = tables.read_results("face_landmarker")
    limits = {name: option.default for name, option in inspect.signature(check).parameters.items() if name.startswith("max_")}
    assert results["landmark_error_percent"] <= limits["max_landmark_error"]
    assert results["blendshape_error"] <= limits["max_blendshape_error"]
    assert results["slowdown"] <= limits["max_slowdown"]
    assert results["faces_before"] == results["faces_after"] > 0
    assert results["size_after_bytes"] <= 2_200_000


def test_the_documents_words_about_recipes_are_what_was_measured() -> None:
    demo = {model["name"]: model for model in tables.read_results("demo")["models"]}
    assert demo["int8"]["speedup"] > SLOWER
    assert max(demo[name]["speedup"] for name in ("fp16", "int8-weight-only", "int4")) <= SLOWER
    assert min(demo, key=lambda name: demo[name]["size_mib"]) == "int4"
    products = {row["recipe"]: row for row in tables.read_results("guide")["products"]}
    for network in guide.NETWORKS:
        assert products[f"{network}_int8"]["speedup"] > demo["int8"]["speedup"]
        assert products[f"{network}_fp16"]["speedup"] <= SLOWER
    for model in tables.read_results("onnx_recipes"):
        rows = {row["recipe"]: row for row in model["rows"]}
        assert rows["int8-static"]["speedup"] > 1, model["title"]
        if "int8" in rows:
            assert rows["int8"]["speedup"] * SLOWER < 1, model["title"]
            assert rows["fp16"]["speedup"] <= SLOWER, model["title"]
            assert rows["fp16"]["size_bytes"] < 0.6 * rows["float32"]["size_bytes"], model["title"]


def test_the_transcript_is_what_the_tool_prints(readme_run: ReadmeRun, tmp_path: Path, run_tool: Run) -> None:
    shown = tables.read_results("demo")["transcript"]
    words = shlex.split(shown["command"])
    assert words[:3] == ["python", "-m", "tools.quantize_tflite"]
    model = readme_run.folder / "models" / "out" / Path(words[3]).name
    done = run_tool("quantize_tflite", model, "-o", tmp_path / "out.tflite", *words[words.index("--recipe") :])
    assert done.returncode == 0
    printed = [line.rstrip() for line in done.stdout.splitlines()]
    coverage = shown["output"][: 1 + next(number for number, line in enumerate(shown["output"]) if line.startswith("└"))]
    assert len(coverage) == 11
    assert printed[: len(coverage)] == coverage
    assert next(line for line in shown["output"] if "of the weight bytes quantized" in line) in printed


def test_gates_and_settings_are_described_as_they_are() -> None:
    text = TOOLS_README.read_text()
    gates = {name: cells for name, *cells in re.findall(r"^\| `(m[a-z_]+)` \| .+? \| ?(.*?) \| ?(.*?) ?\|$", text, re.MULTILINE)}
    assert gates.keys() == {*QUANTIZER_GATES, *COMPARE_GATES}
    assert {name for name, (quantizers, _) in gates.items() if quantizers} == set(QUANTIZER_GATES)
    assert {name for name, (_, compare) in gates.items() if compare} == set(COMPARE_GATES)
    assert {entry.name for entry in fields(Gates)} <= gates.keys()
    settings = blocks_of_rows(text, "| setting | values | default |")
    assert {row[0].strip("`") for row in settings} == {entry.name for entry in fields(OnnxSettings)}
    for name, values, _ in settings:
        for value in re.findall(r"`(\w+)`", values):
            parse_settings([f"{name.strip('`')}={value}"], "int8-static")


def blocks_of_rows(text: str, header: str) -> list[list[str]]:
    """Return the cells of the rows of a table."""
    rows = text[text.index(header) :].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def test_every_recipe_of_the_quantizers_is_described() -> None:
    text = TOOLS_README.read_text()
    of_tflite = blocks_of_rows(text, "| recipe | AI Edge Quantizer's name | use |")
    assert {row[0].strip("`"): re.findall(r"`([^`]+)`", row[1])[0] for row in of_tflite} == ALIASES
    of_onnx = blocks_of_rows(text, "| recipe | product | use |")
    assert {row[0].strip("`") for row in of_onnx} == set(Recipe.__args__)  # type: ignore[attr-defined]


def test_the_fields_of_a_card_are_described() -> None:
    text = MODELS_README.read_text()
    for name in tomllib.loads((ROOT / "models" / "miniseal.toml").read_text()):
        assert f"`{name}`" in text or f"`[{name}" in text, name


def test_torch_and_the_quantizer_are_pinned_and_every_dependency_is_constrained() -> None:
    pins = dict(line.lower().split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    assert pins["torch"] == "2.13.0"
    wanted = [*PROJECT["dependencies"], *(name for names in PROJECT["optional-dependencies"].values() for name in names)]
    for name in {re.match(r"[A-Za-z0-9._-]+", requirement)[0] for requirement in wanted} - {"edgepress"}:  # type: ignore[index]
        assert name in pins


@pytest.mark.parametrize("path", MARKDOWN, ids=identified)
def test_the_python_snippets_of_a_document_name_what_exists(path: Path) -> None:
    for snippet in blocks(path.read_text(), "python"):
        for module, names in re.findall(r"^from (\S+) import (.+)$", snippet, re.MULTILINE):
            for name in names.split(", "):
                assert hasattr(importlib.import_module(module), name)
        compile(snippet, path.name, "exec")


def test_the_readmes_python_runs(readme_run: ReadmeRun) -> None:
    coverage, ok, speedup = readme_run.printed.split()
    assert float(coverage) > 0.99
    assert ok == "True"
    assert float(speedup) > 0


def test_the_snippet_that_reads_watermarks_runs(
    readme_run: ReadmeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    snippet = snippet_of(MODELS_README, "import WatermarkDetector")
    monkeypatch.chdir(readme_run.folder)
    exec(snippet.replace("models/out/demo/", "models/out/"), {})  # noqa: S102 - our own text
    marked, unmarked = capsys.readouterr().out.splitlines()
    assert marked.startswith("True 0.99")
    assert unmarked.startswith("False")


def test_the_snippet_that_enlarges_an_image_runs() -> None:
    snippet = snippet_of(MODELS_README, "import onnxruntime")
    product = "models/out/superres_int8/minisr_x2_int8.onnx"
    assert product in snippet
    names: dict[str, Any] = {}
    exec(snippet.replace(product, str(ROOT / "models" / "minisr" / "minisr_x2.onnx")), names)  # noqa: S102 - our own text
    assert names["larger"].shape == (1, 3, 240, 320)


@pytest.mark.parametrize("path", [path for path in MARKDOWN if path.name not in HISTORY], ids=identified)
def test_a_document_keeps_to_the_fields_words(path: Path) -> None:
    assert FORBIDDEN & set(re.findall(r"[a-z]+", path.read_text().lower())) == set()


@pytest.mark.parametrize("place", ["noxfile.py", "tools", "shared", "models", "tests"])
def test_identifiers_keep_to_the_fields_words(place: str) -> None:
    found = []
    for path in [ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py")):
        if "out" not in path.relative_to(ROOT).parts:
            found += [f"{identified(path)}: {name}" for name in identifiers(path) if FORBIDDEN & set(words_of(name))]
    assert sorted(set(found)) == []


def identifiers(path: Path) -> Iterator[str]:
    """Yield the names that a file defines or uses; the name of a test is a sentence."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        names = [getattr(node, field, None) for field in ("id", "attr", "name", "arg", "asname")]
        yield from (name for name in names if isinstance(name, str) and not name.startswith("test_"))


def words_of(name: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


@pytest.mark.parametrize("name", ["told", "_was_told", "PRESSED_FILES", "vouched_by", "OnnxWish"])
def test_a_forbidden_word_in_an_identifier_is_noticed(name: str, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(f"{name} = 1\n")
    assert [found for found in identifiers(tmp_path / "module.py") if FORBIDDEN & set(words_of(found))] == [name]


@pytest.mark.parametrize("name", ["LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "DECISIONS.md", "SECURITY.md", ".ci/run"])
def test_the_project_files_are_there(name: str) -> None:
    assert (ROOT / name).stat().st_size > 100


def test_ci_calls_the_documented_test_command() -> None:
    assert "nox -s tests\n" in (ROOT / ".ci" / "run").read_text()
    assert "nox -s tests" in CONTRIBUTING.read_text()


def test_the_documents_in_models_are_not_ignored_by_git() -> None:
    assert "!models/*.md" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_limits_of_the_alarm_in_the_guide_are_those_of_the_code() -> None:
    text = (ROOT / "tools" / "README.md").read_text()
    alarm = text[text.index("## The alarm") : text.index("## Gates")]
    for limit in (f"cosine below {LEAST_COSINE:g}", f"below {LEAST_PSNR_DB:g} dB", f"cosine of {LEAST_MADE_UP_COSINE:g}"):
        assert limit in " ".join(alarm.split())
