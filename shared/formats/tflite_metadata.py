"""What a .tflite file says of itself next to its graph: the metadata of our models and of TFLite's task library.

The metadata of our models is a small zip appended to the flatbuffer, the way TFLite models carry associated files. Runtimes ignore
it; `unzip -p model.tflite edgepress.json` shows it.

Source: https://ai.google.dev/edge/litert/conversion/tensorflow/metadata (appended associated files)
"""

import contextlib
import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from shared.files.zip_layout import ZIP_DAMAGE

METADATA_NAME = "edgepress.json"
MAX_METADATA_BYTES = 2**16


def append_metadata(path: Path, content: Mapping[str, object]) -> None:
    """Append the metadata of one of our models as a zip with one stored, undated entry: the same content, the same bytes."""
    entry = zipfile.ZipInfo(METADATA_NAME, date_time=(1980, 1, 1, 0, 0, 0))
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        archive.writestr(entry, json.dumps(content, sort_keys=True))


def read_metadata(file: IO[bytes]) -> dict[str, Any]:
    """Return the metadata of one of our models from its open file; empty where the file has none."""
    try:
        with zipfile.ZipFile(file) as archive:
            if archive.getinfo(METADATA_NAME).file_size > MAX_METADATA_BYTES:
                return {}
            content = json.loads(archive.read(METADATA_NAME))
            return content if isinstance(content, dict) else {}
    except (*ZIP_DAMAGE, RecursionError):
        return {}


def task_library_range(model: Any, damage: tuple[type[Exception], ...]) -> tuple[float, float] | None:
    """Return the range of a model's first input for pixels from 0 to 255, as TFLite's metadata gives it, or None.

    Args:
        model: The model's root table.
        damage: What reading metadata of another version can raise.

    Source: https://github.com/tensorflow/tflite-support/blob/v0.4.4/tensorflow_lite_support/metadata/metadata_schema.fbs
        (ModelMetadata, SubGraphMetadata, TensorMetadata, NormalizationOptions)
    """
    for entry in (model.Metadata(i) for i in range(model.MetadataLength())):
        if entry.Name() == b"TFLITE_METADATA":
            content = _buffer_content(model.Buffers(entry.Buffer()))
            with contextlib.suppress(*damage):
                return _normalised_range(content)
    return None


def _buffer_content(buffer: Any) -> bytes:
    if buffer.DataLength():
        return bytes(buffer.DataAsNumpy())
    start = buffer.Offset()
    return bytes(buffer._tab.Bytes[start : start + buffer.Size()])  # noqa: SLF001 - the generated code has no public way to a buffer after the flatbuffer


def _normalised_range(content: bytes) -> tuple[float, float] | None:
    """Return (0 - mean) / std and (255 - mean) / std of the first input's normalisation."""
    import flatbuffers
    from flatbuffers.table import Table

    uint32 = flatbuffers.number_types.UOffsetTFlags
    float32, uint8 = flatbuffers.number_types.Float32Flags, flatbuffers.number_types.Uint8Flags

    def field(table: Any, number: int) -> int:
        return int(table.Offset(4 + 2 * number))

    def tables(table: Any, number: int) -> list[Any]:
        offset = field(table, number)
        if not offset:
            return []
        start, length = table.Vector(offset), table.VectorLen(offset)
        return [Table(table.Bytes, table.Indirect(start + 4 * i)) for i in range(length)]

    def first_float(table: Any, number: int) -> float:
        return float(table.Get(float32, table.Vector(field(table, number))))

    root = Table(content, int(flatbuffers.encode.Get(uint32.packer_type, content, 0)))
    tensor = tables(tables(root, 3)[0], 2)[0]  # the first subgraph's first input
    for unit in tables(tensor, 4):
        if unit.Get(uint8, unit.Pos + field(unit, 0)) == 1:  # normalisation
            options = Table(content, unit.Indirect(unit.Pos + field(unit, 1)))
            mean, std = first_float(options, 0), first_float(options, 1)
            low, high = (0 - mean) / std, (255 - mean) / std
            return (low, high) if math.isfinite(low) and math.isfinite(high) else None
    return None
