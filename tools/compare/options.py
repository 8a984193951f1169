"""The options of compare, and which of them go together."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from shared.command.errors import ToolError
from shared.command.options import InputRange
from tools.compare.gates import GATES

Alternatives = Annotated[
    list[Path] | None, typer.Option("--alternative", help="A further candidate that may break gates; can be repeated.")
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Also write the comparison as JSON.")]
Html = Annotated[Path | None, typer.Option(help="Also write the comparison as one HTML page.")]
CardName = Annotated[str | None, typer.Option(help="Model card of a reference and of embedders that are checkpoints.")]
Images = Annotated[
    Path | None,
    typer.Option(help="Image, folder, pattern, calibration manifest or .npz; default: seeded samples, photos for --embedder."),
]
GroundTruth = Annotated[
    Path | None, typer.Option(help="Folder or pattern of what --images should become, by name; for super-resolution.")
]
PixelRange = Annotated[
    InputRange | None, typer.Option(help="Range of the models' images; default: as the reference's metadata says, else 0..1.")
]
Messages = Annotated[Path | None, typer.Option(help="JSON file of images and their messages; in place of --images.")]
Attacks = Annotated[str | None, typer.Option(help="What marked images meet: standard (default), none, or as jpeg-50,crop-0.9.")]
Embedders = Annotated[
    list[Path] | None,
    typer.Option(
        "--embedder", help="Mark --images with it and let every detector read them; repeatable, the first is the reference."
    ),
]
Samples = Annotated[
    int | None, typer.Option(min=1, help="Inputs; default: 16 images, 8 seeded samples, fewer for large models, all of --messages.")
]
Runs = Annotated[int | None, typer.Option(min=1, help="Timed runs per model; default: as many as fit in two seconds, at least 3.")]
Bits = Annotated[int | None, typer.Option(min=1, help="Message bits of detectors without our metadata.")]
CardGates = Annotated[str | None, typer.Option("--gates", metavar="CARD:RECIPE", help="Gates of a model card.")]
Gate = Annotated[
    list[str] | None, typer.Option("--gate", metavar="NAME=VALUE", help=f"A gate; repeatable. NAME is one of {', '.join(GATES)}.")
]


def require_sense(given: Mapping[str, Any]) -> None:
    """Raise ToolError for options that contradict each other."""
    if given["embedder"] and given["messages"] is not None:
        raise ToolError("--embedder and --messages both say which images are marked", remedy="leave out one of them")
    if not (given["candidates"] or given["alternatives"] or given["embedder"]):
        raise ToolError("nothing to compare the reference with", remedy="name one or more candidates, or --embedder")
    if given["images"] is not None and given["messages"] is not None:
        raise ToolError("--images and --messages both say which images", remedy="leave out --images")
    if given["ground_truth"] is not None and given["images"] is None:
        raise ToolError("--ground-truth needs the images to make it from", remedy="give --images")
    if given["attacks"] is not None and given["messages"] is None and not given["embedder"]:
        raise ToolError("--attacks needs images whose messages are known", remedy="give --messages FILE or --embedder FILE")
