"""What the documentation says is there, and its numbers are the measured ones."""

import importlib
import inspect
import json
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import asdict
from typing import Any

import pytest

import noxfile
from models.face_landmarker.check import check
from shared.networks.card import load_card
from tests.bench import demo, face_landmarker, guide, onnx_modes
from tests.conftest import ROOT, Miniseal, Run
from tests.test_recipes import SESSIONS

README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TOOLS = sorted(noxfile.TOOLS)


@pytest.mark.parametrize("tool", TOOLS)
def test_help_shows_the_summary_and_the_example(tool: str, run_tool: Run) -> None:
    done = run_tool(tool, "--help")
    summary = inspect.getdoc(getattr(importlib.import_module(f"tools.{tool}"), tool)).splitlines()[0]  # type: ignore[union-attr]
    shown = " ".join(done.stdout.split())
    assert done.returncode == 0
    assert summary in shown
    assert f"Example: python -m tools.{tool}" in shown
    assert "Raises" not in shown


@pytest.mark.parametrize("tool", TOOLS)
def test_help_loads_nothing_heavy(tool: str) -> None:
    heavy = {"torch", "litert_torch", "ai_edge_litert", "ai_edge_quantizer", "safetensors", "PIL", "jinja2", "cv2"}
    script = f"""
import atexit, runpy, sys
sys.argv = ["{tool}", "--help"]
atexit.register(lambda: print(sorted({heavy} & sys.modules.keys())))
runpy.run_module("tools.{tool}", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("tool", TOOLS)
def test_the_example_of_a_tool_uses_its_real_options(tool: str) -> None:
    module = inspect.getmodule(getattr(importlib.import_module(f"tools.{tool}"), tool))
    assert module is not None
    example = re.search(r"Example:\n +python -m tools\.(\w+) (.+)", module.__doc__ or "")
    assert example is not None
    assert example[1] == tool
    parameters = inspect.signature(getattr(module, tool)).parameters
    for word in shlex.split(example[2]):
        if word.startswith("--"):
            assert word.removeprefix("--").replace("-", "_") in parameters


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_has_a_dependency_set_and_a_readme_row(tool: str) -> None:
    assert tool.replace("_", "-") in PROJECT["optional-dependencies"]
    assert f"| `{tool}` |" in README


def test_every_session_the_readme_names_exists() -> None:
    for words in re.findall(r"nox -s ([a-z_0-9 ]+)", README + (ROOT / "CONTRIBUTING.md").read_text()):
        for name in words.split():
            assert name in SESSIONS, name


def test_the_readmes_tables_are_the_measured_ones() -> None:
    results = json.loads(guide.RESULTS.read_text())
    assert guide.fill(README, results) == README
    assert all(table in README for table in guide.tables(results).values())
    assert {row["recipe"] for row in results["products"]} == {
        f"{size}_{recipe}" for size in guide.SIZES for recipe in guide.RECIPES
    }


def test_the_measured_products_keep_the_gates_of_their_cards() -> None:
    for row in json.loads(guide.RESULTS.read_text())["products"]:
        model, _, precision = row["recipe"].rpartition("_")
        gates = load_card(model).gates[precision]
        assert gates.max_size_mb is not None
        assert row["product_mib"] <= gates.max_size_mb
        assert row["cosine"] >= (gates.min_cosine or 0)
        assert row["bit_agreement"] >= (gates.min_bit_agreement or 0)
        assert row["speedup"] >= (gates.min_speedup or 0)


def test_torch_and_the_quantizer_are_pinned_and_every_dependency_is_constrained() -> None:
    pins = dict(line.lower().split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    assert pins["torch"] == "2.13.0"
    wanted = [*PROJECT["dependencies"], *(name for names in PROJECT["optional-dependencies"].values() for name in names)]
    for name in {re.match(r"[A-Za-z0-9._-]+", requirement)[0] for requirement in wanted} - {"edgepress"}:  # type: ignore[index]
        assert name in pins


def test_the_demos_figures_are_the_measured_ones() -> None:
    results = json.loads(demo.RESULTS.read_text())
    assert demo.fill(README, results) == README
    assert demo.render(results) in README
    section = README[README.index("## The demo") : README.index("## The main job")]
    prose = re.sub(r"<!-- guide: demo -->.*?<!-- end -->|```.*?```", "", section, flags=re.DOTALL)
    assert not re.findall(r"\d+(?:\.\d+)? ?(?:%|MiB|GiB|ms|s\b|dB|seconds|minutes|times)", prose)


def test_the_face_landmarkers_figures_are_the_measured_ones() -> None:
    results = json.loads(face_landmarker.RESULTS.read_text())
    assert face_landmarker.fill(README, results) == README
    assert face_landmarker.render(results) in README


def test_the_face_landmarker_kept_its_limits() -> None:
    results = json.loads(face_landmarker.RESULTS.read_text())
    limits = {name: option.default for name, option in inspect.signature(check).parameters.items() if name.startswith("max_")}
    assert results["landmark_error_percent"] <= limits["max_landmark_error"]
    assert results["blendshape_error"] <= limits["max_blendshape_error"]
    assert results["slowdown"] <= limits["max_slowdown"]
    assert results["faces_before"] == results["faces_after"] > 0
    assert results["size_after_bytes"] <= 2_200_000


def test_the_demos_product_kept_its_gates() -> None:
    products = {model["name"]: model for model in json.loads(demo.RESULTS.read_text())["models"]}
    limits = asdict(load_card("miniseal").gates["int8"])
    limits |= {f"min_accuracy_under {attack}": share for attack, share in limits.pop("min_accuracy_under").items()}
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    values = products["int8"]["gates"]
    assert values.keys() == limits.keys()
    for name, limit in limits.items():
        assert values[name] <= limit if name.startswith("max") else values[name] >= limit, name


def test_the_python_snippets_of_the_readme_name_what_exists() -> None:
    snippets = re.findall(r"```python\n(.+?)```", README, re.DOTALL)
    assert len(snippets) == 3
    for snippet in snippets:
        for module, names in re.findall(r"^from (\S+) import (.+)$", snippet, re.MULTILINE):
            for name in names.split(", "):
                assert hasattr(importlib.import_module(module), name)
        compile(snippet, "README.md", "exec")


def test_the_snippet_that_reads_watermarks_runs(
    miniseal: Miniseal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (snippet,) = re.findall(r"```python\n(from shared\.watermark.+?)```", README, re.DOTALL)
    product = "models/miniseal_detector_miniseal_256_int8.tflite"
    assert product in snippet
    monkeypatch.chdir(ROOT)
    exec(snippet.replace(product, str(miniseal.int8)), {})  # noqa: S102 - our own text
    marked, unmarked = capsys.readouterr().out.splitlines()
    assert marked.startswith("True 0.99")
    assert unmarked.startswith("False")


def test_the_figures_of_the_onnx_modes_are_the_measured_ones() -> None:
    results = json.loads(onnx_modes.RESULTS.read_text())
    assert onnx_modes.fill(README, results) == README
    assert onnx_modes.render(results) in README


def test_what_the_readme_says_of_the_onnx_modes_is_what_was_measured() -> None:
    for model in json.loads(onnx_modes.RESULTS.read_text()):
        rows = {row["mode"]: row for row in model["rows"]}
        assert rows["static"]["speedup"] > 1, model["title"]
        if "dynamic" in rows:
            assert rows["dynamic"]["speedup"] < 1, model["title"]
            assert rows["fp16"]["size_bytes"] < 0.6 * rows["float32"]["size_bytes"], model["title"]


def test_the_snippet_that_enlarges_an_image_runs() -> None:
    (snippet,) = re.findall(r"```python\n(import numpy as np\nimport onnxruntime.+?)```", README, re.DOTALL)
    product = "models/minisr_x2_int8.onnx"
    assert product in snippet
    model = ROOT / "models" / "minisr" / "minisr_x2.onnx"
    names: dict[str, Any] = {}
    exec(snippet.replace(product, str(model)), names)  # noqa: S102 - our own text
    assert names["larger"].shape == (1, 3, 240, 320)


@pytest.mark.parametrize("name", ["LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "DECISIONS.md", ".ci/run"])
def test_the_project_files_are_there(name: str) -> None:
    assert (ROOT / name).stat().st_size > 100


def test_ci_calls_the_readmes_test_command() -> None:
    assert "nox -s tests\n" in (ROOT / ".ci" / "run").read_text()
    assert "nox -s tests" in README
