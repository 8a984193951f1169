"""Open untrusted checkpoints safely and lazily, select a component, and match its keys strictly.

No code in a file is executed: `.pth` files are read with an unpickler for tensors and plain containers only (`weights_only=True`,
with no second try). Their tensors, like those of `.safetensors` files, stay memory-mapped.
"""

import collections
import json
import math
import pickle
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.command.errors import ToolError, first_line
from shared.command.limits import require_size
from shared.command.watchdog import reading
from shared.files.file_type import name_kind, read_head
from shared.networks.pth_check import RESAVE, check_pth

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CONTAINERS = ("model", "state_dict")  # keys under which most training code keeps the flat state dict
BARE_DETECTOR = ("convnext.", "image_encoder.")  # beginnings of keys of a detector alone
REHEARSAL = "rehearsal"  # note on seeded, untrained weights
NOTES = ("args", REHEARSAL)  # texts that are copied with the weights
DTYPES = {  # of torch -> of the safetensors format
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}
WRAPPER = "module."  # prefix of every key under DataParallel


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its flat state dict, memory-mapped, and its further tensors and notes.

    Args:
        path: The file.
        state: Keys to tensors, in the file's order.
        container: Key of the state dict in the file; None where the file is the state dict itself.
        next to: The tensors of every further top-level entry with tensors, for example the optimizer.
        notes: Texts of `NOTES`, out of the dict or the metadata of a .safetensors file.
    """

    path: Path
    state: "dict[str, Tensor]"
    container: str | None
    beside: "dict[str, list[Tensor]]"
    notes: dict[str, str]


def open_checkpoint(path: Path, container: str = "model") -> Checkpoint:
    """Open a .pth or .safetensors file by its content, not its name.

    Args:
        path: The file.
        container: Key of the state dict in the file; `model`, `state_dict` and a bare state dict are found without it.

    Raises:
        ToolError: The file is missing, empty, no checkpoint, damaged, or holds more than tensors and plain containers.
    """
    head = read_head(path, "checkpoint", again="download it again")
    with reading(path):
        if head.startswith(b"PK\x03\x04"):
            return _open_pth(path, container)
        if len(head) > 8 and 2 <= int.from_bytes(head[:8], "little") <= path.stat().st_size - 8 and head[8:9] == b"{":
            return _open_safetensors(path)
    if head.startswith(b"\x80"):
        raise ToolError("the checkpoint is in PyTorch's legacy format, before 1.6", where=path, remedy=RESAVE)
    raise ToolError(
        "not a checkpoint",
        where=path,
        got=name_kind(head),
        expected="a .pth (zip) or .safetensors file",
        remedy="download it again",
    )


def _open_safetensors(path: Path) -> Checkpoint:
    from safetensors import SafetensorError, safe_open

    _require_unique_keys(path)
    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            notes = {key: value for key, value in (file.metadata() or {}).items() if key in NOTES}
            return Checkpoint(path, state, None, {}, notes)
    except (SafetensorError, OSError) as error:
        raise ToolError("damaged .safetensors file", where=path, got=error, remedy="download it again") from None


def _require_unique_keys(path: Path) -> None:
    """Refuse a header that names a tensor twice: the format forbids duplicates, the library takes the last."""
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        twice.extend(name for name, count in collections.Counter(name for name, _ in pairs).items() if count > 1)
        return found

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        require_size(path, length, "text-mb")
        try:
            json.loads(file.read(length), object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            raise ToolError("damaged .safetensors header", where=path, got=first_line(error), remedy="download it again") from None
    if twice:
        raise ToolError("the .safetensors header names a tensor twice", where=path, got=twice[0], remedy="download it again")


def _open_pth(path: Path, wanted: str) -> Checkpoint:
    import torch

    check_pth(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about kinds of tensors, refused later
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line), "no reason given")
        raise ToolError(
            "the checkpoint holds Python objects; they were not loaded", where=path, got=reason.strip(), remedy=RESAVE
        ) from None
    except Exception as error:  # noqa: BLE001 - a tampered file can raise any error here
        raise ToolError("damaged .pth file", where=path, got=first_line(error), remedy="download it again") from None
    if not isinstance(content, Mapping):
        raise ToolError("the checkpoint is no dict", where=path, got=type(content).__name__, remedy=RESAVE)
    container = next((key for key in (wanted, *CONTAINERS) if isinstance(content.get(key), Mapping)), None)
    found = content if container is None else content[container]
    state = {key: value for key, value in found.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}
    if not state:
        named = sorted(key for key in content if isinstance(key, str))
        raise ToolError("no tensors in the checkpoint", where=path, got=f"keys {', '.join(named)}", remedy=RESAVE)
    notes = {key: value for key, value in content.items() if key in NOTES and isinstance(value, str)}
    if not all(_is_encodable(text) for text in (*state, *notes.values())):
        raise ToolError("keys or notes of the checkpoint are no text", where=path, remedy=RESAVE)
    if all(key.startswith(WRAPPER) for key in state):
        state = {key.removeprefix(WRAPPER): value for key, value in state.items()}
    others = (
        {}
        if container is None
        else {key: tensors_in(value) for key, value in content.items() if isinstance(key, str) and key != container}
    )
    beside = {key: tensors for key, tensors in others.items() if tensors}
    return Checkpoint(path, state, container, beside, notes)


def _is_encodable(text: str) -> bool:
    """Return whether the text can be written; a pickle may hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def tensors_in(value: object) -> "list[Tensor]":
    """Return all tensors in nested dicts, lists and tuples of any depth; each container is visited once."""
    import torch

    found: list[Tensor] = []
    waiting, seen = [value], set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif isinstance(item, Mapping | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            waiting.extend(item.values() if isinstance(item, Mapping) else item)
    return found


def select_detector(checkpoint: Checkpoint, prefix: str) -> "dict[str, Tensor]":
    """Return the detector's tensors with `prefix` removed from their keys; a bare detector's state dict is taken whole.

    Raises:
        ToolError: No key starts with the prefix, and the keys are not a bare detector's either.
    """
    chosen = {key.removeprefix(prefix): value for key, value in checkpoint.state.items() if key.startswith(prefix)}
    if chosen:
        return chosen
    if any(key.startswith(BARE_DETECTOR) for key in checkpoint.state):
        return checkpoint.state
    groups = sorted({key.partition(".")[0] for key in checkpoint.state})
    raise ToolError(
        f"no key starts with '{prefix}'",
        where=checkpoint.path,
        got=f"groups {', '.join(groups)}",
        remedy="check that this is the right file",
    )


def require_match(state: "Mapping[str, Tensor]", expected: Mapping[str, Iterable[int]], where: Path) -> None:
    """Raise a ToolError with sorted lists of all missing, unexpected and misshapen keys."""
    want = {key: tuple(shape) for key, shape in expected.items()}
    faults = []
    if missing := sorted(want.keys() - state.keys()):
        faults.append(f"{len(missing)} missing: {', '.join(missing)}")
    if unexpected := sorted(state.keys() - want.keys()):
        faults.append(f"{len(unexpected)} unexpected: {', '.join(unexpected)}")
    misshapen = [
        f"{key} {tuple(state[key].shape)} instead of {want[key]}"
        for key in sorted(want.keys() & state.keys())
        if tuple(state[key].shape) != want[key]
    ]
    if misshapen:
        faults.append(f"{len(misshapen)} with the wrong shape: {', '.join(misshapen)}")
    if faults:
        raise ToolError(
            "the keys do not fit the model: " + "; ".join(faults), where=where, remedy="choose the model this file belongs to"
        )


def require_sound(state: "Mapping[str, Tensor]", where: Path, *, integers: bool = False) -> list[str]:
    """Return the keys of weights with at least two axes that are zero throughout: sound, but hardly trained.

    Raises:
        ToolError: A tensor is not dense, not finite, or neither floating point nor, where allowed, integer; all faults at once.
    """
    import torch

    floats = {torch.float32, torch.float16, torch.bfloat16, torch.float64}
    whole = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}
    faults, blank = [], []
    for key, tensor in state.items():
        if tensor.layout is not torch.strided or tensor.is_nested or tensor.device.type != "cpu":
            faults.append(f"{key} is no dense tensor with values")
        elif tensor.dtype not in floats:
            if not (integers and tensor.dtype in whole):
                faults.append(f"{key} is {tensor.dtype}")
        elif tensor.numel():
            low, high = torch.aminmax(tensor)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                bad = int((~torch.isfinite(tensor)).sum())
                faults.append(f"{key} holds {bad} NaN or infinite of {tensor.numel()} values")
            elif low == high == 0 and tensor.ndim > 1:
                blank.append(key)
    if faults:
        raise ToolError("unusable weights: " + "; ".join(faults), where=where, remedy="get the checkpoint again")
    return blank


def write_safetensors(
    path: Path,
    shapes: Mapping[str, Iterable[int]],
    tensors: "Iterable[tuple[str, Tensor]]",
    metadata: Mapping[str, str] | None = None,
    dtypes: "Mapping[str, torch.dtype] | None" = None,
) -> None:
    """Write tensors one at a time, with a single tensor in memory; the same tensors make the same bytes.

    The library's own writer takes all tensors at once, and writes several metadata in any order (safetensors 0.8).
    Format: 8 bytes header length, JSON header, data.

    Args:
        path: File to write.
        shapes: Key to shape, in the order of `tensors`; wider types come first, so that all tensors are aligned.
        tensors: Key and tensor, in the order of `shapes`.
        metadata: Text kept in the header.
        dtypes: Key to type; default: all float32.

    Source: https://github.com/huggingface/safetensors#format
    """
    import torch

    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for key, shape in shapes.items():
        dtype = torch.float32 if dtypes is None else dtypes[key]
        size = dtype.itemsize * math.prod(shape := tuple(shape))
        header[key] = {"dtype": DTYPES[str(dtype)], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (key, tensor), (expected, shape) in zip(tensors, shapes.items(), strict=True):
            assert key == expected and tuple(tensor.shape) == tuple(shape), (key, expected)
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def as_float32(tensor: "Tensor") -> "torch.Tensor":
    """Return the tensor as contiguous float32, without a copy where it is contiguous float32 already."""
    import torch

    return tensor.to(torch.float32).contiguous()
