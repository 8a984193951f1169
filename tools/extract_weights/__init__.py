from tools.extract_weights.command import extract_weights

__all__ = ["extract_weights"]
