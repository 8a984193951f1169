"""A hash of the project's own code that decides a product: the modules that a tool reaches through its imports."""

import ast
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("tools", "shared", "models")
PAGES = "shared.html"  # draws reports; no model's bytes depend on it


@functools.cache
def code_version(module: str, root: Path = ROOT) -> str:
    """Return 16 hexadecimal digits that change when code reached from a module changes.

    Args:
        module: Dotted name, such as `tools.verify`.
        root: The folder of the packages.

    Raises:
        ModuleNotFoundError: The project has no such module.
    """
    whole = hashlib.sha256()
    for name, path in sorted(reached_modules(module, root).items()):
        whole.update(name.encode() + b"\n" + path.read_bytes())
    return whole.hexdigest()[:16]


def reached_modules(module: str, root: Path = ROOT) -> dict[str, Path]:
    """Return name -> file of a module, the project's modules it imports, directly or through others, and their packages."""
    if _file(module, root) is None:
        raise ModuleNotFoundError(f"the project has no module {module}", name=module)
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _file(name, root)
        if path is None or name in found or name.startswith(PAGES):
            continue
        found[name] = path
        waiting += _imported(path, name)
        waiting += [parent for parent, dot, _ in [name.rpartition(".")] if dot]
    return found


def _file(name: str, root: Path) -> Path | None:
    place = root.joinpath(*name.split("."))
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


def _imported(path: Path, name: str) -> Iterator[str]:
    """Yield the project's modules named in import statements, wherever in a file they stand; some names may be attributes."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom():
                parts = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                package = [*parts[: len(parts) - node.level + 1], node.module or ""] if node.level else [node.module or ""]
                base = ".".join(filter(None, package))
                names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
            case _:
                continue
        yield from (found for found in names if found.partition(".")[0] in PACKAGES)
