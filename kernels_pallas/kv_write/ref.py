"""KV write, the reference: put each token's K and V into its place in the paged pool.

Called once a layer by the model families, before attention. The XLA form is a scatter that updates
the donated pool in place.
"""

from __future__ import annotations

import jax


def kv_write(
    k_PSKH: jax.Array, v_PSKH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, write_index_T: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The pools with token t's K and V at flat place `write_index_T[t]` (= page * S + offset).

    Padded tokens write to page 0, the trash page, where the winner among them does not matter. Live
    tokens never share a place. Values are cast to the pool's dtype.
    """
    return _scatter(k_PSKH, k_TKH, write_index_T), _scatter(v_PSKH, v_TKH, write_index_T)


def _scatter(pool_PSKH: jax.Array, x_TKH: jax.Array, write_index_T: jax.Array) -> jax.Array:
    num_pages, page_size, num_kv_heads, head_dim = pool_PSKH.shape
    flat_AKH = pool_PSKH.reshape(num_pages * page_size, num_kv_heads, head_dim)
    flat_AKH = flat_AKH.at[write_index_T].set(x_TKH.astype(pool_PSKH.dtype), mode="drop")
    return flat_AKH.reshape(pool_PSKH.shape)
