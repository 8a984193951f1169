"""Mark photos and videos with a message, at their own size; a detector reads it back.

Example:
    python -m tools.mark photo.jpg -o marked.png --embedder y_256b_img.pth --card videoseal --message random

The result is a PNG file: 8 bits for each value, rounded, nothing lost. Of a folder every image is marked, and a messages.json in
the folder of the results lists what is in each; `compare --messages` takes it. A video becomes H.264, its sound stays as it is.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table

from shared.command.cli import run, step_progress
from shared.command.errors import ToolError
from shared.command.options import Overwrite, Refresh, Threads
from shared.files import artifacts
from shared.files.atomic import new_folder, write_whole
from shared.files.plan import Plan, Product
from shared.media.images import image_files, read_pixels, to_png
from shared.media.transcode import frame_count, require_kind
from shared.media.video import is_video
from shared.metrics.metrics import psnr_db
from shared.metrics.output_error import MOST_DB
from shared.networks.card import load_card
from shared.runtime.processes import ChildError
from shared.watermark import WatermarkEmbedder
from shared.watermark.embedding import CRF, describe_embedder
from shared.watermark.message import FILE_NAME, Bits, parse_message, to_hex

PACKAGES = ("av", "numpy", "pillow", "torch")
RANDOM = "random"
SUFFIX = ".png"
SHOWN = 12  # rows of the table; the JSON has all

Embedder = Annotated[
    Path, typer.Option(help="A checkpoint with the embedder (.pth, .safetensors), or a .tflite or .onnx model of it.")
]
CardName = Annotated[
    str | None, typer.Option(help="Model card of a checkpoint's embedder: videoseal, pixelseal, chunkyseal, or a path to a .toml.")
]
Crf = Annotated[int, typer.Option(min=0, max=51, help="Of videos: 0 loses nothing; higher makes smaller files and costs bits.")]
Text = Annotated[
    str, typer.Option("--message", help="Hexadecimal or binary digits, or text; random: another one for each image, by --seed.")
]
Samples = Annotated[int | None, typer.Option(min=1, help="Images of a folder, evenly spread over it; default: all.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of random messages.")]
OutputPath = Annotated[
    Path, typer.Option("--output", "-o", help="A .png file; of a folder, a folder; of a video, .mp4, .mov or .mkv.")
]


@dataclass(frozen=True)
class MarkedImage:
    """One result: its file, relative to the folder of all, its message in hexadecimal digits, its PSNR to the original.

    Of a video the number of its frames, in place of the PSNR.
    """

    file: str
    message: str
    original: str
    psnr_db: float | None
    frames: int | None = None


@dataclass(frozen=True)
class MarkedSet:
    """All results."""

    images: list[MarkedImage]


@dataclass(frozen=True)
class Marking:
    """Result of mark."""

    output: Path
    product: Product
    images: list[MarkedImage]
    message: str

    def __rich__(self) -> RenderableType:
        table = Table("original", "message", "PSNR to the original")
        for image in self.images[:SHOWN]:
            table.add_row(
                image.original, image.message, f"{image.frames} frames" if image.psnr_db is None else f"{image.psnr_db:.1f} dB"
            )
        rest = len(self.images) - SHOWN
        return Lines(table, *([f"and {rest} more; --json has all"] if rest > 0 else []), self.message)


def _spread(files: list[Path], count: int | None) -> list[Path]:
    """Return so many files, evenly spread over all of them."""
    return files if count is None or count >= len(files) else [files[number * len(files) // count] for number in range(count)]


def _messages(text: str, nbits: int, seed: int, count: int) -> list[Bits]:
    """Return a message for each image."""
    if text == RANDOM:
        rng = np.random.default_rng(seed)
        return [rng.random(nbits) < 0.5 for _ in range(count)]
    return [parse_message(text, nbits)] * count


def _names(files: list[Path], folder: Path, messages: list[Bits]) -> list[str]:
    """Return the name of each result: the original's, and 8 digits of its message's SHA-256.

    A run that is stopped while it replaces other results so never leaves an image with another message than messages.json lists.
    """
    names: dict[str, None] = {}
    for file, bits in zip(files, messages, strict=True):
        stem = file.relative_to(folder).with_suffix("").as_posix().replace("/", "_")
        digits = hashlib.sha256(to_hex(bits).encode()).hexdigest()[:8]
        unused = (f"{stem}{number}-{digits}{SUFFIX}" for number in itertools.chain([""], map("~{}".format, itertools.count(2))))
        names[next(name for name in unused if name not in names)] = None
    return [*names]


def _require_target(source: Path, output: Path, names: list[str]) -> None:
    """Raise ToolError where results would lose bits, or lie among other files."""
    if not source.is_dir():
        if is_video(source):
            require_kind(output.suffix)
        elif output.suffix != SUFFIX:
            fault = "the output must be a PNG file, which loses nothing"
            raise ToolError(fault, where=output, expected=f"a name ending in {SUFFIX}")
        return
    if output.resolve().is_relative_to(source.resolve()):
        raise ToolError("the output lies in the folder of the originals", where=output, remedy="choose another folder with -o")
    found = {path.name for path in output.iterdir() if not path.name.startswith(".")} if output.is_dir() else set()
    if FILE_NAME not in found and not found <= set(names):  # those of a stopped run have these names
        raise ToolError("the folder holds other files", where=output, remedy="choose another folder with -o")


@contextmanager
def _removed_on_failure(files: list[Path]) -> Iterator[None]:
    """Remove those of the files that were not there before, if the work fails."""
    new = [file for file in files if not file.exists()]
    try:
        yield
    except BaseException:
        for file in new:
            file.unlink(missing_ok=True)
        raise


@contextmanager
def _opened(embedder: Path, card: str | None, threads: int | None) -> Iterator[WatermarkEmbedder]:
    try:
        with WatermarkEmbedder(embedder, card=card, threads=threads) as opened:
            yield opened
    except ChildError as error:
        raise ToolError("the embedder does not run", where=embedder, got=error, remedy="choose another file or card") from None


def _mark(embedder: WatermarkEmbedder, file: Path, bits: Bits, target: Path) -> float:
    """Write a marked image; return its PSNR to the original."""
    pixels = read_pixels(file)
    made = embedder.embed(pixels, bits)
    write_whole(target, to_png(made))
    return min(psnr_db(pixels.astype(np.float64), made.astype(np.float64), 255.0), MOST_DB)


def _mark_video(embedder: WatermarkEmbedder, file: Path, bits: Bits, draft: Path, output: Path, crf: int) -> MarkedImage:  # noqa: PLR0917
    """Write a marked video to a draft of the output."""
    with step_progress(f"mark {file.name}", frame_count(file)) as advance:
        count = embedder.embed_video(file, draft, bits, kind=output.suffix, crf=crf, on_frame=advance)
    return MarkedImage(output.name, to_hex(bits), file.name, None, count)


def _mark_images(embedder: WatermarkEmbedder, source: Path, marks: Sequence[tuple[Path, Bits, Path, str]]) -> list[MarkedImage]:
    """Write marked images; each mark is the image, its message, the file to write, and the name that the file will have."""
    done = []
    with _removed_on_failure([target for _, _, target, _ in marks]), step_progress(f"mark {source.name}", len(marks)) as advance:
        for file, bits, target, name in marks:
            original = str(file.relative_to(source)) if source.is_dir() else file.name
            done.append(MarkedImage(name, to_hex(bits), original, _mark(embedder, file, bits, target)))
            advance("")
    return done


def _summary(output: Path, images: list[MarkedImage], state: str, crf: int) -> str:
    """Return the closing line."""
    if images[0].psnr_db is None:
        return f"{output}: {images[0].frames} frames {state}, H.264 at a rate factor of {crf}"
    count = "1 image" if len(images) == 1 else f"{len(images)} images"
    least = min(image.psnr_db for image in images if image.psnr_db is not None)
    return f"{output}: {count} {state}, values rounded to 8 bits, PSNR at least {least:.1f} dB"


def mark(
    source: Annotated[Path, typer.Argument(help="An image, a video, or a folder of images.")],
    *,
    output: OutputPath,
    embedder: Embedder,
    card: CardName = None,
    message: Text = RANDOM,
    samples: Samples = None,
    seed: Seed = 0,
    crf: Crf = CRF,
    threads: Threads = None,
    overwrite: Overwrite = False,
    refresh: Refresh = False,
) -> Marking:
    """Mark photos and videos with a message, at their own size.

    Raises:
        ToolError: No image or video, no embedder, a message of another length, or a place that can't be written.
    """
    described, is_folder = describe_embedder(embedder, card), source.is_dir()
    files = _spread(image_files(source), samples) if is_folder else [source]
    bits = _messages(message, described.nbits, seed, len(files))
    names = _names(files, source, bits) if is_folder else [output.name]
    _require_target(source, output, names)

    def make(draft: Path) -> MarkedSet:
        with _opened(embedder, card, threads) as opened:
            if is_video(source):
                return MarkedSet([_mark_video(opened, source, bits[0], draft, output, crf)])
            targets = [output / name for name in names] if is_folder else [draft]
            done = _mark_images(opened, source, list(zip(files, bits, targets, names, strict=True)))
        if is_folder:
            entries = [{"file": image.file, "message": image.message} for image in done]
            draft.write_text(json.dumps({"nbits": described.nbits, "images": entries}, indent=1) + "\n", encoding="utf-8")
        return MarkedSet(done)

    digest = hashlib.sha256("/".join(names).encode()).hexdigest()
    plan = Plan(
        output / FILE_NAME if is_folder else output,
        "mark",
        {
            **asdict(described),
            "card": card and asdict(load_card(card))["embedder"],
            "message": message,
            "seed": seed,
            "crf": crf,
            "names": digest,
        },
        [*files, embedder],
        PACKAGES,
        overwrite=overwrite,
        refresh=refresh,
        reopen=lambda _: [output / name for name in names] if is_folder else [],
        makes_folder=is_folder,
    )
    with new_folder(output) if is_folder else nullcontext():
        product, found = artifacts.build(plan, MarkedSet, make)
    state = "up to date" if product.up_to_date else "written"
    return Marking(output, product, found.images, _summary(output, found.images, state, crf))


if __name__ == "__main__":
    run(mark)
