"""The project's layout: who may import whom, who owns which module, and how large things may be.

Runs without the project's dependencies: it reads the code, it does not import it.
"""

import ast
import collections
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A package imports packages of lower floors only.
FLOORS = (
    {"command"},
    {"metrics", "html", "files"},
    {"media"},
    {"formats", "networks"},
    {"runtime"},
    {"calibration", "watermark"},
    {"quantize"},
)
FOR_SCRIPTS = "shared.watermark"  # public for people's own scripts, with what it needs
MOST_MODULES, MOST_LINES, MOST_FUNCTION_LINES, MOST_SHARED_LINES, MOST_NOXFILE_LINES = 9, 300, 60, 10700, 285
TOP = {"noxfile.py", "tools", "shared", "tests", "models", "pyproject.toml"}

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for top in ("tools", "shared", "models")
    for path in sorted((ROOT / top).rglob("*.py"))
    if "out" not in path.relative_to(ROOT).parts
}
TREES = {name: ast.parse(path.read_bytes()) for name, path in FILES.items()}


def imports(name: str) -> set[str]:
    """Return the project's modules that a module imports, wherever in its code."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: imports are absolute"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {target for target in found if target in FILES and target != name}


IMPORTS = {name: imports(name) for name in FILES}


def reached(name: str) -> set[str]:
    """Return the modules that a module imports, directly or through others."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        new = IMPORTS[waiting.pop()] - seen
        seen |= new
        waiting += new
    return seen


def tool_of(name: str) -> str | None:
    """Return the tool that a module belongs to."""
    top, _, rest = name.partition(".")
    return rest.partition(".")[0] or None if top == "tools" else None


def floor_of(name: str) -> int:
    """Return the floor of a module of shared."""
    package = name.split(".")[1]
    return next(number for number, packages in enumerate(FLOORS) if package in packages)


SHARED = [name for name in FILES if name.startswith("shared.")]


def test_packages_import_packages_of_lower_floors_only() -> None:
    for name in SHARED:
        for target in IMPORTS[name] - {"shared"}:
            is_own = target.split(".")[:2] == name.split(".")[:2]
            assert is_own or (target.startswith("shared.") and floor_of(target) < floor_of(name)), f"{name} imports {target}"


def test_a_tool_imports_another_tools_public_function_at_most() -> None:
    for name in FILES:
        for target in IMPORTS[name]:
            if tool_of(name) and tool_of(target) not in (None, tool_of(name)):
                assert target.count(".") == 1, f"{name} imports {target}"


def test_a_module_of_shared_serves_two_tools_or_peoples_scripts() -> None:
    users: dict[str, set[str]] = collections.defaultdict(set)
    for name in FILES:
        user = tool_of(name) or ("models" if name.startswith("models.") else None)
        for target in reached(name) if user else ():
            users[target].add(str(user))
    public = reached(FOR_SCRIPTS) | {FOR_SCRIPTS}
    lonely = [name for name in SHARED if FILES[name].name != "__init__.py" and len(users[name]) < 2 and name not in public]
    assert not lonely


def test_modules_folders_and_functions_are_of_a_size_to_hold_in_mind() -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in FILES.items()}
    assert not {name: count for name, count in lines.items() if count > MOST_LINES}
    modules = collections.Counter(path.parent for path in FILES.values() if path.name not in ("__init__.py", "__main__.py"))
    assert not {str(folder): count for folder, count in modules.items() if count > MOST_MODULES}
    functions = [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert not [node.name for node in functions if (node.end_lineno or 0) - node.lineno >= MOST_FUNCTION_LINES]
    assert sum(lines[name] for name in FILES if name.startswith("shared")) <= MOST_SHARED_LINES
    assert len((ROOT / "noxfile.py").read_text(encoding="utf-8").splitlines()) <= MOST_NOXFILE_LINES


def test_the_top_level_is_the_fixed_one() -> None:
    assert {path.name for path in ROOT.iterdir()} >= TOP


@pytest.mark.parametrize(
    ("module", "target"),
    [("shared.files.artifacts", "shared.quantize.pipeline"), ("shared.command.errors", "tools.verify")],
)
def test_an_import_upwards_is_noticed(module: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(IMPORTS, module, {*IMPORTS[module], target})
    with pytest.raises(AssertionError, match="imports"):
        test_packages_import_packages_of_lower_floors_only()
