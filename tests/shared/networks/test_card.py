"""A good card loads; a bad card is an error that names its wrong fields."""

from pathlib import Path

import pytest

from shared.command.errors import ToolError
from shared.networks.card import card_names, load_card
from tests.conftest import VIT_CARD, write_card


def test_every_shipped_card_loads_and_has_gates_for_its_recipes() -> None:
    assert card_names() == ["chunkyseal", "miniseal", "pixelseal", "videoseal", "videoseal_0.0"]
    for name in card_names():
        assert {"int8", "fp16"} <= load_card(name).gates.keys()


@pytest.mark.parametrize(("name", "near"), [("chunkysea", "chunkyseal"), ("VideoSeal", "videoseal"), ("pixel-seal", "pixelseal")])
def test_an_unknown_model_gets_the_nearest_name(name: str, near: str) -> None:
    with pytest.raises(ToolError, match=f"did you mean {near}"):
        load_card(name)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("nbits", 0),
        ("nbits", "many"),
        ("depths", [1, 1, 1]),
        ("dims", [16, 32, 48, -1]),
        ("stem_stride", 3),
        ("image_size", 8),
        ("nbits", True),
        ("nbits", 32.0),
        ("nbits", "32"),
        ("dims", [2**62, 1, 1, 1]),
    ],
)
def test_a_bad_field_is_named_with_its_file(tmp_path: Path, field: str, value: object) -> None:
    card = write_card(tmp_path / "bad.toml", **{field: value})
    with pytest.raises(ToolError, match=rf"bad\.toml.*{field}"):
        load_card(str(card))


def test_all_bad_fields_are_named_together(tmp_path: Path) -> None:
    card = write_card(tmp_path / "bad.toml", nbits=0, stem_stride=5)
    with pytest.raises(ToolError, match=r"nbits.*stem_stride"):
        load_card(str(card))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("[vit]", "stem_stride = 4\n[vit]"),
        ("window = 4", "window = 3"),
        ("heads = 3", "heads = 5"),
        ("window = 4", "window = 0"),
        ("window = 4\n", ""),
    ],
)
def test_a_bad_table_of_a_transformer_is_an_error(tmp_path: Path, change: str, says: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(VIT_CARD)
    load_card(str(path))
    path.write_text(VIT_CARD.replace(change, says))
    with pytest.raises(ToolError, match="bad model card"):
        load_card(str(path))


def test_a_card_without_any_encoder_is_an_error(tmp_path: Path) -> None:
    start, _, rest = VIT_CARD.partition("[vit]")
    (tmp_path / "bad.toml").write_text(start + "[checkpoint]" + rest.partition("[checkpoint]")[2])
    with pytest.raises(ToolError, match=r"give depths, dims and stem_stride, or else a table \[vit\]"):
        load_card(str(tmp_path / "bad.toml"))


def test_a_missing_card_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="no such model card"):
        load_card(str(tmp_path / "absent.toml"))


def test_a_checkpoint_is_found_in_the_projects_folder_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    card = load_card("videoseal")
    places = card.checkpoint_places()
    assert places[0] == Path("models/checkpoints/videoseal.pth")
    assert any(place.parent == Path.home() / ".cache" / "videoseal" for place in places)
    published = Path("models/checkpoints/y_256b_img.pth")
    assert published in places
    published.parent.mkdir(parents=True)
    published.touch()
    assert card.find_checkpoint() == published


def test_a_file_name_shared_by_several_models_is_ignored() -> None:
    assert not any(
        place.name == "checkpoint.pth" and place.parent.name == "videoseal" for place in load_card("pixelseal").checkpoint_places()
    )


@pytest.mark.parametrize("url", ["ftp://host/file", "https://host", "https://host/", "https://hôst/file", "https://host/a b"])
def test_an_impossible_address_is_refused(tmp_path: Path, url: str) -> None:
    card = write_card(tmp_path / "bad.toml")
    card.write_text(card.read_text().replace("https://example.org/small.pth", url))
    with pytest.raises(ToolError, match=r"checkpoint\.url"):
        load_card(str(card))


def test_a_checkpoint_may_lie_in_the_folder_of_its_card(tmp_path: Path) -> None:
    path = write_card(tmp_path / "own.toml")
    path.write_text(path.read_text().replace('url = "https://example.org/small.pth"', 'file = "weights/own.pth"'))
    card = load_card(str(path))
    assert card.checkpoint_places() == [tmp_path / "weights" / "own.pth"]
    assert card.find_checkpoint() is None
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "own.pth").touch()
    assert card.find_checkpoint() == tmp_path / "weights" / "own.pth"
    assert load_card("miniseal").find_checkpoint() is not None


@pytest.mark.parametrize(
    "lines",
    ["", 'url = "https://example.org/a.pth"\nfile = "a.pth"', 'file = "../a.pth"', 'file = "a/../../b.pth"', 'file = "/a.pth"'],
)
def test_a_card_names_either_an_address_or_a_file(tmp_path: Path, lines: str) -> None:
    path = write_card(tmp_path / "bad.toml")
    path.write_text(path.read_text().replace('url = "https://example.org/small.pth"', lines))
    with pytest.raises(ToolError, match="checkpoint"):
        load_card(str(path))
