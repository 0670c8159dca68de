"""What to measure of the choice of tokens: shapes, arguments, and the bytes of one call.

A list for a script that times kernels on a GPU; it measures nothing itself. The floor of a case is one read
of the logits. "peaked" rows are like a model's: a few tokens hold most of the mass; "normal" rows are the
hard ones, where top-p alone keeps much of the vocabulary and every token needs noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingBench:
    """One batch of rows that all have the same parameters."""

    name: str
    num_rows: int = 256
    vocab_size: int = 151936
    dtype: str = "float32"
    logits: str = "peaked"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def read_bytes(self) -> int:
        """Of the logits, read once."""
        return self.num_rows * self.vocab_size * (2 if self.dtype == "bfloat16" else 4)


SAMPLING_BENCHES = [
    SamplingBench(name="top-k 50, top-p 0.9", logits="normal", top_k=50, top_p=0.9),  # goal: 0.4 ms
    SamplingBench(name="top-k 50, top-p 0.9, bf16", logits="normal", top_k=50, top_p=0.9, dtype="bfloat16"),
    SamplingBench(name="top-p 0.95", top_p=0.95),
    SamplingBench(name="top-p 0.95, flat rows", logits="normal", top_p=0.95),
    SamplingBench(name="min-p 0.05", min_p=0.05),
    SamplingBench(name="temperature alone"),
    SamplingBench(name="temperature alone, flat rows", logits="normal"),
    SamplingBench(name="greedy", temperature=0.0),
    SamplingBench(name="top-k 50, top-p 0.9, 64 rows", num_rows=64, logits="normal", top_k=50, top_p=0.9),
    SamplingBench(name="top-k 50, top-p 0.9, 1 row", num_rows=1, logits="normal", top_k=50, top_p=0.9),
    SamplingBench(name="top-p 0.95, 1 flat row", num_rows=1, logits="normal", top_p=0.95),
]


def make_arguments(bench: SamplingBench, seed: int) -> tuple[jax.Array, ...]:
    """The arguments of `choose_tokens`, random, on the default device."""
    rng = np.random.default_rng(seed)
    logits_BV = 2 * rng.standard_normal((bench.num_rows, bench.vocab_size), np.float32)
    if bench.logits == "peaked":
        favourite_B5 = rng.integers(bench.vocab_size, size=(bench.num_rows, 5))
        np.put_along_axis(logits_BV, favourite_B5, np.asarray([22, 21, 20, 19, 18], np.float32), axis=1)
    columns = (bench.temperature, bench.top_k, bench.top_p, bench.min_p)
    kinds = (jnp.float32, jnp.int32, jnp.float32, jnp.float32)
    params = [jnp.full(bench.num_rows, x, kind) for x, kind in zip(columns, kinds, strict=True)]
    seed_B = jnp.asarray(rng.integers(2**31, size=bench.num_rows, dtype=np.int32))
    position_B = jnp.arange(bench.num_rows, dtype=jnp.int32)
    return jnp.asarray(logits_BV).astype(bench.dtype), *params, seed_B, position_B
