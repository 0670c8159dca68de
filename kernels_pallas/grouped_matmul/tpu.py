"""Products by the matrices of experts on a TPU (Pallas): a block of an expert's matrix for a tile of rows.

The same function as `ref.grouped_matmul`. The grid is over blocks of outputs, and within them over tiles.
The numbers of the experts are known before the grid begins, so the next tile's block is on its way while one
is multiplied by, and stays where it is if both tiles are of one expert. For absent tiles nothing is brought:
they name what the last tile had. fp8 becomes bf16 on its way to the matrix unit. The sizes come from no
measurement: it was never run on a TPU.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
MOST_BLOCK_BYTES = 4 << 20  # of a matrix; two are in VMEM
DIMS = (((1,), (1,)), ((), ()))


def grouped_matmul(
    x_MD: jax.Array,
    w_EFD: jax.Array,
    expert_I: jax.Array,
    num_tiles: jax.Array,
    scale_EF: jax.Array | None = None,
    *,
    widens_int8: bool = False,
    interpret: Any = False,
) -> jax.Array:
    """Each tile of x times the transpose of its expert's matrix: [M, F] float32. Of bf16; of int8; or of bf16
    by float8_e4m3fn.

    One tile or more is there. Rows of absent tiles are not written. `widens_int8` is for chips that multiply
    no int8: as bf16 the products are exact too, but their sums are rounded to float32.
    """
    _, num_outputs, num_inputs = w_EFD.shape
    tile_rows = len(x_MD) // len(expert_I)
    block_outputs = choose_block_outputs(num_outputs, num_inputs * w_EFD.dtype.itemsize)

    def last_there(tile: Any, num_tiles_1: Any) -> Any:
        return jnp.minimum(tile, num_tiles_1[0] - 1)

    in_specs = [
        pl.BlockSpec((tile_rows, num_inputs), lambda f, i, _, n: (last_there(i, n), 0)),
        pl.BlockSpec(
            (None, block_outputs, num_inputs), lambda f, i, expert_I, n: (expert_I[last_there(i, n)], f, 0)
        ),
    ]
    arguments = [x_MD, w_EFD]
    if scale_EF is not None:
        in_specs.append(pl.BlockSpec((None, 1, block_outputs), lambda f, i, _, n: (last_there(i, n), 0, f)))
        arguments.append(scale_EF[expert_I % len(scale_EF), None])
    return pl.pallas_call(
        partial(_multiply if scale_EF is None else _multiply_scaled, widens_int8),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(num_outputs // block_outputs, len(expert_I)),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((tile_rows, block_outputs), lambda f, i, _, n: (last_there(i, n), f)),
        ),
        out_shape=jax.ShapeDtypeStruct((len(x_MD), num_outputs), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="grouped_matmul",
        interpret=interpret,
    )(expert_I, num_tiles.reshape(1), *arguments)


def choose_block_outputs(num_outputs: int, row_bytes: int) -> int:
    """As many as fit, in equal parts of whole lanes; an even number of parts if there is one, since two cores
    may share them."""
    row_bytes = -(-row_bytes // LANES) * LANES

    def fits(num_blocks: int) -> bool:
        is_whole = num_outputs % (num_blocks * LANES) == 0 or num_blocks == 1
        return is_whole and num_outputs // num_blocks * row_bytes <= MOST_BLOCK_BYTES

    fitting = filter(fits, range(1, max(num_outputs // LANES, 1) + 1))
    return num_outputs // min(fitting, key=lambda num_blocks: (num_blocks % 2, num_blocks))


def _multiply(widens_int8: bool, _expert_I: Any, num_tiles_1: Any, x_RD: Any, w_FD: Any, y_RF: Any) -> None:
    @pl.when(pl.program_id(1) < num_tiles_1[0])
    def _multiply_tile():
        y_RF[...] = _product(x_RD[...], w_FD[...], widens_int8)


def _multiply_scaled(
    widens_int8: bool, _expert_I: Any, num_tiles_1: Any, x_RD: Any, w_FD: Any, scale_1F: Any, y_RF: Any
) -> None:
    @pl.when(pl.program_id(1) < num_tiles_1[0])
    def _multiply_tile():
        y_RF[...] = _product(x_RD[...], w_FD[...], widens_int8) * scale_1F[...]


def _product(x_RD: jax.Array, w_FD: jax.Array, widens_int8: bool) -> jax.Array:
    if x_RD.dtype == jnp.int8 and not widens_int8:
        return jax.lax.dot_general(x_RD, w_FD, DIMS, preferred_element_type=jnp.int32).astype(jnp.float32)
    x_RD, w_FD = x_RD.astype(jnp.bfloat16), w_FD.astype(jnp.bfloat16)
    return jax.lax.dot_general(x_RD, w_FD, DIMS, preferred_element_type=jnp.float32)
