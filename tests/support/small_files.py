"""Small valid files of every format that strangers give us, made by code; tests/support/fuzz.py changes them."""

import io
import json
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import flatbuffers
import numpy as np
import torch
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.torch import save

from shared.formats.tflite_metadata import append_metadata
from shared.networks.card import CARDS
from tests.support.corruptions import END64, LOCATOR64, rezip
from tests.support.small_onnx import save_picture_model, with_external_weights
from tests.tools.quantize_tflite.test_bundle import CONTENTS, END, Part, nested, official, streamed, zipped


def bundles() -> list[bytes]:
    """Return MediaPipe bundles: as the official packer writes them, with a bundle inside, with sizes behind the data, with text."""
    inside = official({"a.tflite": b"\x1c\0\0\0TFL3" + bytes(40), "inner.task": nested(1)})
    return [
        official(CONTENTS),
        zipped(Part()),
        inside,
        streamed({"a.tflite": b"\x1c\0\0\0TFL3" + bytes(40)}),
        rezip([("é.txt", b"x")]),
        with_zip64(zipped(Part())),
    ]


def checkpoints() -> list[bytes]:
    """Return .pth and .safetensors files: bare and inside a training state, of several types, sharing a storage."""
    whole = torch.arange(12, dtype=torch.float32)
    state = {"detector.w": whole.reshape(3, 4), "detector.part": whole[2:5], "detector.half": torch.ones(2, 2, dtype=torch.float16)}
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 1]]), torch.ones(2), (2,), check_invariants=True)
    others = {"optimizer": {"state": {0: {"step": torch.tensor(1), "at": [torch.zeros(2), sparse]}}}, "epoch": 3, "args": "x"}
    saved = []
    for content in (state, {"model": state, **others}, {"state_dict": {f"module.{key}": value for key, value in state.items()}}):
        file = io.BytesIO()
        torch.save(content, file)
        saved.append(file.getvalue())
    flat = {key: value.clone() for key, value in state.items()}
    return [*saved, save(flat), save(flat, {"args": "x", "rehearsal": "seed 0"})]


def tflites() -> list[bytes]:
    """Return TFLite models of a few ops: plain; with weights behind; with metadata and label files appended."""
    plain = _tflite()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.tflite"
        path.write_bytes(plain)
        append_metadata(path, {"nbits": 32, "image_size": 8})
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(zipfile.ZipInfo("labels.txt"), "cat\ndog\n")
        appended = path.read_bytes()
    behind = _tflite(behind=True)
    return [plain, behind, appended, with_zip64(appended)]


def _tflite(*, behind: bool = False) -> bytes:
    types, ops = schema.TensorType, schema.BuiltinOperator
    weights = np.arange(12, dtype=np.float32)
    content = [None, weights, weights[:4].astype(np.float16), np.arange(8, dtype=np.int8), np.ones(1, np.int64), _pixel_metadata()]
    buffers = [schema.BufferT(data=None if data is None else np.frombuffer(bytes(data), np.uint8)) for data in content]
    if behind:
        buffers[1] = schema.BufferT(data=None, offset=2, size=48)

    def tensor(name: str, shape: list[int], kind: int, buffer: int = 0, **more: Any) -> Any:
        return schema.TensorT(name=name.encode(), shape=shape, type=kind, buffer=buffer, **more)

    scales = schema.QuantizationParametersT(scale=[0.5, 0.25], zeroPoint=[0, 0], quantizedDimension=0)
    tensors = [
        tensor("image", [1, 2, 2, 3], types.FLOAT32, shapeSignature=[-1, 2, 2, 3]),
        tensor("weights", [4, 1, 1, 3], types.FLOAT32, 1),
        tensor("half", [4], types.FLOAT16, 2),
        tensor("bias", [4], types.FLOAT32),
        tensor("made", [1, 2, 2, 4], types.FLOAT32),
        tensor("int8", [2, 4], types.INT8, 3, quantization=scales),
        tensor("same", [2, 2], types.FLOAT32),
        tensor("same", [2, 2], types.FLOAT32),
        tensor("step", [1], types.INT64, 4),
    ]
    options = {
        "builtinOptionsType": schema.BuiltinOptions.Conv2DOptions,
        "builtinOptions": schema.Conv2DOptionsT(strideW=1, strideH=1),
    }
    graph = schema.SubGraphT(
        tensors=tensors,
        inputs=[0],
        outputs=[7],
        operators=[
            schema.OperatorT(opcodeIndex=1, inputs=[2], outputs=[3]),
            schema.OperatorT(opcodeIndex=0, inputs=[0, 1, 3], outputs=[4], **options),
            schema.OperatorT(opcodeIndex=2, inputs=[4, 5, -1], outputs=[6]),
            schema.OperatorT(opcodeIndex=3, inputs=[6, 8], outputs=[7], customOptions=[1, 2, 3]),
        ],
        name=b"main",
    )
    codes = [(ops.CONV_2D, None), (ops.DEQUANTIZE, None), (ops.FULLY_CONNECTED, None), (ops.CUSTOM, b"Mine")]
    signature = schema.SignatureDefT(
        inputs=[schema.TensorMapT(name=b"image", tensorIndex=0)],
        outputs=[schema.TensorMapT(name=b"out", tensorIndex=7)],
        signatureKey=b"serving_default",
    )
    model = schema.ModelT(
        version=3,
        operatorCodes=[schema.OperatorCodeT(builtinCode=c, deprecatedBuiltinCode=c, customCode=n, version=1) for c, n in codes],
        subgraphs=[graph],
        description=b"small",
        buffers=buffers,
        metadata=[schema.MetadataT(name=b"TFLITE_METADATA", buffer=5)],
        signatureDefs=[signature],
    )
    found = bytes(flatbuffer_utils.convert_object_to_bytearray(model))
    if not behind:
        return found
    buffers[1].offset = len(found)  # as long as before: the number is not 0 in either
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model)) + weights.tobytes()


def _pixel_metadata() -> bytes:
    """Return TFLite metadata that says (pixel - 127.5) / 127.5."""
    builder = flatbuffers.Builder(0)

    def floats(value: float) -> int:
        builder.StartVector(4, 1, 4)
        builder.PrependFloat32(value)
        return int(builder.EndVector())

    def table(fields: dict[int, int], kind: int = 0) -> int:
        builder.StartObject(8)
        for number, place in fields.items():
            builder.PrependUOffsetTRelativeSlot(number, place, 0)
        if kind:
            builder.PrependUint8Slot(0, kind, 0)
        return int(builder.EndObject())

    def tables(place: int) -> int:
        builder.StartVector(4, 1, 4)
        builder.PrependUOffsetTRelative(place)
        return int(builder.EndVector())

    mean, std = floats(127.5), floats(127.5)
    unit = table({1: table({0: mean, 1: std})}, kind=1)
    tensor = table({4: tables(unit)})
    builder.Finish(table({3: tables(table({2: tables(tensor)}))}))
    return bytes(builder.Output())


def onnxes() -> list[bytes]:
    """Return ONNX models: plain with metadata; weights in a file beside; graphs in nodes, sparse weights, functions."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.onnx"
        metadata = {"edgepress": json.dumps({"nbits": 8, "input_range": "0..1"})}
        plain = save_picture_model(path, widths=(2,), metadata=metadata).read_bytes()
        beside = with_external_weights(path).read_bytes()
    return [plain, beside, _onnx_with_everything()]


def _onnx_with_everything() -> bytes:
    value = helper.make_tensor_value_info
    nothing: list[Any] = []
    then = helper.make_graph(
        [helper.make_node("Constant", [], ["t"], value=numpy_helper.from_array(np.ones(2, np.float32), "t"))],
        "then",
        nothing,
        [value("t", TensorProto.FLOAT, [2])],
    )
    half = helper.make_tensor("h", TensorProto.BFLOAT16, [2], [1.0, 2.0])
    four = helper.make_tensor("i", TensorProto.INT4, [3], [1, -2, 3])
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.ones(1, np.float32), "s"), numpy_helper.from_array(np.zeros(1, np.int64), "at"), [4]
    )
    nodes = [
        helper.make_node("If", ["c"], ["x"], then_branch=then, else_branch=then),
        helper.make_node("Twice", ["x"], ["y"], domain="own"),
        helper.make_node("Constant", [], ["k"], sparse_value=sparse),
    ]
    graph = helper.make_graph(
        nodes,
        "all",
        [value("c", TensorProto.BOOL, [])],
        [value("y", TensorProto.FLOAT, ["n"])],
        [half, four],
        sparse_initializer=[sparse],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
    function = helper.make_function("own", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], opsets[:1])
    return bytes(helper.make_model(graph, opset_imports=opsets, functions=[function]).SerializeToString())


def cards() -> list[bytes]:
    """Return model cards: one that ships, and a short one with an address."""
    short = 'title="a"\nnbits=8\ndepths=[1,1,1,1]\ndims=[8,8,8,8]\nstem_stride=4\nimage_size=64\noutput_prefix="a"\n[checkpoint]\n'
    return [(CARDS / "miniseal.toml").read_bytes(), f'{short}url="https://example.org/a.pth"\nsha256="{"0" * 64}"\n'.encode()]


def lists() -> list[bytes]:
    """Return CSV files that name images and videos."""
    quoted = b'\xef\xbb\xbf"video","time"\r\n"a b.mp4",0.5\r\n"a b.mp4",1e1\r\n'
    return [b"file,frame\na.png,\nb.mp4,3\nb.mp4,7\n\n", quoted, b"path,frame,seconds\nx/y.jpg,,\nc.mov,,2\n"]


def arrays() -> list[bytes]:
    """Return calibration sets as .npz: images, and arrays of another type, with an axis more."""
    values, found = np.linspace(0, 1, 24), []
    for name, array in (("image", values.reshape(2, 3, 2, 2).astype(np.float32)), ("images", values.reshape(2, 1, 3, 2, 2))):
        file = io.BytesIO()
        np.save(file, array)
        found.append(rezip([(f"{name}.npy", file.getvalue())]))
    return found


def manifests() -> list[bytes]:
    """Return calibration manifests, of samples and of tiles."""
    samples = {"samples": [{"file": "tile.png", "frame": 1}], "holdout": [{"file": "tile.png"}], "seed": 0}
    return [json.dumps(samples).encode(), json.dumps({"tiles": [{"file": "tile.png"}]}).encode()]


def images() -> list[bytes]:
    """Return small images of all formats and several modes."""
    found = []
    picture = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation
    saves: list[tuple[str, str, dict[str, Any]]] = [
        ("RGB", "PNG", {"exif": turned}), ("P", "PNG", {}), ("I;16", "PNG", {}), ("RGB", "JPEG", {"exif": turned}),
        ("CMYK", "JPEG", {}), ("RGB", "WEBP", {}), ("RGB", "BMP", {}),
    ]  # fmt: skip
    for mode, kind, options in saves:
        file = io.BytesIO()
        image = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)) if mode == "I;16" else picture.convert(mode)
        image.save(file, kind, **options)
        found.append(file.getvalue())
    return found


def with_zip64(data: bytes) -> bytes:
    """Return a zip with the end records of large ones before its own."""
    content, end = data[: -END.size], data[-END.size :]
    *_, count, directory_size, start, _ = END.unpack(end)
    large = END64.pack(b"PK\6\6", END64.size - 12, 45, 45, 0, 0, count, count, directory_size, start)
    return content + large + LOCATOR64.pack(b"PK\6\7", 0, len(content), 1) + end
