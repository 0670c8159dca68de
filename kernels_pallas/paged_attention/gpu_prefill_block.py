"""What one block of threads of the GPU's prefill attention does: the kernel behind gpu_prefill.py.

A producer warpgroup fills shared memory, two consumer warpgroups multiply (gpu_prefill_consumer.py). Every
buffer has a barrier that says that it is filled, by the copies that fill it, and one that says that both
consumers have done with it; the consumers say so once at the start, when all buffers are empty. The producer
copies K and V of bf16 to where they are multiplied; gpu_prefill_widen.py does its part for narrower pools.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from jaxserve.kernels_pallas import mosaic
from jaxserve.kernels_pallas.paged_attention.gpu_prefill_consumer import Work, attend_tile
from jaxserve.kernels_pallas.paged_attention.gpu_prefill_shape import (
    NUM_CONSUMERS,
    ROWS,
    Memory,
    PrefillShape,
    Tile,
)
from jaxserve.kernels_pallas.paged_attention.gpu_prefill_widen import widen_blocks
from jaxserve.kernels_pallas.paged_attention.prefill_plan import ALIGNMENT, TileList

# Of a thread, the producer's and a consumer's; 168 for each of three when a block starts.
REGISTERS, SCALING_REGISTERS = (56, 224), (88, 208)  # of a pool with scales, the latter


def run_block(memory: Memory, shape: PrefillShape) -> None:
    """The program of one block of threads.

    The interpreter of jax 0.11 insists that the last phase of each barrier is waited for. On a GPU nothing
    depends on it, and it took registers that spilled elsewhere.
    """
    warpgroup = jax.lax.axis_index("warpgroup")
    producer_registers, consumer_registers = SCALING_REGISTERS if shape.num_k_scales else REGISTERS

    @mosaic.when(warpgroup < NUM_CONSUMERS)
    def _consume():
        mosaic.set_max_registers(consumer_registers, action="increase")
        for stage in range(shape.num_stages):
            mosaic.barrier_arrive(memory.k_emptied.at[stage])
            mosaic.barrier_arrive(memory.v_emptied.at[stage])
        mosaic.barrier_arrive(memory.q_emptied)
        mosaic.when(warpgroup == 1)(lambda: mosaic.barrier_arrive(memory.turn.at[0]))
        _for_each_tile(memory, shape, lambda *work: attend_tile(Work(memory, shape, warpgroup, *work)))
        mosaic.wait_smem_to_gmem(0)
        if shape.is_simulated:
            mosaic.when(warpgroup == 0)(lambda: mosaic.barrier_wait(memory.turn.at[0]))

    @mosaic.when(warpgroup == NUM_CONSUMERS)
    def _produce():
        mosaic.set_max_registers(producer_registers, action="decrease")
        _for_each_tile(memory, shape, partial(_load_tile, memory, shape))
        if shape.is_simulated:
            for stage in range(shape.num_stages):
                mosaic.barrier_wait(memory.k_emptied.at[stage])
                mosaic.barrier_wait(memory.v_emptied.at[stage])
            mosaic.barrier_wait(memory.q_emptied)


def _for_each_tile(memory: Memory, shape: PrefillShape, run_tile) -> None:
    """Call run_tile(tile, number of blocks of K and V before it) for each tile of this multiprocessor.

    Rounds go back and forth over the multiprocessors: tiles get shorter along the list, and what one saves
    in one round it pays in the next.
    """
    num_groups = shape.num_heads // shape.heads_per_tile
    num_items = memory.tiles.num_tiles_1[0] * num_groups
    index = jax.lax.axis_index("sm")

    def run_round(r, step):
        place = jnp.where(r & 1 == 1, shape.num_sms - 1 - index, index)
        item = r * shape.num_sms + place
        is_there = item < num_items
        item = jnp.minimum(item, num_items - 1)
        tile = _read_tile(memory.tiles, shape, jax.lax.div(item, num_groups), jax.lax.rem(item, num_groups))
        mosaic.when(is_there)(lambda: run_tile(tile, step))
        return step + jnp.where(is_there, tile.num_blocks, 0)

    num_rounds = jax.lax.div(num_items + shape.num_sms - 1, shape.num_sms)
    jax.lax.fori_loop(0, num_rounds, run_round, jnp.int32(0))


def _read_tile(tiles: TileList, shape: PrefillShape, index, group) -> Tile:
    first_pos, kv_len = tiles.first_pos_L[index], tiles.kv_len_L[index]
    first_row, end_row = tiles.first_row_L[index], tiles.end_row_L[index]
    first_page = jnp.int32(0)
    if shape.window is not None:
        first_seen = jnp.maximum(first_pos + first_row - shape.window + 1, 0)
        first_page = jax.lax.div(first_seen, shape.page_size)
    num_seen = jnp.minimum(first_pos + end_row, kv_len) - first_page * shape.page_size
    num_blocks = jax.lax.div(num_seen + shape.block_tokens - 1, shape.block_tokens)
    first_head = group * shape.heads_per_tile
    return Tile(
        first_head=first_head,
        kv_head=jax.lax.div(first_head, shape.num_heads // shape.num_kv_heads),
        first_token=mosaic.multiple_of(tiles.first_token_L[index], ALIGNMENT),
        first_row=first_row,
        end_row=end_row,
        first_pos=first_pos,
        kv_len=kv_len,
        slot=tiles.slot_L[index],
        first_page=first_page,
        num_blocks=jnp.maximum(num_blocks, 1),
    )


def _load_tile(memory: Memory, shape: PrefillShape, tile: Tile, step) -> None:
    """The producer's part of a tile: its queries, then block after block of K and V."""
    mosaic.barrier_wait(memory.q_emptied)
    count = shape.consumer_tokens
    for consumer in range(NUM_CONSUMERS):
        head, token = shape.place_consumer(consumer)
        for i in range(shape.heads_per_consumer):
            mosaic.copy_gmem_to_smem(
                memory.q_TNH.at[mosaic.ds(tile.first_token + token, count), tile.first_head + head + i],
                memory.q_smem.at[consumer, mosaic.ds(i * count, count)],
                memory.q_filled,
            )
    load_blocks = widen_blocks if shape.is_narrow else _copy_blocks
    load_blocks(memory, shape, tile, step)


def _copy_blocks(memory: Memory, shape: PrefillShape, tile: Tile, step) -> None:
    """K and V of bf16, `step` blocks behind the first of all."""
    last_page = jax.lax.div(jnp.maximum(tile.kv_len - 1, 0), shape.page_size)
    pages_per_block = shape.block_tokens // shape.page_size

    def load_block(block, _):
        stage = jax.lax.rem(step + block, shape.num_stages)
        first_page = tile.first_page + block * pages_per_block
        # Behind the last page the table may hold anything: read that page again.
        pages = [
            memory.table_XW[tile.slot, jnp.minimum(first_page + i, last_page)] for i in range(pages_per_block)
        ]

        def copy(pool, smem, barrier):
            for i, page in enumerate(pages):
                rows = mosaic.ds(i * shape.page_size, shape.page_size)
                mosaic.copy_gmem_to_smem(pool.at[page, :, tile.kv_head], smem.at[stage, rows], barrier)

        mosaic.barrier_wait(memory.k_emptied.at[stage])
        copy(memory.k_PSKH, memory.k_smem, memory.k_filled.at[stage])
        mosaic.barrier_wait(memory.v_emptied.at[stage])
        num_live = tile.kv_len - first_page * shape.page_size

        @mosaic.when(num_live >= shape.block_tokens)
        def _fill():
            copy(memory.v_PSKH, memory.v_smem, memory.v_filled.at[stage])

        @mosaic.when(num_live < shape.block_tokens)
        def _fill_and_clear():
            copy(memory.v_PSKH, memory.v_smem, memory.v_uncleared)
            mosaic.barrier_wait(memory.v_uncleared)
            _clear_dead_rows(memory.v_smem.at[stage], num_live, shape)
            mosaic.commit_smem()
            for _page in pages:
                mosaic.barrier_arrive(memory.v_filled.at[stage])

    jax.lax.fori_loop(0, tile.num_blocks, load_block, None)


def _clear_dead_rows(v_BH, num_live, shape: PrefillShape) -> None:
    """Zero what a page holds behind its sequence: NaN times a probability of zero is NaN."""
    for first_row in range(0, shape.block_tokens, ROWS):

        @mosaic.when(num_live < first_row + ROWS)
        def _clear(first_row=first_row):
            row = mosaic.broadcasted_iota(jnp.int32, (ROWS, 64), 0, layout=mosaic.Layout.WGMMA)
            is_live = row < num_live - first_row
            for first_channel in range(0, shape.head_dim, 64):
                part = v_BH.at[mosaic.ds(first_row, ROWS), mosaic.ds(first_channel, 64)]
                value = mosaic.layout_cast(part[...], mosaic.Layout.WGMMA)
                part[...] = jnp.where(is_live, value, jnp.zeros_like(value))
