"""What to measure of products by 4-bit matrices: shapes, arguments, and the bytes and operations of one call.

A list for a script that times kernels on a GPU; it measures nothing itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.kernels_pallas.int4_matmul.ref import Int4Matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4Bench:
    """Tokens by one matrix."""

    name: str
    num_tokens: int
    num_outputs: int = 37888  # gate and up of Qwen2.5 7B
    num_inputs: int = 3584
    group_size: int = 128

    @property
    def moved_bytes(self) -> int:
        """Values, scales and zeros once, the tokens in bf16 and the results in float32."""
        num_groups = self.num_inputs // self.group_size
        matrix_bytes = self.num_outputs * (self.num_inputs // 2 + 3 * num_groups)
        return matrix_bytes + self.num_tokens * (2 * self.num_inputs + 4 * self.num_outputs)

    @property
    def num_flops(self) -> int:
        return 2 * self.num_tokens * self.num_outputs * self.num_inputs


INT4_BENCHES = [
    Int4Bench(name="1 token, gate and up", num_tokens=1),
    Int4Bench(name="64 tokens, gate and up", num_tokens=64),
    Int4Bench(name="1 token, down", num_tokens=1, num_outputs=3584, num_inputs=18944),
    Int4Bench(name="64 tokens, down", num_tokens=64, num_outputs=3584, num_inputs=18944),
    Int4Bench(name="8 tokens, attention's output", num_tokens=8, num_outputs=3584),
    Int4Bench(name="16 tokens, gate and up, groups of 64", num_tokens=16, group_size=64),
    Int4Bench(name="2048 tokens, gate and up", num_tokens=2048),
]


def make_arguments(bench: Int4Bench, key: jax.Array) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of `int4_matmul`, random, on the default device."""
    keys = jax.random.split(key, 4)
    groups = (bench.num_inputs // bench.group_size, bench.num_outputs)
    w = Int4Matrix(
        jax.random.randint(keys[0], (bench.num_outputs, bench.num_inputs // 2), -128, 128, jnp.int8),
        jax.random.uniform(keys[1], groups, jnp.float32, 0.001, 0.003).astype(jnp.float16),
        jax.random.randint(keys[2], groups, 0, 16, jnp.int8),
    )
    return (jax.random.normal(keys[3], (bench.num_tokens, bench.num_inputs), jnp.bfloat16), w), {}
