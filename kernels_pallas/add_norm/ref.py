"""RMS norm, and the same of a sum: of the residual stream and what a block adds to it, for the next block to
read. The specification, and the form of XLA, which fuses norms into what is around them.

Called twice a layer by the model families. Knows nothing of products.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def begin_sum(x_TD: jax.Array, dtype: jnp.dtype) -> jax.Array | None:
    """What the first layer adds to the residual stream, in the dtype of what others add, where a layer's last
    sum is left to the next one's `add_norm`; None where it is made at once. XLA makes it at once."""
    return None


def add_norm(
    x_TD: jax.Array,
    y_TD: jax.Array | None,
    weight: jax.Array,
    layer: jax.Array | None,
    *,
    eps: float,
    dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array]:
    """x + y, or x where y is None, and its norm: float32 [T, D] both. y may be bf16.

    `weight` is [D], or [L, D] of all layers, of which `layer`, an int32, is meant. Other forms give the norm
    in `dtype`, which the products round it to; XLA rounds where they read it.
    """
    x_TD = x_TD if y_TD is None else x_TD + y_TD
    weight_D = weight if layer is None else jax.lax.dynamic_index_in_dim(weight, layer, keepdims=False)
    return x_TD, rms_norm(x_TD, weight_D, eps)


def rms_norm(x_TD: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * weight over the last axis, float32 (Zhang and Sennrich 2019)."""
    x_TD = x_TD.astype(jnp.float32)
    variance_T1 = jnp.mean(jnp.square(x_TD), axis=-1, keepdims=True)
    return x_TD * jax.lax.rsqrt(variance_T1 + eps) * weight_D


def normalize_heads(
    qkv_TF: jax.Array, q_norm_H: jax.Array, k_norm_H: jax.Array, num_heads: int, eps: float
) -> jax.Array:
    """Each head of q and of k by its own rms norm; those of v as they are: [T, F] float32."""
    qkv_TAH = qkv_TF.reshape(len(qkv_TF), -1, len(q_norm_H))
    first_v = (qkv_TAH.shape[1] + num_heads) // 2
    q_TNH, k_TKH, v_TKH = jnp.split(qkv_TAH, [num_heads, first_v], axis=1)
    parts = rms_norm(q_TNH, q_norm_H, eps), rms_norm(k_TKH, k_norm_H, eps), v_TKH
    return jnp.concatenate(parts, axis=1).reshape(qkv_TF.shape)
