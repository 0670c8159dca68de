"""Paged prefill attention on a TPU, in Pallas; `ref.paged_prefill` is its specification.

A core walks the items of its tiles (tpu_plan.py) one by one, while the next block arrives. With the first
block of a tile its queries are rounded to bf16 and put in order, head by head; each block then goes through
the units of KV heads, and for each through the queries in pieces whose scores the core can hold. The last
block of a tile divides, and the live tokens leave: in pieces of powers of two, as copies have fixed sizes.

    I = 8, 5 tokens live       | 4 tokens | 1 |        two copies, chosen by the bits of 5

Letters beside the usual ones: I tokens of a tile, Y rows of a token (query heads and their chunks, padded),
U units of KV heads, A chunks of a unit, L = 128 lanes, M = heads of a unit * I rows, B tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.kernels_pallas.kv_pages import LANES, KVPages, PagesLayout
from jaxserve.kernels_pallas.paged_attention.tpu_block import (
    MASKED,
    Partial,
    Words,
    add_up,
    find_live,
    merge,
    score,
    see,
    weigh,
)
from jaxserve.kernels_pallas.paged_attention.tpu_launch import launch_cores
from jaxserve.kernels_pallas.paged_attention.tpu_plan import (
    ANOTHER_CHIP,
    PREFILL_PRODUCT_ROWS,
    Blocks,
    Chip,
    choose_prefill_blocks,
    pad_sublanes,
)
from jaxserve.kernels_pallas.paged_attention.tpu_queries import UnitQueries, from_units, order_queries
from jaxserve.kernels_pallas.paged_attention.tpu_scales import load_scales, scale_unit
from jaxserve.kernels_pallas.paged_attention.tpu_stream import (
    NO_TILE,
    PLACES,
    Stream,
    StreamShape,
    announce_trips,
    read_block,
    read_item,
    run_trips,
)
from jaxserve.kernels_pallas.paged_attention.tpu_work import (
    END_BLOCK,
    FIRST_BLOCK,
    KV_LEN,
    LIVE,
    POSITION,
    TOKEN,
    Work,
    list_prefill_work,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillShape:
    stream: StreamShape
    heads_per_unit: int  # query heads
    scale: float
    window: int | None
    soft_cap: float | None
    adds_bf16: bool

    @property
    def layout(self) -> PagesLayout:
        return self.stream.layout

    @property
    def blocks(self) -> Blocks:
        return self.stream.blocks

    @property
    def token_rows(self) -> int:
        """Y: rows of 128 that the queries of a token take."""
        return pad_sublanes(self.layout.num_chunks * self.heads_per_unit)

    @property
    def query_rows(self) -> int:
        """M."""
        return self.heads_per_unit * self.blocks.tile_tokens

    @property
    def heads_at_once(self) -> int:
        """Query heads whose rows go into one product: a divisor of those of a unit."""
        most = max(PREFILL_PRODUCT_ROWS // self.blocks.tile_tokens, 1)
        return max(count for count in range(1, most + 1) if self.heads_per_unit % count == 0)

    @property
    def units_at_once(self) -> int:
        """Units whose words are read together, since they share rows."""
        together = max(self.layout.chunks_per_row // self.layout.chunks_per_unit, 1)
        return together if self.layout.num_units % together == 0 else self.layout.num_units


def paged_prefill(
    q_TNH: jax.Array | UnitQueries,
    kv: KVPages,
    table_XW: jax.Array,
    slot_C: jax.Array,
    token_C: jax.Array,
    len_C: jax.Array,
    kv_len_C: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_N: jax.Array | None = None,
    work: Work | None = None,
    chip: Chip = ANOTHER_CHIP,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`ref.paged_prefill` of a pool of KVPages: [T, N, H] float32, of [T, N, H] or of what rope_write gave.

    Queries and probabilities are rounded to bf16. `work` is what `list_prefill_work` gives for the same
    arguments, if the caller has it already. `chip` is what sizes are chosen for, `blocks` are sizes for tests
    and for tuning; `interpret` takes what `pallas_call` does.
    """
    layout, page_size = kv.layout, kv.words_PSJL.shape[1]
    queries = order_queries(q_TNH, layout)
    num_tokens, num_heads = len(queries.q_TUAML), queries.num_heads
    heads_per_unit = layout.heads_per_unit * (num_heads // layout.num_kv_heads)
    if blocks is None:
        blocks = choose_blocks(layout, page_size, num_tokens, num_heads, chip)
    shape = PrefillShape(
        stream=StreamShape(layout=layout, blocks=blocks, page_size=page_size),
        heads_per_unit=heads_per_unit,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        adds_bf16=chip.adds_bf16,
    )
    if work is None:
        chunks = (table_XW, slot_C, token_C, len_C, kv_len_C)
        sizes = {"num_tokens": num_tokens, "window": window, "blocks": blocks}
        work = list_prefill_work(*chunks, **sizes, interpret=interpret)
    q_ZL = _list_rows(queries.q_TUAML, shape)
    sinks = [] if sinks_N is None else [_spread_sinks(sinks_N, shape)]
    out_ZL = _launch(shape, work, q_ZL, sinks, kv, interpret)
    out_TYL = out_ZL.reshape(-1, shape.token_rows, LANES)[:num_tokens]
    out_TYL = out_TYL[:, : layout.num_chunks * heads_per_unit]
    out_TUYAL = out_TYL.reshape(num_tokens, layout.num_units, heads_per_unit, -1, LANES)
    out_TNH = from_units(out_TUYAL, num_heads, layout)
    return jnp.where(work.is_live_T[:, None, None], out_TNH, 0.0)


def choose_blocks(layout: PagesLayout, page_size: int, num_tokens: int, num_heads: int, chip: Chip) -> Blocks:
    """Of a prefill of so many tokens."""
    rows_per_token = count_token_rows(layout, num_heads)
    return choose_prefill_blocks(layout, page_size, num_tokens, rows_per_token, chip)


def count_token_rows(layout: PagesLayout, num_heads: int) -> int:
    """Y."""
    heads_per_unit = layout.heads_per_unit * (num_heads // layout.num_kv_heads)
    return pad_sublanes(layout.num_chunks * heads_per_unit)


def _list_rows(q_TUAML: jax.Array, shape: PrefillShape) -> jax.Array:
    """The rows of tokens one behind the other, and those of one more tile, so that each is whole."""
    q_TYL = q_TUAML.reshape(len(q_TUAML), -1, LANES)
    if q_TYL.shape[1] > shape.token_rows or shape.layout.chunks_per_unit > 1:  # units padded one by one
        q_TUYAL = q_TUAML[:, :, :, : shape.heads_per_unit].transpose(0, 1, 3, 2, 4)
        q_TYL = q_TUYAL.reshape(len(q_TUAML), -1, LANES)
    padding = ((0, shape.blocks.tile_tokens), (0, shape.token_rows - q_TYL.shape[1]), (0, 0))
    return jnp.pad(q_TYL, padding).reshape(-1, LANES)


def _spread_sinks(sinks_N: jax.Array, shape: PrefillShape) -> jax.Array:
    """The score that each query's softmax begins with, [U, heads of it, 1, L]."""
    num_units, heads = shape.layout.num_units, shape.heads_per_unit
    sinks_N = jnp.pad(sinks_N.astype(jnp.float32), (0, num_units * heads - len(sinks_N)))
    return jnp.broadcast_to(sinks_N.reshape(num_units, heads, 1, 1), (num_units, heads, 1, LANES))


def _launch(shape: PrefillShape, work: Work, q_ZL, sinks: list, kv: KVPages, interpret) -> jax.Array:
    num_units, num_chunks = shape.layout.num_units, shape.layout.chunks_per_unit
    tile_rows = shape.blocks.tile_tokens * shape.token_rows
    block_shape = (shape.units_at_once, num_chunks, shape.blocks.block_tokens, LANES)
    scratch = {
        "queries": pltpu.VMEM((PLACES, tile_rows, LANES), jnp.float32),
        "operands": pltpu.VMEM((num_units, num_chunks, shape.query_rows, LANES), jnp.bfloat16),
        "keys": pltpu.VMEM(block_shape, jnp.bfloat16),
        "values": pltpu.VMEM(block_shape, jnp.bfloat16),
        "largest": pltpu.VMEM((num_units, shape.query_rows, LANES), jnp.float32),
        "sums": pltpu.VMEM((num_units, shape.query_rows, LANES), jnp.float32),
        "outputs": pltpu.VMEM((num_units, num_chunks, shape.query_rows, LANES), jnp.float32),
        "leaving": pltpu.VMEM((tile_rows, LANES), jnp.float32),
        "left": pltpu.SemaphoreType.DMA,
        "queries_arrived": pltpu.SemaphoreType.DMA((PLACES,)),
    }

    return launch_cores(
        "paged_prefill",
        lambda *refs, **own: _Core(shape, *refs, **own).run(),
        shape.stream,
        work,
        q_ZL,
        sinks,
        kv,
        scratch,
        checks_bounds=True,
        interpret=interpret,
    )


@dataclass(frozen=True, slots=True)
class _Core:
    """The references of the kernel, and what one core does with them."""

    shape: PrefillShape
    stream: Stream
    q_ZL: Any
    sinks_UY1L: Any  # or None
    out_ZL: Any
    queries: Any
    operands: Any
    keys: Any
    values: Any
    largest: Any
    sums: Any
    outputs: Any
    leaving: Any
    left: Any
    queries_arrived: Any

    def run(self) -> None:
        """The carry is the last tile that left, or -1."""
        cursor = announce_trips(self.stream, self.shape.stream)
        last = run_trips(self.stream, self.shape.stream, cursor, self, self._attend_trip, jnp.int32(-1))
        self._copy_out(last, lambda copy: copy.wait())

    def start(self, trip) -> None:
        self._copy_queries(trip, lambda copy: copy.start())

    def wait(self, trip) -> None:
        self._copy_queries(trip, lambda copy: copy.wait())

    def _copy_queries(self, trip, act) -> None:
        """`act` on the copy of a tile's queries, which come with its first block."""
        tile, block = read_item(self.stream, self.shape.stream, trip, 0)
        known = jnp.maximum(tile, 0)

        @pl.when((tile != NO_TILE) & (block == self.stream.tiles_FL[FIRST_BLOCK, known]))
        def _():
            token_rows, tile_rows = self.shape.token_rows, self.queries.shape[1]
            first = pl.multiple_of(self.stream.tiles_FL[TOKEN, known] * token_rows, 8)
            source, place = self.q_ZL.at[pl.ds(first, tile_rows)], known % PLACES
            act(pltpu.make_async_copy(source, self.queries.at[place], self.queries_arrived.at[place]))

    def _copy_out(self, tile, act) -> None:
        """`act` on each copy that takes live tokens of a tile away."""
        token_rows, known = self.shape.token_rows, jnp.maximum(tile, 0)
        num_live = jnp.where(tile >= 0, self.stream.tiles_FL[LIVE, known], 0)
        token = self.stream.tiles_FL[TOKEN, known]
        length = self.shape.blocks.tile_tokens
        while length:
            offset = num_live & -(2 * length)

            @pl.when((num_live & length) != 0)
            def _(length=length, offset=offset):
                source = pl.ds(pl.multiple_of(offset * token_rows, 8), length * token_rows)
                target = pl.ds(pl.multiple_of((token + offset) * token_rows, 8), length * token_rows)
                act(pltpu.make_async_copy(self.leaving.at[source], self.out_ZL.at[target], self.left))

            length //= 2

    def _attend_trip(self, trip, last):
        tile, block = read_item(self.stream, self.shape.stream, trip, 0)

        @pl.when(block == self.stream.tiles_FL[FIRST_BLOCK, tile])
        def _():
            self._start_tile(tile)

        num_units, units_at_once = self.shape.layout.num_units, self.shape.units_at_once
        jax.lax.fori_loop(
            0,
            num_units // units_at_once,
            lambda i, _: self._attend_units(trip, tile, block, i * units_at_once),
            None,
        )
        is_last = block + 1 == self.stream.tiles_FL[END_BLOCK, tile]

        @pl.when(is_last)
        def _():
            self._copy_out(last, lambda copy: copy.wait())
            jax.lax.fori_loop(0, num_units, lambda unit, _: self._finish_unit(unit), None)
            self._copy_out(tile, lambda copy: copy.start())

        return jnp.where(is_last, tile, last)

    def _rows_of_head(self, unit, head: int, chunk: int):
        """Of the rows of a tile, token by token, those of one head and chunk."""
        first = (unit * self.shape.heads_per_unit + head) * self.shape.layout.chunks_per_unit + chunk
        return pl.ds(first, self.shape.blocks.tile_tokens, stride=self.shape.token_rows)

    def _start_tile(self, tile) -> None:
        tile_tokens, place = self.shape.blocks.tile_tokens, tile % PLACES

        def start_unit(unit, _):
            for head in range(self.shape.heads_per_unit):
                rows = pl.ds(head * tile_tokens, tile_tokens)
                sink_1L = MASKED if self.sinks_UY1L is None else self.sinks_UY1L[unit, head]
                sink_IL = jnp.broadcast_to(sink_1L, (tile_tokens, LANES))
                self.largest[unit, rows] = sink_IL
                self.sums[unit, rows] = (sink_IL > MASKED).astype(jnp.float32)
                for chunk in range(self.shape.layout.chunks_per_unit):
                    q_IL = self.queries[place, self._rows_of_head(unit, head, chunk), :]
                    self.operands[unit, chunk, rows] = (q_IL * self.shape.scale).astype(jnp.bfloat16)
                    self.outputs[unit, chunk, rows] = jnp.zeros_like(q_IL)

        jax.lax.fori_loop(0, self.shape.layout.num_units, start_unit, None)

    def _attend_units(self, trip, tile, block, first_unit) -> None:
        shape, block_tokens = self.shape, self.shape.blocks.block_tokens
        place, first_token = trip % PLACES, block * self.shape.blocks.block_tokens
        position, kv_len = self.stream.tiles_FL[POSITION, tile], self.stream.tiles_FL[KV_LEN, tile]
        live_B1 = find_live(kv_len, position, first_token, block_tokens, shape.window)
        words, scales = read_block(self.stream, shape.stream, place, 0)
        starts_at = 0 if shape.units_at_once == shape.layout.num_units else first_unit
        block_words = Words(words, shape.layout, shape.adds_bf16)
        keys = block_words.load_k(starts_at, shape.units_at_once)
        values = block_words.load_v(starts_at, shape.units_at_once, live_B1)
        for i, (k, v) in enumerate(zip(keys, values, strict=True)):
            unit = list(zip(k, v, strict=True))
            if scales is not None:
                of_unit = load_scales(scales, starts_at + i, block_tokens, shape.layout)
                unit = scale_unit(unit, of_unit, live_B1, shape.layout)
            for chunk, (k_BL, v_BL) in enumerate(unit):
                self.keys[i, chunk] = k_BL.astype(jnp.bfloat16)
                self.values[i, chunk] = v_BL.astype(jnp.bfloat16)
        num_pieces = shape.heads_per_unit // shape.heads_at_once
        rows_at_once = shape.heads_at_once * shape.blocks.tile_tokens
        token_M1 = jax.lax.broadcasted_iota(jnp.int32, (rows_at_once, 1), 0) & (shape.blocks.tile_tokens - 1)
        is_seen_MB = see(position + token_M1, first_token, block_tokens, shape.window, shape.layout)

        def attend_piece(index, _):
            i, piece = index // num_pieces, index % num_pieces
            rows = pl.ds(pl.multiple_of(piece * rows_at_once, rows_at_once), rows_at_once)
            self._attend_rows(i, first_unit + i, rows, is_seen_MB)

        jax.lax.fori_loop(0, shape.units_at_once * num_pieces, attend_piece, None)

    def _attend_rows(self, i, unit, rows, is_seen_MB) -> None:
        """Rows of queries of one unit against the block, and into the state."""
        chunks = range(self.shape.layout.chunks_per_unit)
        score_MB = score(
            [self.operands[unit, chunk, rows] for chunk in chunks], [self.keys[i, chunk] for chunk in chunks]
        )
        values = [self.values[i, chunk] for chunk in chunks]
        partial = add_up(weigh(score_MB, is_seen_MB, self.shape.soft_cap), values)
        state = Partial(
            self.largest[unit, rows],
            self.sums[unit, rows],
            [self.outputs[unit, chunk, rows] for chunk in chunks],
        )
        state = merge(state, partial)
        self.largest[unit, rows] = state.max_ML
        self.sums[unit, rows] = state.sum_ML
        for chunk in chunks:
            self.outputs[unit, chunk, rows] = state.out_ML[chunk]

    def _finish_unit(self, unit) -> None:
        tile_tokens = self.shape.blocks.tile_tokens
        for head in range(self.shape.heads_per_unit):
            rows = pl.ds(head * tile_tokens, tile_tokens)
            sums_IL = jnp.maximum(self.sums[unit, rows], 1e-30)
            for chunk in range(self.shape.layout.chunks_per_unit):
                self.leaving[self._rows_of_head(unit, head, chunk), :] = (
                    self.outputs[unit, chunk, rows] / sums_IL
                )
