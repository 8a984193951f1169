"""What this machine has: CPUs, free memory within any limit set on the process, free disk; what a process took, what work needs."""

import os
import platform
import resource
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from shared.command.errors import ToolError

GIB = 2**30
MIB = 2**20


def size_text(size_bytes: float) -> str:
    """Return a size in MiB, or in KiB or bytes where that is too coarse."""
    if abs(size_bytes) >= MIB:
        return f"{size_bytes / MIB:.1f} MiB"
    return f"{size_bytes / 1024:.1f} KiB" if abs(size_bytes) >= 1024 else f"{size_bytes:.0f} B"


def cpu_count() -> int:
    """Return the number of CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """Return the CPU's name as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def peak_rss_bytes(*, children: bool = False) -> int:
    """Return the largest resident set so far, memory-mapped files included, of this process or its finished children."""
    status = Path("/proc/self/status")
    if not children and status.exists():  # getrusage would count what the parent had when it forked
        high_water = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(high_water.split()[1]) * 1024
    who = resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(who).ru_maxrss * unit


def available_memory_bytes() -> int | None:
    """Return the memory that can still be taken without swapping, or None where the system does not tell (not Linux)."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    return min([available, *_control_group_headroom()])


def _control_group_headroom() -> list[int]:
    """Return limit minus usage of each memory control group around this process; pages of files can be dropped, so don't count."""
    headroom = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            root, limit, usage, cache = (
                Path("/sys/fs/cgroup/memory"),
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_cache",
            )
        elif controllers == "":
            root, limit, usage, cache = Path("/sys/fs/cgroup"), "memory.max", "memory.current", "file"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root) or not (folder / limit).exists():
                continue
            text = (folder / limit).read_text().strip()
            if text == "max":
                continue
            stat = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
            headroom.append(int(text) - int((folder / usage).read_text()) + int(stat.get(cache, 0)))
    return headroom


def require_memory(need_bytes: int, purpose: str) -> None:
    """Raise ToolError when the memory that can still be taken is less than `need_bytes`."""
    have = available_memory_bytes()
    if have is not None and have < need_bytes:
        raise ToolError(
            f"not enough free memory to {purpose}",
            got=f"{have / GIB:.1f} GiB",
            expected=f"at least {need_bytes / GIB:.1f} GiB",
            remedy="close other programs, raise the memory limit, or use a larger machine",
        )


def require_disk(need_bytes: int, folder: Path, purpose: str) -> None:
    """Raise ToolError when the disk that holds `folder` has less than `need_bytes` free, or there is no such folder."""
    if not folder.is_dir():
        raise ToolError("no such folder to write to", where=folder, remedy="create it or choose another with -o")
    have = shutil.disk_usage(folder).free
    if have < need_bytes:
        raise ToolError(
            f"not enough free disk to {purpose}",
            where=folder,
            got=f"{have / GIB:.1f} GiB",
            expected=f"at least {need_bytes / GIB:.1f} GiB",
            remedy="free some space or write elsewhere with -o",
        )


@dataclass(frozen=True)
class ResourceEstimate:
    """What making a product takes, at most.

    Args:
        purpose: What for, as in 'not enough free memory to ...'.
        product_bytes: Size of the product, all its files.
        disk_bytes: In the product's folder while it is made, the product included.
        memory_bytes: Memory that can't be dropped.
        workspace_bytes: In the folder for temporary files.
    """

    purpose: str = "write the product"
    product_bytes: int = 0
    disk_bytes: int = 0
    memory_bytes: int = 0
    workspace_bytes: int = 0

    def require(self, folder: Path) -> None:
        """Raise ToolError where the disk of `folder`, that of temporary files, or the memory does not suffice."""
        require_disk(self.disk_bytes, folder, self.purpose)
        require_disk(self.workspace_bytes, Path(tempfile.gettempdir()), self.purpose)
        require_memory(self.memory_bytes, self.purpose)
