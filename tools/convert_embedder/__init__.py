from tools.convert_embedder.command import convert_embedder

__all__ = ["convert_embedder"]
