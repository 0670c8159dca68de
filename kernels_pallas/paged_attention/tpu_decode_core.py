"""What one core of the TPU's decode attention does, wherever queries and outputs are (tpu_decode_rows.py).

It walks the items of its rows (tpu_plan.py) in trips of several, of one row or of many, so that the
copies of a trip and the products of its items and heads overlap. Each item yields a partial softmax for each
unit of KV heads; those are merged, item by item, into the state of the row that is under way. Nothing is
asked of a row's length, nor of the number of rows and pages.

Letters as in tpu_decode_shape.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.kernels_pallas.kv_pages import LANES
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
from jaxserve.kernels_pallas.paged_attention.tpu_decode_rows import Item, Rows
from jaxserve.kernels_pallas.paged_attention.tpu_decode_shape import DecodeShape
from jaxserve.kernels_pallas.paged_attention.tpu_scales import (
    count_turned,
    score_scaled,
    spread_v_scales,
    turn_scales,
)
from jaxserve.kernels_pallas.paged_attention.tpu_stream import (
    NO_TILE,
    PLACES,
    Cursor,
    Stream,
    announce_trips,
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
)


def list_core_scratch(shape: DecodeShape) -> dict[str, Any]:
    """By fields of DecodeCore."""
    layout = shape.layout
    state_shape = (layout.num_units, shape.query_rows, LANES)
    unit_shape = (layout.num_units, layout.chunks_per_unit, shape.query_rows, LANES)
    scratch: dict[str, Any] = {
        "largest": pltpu.VMEM(state_shape, jnp.float32),
        "sums": pltpu.VMEM(state_shape, jnp.float32),
        "outputs": pltpu.VMEM(unit_shape, jnp.float32),
    }
    if layout.has_scales:
        for name, num_rows in zip(("k_scales", "v_scales"), count_turned(layout), strict=True):
            turned_shape = (shape.blocks.num_items, num_rows, shape.blocks.block_tokens)
            scratch[name] = pltpu.VMEM(turned_shape, jnp.float32)
    return scratch


@dataclass(frozen=True, slots=True)
class _Block:
    """The tokens of an item."""

    words: Words
    live_B1: jax.Array
    is_seen_MB: jax.Array


@dataclass(frozen=True, slots=True)
class DecodeCore:
    """The references of the kernel, and what one core does with them."""

    shape: DecodeShape
    stream: Stream
    rows: Rows
    sinks_UML: Any  # or None
    largest: Any
    sums: Any
    outputs: Any
    k_scales: Any = None  # of an int8 pool
    v_scales: Any = None

    def announce(self) -> Cursor:
        """Ask for the ids of the first pages; `run` goes on from there."""
        return announce_trips(self.stream, self.shape.stream)

    def run(self, cursor: Cursor) -> None:
        first_carry = self.rows.first_carry()
        carry = run_trips(self.stream, self.shape.stream, cursor, self.rows, self._attend_trip, first_carry)
        core = pl.program_id(0)
        num_items = self.stream.cores_2C[NUM_ITEMS, core]
        num_trips = (num_items + self.shape.blocks.num_items - 1) // self.shape.blocks.num_items
        self.rows.end(num_trips, carry)

    def _attend_trip(self, trip, carry):
        items = self._list_items(trip)
        self.rows.make_room(trip, carry)
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
        return self.rows.leave(trip, items, carry)

    def _list_items(self, trip) -> list[Item]:
        items = []
        for index in range(self.shape.blocks.num_items):
            tile, block = read_item(self.stream, self.shape.stream, trip, index)
            is_there, known = tile != NO_TILE, jnp.maximum(tile, 0)
            is_last = is_there & (block + 1 == self.stream.tiles_FL[END_BLOCK, known])
            is_first = is_there & (block == self.stream.tiles_FL[FIRST_BLOCK, known])
            items.append(Item(index, known, block, is_there, is_first, is_last))
        return items

    def _attend_units(self, trip, items: list[Item], first_unit) -> None:
        """Each step of all items before the next, as products and maxima take long to come: first the scores,
        then the weights, then the outputs, then the merging, which must follow the order of the items."""
        num_units = self.shape.units_at_once
        blocks = [self._find_block(trip, item) for item in items]
        scores = [
            self._score_item(trip, item, block, first_unit) for item, block in zip(items, blocks, strict=True)
        ]
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

    def _find_block(self, trip, item: Item) -> _Block:
        shape, num_tokens = self.shape, self.shape.blocks.block_tokens
        first_token = item.block * num_tokens
        position = self.stream.tiles_FL[POSITION, item.tile]
        kv_len = self.stream.tiles_FL[KV_LEN, item.tile]
        row_M1 = jax.lax.broadcasted_iota(jnp.int32, (shape.query_rows, 1), 0)
        ahead_M1 = sum(
            (row_M1 >= token * shape.heads_per_unit).astype(jnp.int32)
            for token in range(1, shape.blocks.tile_tokens)
        )
        words, _ = read_block(self.stream, shape.stream, trip % PLACES, item.index)
        position_M1 = position + ahead_M1 + row_M1 * 0
        return _Block(
            Words(words, shape.layout, shape.adds_bf16),
            find_live(kv_len, position, first_token, num_tokens, shape.window),
            see(position_M1, first_token, num_tokens, shape.window, shape.layout),
        )

    def _score_item(self, trip, item: Item, block: _Block, first_unit) -> list[jax.Array]:
        """Of units, [M, B]."""
        scores = []
        for i, k_BL in enumerate(block.words.load_k(first_unit, self.shape.units_at_once)):
            q_ML = [
                self.rows.read(trip, item, first_unit + i, chunk) * self.shape.scale
                for chunk in range(self.shape.layout.chunks_per_unit)
            ]
            if self.shape.layout.has_scales:
                k_scales = self.k_scales.at[item.index]
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

    def _merge_unit(self, trip, items: list[Item], unit, partials: list[Partial]) -> None:
        """Into the state, which begins with the first item of a row. Each item writes what the
        row's output would be."""
        chunks = range(self.shape.layout.chunks_per_unit)
        nothing_ML = jnp.full(self.largest.shape[1:], MASKED, jnp.float32)
        sink_ML = nothing_ML if self.sinks_UML is None else self.sinks_UML[unit]
        sink_sum_ML = (sink_ML > MASKED).astype(jnp.float32)
        state = Partial(self.largest[unit], self.sums[unit], [self.outputs[unit, chunk] for chunk in chunks])
        for item, partial in zip(items, partials, strict=True):
            state = Partial(
                jnp.where(item.is_first, sink_ML, state.max_ML),
                jnp.where(item.is_first, sink_sum_ML, state.sum_ML),
                [jnp.where(item.is_first, 0.0, out_ML) for out_ML in state.out_ML],
            )
            state = merge(state, partial)
            sum_ML = jnp.maximum(state.sum_ML, 1e-30)
            for chunk in chunks:
                self.rows.write(trip, item, unit, chunk, state.out_ML[chunk] / sum_ML)
        self.largest[unit] = state.max_ML
        self.sums[unit] = state.sum_ML
        for chunk in chunks:
            self.outputs[unit, chunk] = state.out_ML[chunk]


def _to_bf16(arrays: list[jax.Array]) -> list[jax.Array]:
    return [x.astype(jnp.bfloat16) for x in arrays]
