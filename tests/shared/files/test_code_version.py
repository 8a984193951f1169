"""The hash of our code changes with the modules that a tool reaches, and with nothing else."""

import ast
from pathlib import Path

import pytest

import noxfile
from shared.files.code_version import ROOT, code_version, reached_modules


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of one tool that reaches a module through a package, and a page that it draws."""
    files = {
        "tools/__init__.py": "",
        "tools/press.py": "def press():\n    from shared.engine import weights\n    import shared.html.plots\n",
        "shared/__init__.py": "",
        "shared/engine/__init__.py": "",
        "shared/engine/weights.py": "from ..units import GIB\nSCALE = 1\n",
        "shared/units.py": "GIB = 2**30\n",
        "shared/other.py": "X = 1\n",
        "shared/html/__init__.py": "",
        "shared/html/plots.py": "WIDTH = 1\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def _version(project: Path) -> str:
    code_version.cache_clear()
    return code_version("tools.press", project)


@pytest.mark.parametrize("file", ["tools/press.py", "shared/engine/weights.py", "shared/units.py", "shared/engine/__init__.py"])
def test_a_change_of_code_that_a_tool_reaches_changes_the_hash(project: Path, file: str) -> None:
    before = _version(project)
    with (project / file).open("a") as text:
        text.write("NEW = 1\n")
    assert _version(project) != before


@pytest.mark.parametrize("file", ["shared/other.py", "shared/html/plots.py"])
def test_code_that_decides_no_product_does_not_change_the_hash(project: Path, file: str) -> None:
    before = _version(project)
    with (project / file).open("a") as text:
        text.write("NEW = 1\n")
    assert _version(project) == before


def test_a_module_that_moves_to_another_folder_is_still_seen(project: Path) -> None:
    target = project / "shared" / "deep" / "er" / "weights.py"
    target.parent.mkdir(parents=True)
    (target.parent / "__init__.py").write_text("")
    (project / "shared/engine/weights.py").rename(target)
    target.write_text("SCALE = 1\n")
    tool = project / "tools/press.py"
    tool.write_text(tool.read_text().replace("shared.engine", "shared.deep.er"))
    before = _version(project)
    assert "shared.deep.er.weights" in reached_modules("tools.press", project)
    target.write_text("SCALE = 2\n")
    assert _version(project) != before


def test_a_module_that_is_not_there_is_an_error(project: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"tools\.nothing"):
        code_version("tools.nothing", project)


@pytest.mark.parametrize("tool", sorted(noxfile.TOOLS))
def test_every_import_of_a_reached_module_is_followed(tool: str) -> None:
    """Names that an import statement gives are modules reached, or attributes of a module that is."""
    reached = reached_modules(f"tools.{tool}")
    for path in reached.values():
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("shared.") and "html" not in str(node.module):
                assert node.module in reached, f"{path.relative_to(ROOT)} imports {node.module}"
