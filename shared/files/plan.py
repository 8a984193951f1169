"""What a tool is about to write, and whether it may be written there."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.command.errors import ToolError
from shared.command.resources import ResourceEstimate, require_disk
from shared.files.provenance import Provenance, provenance_path, read_provenance, record


@dataclass(frozen=True)
class Product:
    """A file a tool wrote, or found up to date; the size is that of all files it consists of."""

    path: Path
    size_bytes: int
    sha256: str
    seconds: float
    peak_rss_bytes: int
    up_to_date: bool = False


@dataclass(frozen=True)
class Plan:
    """What a tool is about to write, and everything that decides its bytes.

    Args:
        output: The file to write.
        tool: Name of the tool.
        arguments: What the user chose, JSON values only.
        inputs: Files that are read.
        packages: Distributions whose version matters.
        overwrite: Replace whatever is at `output`.
        refresh: Replace it if this project wrote it.
        reproducible: Make it twice, and fail where the bytes differ.
        dry_run: Check what can be checked, and raise `DryRun`.
        needs: Tells what making it takes; asked only when it is about to be made.
        reopen: Reads a draft as its consumer will, raises where that fails, and returns the files in the output's folder that the
            draft refers to, such as the weights of a large ONNX model.
        makes_folder: Whether the output's folder is made with it.
        is_whole: Tells from the result whether the files that are written next to the product are there.
        is_report: Whether the product is a report, JSON or HTML, that holds its provenance inside itself.
    """

    output: Path
    tool: str
    arguments: Mapping[str, object]
    inputs: Sequence[Path] = ()
    packages: Sequence[str] = ()
    overwrite: bool = False
    refresh: bool = False
    reproducible: bool = False
    dry_run: bool = False
    needs: Callable[[], ResourceEstimate] = ResourceEstimate
    reopen: Callable[[Path], Sequence[Path]] = field(default=lambda _: ())
    makes_folder: bool = False
    is_whole: Callable[[Any], bool] = field(default=lambda _: True)
    is_report: bool = False

    @property
    def folder(self) -> Path:
        """The output's folder; the nearest that is there, where that is yet to be made."""
        folders = (self.output.parent, *self.output.absolute().parent.parents) if self.makes_folder else (self.output.parent,)
        return next((folder for folder in folders if folder.exists()), self.output.parent)


def require_place(plan: Plan) -> Provenance | None:
    """Raise ToolError where the output can't be written whatever the work brings; return the provenance that is there."""
    output = plan.output
    _require_file_name(output)
    if output.is_symlink():
        remedy = "name the file it leads to, or another with -o"
        raise ToolError("the output is a symbolic link, which is never followed or replaced", where=output, remedy=remedy)
    for source in plan.inputs:
        for written in (output, *(() if plan.is_report else (provenance_path(output),))):
            if written.exists() and source.exists() and written.samefile(source):
                raise ToolError("the output is the input", where=written, remedy="choose another file with -o")
    if not plan.folder.is_dir() or not os.access(plan.folder, os.W_OK | os.X_OK):
        what = "cannot write here: no permission" if plan.folder.is_dir() else "cannot write here: no such folder"
        raise ToolError(what, where=plan.folder, remedy="create the folder or choose another with -o")
    old = read_provenance(output)
    if old is None:
        require_replaceable(plan, old)
    return old


def require_report_free(report: Path, others: Iterable[Path], *, overwrite: bool) -> None:
    """Raise ToolError now for what writing a report would fail on, or destroy, after all the work.

    Args:
        report: The report to write.
        others: Files that are read or written besides.
        overwrite: Whether another file in its place may be replaced.
    """
    if any(is_same(report, other) for path in others for other in (path, provenance_path(path))):
        raise ToolError("the report would replace a file that is read or written", where=report, remedy="choose another name")
    require_disk(0, report.parent, "write the report")
    plan = Plan(report, "", {}, overwrite=overwrite, refresh=True, is_report=True)
    require_replaceable(plan, require_place(plan))


def require_output_free(output: Path, *, overwrite: bool, makes_folder: bool = False) -> None:
    """Raise ToolError now where a tool is bound to refuse an output later; its own stale products may be replaced."""
    plan = Plan(output, "", {}, overwrite=overwrite, refresh=True, makes_folder=makes_folder)
    require_replaceable(plan, require_place(plan))


def is_same(path: Path, other: Path) -> bool:
    """Return whether two paths lead to one file, there or not."""
    return os.path.realpath(path) == os.path.realpath(other) or (path.exists() and other.exists() and path.samefile(other))


def require_replaceable(plan: Plan, old: Provenance | None) -> str | None:
    """Return the sha256 of the file to be replaced, None where there is none, or raise ToolError."""
    output, side = plan.output, provenance_path(plan.output)
    if side.exists() and old is None and not plan.overwrite and not plan.is_report:
        raise ToolError("the provenance would replace this file", where=side, remedy="use --overwrite, or another name with -o")
    if not output.exists():
        return None
    if output.exists() and not output.is_file():
        raise ToolError("the output is no regular file", where=output, remedy="choose a file with -o")
    ours = False
    if old is not None:
        current = record(output).sha256
        ours = current in (old.output.sha256, old.replaces_sha256)
    if plan.overwrite or (plan.refresh and ours):
        return record(output).sha256
    what = "the output exists and is out of date" if ours else "the output exists"
    raise ToolError(what, where=output, remedy="use --overwrite to replace it, or choose another file with -o")


def _require_file_name(output: Path) -> None:
    if output.is_dir() or not output.name:
        raise ToolError("the output is a folder", where=output, expected="a file name", remedy="choose a file with -o")
