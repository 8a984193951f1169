"""The trained miniature keeps its promises on photos it never saw, and training it works."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import pytest

from models.miniseal import train as module
from models.miniseal.embedder import Embedder
from models.miniseal.make_samples import MIN_PSNR_DB, Marker, cut_out, make_samples
from models.miniseal.pictures import HELD_OUT_PHOTOS, TRAINING_PHOTOS, TRAINING_SAMPLE_IMAGES, dead_leaves, photo, training_pictures
from models.miniseal.train import train
from shared.command.errors import ToolError
from shared.media.images import Pixels, image_files, read_pixels, stretch, to_image
from shared.metrics import metrics
from shared.networks.card import load_card
from shared.networks.checkpoint import open_checkpoint
from shared.watermark import WatermarkDetector
from shared.watermark.message import read_messages
from tests.conftest import REALDATA, ROOT, Miniseal
from tools.compare import compare
from tools.compare.gates import flat_gates

FOLDER = ROOT / "models" / "miniseal"
MESSAGES = FOLDER / "samples" / "messages.json"
LISTING = json.loads(MESSAGES.read_text())
FOUND, NOT_FOUND = 0.93, 0.9  # normalised correlation of a crop with the photo it comes from, and with any other


def test_it_is_small_enough_to_ship() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert (FOLDER / "checkpoint.safetensors").stat().st_size <= 3e6
    assert sum(path.stat().st_size for path in files) < 5e6


def test_the_checkpoint_has_the_full_layout() -> None:
    checkpoint = open_checkpoint(FOLDER / "checkpoint.safetensors")
    assert {key.partition(".")[0] for key in checkpoint.state} == {"detector", "embedder"}
    assert json.loads(checkpoint.notes["args"])["steps"] == module.STEPS
    detector = sum(tensor.numel() for key, tensor in checkpoint.state.items() if key.startswith("detector."))
    assert 3e5 <= detector <= 6e5


def test_there_are_enough_samples_and_they_belong_to_the_checkpoint() -> None:
    images = read_messages(MESSAGES)
    assert sum(image.message is not None for image in images) >= 16
    assert sum(image.message is None for image in images) >= 16
    assert all(read_pixels(image.file).shape == (256, 256, 3) for image in images)
    assert LISTING["checkpoint_sha256"] == hashlib.sha256((FOLDER / "checkpoint.safetensors").read_bytes()).hexdigest()


def test_every_marked_sample_keeps_its_quality() -> None:
    for image in read_messages(MESSAGES):
        if image.original is not None:
            psnr = metrics.psnr_db(to_image(read_pixels(image.original)), to_image(read_pixels(image.file)))
            assert MIN_PSNR_DB <= psnr < 45, image.file


def test_samples_are_what_make_samples_writes(tmp_path: Path) -> None:
    made = make_samples(FOLDER / "checkpoint.safetensors", output=tmp_path)
    assert made.ok
    assert json.loads(made.messages.read_text()) == LISTING
    for entry in LISTING["images"]:
        np.testing.assert_allclose(read_pixels(tmp_path / entry["file"]), read_pixels(MESSAGES.parent / entry["file"]), atol=1)
    with pytest.raises(ToolError, match="the folder is not empty"):
        make_samples(FOLDER / "checkpoint.safetensors", output=tmp_path)


def test_a_loud_watermark_fails_the_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Marker, "mark", lambda _, pixels, message: np.clip(pixels, 8, 200))
    made = make_samples(FOLDER / "checkpoint.safetensors", output=tmp_path)
    assert not made.ok
    assert made.lowest_psnr_db < MIN_PSNR_DB


def test_a_checkpoint_without_an_embedder_marks_nothing(tmp_path: Path) -> None:
    from tools.extract_weights import extract_weights

    extract_weights(FOLDER / "checkpoint.safetensors", model="miniseal", output=tmp_path / "detector.safetensors")
    with pytest.raises(ToolError, match="1 missing: patterns"):
        make_samples(tmp_path / "detector.safetensors", output=tmp_path / "samples")


def test_no_photo_is_both_learned_from_and_held_out() -> None:
    assert not {*TRAINING_PHOTOS, *TRAINING_SAMPLE_IMAGES} & set(HELD_OUT_PHOTOS)
    digests = [
        hashlib.sha256(photo(name).tobytes()).digest() for name in (*TRAINING_PHOTOS, *TRAINING_SAMPLE_IMAGES, *HELD_OUT_PHOTOS)
    ]
    assert len(set(digests)) == len(digests)


def largest_correlation(crop: Pixels, picture: Pixels) -> float:
    """Return how well a crop is found in a picture, at any scale training could have cut it out, mirrored or not."""
    patch = cv2.resize(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY), (64, 64), interpolation=cv2.INTER_AREA)
    patches = (patch, patch[:, ::-1].copy())
    gray = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    best = -1.0
    for share in np.geomspace(0.3, 1, 40):  # of the picture's shorter side
        scale = 64 / (share * min(gray.shape))
        small = cv2.resize(gray, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        if min(small.shape) >= 64:
            best = max(best, *(float(cv2.matchTemplate(small, one, cv2.TM_CCOEFF_NORMED).max()) for one in patches))
    return best


def test_no_sample_comes_from_a_picture_it_learned_from() -> None:
    """Each sample is its box of a held-out photo, is found there, and is found in no picture of training."""
    originals = [entry for entry in LISTING["images"] if entry["message"] is None]
    pictures = [photo(name) for name in (*TRAINING_PHOTOS, *TRAINING_SAMPLE_IMAGES)]
    for entry in originals:
        pixels = read_pixels(MESSAGES.parent / entry["file"])
        assert entry["source"] in HELD_OUT_PHOTOS
        np.testing.assert_array_equal(pixels, cut_out(photo(entry["source"]), tuple(entry["box"])))
        assert largest_correlation(pixels, photo(entry["source"])) > FOUND
        assert max(largest_correlation(pixels, picture) for picture in pictures) < NOT_FOUND
    assert {entry["original"] for entry in LISTING["images"] if entry["message"]} == {entry["file"] for entry in originals}


def test_it_keeps_its_gates_on_the_samples(miniseal: Miniseal) -> None:
    gates = load_card("miniseal").gates
    for precision, reference, candidate, card in (
        ("fp32", miniseal.checkpoint, miniseal.float_model, "miniseal"),
        ("int8", miniseal.float_model, miniseal.int8, None),
    ):
        limits = flat_gates(asdict(gates[precision]))
        gate = [f"{name}={limit}" for name, limit in limits.items() if limit is not None and name != "min_speedup"]
        found = compare(reference, [candidate], model=card, messages=MESSAGES, gate=gate)
        assert found.ok, found.message
        assert len(found.findings.candidates[0].gates) == len(gate)


@pytest.mark.realdata
def test_other_peoples_photos_carry_messages_too(miniseal: Miniseal) -> None:
    marker, rng = Marker(miniseal.checkpoint), np.random.default_rng(1)
    accuracies = []
    with WatermarkDetector(miniseal.checkpoint, card="miniseal") as torch, WatermarkDetector(miniseal.int8) as int8:
        for path in image_files(REALDATA / "images"):
            original = stretch(read_pixels(path), 256)
            for _ in range(4):
                message = rng.random(32) < 0.5
                marked = marker.mark(original, message)
                assert metrics.psnr_db(to_image(original), to_image(marked)) >= MIN_PSNR_DB
                accuracies += [[(detector.detect(marked).bits == message).mean() for detector in (torch, int8)]]
    assert len(accuracies) > 50
    assert (np.mean(accuracies, axis=0) >= 0.995).all()


def test_the_watermark_has_one_strength_and_tiles() -> None:
    import torch

    torch.manual_seed(0)
    message = torch.rand(2, 32) < 0.5
    watermark = Embedder(32)(message, 100)
    assert watermark.shape == (2, 1, 100, 100)
    torch.testing.assert_close(watermark[..., :32, :32], watermark[..., 32:64, 64:96])
    torch.testing.assert_close(watermark[..., :32, :32].square().mean(dim=(1, 2, 3)).sqrt(), torch.ones(2))
    assert (watermark[0] != watermark[1]).any()


def test_procedural_pictures_repeat_and_differ() -> None:
    one, again, other = (dead_leaves(np.random.default_rng([0, number])) for number in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).mean() > 0.5
    assert len(training_pictures(0)) > 100


def test_an_interrupted_training_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = train(steps=4, output=tmp_path / "whole.safetensors")
    stopped = train(steps=4, output=tmp_path / "parts.safetensors", stop_after=2)
    assert (stopped.steps, stopped.finished, (tmp_path / "parts.safetensors").exists()) == (2, False, False)
    with pytest.raises(ToolError, match="an interrupted run had other settings"):
        train(steps=5, output=tmp_path / "parts.safetensors")
    resumed = train(steps=4, output=tmp_path / "parts.safetensors")
    assert (whole.resumed_at, resumed.resumed_at, resumed.steps, resumed.finished) == (0, 2, 4, True)
    assert whole.checkpoint.read_bytes() == resumed.checkpoint.read_bytes()
    assert not list(tmp_path.glob("*_interrupted.pth"))
    with pytest.raises(ToolError, match="the output exists"):
        train(steps=4, output=tmp_path / "whole.safetensors")
    (tmp_path / "new_interrupted.pth").write_bytes(b"damaged")
    with pytest.raises(ToolError, match=r"the interrupted run is damaged.*--restart"):
        train(steps=1, output=tmp_path / "new.safetensors")
    assert train(steps=1, output=tmp_path / "new.safetensors", restart=True).finished
    with pytest.raises(ToolError, match="the output is a folder"):
        train(steps=1, output=tmp_path, overwrite=True)


def test_an_interrupted_training_with_a_part_missing_is_damaged(tmp_path: Path) -> None:
    import torch

    train(steps=2, output=tmp_path / "a.safetensors", stop_after=1)
    state = tmp_path / "a_interrupted.pth"
    torch.save({key: value for key, value in torch.load(state).items() if key != "optimizer"}, state)
    with pytest.raises(ToolError, match="the interrupted run is damaged"):
        train(steps=2, output=tmp_path / "a.safetensors")


@pytest.mark.slow
def test_training_learns_to_read_messages_in_a_minute(tmp_path: Path) -> None:
    trained = train(steps=300, output=tmp_path / "smoke.safetensors")
    assert trained.bit_accuracy > 0.7
    assert trained.confidence_loss < 0.5
    assert make_samples(trained.checkpoint, output=tmp_path / "samples").ok
