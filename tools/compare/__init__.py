from tools.compare.command import compare

__all__ = ["compare"]
