"""How much memory this process may use and how much of it is free, the limits of a container included.

Called by build.py for sizing and by checkpoint.py before weights are read. The kernel tells what the machine
has, its control groups what the container may take of it (v2: memory.max, v1: memory.limit_in_bytes); the
least counts. Plain Python: knows nothing of devices.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

V2_FILES = ("memory.max", "memory.current")
V1_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    total_bytes: int
    free_bytes: int  # what can be had without swapping


def read_host_memory(root: Path = Path("/")) -> HostMemory:
    """Of the machine, or of the tightest control group that holds this process. `root` is for tests."""
    found = [_read_machine(root)]
    for folder, limit_file, usage_file in _list_groups(root):
        limit, usage = _read_number(folder / limit_file), _read_number(folder / usage_file)
        if limit is not None and limit < found[0].total_bytes:  # v1 writes a huge number for no limit
            used = max((usage or 0) - _count_reclaimable(folder), 0)
            found.append(HostMemory(total_bytes=limit, free_bytes=max(limit - used, 0)))
    return HostMemory(
        total_bytes=min(memory.total_bytes for memory in found),
        free_bytes=min(memory.free_bytes for memory in found),
    )


def _read_machine(root: Path) -> HostMemory:
    total_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    sizes = _read_table(root / "proc/meminfo", scale=1024)
    total_bytes = sizes.get("MemTotal", total_bytes)
    return HostMemory(total_bytes=total_bytes, free_bytes=sizes.get("MemAvailable", total_bytes // 2))


def _list_groups(root: Path) -> list[tuple[Path, str, str]]:
    """The folders of this process's control groups, from its own up to the root, and their two files.

    Inside a container the path that /proc tells may be the host's: then only the mount's own root is there.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    groups: list[tuple[Path, str, str]] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, (limit, usage) = root / "sys/fs/cgroup", V2_FILES
        elif "memory" in controllers.split(","):
            mount, (limit, usage) = root / "sys/fs/cgroup/memory", V1_FILES
        else:
            continue
        inner = Path(path.lstrip("/"))
        groups += [(mount / part, limit, usage) for part in (inner, *inner.parents)]
    return groups


def _count_reclaimable(folder: Path) -> int:
    """Bytes of file cache that the group can do without at once."""
    sizes = _read_table(folder / "memory.stat", scale=1)
    return sizes.get("inactive_file", sizes.get("total_inactive_file", 0))


def _read_table(path: Path, scale: int) -> dict[str, int]:
    """Lines of a name and a number."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    words = [line.replace(":", "").split() for line in lines]
    return {word[0]: int(word[1]) * scale for word in words if len(word) > 1 and word[1].isdigit()}


def _read_number(path: Path) -> int | None:
    """A file's number; None if there is no file, or no limit ("max")."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
