"""The embedder and its pipeline give the published images and videos, and each plausible mistake is seen."""

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from shared.command.errors import ToolError
from shared.media import attenuation
from shared.media.attenuation import heat_map
from shared.media.images import resize
from shared.networks import blocks
from shared.networks.card import load_card
from shared.networks.embedder import Embedder, build_embedder_on_meta, select_embedder
from shared.watermark.embedding import WatermarkEmbedder, to_pixels
from shared.watermark.message import parse_message, to_hex
from tests.conftest import DATA

Arrays = dict[str, NDArray[Any]]
KINDS = ("videoseal", "chunkyseal", "videoseal00")
RAW, IMAGES = 5e-5, 1e-6  # largest differences; wrong ones are at least 100 times as large
KEYS = {
    **json.loads((DATA / "checkpoint_keys.json").read_text()),
    **json.loads((DATA / "checkpoint_keys_videoseal00.json").read_text()),
}


class Published:
    """A small embedder of the published kind: its card, its checkpoint, and what the published code made."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.checkpoint = DATA / f"parity_embedder_{kind}_small.safetensors"
        with safe_open(self.checkpoint, framework="np") as file:
            self.made = {key.removeprefix("_parity."): file.get_tensor(key) for key in file.keys() if "_parity" in key}  # noqa: SIM118
            self._about = file.metadata()
        self.folder = folder

    def card(self, video_mode: str = "repeat", **changes: object) -> str:
        """Write a card, some fields of it changed; return its path."""
        about, network, video = self._about, json.loads(self._about["unet"]), json.loads(self._about["video"])
        fields: dict[str, object] = {
            "channels": network["in_channels"],
            "widths": [network["z_channels"] * factor for factor in network["z_channels_mults"]],
            "hidden": int(about["hidden_size"]),
            "norm": network["normalization"],
            "activation": network["activation"],
            "blocks": network["num_blocks"],
            "attenuation": "none" if about["attenuation"] == "None" else "jnd",
            "scaling": float(about["scaling_w"]),
            "step_size": video["step_size"],
            "chunk_size": video["chunk_size"],
            "video_mode": video_mode,
            **changes,
        }
        lines = [f"{name} = {json.dumps(value)}" for name, value in fields.items()]
        start = f'title = "Small"\nnbits = {about["nbits"]}\nimage_size = {about["image_size"]}\noutput_prefix = "small"\n'
        encoder = "depths = [1, 1, 1, 1]\ndims = [8, 8, 8, 8]\nstem_stride = 4\n"
        end = '[checkpoint]\nurl = "https://example.org/small.pth"\n'
        path = self.folder / f"{video_mode}.toml"
        tables = "[embedder]\n" + "\n".join(lines[:6]) + "\n[pipeline]\n" + "\n".join(lines[6:]) + "\n"
        path.write_text(start + encoder + tables + end)
        return str(path)

    def open(self, video_mode: str = "repeat", **options: Any) -> WatermarkEmbedder:
        return WatermarkEmbedder(self.checkpoint, card=self.card(video_mode), threads=1, **options)


@pytest.fixture(params=KINDS)
def published(request: pytest.FixtureRequest, tmp_path: Path) -> Published:
    return Published(request.param, tmp_path)


def marked(embedder: WatermarkEmbedder, images: NDArray[Any], messages: NDArray[Any]) -> NDArray[Any]:
    pairs = zip(np.split(images, len(images)), messages, strict=True)
    return np.concatenate([embedder.embed_float(image, message) for image, message in pairs])


def difference(one: NDArray[Any], other: NDArray[Any]) -> float:
    return float(np.abs(one - other).max())


def test_images_are_those_of_the_published_pipeline(published: Published) -> None:
    made = published.made
    with published.open() as embedder:
        raw = [embedder.residual(image[np.newaxis], bits) for image, bits in zip(made["image"], made["message"], strict=True)]
        assert difference(np.concatenate(raw), made["raw"]) < RAW
        assert difference(marked(embedder, made["image"], made["message"]), made["output"]) < IMAGES
        small = resize(made["image"], *made["output_small"].shape[2:])
        assert difference(marked(embedder, small, made["message"]), made["output_small"]) < IMAGES
    if "output_lowres" in made:
        with published.open(attenuates_small=True) as embedder:
            assert difference(marked(embedder, made["image"], made["message"]), made["output_lowres"]) < IMAGES
        assert difference(made["output_lowres"], made["output"]) > 100 * IMAGES


@pytest.mark.parametrize("video_mode", ["repeat", "alternate", "interpolate"])
def test_videos_are_those_of_the_published_pipeline(published: Published, video_mode: str) -> None:
    frames, expected = published.made["video"], published.made[f"video_output_{video_mode}"]
    with published.open(video_mode) as embedder:
        found = embedder.embed_frames_float(np.split(frames, len(frames)), published.made["video_message"][0])
        assert difference(np.concatenate(list(found)), expected) < IMAGES


@pytest.mark.parametrize("kind", ["tflite", "onnx"])
def test_converted_networks_give_the_same_images(kind: str, tmp_path: Path) -> None:
    """Converted by the libraries alone, with a message other than those that it marks with."""
    import litert_torch

    published = Published("videoseal", tmp_path)
    network, made, message = network_of(published)
    example = (made["network_input"][:1], torch.zeros_like(message[:1]))
    path = tmp_path / f"embedder.{kind}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch of itself
        if kind == "tflite":
            litert_torch.convert(network, example).export(str(path))
        else:
            torch.onnx.export(network, example, str(path), dynamo=True, external_data=False, verbose=False)
    with WatermarkEmbedder(path, card=published.card(), threads=1) as embedder:
        assert difference(marked(embedder, published.made["image"], published.made["message"]), published.made["output"]) < IMAGES


def test_frames_of_a_chunk_are_read_as_they_are_needed(tmp_path: Path) -> None:
    published = Published("chunkyseal", tmp_path)
    read = 0

    def frames() -> Iterator[NDArray[np.uint8]]:
        nonlocal read
        for frame in published.made["video"]:
            read += 1
            yield to_pixels(frame[np.newaxis])

    with published.open() as embedder:
        made = embedder.embed_frames(frames(), published.made["video_message"][0])
        assert (next(made).shape, read) == ((32, 48, 3), 4)  # a key frame, the next one, and a frame after each
        assert len([*made]) == len(published.made["video"]) - 1


def test_keys_and_shapes_of_every_card_are_the_published_ones() -> None:
    for card, name in {
        "videoseal": "videoseal_1.0",
        "pixelseal": "pixelseal",
        "chunkyseal": "chunkyseal",
        "videoseal_0.0": "videoseal_0.0",
    }.items():
        state = build_embedder_on_meta(load_card(card)).state_dict()
        shapes = {f"embedder.{key}": list(value.shape) for key, value in state.items()}
        expected = dict(KEYS[name]["embedder"])
        assert (
            expected.pop("embedder.msg_processor.msg_embeddings.weight")
            == shapes["embedder.unet.msg_processor.msg_embeddings.weight"]
        )
        assert shapes == expected


# Mistakes.


def network_of(published: Published) -> tuple[Embedder, dict[str, torch.Tensor], torch.Tensor]:
    network = build_embedder_on_meta(load_card(published.card()))
    with safe_open(published.checkpoint, framework="pt") as file:
        state = select_embedder({key: file.get_tensor(key) for key in file.keys()}, published.checkpoint)  # noqa: SIM118
        made = {key.removeprefix("_parity."): file.get_tensor(key) for key in file.keys() if "_parity" in key}  # noqa: SIM118
    network.load_state_dict(state, assign=True)
    return network, made, made["message"].float()


def align_corners(network: Embedder) -> None:
    for module in network.modules():
        if isinstance(module, nn.Upsample):
            module.align_corners = True


def nearest(network: Embedder) -> None:
    for module in network.modules():
        if isinstance(module, nn.Upsample):
            module.mode, module.align_corners = "nearest", None


def zero_padding(network: Embedder) -> None:
    for module in network.modules():
        if isinstance(module, blocks.UpscalingBlock):
            module.upsample_block[1] = nn.ZeroPad2d(1)


@pytest.mark.parametrize("mistake", [align_corners, nearest, zero_padding])
def test_a_mistake_in_the_network_is_seen(published: Published, mistake: Callable[[Embedder], None]) -> None:
    network, made, message = network_of(published)
    mistake(network)
    with torch.inference_mode():
        assert (network(made["network_input"], message) - made["raw"]).abs().max() > 100 * RAW


def test_other_inputs_and_messages_are_seen(published: Published) -> None:
    network, made, message = network_of(published)
    image = made["network_input"]
    with torch.inference_mode():
        for picture, bits in ((image, message.flip(1)), (image, 1 - message), (image * 2 - 1, message), ((image + 1) / 2, message)):
            assert (network(picture, bits) - made["raw"]).abs().max() > 100 * RAW


def test_an_unscaled_skip_and_another_epsilon_are_seen(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    from shared.networks import embedder

    for module, name, value in ((embedder, "SKIP_SCALE", 1.0), (blocks, "EPSILON", 1e-2)):
        network, made, message = network_of(published)
        with monkeypatch.context() as patch, torch.inference_mode():
            patch.setattr(module, name, value)
            assert (network(made["network_input"], message) - made["raw"]).abs().max() > 10 * RAW


@pytest.mark.parametrize(
    ("name", "value"),
    [("OVERLAP", 0.0), ("DARK", 16.0), ("BRIGHT_LEAST", 0.0), ("POWER", 2.0), ("LUMA", (0.114, 0.587, 0.299)), ("HALF", 20.0)],
)
def test_another_attenuation_is_seen(name: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Published("videoseal", tmp_path).made
    assert difference(heat_map(made["image"]), made["heatmap"]) < IMAGES
    monkeypatch.setattr(attenuation, name, value)
    assert difference(heat_map(made["image"]), made["heatmap"]) > 10 * IMAGES


# What users give.


def test_files_arrays_and_messages_in_every_form(tmp_path: Path) -> None:
    published = Published("videoseal", tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    with published.open() as embedder:
        whole = embedder.embed(pixels, "0123cdef")
        assert (whole.dtype, whole.shape) == (np.uint8, pixels.shape)
        assert 0 < np.abs(whole.astype(int) - pixels).max() < 40
        for image, message in ((tmp_path / "photo.png", 0x0123CDEF), (pixels / 255, f"{0x0123CDEF:032b}")):
            np.testing.assert_array_equal(embedder.embed(image, message), whole)
        (again,) = embedder.embed_batch([pixels], "0123cdef")
        np.testing.assert_array_equal(again, whole)
        assert np.abs(embedder.embed(pixels, "0123cdee").astype(int) - whole).max() > 0


def test_text_is_a_message_of_its_bytes_unless_it_looks_like_digits() -> None:
    assert to_hex(parse_message("Käse!", 48)) == "4bc3a4736521"
    assert to_hex(parse_message("0xyz", 32)) == b"0xyz".hex()
    with pytest.raises(ToolError, match="expected 8 hexadecimal digits; if it is text, give its 8 hexadecimal digits: 63616665"):
        parse_message("cafe", 32)


@pytest.mark.parametrize("message", ["0123", "012g4567", 2**32, [0.5] * 32, [1] * 31])
def test_a_message_of_another_length_or_of_no_bits_is_refused(message: Any, tmp_path: Path) -> None:
    with Published("videoseal", tmp_path).open() as embedder, pytest.raises(ToolError, match="not a message of 32 bits"):
        embedder.embed(np.zeros((32, 32, 3), np.uint8), message)


def changed(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    with safe_open(DATA / "parity_embedder_videoseal_small.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys() if "_parity" not in key}  # noqa: SIM118
    change(tensors)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda t: t.update({"embedder.msg_processor.msg_embeddings.weight": torch.zeros(64, 32)}),
            "message tables of the checkpoint differ",
        ),
        (lambda t: [t.pop(key) for key in list(t) if key.startswith("embedder.")], "holds no embedder"),
        (lambda t: t.pop("embedder.unet.outc.bias"), "1 missing: unet.outc.bias"),
    ],
)
def test_a_checkpoint_without_a_whole_embedder_is_refused(change: Callable[..., None], says: str, tmp_path: Path) -> None:
    path = changed(tmp_path / "broken.safetensors", change)
    with pytest.raises(ToolError, match=says):
        WatermarkEmbedder(path, card=Published("videoseal", tmp_path).card())


def test_one_message_table_is_enough(tmp_path: Path) -> None:
    published = Published("videoseal", tmp_path)
    path = changed(tmp_path / "one.safetensors", lambda t: t.pop("embedder.unet.msg_processor.msg_embeddings.weight", None))
    with WatermarkEmbedder(path, card=published.card(), threads=1) as embedder:
        assert difference(marked(embedder, published.made["image"], published.made["message"]), published.made["output"]) < IMAGES


def test_cards_without_an_embedder_and_models_that_are_none_are_refused(tmp_path: Path, float_model: Path) -> None:
    published = Published("videoseal", tmp_path)
    with pytest.raises(ToolError, match="this model's card has no embedder"):
        WatermarkEmbedder(published.checkpoint, card="miniseal")
    with pytest.raises(ToolError, match="no embedder of this card"):
        WatermarkEmbedder(float_model, card=published.card())
    with published.open() as embedder, pytest.raises(ToolError, match="a batch is a list of images"):
        embedder.embed_batch("photo.png", 1)  # type: ignore[arg-type]
