"""Products by the matrices of experts: the cases that every form must get right, and what they must give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.kernels_pallas.int4_matmul.ref import Int4Matrix, dequantize


@dataclass(frozen=True)
class Case:
    name: str
    counts_E: tuple[int, ...]  # rows of each expert
    tile_rows: int
    num_outputs: int
    num_inputs: int
    num_absent: int = 0  # tiles
    weights: str = "bfloat16"  # or "int8", of int8 rows, or "float8_e4m3fn", or "int4"
    group_size: int = 0  # of 4 bits
    num_layers: int = 1  # whose matrices there are; the experts are those of the last, whose scales there are


CASES = [
    Case("one row", (0, 1, 0), 8, 64, 64),
    Case("ragged, one expert with none, absent tiles", (9, 0, 3, 8), 8, 128, 7 * 128, num_absent=2),
    Case("all to one expert, whose last tile has one row", (0, 0, 33, 0), 32, 64, 192),
    Case("tiles of a left operand's rows", (65, 64), 64, 384, 6 * 64, num_absent=1),
    Case("tiles for two consumers", (129, 0, 5), 128, 256, 5 * 64),
    Case("int8", (9, 0, 3), 8, 128, 7 * 128, num_absent=2, weights="int8"),
    Case("int8 of three layers, narrow steps", (0, 33), 32, 64, 192, weights="int8", num_layers=3),
    Case("int8, tiles of a left operand's rows", (65,), 64, 192, 6 * 64, weights="int8"),
    Case("int8, tiles for two consumers", (129, 0, 5), 128, 256, 5 * 64, weights="int8"),
    Case("fp8", (9, 0, 3), 8, 128, 7 * 128, num_absent=2, weights="float8_e4m3fn"),
    Case("fp8 of two layers, one consumer", (0, 9), 64, 192, 192, weights="float8_e4m3fn", num_layers=2),
    Case("4 bits in groups of 64", (9, 0, 3), 8, 128, 3 * 128, weights="int4", group_size=64),
    Case("4 bits in groups of 256, two consumers", (129,), 128, 128, 512, weights="int4", group_size=256),
    Case("fp8, two consumers of a tile", (129,), 128, 128, 5 * 64, weights="float8_e4m3fn"),
]


class Input(NamedTuple):
    """The arguments, and the result in float64; NaN where rows of absent tiles may be anything."""

    x_MD: jax.Array
    w_EFD: jax.Array | Int4Matrix
    expert_I: jax.Array
    num_tiles: jax.Array
    scale_EF: jax.Array | None
    want_MF: np.ndarray


def make_input(case: Case) -> Input:
    rng = np.random.default_rng(case.num_inputs)
    num_experts = len(case.counts_E)
    expert_I = [e for e, count in enumerate(case.counts_E) for _ in range(-(-count // case.tile_rows))]
    num_tiles = len(expert_I)
    expert_I += [num_experts] * case.num_absent  # none that there is
    expert_I = np.array(expert_I) + (case.num_layers - 1) * num_experts

    def draw(shape: tuple[int, ...], dtype: str) -> jax.Array:
        if dtype == "int8":
            return jnp.asarray(rng.integers(-127, 128, shape), jnp.int8)
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    x_dtype = "int8" if case.weights == "int8" else "bfloat16"
    x_MD = draw((len(expert_I) * case.tile_rows, case.num_inputs), x_dtype)
    matrices = (case.num_layers * num_experts, case.num_outputs, case.num_inputs)
    w_EFD = draw_groups(rng, matrices, case.group_size) if case.group_size else draw(matrices, case.weights)
    scale_EF = None
    if case.weights in ("int8", "float8_e4m3fn"):
        scale_EF = jnp.asarray(rng.uniform(0.5, 2, (num_experts, case.num_outputs)), jnp.float32)
    want_MF = np.full((len(x_MD), case.num_outputs), np.nan)
    for index, expert in enumerate(expert_I[:num_tiles]):
        rows = slice(index * case.tile_rows, (index + 1) * case.tile_rows)
        want_MF[rows] = np.asarray(x_MD[rows]).astype(np.float64) @ read_expert(w_EFD, expert).T
        if scale_EF is not None:
            want_MF[rows] *= np.asarray(scale_EF[expert % num_experts])
    return Input(x_MD, w_EFD, jnp.asarray(expert_I, jnp.int32), jnp.int32(num_tiles), scale_EF, want_MF)


def draw_groups(rng: np.random.Generator, matrices: tuple[int, int, int], group_size: int) -> Int4Matrix:
    num_experts, num_outputs, num_inputs = matrices
    groups = (num_inputs // group_size, num_experts, num_outputs)
    return Int4Matrix(
        jnp.asarray(rng.integers(-128, 128, (num_experts, num_outputs, num_inputs // 2)), jnp.int8),
        jnp.asarray(rng.uniform(0.5, 2, groups), jnp.float16),
        jnp.asarray(rng.integers(0, 16, groups), jnp.int8),
    )


def read_expert(w_EFD: jax.Array | Int4Matrix, expert: int) -> np.ndarray:
    """Its matrix, float64 [F, D]; of 4 bits, rounded to bf16."""
    if not isinstance(w_EFD, Int4Matrix):
        return np.asarray(w_EFD[expert], np.float64)
    q_EFC, scale_GEF, zero_GEF = w_EFD
    w_FD = dequantize(Int4Matrix(q_EFC[expert], scale_GEF[:, expert], zero_GEF[:, expert]))
    return np.asarray(w_FD.astype(jnp.bfloat16), np.float64)


def measure_error(got_MF: jax.Array, want_MF: np.ndarray) -> float:
    """The largest difference in rows of present tiles, of the largest value; NaN where one is missing."""
    is_there_M = ~np.isnan(want_MF[:, 0])
    difference = np.asarray(got_MF)[is_there_M].astype(np.float64) - want_MF[is_there_M]
    return float(np.abs(difference).max() / np.abs(want_MF[is_there_M]).max())
