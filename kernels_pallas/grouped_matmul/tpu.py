"""Products by the matrices of experts on a TPU (Pallas): a block of an expert's matrix for a tile of rows.

The same function as `ref.grouped_matmul`. The grid is over blocks of outputs, and within them over tiles.
The numbers of the experts are known before the grid begins, so the next tile's block is on its way while one
is multiplied by, and stays where it is if both tiles are of one expert. For absent tiles nothing is brought:
they name what the last tile had. The sizes come from no measurement: it was never run on a TPU.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
MOST_BLOCK_BYTES = 4 << 20  # of a matrix; two are in VMEM


def grouped_matmul(
    x_MD: jax.Array,
    w_EFD: jax.Array,
    expert_I: jax.Array,
    num_tiles: jax.Array,
    *,
    interpret: Any = False,
) -> jax.Array:
    """Each tile of x times the transpose of its expert's matrix: [M, F] float32, of bf16.

    One tile or more is there. Rows of absent tiles are not written.
    """
    _, num_outputs, num_inputs = w_EFD.shape
    tile_rows = len(x_MD) // len(expert_I)
    block_outputs = choose_block_outputs(num_outputs, num_inputs)

    def last_there(tile: Any, num_tiles_1: Any) -> Any:
        return jnp.minimum(tile, num_tiles_1[0] - 1)

    return pl.pallas_call(
        _multiply,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(num_outputs // block_outputs, len(expert_I)),
            in_specs=[
                pl.BlockSpec((tile_rows, num_inputs), lambda f, i, _, n: (last_there(i, n), 0)),
                pl.BlockSpec(
                    (None, block_outputs, num_inputs),
                    lambda f, i, expert_I, n: (expert_I[last_there(i, n)], f, 0),
                ),
            ],
            out_specs=pl.BlockSpec((tile_rows, block_outputs), lambda f, i, _, n: (last_there(i, n), f)),
        ),
        out_shape=jax.ShapeDtypeStruct((len(x_MD), num_outputs), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="grouped_matmul",
        interpret=interpret,
    )(expert_I, num_tiles.reshape(1), x_MD, w_EFD)


def choose_block_outputs(num_outputs: int, num_inputs: int) -> int:
    """As many as fit, in equal parts of whole lanes; an even number of parts if there is one, since two cores
    may share them."""
    row_bytes = 2 * -(-num_inputs // LANES) * LANES

    def fits(num_blocks: int) -> bool:
        is_whole = num_outputs % (num_blocks * LANES) == 0 or num_blocks == 1
        return is_whole and num_outputs // num_blocks * row_bytes <= MOST_BLOCK_BYTES

    fitting = filter(fits, range(1, max(num_outputs // LANES, 1) + 1))
    return num_outputs // min(fitting, key=lambda num_blocks: (num_blocks % 2, num_blocks))


def _multiply(_expert_I: Any, num_tiles_1: Any, x_RD: Any, w_FD: Any, y_RF: Any) -> None:
    @pl.when(pl.program_id(1) < num_tiles_1[0])
    def _multiply_tile():
        y_RF[...] = jax.lax.dot_general(
            x_RD[...], w_FD[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
