"""mark writes what the published pipeline makes, as PNG files, and lists the messages; what can't be is one line."""

import hashlib
import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.command.errors import ToolError
from shared.media.images import read_pixels
from shared.watermark import WatermarkEmbedder
from shared.watermark.embedding import to_pixels
from shared.watermark.message import read_messages, to_hex
from tests.conftest import Run
from tests.shared.media.test_transcode import FRAMES, pictures, read_film, write_film
from tests.shared.watermark.test_embedding import Published
from tools import mark as module
from tools.mark import mark


@pytest.fixture
def published(tmp_path: Path) -> Published:
    return Published("videoseal", tmp_path)


@pytest.fixture
def photos(published: Published, tmp_path: Path) -> Path:
    """A folder of three images, of which two have the same name but for the ending, and one is a folder deeper."""
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    for name, image in zip(("a.png", "a.bmp", "deeper/b.png"), published.made["image"][[0, 1, 0]], strict=True):
        Image.fromarray(to_pixels(image[np.newaxis])).save(folder / name)
    return folder


def test_an_image_is_that_of_the_published_pipeline(published: Published, tmp_path: Path) -> None:
    original, output, bits = tmp_path / "original.png", tmp_path / "marked.png", published.made["message"][0] > 0
    Image.fromarray(to_pixels(published.made["image"][:1])).save(original)
    made = mark(original, output=output, embedder=published.checkpoint, card=published.card(), message=to_hex(bits))
    with published.open() as embedder:
        expected = embedder.embed(original, bits)
    with Image.open(output) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        np.testing.assert_array_equal(np.asarray(image), expected)
    assert np.abs(expected - published.made["output"][0].transpose(1, 2, 0) * 255).max() < 2  # the original is rounded too
    error = np.mean((expected - read_pixels(original).astype(float)) ** 2)
    assert made.images[0].psnr_db == pytest.approx(10 * np.log10(255**2 / error))
    again = mark(original, output=output, embedder=published.checkpoint, card=published.card(), message=to_hex(bits))
    assert again.product.up_to_date
    assert again.images == made.images


def test_a_folder_is_marked_and_its_messages_are_listed(published: Published, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "marked"
    made = mark(photos, output=output, embedder=published.checkpoint, card=published.card(), seed=3)
    listed = read_messages(output / "messages.json")
    digits = [hashlib.sha256(image.message.encode()).hexdigest()[:8] for image in made.images]
    names = [f"{stem}-{end}.png" for stem, end in zip(("a", "a", "deeper_b"), digits, strict=True)]
    assert [image.file for image in made.images] == names
    assert sorted(path.name for path in output.glob("*.png")) == sorted(names)
    assert [str(image.file.relative_to(output)) for image in listed] == [image.file for image in made.images]
    assert len({image.message for image in made.images}) == 3
    with published.open() as embedder:
        for image, entry in zip(made.images, listed, strict=True):
            assert entry.message is not None
            assert to_hex(entry.message) == image.message
            np.testing.assert_array_equal(read_pixels(entry.file), embedder.embed(photos / image.original, entry.message))
    options = {"embedder": published.checkpoint, "card": published.card(), "refresh": True}
    assert mark(photos, output=output, seed=3, **options).product.up_to_date
    (output / names[1]).unlink()
    assert mark(photos, output=output, seed=3, **options).images == made.images
    assert (output / names[1]).exists()
    others = {image.file for image in mark(photos, output=output, seed=4, **options).images}
    assert {path.name for path in output.glob("*.png")} == others
    assert not others & set(names)
    one = mark(photos, output=tmp_path / "alike", message=made.images[0].message, **options).images
    assert [image.file.partition("-")[0] for image in one] == ["a", "a~2", "deeper_b"]


def test_a_run_that_stops_leaves_a_right_list(
    published: Published, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at its second image, a run that replaces others leaves them and their list; a failed one leaves nothing new."""
    output, options = tmp_path / "marked", {"embedder": published.checkpoint, "card": published.card(), "refresh": True}
    before = mark(photos, output=output, seed=1, **options)
    content = {path.name: path.read_bytes() for path in output.iterdir()}
    write, calls = module.write_whole, iter(range(9))

    def failing(path: Path, data: bytes) -> None:
        if next(calls) == 1:
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(module, "write_whole", failing)
    with pytest.raises(OSError, match="No space"):
        mark(photos, output=output, seed=2, **options)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == content
    monkeypatch.undo()
    monkeypatch.setattr(module, "_removed_on_failure", nullcontext)  # as if killed
    calls = iter(range(9))
    monkeypatch.setattr(module, "write_whole", failing)
    with pytest.raises(OSError, match="No space"):
        mark(photos, output=output, seed=2, **options)
    assert [to_hex(entry.message) for entry in read_messages(output / "messages.json") if entry.message is not None] == [
        image.message for image in before.images
    ]
    assert {path.name: path.read_bytes() for path in output.iterdir() if path.name in content} == content


def test_what_cannot_be_marked_is_one_line(published: Published, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "a.png").write_bytes(b"mine")
    one, card = photos / "a.png", published.card()
    for source, output, message, reason in (
        (one, "a.jpg", "random", "must be a PNG file"),
        (one, "a.png", "1f", "not a message of"),
        (tmp_path / "text.png", "a.png", "random", "unreadable image"),
        (tmp_path / "absent.png", "a.png", "random", "no such"),
        (tmp_path / "empty", "marked", "random", "no image"),
        (photos, "others", "random", "holds other files"),
        (photos, "photos/marked", "random", "in the folder of the originals"),
    ):
        with pytest.raises(ToolError, match=reason):
            mark(source, output=tmp_path / output, embedder=published.checkpoint, card=card, message=message)
    assert not (tmp_path / "a.png").exists()
    assert not (tmp_path / "marked").exists()
    assert (tmp_path / "others" / "a.png").read_bytes() == b"mine"
    with pytest.raises(ToolError, match="has no embedder"):
        mark(one, output=tmp_path / "a.png", embedder=published.checkpoint, card="miniseal")


def test_the_command_says_what_it_wrote(published: Published, photos: Path, tmp_path: Path, run_tool: Run) -> None:
    options = ("-o", tmp_path / "marked", "--embedder", published.checkpoint, "--card", published.card())
    text = run_tool("mark", photos, *options)
    assert text.returncode == 0, text.stderr
    assert "3 images written, values rounded to 8 bits, PSNR at least" in text.stdout
    found = run_tool("mark", photos, *options, "--json")
    images = json.loads(found.stdout)["images"]
    assert [image["original"] for image in images] == ["a.bmp", "a.png", "deeper/b.png"]
    assert all(30 < image["psnr_db"] < 100 for image in images)


def test_a_video_is_marked_frame_by_frame_and_keeps_its_sound(published: Published, tmp_path: Path) -> None:
    film, output = write_film(tmp_path / "film.mp4", pictures()), tmp_path / "marked.mp4"
    options = {"output": output, "embedder": published.checkpoint, "card": published.card(), "message": "text", "crf": 1}
    made = mark(film, **options)  # type: ignore[arg-type]
    assert (made.images[0].message, made.images[0].frames) == (b"text".hex(), FRAMES)
    before, after = read_film(film), read_film(output)
    assert before[1:] == after[1:]
    with WatermarkEmbedder(published.checkpoint, card=published.card()) as embedder:
        expected = [*embedder.embed_frames(before[0], "text")]
    changes = [np.subtract(frames, before[0], dtype=float).ravel() for frames in (expected, after[0])]
    assert np.corrcoef(*changes)[0, 1] > 0.25  # most changes are of one level, as are the encoder's own
    assert mark(film, **options).product.up_to_date  # type: ignore[arg-type]


@pytest.mark.parametrize("fault", ["no_frames", "ending", "message"])
def test_a_video_that_cannot_be_marked_is_one_line_and_nothing_is_written(
    fault: str, published: Published, tmp_path: Path, run_tool: Run
) -> None:
    film, output = write_film(tmp_path / "film.mp4", pictures()[:2]), tmp_path / "out" / ("m.gif" if fault == "ending" else "m.mp4")
    output.parent.mkdir()
    if fault == "no_frames":
        film.write_bytes(film.read_bytes()[:200])
    message = "abc" if fault == "message" else "random"
    arguments = ("--embedder", published.checkpoint, "--card", published.card(), "--message", message)
    done = run_tool("mark", film, "-o", output, *arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert not list(output.parent.iterdir())
