"""What the machine has is told, and too little is an error that says how much is needed."""

from pathlib import Path

import pytest

from shared.command.errors import ToolError
from shared.command.resources import GIB, available_memory_bytes, cpu_count, peak_rss_bytes, require_disk, require_memory


def test_the_machine_has_cpus_and_memory() -> None:
    assert cpu_count() >= 1
    available = available_memory_bytes()
    assert available is None or 0 < available < 2**50
    assert 2**20 < peak_rss_bytes() < 2**45


def test_too_little_memory_is_an_error_with_the_need() -> None:
    require_memory(1, "think")
    with pytest.raises(ToolError, match=r"not enough free memory to think; got .* GiB; expected at least 9765625.0 GiB"):
        require_memory(9765625 * GIB, "think")


def test_too_little_disk_is_an_error_with_the_need(tmp_path: Path) -> None:
    require_disk(1, tmp_path, "write")
    with pytest.raises(ToolError, match=r"not enough free disk to write.*at least 9765625.0 GiB"):
        require_disk(9765625 * GIB, tmp_path, "write")
