"""Choose calibration samples from images, videos, a CSV or made-up pictures: spread, without duplicates.

Example:
    python -m tools.prepare_calibration photos video.mp4 -o tiles --tile-size 224 --holdout 16

Static quantization is only as good as what it is calibrated with; what is held out shows how good that was.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Column, Table

from shared.calibration.dataset import MANIFEST_NAME, choose_range
from shared.command.cli import step_progress
from shared.command.errors import ToolError
from shared.command.options import DryRunOption, InputRange, Overwrite, Refresh, Reproducible, Seed
from shared.command.resources import MIB, ResourceEstimate
from shared.files import artifacts
from shared.files.atomic import draft_beside
from shared.files.file_type import is_regular
from shared.files.plan import Plan, Product
from shared.files.provenance import read_provenance, record
from shared.formats.model_file import ModelFile
from shared.formats.tensors import describe, image_input
from shared.media.images import ImageForm
from shared.runtime.model import open_model
from shared.runtime.processes import ChildError
from tools.prepare_calibration.contact_sheet import Point, write_coverage_plot
from tools.prepare_calibration.sampling import Candidate, Look
from tools.prepare_calibration.selection import SamplesWish, Skipped, choose_parts, look_at_all
from tools.prepare_calibration.sources import Columns, Source, find_sources, synthetic_sources
from tools.prepare_calibration.writer import ArrayForm, Set, write_arrays, write_sample, write_sheet

PACKAGES = ("numpy", "pillow", "opencv-python-headless")
TILE_SIZE = 224  # pixels
CONSIDERED = 8  # sources looked at for each sample wanted; more add little but time
SHEET, PLOT, ARRAYS, HELD_ARRAYS = "contact_sheet.png", "coverage.png", "samples.npz", "holdout.npz"
SHOWN = 12  # skipped files in the terminal; the manifest has all
MEMORY_BYTES = 600 * MIB  # libraries, and one decoded image of usual size
SAMPLE_BYTES = 6  # on disk for each pixel at most, arrays included


@dataclass(frozen=True)
class Chosen:
    """What was chosen.

    Args:
        sources: Sources that were given.
        considered: How many of them were looked at.
        candidates: Samples that could have been taken.
        samples: Samples taken.
        holdout: Samples held out.
        duplicates: Near-duplicates passed over.
        synthetic: How many of the samples and held-out ones are made up.
        skipped: Sources that could not be read or were too small.
    """

    sources: int
    considered: int
    candidates: int
    samples: int
    holdout: int
    duplicates: int
    synthetic: int
    skipped: list[Skipped] = field(default_factory=list)


@dataclass(frozen=True)
class CalibrationSamples:
    """Result of prepare_calibration."""

    folder: Path
    manifest: Product
    found: Chosen
    message: str

    def __rich__(self) -> RenderableType:
        skipped = Table("skipped", Column("why", overflow="fold"))
        for one in self.found.skipped[:SHOWN]:
            skipped.add_row(one.source, one.reason)
        more = len(self.found.skipped) - SHOWN
        shown: list[RenderableType] = [skipped] if self.found.skipped else []
        shown += [f"and {more} more; {MANIFEST_NAME} has all"] if more > 0 else []
        return Lines(*shown, self.message)


def _write_samples(
    folder: Path, sources: Sequence[Source], parts: dict[str, list[Candidate]], wish: SamplesWish, hashes: dict[str, str]
) -> dict[str, list[dict[str, Any]]]:
    """Read what was chosen once more, one picture at a time, and write it; return the manifest's entries."""
    wanted: dict[int, list[tuple[str, int, Candidate]]] = {}
    for part, chosen in parts.items():
        for number, candidate in enumerate(chosen):
            wanted.setdefault(candidate.source, []).append((part, number, candidate))
    entries: dict[str, list[dict[str, Any]]] = {part: [{}] * len(chosen) for part, chosen in parts.items()}
    with step_progress("write the samples", sum(map(len, parts.values()))) as advance:
        for place in sorted(wanted):
            source = sources[place]
            for picture in wish.pictures(source):
                for part, number, candidate in wanted[place]:
                    if candidate.frame == picture.frame:
                        pixels = wish.cut(picture.pixels, candidate.box)
                        name, digest = write_sample(folder, f"{part[0]}{number:04d}", pixels)
                        entries[part][number] = _entry(name, digest, source, candidate, hashes)
                        advance(name)
    return entries


def _entry(name: str, digest: str, source: Source, candidate: Candidate, hashes: dict[str, str]) -> dict[str, Any]:
    """Return what the manifest says of a sample."""
    look: Look = candidate.look
    entry: dict[str, Any] = {"file": name, "sha256": digest, "source": source.name, "synthetic": source.path is None}
    if source.path is not None:
        entry["source_sha256"] = hashes[str(source.path)]
    if candidate.box is not None:
        entry["box"] = list(candidate.box)
    if candidate.frame is not None:
        entry |= {"frame": candidate.frame, "time_s": candidate.time_s}
    return entry | {name: round(getattr(look, name), 3) for name in ("brightness", "contrast", "detail")}


def _prepare(folder: Path, sources: Sequence[Source], given: int, wish: SamplesWish, draft: Path) -> Chosen:
    """Choose and write all samples, and the manifest to `draft`."""
    hashes = {str(s.path): record(s.path).sha256 for s in sources if s.path is not None and is_regular(s.path)}
    candidates, skipped = look_at_all(sources, wish, hashes)
    chosen = choose_parts(candidates, wish, [hashes.get(str(source.path), source.name) for source in sources])
    samples, holdout = chosen.samples, chosen.holdout
    for what, found, least in (("samples", samples, wish.min_samples), ("held-out samples", holdout, min(1, wish.holdout))):
        if len(found) < least:
            got = f"{len(found)} of {len(sources)} sources ({_reasons(skipped)}{chosen.duplicates} near-duplicates)"
            remedy = "give more or larger images, raise --tiles-per-image, or lower --tile-size or --min-samples"
            raise ToolError(f"too few {what}", where=folder, got=got, expected=f"at least {least}", remedy=remedy)
    parts = {"samples": samples, "holdout": holdout}
    entries = _write_samples(folder, sources, parts, wish, hashes)
    files = {part: [folder / entry["file"] for entry in entries[part]] for part in parts}
    extra = [SHEET, PLOT]
    write_sheet(folder / SHEET, [*files["samples"], *files["holdout"]])
    with draft_beside(folder / PLOT) as plot:
        write_coverage_plot(plot, _points(candidates), _points(samples), _points(holdout))
        plot.replace(folder / PLOT)
    if wish.arrays is not None:
        for name, part in ((ARRAYS, "samples"), (HELD_ARRAYS, "holdout")):
            if files[part]:
                write_arrays(folder / name, files[part], wish.arrays)
                extra.append(name)
    versions = {name: metadata.version(name) for name in PACKAGES if any(metadata.distributions(name=name))}
    content = {
        "tool": "prepare_calibration",
        "settings": asdict(wish),
        "versions": versions,
        "sources": given,
        "considered": len(sources),
        **entries,
        "files": extra,
        "skipped": [asdict(one) for one in skipped],
    }
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    made_up = sum(entry["synthetic"] for part in entries.values() for entry in part)
    return Chosen(given, len(sources), len(candidates), len(samples), len(holdout), chosen.duplicates, made_up, skipped)


def _reasons(skipped: list[Skipped]) -> str:
    """Return how many sources were skipped for what, in a few words."""
    counts = Counter(one.reason.partition(";")[0] for one in skipped)
    return "".join(f"{count} {reason}, " for reason, count in counts.most_common(3))


def _points(candidates: Sequence[Candidate]) -> list[Point]:
    return [(c.look.brightness, c.look.contrast, c.look.detail) for c in candidates]


def _companions(manifest: Path) -> list[Path]:
    """Return the files that a manifest of ours names."""
    content = json.loads(manifest.read_text(encoding="utf-8"))
    names = [entry["file"] for part in ("samples", "holdout") for entry in content[part]]
    return [manifest.parent / name for name in (*names, *content["files"])]


def _range(model: Path | None, asked: InputRange | None) -> InputRange:
    """Return the range of the arrays: as asked, else as the model tells, else 0..1."""
    return (asked if model is None else choose_range(asked, ModelFile(model).input_range, model)) or "0..1"


def _input(model: Path) -> tuple[str, ImageForm]:
    """Return name and form of a model's image input."""
    try:
        with open_model(ModelFile(model)) as opened:
            found = image_input(opened.inputs)
            if found is None:
                got = describe(opened.inputs)
                raise ToolError("the model does not take one image", where=model, got=got, remedy="say --tile-size instead")
            return found
    except ChildError as error:
        remedy = "see what verify says of it, or say --tile-size instead"
        raise ToolError("the model does not load", where=model, got=error, remedy=remedy) from None


def _size(text: str | None) -> tuple[int, int] | None:
    """Return height and width of `--resize`: 256, or 320x240 for width x height."""
    if text is None:
        return None
    width, _, height = text.partition("x")
    if not (width.isdecimal() and (height or width).isdecimal()):
        expected = "pixels, such as 256 or 320x240 (width x height)"
        raise ToolError("--resize is no size", got=text, expected=expected, remedy="correct it")
    sides = int(height or width), int(width)
    if not all(1 <= side <= 16384 for side in sides):
        raise ToolError("--resize is out of range", got=text, expected="1 to 16384 pixels", remedy="correct it")
    return sides


def prepare_calibration(
    sources: Annotated[list[Path] | None, typer.Argument(help="Images, videos, folders, or CSV files that name them.")] = None,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    model: Annotated[
        Path | None, typer.Option(help="Take size, and with --npz name, layout and channels, from this model's image input.")
    ] = None,
    tile_size: Annotated[
        int | None, typer.Option(min=8, max=16384, help=f"Cut square tiles of this many pixels; default: {TILE_SIZE}.")
    ] = None,
    resize: Annotated[str | None, typer.Option(help="Take whole images instead, stretched: 256, or 320x240.")] = None,
    tiles_per_image: Annotated[int, typer.Option(min=1, max=1000, help="Most tiles of one image or frame.")] = 4,
    max_samples: Annotated[int, typer.Option(min=1, max=100_000, help="Samples to calibrate with, at most.")] = 100,
    min_samples: Annotated[int, typer.Option(min=1, help="Fewer are an error.")] = 8,
    holdout: Annotated[int, typer.Option(min=0, max=100_000, help="Further samples of other sources, to measure on.")] = 0,
    frames_per_video: Annotated[int, typer.Option(min=1, max=100_000, help="Frames to look at, spread evenly.")] = 16,
    scene_changes: Annotated[bool, typer.Option("--scene-changes", help="Frames at scene changes instead.")] = False,
    file_column: Annotated[str | None, typer.Option(help="CSV column of files; default: file, path, image and the like.")] = None,
    frame_column: Annotated[str | None, typer.Option(help="CSV column of frame numbers; default: frame and the like.")] = None,
    time_column: Annotated[str | None, typer.Option(help="CSV column of seconds; default: time and the like.")] = None,
    synthetic: Annotated[int, typer.Option(min=0, max=100_000, help="Made-up pictures to add, named so in the manifest.")] = 0,
    npz: Annotated[bool, typer.Option("--npz", help=f"Also write {ARRAYS}, and {HELD_ARRAYS}.")] = False,
    input_name: Annotated[str | None, typer.Option(help="Name of the array: the model's input; default: images.")] = None,
    input_range: Annotated[InputRange | None, typer.Option(help="Range of the array's values; default: 0..1.")] = None,
    layout: Annotated[Literal["nchw", "nhwc"] | None, typer.Option(help="Order of the array's axes; default: nchw.")] = None,
    channels: Annotated[Literal["3", "1"] | None, typer.Option(help="3 for RGB, 1 for luma; default: 3.")] = None,
    seed: Seed = 0,
    reproducible: Reproducible = False,
    dry_run: DryRunOption = False,
    overwrite: Overwrite = False,
    refresh: Refresh = False,
) -> CalibrationSamples:
    """Choose calibration samples from images, videos, a CSV or made-up pictures: spread, without duplicates.

    Samples come evenly from dark to bright, flat to contrasty, smooth to detailed. The same sources and seed give the same bytes.
    Sources that can't be read are named and counted.

    Raises:
        ToolError: No such source, too few samples, or a folder that holds something else.
    """
    if resize is not None and tile_size is not None:
        raise ToolError("--resize takes whole images, --tile-size cuts them", remedy="give one of them")
    if not sources and not synthetic:
        raise ToolError("there is nothing to take samples from", remedy="name images, folders, videos or a CSV, or use --synthetic")
    for option, value in (("input-name", input_name), ("input-range", input_range), ("layout", layout), ("channels", channels)):
        if value is not None and not npz:
            raise ToolError(f"--{option} does nothing without --npz", remedy="leave it out, or add that")
    name, form = _input(model) if model is not None else ("images", ImageForm("nchw", 3, None, None))
    shape = ArrayForm(input_name or name, layout or form.layout, int(channels or form.channels), _range(model, input_range))
    size = _size(resize)
    if form.height and form.width and form.height != form.width and not (size or tile_size):
        size = form.height, form.width
    arrays = shape if npz else None
    wish = SamplesWish(
        tile_size=None if size else tile_size or form.height or form.width or TILE_SIZE,
        resize=size,
        tiles_per_image=1 if size else tiles_per_image,
        max_samples=max_samples,
        min_samples=min(min_samples, max_samples),
        holdout=holdout,
        seed=seed,
        frames_per_video=frames_per_video,
        scene_changes=scene_changes,
        arrays=arrays,
    )
    found = find_sources(sources or [], Columns(file_column, frame_column, time_column), but=output)
    most = CONSIDERED * (max_samples + holdout)
    considered = found
    if len(found) > most:
        places = np.random.default_rng([seed, len(found)]).permutation(len(found))[:most]
        considered = [found[place] for place in sorted(places)]
    considered = [*considered, *synthetic_sources(synthetic)]
    manifest = output / MANIFEST_NAME
    folder = Set(manifest, (SHEET, PLOT, ARRAYS, HELD_ARRAYS))
    former = {} if dry_run else folder.clear_interrupted()
    _require_folder(output, manifest, overwrite=overwrite)
    _require_ours(output, manifest, overwrite=overwrite)
    read = [source.path for source in considered if source.path is not None]
    given = len(found) + synthetic
    arguments: dict[str, object] = {**asdict(wish), "sources": [source.name for source in considered], "given": given}
    most_bytes = wish.side**2 * SAMPLE_BYTES * (max_samples + holdout)
    plan = Plan(
        manifest,
        "prepare_calibration",
        arguments,
        [path for path in read if is_regular(path)],
        PACKAGES,
        overwrite=overwrite,
        refresh=refresh,
        reproducible=reproducible,
        dry_run=dry_run,
        needs=lambda: ResourceEstimate("write the samples", most_bytes, most_bytes, MEMORY_BYTES),
        reopen=_companions,
        makes_folder=True,
    )
    if dry_run:
        artifacts.foresee(plan)
    with folder.written(former):
        product, chosen = artifacts.build(plan, Chosen, lambda draft: _prepare(output, considered, given, wish, draft))
    return CalibrationSamples(output, product, chosen, _message(output, chosen, product, max_samples, holdout))


def _require_folder(output: Path, manifest: Path, *, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise ToolError("the output is no folder", where=output, remedy="choose another with -o")
    if output.is_dir() and any(output.iterdir()) and not manifest.exists() and not overwrite:
        raise ToolError(
            "the folder holds other files", where=output, remedy="use --overwrite to write among them, or choose another"
        )


def _require_ours(output: Path, manifest: Path, *, overwrite: bool) -> None:
    """Raise ToolError where a file with a fixed name would be replaced that an earlier run did not write."""
    old = read_provenance(manifest)
    ours = {Path(item.path).name: item.sha256 for item in old.companions} if old else {}
    for name in (SHEET, PLOT, ARRAYS, HELD_ARRAYS):
        path = output / name
        if path.exists() and not overwrite and record(path).sha256 != ours.get(name):
            raise ToolError("this file would be replaced", where=path, remedy="use --overwrite, or choose another folder")


def _message(output: Path, chosen: Chosen, product: Product, wanted: int, held_wanted: int) -> str:
    head = "up to date: " if product.up_to_date else ""
    held = f" and {chosen.holdout}{f' of {held_wanted}' * (chosen.holdout < held_wanted)} held out" if held_wanted else ""
    looked = f"{chosen.considered} of {chosen.sources}" if chosen.considered < chosen.sources else str(chosen.sources)
    text = f"{head}{output}: {chosen.samples} samples{held} from {looked} sources; {chosen.duplicates} near-duplicates passed over"
    if chosen.skipped:
        text += f"; {len(chosen.skipped)} sources SKIPPED"
    if chosen.synthetic:
        text += f"; {chosen.synthetic} samples are MADE UP"
    if chosen.samples < wanted:
        text += f"; fewer than the {wanted} asked for"
    return f"{text}; see {output / SHEET}"
