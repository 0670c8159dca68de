"""What to measure of products by experts: shapes, arguments, and the bytes and operations of one call.

A list for a script that times kernels on a GPU; it measures nothing itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.kernels_pallas.grouped_matmul.limits import LEAST_GPU_ROWS, MOST_GPU_ROWS
from jaxserve.models.experts import choose_tile_rows, plan_tiles


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedBench:
    """Tokens by the experts that each chose, as evenly as they can be chosen."""

    name: str
    num_tokens: int
    num_outputs: int = 1536  # gate and up of an expert of Qwen3-30B-A3B
    num_inputs: int = 2048
    num_experts: int = 128
    num_chosen: int = 8

    @property
    def num_rows(self) -> int:
        return self.num_tokens * self.num_chosen

    @property
    def moved_bytes(self) -> int:
        """The chosen experts' matrices once, the rows in bf16 and the results in float32."""
        matrix_bytes = min(self.num_rows, self.num_experts) * self.num_outputs * self.num_inputs * 2
        return matrix_bytes + self.num_rows * (2 * self.num_inputs + 4 * self.num_outputs)

    @property
    def num_flops(self) -> int:
        return 2 * self.num_rows * self.num_outputs * self.num_inputs


DOWN = {"num_outputs": 2048, "num_inputs": 768}
GROUPED_BENCHES = [
    GroupedBench(name="64 tokens, gate and up", num_tokens=64),
    GroupedBench(name="4096 tokens, gate and up", num_tokens=4096),
    GroupedBench(name="64 tokens, down", num_tokens=64, **DOWN),
    GroupedBench(name="4096 tokens, down", num_tokens=4096, **DOWN),
    GroupedBench(name="1 token, gate and up", num_tokens=1),
    GroupedBench(name="512 tokens, gate and up", num_tokens=512),
]


def make_arguments(bench: GroupedBench, key: jax.Array) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of `grouped_matmul`, random, on the default device."""
    keys = jax.random.split(key, 3)
    tile_rows = choose_tile_rows(bench.num_rows, bench.num_experts, LEAST_GPU_ROWS, MOST_GPU_ROWS)
    expert_P = jax.random.permutation(
        keys[0], jnp.arange(bench.num_rows, dtype=jnp.int32) % bench.num_experts
    )
    tiles = plan_tiles(expert_P, bench.num_experts, tile_rows)
    matrices = (bench.num_experts, bench.num_outputs, bench.num_inputs)
    x_MD = jax.random.normal(keys[1], (len(tiles.expert_I) * tile_rows, bench.num_inputs), jnp.bfloat16)
    w_EFD = jax.random.normal(keys[2], matrices, jnp.bfloat16)
    return (x_MD, w_EFD, tiles.expert_I, tiles.num_tiles), {}
