"""Choose calibration samples from images, videos, a CSV or synthetic pictures: spread, without duplicates.

Example:
    python -m tools.prepare_calibration photos video.mp4 -o tiles --tile-size 224 --holdout 16

The accuracy of static quantization depends on its calibration samples; the held-out samples measure it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Column, Table

from shared.calibration.dataset import MANIFEST_NAME, TILE_SIZE
from shared.command.options import DryRunOption, InputRange, Overwrite, Refresh, Reproducible, Seed, collect
from shared.command.resources import MIB, ResourceEstimate
from shared.files import artifacts
from shared.files.file_type import is_regular
from shared.files.plan import Plan, Product
from shared.media.images import WHITE
from tools.prepare_calibration.request import SampleOptions, SampleRequest
from tools.prepare_calibration.samples import (
    ARRAYS,
    EXTRA,
    HELD_ARRAYS,
    PACKAGES,
    SHEET,
    SampleJob,
    SampleSummary,
    set_files,
    write_set,
)
from tools.prepare_calibration.sources import Columns, Source, find_sources, synthetic_sources
from tools.prepare_calibration.writer import CalibrationFolder

SOURCES_PER_SAMPLE = 8  # sources measured for each requested sample; more add little but time
SHOWN = 12  # skipped sources in the terminal; the manifest has all
MEMORY_BYTES = 600 * MIB  # libraries, and one decoded image of usual size
SAMPLE_BYTES = 6  # on disk for each pixel at most, arrays included

Sources = Annotated[list[Path] | None, typer.Argument(help="Images, videos, folders, or CSV files that name them.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]
Model = Annotated[
    Path | None, typer.Option(help="Take size, and with --npz name, layout and channels, from this model's image input.")
]
TileSize = Annotated[
    int | None, typer.Option(min=8, max=16384, help=f"Cut square tiles of this many pixels; default: {TILE_SIZE}.")
]
Resize = Annotated[str | None, typer.Option(help="Take whole images instead, stretched: 256, or 320x240.")]
TilesPerImage = Annotated[int, typer.Option(min=1, max=1000, help="Most tiles of one image or frame.")]
MaxSamples = Annotated[int, typer.Option(min=1, max=100_000, help="Samples to calibrate with, at most.")]
MinSamples = Annotated[int, typer.Option(min=1, help="Fewer samples are an error.")]
Holdout = Annotated[int, typer.Option(min=0, max=100_000, help="Further samples of other sources, to measure on.")]
FramesPerVideo = Annotated[int, typer.Option(min=1, max=100_000, help="Frames to take from a video, spread evenly.")]
SceneChanges = Annotated[bool, typer.Option("--scene-changes", help="Take frames at scene changes instead.")]
FileColumn = Annotated[str | None, typer.Option(help="CSV column of files; default: file, path, image and the like.")]
FrameColumn = Annotated[str | None, typer.Option(help="CSV column of frame numbers; default: frame and the like.")]
TimeColumn = Annotated[str | None, typer.Option(help="CSV column of seconds; default: time and the like.")]
Synthetic = Annotated[int, typer.Option(min=0, max=100_000, help="Synthetic pictures to add; the manifest marks them.")]
Background = Annotated[str, typer.Option(help="Colour that images with transparent parts are laid on: a name, or #rrggbb.")]
Npz = Annotated[bool, typer.Option("--npz", help=f"Also write {ARRAYS}, and {HELD_ARRAYS}.")]
InputName = Annotated[str | None, typer.Option(help="Name of the array: the model's input; default: images.")]
ArrayRange = Annotated[InputRange | None, typer.Option("--input-range", help="Range of the array's values; default: 0..1.")]
Layout = Annotated[Literal["nchw", "nhwc"] | None, typer.Option(help="Order of the array's axes; default: nchw.")]
Channels = Annotated[Literal["3", "1"] | None, typer.Option(help="3 for RGB, 1 for luma; default: 3.")]


@dataclass(frozen=True)
class CalibrationSamples:
    """Result of prepare_calibration."""

    folder: Path
    manifest: Product
    found: SampleSummary
    message: str

    def __rich__(self) -> RenderableType:
        skipped = Table("skipped", Column("why", overflow="fold"))
        for source in self.found.skipped[:SHOWN]:
            skipped.add_row(source.source, source.reason)
        more = len(self.found.skipped) - SHOWN
        shown: list[RenderableType] = [skipped] if self.found.skipped else []
        shown += [f"and {more} more; {MANIFEST_NAME} has all"] if more > 0 else []
        return Lines(*shown, self.message)


def prepare_calibration(
    sources: Sources = None,
    *,
    output: Output,
    model: Model = None,
    tile_size: TileSize = None,
    resize: Resize = None,
    tiles_per_image: TilesPerImage = 4,
    max_samples: MaxSamples = 100,
    min_samples: MinSamples = 8,
    holdout: Holdout = 0,
    frames_per_video: FramesPerVideo = 16,
    scene_changes: SceneChanges = False,
    file_column: FileColumn = None,
    frame_column: FrameColumn = None,
    time_column: TimeColumn = None,
    synthetic: Synthetic = 0,
    background: Background = WHITE,
    npz: Npz = False,
    input_name: InputName = None,
    input_range: ArrayRange = None,
    layout: Layout = None,
    channels: Channels = None,
    seed: Seed = 0,
    reproducible: Reproducible = False,
    dry_run: DryRunOption = False,
    overwrite: Overwrite = False,
    refresh: Refresh = False,
) -> CalibrationSamples:
    """Choose calibration samples from images, videos, a CSV or synthetic pictures: spread, without duplicates.

    Samples come evenly from dark to bright, flat to contrasty, smooth to detailed. The same sources and seed give the same bytes.
    Sources that can't be read are named and counted.

    Raises:
        ToolError: A source is missing, samples are too few, or the folder holds other files.
    """
    request = collect(SampleOptions, locals()).request()
    found = find_sources(sources or [], Columns(file_column, frame_column, time_column), exclude=output)
    measured = [*_limit(found, request), *synthetic_sources(synthetic)]
    job = SampleJob(output, request, measured, len(found) + synthetic)
    folder = CalibrationFolder(output / MANIFEST_NAME, EXTRA)
    former = {} if dry_run else folder.clear_interrupted()
    folder.require_free(overwrite=overwrite)
    plan = replace(_plan(job), overwrite=overwrite, refresh=refresh, reproducible=reproducible, dry_run=dry_run)
    if dry_run:
        artifacts.end_dry_run(plan)
    with folder.written(former):
        product, summary = artifacts.build(plan, SampleSummary, partial(write_set, job))
    return CalibrationSamples(output, product, summary, _message(product, summary, request))


def _limit(sources: Sequence[Source], request: SampleRequest) -> Sequence[Source]:
    """Return the sources to measure: all, or a random choice where there are very many."""
    most = SOURCES_PER_SAMPLE * (request.max_samples + request.holdout)
    if len(sources) <= most:
        return sources
    places = np.random.default_rng([request.seed, len(sources)]).permutation(len(sources))[:most]
    return [sources[place] for place in sorted(places)]


def _plan(job: SampleJob) -> Plan:
    """Return the manifest to write, and everything that decides it."""
    request = job.request
    most_bytes = request.side**2 * SAMPLE_BYTES * (request.max_samples + request.holdout)
    return Plan(
        job.folder / MANIFEST_NAME,
        "prepare_calibration",
        {**asdict(request), "sources": [source.name for source in job.sources], "given": job.given},
        [source.path for source in job.sources if source.path is not None and is_regular(source.path)],
        PACKAGES,
        needs=lambda: ResourceEstimate("write the samples", most_bytes, most_bytes, MEMORY_BYTES),
        reopen=set_files,
        makes_folder=True,
    )


def _message(product: Product, summary: SampleSummary, request: SampleRequest) -> str:
    folder, wanted = product.path.parent, request.holdout
    head = "up to date: " if product.up_to_date else ""
    of_wanted = f" of {wanted}" if summary.holdout < wanted else ""
    held_out = f" and {summary.holdout}{of_wanted} held out" if wanted else ""
    is_limited = summary.considered < summary.sources
    measured = f"{summary.considered} of {summary.sources}" if is_limited else f"{summary.sources}"
    text = f"{head}{folder}: {summary.samples} samples{held_out} from {measured} sources"
    text += f"; {summary.duplicates} near-duplicates passed over"
    if summary.skipped:
        text += f"; {len(summary.skipped)} sources SKIPPED"
    if summary.synthetic:
        text += f"; {summary.synthetic} samples are MADE UP"
    if summary.samples < request.max_samples:
        text += f"; fewer than the {request.max_samples} asked for"
    return f"{text}; see {folder / SHEET}"
