from tools.quantize_onnx.command import quantize_onnx

__all__ = ["quantize_onnx"]
