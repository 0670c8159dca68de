"""Compiles a program for an NVIDIA H200 on a machine without one, down to machine code, and reads the report.

Needs the CUDA plugin of the installed jax, but no GPU and no toolkit; where it is missing, the tests that
ask for it skip with a sentence. What it cannot say: time, and which library a matrix product would choose.

    pip install --no-deps jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2
"""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

TARGET_CONFIG = Path(__file__).parents[2] / "jaxserve" / "planning" / "h200_target_config.textproto"
BARRIER_BYTES = 8
SMEM_LIMIT_BYTES = 227 * 1024  # of one block


@dataclass(frozen=True, kw_only=True)
class KernelReport:
    """What ptxas says of one Mosaic kernel; the shared memory is the kernel's own request."""

    name: str
    registers: int  # a thread at launch; `set_max_registers` moves them between warpgroups afterwards
    spill_bytes: int
    stack_bytes: int
    smem_bytes: int
    warnings: tuple[str, ...]  # such as that products of the tensor cores wait for one another


@dataclass(frozen=True, kw_only=True)
class CompileReport:
    """One program compiled for the H200: its Mosaic kernels by order of name, and XLA's buffers.

    From jax 0.12 on a kernel that the process has compiled before is not reported again.
    """

    kernels: tuple[KernelReport, ...]
    temp_bytes: int
    alias_bytes: int
    compile_s: float
    hlo: str  # optimised, scheduled

    def kernel(self, name: str) -> KernelReport:
        """The one kernel whose name starts so. Raises ValueError where there is not exactly one."""
        (found,) = [kernel for kernel in self.kernels if kernel.name.startswith(name)]
        return found


def require_h200_compiler() -> None:
    """Skips the calling test where no H200 compiler is installed."""
    if jax.__version_info__ < (0, 11):
        pytest.skip("The GPU kernels need jax 0.11.2 or later.")
    if not all(importlib.util.find_spec(name) for name in ("jax_plugins", "jax_plugins.xla_cuda13")):
        pytest.skip("Compiling for an H200 needs jax-cuda13-plugin and jax-cuda13-pjrt beside jax.")


def compile_for_h200(fn: Callable, *specs: Any, **jit_kwargs: Any) -> CompileReport:
    """`jax.jit(fn, **jit_kwargs)` compiled for one H200.

    `specs` are pytrees of arrays or of jax.ShapeDtypeStruct without a sharding. Raises what lowering or
    ptxas raises; skips the calling test where the compiler is not installed.
    """
    require_h200_compiler()
    sharding = _on_h200()

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    start_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, _dumping_to(folder):
        compiled = jax.jit(fn, **jit_kwargs).lower(*jax.tree.map(place, specs)).compile()
        kernels = tuple(_read_report(path) for path in sorted(Path(folder).rglob("*.ptxas")))
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert hlo is not None
    return CompileReport(
        kernels=kernels,
        temp_bytes=memory.temp_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        compile_s=time.perf_counter() - start_s,
        hlo=hlo,
    )


def assert_fits(kernel: KernelReport, *, max_registers: int, blocks_per_sm: int = 1) -> None:
    """No warnings, no spills, at most so many registers a thread, and room for so many blocks on an SM."""
    assert (kernel.warnings, kernel.spill_bytes, kernel.stack_bytes) == ((), 0, 0), kernel
    assert kernel.registers <= max_registers, kernel
    limit = SMEM_LIMIT_BYTES if blocks_per_sm == 1 else 228 * 1024 // blocks_per_sm - 1024
    assert kernel.smem_bytes <= limit, kernel


@cache
def _on_h200() -> NamedSharding:
    topology = topologies.get_topology_desc(
        "", "cuda", target_config=TARGET_CONFIG.read_text(), topology="1x1x1"
    )
    return NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())


@contextmanager
def _dumping_to(folder: str) -> Iterator[None]:
    """Mosaic's dumps are asked for through the environment, which it reads at every compilation."""
    settings = {"MOSAIC_GPU_DUMP_TO": folder, "MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_RESOURCES": "1"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _is_warning(line: str) -> bool:
    """Whether ptxas warns. Mosaic declares one byte of shared memory; reads beyond it are remarked upon."""
    return "warning" in line or ("Potential" in line and "__dynamic_shmem__" not in line)


def _read_report(path: Path) -> KernelReport:
    text = path.read_text()
    warnings = tuple(filter(_is_warning, text.splitlines()))
    for warning in warnings:  # they say some figures again
        text = text.replace(warning, "")

    def count(pattern: str) -> int:
        return sum(int(number) for number in re.findall(pattern, text))

    # Numbered where the kernel is lowered, also when it is not compiled: the last one of its name.
    kernel_name, _, _ = path.stem.rpartition("_")
    *_, resources_path = sorted(path.parent.glob(f"{kernel_name}_*.resources.txt"))
    resources = resources_path.read_text()
    num_barriers = 0
    for barrier, copies in re.findall(r"num_barriers=(\d+)[^)]*\): (\d+)", resources):
        num_barriers += int(barrier) * int(copies)
    (scratch_bytes,) = re.findall(r"smem_scratch_bytes=(\d+)", resources)
    return KernelReport(
        name=path.stem,
        registers=count(r"Used (\d+) registers"),
        spill_bytes=count(r"(\d+) bytes spill"),
        stack_bytes=count(r"(\d+) bytes stack frame"),
        smem_bytes=int(scratch_bytes) + BARRIER_BYTES * num_barriers,
        warnings=warnings,
    )
