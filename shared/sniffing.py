"""The first bytes of a stranger's file: what it is not, said in one line."""

from pathlib import Path

from shared.errors import ToolError

HEAD_BYTES = 64


def read_head(path: Path) -> bytes:
    """Return the first bytes of a model file.

    Raises:
        ToolError: The file is missing, empty, or a Git LFS pointer.
    """
    if not path.is_file():
        raise ToolError("no such model file", where=path, remedy="check the path")
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if not head:
        raise ToolError("the model file is empty", where=path, remedy="convert or download it again")
    if head.startswith(b"version https://git-lfs"):
        raise ToolError("this is a Git LFS pointer, not the model", where=path, remedy="run 'git lfs pull'")
    return head
