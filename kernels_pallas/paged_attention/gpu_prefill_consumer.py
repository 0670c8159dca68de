"""A consumer's part of the GPU's prefill attention: softmax(q k^T) v of the 64 rows of one warpgroup.

Called by gpu_prefill_block.py for every tile. gpu_prefill.py draws in which order the products run.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.kernels_pallas import mosaic
from jaxserve.kernels_pallas.paged_attention.gpu_prefill_shape import (
    NUM_CONSUMERS,
    ROWS,
    Memory,
    PrefillShape,
    Tile,
)

MASK_COLUMNS = 16
LOG2_E = math.log2(math.e)
# A power of two: times any scale it is exact, so that a row that sees nothing yet has scores of exactly
# zero below its maximum, and no rounding error of a large number becomes the exponent of one.
MASKED = -(2.0**100)
ROW_LAYOUT = mosaic.Layout.WGMMA.reduce(1)


class Work(NamedTuple):
    """One tile of one consumer."""

    memory: Memory
    shape: PrefillShape
    consumer: Any  # its index, a scalar
    tile: Tile
    step: jax.Array  # blocks of K and V that went before the tile's


class _Rows(NamedTuple):
    """The running softmax of a consumer's rows, in units of log2; float32 [M]."""

    max_M: jax.Array
    sum_M: jax.Array  # of 2 ** (score - max)
    keep_M: jax.Array  # what the output so far must be scaled by: 2 ** (last max - max)


def attend_tile(work: Work) -> None:
    """The output of a tile's live rows, from shared memory to device memory."""
    memory, shape, consumer, tile, _ = work
    score_type = mosaic.ACC((ROWS, shape.block_tokens))

    def multiply_first(score_ref):
        _start_scores(work, score_ref, 0)
        return score_ref[...]

    def attend_block(block, carry, *, is_masked: bool):
        acc, rows = carry

        def multiply(score_ref):
            start_scores = partial(_start_scores, work, score_ref, block)
            return _add_values(work, block - 1, acc, rows.keep_M, start_scores), score_ref[...]

        mosaic.barrier_wait(memory.k_filled.at[_find_stage(work, block)])
        acc, s_MB = mosaic.run_scoped(multiply, score_type)
        return acc, _finish_scores(work, s_MB, block, rows, is_masked)

    mosaic.barrier_wait(memory.q_filled)
    mosaic.barrier_wait(memory.k_filled.at[_find_stage(work, 0)])
    mosaic.barrier_wait(memory.turn.at[consumer])
    s_MB = mosaic.run_scoped(multiply_first, score_type)
    rows = _finish_scores(work, s_MB, 0, _start_rows(work), is_masked=True)
    zero = mosaic.layout_cast(jnp.zeros((ROWS, shape.piece_channels), jnp.float32), mosaic.Layout.WGMMA)
    carry = ([zero] * (shape.head_dim // shape.piece_channels), rows)
    for first, end, is_masked in _split_blocks(tile, shape):
        carry = jax.lax.fori_loop(first, end, partial(attend_block, is_masked=is_masked), carry)
    acc, rows = carry
    mosaic.barrier_arrive(memory.q_emptied)
    acc = _add_values(work, tile.num_blocks - 1, acc, rows.keep_M, partial(_give_turn, work))
    _write_output(work, acc, rows.sum_M)


def _find_stage(work: Work, block):
    return jax.lax.rem(work.step + block, work.shape.num_stages)


def _find_own(work: Work, block):
    """The consumer's index into what is each consumer's own.

    Where registers are scarce it seems to change from block to block, by a stage that is never negative:
    addresses that are known to stay the same would be computed once, and kept in registers throughout.
    """
    if work.shape.head_dim <= 128 and not work.shape.is_narrow:
        return work.consumer
    return work.consumer + jnp.minimum(_find_stage(work, block), 0)


def _give_turn(work: Work) -> None:
    mosaic.barrier_arrive(work.memory.turn.at[NUM_CONSUMERS - 1 - work.consumer])


def _start_scores(work: Work, score_ref, block) -> None:
    """Q K^T of a block, which ends the turn."""
    k_HB = work.memory.k_smem.at[_find_stage(work, block)].transpose((1, 0))
    mosaic.wgmma(score_ref, work.memory.q_smem.at[_find_own(work, block)], k_HB)
    _give_turn(work)


def _finish_scores(work: Work, s_MB, block, rows: _Rows, is_masked: bool) -> _Rows:
    """Leave P of a block in shared memory."""
    mosaic.barrier_arrive(work.memory.k_emptied.at[_find_stage(work, block)])
    own = _find_own(work, block)
    work.memory.p_smem[own], rows = _exponentiate(work, s_MB, rows, block, is_masked)
    mosaic.commit_smem()
    return rows


def _add_values(work: Work, block, acc, keep_M, start_more):
    """The output so far, rescaled, and P V of a block; takes the turn.

    `start_more` starts what is to run beside the last piece's product.
    """
    memory, shape = work.memory, work.shape
    stage, own = _find_stage(work, block), _find_own(work, block)
    keep = jax.lax.broadcast_in_dim(keep_M, acc[0].shape, [0])

    def start(piece_ref, piece):
        channels = mosaic.ds(piece * shape.piece_channels, shape.piece_channels)
        mosaic.wgmma(piece_ref, memory.p_smem.at[own], memory.v_smem.at[stage, :, channels])
        if piece == len(acc) - 1:
            start_more()

    mosaic.barrier_wait(memory.v_filled.at[stage])
    mosaic.barrier_wait(memory.turn.at[work.consumer])
    acc = [
        mosaic.multiply_onto(old * keep, partial(start, piece=piece), is_simulated=shape.is_simulated)
        for piece, old in enumerate(acc)
    ]
    mosaic.barrier_arrive(memory.v_emptied.at[stage])
    return acc


def _split_blocks(tile: Tile, shape: PrefillShape):
    """(first, end, whether to mask) of the blocks behind the first one.

    A block needs no mask where every row sees all of it: it ends at the first row's position at the latest,
    and begins within the last row's window.
    """
    begin = tile.first_page * shape.page_size
    whole_end = jax.lax.div(tile.first_pos + tile.first_row + 1 - begin, shape.block_tokens)
    whole_end = jnp.clip(whole_end, 1, tile.num_blocks)
    if shape.window is None:
        return [(jnp.int32(1), whole_end, False), (whole_end, tile.num_blocks, True)]
    last_first = tile.first_pos + tile.end_row - shape.window
    whole_first = jnp.maximum(last_first - begin + shape.block_tokens - 1, 0)
    whole_first = jnp.clip(jax.lax.div(whole_first, shape.block_tokens), 1, whole_end)
    return [
        (jnp.int32(1), whole_first, True),
        (whole_first, whole_end, False),
        (whole_end, tile.num_blocks, True),
    ]


def _start_rows(work: Work) -> _Rows:
    """A sink is a key with a value of zero that every query sees: the softmax begins with it."""
    sinks_N, shape = work.memory.sinks_N, work.shape

    def fill(value):
        return mosaic.layout_cast(jnp.full((ROWS,), value, jnp.float32), ROW_LAYOUT)

    if sinks_N is None:
        return _Rows(fill(MASKED), fill(0.0), fill(1.0))
    first_head = work.tile.first_head + shape.place_consumer(work.consumer)[0]
    max_M = fill(sinks_N[first_head])
    row_M = mosaic.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW_LAYOUT)
    for i in range(1, shape.heads_per_consumer):
        is_of_head_M = row_M >= i * shape.consumer_tokens
        max_M = jnp.where(is_of_head_M, fill(sinks_N[first_head + i]), max_M)
    return _Rows(max_M, fill(1.0), fill(1.0))


def _exponentiate(work: Work, s_MB, rows: _Rows, block, is_masked: bool):
    """The probabilities of a block's scores, not yet divided, as an operand, and the rows' new state."""
    shape = work.shape
    to_log2 = shape.scale * LOG2_E
    if shape.soft_cap is not None:
        s_MB = jnp.tanh(s_MB * (shape.scale / shape.soft_cap))
        to_log2 = shape.soft_cap * LOG2_E
    if is_masked:
        s_MB = _mask_unseen(work, s_MB, block)
    max_M = jnp.maximum(rows.max_M, jnp.max(s_MB, axis=1) * to_log2)
    keep_M = jnp.exp2(rows.max_M - max_M)
    p_MB = jnp.exp2(s_MB * to_log2 - jax.lax.broadcast_in_dim(max_M, s_MB.shape, [0]))
    sum_M = rows.sum_M * keep_M + jnp.sum(p_MB, axis=1)
    return p_MB.astype(shape.operand_dtype), _Rows(max_M, sum_M, keep_M)


def _mask_unseen(work: Work, s_MB, block):
    """Scores of a block, MASKED where a row does not see a token."""
    shape, tile = work.shape, work.tile
    first_token = tile.first_pos + shape.place_consumer(work.consumer)[1]
    row_M = mosaic.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW_LAYOUT)
    pos_M = first_token + (row_M & (shape.consumer_tokens - 1))
    last_M = pos_M - tile.first_page * shape.page_size - block * shape.block_tokens
    # A few columns at a time: the numbers of all would be kept in registers throughout.
    part_shape = (ROWS, MASK_COLUMNS)
    column = mosaic.broadcasted_iota(jnp.int32, part_shape, 1, layout=mosaic.Layout.WGMMA)
    parts = []
    for first in range(0, shape.block_tokens, MASK_COLUMNS):
        is_seen = column <= jax.lax.broadcast_in_dim(last_M - first, part_shape, [0])
        if shape.window is not None:
            behind_M = last_M - first - shape.window
            is_seen &= column > jax.lax.broadcast_in_dim(behind_M, part_shape, [0])
        part = jax.lax.slice(s_MB, (0, first), (ROWS, first + MASK_COLUMNS))
        parts.append(jnp.where(is_seen, part, MASKED))
    return jax.lax.concatenate(parts, 1)


def _write_output(work: Work, acc, sum_M) -> None:
    """Divide, and copy the rows of live tokens out, some channels at a time."""
    shape = work.shape
    factor = jax.lax.broadcast_in_dim(1.0 / sum_M, acc[0].shape, [0])
    width = shape.out_part_channels
    for piece, value in enumerate(acc):
        out = (value * factor).astype(shape.operand_dtype)
        for first in range(0, shape.piece_channels, shape.out_channels):
            mosaic.wait_smem_to_gmem(0, wait_read_only=True)
            for part in range(shape.out_channels // width):
                begin = first + part * width
                columns = jax.lax.slice(out, (0, begin), (ROWS, begin + width))
                mosaic.store(work.memory.out_smem.at[work.consumer, part], columns)
            mosaic.commit_smem()
            for part in range(shape.out_channels // width):
                begin = piece * shape.piece_channels + first + part * width
                _copy_rows_out(work, part, begin)


def _copy_rows_out(work: Work, part: int, first_channel: int) -> None:
    """From `out_smem`, by powers of two: a copy has a static size, and what is behind a run is another's."""
    memory, shape, consumer, tile, _ = work
    head, token = shape.place_consumer(consumer)
    channels = mosaic.ds(first_channel, shape.out_part_channels)
    first = jnp.clip(tile.first_row - token, 0, shape.consumer_tokens)
    count = jnp.clip(tile.end_row - token, 0, shape.consumer_tokens) - first
    size = shape.consumer_tokens
    while size:
        row = first + (count & -(2 * size))  # behind those that larger copies take

        @mosaic.when(count & size != 0)
        def _copy_heads(size=size, row=row):
            tokens = mosaic.ds(tile.first_token + token + row, size)
            for i in range(shape.heads_per_consumer):
                rows = mosaic.ds(i * shape.consumer_tokens + row, size)
                mosaic.copy_smem_to_gmem(
                    memory.out_smem.at[consumer, part, rows],
                    memory.out_TNH.at[tokens, tile.first_head + head + i, channels],
                )

        size //= 2
