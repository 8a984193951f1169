from tools.quantize_tflite.command import quantize_tflite

__all__ = ["quantize_tflite"]
