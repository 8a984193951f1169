"""Convert and quantize the embedders of full size with seeded weights, and keep the figures in tests/bench/embedders.json.

python -m tests.bench embedders
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from shared.command.resources import GIB, MIB
from shared.files.code_version import ROOT
from shared.media.images import image_files
from shared.networks.card import load_card
from tests.bench.tables import machine, write_results
from tools.compare import compare
from tools.compare.matrix import mark_photos
from tools.convert_embedder import convert_embedder
from tools.convert_embedder.request import Precision, prefix_of

FOLDER = ROOT / "models" / "out" / "bench_embedders"
PHOTOS = ROOT / "models" / "miniseal" / "samples" / "unmarked"
RECIPES = {"videoseal_embedder_int8": ("videoseal", 8), "chunkyseal_embedder_int8": ("chunkyseal", 2)}  # card, photos to mark


@dataclass(frozen=True)
class Figures:
    """One recipe; sizes in MiB, latencies are medians, PSNR of photos marked by INT8 to those marked by float32."""

    recipe: str
    float_mib: float
    product_mib: float
    float_ms: float
    product_ms: float
    speedup: float
    cosine: float
    psnr_db: float
    convert_seconds: float
    convert_gib: float


def measure(recipe: str, model: str, photos: int) -> Figures:
    """Measure one recipe's product, and remove its files."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    product = FOLDER / f"{prefix_of(load_card(model))}_rehearsal_256_int8.tflite"
    made = convert_embedder(model=model, rehearsal=True, quantize=Precision.INT8, output=product)
    source = made.float_product.path
    found = compare(source, [product], images=PHOTOS).findings
    (candidate,) = found.candidates
    assert candidate.measurement is not None and candidate.speedup is not None and candidate.cosine is not None
    marked = mark_photos([source, product], None, _spread(image_files(PHOTOS), photos), FOLDER / "marked", found.threads)
    nearness = marked.markings[1].to_first_db
    assert nearness is not None
    figures = Figures(
        recipe=recipe,
        float_mib=round(source.stat().st_size / MIB, 1),
        product_mib=round(product.stat().st_size / MIB, 1),
        float_ms=round(found.reference.median_ms, 1),
        product_ms=round(candidate.measurement.median_ms, 1),
        speedup=round(candidate.speedup, 2),
        cosine=round(candidate.cosine, 5),
        psnr_db=round(nearness, 1),
        convert_seconds=round(made.float_model.convert_seconds, 1),
        convert_gib=round(made.float_model.peak_rss_bytes / GIB, 1),
    )
    shutil.rmtree(FOLDER)
    return figures


def _spread(files: list[Path], count: int) -> list[Path]:
    return files[:: len(files) // count][:count]


if __name__ == "__main__":
    figures = [measure(recipe, *about) for recipe, about in RECIPES.items()]
    write_results("embedders", {"machine": machine(), "products": [asdict(one) for one in figures]})
