"""Products of a few tokens by a matrix of 4-bit values on Hopper (Pallas Mosaic GPU): reads what is packed.

The same function as `ref.int4_matmul`. The matrix is the left operand ("swap-AB"): 64 of its outputs fill
the rows of a product that a few tokens would not. A block takes 64 outputs and a share of the runs of 128
inputs; several blocks share a multiprocessor, which hides what each waits for. A run's bytes come by TMA, are
widened to bf16 in registers, which is exact, and multiply the tokens; the sums of a group then get its scale,
and its zero times the sum of the inputs:

    y[f, t] = sum over groups of scale[g, f] * (sum of q[f, d] x[t, d]  -  zero[g, f] * sum of x[t, d])

Letters beside the usual ones: N tokens padded to a multiple of 8, Z shares of the runs, P places of a ring,
E parts of the inputs that are of one run and of one group.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.kernels_pallas import mosaic
from jaxserve.kernels_pallas.int4_matmul import ref
from jaxserve.kernels_pallas.int4_matmul.limits import MOST_TOKENS, find_int4_limit
from jaxserve.kernels_pallas.int4_matmul.ref import HALF, RUN, Int4Matrix

TILE = 64  # outputs of a block
LOW_BITS, HIGH_BITS = 15, -16  # of a byte as a signed number
NUM_PLACES = 4  # runs under way
BLOCKS_PER_SM = 2


class Shape(NamedTuple):
    """What is known of a call while it is compiled."""

    num_outputs: int
    num_inputs: int
    num_tokens: int  # N
    group_size: int
    num_shares: int

    @property
    def num_runs(self) -> int:
        return self.num_inputs // RUN

    @property
    def runs_per_share(self) -> int:
        return -(-self.num_runs // self.num_shares)

    @property
    def part_size(self) -> int:
        """Inputs that are multiplied at once: of one run, and of one group."""
        return min(self.group_size, RUN)

    @property
    def parts_per_run(self) -> int:
        return RUN // self.part_size


class Operands(NamedTuple):
    """The kernel's arguments and result, in device memory."""

    q_FC: Any
    scale_GF: Any
    zero_GF: Any
    x_ND: Any
    sum_EN: Any
    offset_EN: Any
    out_ZFN: Any


class Scratch(NamedTuple):
    """A block's shared memory: rings of packed runs and of tokens, and one run in bf16."""

    q_PFC: Any
    x_PND: Any
    wide_FD: Any
    out_FN: Any
    ready: Any


class Factors(NamedTuple):
    """What the products of a part's values become weights' with, in registers."""

    scale_F: jax.Array
    zero_F: jax.Array
    sum_N: jax.Array
    offset_N: jax.Array


def int4_matmul(
    x_TD: jax.Array, w: Int4Matrix, *, num_shares: int | None = None, interpret: Any = False
) -> jax.Array:
    """x @ w.T: [T, D] of any float type, rounded to bf16, gives [T, F] float32.

    More tokens than MOST_TOKENS get the reference's form. `num_shares` is for tuning. Raises ValueError for a
    matrix that the kernel does not serve.
    """
    num_tokens = x_TD.shape[0]
    if num_tokens > MOST_TOKENS:
        return ref.int4_matmul(x_TD, w)
    limit = find_int4_limit(*w.shape, w.group_size)
    if limit:
        raise ValueError(f"This matrix is not for the GPU's kernel: {limit}.")
    num_padded = -(-num_tokens // 8) * 8
    x_ND = jnp.pad(x_TD.astype(jnp.bfloat16), ((0, num_padded - num_tokens), (0, 0)))
    shape = Shape(*w.shape, num_padded, w.group_size, num_shares or choose_shares(*w.shape))
    out_ZFN = _launch(shape, interpret)(*w, *_prepare(x_ND, shape.part_size))
    return out_ZFN.sum(axis=0).T[:num_tokens]


def choose_shares(num_outputs: int, num_inputs: int) -> int:
    """As few as fill the card: each adds a result of its own, to be written and read again."""
    num_wanted = BLOCKS_PER_SM * mosaic.H200_NUM_SMS
    return min(-(-num_wanted * TILE // num_outputs), num_inputs // RUN)


def _prepare(x_ND: jax.Array, part_size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The tokens for bytes whose high bits are taken where they stand, sixteen times as large; their sums by
    part; and what high bits are less than the values that they mean."""
    is_high_D = jnp.arange(x_ND.shape[1]) % RUN >= HALF

    def sum_parts(x_ND: jax.Array) -> jax.Array:
        return x_ND.reshape(len(x_ND), -1, part_size).sum(axis=2).T

    wide_ND = x_ND.astype(jnp.float32)
    offset_EN = sum_parts(jnp.where(is_high_D, ref.MIDDLE * wide_ND, 0.0))
    return x_ND * jnp.where(is_high_D, 1 / 16, 1.0).astype(jnp.bfloat16), sum_parts(wide_ND), offset_EN


def _launch(shape: Shape, interpret: Any) -> Any:
    num_places = min(NUM_PLACES, shape.runs_per_share)
    scratch = Scratch(
        q_PFC=mosaic.swizzled_smem((num_places, TILE, HALF), jnp.int8),
        x_PND=mosaic.swizzled_smem((num_places, shape.num_tokens, RUN), jnp.bfloat16),
        wide_FD=mosaic.swizzled_smem((TILE, RUN), jnp.bfloat16),
        out_FN=mosaic.SMEM((TILE, shape.num_tokens), jnp.float32),
        ready=mosaic.Barrier(num_arrivals=2, num_barriers=num_places),
    )

    def body(*refs, **own):
        _run_block(shape, num_places, Operands(*refs), Scratch(**own))

    return mosaic.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((shape.num_shares, shape.num_outputs, shape.num_tokens), jnp.float32),
        scratch_types=scratch._asdict(),
        grid=(shape.num_outputs // TILE, shape.num_shares),
        grid_names=("tile", "share"),
        kernel_name="int4_matmul",
        compiler_params=mosaic.CompilerParams(approx_math=True),
        interpret=interpret,
    )


def _run_block(shape: Shape, num_places: int, operands: Operands, own: Scratch) -> None:
    """All runs of a block's share into its outputs."""
    outputs = mosaic.ds(lax.axis_index("tile") * TILE, TILE)
    first_run = lax.axis_index("share") * shape.runs_per_share
    count = jnp.clip(shape.num_runs - first_run, 0, shape.runs_per_share)

    def bring(index):
        place, run = lax.rem(index, jnp.int32(num_places)), first_run + index
        for source, target in (
            (operands.q_FC.at[outputs, mosaic.ds(run * HALF, HALF)], own.q_PFC),
            (operands.x_ND.at[:, mosaic.ds(run * RUN, RUN)], own.x_PND),
        ):
            mosaic.copy_gmem_to_smem(source, target.at[place], own.ready.at[place])

    for index in range(num_places):
        mosaic.when(index < count)(partial(bring, jnp.int32(index)))

    def add_run(index, y_FN):
        place = lax.rem(index, jnp.int32(num_places))
        factors = _read_factors(shape, operands, outputs, first_run + index)  # while the run is on its way
        mosaic.barrier_wait(own.ready.at[place])
        _widen(own, place)
        mosaic.commit_smem()
        for part, known in enumerate(factors):
            y_FN = _add_part(shape, own, place, part, known, y_FN)
        mosaic.when(index + num_places < count)(partial(bring, index + num_places))
        return y_FN

    zeros_FN = jnp.zeros((TILE, shape.num_tokens), jnp.float32)
    y_FN = lax.fori_loop(0, count, add_run, mosaic.layout_cast(zeros_FN, mosaic.Layout.WGMMA))
    mosaic.store(own.out_FN, y_FN)
    mosaic.commit_smem()
    mosaic.copy_smem_to_gmem(own.out_FN, operands.out_ZFN.at[lax.axis_index("share"), outputs])
    mosaic.wait_smem_to_gmem(0)


def _read_factors(shape: Shape, operands: Operands, outputs, run) -> list[Factors]:
    """Those of each part of a run."""

    def read(ref, axis: int):
        values = mosaic.load(ref, layout=mosaic.Layout.WGMMA.reduce(axis), optimized=False)
        return values.astype(jnp.float32)

    found = []
    for index in range(shape.parts_per_run):
        part = run * shape.parts_per_run + index
        group = lax.div(part * shape.part_size, jnp.int32(shape.group_size))
        rows = (read(x_GF.at[group, outputs], 1) for x_GF in (operands.scale_GF, operands.zero_GF))
        columns = (read(x_EN.at[part], 0) for x_EN in (operands.sum_EN, operands.offset_EN))
        found.append(Factors(*rows, *columns))
    return found


def _widen(own: Scratch, place) -> None:
    """A run's values in bf16: those of low bits on the left, those of high bits on the right."""
    q_FC = mosaic.load(own.q_PFC.at[place], layout=mosaic.Layout.WGMMA_UPCAST_4X)
    for first, bits in ((0, LOW_BITS), (HALF, HIGH_BITS)):
        mosaic.store(own.wide_FD.at[:, mosaic.ds(first, HALF)], (q_FC & jnp.int8(bits)).astype(jnp.bfloat16))


def _add_part(shape: Shape, own: Scratch, place, part: int, known: Factors, y_FN):
    """y with the products of one part of a run."""
    inputs = mosaic.ds(part * shape.part_size, shape.part_size)
    product_FN = _multiply(own.wide_FD.at[:, inputs], own.x_PND.at[place, :, inputs].transpose((1, 0)))
    scale_FN, zero_FN = (lax.broadcast_in_dim(x_F, y_FN.shape, (0,)) for x_F in (known.scale_F, known.zero_F))
    sum_FN, offset_FN = (lax.broadcast_in_dim(x_N, y_FN.shape, (1,)) for x_N in (known.sum_N, known.offset_N))
    return y_FN + scale_FN * (product_FN + offset_FN - zero_FN * sum_FN)


def _multiply(a, b) -> jax.Array:
    """a @ b of shared memory, float32 in registers."""

    def run(accumulator):
        mosaic.wgmma(accumulator, a, b)
        return accumulator[...]

    return mosaic.run_scoped(run, mosaic.ACC((a.shape[0], b.shape[1]), jnp.float32))
