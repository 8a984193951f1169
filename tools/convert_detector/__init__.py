from tools.convert_detector.command import convert_detector

__all__ = ["convert_detector"]
