"""Products by the matrices of experts on Hopper (Pallas Mosaic GPU): every tile of rows in one launch.

The same function as `ref.grouped_matmul`. A block of threads takes one tile of rows and some outputs of its
expert, whose number it reads from memory; blocks of absent tiles end at once. One producer warpgroup brings
the inputs step by step into a ring in shared memory by TMA, and each consumer multiplies 64 rows of the left
operand by the whole right one:

    rows of a tile   weights      left                         right                      consumers
    8, 16, 32        any          64 rows of the matrix        the tile ("swap-AB")       1
    64, 128          bf16, int8   64 rows of the tile each     up to 256 of the matrix    1, 2
    64, 128          fp8          64 rows of the matrix each   the tile                   2, or 1 if odd

A few rows would not fill the 64 of a product of the tensor cores, so the matrix does; what comes out is
turned on its way to memory. int8 is multiplied by int8, as it is. fp8 becomes bf16, exactly, in the hands of
the consumer that multiplies by it: so that no other waits for it, the matrix is always the left operand.
While a step is widened, the product of the one before runs. Letters: those of ref.py, P places of the ring,
L and N rows of left and right, C consumers, B buffers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.kernels_pallas import mosaic

ROWS = 64  # of the left operand, of one product
CONSUMER_BYTES = 104 * 1024  # of shared memory: two blocks of one consumer share a multiprocessor
MOST_PLACES = 6
DTYPES = (("bfloat16", "bfloat16"), ("int8", "int8"), ("bfloat16", "float8_e4m3fn"))  # of x and the matrices
NUM_WIDE = 2  # one is multiplied by while the other is filled


class Shape(NamedTuple):
    """What is known of a call while it is compiled."""

    tile_rows: int
    num_outputs: int
    num_inputs: int
    num_scaled: int  # experts that scales are of; 0 where there are none
    x_dtype: Any
    w_dtype: Any

    @property
    def widens(self) -> bool:
        return self.w_dtype == jnp.float8_e4m3fn

    @property
    def sum_dtype(self) -> Any:
        return jnp.int32 if self.w_dtype == jnp.int8 else jnp.float32

    @property
    def is_swapped(self) -> bool:
        """Whether the matrix is the left operand."""
        return self.tile_rows < ROWS or self.widens

    @property
    def num_consumers(self) -> int:
        if self.tile_rows < ROWS:
            return 1
        if self.widens:
            return 2 if self.num_outputs % (2 * ROWS) == 0 else 1
        return self.tile_rows // ROWS

    @property
    def block_outputs(self) -> int:
        """Rows of the matrix that a block takes. Where it takes many rows of x, those are read less often."""
        if self.is_swapped:
            return ROWS * self.num_consumers
        widths = (256, 128, 64) if self.num_consumers == 2 else (128, 64)
        return next(width for width in widths if self.num_outputs % width == 0)

    @property
    def left_rows(self) -> int:
        return ROWS * self.num_consumers

    @property
    def right_rows(self) -> int:
        return self.tile_rows if self.is_swapped else self.block_outputs

    @property
    def step_inputs(self) -> int:
        """As many as 256 bytes of the products' type hold, or 128 where both operands have many rows."""
        most = (256 if self.tile_rows < ROWS else 128) // self.x_dtype.itemsize
        return next(count for count in (256, 128, 64) if count <= most and self.num_inputs % count == 0)

    @property
    def num_steps(self) -> int:
        return self.num_inputs // self.step_inputs

    @property
    def num_places(self) -> int:
        left, right = (self.w_dtype, self.x_dtype) if self.is_swapped else (self.x_dtype, self.w_dtype)
        place_bytes = self.step_inputs * (self.left_rows * left.itemsize + self.right_rows * right.itemsize)
        room_bytes = CONSUMER_BYTES * self.num_consumers
        if self.is_swapped:
            room_bytes -= self.left_rows * self.right_rows * 4
        if self.widens:
            room_bytes -= NUM_WIDE * self.left_rows * self.step_inputs * 2
        return min(room_bytes // place_bytes, MOST_PLACES, self.num_steps)


class Operands(NamedTuple):
    """The kernel's arguments and result, in device memory."""

    x_MD: Any
    w_EFD: Any
    expert_I: Any
    num_tiles_1: Any
    scale_EF: Any
    y_MF: Any


class Scratch(NamedTuple):
    """A block's shared memory: the ring of both operands, what is widened, and what is turned."""

    left_PLD: Any
    right_PND: Any
    filled: Any
    emptied: Any
    wide_BLD: Any = None  # only of fp8
    turned_CNF: Any = None  # only where the matrix is the left operand


def grouped_matmul(
    x_MD: jax.Array,
    w_EFD: jax.Array,
    expert_I: jax.Array,
    num_tiles: jax.Array,
    scale_EF: jax.Array | None = None,
    *,
    interpret: Any = False,
) -> jax.Array:
    """Each tile of x times the transpose of its expert's matrix: [M, F] float32. Of bf16; of int8; or of bf16
    by float8_e4m3fn.

    Tiles are of 8, 16, 32, 64 or 128 rows; rows of absent tiles are not written. Raises ValueError for other
    tiles and types, and for matrices whose sides are no multiples of 64.
    """
    _, num_outputs, num_inputs = w_EFD.shape
    tile_rows = len(x_MD) // len(expert_I)
    if tile_rows not in (8, 16, 32, 64, 128) or num_outputs % ROWS or num_inputs % 64:
        raise ValueError(
            f"The GPU's kernel multiplies by no experts of {w_EFD.shape} in tiles of {tile_rows}."
        )
    if (x_MD.dtype.name, w_EFD.dtype.name) not in DTYPES:
        raise ValueError(f"The GPU's kernel multiplies no {x_MD.dtype} by {w_EFD.dtype}.")
    num_scaled = 0 if scale_EF is None else len(scale_EF)
    shape = Shape(tile_rows, num_outputs, num_inputs, num_scaled, x_MD.dtype, w_EFD.dtype)
    arguments = x_MD, w_EFD, expert_I, num_tiles.reshape(1)
    launch = _launch(shape, len(expert_I), interpret)
    return launch(*arguments) if scale_EF is None else launch(*arguments, scale_EF)


def _launch(shape: Shape, most_tiles: int, interpret: Any) -> Any:
    places, step = shape.num_places, shape.step_inputs
    left, right = (shape.w_dtype, shape.x_dtype) if shape.is_swapped else (shape.x_dtype, shape.w_dtype)
    scratch = Scratch(
        left_PLD=mosaic.swizzled_smem((places, shape.left_rows, step), left),
        right_PND=mosaic.swizzled_smem((places, shape.right_rows, step), right),
        filled=mosaic.Barrier(num_arrivals=2, num_barriers=places),
        emptied=mosaic.Barrier(num_arrivals=shape.num_consumers, num_barriers=places),
    )
    if shape.widens:
        scratch = scratch._replace(
            wide_BLD=mosaic.swizzled_smem((NUM_WIDE, shape.left_rows, step), shape.x_dtype)
        )
    if shape.is_swapped:
        scratch = scratch._replace(
            turned_CNF=mosaic.SMEM((shape.num_consumers, shape.tile_rows, ROWS), jnp.float32)
        )

    def body(*refs, **own):
        *arguments, y_MF = refs
        scale_EF = arguments.pop() if shape.num_scaled else None
        run_block(shape, Operands(*arguments, scale_EF, y_MF), Scratch(**own))

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
    own_rows = mosaic.ds(lax.axis_index("warpgroup") * ROWS, ROWS)

    def release(step):
        """The place of a step whose product is done, to those who have another step to bring there."""
        place = lax.rem(step, jnp.int32(shape.num_places))
        is_wanted = (step >= 0) & (step + shape.num_places < shape.num_steps)
        mosaic.when(is_wanted)(lambda: mosaic.barrier_arrive(own.emptied.at[place]))

    def sum_steps(sum_LN):
        def add_step(step, _):
            place = lax.rem(step, jnp.int32(shape.num_places))
            mosaic.barrier_wait(own.filled.at[place])
            left_LD = own.left_PLD.at[place, own_rows]
            if shape.widens:
                left_LD = _widen(left_LD, own.wide_BLD.at[lax.rem(step, jnp.int32(NUM_WIDE)), own_rows])
            mosaic.wgmma(sum_LN, left_LD, own.right_PND.at[place].transpose((1, 0)))
            mosaic.wgmma_wait(1)  # for the product before, while this one runs
            release(step - 1)

        lax.fori_loop(0, shape.num_steps, add_step, None)
        return sum_LN[...]

    y_LN = mosaic.run_scoped(sum_steps, mosaic.ACC((ROWS, shape.right_rows), shape.sum_dtype))
    write = _write_turned if shape.is_swapped else _write_rows
    write(shape, operands, own, tile, y_LN.astype(jnp.float32))


def _widen(narrow_LD, wide_LD) -> Any:
    """A step's rows in the type of the products. No product reads that buffer any more: at most one runs."""
    q_LD = mosaic.load(narrow_LD, layout=mosaic.Layout.WGMMA_UPCAST_2X)
    mosaic.store(wide_LD, q_LD.astype(jnp.float32).astype(wide_LD.dtype))
    mosaic.commit_smem()
    return wide_LD


def _read_scales(shape: Shape, operands: Operands, tile, outputs, axis: int, dims: tuple[int, int]):
    """Those of a block's outputs, which are the axis of a product that is not `axis`."""
    expert = lax.rem(operands.expert_I[tile], jnp.int32(shape.num_scaled))
    layout = mosaic.Layout.WGMMA.reduce(axis)
    scale_F = mosaic.load(operands.scale_EF.at[expert, outputs], layout=layout, optimized=False)
    return lax.broadcast_in_dim(scale_F, dims, (1 - axis,))


def _write_rows(shape: Shape, operands: Operands, own: Scratch, tile, y_RF) -> None:
    first_row = tile * shape.tile_rows + lax.axis_index("warpgroup") * ROWS
    outputs = mosaic.ds(lax.axis_index("outputs") * shape.block_outputs, shape.block_outputs)
    if shape.num_scaled:
        y_RF = y_RF * _read_scales(shape, operands, tile, outputs, 0, y_RF.shape)
    mosaic.store(operands.y_MF.at[mosaic.ds(first_row, ROWS), outputs], y_RF)


def _write_turned(shape: Shape, operands: Operands, own: Scratch, tile, y_FR) -> None:
    consumer = lax.axis_index("warpgroup")
    first_output = lax.axis_index("outputs") * shape.block_outputs + consumer * ROWS
    outputs = mosaic.ds(first_output, ROWS)
    if shape.num_scaled:
        y_FR = y_FR * _read_scales(shape, operands, tile, outputs, 1, y_FR.shape)
    turned_NF = own.turned_CNF.at[consumer]
    mosaic.store(turned_NF.transpose((1, 0)), mosaic.layout_cast(y_FR, mosaic.Layout.WGMMA_TRANSPOSED))
    mosaic.commit_smem()
    rows = mosaic.ds(tile * shape.tile_rows, shape.tile_rows)
    mosaic.copy_smem_to_gmem(turned_NF, operands.y_MF.at[rows, outputs])
    mosaic.wait_smem_to_gmem(0)
