"""A model file, parsed once: its kind, files, size, ops and metadata, whatever its format."""

import re
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, assert_never

from shared.formats.input_hints import InputHints
from shared.formats.onnx_graph import OnnxContent, OnnxOp, read_onnx
from shared.formats.tflite import Op, TfliteContent, read_tflite

Kind = Literal["tflite", "onnx"]
ONNX_SUFFIX = ".onnx"
DRAFT = re.compile(r"\.[0-9a-f]{8}-\d+\.partial$")  # see `shared.files.atomic.draft_beside`
DATA = ".data"  # suffix of the file that holds the weights of a large ONNX model
SLOW_DYNAMIC = "ONNX Runtime finds the range of every activation at each run and has no fast convolution for the result"
SLOW_HALF = "this CPU converts float16 to float32 to compute; float16 saves size, and time only on GPUs and NPUs"
SLOW_STATIC = (
    "integer kernels are slower than float ones on this CPU, or conversions at the ops left in float eat the gain; "
    "quantize other op types, or let recipe auto measure"
)
STATIC_OPS = {"QuantizeLinear", "QLinearConv", "QLinearMatMul"}
DYNAMIC_OPS = {"DynamicQuantizeLinear", "ConvInteger", "MatMulInteger", "DynamicQuantizeLSTM"}


class ModelFile:
    """A .tflite or .onnx file. The name tells the format; a draft's is the name of the product, with more after it.

    The file is parsed when its content is asked for the first time, and the content is kept.

    Args:
        path: The file.
        content: What it holds, where that is known already.
    """

    def __init__(self, path: Path, content: TfliteContent | OnnxContent | None = None) -> None:
        self.path = path
        self.kind: Kind = kind_of(path)
        if content is not None:
            self.content = content

    def __repr__(self) -> str:
        return f"ModelFile({str(self.path)!r})"

    @cached_property
    def content(self) -> TfliteContent | OnnxContent:
        """What the file holds.

        Raises:
            ToolError: No model of its format, or a damaged one.
        """
        return read_onnx(self.path) if self.kind == "onnx" else read_tflite(self.path)

    def check(self) -> None:
        """Raise ToolError unless the file is a sound model of its format."""
        _ = self.content

    @property
    def files(self) -> list[Path]:
        """The model's file and those next to it that hold its weights."""
        return [self.path, *(self.content.files if isinstance(self.content, OnnxContent) else ())]

    @property
    def size_bytes(self) -> int:
        """Size of all its files."""
        files = self.files if self.kind == "onnx" else [self.path]
        return sum(file.stat().st_size for file in files)

    def move(self, target: Path) -> None:
        """Move the file to `target`, and the file that holds the weights of a large ONNX model, if any, to `<target>.data`."""
        for file in self.files[1:] if self.kind == "onnx" else ():
            shutil.move(file, target.with_name(f"{target.name}{DATA}"))
        shutil.move(self.path, target)

    @property
    def ops(self) -> list[Op] | list[OnnxOp]:
        """Its ops, in the order of the graph."""
        return self.content.ops

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata of one of our models; empty for others."""
        return self.content.metadata

    @property
    def input_range(self) -> tuple[float, float] | None:
        """Range of its image input for pixels from 0 to 255, as its own metadata gives it, or None."""
        return self.content.input_range

    @property
    def hints(self) -> InputHints:
        """What its first ops tell about its inputs."""
        return self.content.hints

    @property
    def nbits(self) -> int | None:
        """Message length of one of our detectors, or None."""
        nbits = self.metadata.get("nbits")
        is_detector = self.metadata.get("component", "detector") == "detector"
        return nbits if is_detector and isinstance(nbits, int) and nbits > 0 else None

    def why_slow(self) -> str:
        """Return what in the model makes it slow on a CPU, and what to take instead; empty where nothing known does."""
        match self.content:
            case TfliteContent(restored_types=[_, *_] as types):
                return f"its {', '.join(types)} weights are unpacked to float32, which saves size, not time; for speed take int8"
            case TfliteContent():
                return ""
            case OnnxContent() as content:
                kinds = {op.op_type for op in content.ops}
                if kinds & DYNAMIC_OPS:
                    return f"{SLOW_DYNAMIC}; quantize it statically, with samples"
                if any(dtype == "FLOAT16" for dtype, _ in content.constants.values()):
                    return SLOW_HALF
                return SLOW_STATIC if kinds & STATIC_OPS else ""
            case _ as never:
                assert_never(never)


def kind_of(path: Path) -> Kind:
    """Return a model file's format by its name."""
    return "onnx" if DRAFT.sub("", path.name).endswith(ONNX_SUFFIX) else "tflite"
