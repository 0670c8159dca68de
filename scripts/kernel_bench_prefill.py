"""What to measure of paged prefill attention: shapes, arguments, and the operations and bytes of one call.

A list for a script that times kernels on a GPU; it measures nothing itself. Pages lie in random order, as in
a pool that has been served from for a while.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from kernel_bench_decode import PAGE_TOKENS, make_pool

from jaxserve.kernels_pallas.kv_layer import num_k_scales


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillBench:
    """Runs of one length, each behind a prefix of one length."""

    name: str
    run_tokens: int
    num_runs: int = 1
    prefix_tokens: int = 0
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    kv_dtype: str = "bfloat16"
    window: int | None = None

    @property
    def num_tokens(self) -> int:
        return self.num_runs * self.run_tokens

    @property
    def kv_len(self) -> int:
        return self.prefix_tokens + self.run_tokens

    @property
    def num_scores(self) -> int:
        """Pairs of a query token and a token that it sees, of one head."""
        positions = range(self.prefix_tokens, self.kv_len)
        window = self.kv_len if self.window is None else self.window
        return self.num_runs * sum(min(position + 1, window) for position in positions)

    @property
    def num_flops(self) -> int:
        """Of both products, where a query is multiplied with what it sees and nothing else."""
        return 4 * self.num_scores * self.num_heads * self.head_dim

    @property
    def moved_bytes(self) -> int:
        """Queries and results in bf16, and K and V once: what no form can do without."""
        scales = num_k_scales(self.head_dim) + 1 if self.kv_dtype == "int8" else 0
        kv_bytes = 2 * self.head_dim * jnp.dtype(self.kv_dtype).itemsize + 4 * scales
        query_bytes = 2 * 2 * self.num_tokens * self.num_heads * self.head_dim
        return query_bytes + self.num_runs * self.kv_len * self.num_kv_heads * kv_bytes


# What matters most first: long prompts, then chunks behind prefixes, then many short runs.
PREFILL_BENCHES = [
    PrefillBench(name="8k", run_tokens=8192),
    PrefillBench(name="32k", run_tokens=32768),
    PrefillBench(name="2k", run_tokens=2048),
    PrefillBench(name="16k, 16 heads of their own", run_tokens=16384, num_heads=16, num_kv_heads=16),
    PrefillBench(name="2k behind 30k", run_tokens=2048, prefix_tokens=30720),
    PrefillBench(name="512 behind 3.5k, 8 runs", run_tokens=512, num_runs=8, prefix_tokens=3584),
    PrefillBench(name="100 tokens, 64 runs", run_tokens=100, num_runs=64),
    PrefillBench(name="8k, int8", run_tokens=8192, kv_dtype="int8"),
    PrefillBench(name="8k, fp8", run_tokens=8192, kv_dtype="float8_e4m3fn"),
    PrefillBench(name="2k behind 30k, int8", run_tokens=2048, prefix_tokens=30720, kv_dtype="int8"),
    PrefillBench(name="8k, Qwen2.5 7B", run_tokens=8192, num_heads=28, num_kv_heads=4),
    PrefillBench(name="8k, Qwen2.5 0.5B", run_tokens=8192, num_heads=14, num_kv_heads=2, head_dim=64),
    PrefillBench(
        name="8k, gpt-oss window", run_tokens=8192, num_heads=64, num_kv_heads=8, head_dim=64, window=128
    ),
    PrefillBench(name="8k, wide heads", run_tokens=8192, num_heads=16, num_kv_heads=8, head_dim=256),
]


def make_arguments(bench: PrefillBench, key: jax.Array) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of `paged_prefill`, random, on the default device."""
    q_key, order_key, pool_key = jax.random.split(key, 3)
    pages_per_run = -(-bench.kv_len // PAGE_TOKENS)
    num_pages = bench.num_runs * pages_per_run + 1
    shape = (num_pages, PAGE_TOKENS, bench.num_kv_heads, bench.head_dim)
    order = jax.random.permutation(order_key, jnp.arange(1, num_pages, dtype=jnp.int32))
    run_C = jnp.arange(bench.num_runs, dtype=jnp.int32)
    arguments = (
        jax.random.normal(q_key, (bench.num_tokens, bench.num_heads, bench.head_dim), jnp.bfloat16),
        make_pool(shape, bench.kv_dtype, jax.random.split(pool_key, 4)),
        order.reshape(bench.num_runs, pages_per_run),
        run_C,
        run_C * bench.run_tokens,
        jnp.full_like(run_C, bench.run_tokens),
        jnp.full_like(run_C, bench.kv_len),
    )
    return arguments, {"scale": bench.head_dim**-0.5, "window": bench.window}
