"""Photographs to take samples from, and the contents of calibration sets."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tools.prepare_calibration.sources import seeded_image

TILE = 32
SMALL: dict[str, Any] = {"tile_size": TILE, "max_samples": 12}
BROKEN = {"cut.jpg", "empty.png", "page.jpg", "tiny.png"}


def picture(seed: int, width: int = 90, height: int = 70) -> Image.Image:
    waves = seeded_image(max(width, height), np.random.default_rng(seed))[0].transpose(1, 2, 0)
    return Image.fromarray(np.rint(waves * 255).astype(np.uint8)[:height, :width])


def write_photos(folder: Path, count: int = 8) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture(number).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eight photographs of 90x70 pixels."""
    return write_photos(tmp_path / "photos")


@pytest.fixture(scope="package")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every format and mode, a turned photograph, folders below, and four files without samples."""
    folder = tmp_path_factory.mktemp("mixed") / "photos"
    (folder / "sub").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # upright after a quarter turn
    for number, name in enumerate(("a.jpg", "b.jpeg", "c.JPEG", "d.png", "e.webp", "sub/f.bmp")):
        picture(number).save(folder / name)
    picture(7, 120, 40).save(folder / "turned.jpg", exif=exif)
    picture(8).convert("L").save(folder / "grey.png")
    picture(9).convert("RGBA").save(folder / "alpha.png")
    deep = np.asarray(picture(10).convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(folder / "deep.png")
    picture(11).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:900])
    (folder / "empty.png").touch()
    (folder / "page.jpg").write_text("<!doctype html><title>404</title>")
    picture(12, TILE - 1, 200).save(folder / "tiny.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def manifest(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return content


def entries(folder: Path, part: str = "samples") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = manifest(folder)[part]
    return found


def everything(folder: Path) -> dict[str, str]:
    """Return name -> sha256 of all files but the provenance, which has times and paths."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    return {name: sha256(path) for name, path in files.items() if name != "manifest.json.json"}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sources(found: Iterable[dict[str, Any]]) -> set[str]:
    return {entry["source"] for entry in found}
