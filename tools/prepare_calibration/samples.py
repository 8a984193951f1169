"""Make a calibration set: choose and write the samples, a contact sheet, a plot, arrays, and the manifest that describes them."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from shared.command.cli import step_progress
from shared.command.errors import ToolError
from shared.files.atomic import draft_beside
from shared.files.file_type import is_regular
from shared.files.provenance import record
from tools.prepare_calibration.contact_sheet import Point, write_coverage_plot
from tools.prepare_calibration.request import SampleRequest
from tools.prepare_calibration.sampling import Candidate
from tools.prepare_calibration.selection import SampleSplit, SkippedSource, choose_split, measure_all
from tools.prepare_calibration.sources import Source
from tools.prepare_calibration.writer import write_arrays, write_sample, write_sheet

PACKAGES = ("numpy", "pillow", "opencv-python-headless")
SHEET, PLOT, ARRAYS, HELD_ARRAYS = "contact_sheet.png", "coverage.png", "samples.npz", "holdout.npz"
EXTRA = (SHEET, PLOT, ARRAYS, HELD_ARRAYS)  # files of a set besides its samples and its manifest
MOST_REASONS = 3  # in an error line

Parts = Mapping[str, Sequence[Candidate]]  # "samples" and "holdout"
Entries = dict[str, list[dict[str, Any]]]  # of the manifest, by part


@dataclass(frozen=True)
class SampleJob:
    """A calibration set to write.

    Args:
        folder: Its folder.
        request: The samples to take.
        sources: Sources to measure.
        given: Number of sources given by the user, of which `sources` may be a random choice.
    """

    folder: Path
    request: SampleRequest
    sources: Sequence[Source]
    given: int


@dataclass(frozen=True)
class SampleSummary:
    """Counts of a calibration set.

    Args:
        sources: Sources given by the user.
        considered: Sources measured.
        candidates: Possible samples.
        samples: Samples to calibrate with.
        holdout: Samples held out.
        duplicates: Near-duplicates left out.
        synthetic: Synthetic pictures among samples and held-out samples.
        skipped: Unreadable sources, and sources smaller than a tile.
    """

    sources: int
    considered: int
    candidates: int
    samples: int
    holdout: int
    duplicates: int
    synthetic: int
    skipped: list[SkippedSource] = field(default_factory=list)


def write_set(job: SampleJob, draft: Path) -> SampleSummary:
    """Choose and write all samples, and the manifest to `draft`.

    Raises:
        ToolError: Too few samples were found, or nothing can be held out.
    """
    request, sources = job.request, job.sources
    hashes = {str(s.path): record(s.path).sha256 for s in sources if s.path is not None and is_regular(s.path)}
    candidates, skipped = measure_all(sources, request, hashes)
    split = choose_split(candidates, request, [hashes.get(str(source.path), source.name) for source in sources])
    _require_enough(job, split, skipped)
    entries = _write_samples(job, {"samples": split.samples, "holdout": split.holdout}, hashes)
    content = {
        "tool": "prepare_calibration",
        "settings": asdict(request),
        "versions": {name: metadata.version(name) for name in PACKAGES if any(metadata.distributions(name=name))},
        "sources": job.given,
        "considered": len(sources),
        **entries,
        "files": _write_extra(job, candidates, split, entries),
        "skipped": [asdict(source) for source in skipped],
    }
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return SampleSummary(
        sources=job.given,
        considered=len(sources),
        candidates=len(candidates),
        samples=len(split.samples),
        holdout=len(split.holdout),
        duplicates=split.duplicates,
        synthetic=sum(entry["synthetic"] for part in entries.values() for entry in part),
        skipped=skipped,
    )


def set_files(manifest: Path) -> list[Path]:
    """Return the files that a manifest of prepare_calibration names."""
    content = json.loads(manifest.read_text(encoding="utf-8"))
    names = [entry["file"] for part in ("samples", "holdout") for entry in content[part]]
    return [manifest.parent / name for name in (*names, *content["files"])]


def _require_enough(job: SampleJob, split: SampleSplit, skipped: Sequence[SkippedSource]) -> None:
    """Raise ToolError where samples or held-out samples are too few."""
    request = job.request
    for part, found, least in (
        ("samples", split.samples, request.min_samples),
        ("held-out samples", split.holdout, min(1, request.holdout)),
    ):
        if len(found) < least:
            got = f"{len(found)} of {len(job.sources)} sources ({_reasons(skipped)}{split.duplicates} near-duplicates)"
            remedy = "give more or larger images, raise --tiles-per-image, or lower --tile-size or --min-samples"
            raise ToolError(f"too few {part}", where=job.folder, got=got, expected=f"at least {least}", remedy=remedy)


def _reasons(skipped: Sequence[SkippedSource]) -> str:
    """Return the commonest reasons of skipped sources with their counts, such as `2 unreadable image, `."""
    counts = Counter(source.reason.partition(";")[0] for source in skipped)
    return "".join(f"{count} {reason}, " for reason, count in counts.most_common(MOST_REASONS))


def _write_samples(job: SampleJob, parts: Parts, hashes: Mapping[str, str]) -> Entries:
    """Read the chosen pictures again, one at a time, and write the samples; return the manifest's entries."""
    wanted: dict[int, list[tuple[str, int, Candidate]]] = {}
    for part, chosen in parts.items():
        for number, candidate in enumerate(chosen):
            wanted.setdefault(candidate.source, []).append((part, number, candidate))
    entries: Entries = {part: [{}] * len(chosen) for part, chosen in parts.items()}
    with step_progress("write the samples", sum(map(len, parts.values()))) as advance:
        for place in sorted(wanted):
            source = job.sources[place]
            for picture in job.request.pictures(source):
                for part, number, candidate in wanted[place]:
                    if candidate.frame == picture.frame:
                        pixels = job.request.cut(picture.pixels, candidate.box)
                        name, digest = write_sample(job.folder, f"{part[0]}{number:04d}", pixels)
                        entries[part][number] = _entry(name, digest, source, candidate, hashes)
                        advance(name)
    return entries


def _entry(name: str, digest: str, source: Source, candidate: Candidate, hashes: Mapping[str, str]) -> dict[str, Any]:
    """Return the manifest's entry of a sample."""
    entry: dict[str, Any] = {"file": name, "sha256": digest, "source": source.name, "synthetic": source.path is None}
    if source.path is not None:
        entry["source_sha256"] = hashes[str(source.path)]
    if candidate.box is not None:
        entry["box"] = list(candidate.box)
    if candidate.frame is not None:
        entry |= {"frame": candidate.frame, "time_s": candidate.time_s}
    return entry | {key: round(getattr(candidate.statistics, key), 3) for key in ("brightness", "contrast", "detail")}


def _write_extra(job: SampleJob, candidates: Sequence[Candidate], split: SampleSplit, entries: Entries) -> list[str]:
    """Write the contact sheet, the plot and the arrays; return their names."""
    files = {part: [job.folder / entry["file"] for entry in found] for part, found in entries.items()}
    names = [SHEET, PLOT]
    write_sheet(job.folder / SHEET, [*files["samples"], *files["holdout"]])
    with draft_beside(job.folder / PLOT) as plot:
        write_coverage_plot(plot, _points(candidates), _points(split.samples), _points(split.holdout))
        plot.replace(job.folder / PLOT)
    if job.request.arrays is not None:
        for name, part in ((ARRAYS, "samples"), (HELD_ARRAYS, "holdout")):
            if files[part]:
                write_arrays(job.folder / name, files[part], job.request.arrays)
                names.append(name)
    return names


def _points(candidates: Sequence[Candidate]) -> list[Point]:
    return [(c.statistics.brightness, c.statistics.contrast, c.statistics.detail) for c in candidates]
