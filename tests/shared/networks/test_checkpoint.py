"""Untrusted checkpoints: sound files are read, unsound files are refused, and no code runs."""

import contextlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from shared.command.errors import ToolError
from shared.networks.checkpoint import open_checkpoint, require_match, require_sound, select_detector, write_safetensors


class Payload:
    """Pickles to a call that leaves a trace."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.canary,)  # type: ignore[return-value]


def state() -> dict[str, torch.Tensor]:
    return {"detector.a": torch.arange(6.0).reshape(2, 3), "embedder.b": torch.ones(4)}


@pytest.mark.parametrize("container", ["model", "state_dict", None])
def test_a_pth_is_read_bare_or_in_its_container(tmp_path: Path, container: str | None) -> None:
    torch.save(state() if container is None else {container: state(), "args": "nbits: 2", "epoch": 3}, tmp_path / "c.pth")
    checkpoint = open_checkpoint(tmp_path / "c.pth")
    assert checkpoint.container == container
    assert torch.equal(checkpoint.state["detector.a"], state()["detector.a"])
    assert checkpoint.notes == ({} if container is None else {"args": "nbits: 2"})


def test_a_card_may_name_its_own_container(tmp_path: Path) -> None:
    torch.save({"ema": state(), "model": {"other": torch.ones(1)}}, tmp_path / "c.pth")
    assert set(open_checkpoint(tmp_path / "c.pth", "ema").state) == set(state())


def test_the_optimizer_is_counted_not_kept(tmp_path: Path) -> None:
    torch.save({"model": state(), "optimizer": {"state": {0: {"exp_avg": torch.zeros(10)}}}}, tmp_path / "c.pth")
    checkpoint = open_checkpoint(tmp_path / "c.pth")
    assert {key: [tensor.nbytes for tensor in tensors] for key, tensors in checkpoint.beside.items()} == {"optimizer": [40]}
    assert set(checkpoint.state) == set(state())


def test_keys_of_data_parallel_training_lose_their_wrapper(tmp_path: Path) -> None:
    torch.save({f"module.{key}": value for key, value in state().items()}, tmp_path / "c.pth")
    assert set(open_checkpoint(tmp_path / "c.pth").state) == set(state())


def test_a_bare_detector_is_taken_whole(tmp_path: Path) -> None:
    save_file({"convnext.x": torch.ones(1)}, tmp_path / "c.safetensors")
    assert set(select_detector(open_checkpoint(tmp_path / "c.safetensors"), "detector.")) == {"convnext.x"}


def test_without_detector_keys_the_groups_are_named(tmp_path: Path) -> None:
    save_file({"vae.x": torch.ones(1), "unet.y": torch.ones(1)}, tmp_path / "c.safetensors")
    with pytest.raises(ToolError, match="unet, vae"):
        select_detector(open_checkpoint(tmp_path / "c.safetensors"), "detector.")


def test_a_pickled_object_is_refused_and_never_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    torch.save({"model": state(), "extra": Payload(canary)}, tmp_path / "c.pth")
    with pytest.raises(ToolError, match="holds Python objects"):
        open_checkpoint(tmp_path / "c.pth")
    assert not canary.exists()
    pickle.loads(pickle.dumps(Payload(canary)))
    assert canary.exists(), "the payload has no effect"


def test_unknown_bytes_are_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "c.pth").write_bytes(b"\xff" * 100)
    with pytest.raises(ToolError, match="unknown or cut-off"):
        open_checkpoint(tmp_path / "c.pth")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_safetensors_file_is_refused(tmp_path: Path, share: float) -> None:
    save_file(state(), tmp_path / "c.safetensors")
    content = (tmp_path / "c.safetensors").read_bytes()
    (tmp_path / "c.safetensors").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ToolError, match=r"damaged|not a checkpoint"):
        open_checkpoint(tmp_path / "c.safetensors")


def test_all_faults_of_the_keys_are_listed_together_and_sorted() -> None:
    found = {"b": torch.ones(2), "extra": torch.ones(1), "more": torch.ones(1)}
    with pytest.raises(ToolError) as error:
        require_match(found, {"z": (1,), "a": (1,), "b": (3,)}, Path("c.pth"))
    message = str(error.value)
    assert "2 missing: a, z" in message
    assert "2 unexpected: extra, more" in message
    assert "1 with the wrong shape: b (2,) instead of (3,)" in message
    assert "\n" not in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_with_nan_or_infinity_are_named_and_counted(value: float) -> None:
    bad = torch.ones(5)
    bad[2] = value
    with pytest.raises(ToolError, match=r"w holds 1 NaN or infinite of 5"):
        require_sound({"fine": torch.ones(1), "w": bad}, Path("c.pth"))


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (torch.zeros(3, dtype=torch.complex64), r"w is torch\.complex64"),
        (torch.zeros(3).to(torch.float8_e4m3fn), r"w is torch\.float8_e4m3fn"),
        (torch.zeros(3, dtype=torch.int64), r"w is torch\.int64"),
        (torch.eye(2).to_sparse(), "w is no dense tensor with values"),
        (torch.zeros(3, device="meta"), "w is no dense tensor with values"),
    ],
)
def test_weights_of_odd_types_and_layouts_are_refused_together(weights: torch.Tensor, reason: str) -> None:
    with pytest.raises(ToolError, match=rf"i is torch\.int64.*{reason}"):
        require_sound({"i": torch.ones(1, dtype=torch.int64), "w": weights}, Path("c.pth"))


def test_streamed_safetensors_are_read_by_the_library(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(()), "c": torch.randn(4, 3).T}
    write_safetensors(tmp_path / "c.safetensors", {k: v.shape for k, v in tensors.items()}, tensors.items(), {"args": "x"})
    checkpoint = open_checkpoint(tmp_path / "c.safetensors")
    assert checkpoint.notes == {"args": "x"}
    assert all(torch.equal(checkpoint.state[key], tensor) for key, tensor in tensors.items())


def test_only_integers_pass_where_integers_are_allowed() -> None:
    require_sound({"n": torch.tensor(3)}, Path("c.pth"), integers=True)
    with pytest.raises(ToolError, match=r"c is torch\.complex64"):
        require_sound({"c": torch.zeros(1, dtype=torch.complex64)}, Path("c.pth"), integers=True)


def test_keys_without_a_utf_8_form_are_refused(tmp_path: Path) -> None:
    torch.save({"detector.\ud800": torch.ones(1)}, tmp_path / "c.pth")
    with pytest.raises(ToolError, match="are no text"):
        open_checkpoint(tmp_path / "c.pth")


def test_flipped_bytes_in_a_pth_are_an_error_or_harmless(tmp_path: Path) -> None:
    torch.save({"model": state()}, tmp_path / "c.pth")
    content = (tmp_path / "c.pth").read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(content), 150):
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.integers(8)
        (tmp_path / "c.pth").write_bytes(damaged)
        with contextlib.suppress(ToolError):
            open_checkpoint(tmp_path / "c.pth")


def test_only_known_notes_are_kept(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "c.safetensors", metadata={"model": "x", "args": "y", "rehearsal": "seed 0"})
    assert open_checkpoint(tmp_path / "c.safetensors").notes == {"args": "y", "rehearsal": "seed 0"}
