"""The work of a TPU's attention: tiles, listed by a kernel in place of twenty small operations; block tables.

A tile is up to I query tokens of one run: a chunk of a prompt, or a decode row, which is a run of one token
or of its drafts. It is attended to in items: blocks of B tokens of K and V. Kernels walk the items tile by
tile, and where a chip has two cores each walks its half of them, from a tile on. The list depends on no
layer. Two rows of 300 and 100 tokens between padding, blocks of 128:

    run        0   1          2   3
    tile           0          1                padding is no tile
    item           0  1  2    3

All of it is arithmetic of single numbers, on the scalar unit. Letters: C runs, or C cores where that is said,
R decode rows, L tiles, F fields. Knows nothing of how a block is attended to.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.kernels_pallas.kv_pages import LANES
from jaxserve.kernels_pallas.paged_attention.tpu_plan import Blocks

# Rows of `tiles_FL`. RUN: of the tile, whose row of the table it reads; TOKEN, POSITION: of its first query,
# in the step and in its sequence; LIVE: its queries; KV_LEN: tokens that the last one sees; and the blocks.
RUN, TOKEN, POSITION, LIVE, KV_LEN, FIRST_BLOCK, END_BLOCK = FIELDS = range(7)
FIRST_TILE, NUM_ITEMS = range(2)  # rows of `cores_2C`

Run = tuple[Any, Any, Any]  # its first token in the step, its tokens, those that its last one sees


class TileList(NamedTuple):
    """L tiles, int32, those of each of C cores behind those of the one before; zeros behind the last."""

    tiles_FL: jax.Array
    cores_2C: jax.Array


class Work(NamedTuple):
    """What a launch walks: tiles, and the block tables of their runs."""

    tiles: TileList
    table_C1W: jax.Array
    is_live_T: jax.Array  # tokens that attend to anything
    first_page_1: jax.Array  # int32, of the layer's pages in a pool of several layers: page 0 of the table


class StepWork(NamedTuple):
    """The work of a step's launches, which is that of every layer; None for what the step has not."""

    decode: Work | None
    prefill: Work | None

    def begin_at(self, first_page: jax.Array) -> StepWork:
        """The same of a layer whose pages begin there."""
        return StepWork(*(work and work._replace(first_page_1=first_page[None]) for work in self))


def list_decode_work(
    table_XW: jax.Array,
    slot_R: jax.Array,
    kv_len_R: jax.Array,
    *,
    tokens_per_row: int = 1,
    window: int | None = None,
    blocks: Blocks,
    interpret: Any = False,
) -> Work:
    """Which blocks of which pages the rows attend to: no layer changes it but by where its pages begin."""
    sizes: Any = {"blocks": blocks, "window": window, "interpret": interpret}
    tiles = list_row_tiles(kv_len_R, tokens_per_row=tokens_per_row, **sizes)
    table_R1W = _pad_table(table_XW[slot_R[::tokens_per_row]])
    return Work(tiles, table_R1W, is_live_T=kv_len_R > 0, first_page_1=jnp.zeros(1, jnp.int32))


def list_prefill_work(
    table_XW: jax.Array,
    slot_C: jax.Array,
    token_C: jax.Array,
    len_C: jax.Array,
    kv_len_C: jax.Array,
    *,
    num_tokens: int,
    window: int | None = None,
    blocks: Blocks,
    interpret: Any = False,
) -> Work:
    """Which blocks of which pages the chunks attend to: no layer changes it but by where its pages begin."""
    max_tiles = num_tokens // blocks.tile_tokens + len(len_C)
    sizes: Any = {"max_tiles": max_tiles, "blocks": blocks, "window": window, "interpret": interpret}
    tiles = list_run_tiles(token_C, len_C, kv_len_C, **sizes)
    token_T1 = jnp.arange(num_tokens)[:, None]
    is_live_T = jnp.any((token_T1 >= token_C) & (token_T1 < token_C + len_C), axis=1)
    return Work(tiles, _pad_table(table_XW[slot_C]), is_live_T, first_page_1=jnp.zeros(1, jnp.int32))


def _pad_table(table_RW: jax.Array) -> jax.Array:
    """A table whose rows can be copied in pieces of 128 page ids: [R, 1, W]."""
    padding = -table_RW.shape[1] % LANES
    return jnp.pad(table_RW, ((0, 0), (0, padding)))[:, None, :]


def list_run_tiles(
    token_C: jax.Array,
    len_C: jax.Array,
    kv_len_C: jax.Array,
    *,
    max_tiles: int,
    blocks: Blocks,
    window: int | None,
    interpret: Any = False,
) -> TileList:
    """At most `max_tiles` of runs `token_C[c] + [0, len_C[c])`, whose last token sees `kv_len_C[c]`."""

    def read_run(run: Any, token_C: Any, len_C: Any, kv_len_C: Any) -> Run:
        return token_C[run], len_C[run], kv_len_C[run]

    runs = (token_C, len_C, kv_len_C)
    return _launch(read_run, len(token_C), runs, max_tiles, blocks, window, interpret)


def list_row_tiles(
    kv_len_R: jax.Array, *, tokens_per_row: int, blocks: Blocks, window: int | None, interpret: Any = False
) -> TileList:
    """The tiles of decode rows of one token, or of several, of which those that see nothing come last."""

    def read_row(row: Any, kv_len_R: Any) -> Run:
        first = row * tokens_per_row
        seen = [kv_len_R[first + i] for i in range(tokens_per_row)]
        num_live, most = jnp.int32(0), jnp.int32(0)
        for kv_len in seen:
            num_live, most = num_live + (kv_len > 0).astype(jnp.int32), jnp.maximum(most, kv_len)
        return first, num_live, most

    num_rows = len(kv_len_R) // tokens_per_row
    return _launch(read_row, num_rows, (kv_len_R,), num_rows, blocks, window, interpret)


def _launch(
    read_run: Callable[..., Run],
    num_runs: int,
    runs: tuple[jax.Array, ...],
    max_tiles: int,
    blocks: Blocks,
    window: int | None,
    interpret: Any,
) -> TileList:
    scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
    tiles_FL, cores_2C = pl.pallas_call(
        partial(_list_tiles, read_run, num_runs, blocks, window),
        in_specs=[scalars for _ in runs],
        out_specs=[scalars, scalars],
        out_shape=[
            jax.ShapeDtypeStruct((len(FIELDS), max_tiles), jnp.int32),
            jax.ShapeDtypeStruct((2, blocks.num_cores), jnp.int32),
        ],
        scratch_shapes=[pltpu.SMEM((max_tiles,), jnp.int32)],
        name="list_tiles",
        interpret=bool(interpret),
    )(*(run.astype(jnp.int32) for run in runs))
    return TileList(tiles_FL, cores_2C)


def _list_tiles(
    read_run: Callable[..., Run], num_runs: int, blocks: Blocks, window: int | None, *refs: Any
) -> None:
    *runs, tiles_FL, cores_2C, before_L = refs
    max_tiles = tiles_FL.shape[1]

    def add_run(run: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        token, length, kv_len = read_run(run, *runs)

        def add_tile(i: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            tile, num_items = carry
            offset = i * blocks.tile_tokens
            live = jnp.minimum(length - offset, blocks.tile_tokens)
            position = kv_len - length + offset
            first = 0 if window is None else jnp.maximum(position + 1 - window, 0) // blocks.block_tokens
            end = pl.cdiv(position + live, blocks.block_tokens)
            fields = (run, token + offset, position, live, position + live, first, end)
            for field, value in zip(FIELDS, fields, strict=True):
                tiles_FL[field, tile] = jnp.int32(value)
            before_L[tile] = num_items
            return tile + 1, num_items + end - first

        return jax.lax.fori_loop(0, pl.cdiv(length, blocks.tile_tokens), add_tile, carry)

    num_tiles, num_items = jax.lax.fori_loop(0, num_runs, add_run, (jnp.int32(0), jnp.int32(0)))

    def clear(tile: Any, carry: Any) -> Any:
        for field in FIELDS:
            tiles_FL[field, tile] = jnp.int32(0)
        return carry

    jax.lax.fori_loop(num_tiles, max_tiles, clear, jnp.int32(0))

    # Each core begins with the first tile behind the shares of those before it.
    share = pl.cdiv(num_items, blocks.num_cores)
    first_tile, items_before = jnp.int32(0), jnp.int32(0)
    for core in range(blocks.num_cores):
        next_tile, items_behind = num_tiles, num_items
        if core + 1 < blocks.num_cores:
            next_tile = _count_smaller(before_L, num_tiles, (core + 1) * share)
            known = jnp.minimum(next_tile, max_tiles - 1)
            items_behind = jnp.where(next_tile < num_tiles, before_L[known], num_items)
        cores_2C[FIRST_TILE, core] = jnp.minimum(first_tile, max_tiles - 1)
        cores_2C[NUM_ITEMS, core] = items_behind - items_before
        first_tile, items_before = next_tile, items_behind


def _count_smaller(values_L: Any, length: Any, limit: Any) -> Any:
    def count(i: Any, found: Any) -> Any:
        return found + (values_L[i] < limit).astype(jnp.int32)

    return jax.lax.fori_loop(0, length, count, jnp.int32(0))
