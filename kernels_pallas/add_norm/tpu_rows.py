"""Within a TPU's kernels: a layer's vector out of the stack of all layers, and the add and norm of rows.

Letters: R rows at once, W rows of a tile of the stack.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

SUBLANES = 8
ROWS_AT_ONCE = 16  # a tile of bf16


def vector_tile(stack_LD: jax.Array) -> pl.BlockSpec:
    """The tile of a stack of vectors that holds the layer's, as one row would have to be copied out of its
    tiles. The grid's one axis is followed by the layer, a prefetched int32 [1]."""
    rows = min(len(stack_LD), SUBLANES)
    return pl.BlockSpec((rows, stack_LD.shape[1]), lambda i, layer_1, *_: (layer_1[0] // rows, 0))


def find_vector(tile_WD: Any, layer: Any) -> jax.Array:
    """The layer's row of its tile, [1, D]."""
    return tile_WD[pl.ds(jax.lax.rem(layer, tile_WD.shape[0]), 1), :]


def add_norm_rows(x_TD: Any, y_TD: Any, weight_1D: jax.Array, sum_TD: Any, h_TD: Any, *, eps: float) -> None:
    """x + y to `sum_TD`, and its norm to `h_TD` in that one's dtype. All but the weight are references."""

    def norm(first: Any, count: int) -> None:
        here = pl.ds(first, count)
        sum_RD = x_TD[here] + y_TD[here].astype(jnp.float32)
        variance_R1 = jnp.mean(sum_RD * sum_RD, axis=1, keepdims=True)
        sum_TD[here] = sum_RD
        h_TD[here] = (sum_RD * jax.lax.rsqrt(variance_R1 + eps) * weight_1D).astype(h_TD.dtype)

    def norm_next(i: Any, carry: Any) -> Any:
        norm(pl.multiple_of(i * ROWS_AT_ONCE, ROWS_AT_ONCE), ROWS_AT_ONCE)
        return carry

    num_whole, rest = divmod(x_TD.shape[0], ROWS_AT_ONCE)
    jax.lax.fori_loop(0, num_whole, norm_next, jnp.int32(0))
    if rest:
        norm(num_whole * ROWS_AT_ONCE, rest)
