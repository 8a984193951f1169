"""Write files whole or not at all, with their provenance next to them, and tell whether they are up to date.

A product is up to date when its tool, arguments, inputs, versions and its own bytes are what its provenance says.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import TypeAdapter, ValidationError

from shared.command.dry_run import DryRun, Forecast
from shared.command.errors import CheckError, ToolError
from shared.command.resources import ResourceEstimate, available_memory_bytes, peak_rss_bytes
from shared.files.atomic import abandoned_drafts, alone_in, draft_beside, identity, sync, write_json
from shared.files.plan import Plan, Product, require_place, require_replaceable
from shared.files.provenance import (
    FileRecord,
    Provenance,
    as_json,
    provenance_path,
    read_provenance_file,
    record,
    verified,
    versions,
)
from shared.files.reports import embed, report_sha256

Found = TypeVar("Found")


def build(plan: Plan, found_type: type[Found], make: Callable[[Path], Found]) -> tuple[Product, Found]:
    """Write a product through `make`, or find it up to date.

    `make` gets the path of a draft next to the output, writes it, and returns what it found: a dataclass, kept in the
    provenance. Only then does the draft take the output's name. A product whose `found.ok` is False is never up to date.
    A `found.peak_rss_bytes` is the peak memory of the processes that did the work.

    Raises:
        ToolError: The output exists and may not be replaced, is an input, a link, or cannot be written; memory or disk are short;
            an input changed meanwhile, or is not what its checksum says.
        CheckError: It was to be reproducible, and is not.
        DryRun: In a dry run, where all that can be checked before the work is fine.
    """
    old = require_place(plan)
    inputs = _input_records(plan, old)
    current = _current(plan, old, inputs, found_type)
    if plan.dry_run:
        raise DryRun(_forecast(plan, old, is_current=current is not None))
    for stale in abandoned_drafts(plan.output):  # of its provenance too
        stale.unlink(missing_ok=True)
    if current is not None:
        return current
    replaces = require_replaceable(plan, old)
    found_there = identity(plan.output)
    plan.needs().require(plan.output.parent)
    start = time.monotonic()
    with draft_beside(plan.output) as draft:
        found = make(draft)
        try:
            seconds = round(time.monotonic() - start, 3)
            peak = max(peak_rss_bytes(), getattr(found, "peak_rss_bytes", 0))
            provenance = _settled(plan, draft, inputs, replaces, as_json(found), seconds, peak)
            if plan.reproducible:
                _require_same_again(plan, provenance, make)
            with alone_in(plan.output.parent):
                _require_as_it_was(plan.output, found_there)
                final = _publish(plan, draft, provenance)
        except BaseException:
            _discard(plan, draft, old)
            raise
    with contextlib.suppress(OSError, ToolError):  # the product is there, whatever becomes of the former one's files
        _remove_former(old, final, plan.output.parent)
    return Product(plan.output, _size(plan, final), final.output.sha256, final.seconds, final.peak_rss_bytes), found


def _require_as_it_was(output: Path, before: tuple[int, int] | None) -> None:
    if identity(output) != before:
        raise ToolError("another run wrote the output meanwhile; it was kept", where=output, remedy="run again")


def _settled(  # noqa: PLR0917 - what a provenance is made of
    plan: Plan, draft: Path, inputs: list[FileRecord], replaces: str | None, found: dict[str, Any], seconds: float, peak: int
) -> Provenance:
    """Return the provenance of a draft that is fit to get its name; raise ToolError where it is not."""
    _require_unchanged(plan.inputs, inputs)
    sync(draft)
    companions = plan.reopen(draft)
    output = FileRecord(str(plan.output), 0, 0, 0, 0, report_sha256(draft)) if plan.is_report else record(draft, name=plan.output)
    return Provenance(
        tool=plan.tool,
        arguments=as_json(plan.arguments),
        versions=versions(plan.tool, plan.packages),
        inputs=inputs,
        output=output,
        replaces_sha256=replaces,
        seconds=seconds,
        peak_rss_bytes=peak,
        found=found,
        companions=[record(path) for path in companions],
        made_twice=plan.reproducible,
    )


def _publish(plan: Plan, draft: Path, provenance: Provenance) -> Provenance:
    """Give a draft its name, files it refers to first; return its provenance, which lies next to it at every moment, or inside."""
    for companion in provenance.companions:
        sync(Path(companion.path))
    if plan.is_report:
        embed(draft, as_json(asdict(provenance)))
        sync(draft)
        draft.replace(plan.output)
        if read_provenance_file(plan.output) is not None:  # of the report that stood here, from before reports held their own
            provenance_path(plan.output).unlink()
        sync(plan.output.parent)
        return provenance
    write_json(provenance_path(plan.output), as_json(asdict(provenance)))
    draft.replace(plan.output)  # atomic: same folder
    sync(plan.output.parent)
    final = replace(provenance, output=record(plan.output, sha256=provenance.output.sha256))  # renaming moved the ctime
    with contextlib.suppress(OSError, ToolError):  # it only saves the next run from hashing; the product is there
        write_json(provenance_path(plan.output), as_json(asdict(final)))
    return final


def _discard(plan: Plan, draft: Path, old: Provenance | None) -> None:
    """Remove the files that only a draft refers to, which will not get its name."""
    kept = {Path(item.path).name for item in old.companions} if old else set()
    with contextlib.suppress(ToolError, OSError, ValueError, LookupError):
        for companion in plan.reopen(draft):
            if companion.name not in kept:
                companion.unlink()


def end_dry_run(*plans: Plan) -> NoReturn:
    """Raise DryRun for all of several plans, as `build` does for one in a dry run."""

    def never(_: Path) -> NoReturn:
        raise AssertionError("a dry run makes nothing")

    forecasts: list[Forecast] = []
    for plan in plans:
        try:
            build(replace(plan, dry_run=True), object, never)
        except DryRun as one:
            forecasts += one.result.forecasts
    raise DryRun(*forecasts)


def _forecast(plan: Plan, old: Provenance | None, *, is_current: bool) -> Forecast:
    if not is_current:
        require_replaceable(plan, old)
    state = "is up to date" if is_current else "would be replaced" if plan.output.exists() else "would be written"
    free = shutil.disk_usage(plan.folder).free
    return Forecast(plan.output, state, ResourceEstimate() if is_current else plan.needs(), free, available_memory_bytes())


def _input_records(plan: Plan, old: Provenance | None) -> list[FileRecord]:
    return [verified(path, record(path, known=old.inputs if old else ())) for path in plan.inputs]


def _current(plan: Plan, old: Provenance | None, inputs: list[FileRecord], found_type: type[Found]) -> tuple[Product, Found] | None:
    """Return the product that is there, if it is up to date."""
    if old is None or not plan.output.is_file() or not _describes(old, plan, inputs):
        return None
    try:
        found = TypeAdapter(found_type).validate_python(old.found)
    except ValidationError:
        return None
    if not getattr(found, "ok", True) or not plan.is_whole(found):
        return None
    return Product(plan.output, _size(plan, old), old.output.sha256, old.seconds, old.peak_rss_bytes, up_to_date=True), found


def _describes(old: Provenance, plan: Plan, inputs: Sequence[FileRecord]) -> bool:
    same_inputs = [item.sha256 for item in old.inputs] == [item.sha256 for item in inputs]
    same_request = (old.tool, old.arguments, old.versions) == (
        plan.tool,
        as_json(plan.arguments),
        versions(plan.tool, plan.packages),
    )
    if not (same_inputs and same_request and record(plan.output).sha256 == old.output.sha256):
        return False
    companions = [plan.output.parent / Path(item.path).name for item in old.companions]
    return all(path.is_file() for path in companions) and [record(path, known=old.companions).sha256 for path in companions] == [
        item.sha256 for item in old.companions
    ]


def _require_unchanged(paths: Sequence[Path], records: Sequence[FileRecord]) -> None:
    for path, known in zip(paths, records, strict=True):
        try:
            now = path.stat()
        except OSError:
            now = None
        if now is None or (now.st_size, now.st_mtime_ns, now.st_ino) != (known.size_bytes, known.mtime_ns, known.inode):
            what = "the file changed while it was worked on; nothing was kept"
            raise ToolError(what, where=path, remedy="wait until it is complete, then try again")


def _require_same_again(plan: Plan, first: Provenance, make: Callable[[Path], object]) -> None:
    """Make the product once more, and raise CheckError unless all its files have the same bytes."""
    with draft_beside(plan.output.with_name(f"{plan.output.stem}.again{plan.output.suffix}")) as again:
        make(again)
        companions = plan.reopen(again)
        hashes = [record(path).sha256 for path in (again, *companions)]
        known = {item.path for item in first.companions}
        for path in companions:
            if str(path) not in known:
                path.unlink()
    if hashes != [item.sha256 for item in (first.output, *first.companions)]:
        remedy = "leave out --reproducible, and report it"
        raise CheckError(
            "made twice, the product is not the same to the last byte; nothing was kept", where=plan.output, remedy=remedy
        )


def _size(plan: Plan, provenance: Provenance) -> int:
    """Return the size of a product with the files it refers to."""
    if plan.is_report:
        return plan.output.stat().st_size
    return sum(item.size_bytes for item in (provenance.output, *provenance.companions))


def _remove_former(old: Provenance | None, new: Provenance, folder: Path) -> None:
    """Remove the files that only the former product referred to, where they are still what we wrote."""
    kept = {Path(item.path).name for item in new.companions}
    for item in old.companions if old else ():
        path = folder / Path(item.path).name
        if path.name not in kept and path.is_file() and not path.is_symlink() and record(path).sha256 == item.sha256:
            path.unlink()
