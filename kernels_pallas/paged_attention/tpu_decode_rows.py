"""Where a core of the TPU's decode attention has queries from and leaves outputs: in HBM, for a launch that
only attends, or in VMEM, for one that has made the queries itself and goes on with the outputs.

Letters as in tpu_decode_shape.py; Z rows of 128 lanes, R * U * A * M of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.kernels_pallas.kv_pages import LANES
from jaxserve.kernels_pallas.paged_attention.tpu_decode_shape import DecodeShape
from jaxserve.kernels_pallas.paged_attention.tpu_stream import PLACES, Stream, read_item
from jaxserve.kernels_pallas.paged_attention.tpu_work import RUN


@dataclass(frozen=True, slots=True)
class Item:
    """A block of a row's tokens, in its place of a trip; behind the last one, of the first row."""

    index: int
    tile: jax.Array
    block: jax.Array
    is_there: jax.Array
    is_first: jax.Array  # of its row
    is_last: jax.Array


class Rows(Protocol):
    """What a core does with queries and outputs. The carry is passed from trip to trip."""

    def start(self, trip: jax.Array) -> None:
        """Queries are wanted for the items of a trip."""
        ...

    def wait(self, trip: jax.Array) -> None: ...

    def first_carry(self) -> Any: ...

    def make_room(self, trip: jax.Array, carry: Any) -> None:
        """Outputs of a trip are about to be written."""
        ...

    def read(self, trip: jax.Array, item: Item, unit: Any, chunk: int) -> jax.Array:
        """A unit's queries, [M, L]."""
        ...

    def write(self, trip: jax.Array, item: Item, unit: Any, chunk: int, out_ML: jax.Array) -> None:
        """What the row's output is after this item: that of the last one counts."""
        ...

    def leave(self, trip: jax.Array, items: Sequence[Item], carry: Any) -> Any: ...

    def end(self, num_trips: jax.Array, carry: Any) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsInHbm:
    """The carry is how many rows the last two trips finished, whose outputs may be on their way."""

    shape: DecodeShape
    stream: Stream
    q_RUAML: Any
    out_RUAML: Any
    queries: Any
    leaving: Any
    left: Any
    queries_arrived: Any

    @staticmethod
    def list_scratch(shape: DecodeShape, unit_shape: tuple[int, ...]) -> dict[str, Any]:
        """By fields; `unit_shape` is that of a row."""
        places = (PLACES, shape.blocks.num_items, *unit_shape)
        return {
            "queries": pltpu.VMEM(places, jnp.float32),
            "leaving": pltpu.VMEM(places, jnp.float32),
            "left": pltpu.SemaphoreType.DMA((PLACES,)),
            "queries_arrived": pltpu.SemaphoreType.DMA((PLACES,)),
        }

    def start(self, trip: jax.Array) -> None:
        """Queries of every item, also of those that there are not."""
        for index in range(self.shape.blocks.num_items):
            tile, _ = read_item(self.stream, self.shape.stream, trip, index)
            row = self.stream.tiles_FL[RUN, jnp.maximum(tile, 0)]
            place = trip % PLACES
            target = self.queries.at[place, index]
            pltpu.make_async_copy(self.q_RUAML.at[row], target, self.queries_arrived.at[place]).start()

    def wait(self, trip: jax.Array) -> None:
        queries = self.queries.at[trip % PLACES]
        pltpu.make_async_copy(queries, queries, self.queries_arrived.at[trip % PLACES]).wait()

    def first_carry(self) -> tuple[jax.Array, jax.Array]:
        return jnp.int32(0), jnp.int32(0)

    def make_room(self, trip: jax.Array, carry: tuple[jax.Array, jax.Array]) -> None:
        """Waits for those that left from the place of a trip."""
        place = trip % PLACES
        for bit in range(self.shape.blocks.num_items.bit_length()):

            @pl.when((carry[0] & (1 << bit)) != 0)
            def _(bit=bit):
                rows = self.leaving.at[place, pl.ds(0, 1 << bit)]
                pltpu.make_async_copy(rows, rows, self.left.at[place]).wait()

    def read(self, trip: jax.Array, item: Item, unit: Any, chunk: int) -> jax.Array:
        return self.queries[trip % PLACES, item.index, unit, chunk]

    def write(self, trip: jax.Array, item: Item, unit: Any, chunk: int, out_ML: jax.Array) -> None:
        """Of each item, as a branch would keep items apart; only the last one's leaves."""
        self.leaving[trip % PLACES, item.index, unit, chunk] = out_ML

    def leave(
        self, trip: jax.Array, items: Sequence[Item], carry: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        for item in items:

            @pl.when(item.is_last)
            def _(item=item):
                place, row = trip % PLACES, self.stream.tiles_FL[RUN, item.tile]
                source = self.leaving.at[place, item.index]
                pltpu.make_async_copy(source, self.out_RUAML.at[row], self.left.at[place]).start()

        return carry[1], sum((item.is_last.astype(jnp.int32) for item in items), jnp.int32(0))

    def end(self, num_trips: jax.Array, carry: tuple[jax.Array, jax.Array]) -> None:
        self.make_room(num_trips, carry)
        self.make_room(num_trips + 1, (carry[1], carry[0]))


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsInVmem:
    """All rows of the step, in the order that order_queries of tpu_fused.py gives them. `outputs_ZL` has one
    row more than there are, for items that there are not. There is no carry."""

    shape: DecodeShape
    stream: Stream
    queries_ZL: Any
    outputs_ZL: Any

    def start(self, trip: jax.Array) -> None: ...

    def wait(self, trip: jax.Array) -> None: ...

    def first_carry(self) -> tuple[()]:
        return ()

    def make_room(self, trip: jax.Array, carry: tuple[()]) -> None: ...

    def read(self, trip: jax.Array, item: Item, unit: Any, chunk: int) -> jax.Array:
        return self.queries_ZL[self._find(self.stream.tiles_FL[RUN, item.tile], unit, chunk)]

    def write(self, trip: jax.Array, item: Item, unit: Any, chunk: int, out_ML: jax.Array) -> None:
        num_rows = self.queries_ZL.shape[0] // (self.shape.layout.num_chunks * self.shape.query_rows)
        row = jnp.where(item.is_there, self.stream.tiles_FL[RUN, item.tile], num_rows)
        self.outputs_ZL[self._find(row, unit, chunk)] = out_ML

    def leave(self, trip: jax.Array, items: Sequence[Item], carry: tuple[()]) -> tuple[()]:
        return carry

    def end(self, num_trips: jax.Array, carry: tuple[()]) -> None: ...

    def _find(self, row: jax.Array, unit: Any, chunk: int) -> Any:
        layout, num_rows = self.shape.layout, self.shape.query_rows
        first = ((row * layout.num_units + unit) * layout.chunks_per_unit + chunk) * num_rows
        return pl.ds(pl.multiple_of(first, num_rows), num_rows), slice(0, LANES)
