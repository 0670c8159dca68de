"""KV write, the reference: put each token's K and V into its place in the paged pool.

Called once a layer by the model families, before attention. The XLA form updates the donated pool in
place (tests/runner/test_pool_in_place.py reads that in the compiled programs).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxserve.kernels_pallas.kv_layer import KVLayer

SMALLEST_ABSMAX = 1e-12  # of what is all zeros


def kv_write(kv: KVLayer, k_TKH: jax.Array, v_TKH: jax.Array, write_index_T: jax.Array) -> KVLayer:
    """The pool with token t's K and V at flat place `write_index_T[t]` (= page * S + offset).

    Padded tokens write to page 0, the trash page, where the winner among them does not matter. Live
    tokens never share a place. Values are cast to the pool's dtype; in an int8 pool they are rounded to
    1/127 of the largest that shares their scale.
    """
    k_scale_PSKQ, v_scale_PSK = kv.k_scale_PSKQ, kv.v_scale_PSK
    if k_scale_PSKQ is not None and v_scale_PSK is not None:
        k_TK2QI = k_TKH.reshape(*k_TKH.shape[:2], 2, k_scale_PSKQ.shape[3], -1)  # I pairs a scale
        k_TK2QI, k_scale_TKQ = _quantize(k_TK2QI, axes=(2, 4))
        k_TKH = k_TK2QI.reshape(k_TKH.shape)
        v_TKH, v_scale_TK = _quantize(v_TKH, axes=(2,))
        k_scale_PSKQ = _write(k_scale_PSKQ, k_scale_TKQ, write_index_T)
        v_scale_PSK = _write(v_scale_PSK, v_scale_TK, write_index_T)
    k_PSKH = _write(kv.k_PSKH, k_TKH, write_index_T)
    v_PSKH = _write(kv.v_PSKH, v_TKH, write_index_T)
    return KVLayer(k_PSKH, v_PSKH, k_scale_PSKQ, v_scale_PSK)


def rope_write(
    kv: KVLayer,
    qkv_TAH: jax.Array,
    cos_T1I: jax.Array,
    sin_T1I: jax.Array,
    write_index_T: jax.Array,
    *,
    num_heads: int,
) -> tuple[jax.Array, KVLayer]:
    """Rotated q [T, N, H] in the type of its input, and the pool with rotated k, and v, as by `kv_write`.

    A head holds I = H / 2 pairs (i, i + I). Its A heads are N = `num_heads` of q, then K of k and K of v,
    as one projection leaves them. cos and sin are float32, and so is the rotation.
    """
    num_kv_heads = kv.k_PSKH.shape[2]
    turned_TAH = rotate(qkv_TAH[:, : num_heads + num_kv_heads].astype(jnp.float32), cos_T1I, sin_T1I)
    k_TKH, v_TKH = turned_TAH[:, num_heads:], qkv_TAH[:, num_heads + num_kv_heads :]
    return turned_TAH[:, :num_heads].astype(qkv_TAH.dtype), kv_write(kv, k_TKH, v_TKH, write_index_T)


def rotate(x_TNH: jax.Array, cos_T1I: jax.Array, sin_T1I: jax.Array) -> jax.Array:
    """Rotate pairs (i, i + H / 2), the layout of Hugging Face checkpoints."""
    first_TNI, second_TNI = jnp.split(x_TNH, 2, axis=-1)
    return jnp.concatenate(
        [
            first_TNI * cos_T1I - second_TNI * sin_T1I,
            second_TNI * cos_T1I + first_TNI * sin_T1I,
        ],
        axis=-1,
    )


def _quantize(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """int8 values of x, and float32 scales, one for all along `axes`: absmax / 127, round to nearest."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=axes, keepdims=True), SMALLEST_ABSMAX) / 127.0
    return jnp.round(x / scale).astype(jnp.int8), jnp.squeeze(scale, axes)


def _write(pool: jax.Array, x: jax.Array, write_index_T: jax.Array) -> jax.Array:
    """`pool` [P, S, ...] with x [T, ...] at flat places of its first two axes."""
    num_pages, page_size = pool.shape[:2]
    x = x.astype(pool.dtype)
    if len(write_index_T) == 1:
        # XLA makes a read, a check and a write of a scatter of one row, and copies the pool between them.
        place = (write_index_T[0] // page_size, write_index_T[0] % page_size)
        return jax.lax.dynamic_update_slice(pool, x[None], place + (0,) * (x.ndim - 1))
    flat = pool.reshape(num_pages * page_size, *pool.shape[2:])
    return flat.at[write_index_T].set(x, mode="promise_in_bounds").reshape(pool.shape)
