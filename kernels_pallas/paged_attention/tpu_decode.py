"""Paged decode attention on a TPU, in Pallas; `ref.paged_decode` is its specification.

A core walks the items of its rows (tpu_plan.py) in trips of several, of one row or of many, so that the
copies of a trip and the products of its items and heads overlap. Each item yields a partial softmax for each
unit of KV heads; those are merged, item by item, into the state of the row that is under way, which leaves
with its last item. Nothing is asked of a row's length, nor of the number of rows and pages.

Letters as in tpu_decode_shape.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.kernels_pallas.kv_pages import LANES, KVPages
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
from jaxserve.kernels_pallas.paged_attention.tpu_decode_shape import (
    DecodeShape,
    gather_rows,
    scatter_rows,
    spread_sinks,
)
from jaxserve.kernels_pallas.paged_attention.tpu_launch import launch_cores
from jaxserve.kernels_pallas.paged_attention.tpu_plan import (
    ANOTHER_CHIP,
    Blocks,
    Chip,
    choose_decode_blocks,
)
from jaxserve.kernels_pallas.paged_attention.tpu_queries import UnitQueries, from_units, order_queries
from jaxserve.kernels_pallas.paged_attention.tpu_scales import (
    count_turned,
    score_scaled,
    spread_v_scales,
    turn_scales,
)
from jaxserve.kernels_pallas.paged_attention.tpu_stream import (
    NO_TILE,
    PLACES,
    Stream,
    StreamShape,
    read_block,
    read_item,
    run_trips,
)
from jaxserve.kernels_pallas.paged_attention.tpu_work import (
    END_BLOCK,
    FIRST_BLOCK,
    KV_LEN,
    NUM_ITEMS,
    POSITION,
    RUN,
    Work,
    list_decode_work,
)


def paged_decode(
    q_RNH: jax.Array | UnitQueries,
    kv: KVPages,
    table_XW: jax.Array,
    slot_R: jax.Array,
    kv_len_R: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_N: jax.Array | None = None,
    tokens_per_row: int = 1,
    work: Work | None = None,
    chip: Chip = ANOTHER_CHIP,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`ref.paged_decode` of a pool of KVPages: [R, N, H] float32, of [R, N, H] or of what rope_write gave.

    Queries and probabilities are rounded to bf16. `work` is what `list_decode_work` gives for the same
    arguments, if the caller has it already. `chip` is what sizes are chosen for, `blocks` are sizes for tests
    and for tuning; `interpret` takes what `pallas_call` does.
    """
    layout, page_size = kv.layout, kv.words_PSJL.shape[1]
    queries = order_queries(q_RNH, layout)
    num_heads = queries.num_heads
    shape = DecodeShape(
        stream=StreamShape(
            layout=layout,
            blocks=blocks or choose_decode_blocks(layout, page_size, tokens_per_row, chip),
            page_size=page_size,
        ),
        heads_per_unit=layout.heads_per_unit * (num_heads // layout.num_kv_heads),
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        adds_bf16=chip.adds_bf16,
    )
    if work is None:
        rows = (table_XW, slot_R, kv_len_R)
        sizes = {"tokens_per_row": tokens_per_row, "window": window, "blocks": shape.blocks}
        work = list_decode_work(*rows, **sizes, interpret=interpret)
    sinks = [] if sinks_N is None else [spread_sinks(sinks_N, shape)]
    out_RUAML = _launch(shape, work, gather_rows(queries.q_TUAML, shape), sinks, kv, interpret)
    out_TUYAL = scatter_rows(out_RUAML, shape)
    out_RNH = from_units(out_TUYAL, num_heads, layout)
    return jnp.where(work.is_live_T[:, None, None], out_RNH, 0.0)


def _launch(shape: DecodeShape, work: Work, q_RUAML, sinks: list, kv: KVPages, interpret) -> jax.Array:
    unit_shape = q_RUAML.shape[1:]
    state_shape = (shape.layout.num_units, shape.query_rows, LANES)
    scratch = {
        "queries": pltpu.VMEM((PLACES, shape.blocks.num_items, *unit_shape), jnp.float32),
        "largest": pltpu.VMEM(state_shape, jnp.float32),
        "sums": pltpu.VMEM(state_shape, jnp.float32),
        "outputs": pltpu.VMEM(unit_shape, jnp.float32),
        "leaving": pltpu.VMEM((PLACES, shape.blocks.num_items, *unit_shape), jnp.float32),
        "left": pltpu.SemaphoreType.DMA((PLACES,)),
        "queries_arrived": pltpu.SemaphoreType.DMA((PLACES,)),
    }
    if shape.layout.has_scales:
        for name, num_rows in zip(("k_scales", "v_scales"), count_turned(shape.layout), strict=True):
            turned_shape = (shape.blocks.num_items, num_rows, shape.blocks.block_tokens)
            scratch[name] = pltpu.VMEM(turned_shape, jnp.float32)

    return launch_cores(
        "paged_decode",
        lambda *refs, **own: _Core(shape, *refs, **own).run(),
        shape.stream,
        work,
        q_RUAML,
        sinks,
        kv,
        scratch,
        checks_bounds=False,  # of copies: a third of a page's instructions
        interpret=interpret,
    )


@dataclass(frozen=True, slots=True)
class _Item:
    tile: jax.Array
    block: jax.Array
    is_first: jax.Array  # of its row
    is_last: jax.Array


@dataclass(frozen=True, slots=True)
class _Block:
    """The tokens of an item."""

    words: Words
    live_B1: jax.Array
    is_seen_MB: jax.Array


@dataclass(frozen=True, slots=True)
class _Core:
    """The references of the kernel, and what one core does with them."""

    shape: DecodeShape
    stream: Stream
    q_RUAML: Any
    sinks_UML: Any  # or None
    out_RUAML: Any
    queries: Any
    largest: Any
    sums: Any
    outputs: Any
    leaving: Any
    left: Any
    queries_arrived: Any
    k_scales: Any = None  # of an int8 pool
    v_scales: Any = None

    def run(self) -> None:
        """The carry is how many rows the last two trips finished, whose outputs may be on their way."""
        nothing = (jnp.int32(0), jnp.int32(0))
        counts = run_trips(self.stream, self.shape.stream, self, self._attend_trip, nothing)
        core = pl.program_id(0)
        num_items = self.stream.cores_2C[NUM_ITEMS, core]
        num_trips = (num_items + self.shape.blocks.num_items - 1) // self.shape.blocks.num_items
        for trip, count in enumerate(counts):
            self._await_outputs(num_trips + trip, count)

    def start(self, trip) -> None:
        """Queries of every item, also of those that there are not."""
        for index in range(self.shape.blocks.num_items):
            tile, _ = read_item(self.stream, self.shape.stream, trip, index)
            row = self.stream.tiles_FL[RUN, jnp.maximum(tile, 0)]
            place = trip % PLACES
            target = self.queries.at[place, index]
            pltpu.make_async_copy(self.q_RUAML.at[row], target, self.queries_arrived.at[place]).start()

    def wait(self, trip) -> None:
        queries = self.queries.at[trip % PLACES]
        pltpu.make_async_copy(queries, queries, self.queries_arrived.at[trip % PLACES]).wait()

    def _await_outputs(self, trip, count) -> None:
        """Those that left from the place of a trip."""
        place = trip % PLACES
        for bit in range(self.shape.blocks.num_items.bit_length()):

            @pl.when((count & (1 << bit)) != 0)
            def _(bit=bit):
                rows = self.leaving.at[place, pl.ds(0, 1 << bit)]
                pltpu.make_async_copy(rows, rows, self.left.at[place]).wait()

    def _attend_trip(self, trip, counts):
        items = self._list_items(trip)
        self._await_outputs(trip, counts[0])
        if self.shape.layout.has_scales:
            for index in range(len(items)):
                _, scales = read_block(self.stream, self.shape.stream, trip % PLACES, index)
                turn_scales(scales, self.k_scales.at[index], self.v_scales.at[index], self.shape.layout)
        units_at_once = self.shape.units_at_once
        if units_at_once == self.shape.layout.num_units:
            self._attend_units(trip, items, 0)
        else:
            num_times = self.shape.layout.num_units // units_at_once
            jax.lax.fori_loop(
                0, num_times, lambda i, _: self._attend_units(trip, items, i * units_at_once), None
            )
        for index, item in enumerate(items):

            @pl.when(item.is_last)
            def _(index=index, item=item):
                place, row = trip % PLACES, self.stream.tiles_FL[RUN, item.tile]
                source = self.leaving.at[place, index]
                pltpu.make_async_copy(source, self.out_RUAML.at[row], self.left.at[place]).start()

        return counts[1], sum((item.is_last.astype(jnp.int32) for item in items), jnp.int32(0))

    def _list_items(self, trip) -> list[_Item]:
        items = []
        for index in range(self.shape.blocks.num_items):
            tile, block = read_item(self.stream, self.shape.stream, trip, index)
            is_there, known = tile != NO_TILE, jnp.maximum(tile, 0)
            is_last = is_there & (block + 1 == self.stream.tiles_FL[END_BLOCK, known])
            is_first = is_there & (block == self.stream.tiles_FL[FIRST_BLOCK, known])
            items.append(_Item(known, block, is_first, is_last))
        return items

    def _attend_units(self, trip, items: list[_Item], first_unit) -> None:
        """Each step of all items before the next, as products and maxima take long to come: first the scores,
        then the weights, then the outputs, then the merging, which must follow the order of the items."""
        num_units = self.shape.units_at_once
        blocks = [self._find_block(trip, item, index) for index, item in enumerate(items)]
        scores = [self._score_item(trip, block, index, first_unit) for index, block in enumerate(blocks)]
        weights = [
            [
                weigh(
                    score_MB,
                    block.is_seen_MB,
                    self.shape.soft_cap,
                    self._find_v_scales(index, first_unit + i),
                )
                for i, score_MB in enumerate(of_units)
            ]
            for index, (block, of_units) in enumerate(zip(blocks, scores, strict=True))
        ]
        partials = []
        for block, of_units in zip(blocks, weights, strict=True):
            values = block.words.load_v(first_unit, num_units, block.live_B1)
            partials.append([add_up(w, _to_bf16(v)) for w, v in zip(of_units, values, strict=True)])
        for i in range(num_units):
            self._merge_unit(trip, items, first_unit + i, [of_units[i] for of_units in partials])

    def _find_block(self, trip, item: _Item, index: int) -> _Block:
        shape, num_tokens = self.shape, self.shape.blocks.block_tokens
        first_token = item.block * num_tokens
        position = self.stream.tiles_FL[POSITION, item.tile]
        kv_len = self.stream.tiles_FL[KV_LEN, item.tile]
        row_M1 = jax.lax.broadcasted_iota(jnp.int32, (shape.query_rows, 1), 0)
        ahead_M1 = sum(
            (row_M1 >= token * shape.heads_per_unit).astype(jnp.int32)
            for token in range(1, shape.blocks.tile_tokens)
        )
        words, _ = read_block(self.stream, shape.stream, trip % PLACES, index)
        position_M1 = position + ahead_M1 + row_M1 * 0
        return _Block(
            Words(words, shape.layout, shape.adds_bf16),
            find_live(kv_len, position, first_token, num_tokens, shape.window),
            see(position_M1, first_token, num_tokens, shape.window, shape.layout),
        )

    def _score_item(self, trip, block: _Block, index: int, first_unit) -> list[jax.Array]:
        """Of units, [M, B]."""
        scores = []
        for i, k_BL in enumerate(block.words.load_k(first_unit, self.shape.units_at_once)):
            q_ML = [
                self.queries[trip % PLACES, index, first_unit + i, chunk] * self.shape.scale
                for chunk in range(self.shape.layout.chunks_per_unit)
            ]
            if self.shape.layout.has_scales:
                k_scales = self.k_scales.at[index]
                scores.append(score_scaled(q_ML, _to_bf16(k_BL), k_scales, first_unit + i, self.shape.layout))
            else:
                scores.append(score(_to_bf16(q_ML), _to_bf16(k_BL)))
        return scores

    def _find_v_scales(self, index: int, unit) -> jax.Array | None:
        if not self.shape.layout.has_scales:
            return None
        row_M1 = jax.lax.broadcasted_iota(jnp.int32, (self.shape.query_rows, 1), 0)
        heads_M1 = self.shape.find_heads(row_M1)
        return spread_v_scales(heads_M1, self.v_scales.at[index], unit, self.shape.layout)

    def _merge_unit(self, trip, items: list[_Item], unit, partials: list[Partial]) -> None:
        """Into the state, which begins with the first item of a row. Each item writes what might leave, as a
        branch would keep items apart; it goes with the last one of a row."""
        chunks = range(self.shape.layout.chunks_per_unit)
        nothing_ML = jnp.full(self.largest.shape[1:], MASKED, jnp.float32)
        sink_ML = nothing_ML if self.sinks_UML is None else self.sinks_UML[unit]
        sink_sum_ML = (sink_ML > MASKED).astype(jnp.float32)
        state = Partial(self.largest[unit], self.sums[unit], [self.outputs[unit, chunk] for chunk in chunks])
        for index, (item, partial) in enumerate(zip(items, partials, strict=True)):
            state = Partial(
                jnp.where(item.is_first, sink_ML, state.max_ML),
                jnp.where(item.is_first, sink_sum_ML, state.sum_ML),
                [jnp.where(item.is_first, 0.0, out_ML) for out_ML in state.out_ML],
            )
            state = merge(state, partial)
            sum_ML = jnp.maximum(state.sum_ML, 1e-30)
            for chunk in chunks:
                self.leaving[trip % PLACES, index, unit, chunk] = state.out_ML[chunk] / sum_ML
        self.largest[unit] = state.max_ML
        self.sums[unit] = state.sum_ML
        for chunk in chunks:
            self.outputs[unit, chunk] = state.out_ML[chunk]


def _to_bf16(arrays: list[jax.Array]) -> list[jax.Array]:
    return [x.astype(jnp.bfloat16) for x in arrays]
