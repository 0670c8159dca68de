"""The attention block of a layer for decode rows, in one: the residual add and norm, q, k and v, the norms
of their heads, rotation, the write of K and V, attention, and o. The specification; and what a set of kernels
has of it.

Called by the models (models/products.py). Knows no sharding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.kernels_pallas.add_norm.ref import normalize_heads
from jaxserve.kernels_pallas.kv_layer import KVLayer
from jaxserve.kernels_pallas.kv_write.ref import rope_write
from jaxserve.kernels_pallas.paged_attention.ref import paged_decode
from jaxserve.kernels_pallas.stacked_matmul.ref import FLOAT32, multiply, norm_multiply


class BlockWeights(NamedTuple):
    """Stacks of all layers. None in models without biases on q, k and v, or norms on the heads of q and k."""

    norm_LD: jax.Array
    w_qkv_LFD: jax.Array
    bias_LF: jax.Array | None
    w_o_LDF: jax.Array
    q_norm_LH: jax.Array | None = None
    k_norm_LH: jax.Array | None = None

    def list_vectors(self) -> tuple[jax.Array | None, ...]:
        return self.norm_LD, self.bias_LF, self.q_norm_LH, self.k_norm_LH


@dataclass(frozen=True, slots=True)
class BlockForm:
    """A form of the block, and what it serves: `serves(num_rows, w_qkv_LFD, w_o_LDF, kv)`."""

    serves: Callable[..., bool]
    attend: Callable[..., tuple[jax.Array, jax.Array, Any]]


@dataclass(frozen=True, slots=True)
class RowsForm:
    """A form of rope_write and paged_decode in one, and what it serves: `serves(num_rows, num_heads, kv)`."""

    serves: Callable[..., bool]
    attend: Callable[..., tuple[jax.Array, Any]]


def attend(
    x_RD: jax.Array,
    y_RD: jax.Array,
    weights: BlockWeights,
    layer: jax.Array,
    kv: KVLayer,
    rope: tuple[jax.Array, jax.Array],
    write_index_R: jax.Array,
    table_XW: jax.Array,
    slot_R: jax.Array,
    kv_len_R: jax.Array,
    *,
    num_heads: int,
    scale: float,
    eps: float,
    dtype: jnp.dtype = FLOAT32,
) -> tuple[jax.Array, jax.Array, KVLayer]:
    """x + y, float32 [R, D], what the block adds to it, [R, D] in `dtype`, and the layer's pool with the
    rows' K and V.

    y may be bf16. `rope` are cos and sin, [R, 1, H / 2]; the rest is as in the refs of the parts. A row of
    kv_len 0 attends to nothing."""
    norm_LD, w_qkv_LFD, bias_LF, w_o_LDF, *_ = weights
    x_RD, qkv_RF = norm_multiply(x_RD, y_RD, norm_LD, w_qkv_LFD, bias_LF, layer, eps=eps)
    if weights.q_norm_LH is not None and weights.k_norm_LH is not None:
        head_norms = weights.q_norm_LH[layer], weights.k_norm_LH[layer]
        qkv_RF = normalize_heads(qkv_RF, *head_norms, num_heads, eps)
    qkv_RAH = qkv_RF.reshape(len(qkv_RF), -1, kv.head_dim)
    q_RNH, kv = rope_write(kv, qkv_RAH, *rope, write_index_R, num_heads=num_heads)
    o_RNH = paged_decode(q_RNH, kv, table_XW, slot_R, kv_len_R, scale=scale)
    return x_RD, multiply(o_RNH.reshape(len(o_RNH), -1), w_o_LDF, layer, dtype=dtype), kv
