"""Compiles a program for a TPU on a machine without one, with libtpu's compiler, and reads the report.

Tiling, VMEM and HBM are the compiler's own, so that what does not fit fails here as it would there. Where
libtpu is missing, the tests that ask for it skip with a sentence. What it cannot say: time.

    pip install --no-deps libtpu==0.0.52
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, PartitionSpec

# The smallest slice of each generation.
TOPOLOGIES = {"v5e": "v5e:1x1", "v5p": "v5p:2x2x1", "v6e": "v6e:1x1", "tpu7x": "tpu7x:2x2x1"}
# What libtpu looks for where there is no TPU, and that another process may have it open.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True, kw_only=True)
class CompileReport:
    """One program compiled for one core of a chip."""

    temp_bytes: int
    alias_bytes: int
    code_bytes: int  # about 1 MB of a program's is the same for all
    compile_s: float
    hlo: str  # optimised, scheduled


def require_tpu_compiler() -> None:
    """Skips the calling test where no TPU compiler is installed."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("Compiling for a TPU needs libtpu beside jax.")


def device_kind(chip: str) -> str:
    """What JAX calls a chip of TOPOLOGIES; skips the calling test where no TPU compiler is installed."""
    return list_devices(TOPOLOGIES[chip])[0].device_kind


def compile_for_tpu(chip: str, fn: Callable, *specs: Any, **jit_kwargs: Any) -> CompileReport:
    """`jax.jit(fn, **jit_kwargs)` compiled for one device of a chip of TOPOLOGIES.

    `specs` are pytrees of arrays or of jax.ShapeDtypeStruct without a sharding. Raises what lowering or the
    compiler raises; skips the calling test where the compiler is not installed.
    """
    device = list_devices(TOPOLOGIES[chip])[0]
    sharding = NamedSharding(Mesh([device], ("x",)), PartitionSpec())

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    start_s = time.perf_counter()
    with lowering_for(device):
        traced = jax.jit(fn, **jit_kwargs).trace(*jax.tree.map(place, specs))
        lowered = traced.lower(lowering_platforms=("tpu",))
    compiled = lowered.compile()
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert hlo is not None
    return CompileReport(
        temp_bytes=memory.temp_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        compile_s=time.perf_counter() - start_s,
        hlo=hlo,
    )


def lowering_for(device: Any) -> Any:
    """A context in which Pallas, which asks for the chip that it lowers for, is told of this one."""
    kind = AbstractDevice(device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=kind))


@cache
def list_devices(topology: str) -> list[Any]:
    """The devices of a slice, to compile for; skips the calling test where no TPU compiler is installed."""
    require_tpu_compiler()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return topologies.get_topology_desc(topology, "tpu").devices
