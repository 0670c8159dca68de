"""Blocks of rows: who asks gets what was asked for, once; blocks in which nobody asks are not visited."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kernels_pallas.row_blocks import update_rows


@pytest.mark.parametrize("block_rows", [3, 4, 7, 16])
@pytest.mark.parametrize("asking", [(), (0,), (6,), (2, 3, 5), range(7)])
def test_each_row_that_asks_is_changed_once_and_no_other(asking, block_rows):
    asks = np.isin(np.arange(7), asking)
    values = np.arange(14.0, dtype=np.float32).reshape(7, 2)
    added = 10.0 * (1 + np.arange(7, dtype=np.float32))

    @jax.jit
    def add(asks_B, out_BV, added_B):
        def run_block(take, asks_b, out_bV):
            return out_bV + jnp.where(asks_b, take(added_B), 0.0)[:, None]

        return update_rows(run_block, asks_B, out_BV, block_rows)

    expected = values + np.where(asks, added, 0.0)[:, None]
    np.testing.assert_array_equal(add(asks, values, added), expected)


def test_a_block_in_which_nobody_asks_is_left_alone():
    visited = []

    def run_block(take, asks_b, out_b):
        jax.debug.callback(lambda rows: visited.append(rows.tolist()), take(jnp.arange(7)))
        return out_b

    asks_B = jnp.asarray([False, False, True, False, False, False, False])
    jax.block_until_ready(jax.jit(lambda out_B: update_rows(run_block, asks_B, out_B, 2))(np.zeros(7)))
    jax.effects_barrier()
    assert visited == [[2, 3]]
