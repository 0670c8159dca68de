"""Merges the partial results of split attention, for gpu_decode.py: one block for a row and a head.

Partials of one (row, head) lie side by side, and how many there are follows from the plan (decode_plan.py):
nothing is searched for. Knows nothing of pages.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.kernels_pallas import mosaic
from jaxserve.kernels_pallas.paged_attention.decode_plan import LIVE, NUM_PAGES, START, DecodePlan

MASKED = -1e30  # the maximum of what nothing was seen of
LOG2_E = 1.4426950408889634
MAX_PLACES = 8  # partials under way,
RING_BYTES = 65536  # and what they may take


class Partials(NamedTuple):
    """Of U segments and M queries: weighted sums of V, the maxima of scores * log2(e), sums of weights."""

    out_UHM: Any
    max_UM: Any
    sum_UM: Any


class Scratch(NamedTuple):
    """A block's shared memory: D places for partials, and the result."""

    out_DHM: Any
    max_DM: Any
    sum_DM: Any
    sink_M: Any
    out_MH: Any
    ready: Any
    sink_ready: Any


def combine_partials(
    partials: Partials,
    plan: DecodePlan,
    sinks_NM: jax.Array | None,
    num_heads: int,
    group: int,
    queries_per_head: int,
    *,
    interpret: Any = False,
) -> jax.Array:
    """The mean of each row's partials, weighted by their softmax: [R, N, M, H] float32, zeros of no partial.

    N is `num_heads`; query m of head n is of the row's token (n % tiles * M + m) // group, and tokens that
    are padding yield zeros, too, where a row has several. `sinks_NM` are scores that take weight and give
    nothing.
    """
    _, head_dim, num_queries = partials.out_UHM.shape
    num_rows = len(plan.rows_RF)
    has_sinks = sinks_NM is not None
    has_tokens = queries_per_head > group
    tiles = -(-queries_per_head // num_queries)

    def body(out_UHM, max_UM, sum_UM, rows_RF, share_2, *rest, **scratch):
        *sinks_ref, out_RNMH = rest
        own = Scratch(**scratch)
        row, head = lax.axis_index("row"), lax.axis_index("head")
        if has_sinks:
            mosaic.copy_gmem_to_smem(sinks_ref[0].at[head], own.sink_M, own.sink_ready)
        first, count = _find_partials(rows_RF, share_2, row, head, num_heads)
        max_M, sum_M, out_HM = _merge(Partials(out_UHM, max_UM, sum_UM), own, first, count)
        if has_sinks:
            mosaic.barrier_wait(own.sink_ready)
            sink_M = mosaic.layout_cast(own.sink_M[...], mosaic.Layout.WGMMA.reduce(0)) * LOG2_E
            new_max_M = jnp.maximum(max_M, sink_M)
            keep_M = jnp.exp2(max_M - new_max_M)
            sum_M = sum_M * keep_M + jnp.exp2(sink_M - new_max_M)
            out_HM = out_HM * _over_rows(keep_M, out_HM.shape)
        out_HM = out_HM / _over_rows(jnp.maximum(sum_M, 1e-30), out_HM.shape)
        if has_tokens:
            query_HM = mosaic.broadcasted_iota(jnp.int32, out_HM.shape, 1, layout=mosaic.Layout.WGMMA)
            num_live = rows_RF[row, LIVE] * group - lax.rem(head, jnp.int32(tiles)) * num_queries
            out_HM = jnp.where(query_HM < num_live, out_HM, 0.0)
        out_HM = mosaic.layout_cast(out_HM, mosaic.Layout.WGMMA_TRANSPOSED)
        mosaic.store(own.out_MH.transpose((1, 0)), out_HM)
        mosaic.commit_smem()
        mosaic.copy_smem_to_gmem(own.out_MH, out_RNMH.at[row, head])
        mosaic.wait_smem_to_gmem(0)

    return mosaic.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((num_rows, num_heads, num_queries, head_dim), jnp.float32),
        scratch_types=_scratch_types(head_dim, num_queries)._asdict(),
        grid=(num_rows, num_heads),
        grid_names=("row", "head"),
        kernel_name="combine_partials",
        compiler_params=mosaic.CompilerParams(approx_math=True),
        interpret=interpret,
    )(*partials, plan.rows_RF, plan.share_2, *([sinks_NM] if has_sinks else []))


def _scratch_types(head_dim: int, num_queries: int) -> Scratch:
    def floats(*shape):
        return mosaic.SMEM(shape, jnp.float32)

    places = max(2, min(RING_BYTES // (head_dim * num_queries * 4), MAX_PLACES))
    return Scratch(
        out_DHM=floats(places, head_dim, num_queries),
        max_DM=floats(places, num_queries),
        sum_DM=floats(places, num_queries),
        sink_M=floats(num_queries),
        out_MH=floats(num_queries, head_dim),
        ready=mosaic.Barrier(num_arrivals=3, num_barriers=places),
        sink_ready=mosaic.Barrier(),
    )


def _find_partials(rows_RF, share_2, row, head, num_heads: int):
    """The first partial of a (row, head), and how many there are."""
    share = share_2[0]
    num_pages = rows_RF[row, NUM_PAGES]
    start = rows_RF[row, START] + head * num_pages
    first_block = lax.div(start, share)
    last_block = lax.div(start + jnp.maximum(num_pages, 1) - 1, share)
    count = jnp.where(num_pages > 0, last_block - first_block + 1, 0)
    return first_block + row * num_heads + head, count


def _merge(partials: Partials, own: Scratch, first, count):
    """One running softmax over all partials: maxima and sums [M], output not yet divided [H, M]."""
    places, head_dim, num_queries = own.out_DHM.shape
    columns, tiles = mosaic.Layout.WGMMA.reduce(0), mosaic.Layout.WGMMA

    def load(index, place):
        for array, ring in zip(partials, (own.out_DHM, own.max_DM, own.sum_DM), strict=True):
            mosaic.copy_gmem_to_smem(array.at[first + index], ring.at[place], own.ready.at[place])

    for place in range(places):
        mosaic.when(place < count)(partial(load, place, place))

    def merge_one(index, carry):
        max_M, sum_M, out_HM = carry
        place = lax.rem(index, jnp.int32(places))
        mosaic.barrier_wait(own.ready.at[place])
        part_max_M = mosaic.layout_cast(own.max_DM[place], columns)
        part_sum_M = mosaic.layout_cast(own.sum_DM[place], columns)
        part_out_HM = mosaic.layout_cast(own.out_DHM[place], tiles)
        new_max_M = jnp.maximum(max_M, part_max_M)
        keep_M, add_M = jnp.exp2(max_M - new_max_M), jnp.exp2(part_max_M - new_max_M)
        sum_M = sum_M * keep_M + part_sum_M * add_M
        out_HM = out_HM * _over_rows(keep_M, out_HM.shape) + part_out_HM * _over_rows(add_M, out_HM.shape)

        @mosaic.when(index + places < count)
        def _():
            mosaic.commit_smem()  # everyone has read what the copy overwrites
            load(index + places, place)

        return new_max_M, sum_M, out_HM

    start = (
        mosaic.layout_cast(jnp.full((num_queries,), MASKED, jnp.float32), columns),
        mosaic.layout_cast(jnp.zeros((num_queries,), jnp.float32), columns),
        mosaic.layout_cast(jnp.zeros((head_dim, num_queries), jnp.float32), tiles),
    )
    return lax.fori_loop(0, count, merge_one, start)


def _over_rows(x_M, shape: tuple[int, ...]) -> jax.Array:
    return lax.broadcast_in_dim(x_M, shape, (1,))
