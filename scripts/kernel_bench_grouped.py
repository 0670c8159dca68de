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
    weights: str = "bfloat16"  # or "int8", of rows of int8, or "float8_e4m3fn"

    @property
    def x_dtype(self) -> str:
        return "int8" if self.weights == "int8" else "bfloat16"

    @property
    def num_rows(self) -> int:
        return self.num_tokens * self.num_chosen

    @property
    def moved_bytes(self) -> int:
        """The chosen experts' matrices once, the rows, and the results in float32."""
        weight_bytes, x_bytes = (2 if dtype == "bfloat16" else 1 for dtype in (self.weights, self.x_dtype))
        matrix_bytes = (
            min(self.num_rows, self.num_experts) * self.num_outputs * self.num_inputs * weight_bytes
        )
        return matrix_bytes + self.num_rows * (x_bytes * self.num_inputs + 4 * self.num_outputs)

    @property
    def num_flops(self) -> int:
        return 2 * self.num_rows * self.num_outputs * self.num_inputs


DOWN: dict[str, Any] = {"num_outputs": 2048, "num_inputs": 768}
GROUPED_BENCHES = [
    GroupedBench(name="64 tokens, gate and up", num_tokens=64),
    GroupedBench(name="4096 tokens, gate and up", num_tokens=4096),
    GroupedBench(name="64 tokens, down", num_tokens=64, **DOWN),
    GroupedBench(name="4096 tokens, down", num_tokens=4096, **DOWN),
    GroupedBench(name="64 tokens, gate and up, fp8", num_tokens=64, weights="float8_e4m3fn"),
    GroupedBench(name="4096 tokens, gate and up, fp8", num_tokens=4096, weights="float8_e4m3fn"),
    GroupedBench(name="64 tokens, gate and up, int8", num_tokens=64, weights="int8"),
    GroupedBench(name="4096 tokens, gate and up, int8", num_tokens=4096, weights="int8"),
    GroupedBench(name="1 token, gate and up", num_tokens=1),
    GroupedBench(name="512 tokens, gate and up", num_tokens=512),
]


def make_arguments(bench: GroupedBench, key: jax.Array) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of `grouped_matmul`, random, on the default device."""
    keys = jax.random.split(key, 4)
    tile_rows = choose_tile_rows(bench.num_rows, bench.num_experts, LEAST_GPU_ROWS, MOST_GPU_ROWS)
    expert_P = jax.random.permutation(
        keys[0], jnp.arange(bench.num_rows, dtype=jnp.int32) % bench.num_experts
    )
    tiles = plan_tiles(expert_P, bench.num_experts, tile_rows)
    matrices = (bench.num_experts, bench.num_outputs, bench.num_inputs)

    def draw(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
        if dtype == "int8":
            return jax.random.randint(key, shape, -127, 128, jnp.int8)
        return jax.random.normal(key, shape, jnp.bfloat16).astype(dtype)

    x_MD = draw(keys[1], (len(tiles.expert_I) * tile_rows, bench.num_inputs), bench.x_dtype)
    w_EFD = draw(keys[2], matrices, bench.weights)
    scales = ()
    if bench.weights != "bfloat16":
        scales = (jax.random.uniform(keys[3], matrices[:2], jnp.float32, 0.5, 2.0),)
    return (x_MD, w_EFD, tiles.expert_I, tiles.num_tiles, *scales), {}
