"""Brings blocks of K and V to a TPU core while others are attended to: the part that both kernels share.

Items (a tile and a block of its tokens) come in trips of E. While trip t is attended to, the pages of t + 1
arrive, and the page ids of t + 2: a row of the block table stays in HBM, and 128 ids of it come to SMEM, so
that no table is too large. Copies end in the order of nothing, so a place is waited for as a whole.

    trip      ids to SMEM      pages to VMEM     attended
    t + 2     asked for
    t + 1     awaited, read    asked for
    t                          awaited           now

Knows tiles only by the fields of tpu_plan.py, and queries as a copy that its caller makes with the pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.kernels_pallas.kv_pages import LANES, PagesLayout
from jaxserve.kernels_pallas.paged_attention.tpu_plan import (
    END_BLOCK,
    FIRST_BLOCK,
    FIRST_TILE,
    KV_LEN,
    NUM_ITEMS,
    RUN,
    Blocks,
)

NO_TILE = -1
ITEM_PLACES = 3  # trips whose items are known
PLACES = 2  # trips whose pages have a place


class Stream(NamedTuple):
    """References: in SMEM, in HBM, and the scratch of `list_scratch`. An int8 pool has scales."""

    tiles_FL: Any
    cores_2C: Any
    first_page_1: Any
    table_R1W: Any
    words_PML: Any  # M rows of a page
    scales_PML: Any
    items: Any  # tile and block of each item of ITEM_PLACES trips
    page_ids: Any
    words: Any
    scales: Any
    ids_arrived: Any
    arrived: Any


class Cursor(NamedTuple):
    """The next item that is not on a trip yet."""

    tile: jax.Array
    block: jax.Array


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamShape:
    layout: PagesLayout
    blocks: Blocks
    page_size: int

    @property
    def pages_per_block(self) -> int:
        return self.blocks.block_tokens // self.page_size

    def list_scratch(self) -> dict[str, Any]:
        """Scratch of a core, by fields of Stream."""
        num_items, block_tokens = self.blocks.num_items, self.blocks.block_tokens

        def rows(rows_per_token: int) -> Any:
            return pltpu.VMEM((PLACES, num_items, block_tokens * rows_per_token, LANES), jnp.int32)

        scratch = {
            "items": pltpu.SMEM((ITEM_PLACES * num_items * 2,), jnp.int32),
            "page_ids": pltpu.SMEM((PLACES, num_items, 1, LANES), jnp.int32),
            "words": rows(self.layout.num_rows),
            "ids_arrived": pltpu.SemaphoreType.DMA((PLACES, num_items)),
            "arrived": pltpu.SemaphoreType.DMA((PLACES, num_items)),
        }
        if self.layout.has_scales:
            scratch["scales"] = rows(self.layout.num_scale_rows)
        return scratch


# Copies of queries that go with the pages of an item: of (tile, block, place, index of the item).
QueryCopy = Callable[[jax.Array, jax.Array, jax.Array, int], Any]


def run_trips(
    stream: Stream, shape: StreamShape, copy_queries: QueryCopy, attend: Callable, carry: Any
) -> Any:
    """`attend(trip, carry)` for each trip of this core, whose items have arrived; its last carry."""
    core = pl.program_id(0)
    first_tile, num_items = stream.cores_2C[FIRST_TILE, core], stream.cores_2C[NUM_ITEMS, core]
    num_trips = (num_items + shape.blocks.num_items - 1) // shape.blocks.num_items
    cursor = Cursor(first_tile, stream.tiles_FL[FIRST_BLOCK, first_tile])
    for trip in range(2):
        cursor = _announce(stream, shape, jnp.int32(trip), cursor, num_items)
    _bring(stream, shape, jnp.int32(0), copy_queries)

    def take_trip(trip, cursor_carry):
        cursor, carry = cursor_carry
        cursor = _announce(stream, shape, trip + 2, cursor, num_items)
        _bring(stream, shape, trip + 1, copy_queries)
        _await(stream, shape, trip, copy_queries)
        return cursor, attend(trip, carry)

    _, carry = jax.lax.fori_loop(jnp.int32(0), num_trips, take_trip, (cursor, carry))
    return carry


def read_item(stream: Stream, shape: StreamShape, trip: jax.Array, index: int) -> tuple[jax.Array, jax.Array]:
    """Tile and block of an item that is on its way; NO_TILE behind the last one."""
    first = (trip % ITEM_PLACES * shape.blocks.num_items + index) * 2
    return stream.items[first], stream.items[first + 1]


def _announce(
    stream: Stream, shape: StreamShape, trip: jax.Array, cursor: Cursor, num_items: jax.Array
) -> Cursor:
    """Note the items of a trip, and ask for the ids of their pages."""
    last_tile = stream.tiles_FL.shape[1] - 1
    for index in range(shape.blocks.num_items):
        is_there = trip * shape.blocks.num_items + index < num_items
        tile, block = cursor
        first = (trip % ITEM_PLACES * shape.blocks.num_items + index) * 2
        stream.items[first] = jnp.where(is_there, tile, NO_TILE)
        stream.items[first + 1] = block

        @pl.when(is_there)
        def _(tile=tile, block=block, index=index):
            _copy_ids(stream, shape, tile, block, trip, index).start()

        is_last = block + 1 >= stream.tiles_FL[END_BLOCK, tile]
        next_tile = jnp.minimum(tile + 1, last_tile)
        cursor = Cursor(
            jnp.where(is_last, next_tile, tile),
            jnp.where(is_last, stream.tiles_FL[FIRST_BLOCK, next_tile], block + 1),
        )
    return cursor


def _copy_ids(stream: Stream, shape: StreamShape, tile, block, trip, index: int) -> Any:
    piece = block * shape.pages_per_block // LANES
    ids = pl.ds(pl.multiple_of(piece * LANES, LANES), LANES)
    return pltpu.make_async_copy(
        stream.table_R1W.at[stream.tiles_FL[RUN, tile], :, ids],
        stream.page_ids.at[trip % PLACES, index],
        stream.ids_arrived.at[trip % PLACES, index],
    )


def _bring(stream: Stream, shape: StreamShape, trip: jax.Array, copy_queries: QueryCopy) -> None:
    """Ask for the pages of a trip, and for queries."""
    for index in range(shape.blocks.num_items):
        tile, block = read_item(stream, shape, trip, index)

        @pl.when(tile != NO_TILE)
        def _(tile=tile, block=block, index=index):
            _copy_ids(stream, shape, tile, block, trip, index).wait()
            first = block * shape.pages_per_block % LANES

            def bring_page(i, _):
                page_id = stream.first_page_1[0] + stream.page_ids[trip % PLACES, index, 0, first + i]
                for copy in _copy_page(stream, shape, page_id, i, trip, index):
                    copy.start()

            jax.lax.fori_loop(0, _count_pages(stream, shape, tile, block), bring_page, None)
            with_queries(copy_queries, tile, block, trip, index, lambda copy: copy.start())


def _await(stream: Stream, shape: StreamShape, trip: jax.Array, copy_queries: QueryCopy) -> None:
    """Wait for what `_bring` asked for."""
    for index in range(shape.blocks.num_items):
        tile, block = read_item(stream, shape, trip, index)

        @pl.when(tile != NO_TILE)
        def _(tile=tile, block=block, index=index):
            def await_page(i, _):
                for copy in _copy_page(stream, shape, 0, i, trip, index):
                    copy.wait()

            jax.lax.fori_loop(0, _count_pages(stream, shape, tile, block), await_page, None)
            with_queries(copy_queries, tile, block, trip, index, lambda copy: copy.wait())


def with_queries(copy_queries: QueryCopy, tile, block, trip, index: int, act: Callable[[Any], None]) -> None:
    """`act` on the copy of an item's queries, where it has one."""
    is_wanted, copy = copy_queries(tile, block, trip % PLACES, index)

    @pl.when(is_wanted)
    def _():
        act(copy)


def _count_pages(stream: Stream, shape: StreamShape, tile, block) -> jax.Array:
    """Pages of a block up to the last token that the tile sees."""
    tokens = stream.tiles_FL[KV_LEN, tile] - block * shape.blocks.block_tokens
    return jnp.minimum((tokens + shape.page_size - 1) // shape.page_size, shape.pages_per_block)


def _copy_page(stream: Stream, shape: StreamShape, page_id, i, trip, index: int) -> list[Any]:
    """The copies of page i of a block: values, and scales where there are some."""
    place = trip % PLACES
    copies = []
    for pool, buffer in ((stream.words_PML, stream.words), (stream.scales_PML, stream.scales)):
        if pool is None:
            continue
        num_rows = pool.shape[1]
        rows = pl.ds(pl.multiple_of(i * num_rows, 8), num_rows)
        target = buffer.at[place, index, rows]
        copies.append(pltpu.make_async_copy(pool.at[page_id], target, stream.arrived.at[place, index]))
    return copies
