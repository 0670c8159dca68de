"""Times the TPU's attention in several sizes of blocks, and says which are the fastest there.

The sizes that tpu_plan.py chooses come from public figures; here a launch of decode and one of prefill run in
those and in others around them, on a pool of zeros. A program has several launches, each waiting for
the one before, so that what is timed is the kernel and not the way to it. Knows nothing of models and files.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.kernels_pallas.kv_pages import LANES, KVPages, PagesLayout, make_pages
from jaxserve.kernels_pallas.paged_attention.tpu_decode import paged_decode
from jaxserve.kernels_pallas.paged_attention.tpu_plan import (
    MAX_BLOCK_TOKENS,
    MAX_ITEMS,
    MAX_TILE_TOKENS,
    MIN_TILE_TOKENS,
    PREFILL_BUFFER_BYTES,
    QUERY_ROW_BYTES,
    Blocks,
    Chip,
    TunedBlocks,
    choose_decode_blocks,
    choose_prefill_blocks,
)
from jaxserve.kernels_pallas.paged_attention.tpu_prefill import (
    count_token_rows,
    paged_prefill,
)
from jaxserve.kernels_pallas.paged_attention.tpu_stream import PLACES
from jaxserve.kernels_pallas.paged_attention.tpu_work import list_decode_work, list_prefill_work

NUM_LAUNCHES = 8  # of a program
NUM_RUNS = 5  # of it; the median counts
LEAST_GAIN = 0.03  # of the time: less may be noise
MAX_POOL_BYTES = 1 << 29

OnProgress = Callable[[int, int], None]  # sizes done, of how many


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is timed: a decode step of `num_rows` sequences, of an eighth of `context` to all of it, and a
    prefill of `num_tokens`, half of them behind a prefix. Heads are one device's."""

    layout: PagesLayout
    num_heads: int
    page_size: int
    num_rows: int = 64
    context: int = 2048
    num_tokens: int = 1024

    @property
    def token_bytes(self) -> int:
        return (self.layout.num_rows + self.layout.num_scale_rows) * LANES * 4

    @property
    def rows_per_token(self) -> int:
        return count_token_rows(self.layout, self.num_heads)


def time_median(call: Callable[[], Any]) -> float:
    """Seconds that a call takes until its result is there."""
    jax.block_until_ready(call())
    times_s = []
    for _ in range(NUM_RUNS):
        start_s = time.perf_counter()
        jax.block_until_ready(call())
        times_s.append(time.perf_counter() - start_s)
    return statistics.median(times_s)


def tune(
    workload: Workload,
    device_kind: str,
    chip: Chip,
    on_progress: OnProgress = lambda done, total: None,
    time_call: Callable[[Callable[[], Any]], float] = time_median,
    interpret: Any = False,
) -> list[TunedBlocks]:
    """The fastest blocks for decode, then for prefill: `chip`'s own unless others are faster by LEAST_GAIN.

    Sizes that do not compile are passed over, but for the chip's own: raises what the compiler raises.
    """
    untuned = replace(chip, tuned=())
    decode = list(list_decode_blocks(workload, untuned))
    prefill = list(list_prefill_blocks(workload, untuned))
    kv, table_XW = _make_pool(workload)
    total, done, found = len(decode) + len(prefill), 0, []
    for candidates, prepare, rows_per_token in (
        (decode, _prepare_decode, 0),
        (prefill, _prepare_prefill, workload.rows_per_token),
    ):
        times_s: dict[Blocks, float] = {}
        for blocks in candidates:
            attend, q, *operands = prepare(workload, blocks, table_XW, interpret)
            try:
                run = jax.jit(partial(_launch_often, attend)).lower(q, kv, *operands).compile()
            except jax.errors.JaxRuntimeError:  # too much for this chip's memory
                if not times_s:
                    raise
            else:
                times_s[blocks] = time_call(partial(run, q, kv, *operands)) / NUM_LAUNCHES
            done += 1
            on_progress(done, total)
        best, own = min(times_s, key=lambda blocks: times_s[blocks]), candidates[0]
        if times_s[best] > (1 - LEAST_GAIN) * times_s[own]:
            best = own
        found.append(
            TunedBlocks(
                device_kind=device_kind,
                jax_version=jax.__version__,
                layout=workload.layout,
                page_size=workload.page_size,
                rows_per_token=rows_per_token,
                blocks=best,
                time_s=times_s[best],
                model_time_s=times_s[own],
            )
        )
    return found


def list_decode_blocks(workload: Workload, chip: Chip) -> Iterator[Blocks]:
    """The chip's own, then the others whose buffers fit."""
    own = choose_decode_blocks(workload.layout, workload.page_size, 1, chip)
    yield own
    for block_tokens in _list_powers(max(LANES, workload.page_size), MAX_BLOCK_TOKENS):
        for num_items in _list_powers(1, MAX_ITEMS):
            blocks = replace(own, block_tokens=block_tokens, num_items=num_items)
            buffer_bytes = PLACES * num_items * block_tokens * workload.token_bytes
            if blocks != own and buffer_bytes <= PREFILL_BUFFER_BYTES:
                yield blocks


def list_prefill_blocks(workload: Workload, chip: Chip) -> Iterator[Blocks]:
    """The chip's own, then the others whose buffers fit."""
    own = choose_prefill_blocks(
        workload.layout, workload.page_size, workload.num_tokens, workload.rows_per_token, chip
    )
    yield own
    for block_tokens in _list_powers(max(LANES, workload.page_size), MAX_BLOCK_TOKENS):
        for tile_tokens in _list_powers(MIN_TILE_TOKENS, MAX_TILE_TOKENS):
            blocks = replace(own, block_tokens=block_tokens, tile_tokens=tile_tokens)
            buffer_bytes = tile_tokens * workload.rows_per_token * QUERY_ROW_BYTES
            if blocks != own and buffer_bytes <= PREFILL_BUFFER_BYTES:
                yield blocks


def _list_powers(least: int, most: int) -> list[int]:
    """Powers of two."""
    return [1 << power for power in range(least.bit_length() - 1, most.bit_length())]


def _make_pool(workload: Workload) -> tuple[KVPages, jax.Array]:
    """Zeroed pages, and the tables of `num_rows` sequences over them, in random order; where the pool would
    be large, sequences share pages."""
    layout, page_size = workload.layout, workload.page_size
    width = -(-workload.context // page_size)
    most = max(MAX_POOL_BYTES // (page_size * workload.token_bytes), width)
    num_pages = min(workload.num_rows * width, most)
    kv = make_pages(num_pages, page_size, layout.num_kv_heads, layout.head_dim, layout.kv_dtype)
    places = np.random.default_rng(0).permutation(workload.num_rows * width) % num_pages
    return kv, jnp.asarray(places.reshape(-1, width), jnp.int32)


def _prepare_decode(workload: Workload, blocks: Blocks, table_XW: jax.Array, interpret: Any) -> tuple:
    """The launch, and what it takes beside the pool."""
    slot_R = jnp.arange(workload.num_rows, dtype=jnp.int32)
    spread = jnp.linspace(workload.context // 8, workload.context, workload.num_rows)
    kv_len_R = jnp.maximum(spread.astype(jnp.int32), 1)
    work = list_decode_work(table_XW, slot_R, kv_len_R, blocks=blocks, interpret=interpret)
    attend = partial(paged_decode, scale=1.0, blocks=blocks, interpret=interpret)
    q_RNH = jnp.ones((workload.num_rows, workload.num_heads, workload.layout.head_dim), jnp.bfloat16)
    return attend, q_RNH, work, table_XW, slot_R, kv_len_R


def _prepare_prefill(workload: Workload, blocks: Blocks, table_XW: jax.Array, interpret: Any) -> tuple:
    """The launch, and what it takes beside the pool."""
    half = workload.num_tokens // 2
    slot_C, token_C = jnp.asarray([0, 1], jnp.int32), jnp.asarray([0, half], jnp.int32)
    len_C = jnp.asarray([half, half], jnp.int32)
    kv_len_C = jnp.asarray([half, max(workload.context, half)], jnp.int32)
    chunks = (slot_C, token_C, len_C, kv_len_C)
    sizes = {"num_tokens": workload.num_tokens, "blocks": blocks}
    work = list_prefill_work(table_XW, *chunks, **sizes, interpret=interpret)
    attend = partial(paged_prefill, scale=1.0, blocks=blocks, interpret=interpret)
    q_TNH = jnp.ones((workload.num_tokens, workload.num_heads, workload.layout.head_dim), jnp.bfloat16)
    return attend, q_TNH, work, table_XW, *chunks


def _launch_often(attend: Callable, q: jax.Array, kv: KVPages, work: Any, *operands: jax.Array) -> jax.Array:
    def launch(_: jax.Array, q: jax.Array) -> jax.Array:
        return q + 2.0**-20 * attend(q, kv, *operands, work=work).astype(q.dtype)

    return jax.lax.fori_loop(0, NUM_LAUNCHES, launch, q)
