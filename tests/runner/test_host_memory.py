"""The memory a process may use is that of its container, where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxserve.runner.host_memory import read_host_memory

GIB = 1 << 30


def make_machine(root: Path, files: dict[str, str]) -> Path:
    """A machine of 64 GiB, 40 of them available, and these files."""
    meminfo = f"MemTotal: {64 << 20} kB\nMemFree: 1 kB\nMemAvailable: {40 << 20} kB\n"
    for name, text in {"proc/meminfo": meminfo, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def read_gib(root: Path) -> tuple[float, float]:
    memory = read_host_memory(root)
    return memory.total_bytes / GIB, memory.free_bytes / GIB


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (64, 40)),
        # v2: no limit of its own, but its parent has one; a quarter of what is used is cache that can go.
        (
            {
                "proc/self/cgroup": "0::/pod/box\n",
                "sys/fs/cgroup/pod/box/memory.max": "max\n",
                "sys/fs/cgroup/pod/memory.max": f"{8 * GIB}\n",
                "sys/fs/cgroup/pod/memory.current": f"{4 * GIB}\n",
                "sys/fs/cgroup/pod/memory.stat": f"anon 5\ninactive_file {GIB}\n",
            },
            (8, 5),
        ),
        # v2 in a container: the path is the host's, the limit lies at the mount's root.
        (
            {
                "proc/self/cgroup": "0::/kubepods/x\n",
                "sys/fs/cgroup/memory.max": f"{2 * GIB}\n",
                "sys/fs/cgroup/memory.current": f"{GIB}\n",
            },
            (2, 1),
        ),
        # v1, and the huge number that stands for no limit.
        (
            {
                "proc/self/cgroup": "5:cpu:/\n4:memory:/docker/a\n",
                "sys/fs/cgroup/memory/docker/a/memory.limit_in_bytes": f"{16 * GIB}\n",
                "sys/fs/cgroup/memory/docker/a/memory.usage_in_bytes": f"{6 * GIB}\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            (16, 10),
        ),
        # A group that may take more than the machine has left.
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": f"{60 * GIB}\n",
                "sys/fs/cgroup/memory.current": "0\n",
            },
            (60, 40),
        ),
    ],
)
def test_the_tightest_limit_counts(tmp_path, files, expected):
    assert read_gib(make_machine(tmp_path, files)) == expected


def test_this_machine_has_some():
    memory = read_host_memory()
    assert 0 < memory.free_bytes <= memory.total_bytes
