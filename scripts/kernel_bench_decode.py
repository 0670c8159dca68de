"""What to measure of paged decode attention: shapes, arguments, and the bytes and operations of one call.

A list for a script that times kernels on a GPU; it measures nothing itself. Sequences lie in pages in random
order, as in a pool that has been served from for a while.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.kernels_pallas.kv_layer import KVLayer, num_k_scales

PAGE_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeBench:
    """Rows of one length, or of lengths spread evenly from 1 to twice it."""

    name: str
    num_rows: int
    kv_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    kv_dtype: str = "bfloat16"
    tokens_per_row: int = 1
    window: int | None = None
    is_ragged: bool = False

    @property
    def lengths(self) -> list[int]:
        if not self.is_ragged:
            return [self.kv_len] * self.num_rows
        return [1 + 2 * (self.kv_len - 1) * row // max(self.num_rows - 1, 1) for row in range(self.num_rows)]

    @property
    def num_seen(self) -> int:
        """Tokens of K and V that must be read, each once."""
        if self.window is None:
            return sum(self.lengths)
        return sum(min(length, self.window + self.tokens_per_row - 1) for length in self.lengths)

    @property
    def kv_bytes(self) -> int:
        scales = num_k_scales(self.head_dim) + 1 if self.kv_dtype == "int8" else 0
        token_bytes = 2 * self.head_dim * jnp.dtype(self.kv_dtype).itemsize + 4 * scales
        return self.num_seen * self.num_kv_heads * token_bytes

    @property
    def moved_bytes(self) -> int:
        """K and V, the queries in bf16 and the results in float32: what no form can do without."""
        num_queries = self.num_rows * self.tokens_per_row * self.num_heads
        return self.kv_bytes + num_queries * self.head_dim * (2 + 4)

    @property
    def num_flops(self) -> int:
        return 4 * self.num_seen * self.tokens_per_row * self.num_heads * self.head_dim


def _llama_8b(name: str, num_rows: int, kv_len: int, **options: Any) -> DecodeBench:
    return DecodeBench(
        name=name, num_rows=num_rows, kv_len=kv_len, num_heads=32, num_kv_heads=8, head_dim=128, **options
    )


# What matters most first: bandwidth where there is much to read, then the latency of one sequence.
DECODE_BENCHES = [
    _llama_8b("32 rows of 4k", 32, 4096),
    _llama_8b("1 row of 4k", 1, 4096),
    _llama_8b("1 row of 32k", 1, 32768),
    _llama_8b("8 rows of 16k", 8, 16384),
    _llama_8b("64 rows of 1k", 64, 1024),
    _llama_8b("256 rows of 1k", 256, 1024),
    _llama_8b("128 rows, 1 to 8k", 128, 4096, is_ragged=True),
    _llama_8b("32 rows of 4k, int8", 32, 4096, kv_dtype="int8"),
    _llama_8b("32 rows of 4k, fp8", 32, 4096, kv_dtype="float8_e4m3fn"),
    _llama_8b("32 rows of 4k, 4 tokens each", 32, 4096, tokens_per_row=4),
    DecodeBench(
        name="64 rows of 1k, Qwen2.5 7B", num_rows=64, kv_len=1024, num_heads=28, num_kv_heads=4, head_dim=128
    ),
    DecodeBench(
        name="64 rows of 4k, Qwen2.5 0.5B",
        num_rows=64,
        kv_len=4096,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
    ),
    DecodeBench(
        name="64 rows of 4k, gpt-oss window",
        num_rows=64,
        kv_len=4096,
        num_heads=64,
        num_kv_heads=8,
        head_dim=64,
        window=128,
    ),
    DecodeBench(
        name="32 rows of 4k, wide heads", num_rows=32, kv_len=4096, num_heads=16, num_kv_heads=8, head_dim=256
    ),
]


def make_arguments(bench: DecodeBench, key: jax.Array) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of `paged_decode`, random, on the default device."""
    keys = jax.random.split(key, 6)
    lengths = bench.lengths
    pages_of = [-(-length // PAGE_TOKENS) for length in lengths]
    num_pages = sum(pages_of) + 1
    order = iter(jax.random.permutation(keys[0], jnp.arange(1, num_pages)).tolist())
    width = max(pages_of)
    table = [[next(order) if page < count else 0 for page in range(width)] for count in pages_of]
    shape = (num_pages, PAGE_TOKENS, bench.num_kv_heads, bench.head_dim)
    tokens = jnp.arange(bench.tokens_per_row, dtype=jnp.int32) + 1 - bench.tokens_per_row
    num_queries = bench.num_rows * bench.tokens_per_row
    arguments = (
        jax.random.normal(keys[1], (num_queries, bench.num_heads, bench.head_dim), jnp.bfloat16),
        make_pool(shape, bench.kv_dtype, keys[2:]),
        jnp.asarray(table, jnp.int32),
        jnp.repeat(jnp.arange(bench.num_rows, dtype=jnp.int32), bench.tokens_per_row),
        jnp.maximum((jnp.asarray(lengths, jnp.int32)[:, None] + tokens).reshape(-1), 0),
    )
    options = {"scale": bench.head_dim**-0.5, "window": bench.window, "tokens_per_row": bench.tokens_per_row}
    return arguments, options


def make_pool(shape: tuple[int, int, int, int], kv_dtype: str, keys: jax.Array) -> KVLayer:
    """Random K and V of [P, S, K, H], with scales where they have any; takes four keys."""
    if kv_dtype != "int8":
        k_PSKH, v_PSKH = (jax.random.normal(key, shape, jnp.bfloat16).astype(kv_dtype) for key in keys[:2])
        return KVLayer(k_PSKH, v_PSKH)
    k_PSKH, v_PSKH = (jax.random.randint(key, shape, -127, 128, jnp.int8) for key in keys[:2])
    k_scale_PSKQ = jax.random.uniform(keys[2], (*shape[:3], num_k_scales(shape[3])), maxval=0.02)
    return KVLayer(k_PSKH, v_PSKH, k_scale_PSKQ, jax.random.uniform(keys[3], shape[:3], maxval=0.02))
