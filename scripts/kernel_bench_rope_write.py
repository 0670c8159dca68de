"""What to measure of RoPE with KV write: shapes, arguments, and the bytes of one call.

A list for a script that times kernels on a GPU; it measures nothing itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.kernels_pallas.kv_layer import KVLayer, num_k_scales

PAGE_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeWriteBench:
    """One layer's write of a step's tokens into a pool of `num_pages` pages of 64 tokens."""

    name: str
    num_tokens: int
    num_heads: int = 28
    num_kv_heads: int = 4
    head_dim: int = 128
    dtype: str = "bfloat16"  # of q, k and v
    pool_dtype: str = "bfloat16"
    num_pages: int = 8192

    @property
    def moved_bytes(self) -> int:
        """q, k and v read once; q, k and v written once; the tables of angles and the scales are left out."""
        size, pool_size = (jnp.dtype(dtype).itemsize for dtype in (self.dtype, self.pool_dtype))
        read = (self.num_heads + 2 * self.num_kv_heads) * size
        written = self.num_heads * size + 2 * self.num_kv_heads * pool_size
        return self.num_tokens * self.head_dim * (read + written)


ROPE_WRITE_BENCHES = [
    RopeWriteBench(name="decode of 1", num_tokens=1),
    RopeWriteBench(name="decode of 256", num_tokens=256),
    RopeWriteBench(name="prefill of 8192", num_tokens=8192),
    RopeWriteBench(name="prefill of 8192, float32", num_tokens=8192, dtype="float32"),
    RopeWriteBench(name="prefill of 8192, int8 pool", num_tokens=8192, pool_dtype="int8"),
]


def make_arguments(bench: RopeWriteBench, key: jax.Array) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of `rope_write`, random, on the default device; donate the first."""
    keys = jax.random.split(key, 3)
    places = (bench.num_pages, PAGE_TOKENS, bench.num_kv_heads)
    arrays = [jnp.zeros((*places, bench.head_dim), bench.pool_dtype) for _ in "kv"]
    if bench.pool_dtype == "int8":
        arrays += [jnp.zeros((*places, num_k_scales(bench.head_dim))), jnp.zeros(places)]
    heads = bench.num_heads + 2 * bench.num_kv_heads
    qkv_TAH = jax.random.normal(keys[0], (bench.num_tokens, heads, bench.head_dim), bench.dtype)
    angle_T1I = jax.random.uniform(keys[1], (bench.num_tokens, 1, bench.head_dim // 2), maxval=6.0)
    live_places = jnp.arange(PAGE_TOKENS, bench.num_pages * PAGE_TOKENS, dtype=jnp.int32)
    write_index_T = jax.random.permutation(keys[2], live_places)[: bench.num_tokens]
    arguments = KVLayer(*arrays), qkv_TAH, jnp.cos(angle_T1I), jnp.sin(angle_T1I), write_index_T
    return arguments, {"num_heads": bench.num_heads}
