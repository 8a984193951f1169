"""Bad inputs, made from good ones: what strangers' files look like when they are damaged, hostile, or just odd.

Each case is a row of a table: what it is, which tool gets it, and what it must get. Nothing is stored; all is made from a seed.
"""

import argparse
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from ai_edge_litert.tools import flatbuffer_utils
from onnx import TensorProto, helper
from PIL import Image
from safetensors.torch import save_file

from tests.conftest import write_card
from tests.support.small_onnx import save_picture_model, with_external_weights
from tests.tools.quantize_tflite.test_bundle import FAULTS, Part, nested, official, zipped

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a2146" * 8 + b"\nsize 12345\n"
HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
SECRET = "words that lies outside"
CANARY = "PWNED"
Edit = Callable[[Path], Path | None]  # gets the path to write to; returns another to name to the tool instead


@dataclass(frozen=True)
class Good:
    """Good files that bad ones are made of."""

    folder: Path
    card: Path
    checkpoint: Path  # .safetensors of the card's detector
    pth: Path
    tflite: Path
    onnx: Path
    image: Path
    video: Path


@dataclass(frozen=True)
class Case:
    """One bad input for one tool.

    Args:
        row: Which kind of bad input, such as C05.
        name: What it is.
        tool: Who gets it.
        arguments: Makes it in a folder and returns the command line; the product goes into the folder `out` there.
        code: The exit code it must get.
        says: Regular expression found in the error, or in the output where there is none.
        env: Environment variables.
        before: What stands in `out` beforehand.
        makes: Whether the tool writes a product, where it ends with 0.
    """

    row: str
    name: str
    tool: str
    arguments: Callable[[Path], list[str]]
    code: int = 2
    says: str = ""
    env: dict[str, str] = field(default_factory=dict)
    before: dict[str, bytes] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Row, name and tool."""
        return f"{self.row} {self.name} [{self.tool}]"


class Payload:
    """Pickles to a call that leaves a trace in the folder where the tool runs."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {CANARY}",)


def make_good(folder: Path, tflite: Path, card: Path, checkpoint: Path) -> Good:
    """Make the good files."""
    import cv2

    pth = folder / "good.pth"
    torch.save({"model": torch_state(checkpoint), "args": "nbits: 32"}, pth)
    save_picture_model(folder / "good.onnx")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (96, 96, 3), np.uint8)).save(folder / "good.png")
    writer = cv2.VideoWriter(str(folder / "good.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (96, 96))
    for _ in range(20):
        writer.write(rng.integers(0, 256, (96, 96, 3), np.uint8))
    writer.release()
    return Good(folder, card, checkpoint, pth, tflite, folder / "good.onnx", folder / "good.png", folder / "good.mp4")


def torch_state(path: Path) -> dict[str, torch.Tensor]:
    """Return the detector's tensors of a .safetensors file."""
    from safetensors.torch import load_file

    return {key: value for key, value in load_file(path).items() if not key.startswith("_")}


# Command lines, by what the file is taken for.


def _extract(file: str, good: Good) -> list[str]:
    return [file, "-o", "out/w.safetensors"]


def _convert(file: str, good: Good) -> list[str]:
    return ["--model", str(good.card), "--checkpoint", file, "-o", "out/m.tflite"]


def _compare_checkpoint(file: str, good: Good) -> list[str]:
    return [file, str(good.tflite), "--model", str(good.card), "--runs", "1", "--samples", "1"]


def _quantize(file: str, good: Good) -> list[str]:
    return [file, "-o", "out/q.tflite"]


def _quantize_bundle(file: str, good: Good) -> list[str]:
    return [file, "-o", "out/q.task"]


def _verify(file: str, good: Good) -> list[str]:
    return [file, "-o", "out/v.json"]


def _compare(file: str, good: Good) -> list[str]:
    return [file, str(good.tflite), "--runs", "1", "--samples", "1", "-o", "out/c.json"]


def _calibrate(file: str, good: Good) -> list[str]:
    return ["--synthetic", "8", "--model", file, "-o", "out/set"]


def _dynamic(file: str, good: Good) -> list[str]:
    return [file, "--recipe", "int8", "-o", "out/q.onnx"]


def _prepare(file: str, good: Good) -> list[str]:
    return [file, "-o", "out/set", "--tile-size", "32", "--min-samples", "1"]


COMMANDS: dict[str, dict[str, Callable[[str, Good], list[str]]]] = {
    "checkpoint": {"extract_weights": _extract, "convert_detector": _convert, "compare": _compare_checkpoint},
    "weights": {"extract_weights": _extract},
    "tflite": {"quantize_tflite": _quantize, "verify": _verify, "compare": _compare, "prepare_calibration": _calibrate},
    "quantize": {"quantize_tflite": _quantize},
    "task": {"quantize_tflite": _quantize_bundle},
    "onnx": {"quantize_onnx": _dynamic, "verify": _verify, "compare": _compare},
    "dynamic": {"quantize_onnx": _dynamic},
    "picture": {"prepare_calibration": _prepare},
}
SUFFIX = {"checkpoint": ".pth", "weights": ".pth", "tflite": ".tflite", "quantize": ".tflite", "task": ".task", "onnx": ".onnx"}
SUFFIX |= {"dynamic": ".onnx", "picture": ".png"}


def cases(good: Good) -> list[Case]:
    """Return all cases."""
    found: list[Case] = []

    def add(
        row: str,
        name: str,
        kind: str,
        edit: Edit | bytes,
        says: str,
        *,
        code: int = 2,
        suffix: str = "",
        more: tuple[str, ...] = (),
        fails: str = "",
    ) -> None:
        for tool, command in COMMANDS[kind].items():

            def arguments(folder: Path, command: Callable[[str, Good], list[str]] = command) -> list[str]:
                path = folder / f"bad{suffix or SUFFIX[kind]}"
                named = None
                if isinstance(edit, bytes):
                    path.write_bytes(edit)
                else:
                    named = edit(path)
                return [*command(str(named or path.name), good), *more]

            found.append(Case(row, name, tool, arguments, 1 if tool == fails else code, "" if tool == fails else says))

    _add_checkpoints(add, good)
    _add_safetensors(add, good)
    _add_tflite(add, good)
    _add_onnx(add, good)
    _add_bundles(add, good)
    _add_pictures(add, good)
    return [*found, *_texts(good), *_outputs(good)]


Add = Callable[..., None]


def _add_checkpoints(add: Add, good: Good) -> None:
    state = torch_state(good.checkpoint)
    content = good.pth.read_bytes()

    def saved(value: object, **options: Any) -> Edit:
        return lambda path: torch.save(value, path, **options)

    def rezipped(change: Callable[[zipfile.ZipFile, zipfile.ZipFile], None], value: object = None) -> Edit:
        def edit(path: Path) -> None:
            torch.save({"model": state} if value is None else value, path.with_suffix(".tmp"))
            with zipfile.ZipFile(path.with_suffix(".tmp")) as old, zipfile.ZipFile(path, "w") as new:
                change(old, new)
            path.with_suffix(".tmp").unlink()

        return edit

    def repickled(change: Callable[[bytes], bytes]) -> Edit:
        def rewrite(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
            for name in old.namelist():
                new.writestr(name, change(old.read(name)) if name.endswith("data.pkl") else old.read(name))

        return rezipped(rewrite)

    def flipped(path: Path) -> None:
        with zipfile.ZipFile(good.pth) as archive:
            largest = max(archive.infolist(), key=lambda info: info.file_size)
        damaged = bytearray(content)
        damaged[largest.header_offset + 200] ^= 4
        path.write_bytes(damaged)

    def deflated(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
        for name in old.namelist():
            new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED)

    def overlapping(path: Path) -> None:
        with zipfile.ZipFile(good.pth) as archive:
            infos = [info for info in archive.infolist() if "/data/" in info.filename]
            start = archive.start_dir
        place = content.index(infos[1].filename.encode(), start) - 4
        path.write_bytes(content[:place] + struct.pack("<L", infos[0].header_offset) + content[place + 4 :])

    def legacy_tar(path: Path) -> None:
        with tarfile.open(path, "w") as archive:
            for name in ("sys_info", "pickle", "storages", "tensors"):
                archive.addfile(tarfile.TarInfo(name), io.BytesIO(b""))

    def huge_legacy(path: Path) -> None:
        parts = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
        path.write_bytes(b"".join(parts) + b"\x80\x02ctorch\nFloatStorage\nq\x00." + struct.pack("<q", 2**40))

    def longer(path: Path) -> None:
        """The pickle says that a storage has more elements than its record."""
        size = next(value.numel() for value in state.values() if 300 < value.numel() < 60_000)
        reported, wrong = (b"M" + struct.pack("<H", number) + b"tq" for number in (size, size + 1000))
        repickled(lambda text: text.replace(reported, wrong))(path)

    def nested_lists(path: Path) -> None:
        deep: list[Any] = []
        for _ in range(100_000):
            deep = [deep]
        out = b"\x80\x02}(X\x05\x00\x00\x00model}X\x04\x00\x00\x00deep" + b"]" * 100_000 + b"a" * 99_999 + b"u."
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", out)
            archive.writestr("a/version", "3\n")
        del deep

    def billion_laughs(path: Path) -> None:
        laugh: list[Any] = ["ha"]
        for _ in range(30):
            laugh = [laugh, laugh]
        torch.save({"model": state, "laughs": laugh}, path)

    def script(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("m/constants.pkl", b"")
            archive.writestr("m/code/__torch__.py", b"")

    first = next(iter(state))
    bent = {**state, first: state[first].clone()}
    bent[first].view(-1)[3] = float("nan")
    again = "download it again"
    add("C01", "no bytes", "checkpoint", b"", "the checkpoint file is empty")
    add("C02", "text", "checkpoint", b"hello, I am a checkpoint\n", "not a checkpoint; got text")
    add("C02", "a web page", "checkpoint", HTML, "not a checkpoint; got an HTML page")
    add("C03", "a Git LFS pointer", "checkpoint", LFS, "Git LFS pointer.*git lfs pull")
    for share in (0.1, 0.5, 0.99):
        add("C04", f"cut off at {share:.0%}", "weights", content[: int(share * len(content))], again)
    add("C05", "a flipped bit in a record", "checkpoint", flipped, "1 of .* records differ from their checksums")
    add("C06", "os.system", "checkpoint", saved({"model": state, "extra": Payload()}), "holds Python objects; they were not loaded")
    add("C07", "argparse.Namespace", "weights", saved({"model": state, "args": argparse.Namespace(a=1)}), "holds Python objects")
    add("C08", "a tar of PyTorch's first years", "weights", legacy_tar, "not a checkpoint")
    add("C09", "a legacy pickle with 4 TiB of numbers", "weights", huge_legacy, "legacy format")
    add("C10", "a TorchScript program", "checkpoint", script, "TorchScript program")
    add("C11", "a storage longer than its record", "weights", longer, "not as long as it says")
    add("C12", "compressed records", "weights", rezipped(deflated), "an entry is compressed")
    add("C12", "records over each other", "weights", overlapping, "not as torch.save writes it")
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 10**6]]), torch.ones(2), (3,), check_invariants=False)
    add("C13", "a sparse tensor out of range", "weights", saved({"model": {**state, "detector.s": sparse}}), "bad|dense|damaged")
    add("C13", "a sparse tensor", "weights", saved({"model": {"detector.s": torch.eye(2).to_sparse()}}), "no dense tensor")
    add("C14", "100,000 nested lists", "weights", nested_lists, "no tensors in the checkpoint")
    add("C14", "a billion laughs", "weights", billion_laughs, "", code=0)
    for wrapper in ("model", "state_dict"):
        add("C15", f"under {wrapper}", "weights", saved({wrapper: state}), "", code=0)
    add("C15", "module. before each key", "weights", saved({f"module.{k}": v for k, v in state.items()}), "", code=0)
    fewer = dict(list(state.items())[3:])
    model = ("--model", str(good.card))
    add(
        "C16",
        "keys missing and more",
        "weights",
        saved({**fewer, "detector.x": torch.ones(1)}),
        "3 missing.*1 unexpected",
        more=model,
    )
    turned = {**state, first: state[first].unsqueeze(0)}
    add("C17", "a wrong shape", "weights", saved(turned), "1 with the wrong shape", more=model)
    add("C17", "integers", "weights", saved({k: v.to(torch.int8) for k, v in state.items()}), "torch.int8")
    add("C17", "bfloat16", "weights", saved({k: v.to(torch.bfloat16) for k, v in state.items()}), "", code=0)
    add("C18", "a NaN", "checkpoint", saved(bent), "holds 1 NaN or infinite", fails="compare")
    add("C18", "zeros throughout", "weights", saved({k: torch.zeros_like(v) for k, v in state.items()}), "ZERO throughout", code=0)
    grown = {k: torch.zeros(65, v.shape[1]) if k.endswith("linear.weight") else v for k, v in state.items()}
    add("C19", "another number of bits", "weights", saved(grown), "instead of", more=model)
    odd = {"detector.scalar": torch.tensor(1.0), "detector.none": torch.ones(0, 3), "detector.turned": torch.ones(4, 3).T}
    odd |= {"detector.tied": odd["detector.turned"], "detector.a/b\n😀": torch.ones(1), "detector." + "x" * 10_000: torch.ones(1)}
    add("C20", "odd but sound tensors", "weights", saved(odd), "", code=0)
    add("C21", "3 GB of zeros", "weights", _sparse_checkpoint, "", code=0)

    def special(make: Callable[[Path], object], name: str = "bad.pth") -> Edit:
        def edit(path: Path) -> Path:
            make(path.with_name(name))
            return Path(name)

        return edit

    add("C25", "a pipe", "checkpoint", special(os.mkfifo), "no regular file")
    add("C25", "a device", "checkpoint", lambda _: Path("/dev/zero"), "no regular file")
    add("C25", "a folder", "weights", special(Path.mkdir), "no regular file; got a folder")
    add("C25", "a link to nothing", "weights", special(lambda path: path.symlink_to("absent")), "link to a file that is not there")
    add("C25", "a name of 300 characters", "weights", lambda _: Path("x" * 300), "can't be reached: File name too long")
    add("C25", "a name that starts with a dash", "weights", special(lambda p: p.write_bytes(content), "-x.pth"), "No such option")
    fine = os.fsdecode(b"caf\xe9.pth")
    named_so = special(lambda path: path.write_bytes(content), fine)
    add("C25", "a name that is no text", "weights", named_so, "no text in UTF-8; rename it")


def _sparse_checkpoint(path: Path) -> None:
    """Write a sound .pth with one storage of 3 GB, all zeros, that takes no disk."""
    size = 3 * 10**9
    torch.save({"model": {"detector.w": torch.ones(4), "big": torch.ones(4)}}, path)
    with zipfile.ZipFile(path) as old:
        records = {name: old.read(name) for name in old.namelist()}
    pickled = next(name for name in records if name.endswith("data.pkl"))
    sparse = pickled.replace("data.pkl", "data/1")
    head, tail = records[pickled].rsplit(b"K\x04tq", 1)  # the second storage's number of elements
    records[pickled] = head + b"J" + struct.pack("<i", size // 4) + b"tq" + tail
    zeros, block = 0, bytes(10**8)
    for _ in range(size // len(block)):
        zeros = zlib.crc32(block, zeros)
    directory = b""
    with path.open("wb") as file:
        for name, content in records.items():
            length, crc = (size, zeros) if name == sparse else (len(content), zlib.crc32(content))
            fields = (0, 0, 0, 33, crc, length, length, len(name))  # flags, method, time, date: 1 January 1980
            offset = file.tell()
            file.write(struct.pack("<4s5H3L2H", b"PK\3\4", 20, *fields, 0) + name.encode())
            file.seek(size, 1) if name == sparse else file.write(content)
            directory += struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, *fields, 0, 0, 0, 0, 0, offset) + name.encode()
        start = file.tell()
        file.write(directory + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, len(records), len(records), len(directory), start, 0))


def _add_safetensors(add: Add, good: Good) -> None:
    def of(header: object, data: bytes = b"\0" * 8, length: int | None = None, raw: bytes | None = None) -> bytes:
        text = json.dumps(header).encode() if raw is None else raw
        return struct.pack("<Q", len(text) if length is None else length) + text + data

    def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, object]:
        return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}

    fine = {"detector.a": entry("F32", [1], 0, 4), "detector.b": entry("F32", [1], 4, 8)}
    for name, content in {
        "a header of 2^63 bytes": of(fine, length=2**63),
        "a header of 100,000,001 bytes": of(fine, length=100_000_001),
        "a header of no bytes": of(fine, length=0),
        "7 bytes": b"\x10\0\0\0\0\0\0",
    }.items():
        add("C22", name, "weights", content, "not a checkpoint|damaged", suffix=".safetensors")
    named = b'"detector.a":{"dtype":"F32","shape":[1],"data_offsets":'
    twice = b"{" + named + b"[0,4]}," + named + b"[4,8]}}"
    for name, content in {
        "tensors over each other": of({"detector.a": entry("F32", [1], 0, 4), "detector.b": entry("F32", [1], 2, 6)}, b"\0" * 6),
        "a hole": of({"detector.a": entry("F32", [1], 0, 4), "detector.b": entry("F32", [1], 6, 10)}, b"\0" * 10),
        "trailing bytes": of(fine, b"\0" * 20),
        "an end before its start": of({"detector.a": entry("F32", [1], 4, 0)}),
        "a shape that overflows": of({"detector.a": entry("F32", [2**40, 2**40], 0, 8)}),
        "an unknown type": of({"detector.a": entry("F33", [1], 0, 4)}),
        "a header that is no text": of(fine, raw=b'{"\xff\xfe":1}'),
        "a name twice": of(None, raw=twice),
    }.items():
        add("C23", name, "weights", content, "safetensors", suffix=".safetensors")
    index = json.dumps({"weight_map": {"detector.a": "../other.safetensors"}}).encode()
    add("C24", "an index of shards elsewhere", "weights", index, "not a checkpoint; got text", suffix=".safetensors")
    nan = {"detector.a": torch.tensor([float("inf"), 1.0])}
    add("C18", "an infinity", "weights", lambda path: save_file(nan, path), "1 NaN or infinite", suffix=".safetensors")


def _add_tflite(add: Add, good: Good) -> None:
    content = good.tflite.read_bytes()

    def edited(change: Callable[[Any], object]) -> Edit:
        def edit(path: Path) -> None:
            model = flatbuffer_utils.read_model(str(good.tflite))
            change(model)
            flatbuffer_utils.write_model(model, str(path))

        return edit

    def constant(model: Any) -> Any:
        """Return the largest constant tensor."""
        graph = model.subgraphs[0]
        return max(graph.tensors, key=lambda t: 0 if model.buffers[t.buffer].data is None else len(model.buffers[t.buffer].data))

    def scaled(**changes: Any) -> Edit:
        def change(model: Any) -> None:
            from ai_edge_litert import schema_py_generated as schema

            reported = {"scale": [1.0], "zeroPoint": [0], "quantizedDimension": 0, **changes}
            constant(model).quantization = schema.QuantizationParametersT(**reported)

        return edited(change)

    def poisoned(model: Any) -> None:
        buffer = model.buffers[constant(model).buffer]
        values = np.frombuffer(bytes(buffer.data), np.float32).copy()
        values[5] = np.nan
        buffer.data = np.frombuffer(values.tobytes(), np.uint8)

    def external(offset: int, size: int) -> Edit:
        def change(model: Any) -> None:
            buffer = model.buffers[constant(model).buffer]
            buffer.data, buffer.offset, buffer.size = None, offset, size

        return edited(change)

    def many(model: Any) -> None:
        graph = model.subgraphs[0]
        graph.tensors += [graph.tensors[0]] * 100_000

    damaged = "damaged TFLite model"
    add("F01", "no bytes", "tflite", b"", "the model file is empty")
    add("F02", "a root behind the end", "tflite", b"\xff\0\0\0TFL3", damaged, fails="verify")
    add("F02", "18 00 00 00 TFL3", "tflite", b"\x18\0\0\0TFL3", damaged, fails="verify")
    for size in (16, 64, 256, 1024, 4096, int(0.99 * len(content))):
        add("F03", f"cut off at {size} bytes", "quantize" if size < 4096 else "tflite", content[:size], damaged, fails="verify")
    add("F05", "another identifier", "tflite", content[:4] + b"TFL2" + content[8:], "not a TFLite model|not a plain bundle")
    for version in (2, 99):
        add("F05", f"schema version {version}", "quantize", edited(lambda m, v=version: setattr(m, "version", v)), "schema version")
    add("F06", "no graph", "quantize", edited(lambda m: setattr(m, "subgraphs", [])), "no graph")
    add(
        "F06",
        "a buffer that is not there",
        "tflite",
        edited(lambda m: setattr(m.subgraphs[0].tensors[0], "buffer", 9999)),
        damaged,
        fails="verify",
    )
    add(
        "F06",
        "an op code that is not there",
        "quantize",
        edited(lambda m: setattr(m.subgraphs[0].operators[0], "opcodeIndex", 99)),
        damaged,
    )
    add("F06", "a tensor of number -7", "quantize", edited(lambda m: setattr(m.subgraphs[0].operators[0], "inputs", [-7])), damaged)
    add(
        "F07",
        "a constant that is too short",
        "tflite",
        edited(lambda m: setattr(m.buffers[constant(m).buffer], "data", b"abcd")),
        "bytes instead of",
        fails="verify",
    )
    add(
        "F08",
        "a shape of 2^60 numbers",
        "quantize",
        edited(lambda m: setattr(constant(m), "shape", [2**30, 2**30])),
        "has the shape",
    )
    add("F08", "an axis of -5", "quantize", edited(lambda m: setattr(constant(m), "shape", [-5])), "has the shape")
    add("F09", "weights behind the end", "tflite", external(10**9, 64), "outside the file", fails="verify")
    add("F09", "weights whose place wraps around", "tflite", external(2**64 - 8, 64), "outside the file|damaged", fails="verify")
    add("F10", "weights behind the flatbuffer", "quantize", _with_weights_behind(good), "", code=0)
    add("F14", "no signature", "quantize", edited(lambda m: setattr(m, "signatureDefs", [])), "", code=0)
    add("F12", "a custom op that nobody has", "quantize", _with_custom_op(good), "", code=0)
    add("F13", "quantized already", "quantize", _quantized(good), "changes no op|quantized already")
    add("F15", "a scale of 0", "quantize", scaled(scale=[0.0]), "a scale that is not above 0")
    add("F15", "a scale of NaN", "tflite", scaled(scale=[float("nan")]), "a scale that is not above 0", fails="verify")
    add(
        "F15",
        "scales along an axis that is not there",
        "quantize",
        scaled(scale=[1.0, 1.0], zeroPoint=[0, 0], quantizedDimension=9),
        "along axis 9",
    )
    add("F15", "fewer scales than channels", "quantize", scaled(scale=[1.0, 1.0], zeroPoint=[0, 0]), "2 scales along axis 0")
    add("F16", "a NaN weight", "quantize", edited(poisoned), "NaN or infinite weights; got 1 tensors")
    add("F17", "metadata and label files", "quantize", _labelled(content), "", code=0)
    add("F18", "metadata in a buffer that is not there", "quantize", edited(_lost_metadata), "metadata without a buffer")
    add("F19", "100,000 tensors more", "quantize", edited(many), "damaged TFLite model; got .* tensors")
    add(
        "F19", "a name of 10 MB", "quantize", edited(lambda m: setattr(m.subgraphs[0].tensors[3], "name", b"n" * 10**7)), "", code=0
    )
    add("F01", "a web page", "tflite", HTML, "not a TFLite model; got an HTML page")
    add("F01", "a Git LFS pointer", "tflite", LFS, "git lfs pull")
    add("F21", "samples of NaN", "quantize", content, "holds NaN or infinity", more=("--calibration", str(_nan_samples(good))))


def _with_weights_behind(good: Good) -> Edit:
    """As AI Edge Quantizer writes models above 256 KiB."""

    def edit(path: Path) -> None:
        model = flatbuffer_utils.read_model(str(good.tflite))
        place = 2**20
        blocks = []
        for buffer in model.buffers:
            if buffer.data is not None and len(buffer.data) > 1000:
                blocks.append((place, bytes(buffer.data)))
                buffer.data, buffer.offset, buffer.size = None, place, len(blocks[-1][1])
                place += -(-buffer.size // 16) * 16
        flatbuffer_utils.write_model(model, str(path))
        assert path.stat().st_size < 2**20
        with path.open("r+b") as file:
            for start, block in blocks:
                file.seek(start)
                file.write(block)

    return edit


def _without_buffer(model: Any) -> None:
    model.subgraphs[0].tensors[0].buffer = 9999


def _lost_metadata(model: Any) -> None:
    from ai_edge_litert import schema_py_generated as schema

    model.metadata = [schema.MetadataT(name=b"TFLITE_METADATA", buffer=99_999)]


def _with_custom_op(good: Good) -> Edit:
    def edit(path: Path) -> None:
        from tests.tools.quantize_tflite.graph.test_repair import make_custom

        make_custom(good.tflite, path, -1)

    return edit


def _quantized(good: Good) -> Edit:
    def edit(path: Path) -> None:
        from tools.quantize_tflite import quantize_tflite

        made = good.folder / "quantized.tflite"
        if not made.exists():
            quantize_tflite(good.tflite, output=made)
        path.write_bytes(made.read_bytes())

    return edit


def _labelled(content: bytes) -> Edit:
    def edit(path: Path) -> None:
        path.write_bytes(content)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("labels.txt", "cat\ndog\n")

    return edit


def _nan_samples(good: Good) -> Path:
    path = good.folder / "nan.npz"
    if not path.exists():
        np.savez(path, image=np.full((2, 1, 3, 64, 64), np.nan, np.float32))
    return path


def _add_onnx(add: Add, good: Good) -> None:
    content = good.onnx.read_bytes()

    def edited(change: Callable[[Any], object]) -> Edit:
        def edit(path: Path) -> None:
            model = onnx.load(str(good.onnx))
            change(model)
            path.write_bytes(model.SerializeToString())

        return edit

    def external(change: Callable[[Path, Any], object], data: bool = True) -> Edit:
        """Write a model with weights beside it, and change what it says of them."""

        def edit(path: Path) -> None:
            path.write_bytes(content)
            with_external_weights(path, "w.data")
            model = onnx.load(str(path), load_external_data=False)
            change(path, model)
            path.write_bytes(model.SerializeToString())
            if not data:
                (path.parent / "w.data").unlink()

        return edit

    def say(key: str, value: str) -> Callable[[Path, Any], None]:
        def change(_: Path, model: Any) -> None:
            for entry in model.graph.initializer[0].external_data:
                if entry.key == key:
                    entry.value = value

        return change

    def linked(kind: str) -> Callable[[Path, Any], None]:
        def change(path: Path, _: Any) -> None:
            data = path.parent / "w.data"
            data.rename(path.parent / "real.data")
            {"symlink": data.symlink_to, "hard link": data.hardlink_to, "pipe": lambda _: os.mkfifo(data)}[kind](
                path.parent / "real.data"
            )

        return change

    def in_attribute(model: Any) -> None:
        tensor = TensorProto(name="hidden", data_type=1, dims=[2], data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="../secret.txt")
        model.graph.node.insert(0, helper.make_node("Constant", [], ["unused"], value=tensor))

    def in_function(model: Any) -> None:
        tensor = TensorProto(name="hidden", data_type=1, dims=[2], data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="/etc/hostname")
        node = helper.make_node("Constant", [], ["y"], value=tensor)
        model.functions.append(helper.make_function("own", "f", [], ["y"], [node], [helper.make_opsetid("", 17)]))

    def cyclic(model: Any) -> None:
        node = helper.make_node("f", ["x"], ["y"], domain="own")
        model.functions.append(helper.make_function("own", "f", ["x"], ["y"], [node], [helper.make_opsetid("own", 1)]))
        model.opset_import.append(helper.make_opsetid("own", 1))
        model.graph.node[0].op_type, model.graph.node[0].domain = "f", "own"
        del model.graph.node[0].input[1:]

    def nan(model: Any) -> None:
        from onnx import numpy_helper

        values = numpy_helper.to_array(model.graph.initializer[0]).copy()
        values.flat[0] = np.nan
        model.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, model.graph.initializer[0].name))

    def deep(model: Any) -> None:
        graph = model.graph
        for _ in range(30):
            inner = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [], [])
            inner.node[0].attribute.append(helper.make_attribute("g", graph))
            graph = inner
        model.graph.node[0].attribute.append(helper.make_attribute("g", graph))

    damaged = "not an ONNX model|damaged"
    add("O01", "no bytes", "onnx", b"", "the model file is empty")
    add("O01", "text", "onnx", b"hello\n", damaged)
    add("O01", "a web page", "onnx", HTML, "got an HTML page")
    add("O01", "cut off", "onnx", content[: len(content) // 2], damaged)
    add("O01", "garbage behind the end", "dynamic", content + b"\xff" * 40, damaged)
    for location in ("../secret.txt", "a/../../secret.txt", "/etc/hostname", "C:\\\\x", "", "."):
        says = "beside the model|missing|no regular"
        add(
            "O02",
            f"weights at {location!r}",
            "onnx" if location == "../secret.txt" else "dynamic",
            external(say("location", location)),
            says,
        )
    for kind in ("symlink", "hard link", "pipe"):
        add(
            "O03",
            f"weights that are a {kind}",
            "onnx" if kind == "symlink" else "dynamic",
            external(linked(kind)),
            "a link|missing",
        )
    for location in ("../secret.txt", "/etc/hostname"):
        whole = _absolute(external(say("location", location)))
        add("O04", f"the same by its full path: {location!r}", "dynamic", whole, "beside the model")
    add(
        "O05",
        "weights that are not there",
        "onnx",
        external(lambda *_: None, data=False),
        "w.data: the model's weights are missing",
    )
    for key, value in (("length", str(2**60)), ("length", "-1"), ("offset", "-4"), ("offset", str(10**9)), ("length", "many")):
        add("O06", f"{key} {value}", "dynamic", external(say(key, value)), "cut off|beside the model")
    add("O07", "an unknown key", "dynamic", external(_with_strange_key), "", code=0)
    add("O08", "weights elsewhere, in an attribute", "onnx", edited(in_attribute), "beside the model")
    add("O08", "weights elsewhere, in a function", "onnx", edited(in_function), "beside the model")
    add("O09", "a place in memory", "dynamic", external(say("location", "*/_ORT_MEM_ADDR_/*")), "beside the model")
    add("O10", "a function that calls itself", "dynamic", edited(cyclic), "")
    add("O10", "30 graphs in each other", "dynamic", edited(deep), "")
    add("O11", "an op of nobody's", "dynamic", edited(lambda m: setattr(m.graph.node[0], "domain", "com.example")), "")
    for opset in (0, 999):
        add("O12", f"opset {opset}", "dynamic", edited(lambda m, o=opset: setattr(m.opset_import[0], "version", o)), "")
    add("O12", "no opset", "onnx", edited(lambda m: m.ClearField("opset_import")), "no graph with nodes")
    add("O12", "format version 99", "dynamic", edited(lambda m: setattr(m, "ir_version", 99)), "")
    for size in (-1, 2**62):
        add(
            "O14",
            f"a weight with an axis of {size}",
            "onnx",
            edited(lambda m, s=size: m.graph.initializer[0].dims.append(s)),
            "impossible shape",
        )
    add(
        "O14",
        "two outputs of one name",
        "dynamic",
        edited(lambda m: m.graph.node[1].output.__setitem__(0, m.graph.node[0].output[0])),
        "",
    )
    add("O15", "a NaN weight", "dynamic", edited(nan), "NaN or infinite weights")
    add("O01", "a model of LiteRT", "onnx", good.tflite.read_bytes(), "got a TFLite model")


def _absolute(edit: Edit) -> Edit:
    def edited(path: Path) -> Path:
        edit(path)
        return path.absolute()

    return edited


def _with_strange_key(_: Path, model: Any) -> None:
    model.graph.initializer[0].external_data.add(key="__class__", value="os.system")


def _add_bundles(add: Add, good: Good) -> None:
    model = good.tflite.read_bytes()

    def one(name: bytes = b"m.tflite", **changes: Any) -> bytes:
        return zipped(Part(name, model, **changes), Part(b"labels.txt", b"cat\n"))

    rows = {
        "no zip": "K01",
        "no bytes": "K01",
        "no entries": "K01",
        "deflated": "K03",
        "said to be deflated": "K03",
        "two entries in one place": "K04",
        "longer than its place": "K04",
        "an offset behind the end": "K04",
        "above": "K05",
        "above, further in": "K05",
        "absolute": "K05",
        "backslash": "K05",
        "unprintable": "K05",
        "no name": "K05",
        "a zero byte in its name": "K05",
        "one name twice": "K06",
        "another name inside": "K07",
        "another size inside": "K07",
        "something between": "K07",
        "something before the directory": "K07",
        "encrypted": "K08",
        "too deep": "K10",
        "a folder": "K11",
        "a flipped bit": "K14",
        "a flipped bit in a bundle within": "K14",
        "too many entries": "K15",
        "truncated": "K14",
    }
    for name, row in rows.items():
        add(row, name, "task", FAULTS[name][0], "")
    add("K02", "as Google's packer writes it", "task", official({"m.tflite": model, "labels.txt": b"cat\n"}), "", code=0)
    add("K04", "an entry that says it has 1 GB", "task", one(local={"size": 10**9}, central={"size": 10**9}), "not a plain bundle")
    add(
        "K06",
        "names that differ in case",
        "task",
        zipped(Part(b"m.tflite", model), Part(b"M.tflite", model)),
        "differ only in case",
    )
    add("K07", "something behind the end", "task", one() + b"trailing", "behind the zip's directory|damaged")
    add("K07", "a comment", "task", one()[:-2] + b"\x05\0hello", "behind the zip's directory")
    add("K07", "two ends", "task", one() + one()[-22:], "not a plain bundle|damaged|differ")
    inner = official({"inner.tflite": model, "labels.txt": b"cat\n"})
    add("K09", "a bundle in a bundle", "task", official({"hand.task": inner, "m.tflite": model}), "", code=0)
    add("K10", "eight bundles in each other", "task", nested(8), "more than 3 deep")
    add("K11", "a link", "task", _bundle_with_link(model), "a folder or a link")
    unknown = {"m.tflite": model, "geometry.binarypb": b"\x08\x01", "manifest.pb": b"\x0a\x00"}
    add("K12", "members nobody knows", "task", official(unknown), "", code=0)
    unaligned = zipped(Part(b"odd", b"123"), Part(b"m.tflite", model))
    add("K13", "members that are not aligned", "task", unaligned, "", code=0)
    add("K01", "a web page", "task", HTML, "got an HTML page|not a TFLite")
    add("K01", "a Git LFS pointer", "task", LFS, "git lfs pull")


def _bundle_with_link(model: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("m.tflite", model)
        info = zipfile.ZipInfo("link.tflite")
        info.create_system, info.external_attr = 3, 0o120777 << 16
        archive.writestr(info, "/etc/hostname")
    return out.getvalue()


def _add_pictures(add: Add, good: Good) -> None:
    png, video = good.image.read_bytes(), good.video.read_bytes()
    jpeg = io.BytesIO()
    Image.open(good.image).save(jpeg, "JPEG")
    whole = jpeg.getvalue()
    none = "too few samples"

    def drawn(mode: str, size: tuple[int, int] = (96, 96), form: str = "PNG", **options: Any) -> Edit:
        def edit(path: Path) -> None:
            pixels = Image.fromarray(np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8))
            made = Image.fromarray(np.arange(96 * 96, dtype=np.uint16).reshape(96, 96)) if mode == "I;16" else pixels.convert(mode)
            made.save(path, form, **options)

        return edit

    def bomb(path: Path) -> None:
        head = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">2L5B", 50_000, 50_000, 1, 0, 0, 0, 0))
        path.write_bytes(head + _chunk(b"IDAT", b"x\x9c") + _chunk(b"IEND", b""))

    def folder_of(*contents: tuple[str, bytes]) -> Edit:
        def edit(path: Path) -> Path:
            (path.parent / "photos").mkdir()
            for name, content in contents:
                (path.parent / "photos" / name).write_bytes(content)
            return Path("photos")

        return edit

    def tangled(path: Path) -> Path:
        folder_of(("a.png", png), (".DS_Store", b"x"), ("Thumbs.db", b"x"), ("notes.txt", b"x"))(path)
        (path.parent / "photos" / "loop").symlink_to(path.parent / "photos")
        return Path("photos")

    add("I01", "an empty folder", "picture", folder_of(), "no images in this folder")
    add("I01", "a folder of texts", "picture", folder_of(("a.txt", b"x")), "no images in this folder")
    add("I01", "fewer samples than asked for", "picture", png, none, more=("--min-samples", "50", "--max-samples", "60"))
    add("I02", "a folder of all sorts", "picture", tangled, "", code=0)
    add("I03", "a PNG called .jpg", "picture", png, "", code=0, suffix=".jpg")
    add(
        "I03", "an EPS called .png", "picture", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", f"{none}.*PostScript|{none}"
    )
    add("I03", "a TIFF called .png", "picture", drawn("RGB", form="TIFF"), none)
    add("I04", "a JPEG cut in half", "picture", whole[: len(whole) // 2], none, suffix=".jpg")
    add("I04", "a JPEG without its end", "picture", whole[:-2], none, suffix=".jpg")
    add("I04", "a PNG cut in half", "picture", png[: len(png) // 2], none)
    add("I04", "a PNG with a flipped bit", "picture", png[:300] + bytes([png[300] ^ 1]) + png[301:], none)
    add("I05", "one pixel", "picture", drawn("RGB", (1, 1)), none)
    add("I05", "1 x 10,000 pixels", "picture", drawn("RGB", (1, 10_000)), none)
    add("I05", "odd sizes", "picture", drawn("RGB", (97, 61)), "", code=0)
    for mode in ("L", "LA", "RGBA", "P", "1", "I;16"):
        add("I06", f"mode {mode}", "picture", drawn(mode), "", code=0)
    add("I06", "CMYK", "picture", drawn("CMYK", form="JPEG"), "", code=0, suffix=".jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    add("I07", "turned by its EXIF", "picture", drawn("RGB", (96, 64), form="JPEG", exif=exif), "", code=0, suffix=".jpg")
    add("I08", "a bomb of 2.5 gigapixels", "picture", bomb, none)
    add("I09", "an animated WebP", "picture", _animated, "", code=0, suffix=".webp")
    add("I10", "a name with quotes and a newline", "picture", folder_of(("a\"\n'😀.png", png)), "", code=0)
    add("I11", "black throughout", "picture", _black, "", code=0)
    add("I01", "no bytes", "picture", b"", none)
    add("I01", "a web page called .png", "picture", HTML, none)
    add("V01", "no bytes", "picture", b"", none, suffix=".mp4")
    add("V01", "random bytes", "picture", np.random.default_rng(2).bytes(5000), none, suffix=".mp4")
    add("V01", "without its index", "picture", video[: len(video) // 2], none, suffix=".mp4")
    add("V02", "frames that are not there", "picture", _avi_with_fewer_frames, none, suffix=".avi")
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{good.video}\n".encode()
    add("V03", "a playlist called .mp4", "picture", playlist, none, suffix=".mp4")
    add(
        "V03",
        "a list of files called .avi",
        "picture",
        f"ffconcat version 1.0\nfile '{good.video}'\n".encode(),
        none,
        suffix=".avi",
    )
    for address in ("http://127.0.0.1:9/v.mp4", "rtsp://127.0.0.1/v.mp4", "pipe:0.mp4", "img_%03d.mp4"):
        add("V03", address, "picture", lambda _, a=address: Path(a), "no such source file", suffix=".mp4")
    add("V05", "sound alone", "picture", _ftyp(b"mp42") + b"\0\0\0\x08free", none, suffix=".mp4")
    small = ("--limit", "megapixels=0.005")
    add(
        "V07", "frames larger than the limit", "picture", lambda p: p.write_bytes(_avi(p)) and None, none, suffix=".avi", more=small
    )
    add("I08", "an image larger than the limit", "picture", png, none, more=small)
    add("V04", "corrupt packets in the middle", "picture", _avi_with_noise, none, suffix=".avi")
    add("C02", "a checkpoint called .png", "picture", good.pth.read_bytes(), none)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))


def _ftyp(brand: bytes) -> bytes:
    return struct.pack(">L", 16) + b"ftyp" + brand + b"\0\0\0\0"


def _animated(path: Path) -> None:
    frames = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (96, 96, 3), np.uint8)) for n in range(5)]
    frames[0].save(path, "WEBP", save_all=True, append_images=frames[1:])


def _black(path: Path) -> None:
    Image.fromarray(np.zeros((96, 96, 3), np.uint8)).save(path)


def _avi(path: Path) -> bytearray:
    import cv2

    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (96, 96))
    for number in range(12):
        writer.write(np.full((96, 96, 3), number * 20, np.uint8))
    writer.release()
    return bytearray(path.read_bytes())


def _avi_with_fewer_frames(path: Path) -> None:
    """The headers say 10^9 frames."""
    content = _avi(path)
    main, stream = content.index(b"avih") + 8 + 16, content.index(b"strh") + 8 + 32
    for place in (main, stream):
        content[place : place + 4] = struct.pack("<L", 10**9)
    path.write_bytes(content)


def _avi_with_noise(path: Path) -> None:
    content = _avi(path)
    frames = [place for place in range(len(content) - 4) if content[place : place + 4] == b"00dc"][:12]
    for place in frames[3:9]:
        content[place + 8 : place + 600] = np.random.default_rng(place).bytes(592)
    path.write_bytes(content)


def _texts(good: Good) -> Iterator[Case]:
    """Yield cards, CSV files, manifests, messages and recipes that make no sense."""

    def written(name: str, content: bytes, *arguments: str) -> Callable[[Path], list[str]]:
        def make(folder: Path) -> list[str]:
            (folder / name).write_bytes(content)
            return list(arguments)

        return make

    def card(**changes: object) -> bytes:
        path = good.folder / "changed.toml"
        return write_card(path, **changes).read_bytes()

    convert = ("--model", "card.toml", "--checkpoint", str(good.checkpoint), "-o", "out/m.tflite")
    for row, name, content, says in (
        ("T01", "a card of no bytes", b"", "model card file is empty"),
        ("T01", "a card that is no TOML", b"title = [", "not valid TOML"),
        ("T01", "a card of 10^5 nested lists", b"a = " + b"[" * 100_000, "not valid TOML"),
        ("T01", "a card with a misspelt field", card(nbitz=3), "field nbitz"),
        ("T01", "a card with a negative size", card(nbits=-1), "field nbits"),
        ("T01", "a card whose products lie elsewhere", card(output_prefix="../x"), "field output_prefix"),
    ):
        yield Case(row, name, "convert_detector", written("card.toml", content, *convert), 2, says)
    prepare = ("list.csv", "-o", "out/set")
    for name, content, says in (
        ("a CSV of no bytes", b"", "CSV file is empty"),
        ("a CSV without names", b"file\n", "names no files"),
        ("a CSV that is no text", b"file\n\xff\xfe\n", "not a CSV in UTF-8"),
        ("a CSV with a field of 10 kB", b"file\n" + b"x" * 10_000 + b".png\n", "not a CSV"),
        ("a CSV that names a device", b"file\n/dev/zero\n", "neither an image nor a video"),
    ):
        yield Case("T02", name, "prepare_calibration", written("list.csv", content, *prepare), 2, says)
    static = (str(good.onnx), "--calibration", "set.json", "-o", "out/q.onnx")
    for name, content, says in (
        ("a manifest of no bytes", b"", "manifest file is empty"),
        ("a manifest that is no JSON", b"{", "no calibration manifest"),
        ("a manifest that names files above", b'{"samples": [{"file": "../secret.png"}]}', "names no files beside it"),
        ("a manifest that names nothing there", b'{"samples": [{"file": "absent.png"}]}', "names files that are not there"),
    ):
        yield Case("T03", name, "quantize_onnx", written("set.json", content, *static), 2, says)
    for name, content, says in (
        ("messages of no bytes", b"", "messages file is empty"),
        ("messages of images elsewhere", b'{"nbits": 32, "images": [{"file": "../a.png", "message": null}]}', "lies outside"),
    ):
        reported = (str(good.tflite), str(good.tflite), "--messages", "m.json")
        yield Case("T04", name, "compare", written("m.json", content, *reported), 2, says)
    for name, content, says in (
        ("a recipe of no bytes", b"", "recipe file is empty"),
        ("a recipe that is no JSON", b"[[", "not valid JSON"),
        ("a recipe with a bad regex", b'[{"regex": "(", "operation": "*", "algorithm_key": "x", "op_config": {}}]', "bad regex"),
    ):
        reported = (str(good.tflite), "--recipe", "r.json", "-o", "out/q.tflite")
        yield Case("T05", name, "quantize_tflite", written("r.json", content, *reported), 2, says)
    for name, value, says in (
        ("an .npz of Python objects", np.array([{}], object), "Python objects"),
        ("an .npz of another shape", np.zeros((2, 5), np.float32), "does not fit input"),
    ):

        def objects(folder: Path, value: Any = value) -> list[str]:
            np.savez(folder / "set.npz", image=value)
            return [str(good.onnx), "--calibration", "set.npz", "-o", "out/q.onnx"]

        yield Case("T06", name, "quantize_onnx", objects, 2, says)


def _outputs(good: Good) -> Iterator[Case]:
    """Yield places that can't be written to, for each tool."""
    weights, model, network = str(good.checkpoint), str(good.tflite), str(good.onnx)
    tools = {
        "extract_weights": ([weights], "out/w.safetensors"),
        "convert_detector": (["--model", str(good.card), "--checkpoint", weights], "out/m.tflite"),
        "quantize_tflite": ([model], "out/q.tflite"),
        "quantize_onnx": ([network, "--recipe", "int8"], "out/q.onnx"),
        "verify": ([model], "out/v.json"),
        "compare": ([model, model + "x"], "out/c.json"),
        "prepare_calibration": (["--synthetic", "8"], "out/set/manifest.json"),
    }
    tools["compare"][0][1] = str(good.folder / "copy.tflite")
    (good.folder / "copy.tflite").write_bytes(good.tflite.read_bytes())
    for tool, (given, target) in tools.items():
        named = str(Path(target).parent) if tool == "prepare_calibration" else target

        def at(
            output: str, given: list[str] = given, prepare: Callable[[Path], object] = lambda _: None
        ) -> Callable[[Path], list[str]]:
            def make(folder: Path) -> list[str]:
                prepare(folder)
                return [*given, "-o", output]

            return make

        yield Case("X01", "an output that exists", tool, at(named), 2, "exists|other files|would", before={target: b"precious"})
        if tool != "prepare_calibration":
            yield Case("X02", "a folder that is not there", tool, at("absent/deeper/x" + Path(target).suffix), 2, "no such folder")
            yield Case("X03", "an output that is a folder", tool, at(named, prepare=_mkdir(target)), 2, "is a folder")
            yield Case("X03", "an output that is a pipe", tool, at(named, prepare=_mkfifo(target)), 2, "no regular file|exists")
            for where in ("victim.txt", "nowhere"):
                linked = at(named, [*given, "--overwrite"], _link(target, where))
                yield Case("X04", f"an output that is a link to {where}", tool, linked, 2, "is a symbolic link")
        yield Case(
            "X02", "a folder that is a file", tool, at("victim.txt/x" + Path(target).suffix), 2, "folder|Not a directory|not a dir"
        )
        env = {"HOME": "/nonexistent", "LC_ALL": "C", "PYTHONUTF8": "0"}
        if tool in ("verify", "extract_weights", "prepare_calibration"):
            yield Case("X18", "no home, no locale", tool, at(named), 0, "", env)
    for tool, arguments in {
        "extract_weights": ["in.safetensors", "-o", "in.safetensors"],
        "quantize_tflite": ["in.tflite", "-o", "in.tflite"],
        "quantize_onnx": ["in.onnx", "--recipe", "int8", "-o", "in.onnx"],
        "verify": ["in.tflite", "-o", "in.tflite"],
    }.items():
        source = {"safetensors": good.checkpoint, "tflite": good.tflite, "onnx": good.onnx}[arguments[0].partition(".")[2]]
        for kind in ("itself", "a hard link to it", "another way to it"):

            def onto(folder: Path, arguments: list[str] = arguments, source: Path = source, kind: str = kind) -> list[str]:
                (folder / arguments[0]).write_bytes(source.read_bytes())
                if kind == "a hard link to it":
                    (folder / f"link.{arguments[0]}").hardlink_to(folder / arguments[0])
                target = {"itself": arguments[0], "a hard link to it": f"link.{arguments[0]}"}.get(kind, f"./out/../{arguments[0]}")
                return [*arguments[:-1], target, "--overwrite"]

            row = "O17" if tool == "quantize_onnx" else "X05"
            yield Case(row, f"the input as output: {kind}", tool, onto, 2, "the output is the input|other than")

    def stale_data(folder: Path) -> list[str]:
        return [network, "--recipe", "int8", "-o", "out/q.onnx"]

    yield Case("O16", "a stranger's file beside the output", "quantize_onnx", stale_data, 0, "", before={"out/q.data": b"precious"})

    def stale_draft(folder: Path) -> list[str]:
        from shared.files import atomic

        (folder / "out" / f".w.safetensors.{atomic._scope()}-999999999.partial").write_bytes(b"half")
        return [weights, "-o", "out/w.safetensors"]

    yield Case("X14", "a draft of a dead run", "extract_weights", stale_draft, 0)
    yield Case(
        "X17",
        "a folder for temporary files that is not there",
        "quantize_tflite",
        lambda _: [model, "-o", "out/q.tflite"],
        0,
        "",
        {"TMPDIR": "/nonexistent"},
    )
    yield Case(
        "X19",
        "a name of 300 characters to write",
        "extract_weights",
        lambda _: [weights, "-o", f"out/{'x' * 300}.safetensors"],
        2,
        "too long",
    )
    yield Case("X20", "no network", "extract_weights", _download(good), 2, "the download stopped|answered")
    yield Case("X22", "an error as JSON", "verify", lambda _: ["absent.tflite"], 2, "no such model file")


def _download(good: Good) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        text = good.card.read_text().replace("https://example.org/small.pth", "http://127.0.0.1:1/absent.pth")
        (folder / "card.toml").write_text(text)
        return ["--model", "card.toml", "--download", "-o", "out/w.safetensors"]

    return make


def _mkdir(target: str) -> Callable[[Path], object]:
    return lambda folder: (folder / target).mkdir()


def _mkfifo(target: str) -> Callable[[Path], object]:
    return lambda folder: os.mkfifo(folder / target)


def _link(target: str, where: str) -> Callable[[Path], object]:
    return lambda folder: (folder / target).symlink_to(folder / where)
