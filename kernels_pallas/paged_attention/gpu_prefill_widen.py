"""How K and V of int8 and fp8 pools reach the products of the GPU's prefill attention.

The producer's part of gpu_prefill_block.py where a value of the pool is a byte. It copies 64 tokens by 64
channels at a time to a ring of places, takes them from there through its registers, and leaves them as 16-bit
operands where the consumers expect them, so that those do not know of narrow pools. While one piece is
widened, the copies of the next ones are under way:

    place    0     1     2     3     0     1     2     3
    piece    K 0   K 1   K 2   K 3   V 0   V 1   V 2   V 3       of a block of 128 tokens by 128 channels

int8 is scaled on the way and rounded to bf16: the scale of K changes every 8 channels, which no product could
make up for. fp8 becomes float16, which is exact. Rows behind the sequence are zero in V, for the reason
that gpu_prefill_block.py gives.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.kernels_pallas import mosaic
from jaxserve.kernels_pallas.paged_attention.gpu_prefill_shape import (
    PIECE_CHANNELS,
    ROWS,
    SCALED_CHANNELS,
    Memory,
    PrefillShape,
    Tile,
)

PART_CHANNELS = 32  # of a piece, in registers before they are widened
ROW_LAYOUT = mosaic.Layout.WGMMA.reduce(1)
# As WGMMA has rows, with one of four columns a lane.
FOUR_SCALES = mosaic.tiled_layout(((64, 4), (16, 4), (8, 4), (1,)), warp_dims=(-7,), lane_dims=(-3, -2))


class _Piece(NamedTuple):
    """ROWS tokens by PIECE_CHANNELS channels of a block of K or V."""

    is_value: bool
    first_row: int
    first_channel: int


def widen_blocks(memory: Memory, shape: PrefillShape, tile: Tile, step) -> None:
    """All blocks of K and V of a tile, `step` blocks behind the first of all."""
    pieces = _list_pieces(shape)
    num_places = shape.num_places

    def load_block(block, place):
        stage = jax.lax.rem(step + block, shape.num_stages)
        for index, piece in enumerate(pieces):
            smem, filled, emptied = (
                (memory.v_smem, memory.v_filled, memory.v_emptied)
                if piece.is_value
                else (memory.k_smem, memory.k_filled, memory.k_emptied)
            )
            if piece.first_row == piece.first_channel == 0:
                mosaic.barrier_wait(emptied.at[stage])
            rows, channels = mosaic.ds(piece.first_row, ROWS), mosaic.ds(piece.first_channel, PIECE_CHANNELS)
            smem.at[stage, rows, channels][...] = _widen(memory, shape, tile, block, piece, place)
            mosaic.commit_smem()
            if index + 1 == len(pieces) or pieces[index + 1].is_value != piece.is_value:
                mosaic.barrier_arrive(filled.at[stage])
            later, next_index = divmod(index + num_places, len(pieces))
            next_piece = pieces[next_index]

            @mosaic.when(block + later < tile.num_blocks)
            def _refill(later=later, next_piece=next_piece, place=place):
                _copy_piece(memory, shape, tile, block + later, next_piece, place)

            place = jnp.where(place == num_places - 1, 0, place + 1)
        return place

    for place in range(num_places):
        _copy_piece(memory, shape, tile, 0, pieces[place], place)
    # Zero, which the compiler cannot know: it would keep the addresses of every place in registers.
    first_place = jnp.minimum(step, 0)
    jax.lax.fori_loop(0, tile.num_blocks, load_block, first_place)


def _list_pieces(shape: PrefillShape) -> list[_Piece]:
    """Those of K and then those of V, in the order in which they are widened."""
    return [
        _Piece(is_value, row, channel)
        for is_value in (False, True)
        for row in range(0, shape.block_tokens, ROWS)
        for channel in range(0, shape.head_dim, PIECE_CHANNELS)
    ]


def _find_rows(memory: Memory, shape: PrefillShape, tile: Tile, block, piece: _Piece):
    """The page of a piece and its rows in it."""
    last_page = jax.lax.div(jnp.maximum(tile.kv_len - 1, 0), shape.page_size)
    page, row = divmod(piece.first_row, shape.page_size)
    page += tile.first_page + block * (shape.block_tokens // shape.page_size)
    # Behind the last page the table may hold anything: read that page again.
    return memory.table_XW[tile.slot, jnp.minimum(page, last_page)], mosaic.ds(row, ROWS)


def _copy_piece(memory: Memory, shape: PrefillShape, tile: Tile, block, piece: _Piece, place) -> None:
    page, rows = _find_rows(memory, shape, tile, block, piece)
    pool = memory.v_PSKH if piece.is_value else memory.k_PSKH
    channels = mosaic.ds(piece.first_channel, PIECE_CHANNELS)
    source, target = pool.at[page, rows, tile.kv_head, channels], memory.narrow_smem.at[place]
    mosaic.copy_gmem_to_smem(source, target, memory.narrow_filled.at[place])
    if shape.num_k_scales and not piece.is_value:
        first = piece.first_channel // SCALED_CHANNELS % shape.num_k_scales
        scales = memory.k_scale_PSKQ.at[page, rows, tile.kv_head, mosaic.ds(first, shape.piece_scales)]
        mosaic.copy_gmem_to_smem(scales, memory.scale_smem.at[place], memory.scale_filled.at[place])


def _widen(memory: Memory, shape: PrefillShape, tile: Tile, block, piece: _Piece, place) -> jax.Array:
    """A piece as an operand, [ROWS, PIECE_CHANNELS]; it is read in parts, for which there are registers."""
    num_live = tile.kv_len - tile.first_page * shape.page_size - block * shape.block_tokens - piece.first_row
    scales = _find_scales(memory, shape, tile, block, piece, place, num_live)
    mosaic.barrier_wait(memory.narrow_filled.at[place])
    parts = []
    for first in range(0, PIECE_CHANNELS, PART_CHANNELS):
        part = memory.narrow_smem.at[place, :, mosaic.ds(first, PART_CHANNELS)][...]
        narrow = mosaic.layout_cast(part, mosaic.Layout.WGMMA)
        for column in range(0, PART_CHANNELS, SCALED_CHANNELS):
            columns = jax.lax.slice(narrow, (0, column), (ROWS, column + SCALED_CHANNELS))
            if scales is None:
                wide = columns.astype(shape.operand_dtype)
                if piece.is_value:
                    row = mosaic.broadcasted_iota(jnp.int32, wide.shape, 0, layout=mosaic.Layout.WGMMA)
                    wide = jnp.where(row < num_live, wide, jnp.zeros_like(wide))
            else:
                scale_M = scales((first + column) // SCALED_CHANNELS)
                wide = columns.astype(jnp.float32) * jax.lax.broadcast_in_dim(scale_M, columns.shape, [0])
            parts.append(wide.astype(shape.operand_dtype))
    return jax.lax.concatenate(parts, 1)


def _find_scales(memory: Memory, shape: PrefillShape, tile: Tile, block, piece: _Piece, place, num_live):
    """The scales [M] of a piece's channels as a function of their eight's number; None where it has none."""
    if not shape.num_k_scales:
        return None
    if piece.is_value:
        page, rows = _find_rows(memory, shape, tile, block, piece)
        v_scale_M = memory.v_scale_PSK.at[page, rows, tile.kv_head]
        v_scale_M = mosaic.load(v_scale_M, layout=ROW_LAYOUT, optimized=False)
        row_M = mosaic.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW_LAYOUT)
        v_scale_M = jnp.where(row_M < num_live, v_scale_M, 0.0)
        return lambda _: v_scale_M
    mosaic.barrier_wait(memory.scale_filled.at[place])
    layout = FOUR_SCALES if shape.piece_scales == 4 else mosaic.Layout.WGMMA
    scales = mosaic.layout_cast(memory.scale_smem[place], layout)
    column = mosaic.broadcasted_iota(jnp.int32, scales.shape, 1, layout=layout)

    def pick(index: int) -> jax.Array:
        """Four lanes have a row's scales together, and tell each other."""
        own = jnp.where(column == index % shape.piece_scales, scales, 0.0)
        return mosaic.layout_cast(jnp.sum(own, axis=1), ROW_LAYOUT)

    return pick
