"""A component is extracted from a full checkpoint, whole and unchanged."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.command.dry_run import DryRun
from shared.command.errors import ToolError
from shared.networks.card import PRODUCTS, load_card
from shared.networks.checkpoint import open_checkpoint
from tests.conftest import ROOT, Small, write_card
from tools.extract_weights import extract_weights
from tools.extract_weights.command import Component


@pytest.fixture
def full(videoseal_small: Small, tmp_path: Path) -> Path:
    """A training checkpoint with the parts of the published checkpoints: detector, embedder, buffers, optimizer, args."""
    detector = {key: value for key, value in load_file(videoseal_small.checkpoint).items() if key.startswith("detector.")}
    embedder = {"embedder.unet.w": torch.randn(4, 4), "embedder.bn.num_batches_tracked": torch.tensor(7)}
    content = {
        "epoch": 3,
        "model": {**embedder, **detector, "attenuation.conv.weight": torch.ones(1), "rgb2yuv.M": torch.eye(3)},
        "discriminator": {"w": torch.ones(8)},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(100)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "args": "nbits: 32\n",
    }
    torch.save(content, tmp_path / "checkpoint.pth")
    return tmp_path / "checkpoint.pth"


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_the_detector_comes_out_tensor_by_tensor(full: Path, videoseal_small: Small, suffix: str) -> None:
    result = extract_weights(full, model=str(videoseal_small.card), output=full.with_name(f"detector{suffix}"))
    assert result.product is not None
    path = result.product.path
    copy = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)["model"]
    original = torch.load(full, weights_only=True)["model"]
    assert sorted(copy) == sorted(key for key in original if key.startswith("detector."))
    assert all(torch.equal(copy[key], original[key]) for key in copy)


def test_kept_and_dropped_groups_are_reported(full: Path) -> None:
    result = extract_weights(full)
    assert result.contents is not None
    assert [(group.name, group.tensors) for group in result.contents.kept] == [("detector", 71)]
    dropped = {group.name: group.size_bytes for group in result.contents.dropped}
    assert dropped["optimizer"] == 400
    assert {"embedder", "attenuation", "rgb2yuv", "discriminator"} <= dropped.keys()
    assert result.product is not None
    assert result.product.path == full.with_name("checkpoint_detector.safetensors")


def test_the_embedder_keeps_its_integer_buffers(full: Path) -> None:
    result = extract_weights(full, component=Component.EMBEDDER)
    assert result.product is not None
    assert load_file(result.product.path)["embedder.bn.num_batches_tracked"].item() == 7


def test_any_prefix_can_be_taken_out(full: Path) -> None:
    result = extract_weights(full, prefix="rgb2yuv.", output=full.with_name("yuv.safetensors"))
    assert result.product is not None
    assert set(load_file(result.product.path)) == {"rgb2yuv.M"}
    with pytest.raises(ToolError, match=r"no key starts with 'vae\.'"):
        extract_weights(full, prefix="vae.", output=full.with_name("vae.safetensors"))


def test_a_detector_of_a_known_card_is_recognised(full: Path, monkeypatch: pytest.MonkeyPatch, videoseal_small: Small) -> None:
    monkeypatch.setattr("shared.networks.card.CARDS", videoseal_small.card.parent)
    result = extract_weights(full)
    assert result.contents is not None
    assert result.contents.card == "videoseal_small"


def test_the_second_time_it_is_up_to_date(full: Path) -> None:
    extract_weights(full)
    again = extract_weights(full)
    assert again.product is not None
    assert again.product.up_to_date
    assert again.message.startswith("up to date")


def test_all_wrong_keys_are_named(full: Path) -> None:
    content = torch.load(full, weights_only=True)
    state = content["model"]
    del state["detector.convnext.stages.0.0.norm.bias"]
    state["detector.extra"] = torch.ones(1)
    state["detector.pixel_decoder.linear.bias"] = torch.ones(9)
    torch.save(content, full)
    with pytest.raises(
        ToolError, match=r"1 missing: detector.convnext.stages.0.0.norm.bias; 1 unexpected: detector.extra; .*linear.bias \(9,\)"
    ):
        extract_weights(full, model=str(_card(full)))
    assert not full.with_name("checkpoint_detector.safetensors").exists()


def _card(full: Path) -> Path:
    return write_card(full.with_name("small.toml"))


def test_a_component_that_may_be_missing_leaves_nothing_of_another_checkpoint(full: Path) -> None:
    """A recipe would else mark photos with the embedder of the checkpoint before."""
    output = full.with_name("embedder.safetensors")
    arguments: dict[str, Any] = {"component": Component.EMBEDDER, "output": output, "refresh": True}
    found = extract_weights(full, allow_missing=True, **arguments)
    assert found.product is not None
    content = torch.load(full, weights_only=True)
    content["model"] = {key: value for key, value in content["model"].items() if key.startswith("detector.")}
    torch.save(content, full)
    with pytest.raises(ToolError, match=r"no key starts with 'embedder\.'"):
        extract_weights(full, **arguments)
    assert output.exists()
    missing = extract_weights(full, allow_missing=True, **arguments)
    assert missing.product is None
    assert "nothing extracted" in missing.message
    assert {path.name for path in full.parent.iterdir()} == {"checkpoint.pth"}


def test_an_embedders_checkpoint_lacks_the_detector_and_a_bare_one_is_taken(full: Path) -> None:
    content = torch.load(full, weights_only=True)["model"]
    embedder = {key: value for key, value in content.items() if key.startswith("embedder.")}
    torch.save({"model": embedder}, full)
    missing = extract_weights(full, model=str(_card(full)), allow_missing=True, output=full.with_name("d.safetensors"))
    assert missing.product is None
    torch.save({key.removeprefix("embedder."): value for key, value in embedder.items()}, full)
    found = extract_weights(full, component=Component.EMBEDDER, output=full.with_name("e.safetensors"))
    assert found.product is not None
    assert load_file(found.product.path).keys() == embedder.keys()


def test_nan_is_refused_and_nothing_written(full: Path) -> None:
    content = torch.load(full, weights_only=True)
    content["model"]["detector.pixel_decoder.linear.bias"][0] = float("nan")
    torch.save(content, full)
    with pytest.raises(ToolError, match=r"linear\.bias holds 1 NaN"):
        extract_weights(full)
    assert {path.name for path in full.parent.iterdir()} == {"checkpoint.pth"}


def test_tied_and_transposed_tensors_are_written(tmp_path: Path) -> None:
    weights = torch.randn(2, 3)
    state = {"detector.a": weights, "detector.tied": weights, "detector.turned": weights.t()}
    torch.save(state, tmp_path / "c.pth")
    result = extract_weights(tmp_path / "c.pth")
    assert result.product is not None
    copy = load_file(result.product.path)
    assert copy.keys() == state.keys()
    assert all(torch.equal(copy[key], state[key]) for key in state)


def test_a_checkpoint_is_found_by_its_model(full: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shared.networks.card.CHECKPOINT_FOLDERS", (tmp_path / "here",))
    card = str(_card(full))
    missing = extract_weights(model=card, allow_missing=True)
    assert (missing.product, missing.checkpoint) == (None, None)
    assert "nothing extracted" in missing.message
    with pytest.raises(ToolError, match=r"no checkpoint of Small found.*--download"):
        extract_weights(model=card)
    assert not (tmp_path / PRODUCTS).exists()
    (tmp_path / "here").mkdir()
    full.rename(tmp_path / "here" / "small.pth")
    found = extract_weights(model=card)
    assert found.checkpoint == tmp_path / "here" / "small.pth"
    assert str(found.checkpoint) in found.message
    assert found.product is not None
    assert found.product.path == PRODUCTS / "small_detector.safetensors"
    (tmp_path / "here" / "small.pth").unlink()
    assert "extracted earlier" in extract_weights(model=card, allow_missing=True).message


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"checkpoint": None}, "nothing to extract from; expected a CHECKPOINT file, or --model"),
        ({"checkpoint": Path("absent.pth")}, "no such checkpoint file"),
        ({"model": "videosea"}, "unknown model 'videosea'.*did you mean videoseal"),
        ({"output": Path("out.bin")}, r"unknown output format; got \.bin; expected \.safetensors or \.pth"),
        ({"output": Path("out")}, "unknown output format; got no suffix"),
        ({"sha256": "0" * 64}, "--sha256 is 64 hexadecimal digits, and goes with --download"),
        ({"sha256": "short", "download": True}, "--sha256 is 64 hexadecimal digits, and goes with --download"),
    ],
)
def test_wrong_options_are_errors_of_a_single_line_and_nothing_is_written(
    full: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], reason: str
) -> None:
    monkeypatch.chdir(full.parent)
    with pytest.raises(ToolError, match=reason) as caught:
        extract_weights(**{"checkpoint": full, **options})
    assert ("\n" in str(caught.value), caught.value.exit_code) == (False, 2)
    assert [path.name for path in full.parent.iterdir()] == [full.name]


def test_the_default_name_goes_into_a_new_output_folder(full: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out"
    with pytest.raises(DryRun):
        extract_weights(full, output_dir=folder, dry_run=True)
    assert not folder.parent.exists()
    result = extract_weights(full, output_dir=folder)
    assert result.product is not None
    assert result.product.path == folder / "checkpoint_detector.safetensors"
    again = extract_weights(full, output_dir=folder)
    assert again.product is not None
    assert again.product.up_to_date
    monkeypatch.setattr("shared.networks.card.CHECKPOINT_FOLDERS", (tmp_path,))
    full.rename(tmp_path / "small.pth")
    found = extract_weights(model=str(_card(full)), output_dir=folder, prefix="rgb2yuv.")
    assert found.product is not None
    assert found.product.path == folder / "small_rgb2yuv.safetensors"


def test_a_failed_run_leaves_no_output_folder(full: Path, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match=r"no key starts with 'vae\.'"):
        extract_weights(full, output_dir=tmp_path / "out", prefix="vae.")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ToolError, match="cannot write here"):
            extract_weights(full, output_dir=folder)


def test_output_and_output_dir_exclude_each_other(full: Path, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="--output and --output-dir"):
        extract_weights(full, output=tmp_path / "out.pth", output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads RssAnon")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """600 MB of detector in 1 GB of checkpoint take less than 100 MB more than a tiny checkpoint."""
    peaks = []
    for rows in (1, 1500):
        save = {f"detector.{i}": torch.zeros(rows, 10_000) for i in range(10)}
        torch.save({"model": {**save, "embedder.x": torch.zeros(rows, 30_000)}}, tmp_path / f"{rows}.pth")
        del save
        script = f"""
            import threading, time
            from pathlib import Path
            peak = 0
            def watch():
                global peak
                while True:
                    rows = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("RssAnon"))
                    peak = max(peak, int(rows["RssAnon"].split()[0]))
                    time.sleep(0.005)
            threading.Thread(target=watch, daemon=True).start()
            from tools.extract_weights import extract_weights
            extract_weights(Path("{tmp_path}/{rows}.pth"), output=Path("{tmp_path}/{rows}.safetensors"))
            print(peak)
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        peaks.append(int(done.stdout) * 1024)
    assert peaks[1] - peaks[0] < 100e6


def test_a_safetensors_checkpoint_works_as_well(videoseal_small: Small, tmp_path: Path) -> None:
    save_file({**load_file(videoseal_small.checkpoint), "embedder.x": torch.ones(1)}, tmp_path / "c.safetensors")
    result = extract_weights(tmp_path / "c.safetensors", model=str(videoseal_small.card))
    assert result.product is not None
    assert all(key.startswith("detector.") for key in load_file(result.product.path))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_note_of_a_rehearsal_is_kept(tmp_path: Path, suffix: str) -> None:
    save_file({"detector.a": torch.ones(1)}, tmp_path / "c.safetensors", metadata={"rehearsal": "seed 0"})
    result = extract_weights(tmp_path / "c.safetensors", output=tmp_path / f"out{suffix}")
    assert result.product is not None
    assert open_checkpoint(result.product.path).notes == {"rehearsal": "seed 0"}


def test_a_changed_container_in_the_card_makes_the_product_stale(tmp_path: Path) -> None:
    torch.save({"model": {"detector.a": torch.zeros(1)}, "ema": {"detector.a": torch.ones(1)}}, tmp_path / "c.pth")
    output = tmp_path / "out.safetensors"
    card = _card(tmp_path / "c.pth")
    for component in (Component.EMBEDDER, Component.DETECTOR):
        with pytest.raises(ToolError, match=r"no key starts with|do not fit the model"):
            extract_weights(tmp_path / "c.pth", model=str(card), component=component, output=output)
    assert load_card(str(card)).as_arguments()["container"] == "model"
    card.write_text(card.read_text() + 'container = "ema"\n')
    assert load_card(str(card)).as_arguments()["container"] == "ema"


def test_a_card_with_a_file_has_nothing_to_download(videoseal_small: Small, tmp_path: Path) -> None:
    card = tmp_path / "own.toml"
    card.write_text(videoseal_small.card.read_text().replace('url = "https://example.org/small.pth"', 'file = "own.pth"'))
    for download, reason in ((True, "names no address to download from"), (False, "its card names that file")):
        with pytest.raises(ToolError, match=reason):
            extract_weights(model=str(card), output=tmp_path / "out.safetensors", download=download)
