"""Products by the matrices of experts on Hopper (Pallas Mosaic GPU): every tile of rows in one launch.

The same function as `ref.grouped_matmul`. A block of threads takes one tile of rows and some outputs of its
expert, whose number it reads from memory; blocks of absent tiles end at once. One producer warpgroup brings
the inputs step by step into a ring in shared memory by TMA, and each consumer multiplies 64 rows of the left
operand by the whole right one:

    rows of a tile      left                      right                        consumers
    8, 16, 32           64 rows of the matrix     the tile ("swap-AB")         1
    64, 128             64 rows of the tile each  up to 256 of the matrix      1, 2

A few rows would not fill the 64 of a product of the tensor cores, so the matrix does; what comes out is
turned on its way to memory. Letters: those of ref.py, P places of the ring, L and N rows of left and right.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.kernels_pallas import mosaic

ROWS = 64  # of the left operand, of one product
STEP_BYTES = 96 * 1024  # under way in a block at most, where two share a multiprocessor
MOST_PLACES = 6


class Shape(NamedTuple):
    """What is known of a call while it is compiled."""

    tile_rows: int
    num_outputs: int
    num_inputs: int

    @property
    def is_swapped(self) -> bool:
        """Whether the matrix is the left operand."""
        return self.tile_rows < ROWS

    @property
    def num_consumers(self) -> int:
        return 1 if self.is_swapped else self.tile_rows // ROWS

    @property
    def block_outputs(self) -> int:
        """Rows of the matrix that a block takes. Where it takes many rows of x, those are read less often."""
        if self.is_swapped:
            return ROWS
        widths = (256, 128, 64) if self.num_consumers == 2 else (128, 64)
        return next(width for width in widths if self.num_outputs % width == 0)

    @property
    def right_rows(self) -> int:
        return self.tile_rows if self.is_swapped else self.block_outputs

    @property
    def step_inputs(self) -> int:
        return 128 if self.is_swapped and self.num_inputs % 128 == 0 else 64

    @property
    def num_steps(self) -> int:
        return self.num_inputs // self.step_inputs

    @property
    def num_places(self) -> int:
        place_bytes = 2 * self.step_inputs * (self.num_consumers * ROWS + self.right_rows)
        room_bytes = self.num_consumers * STEP_BYTES
        return min(room_bytes // place_bytes, MOST_PLACES, self.num_steps)


class Operands(NamedTuple):
    """The kernel's arguments and result, in device memory."""

    x_MD: Any
    w_EFD: Any
    expert_I: Any
    num_tiles_1: Any
    y_MF: Any


class Scratch(NamedTuple):
    """A block's shared memory: the ring of both operands, and what is turned."""

    left_PLD: Any
    right_PND: Any
    filled: Any
    emptied: Any
    turned_NF: Any = None  # only where the matrix is the left operand


def grouped_matmul(
    x_MD: jax.Array,
    w_EFD: jax.Array,
    expert_I: jax.Array,
    num_tiles: jax.Array,
    *,
    interpret: Any = False,
) -> jax.Array:
    """Each tile of x times the transpose of its expert's matrix: [M, F] float32, of bf16.

    Tiles are of 8, 16, 32, 64 or 128 rows; rows of absent tiles are not written. Raises ValueError for other
    tiles, and for matrices that are not of bf16 or whose sides are no multiples of 64.
    """
    _, num_outputs, num_inputs = w_EFD.shape
    shape = Shape(len(x_MD) // len(expert_I), num_outputs, num_inputs)
    if shape.tile_rows not in (8, 16, 32, 64, 128) or num_outputs % ROWS or num_inputs % 64:
        raise ValueError(f"The GPU's kernel multiplies by no experts of {w_EFD.shape} in tiles of {shape}.")
    if (x_MD.dtype, w_EFD.dtype) != (jnp.bfloat16, jnp.bfloat16):
        raise ValueError(f"The GPU's kernel multiplies bf16, not {x_MD.dtype} by {w_EFD.dtype}.")
    return _launch(shape, len(expert_I), interpret)(x_MD, w_EFD, expert_I, num_tiles.reshape(1))


def _launch(shape: Shape, most_tiles: int, interpret: Any) -> Any:
    places, step = shape.num_places, shape.step_inputs
    scratch = Scratch(
        left_PLD=mosaic.swizzled_smem((places, shape.num_consumers * ROWS, step), jnp.bfloat16),
        right_PND=mosaic.swizzled_smem((places, shape.right_rows, step), jnp.bfloat16),
        filled=mosaic.Barrier(num_arrivals=2, num_barriers=places),
        emptied=mosaic.Barrier(num_arrivals=shape.num_consumers, num_barriers=places),
    )
    if shape.is_swapped:
        scratch = scratch._replace(turned_NF=mosaic.SMEM((shape.tile_rows, ROWS), jnp.float32))

    def body(*refs, **own):
        run_block(shape, Operands(*refs), Scratch(**own))

    return mosaic.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((most_tiles * shape.tile_rows, shape.num_outputs), jnp.float32),
        scratch_types={name: kind for name, kind in scratch._asdict().items() if kind is not None},
        grid=(most_tiles, shape.num_outputs // shape.block_outputs),
        grid_names=("tile", "outputs"),
        num_threads=shape.num_consumers + 1,
        thread_name="warpgroup",
        kernel_name="grouped_matmul",
        interpret=interpret,
    )


def run_block(shape: Shape, operands: Operands, own: Scratch) -> None:
    """The program of one block of threads."""
    warpgroup, tile = lax.axis_index("warpgroup"), lax.axis_index("tile")

    @mosaic.when(tile < operands.num_tiles_1[0])
    def _run():
        mosaic.when(warpgroup == shape.num_consumers)(lambda: _bring_steps(shape, operands, own, tile))
        mosaic.when(warpgroup < shape.num_consumers)(lambda: _multiply(shape, operands, own, tile))


def _bring_steps(shape: Shape, operands: Operands, own: Scratch, tile) -> None:
    """The producer's part: both operands, step by step, into places that the consumers have done with."""
    rows = mosaic.ds(tile * shape.tile_rows, shape.tile_rows)
    outputs = mosaic.ds(lax.axis_index("outputs") * shape.block_outputs, shape.block_outputs)
    expert = operands.expert_I[tile]
    x_target, w_target = own.left_PLD, own.right_PND
    if shape.is_swapped:
        x_target, w_target = w_target, x_target

    def bring(step, _):
        place = lax.rem(step, jnp.int32(shape.num_places))
        mosaic.when(step >= shape.num_places)(lambda: mosaic.barrier_wait(own.emptied.at[place]))
        inputs = mosaic.ds(step * shape.step_inputs, shape.step_inputs)
        filled = own.filled.at[place]
        mosaic.copy_gmem_to_smem(operands.w_EFD.at[expert, outputs, inputs], w_target.at[place], filled)
        mosaic.copy_gmem_to_smem(operands.x_MD.at[rows, inputs], x_target.at[place], filled)

    lax.fori_loop(0, shape.num_steps, bring, None)


def _multiply(shape: Shape, operands: Operands, own: Scratch, tile) -> None:
    """A consumer's part: its rows of the left operand times the right one, and the result to memory."""
    consumer = lax.axis_index("warpgroup")
    own_rows = mosaic.ds(consumer * ROWS, ROWS)

    def release(step):
        """The place of a step whose product is done, to those who have another step to bring there."""
        place = lax.rem(step, jnp.int32(shape.num_places))
        is_wanted = (step >= 0) & (step + shape.num_places < shape.num_steps)
        mosaic.when(is_wanted)(lambda: mosaic.barrier_arrive(own.emptied.at[place]))

    def sum_steps(sum_LN):
        def add_step(step, _):
            place = lax.rem(step, jnp.int32(shape.num_places))
            mosaic.barrier_wait(own.filled.at[place])
            right_DN = own.right_PND.at[place].transpose((1, 0))
            mosaic.wgmma(sum_LN, own.left_PLD.at[place, own_rows], right_DN)
            mosaic.wgmma_wait(1)  # for the product before, while this one runs
            release(step - 1)

        lax.fori_loop(0, shape.num_steps, add_step, None)
        return sum_LN[...]

    y_LN = mosaic.run_scoped(sum_steps, mosaic.ACC((ROWS, shape.right_rows), jnp.float32))
    first_row, first_output = tile * shape.tile_rows, lax.axis_index("outputs") * shape.block_outputs
    if not shape.is_swapped:
        y_rows = mosaic.ds(first_row + consumer * ROWS, ROWS)
        mosaic.store(operands.y_MF.at[y_rows, mosaic.ds(first_output, shape.block_outputs)], y_LN)
        return
    mosaic.store(own.turned_NF.transpose((1, 0)), mosaic.layout_cast(y_LN, mosaic.Layout.WGMMA_TRANSPOSED))
    mosaic.commit_smem()
    y_block = operands.y_MF.at[mosaic.ds(first_row, shape.tile_rows), mosaic.ds(first_output, ROWS)]
    mosaic.copy_smem_to_gmem(own.turned_NF, y_block)
    mosaic.wait_smem_to_gmem(0)
