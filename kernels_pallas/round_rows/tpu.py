"""Rows rotated and rounded to int8 on a TPU (Pallas): read once, written once, in one launch.

XLA makes six operations of it, whose results it writes and reads again, and each of which takes a while to
start. Here a block of rows is rotated into VMEM by the matrix units, 128 channels at a time, that is by two
Hadamard matrices beside each other; then the rows' largest are known, and the block is rounded. Rounding to
bf16 is left to XLA, which does it where it computes the rows.

That XLA also computes the rows within the launch (`allow_input_fusion`) does not go with loops: libtpu 0.0.52
fails on a block that is read at a place known only there.

Letters: R rows of a block, L = 128 lanes, I blocks, C channels at once, M rows of their runs (R x C / L).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.kernels_pallas.round_rows import ref

LANES = 128
SUBLANES = 8
BYTE_ROWS = 32  # of a tile of int8
MOST_ROWS = 128  # of a block
MOST_BLOCK_BYTES = 12 << 20
CHANNEL_BYTES = 2 * 2 + 2 * 1 + 4  # of a row: what comes and what goes, two of each, and rotated
MOST_ROTATED_ROWS = 512  # in one product: 64 registers of float32


def round_rows(x_TD: jax.Array, *, interpret: Any = False) -> tuple[jax.Array, jax.Array]:
    """As ref.round_rows; values halfway between two steps may go to the other one.

    Rows that are no whole runs of 64 channels get XLA's form.
    """
    num_rows, width = x_TD.shape
    if width % ref.MOST_MIXED:
        return ref.round_rows(x_TD)
    block_rows = choose_block_rows(num_rows, width)
    num_blocks = pl.cdiv(num_rows, block_rows)
    q_TD, scale_I1R = pl.pallas_call(
        _round_block,
        grid=(num_blocks,),
        in_specs=[pl.BlockSpec((block_rows, width), lambda i: (i, 0))],
        out_specs=[
            pl.BlockSpec((block_rows, width), lambda i: (i, 0)),
            # In lanes: of a column of scales XLA would make this itself, in an operation of its own.
            pl.BlockSpec((None, 1, block_rows), lambda i: (i, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((num_rows, width), jnp.int8),
            jax.ShapeDtypeStruct((num_blocks, 1, block_rows), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((block_rows, pl.cdiv(width, LANES) * LANES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(
            flops=2 * LANES * num_rows * width,
            bytes_accessed=num_rows * (width * (2 + 1) + 4),
            transcendentals=0,
        ),
        name="round_rows",
        interpret=interpret,
    )(x_TD.astype(jnp.bfloat16))
    return q_TD, scale_I1R.reshape(-1, 1)[:num_rows]


def choose_block_rows(num_rows: int, width: int) -> int:
    """All rows if they fit, else as many whole tiles of int8 as do."""
    most_rows = min(MOST_BLOCK_BYTES // (CHANNEL_BYTES * width), MOST_ROWS)
    most_rows = max(most_rows // BYTE_ROWS, 1) * BYTE_ROWS
    return min(pl.cdiv(num_rows, SUBLANES) * SUBLANES, most_rows)


def _round_block(x_RD: Any, q_RD: Any, scale_1R: Any, y_RD: Any) -> None:
    num_rows, width = x_RD.shape
    h_LL = _make_hadamard()
    runs_at_once = max(MOST_ROTATED_ROWS // num_rows, 1)
    lanes_at_once = runs_at_once * LANES

    def rotate(first: Any, num_lanes: int, top_RL: jax.Array) -> jax.Array:
        x_RC = x_RD[:, pl.ds(first, num_lanes)].astype(jnp.float32)
        if num_lanes % LANES:
            x_RC = jnp.concatenate([x_RC, jnp.zeros((num_rows, LANES - num_lanes % LANES))], axis=1)
        runs = [x_RC[:, lane : lane + LANES] for lane in range(0, x_RC.shape[1], LANES)]
        x_ML = jnp.concatenate(runs).astype(jnp.bfloat16)
        y_ML = jnp.dot(x_ML, h_LL, preferred_element_type=jnp.float32)
        for run in range(len(runs)):
            y_RL = y_ML[run * num_rows : (run + 1) * num_rows]
            y_RD[:, pl.ds(first + run * LANES, LANES)] = y_RL
            top_RL = jnp.maximum(top_RL, jnp.abs(y_RL))
        return top_RL

    top_RL = _visit(width, lanes_at_once, rotate, jnp.zeros((num_rows, LANES), jnp.float32))
    scale_R1 = jnp.maximum(jnp.max(top_RL, axis=1, keepdims=True), ref.SMALLEST_ABSMAX) / 127.0
    scale_1R[...] = scale_R1.T
    steps_R1 = 1.0 / scale_R1

    def round_chunk(first: Any, num_lanes: int, carry: Any) -> Any:
        here = pl.ds(first, num_lanes)
        q_RD[:, here] = jnp.round(y_RD[:, here] * steps_R1).astype(jnp.int8)
        return carry

    _visit(width, lanes_at_once, round_chunk, jnp.int32(0))


def _visit(width: int, lanes_at_once: int, act: Any, carry: Any) -> Any:
    """`act(first, num_lanes, carry)` of all channels, so many at once."""
    num_whole = width // lanes_at_once
    carry = jax.lax.fori_loop(
        0,
        num_whole,
        lambda i, carry: act(pl.multiple_of(i * lanes_at_once, LANES), lanes_at_once, carry),
        carry,
    )
    rest = width % lanes_at_once
    return act(num_whole * lanes_at_once, rest, carry) if rest else carry


def _make_hadamard() -> jax.Array:
    """Two of ref.hadamard(64) beside each other, bf16: its sign is the parity of the bits that row and column
    have in common."""
    row_LL = jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0)
    column_LL = jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), 1)
    is_odd_LL = jax.lax.population_count(row_LL & column_LL & (ref.MOST_MIXED - 1)) & 1
    h_LL = jnp.where(is_odd_LL == 1, -(ref.MOST_MIXED**-0.5), ref.MOST_MIXED**-0.5)
    return jnp.where((row_LL ^ column_LL) < ref.MOST_MIXED, h_LL, 0.0).astype(jnp.bfloat16)
