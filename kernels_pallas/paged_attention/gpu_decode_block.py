"""What one block of the paged decode kernel does: pages in by TMA, and through the softmax of their segment.

A page is operand A of both products ("swap-AB"), because 64 tokens fill its rows where the few query heads of
a group would not: scores[tokens, queries] = K q^T, output[head_dim, queries] = V^T p. The producer warpgroup
reads page ids from memory and issues one TMA copy a page, some pages ahead of the consumer warpgroup.

int8 and fp8 pages are copied as they are. The consumer widens each to the 16-bit type of the products, which
is exact, and scales the products instead: V's scale of a token goes into its probabilities. K has a scale for
each 8 rotary pairs, so the queries come once for each of the Q scales, with zeros in the channels of the
others, and every product gets its scale before they are added.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.kernels_pallas import mosaic
from jaxserve.kernels_pallas.kv_layer import choose_operand_dtype
from jaxserve.kernels_pallas.paged_attention.decode_plan import (
    FIRST_PAGE,
    LIVE,
    NEXT_ROW,
    NUM_PAGES,
    PAGE_TOKENS,
    SEEN,
    SLOT,
    START,
)
from jaxserve.kernels_pallas.paged_attention.gpu_combine import LOG2_E, MASKED

PRODUCER, CONSUMER = 0, 1  # warpgroups
# Queries of one head, by head_dim: more would not fit into the consumer's registers.
MAX_QUERIES = {64: 64, 128: 32, 256: 32}
WIDENED_COLUMNS = 64  # of a narrow page at once, for the same reason
MAX_SCALED_QUERIES = 128  # the same, once for each scale of K


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeShape:
    """What is known of a call while it is compiled."""

    num_rows: int
    tokens_per_row: int
    num_kv_heads: int
    group: int
    head_dim: int
    kv_dtype: str
    num_k_scales: int  # 0 of a pool that has none
    scale: float
    window: int | None
    soft_cap: float | None

    @property
    def tiles_per_head(self) -> int:
        max_queries = min(MAX_QUERIES[self.head_dim], MAX_SCALED_QUERIES // max(self.num_k_scales, 1))
        return -(-self.group * self.tokens_per_row // max_queries)

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.tiles_per_head

    @property
    def num_queries(self) -> int:
        return -(-self.group * self.tokens_per_row // (8 * self.tiles_per_head)) * 8

    @property
    def is_narrow(self) -> bool:
        return self.kv_dtype != "bfloat16"

    @property
    def operand_dtype(self) -> Any:
        return choose_operand_dtype(self.kv_dtype)


class Operands(NamedTuple):
    """The kernel's arguments and results, in device memory."""

    q_RNMH: Any
    k_PSKH: Any
    v_PSKH: Any
    k_scale_PSKQ: Any  # or None
    v_scale_PSK: Any  # or None
    table_XW: Any
    rows_RF: Any
    first_row_J: Any
    share_2: Any
    out_UHM: Any
    max_UM: Any
    sum_UM: Any


class Scratch(NamedTuple):
    """A block's shared memory. `ready` is signalled by copies, `free` by the consumer."""

    q_2MH: Any
    k_DSH: Any
    v_DSH: Any
    p_MS: Any
    out_HM: Any
    max_M: Any
    sum_M: Any
    q_ready: Any
    q_free: Any
    k_ready: Any
    k_free: Any
    v_ready: Any
    v_free: Any
    wide_SH: Any = None  # of a narrow pool: one page in the type of the products
    scales_DQS: Any = None  # of an int8 pool: those of K and then that of V
    scales_ready: Any = None


class Walk(NamedTuple):
    """Where a block is in its share: the page it comes to, and how many segments were before."""

    row: jax.Array
    head: jax.Array
    page: jax.Array  # of those that the row reads
    segment: jax.Array


def allocate_scratch(shape: DecodeShape, places: int) -> Scratch:
    """The types of a block's shared memory, with D places in the ring of pages."""
    queries, head_dim = shape.num_queries, shape.head_dim
    page = mosaic.swizzled_smem(
        (places, PAGE_TOKENS, head_dim),
        shape.kv_dtype,
        max_swizzle=WIDENED_COLUMNS if shape.is_narrow else 128,
    )
    scales = None
    if shape.num_k_scales:
        scales = mosaic.SMEM((places, shape.num_k_scales + 1, PAGE_TOKENS), jnp.float32)
    wide = mosaic.swizzled_smem((PAGE_TOKENS, head_dim), shape.operand_dtype) if shape.is_narrow else None
    return Scratch(
        q_2MH=mosaic.swizzled_smem((2, max(shape.num_k_scales, 1) * queries, head_dim), shape.operand_dtype),
        k_DSH=page,
        v_DSH=page,
        scales_DQS=scales,
        wide_SH=wide,
        p_MS=mosaic.swizzled_smem((queries, PAGE_TOKENS), shape.operand_dtype),
        out_HM=mosaic.SMEM((head_dim, queries), jnp.float32),
        max_M=mosaic.SMEM((queries,), jnp.float32),
        sum_M=mosaic.SMEM((queries,), jnp.float32),
        q_ready=mosaic.Barrier(num_barriers=2),
        q_free=mosaic.Barrier(num_barriers=2),
        k_ready=mosaic.Barrier(num_barriers=places),
        k_free=mosaic.Barrier(num_barriers=places),
        v_ready=mosaic.Barrier(num_barriers=places),
        v_free=mosaic.Barrier(num_barriers=places),
        scales_ready=mosaic.Barrier(num_barriers=places) if shape.num_k_scales else None,
    )


def run_block(operands: Operands, own: Scratch, shape: DecodeShape) -> None:
    """Both warpgroups of a block, through its share of the pages."""
    places, queries = own.k_DSH.shape[0], shape.num_queries
    block = lax.axis_index("block")
    share = operands.share_2[0]
    first = block * share
    count = jnp.clip(operands.share_2[1] - first, 0, share)
    walk = _start(operands, first, block)
    warpgroup = lax.axis_index("warpgroup")

    @mosaic.when(warpgroup == PRODUCER)
    def _():
        end = lax.fori_loop(0, count, partial(_load_page, operands, own, shape, places), walk)
        _wait_for_consumer(own, count, end)

    @mosaic.when(warpgroup == CONSUMER)
    def _():
        columns, rows = mosaic.Layout.WGMMA.reduce(0), mosaic.Layout.WGMMA
        start = (
            walk,
            mosaic.layout_cast(jnp.full((queries,), MASKED, jnp.float32), columns),
            mosaic.layout_cast(jnp.zeros((PAGE_TOKENS, queries), jnp.float32), rows),
            mosaic.layout_cast(jnp.zeros((shape.head_dim, queries), jnp.float32), rows),
        )
        step = partial(_attend_page, operands, own, shape, places, block, count)
        lax.fori_loop(0, count, step, start)
        mosaic.wait_smem_to_gmem(0)


def _start(operands: Operands, first, block) -> Walk:
    """The walk of a block whose share begins with page `first` of the list."""
    row = operands.first_row_J[block]
    offset = jnp.maximum(first - operands.rows_RF[row, START], 0)
    num_pages = jnp.maximum(operands.rows_RF[row, NUM_PAGES], 1)
    head = lax.div(offset, num_pages)
    return Walk(row, head, offset - head * num_pages, jnp.int32(0))


def _advance(operands: Operands, shape: DecodeShape, walk: Walk, is_row_end) -> Walk:
    """One page on: then to the next head, then to the next row that has pages."""
    is_last_head = is_row_end & (walk.head == shape.num_heads - 1)
    head = jnp.where(is_row_end, walk.head + 1, walk.head)
    return Walk(
        row=jnp.where(is_last_head, operands.rows_RF[walk.row, NEXT_ROW], walk.row),
        head=jnp.where(is_last_head, 0, head),
        page=jnp.where(is_row_end, 0, walk.page + 1),
        segment=jnp.where(is_row_end, walk.segment + 1, walk.segment),
    )


def _find_page(operands: Operands, shape: DecodeShape, walk: Walk):
    """The page's id in the pool, and the KV head."""
    row = walk.row
    page_id = operands.table_XW[operands.rows_RF[row, SLOT], operands.rows_RF[row, FIRST_PAGE] + walk.page]
    return page_id, lax.div(walk.head, jnp.int32(shape.tiles_per_head))


def _load_page(operands: Operands, own: Scratch, shape: DecodeShape, places: int, index, walk: Walk) -> Walk:
    """The producer's step: the queries where a segment begins, then one page of K and of V."""
    row, head, page, segment = walk
    q_place = lax.rem(segment, jnp.int32(2))

    @mosaic.when((index == 0) | (page == 0))
    def _():
        mosaic.when(segment >= 2)(lambda: mosaic.barrier_wait(own.q_free.at[q_place]))
        q_MH = own.q_2MH.at[q_place]
        mosaic.copy_gmem_to_smem(operands.q_RNMH.at[row, head], q_MH, own.q_ready.at[q_place])

    page_id, kv_head = _find_page(operands, shape, walk)
    place = lax.rem(index, jnp.int32(places))
    for pool, ring, ready, free in (
        (operands.k_PSKH, own.k_DSH, own.k_ready, own.k_free),
        (operands.v_PSKH, own.v_DSH, own.v_ready, own.v_free),
    ):
        mosaic.when(index >= places)(partial(mosaic.barrier_wait, free.at[place]))
        mosaic.copy_gmem_to_smem(pool.at[page_id, :, kv_head], ring.at[place], ready.at[place])
    if shape.num_k_scales:
        _copy_scales(operands, own, shape, page_id, kv_head, place)
    return _advance(operands, shape, walk, page + 1 == operands.rows_RF[row, NUM_PAGES])


def _wait_for_consumer(own: Scratch, count, end: Walk) -> None:
    """Sees the last places freed: no barrier may end with a phase that nobody has waited for."""

    @mosaic.loop(0, jnp.minimum(count, own.k_DSH.shape[0]))
    def _(place):
        mosaic.barrier_wait(own.k_free.at[place])
        mosaic.barrier_wait(own.v_free.at[place])

    # One that ends inside a row is none of those counted; a block without pages may stand anywhere.
    num_segments = jnp.where((end.page > 0) & (count > 0), end.segment + 1, end.segment)
    for q_place in range(2):
        mosaic.when(q_place < num_segments)(partial(mosaic.barrier_wait, own.q_free.at[q_place]))


def _copy_scales(operands: Operands, own: Scratch, shape: DecodeShape, page_id, kv_head, place) -> None:
    """An int8 page's scales through the producer's registers: they lie too far apart for TMA."""
    columns = [operands.k_scale_PSKQ.at[page_id, :, kv_head, index] for index in range(shape.num_k_scales)]
    columns.append(operands.v_scale_PSK.at[page_id, :, kv_head])
    layout = mosaic.Layout.WGMMA.reduce(1)
    values = [mosaic.load(column_S, layout=layout, optimized=False) for column_S in columns]
    for index, value_S in enumerate(values):
        mosaic.store(own.scales_DQS.at[place, index], value_S)
    mosaic.barrier_arrive(own.scales_ready.at[place])


def _attend_page(
    operands: Operands, own: Scratch, shape: DecodeShape, places: int, block, count, index, carry
):
    """The consumer's step: one page into the running softmax of its segment, and out at the end of it."""
    walk, max_M, sum_SM, out_HM = carry
    row, head, page, segment = walk
    is_first = (index == 0) | (page == 0)
    is_row_end = page + 1 == operands.rows_RF[row, NUM_PAGES]
    is_last = is_row_end | (index + 1 == count)
    place = lax.rem(index, jnp.int32(places))
    q_place = lax.rem(segment, jnp.int32(2))
    seen = operands.rows_RF[row, SEEN]
    kv_len = seen + operands.rows_RF[row, LIVE] - 1
    first_token = (operands.rows_RF[row, FIRST_PAGE] + page) * PAGE_TOKENS
    mosaic.when(is_first)(lambda: mosaic.barrier_wait(own.q_ready.at[q_place]))
    mosaic.barrier_wait(own.k_ready.at[place])
    score_SM = _score_page(own, shape, place, q_place)
    mosaic.barrier_arrive(own.k_free.at[place])
    mosaic.when(is_last)(lambda: mosaic.barrier_arrive(own.q_free.at[q_place]))

    is_seen_SM = _is_seen(shape, head, first_token, seen, kv_len)
    score_SM = jnp.where(is_seen_SM, score_SM, MASKED)
    # A new segment forgets the old one: its maximum goes, and with it the weight of all that was summed.
    max_M = jnp.minimum(max_M, jnp.where(is_first, MASKED, -MASKED))
    new_max_M = jnp.maximum(max_M, jnp.max(score_SM, axis=0))
    keep_M = jnp.exp2(max_M - new_max_M)
    p_SM = jnp.exp2(score_SM - _over_rows(new_max_M, score_SM.shape))
    sum_SM = sum_SM * _over_rows(keep_M, sum_SM.shape) + p_SM
    if shape.num_k_scales:
        v_scale_SM = _read_scale(own, place, shape.num_k_scales, p_SM.shape)
        p_SM = jnp.where(is_seen_SM, p_SM * v_scale_SM, 0.0)
    p_SM = mosaic.layout_cast(p_SM.astype(shape.operand_dtype), mosaic.Layout.WGMMA_TRANSPOSED)
    mosaic.store(own.p_MS.transpose((1, 0)), p_SM)

    mosaic.barrier_wait(own.v_ready.at[place])
    v_SH = _prepare_values(own, shape, place, kv_len - first_token)
    add_HM = _multiply(v_SH.transpose((1, 0)), own.p_MS.transpose((1, 0)))
    mosaic.barrier_arrive(own.v_free.at[place])
    out_HM = out_HM * _over_rows(keep_M, out_HM.shape) + add_HM

    write = partial(_write_partial, operands, own, block + row * shape.num_heads + head)
    mosaic.when(is_last)(lambda: write(new_max_M, sum_SM, out_HM))
    return _advance(operands, shape, walk, is_row_end), new_max_M, sum_SM, out_HM


def _score_page(own: Scratch, shape: DecodeShape, place, q_place) -> jax.Array:
    """Scores of a page times log2(e), so that weights are powers of two, [S, M]."""
    k_SH = own.k_DSH.at[place]
    if shape.is_narrow:
        k_SH = _widen(k_SH, own, shape)
        mosaic.commit_smem()
    score_SM = _multiply(k_SH, own.q_2MH.at[q_place].transpose((1, 0)))
    if shape.num_k_scales:
        mosaic.barrier_wait(own.scales_ready.at[place])
        parts = []
        for index in range(shape.num_k_scales):
            part_SM = score_SM[:, index * shape.num_queries : (index + 1) * shape.num_queries]
            parts.append(part_SM * _read_scale(own, place, index, part_SM.shape))
        score_SM = sum(parts[1:], parts[0])
    if shape.soft_cap is None:
        return score_SM * (shape.scale * LOG2_E)
    # tanh(x) = 1 - 2 / (1 + exp(2 x)): the hardware's own tanh is off by 5e-4, this by 3e-7.
    power_SM = jnp.exp2(score_SM * (2 * LOG2_E * shape.scale / shape.soft_cap))
    return (shape.soft_cap * LOG2_E) * (1.0 - 2.0 / (1.0 + power_SM))


def _is_seen(shape: DecodeShape, head, first_token, seen, kv_len) -> jax.Array:
    """Which tokens of a page each query attends to, [S, M]."""
    dims = (PAGE_TOKENS, shape.num_queries)
    token_SM = mosaic.broadcasted_iota(jnp.int32, dims, 0, layout=mosaic.Layout.WGMMA) + first_token
    is_seen_SM = token_SM < kv_len
    if shape.tokens_per_row > 1:
        query_SM = mosaic.broadcasted_iota(jnp.int32, dims, 1, layout=mosaic.Layout.WGMMA)
        query_SM += lax.rem(head, jnp.int32(shape.tiles_per_head)) * shape.num_queries
        token_SM -= lax.div(query_SM, jnp.full(dims, shape.group, jnp.int32))
        is_seen_SM &= token_SM < seen
    if shape.window is not None:
        is_seen_SM &= token_SM >= seen - shape.window
    return is_seen_SM


def _prepare_values(own: Scratch, shape: DecodeShape, place, num_live) -> Any:
    """V of a page as an operand [S, H], zero behind the row's tokens, and all of the block's writes seen.

    What is stale may be NaN, and NaN times a weight of zero is NaN.
    """
    v_SH = own.v_DSH.at[place]
    if shape.is_narrow:
        v_SH = _widen(v_SH, own, shape, num_live)
    else:

        @mosaic.when(num_live < PAGE_TOKENS)
        def _():
            mosaic.store(v_SH, _clear_dead(v_SH[...], num_live))

    mosaic.commit_smem()
    return v_SH


def _widen(page_SH, own: Scratch, shape: DecodeShape, num_live=None) -> Any:
    """A narrow page in the type of the products; an int8 page holds no NaN."""
    for first in range(0, shape.head_dim, WIDENED_COLUMNS):
        columns = mosaic.ds(first, WIDENED_COLUMNS)
        part = mosaic.layout_cast(page_SH[:, columns], mosaic.Layout.WGMMA).astype(shape.operand_dtype)
        if num_live is not None and not shape.num_k_scales:
            part = _clear_dead(part, num_live)
        mosaic.store(own.wide_SH.at[:, columns], part)
    return own.wide_SH


def _clear_dead(v_SH: jax.Array, num_live) -> jax.Array:
    token_SH = mosaic.broadcasted_iota(jnp.int32, v_SH.shape, 0, layout=mosaic.Layout.WGMMA)
    return jnp.where(token_SH < num_live, v_SH, jnp.zeros((), v_SH.dtype))


def _write_partial(operands: Operands, own: Scratch, index, max_M, sum_SM, out_HM) -> None:
    mosaic.wait_smem_to_gmem(0)  # the segment before may still be on its way out of here
    mosaic.store(own.out_HM, out_HM)
    mosaic.store(own.max_M, max_M)
    mosaic.store(own.sum_M, jnp.sum(sum_SM, axis=0))
    mosaic.commit_smem()
    mosaic.copy_smem_to_gmem(own.out_HM, operands.out_UHM.at[index])
    mosaic.copy_smem_to_gmem(own.max_M, operands.max_UM.at[index])
    mosaic.copy_smem_to_gmem(own.sum_M, operands.sum_UM.at[index])


def _multiply(a, b) -> jax.Array:
    """a @ b of shared memory, float32 in registers."""

    def run(accumulator):
        mosaic.wgmma(accumulator, a, b)
        return accumulator[...]

    return mosaic.run_scoped(run, mosaic.ACC((a.shape[0], b.shape[1]), jnp.float32))


def _over_rows(x_M, shape: tuple[int, ...]) -> jax.Array:
    return lax.broadcast_in_dim(x_M, shape, (1,))


def _read_scale(own: Scratch, place, index: int, shape: tuple[int, ...]) -> jax.Array:
    """One of an int8 page's scales, [S, M]: the same for all queries."""
    scale_S = mosaic.layout_cast(own.scales_DQS[place, index], mosaic.Layout.WGMMA.reduce(1))
    return lax.broadcast_in_dim(scale_S, shape, (0,))
