"""Mark crops of photos that miniseal never saw, and keep them next to their originals with the true messages.

Example:
    python -m models.miniseal.make_samples --output models/miniseal/samples
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import RenderableType
from rich.text import Text

from models.miniseal.train import FOLDER
from shared.command.cli import run
from shared.command.errors import ToolError
from shared.files.atomic import draft_beside
from shared.media.images import Pixels, to_image
from shared.metrics import metrics
from shared.watermark.message import FILE_NAME, Bits, to_hex

PER_PHOTO = 4
MIN_PSNR_DB = 38.0  # of every marked image; below, a watermark may be seen
SMALLEST = 0.6  # side of a crop, as a share of the photo's shorter side


@dataclass(frozen=True)
class Samples:
    """Result of make_samples; PSNR in dB of marked against original images."""

    messages: Path
    images: int
    size_bytes: int
    lowest_psnr_db: float
    mean_psnr_db: float

    @property
    def ok(self) -> bool:
        """Whether every image kept its quality."""
        return self.lowest_psnr_db >= MIN_PSNR_DB

    def __rich__(self) -> RenderableType:
        verdict = "ok" if self.ok else "FAILED"
        return Text(
            f"{self.messages}: {self.images} marked images and their originals, {self.size_bytes / 2**20:.2f} MiB, "
            f"PSNR {self.mean_psnr_db:.2f} dB, lowest {self.lowest_psnr_db:.2f} dB, limit {MIN_PSNR_DB:g} dB: {verdict}"
        )


def cut_out(photo: Pixels, box: tuple[int, int, int, int]) -> Pixels:
    """Return a box (left, top, right, bottom) of a photo, brought to uint8 (SIZE, SIZE, 3) RGB."""
    from PIL import Image

    from models.miniseal.pictures import SIZE

    return np.asarray(Image.fromarray(photo).resize((SIZE, SIZE), Image.Resampling.BICUBIC, box))


def _random_box(photo: Pixels, rng: np.random.Generator) -> tuple[int, int, int, int]:
    height, width = photo.shape[:2]
    side = int(min(height, width) * rng.uniform(SMALLEST, 1))
    left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
    return left, top, left + side, top + side


class Marker:
    """The embedder of a checkpoint: pixels and message in, marked pixels out."""

    def __init__(self, checkpoint: Path) -> None:
        from models.miniseal.embedder import Embedder
        from shared.networks.checkpoint import open_checkpoint, require_match

        prefix = "embedder."
        state = {
            key.removeprefix(prefix): value for key, value in open_checkpoint(checkpoint).state.items() if key.startswith(prefix)
        }
        self.nbits = state["patterns"].shape[0] if "patterns" in state else 1
        self._embedder = Embedder(self.nbits)
        require_match(state, {key: value.shape for key, value in self._embedder.state_dict().items()}, checkpoint)
        self._embedder.load_state_dict(state)

    def mark(self, pixels: Pixels, message: Bits) -> Pixels:
        """Return uint8 (S, S, 3) RGB with the message, bool (K,), laid in."""
        import torch

        from models.miniseal.embedder import embed

        with torch.inference_mode():
            marked = embed(self._embedder, torch.from_numpy(to_image(pixels)), torch.from_numpy(message)[None])
        array: Pixels = marked[0].mul(255).round().byte().permute(1, 2, 0).numpy()  # (1, 3, S, S) -> (S, S, 3)
        return array


def make_samples(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint that train wrote.")] = FOLDER / "checkpoint.safetensors",
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")] = FOLDER / "samples",
    seed: Annotated[int, typer.Option(min=0, help="Seed of crops and messages.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the samples there.")] = False,
) -> Samples:
    """Mark crops of photos that miniseal never saw, and keep them next to their originals with the true messages.

    Raises:
        ToolError: The checkpoint has no embedder, or the folder has samples already.
    """
    from models.miniseal.pictures import HELD_OUT_PHOTOS, photo

    listing = output / FILE_NAME
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise ToolError("the folder is not empty", where=output, remedy="use --overwrite, or choose another folder with -o")
    marker, rng = Marker(checkpoint), np.random.default_rng(seed)
    listing.unlink(missing_ok=True)  # so that an interrupted run leaves no wrong truths
    entries: list[dict[str, Any]] = []
    psnrs = []
    size = 0
    for name in HELD_OUT_PHOTOS:
        for _ in range(PER_PHOTO):
            pixels = photo(name)
            box, message = _random_box(pixels, rng), rng.random(marker.nbits) < 0.5
            original = cut_out(pixels, box)
            marked = marker.mark(original, message)
            psnrs.append(metrics.psnr_db(to_image(original), to_image(marked)))
            files = {kind: f"{kind}/{len(psnrs) - 1:02d}_{name}.png" for kind in ("marked", "unmarked")}
            size += write_png(output / files["marked"], marked) + write_png(output / files["unmarked"], original)
            place = {"source": name, "box": list(box)}
            entries.append({"file": files["marked"], "message": to_hex(message), "original": files["unmarked"], **place})
            entries.append({"file": files["unmarked"], "message": None, **place})
    entries.sort(key=lambda entry: entry["file"])  # the marked ones first
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    content = {"nbits": marker.nbits, "checkpoint_sha256": digest, "seed": seed, "images": entries}
    with draft_beside(listing) as draft:
        draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        draft.replace(listing)
    return Samples(listing, len(psnrs), size, float(min(psnrs)), float(np.mean(psnrs)))


def write_png(path: Path, pixels: Pixels) -> int:
    """Write an image and return its size in bytes."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    with draft_beside(path) as draft:
        Image.fromarray(pixels).save(draft, "PNG", optimize=True)
        draft.replace(path)
    return path.stat().st_size


if __name__ == "__main__":
    run(make_samples, dependencies="train-miniseal")
