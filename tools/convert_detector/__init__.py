from tools.convert_detector.command import Format, Output, Quantize, UseRehearsal, convert_detector
from tools.convert_detector.conversion import rehearsal_path
from tools.convert_detector.export import export_onnx, export_tflite, seeded_weights
from tools.convert_detector.job import Conversion, convert_network
from tools.convert_detector.network import CHECK_SEED, Network, Reference, Writing, run_in_torch
from tools.convert_detector.request import ModelFormat, Precision, choose_format, joined

__all__ = [  # all but one are for convert_embedder, which goes the same way
    "CHECK_SEED",
    "Conversion",
    "Format",
    "ModelFormat",
    "Network",
    "Output",
    "Precision",
    "Quantize",
    "Reference",
    "UseRehearsal",
    "Writing",
    "choose_format",
    "convert_detector",
    "convert_network",
    "export_onnx",
    "export_tflite",
    "joined",
    "rehearsal_path",
    "run_in_torch",
    "seeded_weights",
]
