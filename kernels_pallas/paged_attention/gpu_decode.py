"""Paged decode attention on Hopper, in Pallas Mosaic GPU: split-KV, work divided by true lengths.

The same function as `ref.paged_decode`, for pools of 64-token pages. Two kernels: the first attends and
leaves partial results (gpu_decode_block.py), the other merges those of a row (gpu_combine.py);
decode_plan.py says which block does what. Knows nothing of requests.

Axis letters beside the usual ones: M queries of one head, padded to a multiple of 8; J blocks of the grid;
U partials; D places of the ring of pages; F fields of a row of the plan. R counts rows of several tokens
each, and where the queries of one KV head do not fit, it becomes several "heads" that read the same pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.kernels_pallas import mosaic
from jaxserve.kernels_pallas.kv_layer import KVLayer
from jaxserve.kernels_pallas.paged_attention.decode_plan import (
    PAGE_TOKENS,
    DecodePlan,
    find_decode_limit,
    plan_decode,
)
from jaxserve.kernels_pallas.paged_attention.gpu_combine import Partials, combine_partials
from jaxserve.kernels_pallas.paged_attention.gpu_decode_block import (
    DecodeShape,
    Operands,
    Scratch,
    allocate_scratch,
    run_block,
)

MAX_PLACES = 8
SMEM_BYTES_KEPT = 4096  # for barriers, alignment and the scratch of reductions across warps


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTiles:
    """How a shape is put on the chip: blocks of the grid, and pages that each has under way."""

    num_blocks: int
    num_places: int


def choose_tiles(shape: DecodeShape) -> DecodeTiles:
    """Two blocks on each multiprocessor where both still have three pages under way, otherwise one."""
    queries, head_dim = shape.num_queries, shape.head_dim
    kept_bytes = 2 * max(shape.num_k_scales, 1) * queries * head_dim * 2  # queries of two segments
    kept_bytes += PAGE_TOKENS * queries * 2 + head_dim * queries * 4 + SMEM_BYTES_KEPT
    kept_bytes += PAGE_TOKENS * head_dim * 2 if shape.is_narrow else 0
    page_bytes = PAGE_TOKENS * head_dim * jnp.dtype(shape.kv_dtype).itemsize
    place_bytes = 2 * page_bytes
    if shape.num_k_scales:
        place_bytes += (shape.num_k_scales + 1) * PAGE_TOKENS * 4
    num_places = [
        min((mosaic.SMEM_BYTES_PER_SM // blocks - 1024 - kept_bytes) // place_bytes, MAX_PLACES)
        for blocks in (1, 2)
    ]
    # So that two take at most 128 registers a thread each, which the tests hold.
    are_small = queries <= 32 and queries * shape.num_k_scales <= 64
    blocks_per_sm = 2 if num_places[1] >= 3 and are_small else 1
    return DecodeTiles(
        num_blocks=blocks_per_sm * mosaic.H200_NUM_SMS, num_places=num_places[blocks_per_sm - 1]
    )


def paged_decode(
    q_RNH: jax.Array,
    kv: KVLayer,
    table_XW: jax.Array,
    slot_R: jax.Array,
    kv_len_R: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_N: jax.Array | None = None,
    tokens_per_row: int = 1,
    tiles: DecodeTiles | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Attention of one query a row to the first kv_len tokens of its slot's pages: [R, N, H] float32.

    Pools of 64-token pages in bf16, int8 with its scales, or fp8 without; H of 64, 128 or 256. Queries and
    probabilities are rounded to 16 bits. The other arguments are those of `ref.paged_decode`. `interpret` is
    for tests: with `mosaic.simulate()` the kernels run on the CPU. Raises ValueError for a pool that the
    kernel does not serve.
    """
    shape = _read_shape(q_RNH, kv, scale, window, soft_cap, tokens_per_row)
    tiles = tiles or choose_tiles(shape)
    plan = plan_decode(
        slot_R.reshape(-1, tokens_per_row),
        kv_len_R.reshape(-1, tokens_per_row),
        shape.num_heads,
        tiles.num_blocks,
        window,
    )
    q_RNMH = _gather_queries(q_RNH.astype(shape.operand_dtype), shape)
    partials = _attend(_spread_over_scales(q_RNMH, shape), kv, table_XW, plan, shape, tiles, interpret)
    sinks_NM = None
    if sinks_N is not None:
        sinks_R1H = jnp.broadcast_to(sinks_N.astype(jnp.float32)[:, None], (tokens_per_row, len(sinks_N), 1))
        sinks_NM = _gather_queries(sinks_R1H, shape)[0, :, :, 0]
    out_RNMH = combine_partials(
        partials,
        plan,
        sinks_NM,
        shape.num_heads,
        shape.group,
        shape.group * tokens_per_row,
        interpret=interpret,
    )
    return _scatter_queries(out_RNMH, shape)


def _read_shape(q_RNH, kv: KVLayer, scale, window, soft_cap, tokens_per_row: int) -> DecodeShape:
    _, page_tokens, num_kv_heads, head_dim = kv.k_PSKH.shape
    limit = find_decode_limit(head_dim, page_tokens, kv.k_PSKH.dtype.name)
    if limit:
        raise ValueError(f"This pool is not for the GPU's kernel: {limit}.")
    return DecodeShape(
        num_rows=q_RNH.shape[0] // tokens_per_row,
        tokens_per_row=tokens_per_row,
        num_kv_heads=num_kv_heads,
        group=q_RNH.shape[1] // num_kv_heads,
        head_dim=head_dim,
        kv_dtype=kv.k_PSKH.dtype.name,
        num_k_scales=0 if kv.k_scale_PSKQ is None else kv.k_scale_PSKQ.shape[3],
        scale=scale,
        window=window,
        soft_cap=soft_cap,
    )


def _gather_queries(x_RNH: jax.Array, shape: DecodeShape) -> jax.Array:
    """The queries of each KV head side by side, token by token: [rows, heads, M, H], zeros between."""
    tokens, heads, width = shape.tokens_per_row, shape.num_kv_heads, x_RNH.shape[-1]
    x_RQKGH = x_RNH.reshape(-1, tokens, heads, shape.group, width)
    x_RKMH = x_RQKGH.swapaxes(1, 2).reshape(-1, heads, tokens * shape.group, width)
    padding = shape.tiles_per_head * shape.num_queries - tokens * shape.group
    x_RKMH = jnp.pad(x_RKMH, ((0, 0), (0, 0), (0, padding), (0, 0)))
    return x_RKMH.reshape(-1, shape.num_heads, shape.num_queries, width)


def _spread_over_scales(q_RNMH: jax.Array, shape: DecodeShape) -> jax.Array:
    """The queries once for each scale of K, with zeros in the channels of the others: [R, N, Q * M, H]."""
    if not shape.num_k_scales:
        return q_RNMH
    pair_H = jnp.arange(shape.head_dim) % (shape.head_dim // 2)  # channels i and i + H / 2 are one
    scale_H = pair_H * shape.num_k_scales // (shape.head_dim // 2)
    has_scale_QH = scale_H == jnp.arange(shape.num_k_scales)[:, None]
    q_RNQMH = jnp.where(has_scale_QH[:, None], q_RNMH[:, :, None], jnp.zeros((), q_RNMH.dtype))
    return q_RNQMH.reshape(*q_RNMH.shape[:2], -1, shape.head_dim)


def _scatter_queries(x_RNMH: jax.Array, shape: DecodeShape) -> jax.Array:
    """What `_gather_queries` did, undone."""
    tokens, heads = shape.tokens_per_row, shape.num_kv_heads
    x_RKMH = x_RNMH.reshape(shape.num_rows, heads, -1, shape.head_dim)[:, :, : tokens * shape.group]
    x_RKQGH = x_RKMH.reshape(shape.num_rows, heads, tokens, shape.group, shape.head_dim)
    return x_RKQGH.swapaxes(1, 2).reshape(shape.num_rows * tokens, heads * shape.group, shape.head_dim)


def _attend(
    q_RNMH, kv: KVLayer, table_XW, plan: DecodePlan, shape: DecodeShape, tiles: DecodeTiles, interpret
) -> Partials:
    num_partials = tiles.num_blocks + shape.num_rows * shape.num_heads
    arguments = Operands(
        q_RNMH, kv.k_PSKH, kv.v_PSKH, kv.k_scale_PSKQ, kv.v_scale_PSK, table_XW, *plan, None, None, None
    )
    given = {name: value for name, value in arguments._asdict().items() if value is not None}
    names = [*given, *Partials._fields]
    scratch = allocate_scratch(shape, tiles.num_places)._asdict()

    def body(*refs, **own):
        operands = arguments._replace(**dict(zip(names, refs, strict=True)))
        run_block(operands, Scratch(**own), shape)

    def floats(*dims):
        return jax.ShapeDtypeStruct(dims, jnp.float32)

    outputs = mosaic.kernel(
        body,
        out_type=Partials(
            floats(num_partials, shape.head_dim, shape.num_queries),
            floats(num_partials, shape.num_queries),
            floats(num_partials, shape.num_queries),
        ),
        scratch_types={name: kind for name, kind in scratch.items() if kind is not None},
        grid=(tiles.num_blocks,),
        grid_names=("block",),
        num_threads=2,
        thread_name="warpgroup",
        kernel_name="paged_decode",
        compiler_params=mosaic.CompilerParams(approx_math=True),
        interpret=interpret,
    )(*given.values())
    return Partials(*outputs)
