"""One layer's part of the paged pool: what every kernel reads and writes.

Allocated by the runner, donated to every step, handed on by the models. P pages of S tokens; page 0 is the
trash page for padding.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PAIRS_PER_SCALE = 8  # of K in an int8 pool, at most


class KVLayer(NamedTuple):
    """K and V of P * S tokens: float32 or bfloat16, or int8 with float32 scales.

    int8 V has a scale a token and KV head. K has Q = `num_k_scales` of them, each for 8 rotary pairs
    (i, i + H / 2): the biases of K are so large in a few pairs of some models that a single scale leaves the
    other channels too few steps (Qwen2.5 0.5B: 2.4 % of perplexity instead of 0.2 %). A scale belongs to a
    token and not to a page because a page fills up token by token: a larger value that comes later would
    mean to round once more what is there.
    """

    k_PSKH: jax.Array
    v_PSKH: jax.Array
    k_scale_PSKQ: jax.Array | None = None
    v_scale_PSK: jax.Array | None = None

    @property
    def head_dim(self) -> int:
        return self.k_PSKH.shape[3]


def num_k_scales(head_dim: int) -> int:
    """Scales of one token and head of K in an int8 pool: two at least, as jax 0.10 copies a pool of one."""
    num_pairs = head_dim // 2
    return max(num_pairs // math.gcd(num_pairs, PAIRS_PER_SCALE), 2)


def make_layer(num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, kv_dtype: str) -> KVLayer:
    """Zeroed pages of one layer."""
    shape_PSK = (num_pages, page_size, num_kv_heads)
    k_PSKH, v_PSKH = (jnp.zeros((*shape_PSK, head_dim), kv_dtype) for _ in "kv")
    if kv_dtype != "int8":
        return KVLayer(k_PSKH, v_PSKH)
    k_scale_PSKQ = jnp.zeros((*shape_PSK, num_k_scales(head_dim)), jnp.float32)
    return KVLayer(k_PSKH, v_PSKH, k_scale_PSKQ, jnp.zeros(shape_PSK, jnp.float32))


def choose_operand_dtype(kv_dtype: str) -> Any:
    """What a GPU multiplies K and V in: bf16, but for fp8 float16, which holds it exactly."""
    return jnp.float16 if kv_dtype.startswith("float8") else jnp.bfloat16
