"""Brings blocks of K and V to a TPU core while others are attended to: the part that both kernels share.

Items (a tile and a block of its tokens) come in trips of E. While trip t is attended to, the pages of t + 1
arrive, and the page ids of t + 2: a row of the block table stays in HBM, and 128 ids of it come to SMEM, so
that no table is too large. Copies end in the order of nothing, so a trip is waited for as a whole.

    trip      ids to SMEM      pages to VMEM     attended
    t + 2     asked for
    t + 1     awaited, read    asked for
    t                          awaited           now

A core's scalar unit is as busy as the others where pages are small. So ids come for items that there are not,
pages are asked for without a branch, and all pages of a trip share one semaphore, which is waited for by
powers of two of them.

Knows tiles only by the fields of tpu_plan.py, and queries as copies that its caller makes with the pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.kernels_pallas.kv_pages import LANES, PagesLayout
from jaxserve.kernels_pallas.paged_attention.tpu_plan import (
    Blocks,
)
from jaxserve.kernels_pallas.paged_attention.tpu_work import (
    END_BLOCK,
    FIRST_BLOCK,
    FIRST_TILE,
    KV_LEN,
    NUM_ITEMS,
    RUN,
)

NO_TILE = -1
ITEM_PLACES = 3  # trips whose items are known
PLACES = 2  # trips whose pages have a place
UNROLLED_PAGES = 8  # of an item, asked for without a loop
TILE, BLOCK, ITEM_PAGES, ITEM_FIELDS = range(4)


class Stream(NamedTuple):
    """References: in SMEM, in HBM, and the scratch of `list_scratch`. An int8 pool has scales."""

    tiles_FL: Any
    cores_2C: Any
    first_page_1: Any
    table_R1W: Any
    words_Z1L: Any  # Z rows of all pages; of tiles of one row, as tokens are written by rows
    scales_Z1L: Any
    items: Any  # ITEM_FIELDS of each item of ITEM_PLACES trips
    page_ids: Any
    words: Any
    scales: Any
    ids_arrived: Any
    arrived: Any


class Cursor(NamedTuple):
    """The next item that is not on a trip yet."""

    tile: jax.Array
    block: jax.Array


class Queries(Protocol):
    """The copies of queries that go with the pages of a trip."""

    def start(self, trip: jax.Array) -> None: ...

    def wait(self, trip: jax.Array) -> None:
        """Also of the trip behind the last one."""
        ...


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
            return pltpu.VMEM((PLACES, num_items * block_tokens * rows_per_token, LANES), jnp.int32)

        scratch = {
            "items": pltpu.SMEM((ITEM_PLACES * num_items * ITEM_FIELDS,), jnp.int32),
            "page_ids": pltpu.SMEM((PLACES * num_items * LANES,), jnp.int32),
            "words": rows(self.layout.num_rows),
            "ids_arrived": pltpu.SemaphoreType.DMA((PLACES,)),
            "arrived": pltpu.SemaphoreType.DMA((PLACES,)),
        }
        if self.layout.has_scales:
            scratch["scales"] = rows(self.layout.num_scale_rows)
        return scratch


def announce_trips(stream: Stream, shape: StreamShape) -> Cursor:
    """Ask for the page ids of the first trips: what a launch can do before it knows queries and pages."""
    core = pl.program_id(0)
    first_tile = stream.cores_2C[FIRST_TILE, core]
    cursor = Cursor(first_tile, stream.tiles_FL[FIRST_BLOCK, first_tile])
    for trip in range(2):
        cursor = _announce(stream, shape, jnp.int32(trip), cursor, stream.cores_2C[NUM_ITEMS, core])
    return cursor


def run_trips(
    stream: Stream, shape: StreamShape, cursor: Cursor, queries: Queries, attend: Callable, carry: Any
) -> Any:
    """`attend(trip, carry)` for each trip of this core, whose items have arrived; its last carry. `cursor` is
    what `announce_trips` gave."""
    num_items = stream.cores_2C[NUM_ITEMS, pl.program_id(0)]
    num_trips = (num_items + shape.blocks.num_items - 1) // shape.blocks.num_items
    num_pages = _bring(stream, shape, jnp.int32(0), queries)

    def take_trip(trip, state):
        cursor, num_pages, carry = state
        cursor = _announce(stream, shape, trip + 2, cursor, num_items)
        num_coming = _bring(stream, shape, trip + 1, queries)
        _await_pages(stream, shape, trip, num_pages)
        queries.wait(trip)
        return cursor, num_coming, attend(trip, carry)

    *_, carry = jax.lax.fori_loop(jnp.int32(0), num_trips, take_trip, (cursor, num_pages, carry))
    queries.wait(num_trips)  # what came for nobody
    _copy_ids(stream, shape, num_trips + 1).wait()
    return carry


def read_item(stream: Stream, shape: StreamShape, trip: jax.Array, index: int) -> tuple[jax.Array, jax.Array]:
    """Tile and block of an item that is on its way; NO_TILE behind the last one."""
    first = _find_item(shape, trip, index)
    return stream.items[first + TILE], stream.items[first + BLOCK]


def read_block(stream: Stream, shape: StreamShape, place: jax.Array, index: int) -> tuple[Any, Any]:
    """References to an item's words, and to its scales or None."""

    def cut(buffer: Any, rows_per_token: int) -> Any:
        num_rows = shape.blocks.block_tokens * rows_per_token
        return buffer.at[place, pl.ds(index * num_rows, num_rows)]

    words = cut(stream.words, shape.layout.num_rows)
    return words, cut(stream.scales, shape.layout.num_scale_rows) if shape.layout.has_scales else None


def _find_item(shape: StreamShape, trip: jax.Array, index: int) -> jax.Array:
    return (trip % ITEM_PLACES * shape.blocks.num_items + index) * ITEM_FIELDS


def _announce(
    stream: Stream, shape: StreamShape, trip: jax.Array, cursor: Cursor, num_items: jax.Array
) -> Cursor:
    """Note the items of a trip, and ask for the ids of their pages."""
    last_tile = stream.tiles_FL.shape[1] - 1
    for index in range(shape.blocks.num_items):
        is_there = trip * shape.blocks.num_items + index < num_items
        tile, block = cursor
        tokens = stream.tiles_FL[KV_LEN, tile] - block * shape.blocks.block_tokens
        num_pages = jnp.minimum((tokens + shape.page_size - 1) // shape.page_size, shape.pages_per_block)
        first = _find_item(shape, trip, index)
        stream.items[first + TILE] = jnp.where(is_there, tile, NO_TILE)
        stream.items[first + BLOCK] = block
        stream.items[first + ITEM_PAGES] = jnp.where(is_there, num_pages, 0)
        # Of no item the first ids, which nobody reads.
        piece = jnp.where(is_there, block, 0) * shape.pages_per_block // LANES
        ids = pl.ds(pl.multiple_of(piece * LANES, LANES), LANES)
        pltpu.make_async_copy(
            stream.table_R1W.at[stream.tiles_FL[RUN, tile], 0, ids],
            stream.page_ids.at[pl.ds(_find_ids(shape, trip, index), LANES)],
            stream.ids_arrived.at[trip % PLACES],
        ).start()
        is_last = block + 1 >= stream.tiles_FL[END_BLOCK, tile]
        next_tile = jnp.minimum(tile + 1, last_tile)
        cursor = Cursor(
            jnp.where(is_last, next_tile, tile),
            jnp.where(is_last, stream.tiles_FL[FIRST_BLOCK, next_tile], block + 1),
        )
    return cursor


def _find_ids(shape: StreamShape, trip: jax.Array, index: int) -> jax.Array:
    return pl.multiple_of((trip % PLACES * shape.blocks.num_items + index) * LANES, LANES)


def _copy_ids(stream: Stream, shape: StreamShape, trip: jax.Array) -> Any:
    """A copy of as many bytes as all ids of a trip, to wait for."""
    ids = stream.page_ids.at[pl.ds(_find_ids(shape, trip, 0), shape.blocks.num_items * LANES)]
    return pltpu.make_async_copy(ids, ids, stream.ids_arrived.at[trip % PLACES])


def _bring(stream: Stream, shape: StreamShape, trip: jax.Array, queries: Queries) -> jax.Array:
    """Ask for the pages of a trip, and for queries. How many pages."""
    queries.start(trip)
    _copy_ids(stream, shape, trip).wait()
    num_coming = jnp.int32(0)
    for index in range(shape.blocks.num_items):
        item = _find_item(shape, trip, index)
        first_id = _find_ids(shape, trip, index)
        first_id += stream.items[item + BLOCK] * shape.pages_per_block % LANES
        num_pages = stream.items[item + ITEM_PAGES]
        num_coming += num_pages

        def bring_page(i, page_id=None, first_id=first_id, index=index):
            page_id = stream.page_ids[first_id + i] if page_id is None else page_id
            for copy in _copy_page(stream, shape, stream.first_page_1[0] + page_id, i, trip, index):
                copy.start()

        if shape.pages_per_block > UNROLLED_PAGES:
            jax.lax.fori_loop(0, num_pages, lambda i, _, bring=bring_page: bring(i), None)
            continue
        for i in range(shape.pages_per_block):
            page_id = stream.page_ids[first_id + i]  # read ahead of the condition, which then is no branch
            pl.when(i < num_pages)(partial(bring_page, i, page_id))
    return num_coming


def _copy_page(stream: Stream, shape: StreamShape, page_id, i, trip, index: int) -> list[Any]:
    """The copies of page i of a block: values, and scales where there are some."""
    copies = []
    for pool, buffer, num_rows in _list_pools(stream, shape):
        first_row = (index * shape.pages_per_block + i) * num_rows
        target = buffer.at[trip % PLACES, pl.ds(pl.multiple_of(first_row, 8), num_rows)]
        source = pool.at[pl.ds(page_id * num_rows, num_rows), 0]
        copies.append(pltpu.make_async_copy(source, target, stream.arrived.at[trip % PLACES]))
    return copies


def _list_pools(stream: Stream, shape: StreamShape) -> list[tuple[Any, Any, int]]:
    """Each with the buffer of its pages, and the rows of one."""
    pools = [(stream.words_Z1L, stream.words, shape.page_size * shape.layout.num_rows)]
    if shape.layout.has_scales:
        pools.append((stream.scales_Z1L, stream.scales, shape.page_size * shape.layout.num_scale_rows))
    return pools


def _await_pages(stream: Stream, shape: StreamShape, trip: jax.Array, num_pages: jax.Array) -> None:
    """Wait for what `_bring` asked for: a semaphore counts bytes, whatever copies they are of."""
    place = trip % PLACES
    most = shape.blocks.num_items * shape.pages_per_block
    for bit in range(most.bit_length()):

        @pl.when((num_pages & (1 << bit)) != 0)
        def _(bit=bit):
            for _, buffer, num_rows in _list_pools(stream, shape):
                rows = buffer.at[place, pl.ds(0, num_rows << bit)]
                pltpu.make_async_copy(rows, rows, stream.arrived.at[place]).wait()
