"""Strangers' checkpoints: what is read, what is refused, and that nothing runs."""

import contextlib
import pickle
import zipfile
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


def test_a_card_may_name_another_container(tmp_path: Path) -> None:
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


def test_the_payload_of_these_tests_would_run(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_truncated_pth_is_refused(tmp_path: Path, share: float) -> None:
    torch.save({"model": state()}, tmp_path / "c.pth")
    content = (tmp_path / "c.pth").read_bytes()
    (tmp_path / "c.pth").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ToolError, match=r"damaged|not a checkpoint"):
        open_checkpoint(tmp_path / "c.pth")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_safetensors_file_is_refused(tmp_path: Path, share: float) -> None:
    save_file(state(), tmp_path / "c.safetensors")
    content = (tmp_path / "c.safetensors").read_bytes()
    (tmp_path / "c.safetensors").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ToolError, match=r"damaged|not a checkpoint"):
        open_checkpoint(tmp_path / "c.safetensors")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"hello, I am a checkpoint\n", "not a checkpoint; got text"),
        (b"<!DOCTYPE html><html>404</html>", "not a checkpoint; got an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\x80\x02}q\x00.", "legacy format"),
        (b"\xff" * 100, "unknown or cut-off"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "c.pth").write_bytes(content)
    with pytest.raises(ToolError, match=says):
        open_checkpoint(tmp_path / "c.pth")


def test_compressed_and_overlapping_records_are_refused(tmp_path: Path) -> None:
    torch.save({"model": state()}, tmp_path / "c.pth")
    with zipfile.ZipFile(tmp_path / "c.pth") as old, zipfile.ZipFile(tmp_path / "d.pth", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ToolError, match="is compressed"):
        open_checkpoint(tmp_path / "d.pth")


def test_torchscript_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "c.pth", "w") as archive:
        archive.writestr("m/constants.pkl", b"")
        archive.writestr("m/code/__torch__.py", b"")
    with pytest.raises(ToolError, match="TorchScript"):
        open_checkpoint(tmp_path / "c.pth")


def test_all_faults_of_the_keys_come_at_once_and_sorted() -> None:
    found = {"b": torch.ones(2), "extra": torch.ones(1), "more": torch.ones(1)}
    with pytest.raises(ToolError) as error:
        require_match(found, {"z": (1,), "a": (1,), "b": (3,)}, Path("c.pth"))
    message = str(error.value)
    assert "2 missing: a, z" in message
    assert "2 unexpected: extra, more" in message
    assert "1 with the wrong shape: b (2,) instead of (3,)" in message
    assert "\n" not in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named_and_counted(value: float) -> None:
    bad = torch.ones(5)
    bad[2] = value
    with pytest.raises(ToolError, match=r"w holds 1 NaN or infinite of 5"):
        require_sound({"fine": torch.ones(1), "w": bad}, Path("c.pth"))


def test_integer_and_sparse_weights_are_refused() -> None:
    with pytest.raises(ToolError, match=r"i is torch\.int64.*s is no dense tensor"):
        require_sound({"i": torch.ones(1, dtype=torch.int64), "s": torch.eye(2).to_sparse()}, Path("c.pth"))


def test_streamed_safetensors_are_what_the_library_reads(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(()), "c": torch.randn(4, 3).T}
    write_safetensors(tmp_path / "c.safetensors", {k: v.shape for k, v in tensors.items()}, tensors.items(), {"args": "x"})
    checkpoint = open_checkpoint(tmp_path / "c.safetensors")
    assert checkpoint.notes == {"args": "x"}
    assert all(torch.equal(checkpoint.state[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.int64])
def test_weights_of_odd_types_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ToolError, match=rf"w is {dtype}"):
        require_sound({"w": torch.zeros(3).to(dtype)}, Path("c.pth"))


def test_integers_pass_where_they_are_allowed_and_only_these() -> None:
    require_sound({"n": torch.tensor(3)}, Path("c.pth"), integers=True)
    with pytest.raises(ToolError, match=r"c is torch\.complex64"):
        require_sound({"c": torch.zeros(1, dtype=torch.complex64)}, Path("c.pth"), integers=True)


def test_weights_without_values_are_refused() -> None:
    with pytest.raises(ToolError, match="m is no dense tensor with values"):
        require_sound({"m": torch.zeros(3, device="meta")}, Path("c.pth"))


def test_keys_that_are_no_text_are_refused(tmp_path: Path) -> None:
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


def test_only_known_notes_go_on(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "c.safetensors", metadata={"model": "x", "args": "y", "rehearsal": "seed 0"})
    assert open_checkpoint(tmp_path / "c.safetensors").notes == {"args": "y", "rehearsal": "seed 0"}
