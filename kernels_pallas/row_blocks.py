"""Work on a few rows of a batch at a time, and only where a row asks for it.

For steps whose arrays are rows times vocabulary. XLA's code for TPUs grows with the rows that an operation is
written for, and so does what lies in memory meanwhile: penalties, sampling and scores of 256 rows took 8 MB
of code and half a gigabyte beside logits of 39 MB. Knows nothing of what the work is.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

BLOCK_ROWS = 32

Take = Callable[[jax.Array], jax.Array]  # from an array of all rows that of a block's


def update_rows(
    run_block: Callable[[Take, jax.Array, jax.Array], jax.Array],
    asks_B: jax.Array,
    out_B: jax.Array,
    block_rows: int = BLOCK_ROWS,
) -> jax.Array:
    """`out_B` [B, ...] with those blocks of rows replaced in which a row asks, bool [B].

    `run_block(take, asks, out)` gives a block's rows from what they were: `take` cuts its rows out of any
    array with an axis of rows in front, `asks` says which of them ask. The last block begins early where it
    would stick out; rows that were in the block before do not ask again.
    """
    num_rows = asks_B.shape[0]
    if num_rows <= block_rows:
        # A loop whose only turn is always the same: XLA would move its work in front of it, into every step.
        return jax.lax.cond(jnp.any(asks_B), lambda: run_block(lambda x_B: x_B, asks_B, out_B), lambda: out_B)
    row_B = jnp.arange(num_rows, dtype=jnp.int32)

    def visit(block: jax.Array, out_B: jax.Array) -> jax.Array:
        start = jnp.minimum(block * block_rows, num_rows - block_rows)

        def take(x_B: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x_B, start, block_rows)

        asks = take(asks_B & (row_B >= block * block_rows))
        out = take(out_B)
        out = jax.lax.cond(jnp.any(asks), lambda: run_block(take, asks, out), lambda: out)
        return jax.lax.dynamic_update_slice_in_dim(out_B, out, start, axis=0)

    num_blocks = (jnp.max(jnp.where(asks_B, row_B + 1, 0)) + block_rows - 1) // block_rows
    return jax.lax.fori_loop(0, num_blocks, visit, out_B)
