"""Options that several tools have, defined once."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from shared.command.errors import ToolError

InputRange = Literal["0..1", "-1..1", "0..255"]
Objective = Literal["size", "latency"]

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output file, whatever it is.")]
Refresh = Annotated[bool, typer.Option("--refresh", help="Replace the output file if edgepress wrote it and it is out of date.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Check what can be checked, say what would be written and what it takes; write nothing.")
]
Reproducible = Annotated[
    bool, typer.Option("--reproducible", help="Make the product twice, and write it only if both have the same bytes.")
]
Threads = Annotated[int | None, typer.Option(min=1, max=256, help="Threads of the runtime; default: all CPUs.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the generated samples.")]
ModelName = Annotated[
    str, typer.Option("--model", help="Model card: videoseal, pixelseal, chunkyseal, or a path to your own .toml.")
]
Group = TypeVar("Group")

Output = Annotated[Path | None, typer.Option("--output", "-o", help="File to write; default: <model>_<recipe>.")]
OutputDir = Annotated[Path | None, typer.Option("--output-dir", help="Folder for the product, under its default name.")]
Calibration = Annotated[
    Path | None, typer.Option(help="Real inputs: folder of images, manifest or .npz; prepare_calibration makes one.")
]
Exclude = Annotated[list[str] | None, typer.Option(help="Op type, or regex on op names, that stays as it is.")]
Holdout = Annotated[
    Path | None, typer.Option(help="Real inputs to measure on; default: what the manifest of --calibration holds out.")
]
SampleCount = Annotated[
    int | None, typer.Option("--samples", min=1, help="Inputs of --calibration to take; default: all to calibrate, 16 to compare.")
]
InputRangeOption = Annotated[
    InputRange | None, typer.Option("--input-range", help="Range of the model's image input; default: as its metadata says.")
]
CorrectBias = Annotated[
    bool,
    typer.Option("--correct-bias/--no-correct-bias", help="With --calibration, take back what quantized weights shift on average."),
]
MaxError = Annotated[
    list[str] | None,
    typer.Option(
        "--max-error", help="Limit of the relative error of every output, or OUTPUT=X; a search finds each layer's precision."
    ),
]
MinPsnr = Annotated[float | None, typer.Option("--min-psnr", min=0, help="The same for outputs that are images: least PSNR, dB.")]
MinCosine = Annotated[
    float | None, typer.Option("--min-cosine", min=0, max=1, help="The same: least cosine of the worst sample's outputs.")
]
ObjectiveOption = Annotated[Objective, typer.Option("--objective", help="What the search makes small.")]
SensitivityOption = Annotated[
    bool, typer.Option("--sensitivity", help="Measure what each layer alone does to the outputs when it is quantized.")
]
AllowLargeError = Annotated[
    bool, typer.Option("--allow-large-error", help="Write the product although its outputs are far from the original's.")
]
Dask = Annotated[str | None, typer.Option("--dask", help="Measure candidates on the Dask cluster at this address.")]
Html = Annotated[Path | None, typer.Option("--html", help="Also write the result as one HTML page.")]


def collect(group: type[Group], given: Mapping[str, Any]) -> Group:
    """Return a dataclass of options from a command's parameters, by name; a parameter that was not given keeps the default."""
    names = [entry.name for entry in fields(group)]  # type: ignore[arg-type]
    return group(**{name: given[name] for name in names if given.get(name) is not None})


def output_path(output: Path | None, output_dir: Path | None, default: Path, *, makes_folder: bool = True) -> Path:
    """Return the path of a product: the named file, or the default name in a folder.

    Args:
        output: The file that the user named.
        output_dir: The folder that the user named; the default's own folder when None.
        default: The default path.
        makes_folder: Whether to make the folder now; False where a dry run or an error may follow.

    Raises:
        ToolError: Both are given.
    """
    if output is not None and output_dir is not None:
        raise ToolError("--output and --output-dir both say where to write", remedy="leave out one of them")
    if output is not None:
        return output
    folder = output_dir or default.parent
    if makes_folder:
        folder.mkdir(parents=True, exist_ok=True)
    return folder / default.name


def require_useful(*options: tuple[str, bool, str, bool]) -> None:
    """Raise ToolError for options that would do nothing.

    Args:
        options: Name of an option, whether it is given, which option it needs, and whether that one is given.
    """
    for option, is_given, needed, is_met in options:
        if is_given and not is_met:
            raise ToolError(f"{option} does nothing without {needed}", remedy=f"leave it out, or add {needed}")
