"""The process behind `tools.quantize_tflite`: AI Edge Quantizer, with both files memory-mapped."""

import os
from pathlib import Path

from shared.child import Arrays, Message, serve
from shared.errors import ToolError
from shared.upstream import large_weights_quantized


def handle(message: Message, _: Arrays) -> tuple[Message, Arrays]:
    """Quantize `source` by `rules` into `draft`; the file is written through a mapping, never held in memory."""
    os.environ["TQDM_DISABLE"] = "1"
    from ai_edge_quantizer import quantizer

    source = Path(message["source"])
    try:
        job = quantizer.Quantizer(str(source), message["rules"])
        needs_calibration = job.need_calibration
    except (ValueError, KeyError, TypeError) as error:
        raise ToolError("AI Edge Quantizer rejects the recipe or the model", where=source, got=error) from None
    if needs_calibration:
        remedy = "static recipes are not supported yet; int8 needs no samples"
        raise ToolError(f"recipe {message['recipe']} needs a calibration set", where=source, remedy=remedy)
    with large_weights_quantized():
        job.quantize(serialize_to_path=message["draft"], enable_progress_bar=False, enable_progress_report=False)
    return {}, {}


if __name__ == "__main__":
    serve(handle)
