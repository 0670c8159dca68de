"""The residual add and the norm behind it on a TPU (Pallas): one launch in place of four operations of XLA.

XLA adds, sums squares, takes roots and cuts a layer's weights out of their stack in operations of their own,
each of which takes a while to start; only the last multiplication it does where a product reads the rows.
That is much where rows are few, as in decode. Of many rows the bytes decide, and XLA moves fewer, as what it
multiplies is never written.

The letter W: rows of a tile of the stack of weights.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.kernels_pallas.add_norm import ref
from jaxserve.kernels_pallas.add_norm.tpu_rows import add_norm_rows, find_vector, vector_tile

LANES = 128
# Rows times channels, above which XLA's form may take less time by the estimate (planning/estimate.py): from
# about 100 rows of 3,584 on, on a v5e. So much is one block.
MOST_NUMBERS = 1 << 18


def begin_sum(x_TD: jax.Array, dtype: jnp.dtype) -> jax.Array | None:
    """As ref.begin_sum: zeros for the kernel; None for many rows, or no whole lanes, which get XLA's form."""
    return jnp.zeros_like(x_TD, dtype) if _is_served(x_TD) else None


def _is_served(x_TD: jax.Array) -> bool:
    return x_TD.shape[1] % LANES == 0 and x_TD.size <= MOST_NUMBERS


def add_norm(
    x_TD: jax.Array,
    y_TD: jax.Array | None,
    weight: jax.Array,
    layer: jax.Array | None,
    *,
    eps: float,
    dtype: jnp.dtype,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """As ref.add_norm, the norm in `dtype`; XLA's form of what `begin_sum` does not serve."""
    if y_TD is None or not _is_served(x_TD):
        return ref.add_norm(x_TD, y_TD, weight, layer, eps=eps, dtype=dtype)
    num_rows, width = x_TD.shape
    weight_LD = weight.reshape(-1, width)
    rows = pl.BlockSpec((num_rows, width), lambda i, _: (0, 0))
    tile = vector_tile(weight_LD)
    tile_bytes = 4 * math.prod(tile.block_shape)
    number_bytes = 2 * 4 + y_TD.dtype.itemsize + jnp.dtype(dtype).itemsize  # x, their sum, y, the norm
    return pl.pallas_call(
        partial(_norm_rows, eps=eps),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(1,), in_specs=[rows, rows, tile], out_specs=[rows, rows]
        ),
        out_shape=[jax.ShapeDtypeStruct(x_TD.shape, jnp.float32), jax.ShapeDtypeStruct(x_TD.shape, dtype)],
        input_output_aliases={1: 0},
        cost_estimate=pl.CostEstimate(
            flops=5 * x_TD.size,
            bytes_accessed=number_bytes * x_TD.size + tile_bytes,
            transcendentals=num_rows,
        ),
        name="add_norm",
        interpret=interpret,
    )(jnp.zeros(1, jnp.int32) if layer is None else layer[None], x_TD, y_TD, weight_LD)


def _norm_rows(layer_1: Any, x_TD: Any, y_TD: Any, weight_WD: Any, sum_TD: Any, h_TD: Any, *, eps: float):
    weight_1D = find_vector(weight_WD, layer_1[0])
    add_norm_rows(x_TD, y_TD, weight_1D, sum_TD, h_TD, eps=eps)
