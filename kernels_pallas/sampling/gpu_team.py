"""Several warpgroups of one block that reach every decision together, and the vectors they do it with.

A vector of 128 lies as [4, 32], a warp a row and a lane a column, a longer one in several columns a lane,
so that a sum within a warp needs no memory; the parts of the warps then meet in shared memory. Searches
among floats go by their keys: int32 in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.kernels_pallas import mosaic

WARPS, LANES = 4, 32
MAX_REDUCED = 6  # vectors that are reduced together

LAYOUT = mosaic.tiled_layout(((WARPS, LANES), (1,)), warp_dims=(-3,), lane_dims=(-2,))
REDUCTIONS = {"sum": (jnp.sum, jnp.add), "max": (jnp.max, jnp.maximum), "min": (jnp.min, jnp.minimum)}


@dataclass(frozen=True, slots=True)
class Team:
    """One warpgroup among those of the block."""

    index: Any
    num_teams: int
    float_smem: Any
    int_smem: Any
    barrier: Any

    def reduce(self, *asked: tuple[str, jax.Array]) -> list[jax.Array]:
        """Scalars from (reduction, vector) pairs, over all elements of the vectors of all warpgroups."""
        smems = [self.int_smem if x.dtype == jnp.int32 else self.float_smem for _, x in asked]
        for place, (smem, (name, x)) in enumerate(zip(smems, asked, strict=True)):
            mosaic.store(smem.at[self.index, place], REDUCTIONS[name][0](x, axis=1))
        self._meet()
        totals = []
        for place, (smem, (name, _)) in enumerate(zip(smems, asked, strict=True)):
            total = smem[0, place, 0]
            for part in range(1, self.num_teams * WARPS):
                total = REDUCTIONS[name][1](total, smem[part // WARPS, place, part % WARPS])
            totals.append(total)
        self._meet()  # before the next call may write
        return totals

    def _meet(self) -> None:
        mosaic.barrier_arrive(self.barrier)
        mosaic.barrier_wait(self.barrier)


def splat(value, dtype, width=LANES):
    return mosaic.layout_cast(jnp.full((WARPS, width), value, dtype), LAYOUT)


def to_key(x):
    """float32 as int32 in the same order, but for the zeros."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def from_key(key, width=LANES):
    """The float32 of a scalar key, as a vector: there is no bitcast of scalars."""
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return jax.lax.bitcast_convert_type(splat(bits, jnp.int32, width), jnp.float32)
