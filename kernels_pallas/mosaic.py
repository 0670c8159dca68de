"""The names of Pallas Mosaic GPU that kernels here use: the one door to an interface that moves.

jax moves and renames parts of it in every minor release, so no kernel imports `jax.experimental.pallas`
itself: what differs between the releases we support (0.11.2 to 0.12) is settled here. Imported only where a
GPU form of a kernel is chosen or tested; below jax 0.11 the import fails with a sentence, and tests that
need it skip. Knows nothing of what the kernels compute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

if jax.__version_info__ < (0, 11):
    raise ImportError(
        f"The GPU kernels need jax 0.11.2 or later, hence Python 3.12; this is jax {jax.__version__}."
    )

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

# Type checkers see there what is private, and abstract classes where there is nothing to implement.
plgpu: Any = mosaic_gpu

# Launching: kernel(body, out_type=, scratch_types=, grid=, grid_names=, num_threads=, thread_name=, ...).
kernel = plgpu.kernel
CompilerParams = plgpu.CompilerParams
LoweringSemantics = plgpu.LoweringSemantics

# Memory: SMEM(shape, dtype), GMEM, ACC(shape) for a wgmma accumulator, Barrier(num_arrivals=, num_barriers=).
SMEM = plgpu.SMEM
GMEM = plgpu.GMEM
ACC = plgpu.ACC
Barrier = plgpu.Barrier
Layout = plgpu.Layout
TilingTransform = plgpu.TilingTransform
SwizzleTransform = plgpu.SwizzleTransform

# Control flow and references.
when = pl.when
ds = pl.ds
loop = pl.loop
multiple_of = pl.multiple_of  # a promise about a scalar: where a tiled copy begins
run_scoped = pl.run_scoped

# Copies, barriers and registers.
barrier_arrive = plgpu.barrier_arrive
barrier_wait = plgpu.barrier_wait
commit_smem = plgpu.commit_smem
copy_gmem_to_smem = plgpu.copy_gmem_to_smem
copy_smem_to_gmem = plgpu.copy_smem_to_gmem
wait_smem_to_gmem = plgpu.wait_smem_to_gmem
set_max_registers = plgpu.set_max_registers

# Arithmetic.
broadcasted_iota = plgpu.broadcasted_iota
layout_cast = plgpu.layout_cast
load = plgpu.load
wgmma = plgpu.wgmma
wgmma_accumulator_load = plgpu.wgmma_accumulator_load  # when at most wait_n products are in flight
wgmma_wait = plgpu.wgmma_wait

SMEM_BYTES_PER_BLOCK = 227 * 1024  # that one block of sm_90 may use
SMEM_BYTES_PER_SM = 228 * 1024  # 1 KiB of it is kept back for every resident block
H200_NUM_SMS = 132

_SWIZZLE_BYTES = (128, 64, 32)


def swizzled_smem(shape: tuple[int, ...], dtype: Any, *, max_swizzle: int = 128) -> Any:
    """Shared memory whose last two axes can be an operand of wgmma, and the target of a TMA copy.

    Tiles of 8 rows; the swizzle is the widest of 128, 64 and 32 bytes that divides a row, at most
    `max_swizzle`. Both operands of one wgmma must have the same swizzle. Columns can be sliced in multiples
    of it. Raises ValueError where a row is no multiple of 32 bytes.
    """
    itemsize = jnp.dtype(dtype).itemsize
    row_bytes = shape[-1] * itemsize
    for swizzle in _SWIZZLE_BYTES:
        if row_bytes % swizzle == 0 and swizzle <= max_swizzle:
            transforms = (TilingTransform((8, swizzle // itemsize)), SwizzleTransform(swizzle))
            return SMEM(shape, dtype, transforms=transforms)
    raise ValueError(f"rows of {row_bytes} bytes cannot be swizzled: they must be a multiple of 32")


def copy_block_to_smem(block_ref: Any, smem: Any, barrier: Any) -> None:
    """Global to shared memory, of a block that lies there without gaps: one bulk copy, no tensor map."""
    copy_gmem_to_smem(block_ref, smem, barrier, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)


def tiled_layout(tiling: Any, *, warp_dims: tuple[int, ...], lane_dims: tuple[int, ...]) -> Any:
    """A layout of registers: the tiled axes that warps share, those that lanes do; the last is a vector."""
    return Layout.TILED(plgpu.Tiling(tiling), warp_dims=warp_dims, lane_dims=lane_dims, vector_dim=-1)


def store(ref: Any, value: jax.Array) -> None:
    """Registers to `ref`, all of it, in whatever pattern the layout of `value` gives.

    jax 0.12 refuses patterns that waste bandwidth unless it is told that they are meant; 0.11 cannot be told.
    """
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def multiply_onto(initial: jax.Array, start: Callable[[Any], None], *, is_simulated: bool) -> jax.Array:
    """`initial`, and the products that `start` starts onto the accumulator that it is given, float32 [M, N].

    The interpreter cannot begin an accumulator with values: there it begins with zeros, and `initial` is
    added behind the products, which a GPU has no registers for.
    """
    if is_simulated:

        def multiply(acc_ref):
            start(acc_ref)
            return acc_ref[...]

        return initial + run_scoped(multiply, ACC(initial.shape, initial.dtype))
    return pl.run_state(start)(plgpu.ACC.init(initial))


def simulate(*, detect_races: bool = True) -> Any:
    """What `interpret=` takes to run a kernel on the CPU, where reads of unwritten memory give NaN."""
    return plgpu.InterpretGPUParams(detect_races=detect_races, uninitialized_memory="nan")
