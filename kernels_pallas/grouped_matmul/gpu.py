"""Products by the matrices of experts on Hopper (Pallas Mosaic GPU): every tile of rows in one launch.

The same function as `ref.grouped_matmul`. A block of threads takes one tile of rows and some outputs of its
expert, whose number it reads from memory; blocks of absent tiles end at once. One producer warpgroup brings
the inputs step by step into a ring in shared memory by TMA, and each consumer multiplies 64 rows of the left
operand by the whole right one:

    rows of a tile   weights      left                         right                      consumers
    8, 16, 32        any          64 rows of the matrix        the tile ("swap-AB")       1
    64, 128          bf16, int8   64 rows of the tile each     up to 256 of the matrix    1, 2
    64, 128          fp8, int4    64 rows of the matrix each   the tile                   2, or 1 if odd

A few rows would not fill the 64 of a product of the tensor cores, so the matrix does; what comes out is
turned on its way to memory. int8 is multiplied by int8, as it is. fp8, exactly, and 4 bits with their scales
and zeros become bf16 in the hands of the consumer that multiplies by them: so that no other waits for it, the
matrix is then always the left operand. While a step is widened, the product of the one before runs. Letters:
those of ref.py and int4_matmul/ref.py, P places of the ring, L and N rows of left and right, B buffers, U
consumers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.kernels_pallas import mosaic
from jaxserve.kernels_pallas.int4_matmul.limits import find_int4_limit
from jaxserve.kernels_pallas.int4_matmul.ref import HALF, MIDDLE, RUN, Int4Matrix

ROWS = 64  # of the left operand, of one product
CONSUMER_BYTES = 104 * 1024  # of shared memory: two blocks of one consumer share a multiprocessor
MOST_PLACES = 6
DTYPES = (("bfloat16", "bfloat16"), ("int8", "int8"), ("bfloat16", "float8_e4m3fn"))  # of x and the matrices
LOW_BITS, HIGH_BITS = 15, -16  # of a byte of two values, as a signed number
NUM_WIDE = 2  # one is multiplied by while the other is filled


class Shape(NamedTuple):
    """What is known of a call while it is compiled."""

    tile_rows: int
    num_outputs: int
    num_inputs: int
    num_scaled: int  # experts that scales are of; 0 where there are none
    group_size: int  # inputs that share a scale, of 4 bits; else 0
    x_dtype: Any
    w_dtype: Any  # int8 too where two values are packed in a byte

    @property
    def widens(self) -> bool:
        return self.x_dtype != self.w_dtype

    @property
    def packing(self) -> int:
        """Values in an element of the matrix."""
        return 2 if self.group_size else 1

    @property
    def sum_dtype(self) -> Any:
        return jnp.int32 if self.x_dtype == jnp.int8 else jnp.float32

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
        """As many as 256 bytes of the products' type hold, or 128 where both operands have many rows. Of 4
        bits, those that are packed together."""
        if self.group_size:
            return RUN
        most = (256 if self.tile_rows < ROWS else 128) // self.x_dtype.itemsize
        return next(count for count in (256, 128, 64) if count <= most and self.num_inputs % count == 0)

    @property
    def num_steps(self) -> int:
        return self.num_inputs // self.step_inputs

    @property
    def num_places(self) -> int:
        left, right = (self.w_dtype, self.x_dtype) if self.is_swapped else (self.x_dtype, self.w_dtype)
        place_bytes = self.step_inputs * (
            self.left_rows * left.itemsize // self.packing + self.right_rows * right.itemsize
        )
        room_bytes = CONSUMER_BYTES * self.num_consumers
        if self.is_swapped:
            room_bytes -= self.left_rows * self.right_rows * 4
        if self.widens:
            room_bytes -= NUM_WIDE * self.left_rows * self.step_inputs * 2
        return min(room_bytes // place_bytes, MOST_PLACES, self.num_steps)


class Operands(NamedTuple):
    """The kernel's arguments and result, in device memory."""

    x_MD: Any
    w_EFD: Any  # bytes of two values where it is of 4 bits
    expert_I: Any
    num_tiles_1: Any
    scale_EF: Any = None
    scale_GEF: Any = None
    zero_GEF: Any = None
    y_MF: Any = None


class Scratch(NamedTuple):
    """A block's shared memory: the ring of both operands, what is widened, and what is turned."""

    left_PLD: Any
    right_PND: Any
    filled: Any
    emptied: Any
    wide_BLD: Any = None  # only of fp8 and 4 bits
    turned_UNF: Any = None  # only where the matrix is the left operand


def grouped_matmul(
    x_MD: jax.Array,
    w_EFD: jax.Array | Int4Matrix,
    expert_I: jax.Array,
    num_tiles: jax.Array,
    scale_EF: jax.Array | None = None,
    *,
    interpret: Any = False,
) -> jax.Array:
    """Each tile of x times the transpose of its expert's matrix: [M, F] float32. Of bf16; of int8; or of bf16
    by float8_e4m3fn or 4 bits.

    Tiles are of 8, 16, 32, 64 or 128 rows; rows of absent tiles are not written. Raises ValueError for other
    tiles and types, for matrices whose sides are no multiples of 64, and for those of 4 bits that
    int4_matmul/gpu.py does not serve.
    """
    given = Operands(x_MD, w_EFD, expert_I, num_tiles.reshape(1), scale_EF)
    if isinstance(w_EFD, Int4Matrix):
        q_EFC, scale_GEF, zero_GEF = w_EFD
        given = given._replace(w_EFD=q_EFC, scale_GEF=scale_GEF, zero_GEF=zero_GEF)
    return _launch(_read_shape(given), given, interpret)


def _read_shape(given: Operands) -> Shape:
    """That of a call; raises ValueError where there is no kernel for it."""
    num_outputs, num_inputs = given.w_EFD.shape[1], given.x_MD.shape[1]
    tile_rows = len(given.x_MD) // len(given.expert_I)
    group_size = 0 if given.scale_GEF is None else num_inputs // len(given.scale_GEF)
    limit = find_int4_limit(num_outputs, num_inputs, group_size) if group_size else ""
    if limit or tile_rows not in (8, 16, 32, 64, 128) or num_outputs % ROWS or num_inputs % 64:
        raise ValueError(
            f"The GPU's kernel multiplies by no experts of {given.w_EFD.shape} in tiles of "
            f"{tile_rows}. {limit}"
        )
    dtypes = given.x_MD.dtype.name, given.w_EFD.dtype.name
    if dtypes not in (DTYPES if not group_size else [("bfloat16", "int8")]):
        raise ValueError(f"The GPU's kernel multiplies no {dtypes[0]} by {dtypes[1]}.")
    return Shape(
        tile_rows=tile_rows,
        num_outputs=num_outputs,
        num_inputs=num_inputs,
        num_scaled=0 if given.scale_EF is None else len(given.scale_EF),
        group_size=group_size,
        x_dtype=given.x_MD.dtype,
        w_dtype=given.w_EFD.dtype,
    )


def _describe_scratch(shape: Shape) -> Scratch:
    places, step = shape.num_places, shape.step_inputs
    x_smem = mosaic.swizzled_smem((places, shape.tile_rows, step), shape.x_dtype)
    w_smem = mosaic.swizzled_smem((places, shape.block_outputs, step // shape.packing), shape.w_dtype)
    left, right = (w_smem, x_smem) if shape.is_swapped else (x_smem, w_smem)
    wide = turned = None
    if shape.widens:
        wide = mosaic.swizzled_smem((NUM_WIDE, shape.left_rows, step), shape.x_dtype)
    if shape.is_swapped:
        turned = mosaic.SMEM((shape.num_consumers, shape.tile_rows, ROWS), jnp.float32)
    return Scratch(
        left_PLD=left,
        right_PND=right,
        filled=mosaic.Barrier(num_arrivals=2, num_barriers=places),
        emptied=mosaic.Barrier(num_arrivals=shape.num_consumers, num_barriers=places),
        wide_BLD=wide,
        turned_UNF=turned,
    )


def _launch(shape: Shape, given: Operands, interpret: Any) -> jax.Array:
    scratch = _describe_scratch(shape)
    arguments = {name: x for name, x in given._asdict().items() if x is not None}
    most_tiles = len(given.expert_I)

    def body(*refs, **own):
        run_block(shape, Operands(**dict(zip([*arguments, "y_MF"], refs, strict=True))), Scratch(**own))

    launch = mosaic.kernel(
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
    return launch(*arguments.values())


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
        own_inputs = mosaic.ds(
            step * (shape.step_inputs // shape.packing), shape.step_inputs // shape.packing
        )
        mosaic.copy_gmem_to_smem(operands.w_EFD.at[expert, outputs, own_inputs], w_target.at[place], filled)
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
            factors = _read_factors(shape, operands, tile, step)  # while the step is on its way
            mosaic.barrier_wait(own.filled.at[place])
            left_LD = own.left_PLD.at[place, own_rows]
            if shape.widens:
                wide_LD = own.wide_BLD.at[lax.rem(step, jnp.int32(NUM_WIDE)), own_rows]
                left_LD = _widen(left_LD, factors, wide_LD)
            mosaic.wgmma(sum_LN, left_LD, own.right_PND.at[place].transpose((1, 0)))
            mosaic.wgmma_wait(1)  # for the product before, while this one runs
            release(step - 1)

        lax.fori_loop(0, shape.num_steps, add_step, None)
        return sum_LN[...]

    y_LN = mosaic.run_scoped(sum_steps, mosaic.ACC((ROWS, shape.right_rows), shape.sum_dtype))
    write = _write_turned if shape.is_swapped else _write_rows
    write(shape, operands, own, tile, y_LN.astype(jnp.float32))


def _read_factors(shape: Shape, operands: Operands, tile, step) -> list[tuple[jax.Array, jax.Array]]:
    """Of 4 bits: what makes weights of the values in low bits, and of those in high ones, of a consumer's
    rows: a factor and what is added."""
    if not shape.group_size:
        return []
    first_output = lax.axis_index("outputs") * shape.block_outputs + lax.axis_index("warpgroup") * ROWS
    own = (operands.expert_I[tile], mosaic.ds(first_output, ROWS))

    def read(x_GEF, half: int):
        group = lax.div(step * RUN + half * HALF, jnp.int32(shape.group_size))
        layout = mosaic.Layout.WGMMA_UPCAST_4X.reduce(1)
        return mosaic.load(x_GEF.at[group, *own], layout=layout, optimized=False).astype(jnp.float32)

    (low, low_zero), (high, high_zero) = (
        (read(operands.scale_GEF, half), read(operands.zero_GEF, half)) for half in range(2)
    )
    return [(low, -low_zero * low), (high * (1 / 16), (MIDDLE - high_zero) * high)]


def _widen(narrow_LD, factors: list[tuple[jax.Array, jax.Array]], wide_LD) -> Any:
    """A step's rows in the type of the products. No product reads that buffer any more: at most one runs."""
    if factors:
        q_LC = mosaic.load(narrow_LD, layout=mosaic.Layout.WGMMA_UPCAST_4X)
        for half, (bits, (factor_L, added_L)) in enumerate(zip((LOW_BITS, HIGH_BITS), factors, strict=True)):
            value_LC = (q_LC & jnp.int8(bits)).astype(jnp.bfloat16).astype(jnp.float32)
            factor_LC, added_LC = (lax.broadcast_in_dim(x, value_LC.shape, (0,)) for x in (factor_L, added_L))
            weight_LC = (value_LC * factor_LC + added_LC).astype(wide_LD.dtype)
            mosaic.store(wide_LD.at[:, mosaic.ds(half * HALF, HALF)], weight_LC)
    else:
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
    turned_NF = own.turned_UNF.at[consumer]
    mosaic.store(turned_NF.transpose((1, 0)), mosaic.layout_cast(y_FR, mosaic.Layout.WGMMA_TRANSPOSED))
    mosaic.commit_smem()
    rows = mosaic.ds(tile * shape.tile_rows, shape.tile_rows)
    mosaic.copy_smem_to_gmem(turned_NF, operands.y_MF.at[rows, outputs])
    mosaic.wait_smem_to_gmem(0)
