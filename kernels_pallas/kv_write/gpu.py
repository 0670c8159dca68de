"""RoPE and KV write as one launch, in place, on an NVIDIA GPU (Pallas Mosaic GPU).

A block takes a few tokens. It brings the heads of each (q, k and v beside each other, as the projection
leaves them) to shared memory with one bulk copy a token, rotates q and k in registers, and sends q to its
array, k and v to their place in the pool: one bulk copy each, whose place is read from memory. A pool of
bytes (int8 with its scales, fp8) is written from registers, as its rows are too short for copies. The pool's
arrays are passed as references, so that the program that donates them makes no copy of them. Padding tokens
are rotated but written nowhere.

Letters beside the usual ones: A heads of q, k and v together, I = H / 2 pairs of a head, F places of the pool
(P * S), Y the two halves of a head. A half is Q groups of 8 pairs, which share a scale in an int8 pool:

    head   | first half: Q groups of 8 | second half |       pair i = (first[i], second[i])
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.kernels_pallas import mosaic
from jaxserve.kernels_pallas.kv_layer import PAIRS_PER_SCALE, KVLayer
from jaxserve.kernels_pallas.kv_write.ref import SMALLEST_ABSMAX

WARPS = 4  # each has a row (a head) at a time, so rows come in fours
LANES = 32
MANY_TOKENS = 1024  # from here on a block takes several tokens
TOKENS_PER_BLOCK = 2


def rope_write(
    kv: KVLayer,
    qkv_TAH: jax.Array,
    cos_T1I: jax.Array,
    sin_T1I: jax.Array,
    write_index_T: jax.Array,
    *,
    num_heads: int,
    tokens_per_block: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, KVLayer]:
    """As ref.rope_write, but page 0, the trash page, is left as it is.

    `tokens_per_block` is for tuning; it must divide the number of tokens.
    """
    num_tokens, _, head_dim = qkv_TAH.shape
    page_size, num_kv_heads = kv.k_PSKH.shape[1:3]
    if tokens_per_block is None:
        is_long = num_tokens >= MANY_TOKENS and num_tokens % TOKENS_PER_BLOCK == 0
        tokens_per_block = TOKENS_PER_BLOCK if is_long else 1
    sizes = Sizes(num_heads, num_kv_heads, head_dim, tokens_per_block, page_size)
    pools = [pool for pool in kv if pool is not None]  # int8 has scales
    shapes = (sizes.head, sizes.head, sizes.head[1:2], ())[: len(pools)]
    pool_refs = [
        jax.new_ref(pool.reshape(-1, num_kv_heads, *shape)) for pool, shape in zip(pools, shapes, strict=True)
    ]
    rows = (sizes.tokens, pad_rows(num_kv_heads))
    is_staged = kv.k_PSKH.dtype.itemsize > 1
    staging = [mosaic.SMEM((*rows, *sizes.head), kv.k_PSKH.dtype)] * 2 if is_staged else []
    launch = mosaic.kernel(
        lambda *refs: _write_block(sizes, len(pool_refs), *refs),
        out_type=jax.ShapeDtypeStruct((num_tokens, num_heads, *sizes.head), qkv_TAH.dtype),
        scratch_types=[
            mosaic.SMEM((sizes.tokens, sizes.rows_in, *sizes.head), qkv_TAH.dtype),
            mosaic.Barrier(num_arrivals=sizes.tokens),
            mosaic.SMEM((sizes.tokens, pad_rows(num_heads), *sizes.head), qkv_TAH.dtype),
            *staging,
        ],
        grid=(num_tokens // sizes.tokens,),
        grid_names=("block",),
        kernel_name="rope_write",
        compiler_params=mosaic.CompilerParams(lowering_semantics=mosaic.LoweringSemantics.Lane),
        interpret=interpret,
    )
    qkv = qkv_TAH.reshape(num_tokens, -1, *sizes.head)
    turns = (table_T1I.reshape(num_tokens, *sizes.head[1:]) for table_T1I in (cos_T1I, sin_T1I))
    q = launch(qkv, *turns, write_index_T, *pool_refs)
    new_kv = (ref[...].reshape(pool.shape) for ref, pool in zip(pool_refs, pools, strict=True))
    return q.reshape(num_tokens, num_heads, head_dim), KVLayer(*new_kv)


class Sizes(NamedTuple):
    """The shape of the work of a block."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    tokens: int
    page_size: int

    @property
    def head(self) -> tuple[int, int, int]:
        """[Y, Q, 8]: the numbers of one head."""
        return 2, self.head_dim // 2 // PAIRS_PER_SCALE, PAIRS_PER_SCALE

    @property
    def num_rows(self) -> int:
        """A: the heads of a token."""
        return self.num_heads + 2 * self.num_kv_heads

    @property
    def rows_in(self) -> int:
        """Rows of shared memory for them: reads come in fours and may reach beyond."""
        past_v = self.num_heads + self.num_kv_heads + pad_rows(self.num_kv_heads)
        return max(past_v, pad_rows(self.num_heads))

    @property
    def layout(self) -> Any:
        """Registers of four half-heads: a warp each, neighbouring pairs in a lane."""
        _, num_groups, group = self.head
        pairs_per_lane = num_groups * group // LANES
        tiling = ((WARPS, num_groups, group), (pairs_per_lane,))
        return mosaic.tiled_layout(tiling, warp_dims=(-4,), lane_dims=(-3, -2))


def _write_block(sizes, num_pools, qkv_ref, cos_ref, sin_ref, index_ref, *refs):
    pool_refs, (q_ref, in_smem, barrier, q_smem, *kv_smem) = refs[:num_pools], refs[num_pools:]
    first = jax.lax.axis_index("block") * sizes.tokens

    def bring(i, _):
        rows = mosaic.ds(0, sizes.num_rows)
        mosaic.copy_block_to_smem(qkv_ref.at[first + i], in_smem.at[i, rows], barrier)

    def rotate(i, _):
        turn = tuple(
            mosaic.load(ref.at[first + i], layout=sizes.layout.reduce(0), optimized=False)
            for ref in (cos_ref, sin_ref)
        )
        _move_heads(sizes, in_smem.at[i], 0, q_smem.at[i], turn=turn)
        if kv_smem:
            _move_kv(sizes, in_smem.at[i], [smem.at[i] for smem in kv_smem], turn)
            return
        place = index_ref[first + i]

        @mosaic.when(place >= sizes.page_size)
        def _():
            _move_kv(sizes, in_smem.at[i], [ref.at[place] for ref in pool_refs], turn)

    def send(i, _):
        mosaic.copy_smem_to_gmem(q_smem.at[i, mosaic.ds(0, sizes.num_heads)], q_ref.at[first + i])
        place = index_ref[first + i]

        @mosaic.when(place >= sizes.page_size)
        def _():
            for smem, ref in zip(kv_smem, pool_refs, strict=False):  # none for bytes
                heads = mosaic.ds(0, sizes.num_kv_heads)
                mosaic.copy_smem_to_gmem(smem.at[i, heads], ref.at[place])

    jax.lax.fori_loop(0, sizes.tokens, bring, None)
    mosaic.barrier_wait(barrier)
    jax.lax.fori_loop(0, sizes.tokens, rotate, None)
    mosaic.commit_smem()
    jax.lax.fori_loop(0, sizes.tokens, send, None)
    mosaic.wait_smem_to_gmem(0)


def _move_kv(sizes, in_ref, out_refs, turn):
    """k, rotated, and v of one token to `out_refs`: k, v and, if the pool is int8, their scales."""
    k_ref, v_ref, k_scale_ref, v_scale_ref = (*out_refs, None, None)[:4]
    _move_heads(sizes, in_ref, sizes.num_heads, k_ref, turn=turn, scale_ref=k_scale_ref)
    _move_heads(sizes, in_ref, sizes.num_heads + sizes.num_kv_heads, v_ref, scale_ref=v_scale_ref)


def _move_heads(sizes, in_ref, from_head, out_ref, *, turn=None, scale_ref=None):
    """Heads from `in_ref` to all of `out_ref`: rotated if there is a `turn`, rounded if a `scale_ref`."""
    for row in range(0, out_ref.shape[0], WARPS):
        rows_in, rows_out = mosaic.ds(from_head + row, WARPS), mosaic.ds(row, WARPS)
        halves = [
            mosaic.load(in_ref.at[rows_in, y], layout=sizes.layout, optimized=False).astype(jnp.float32)
            for y in range(2)
        ]
        if turn is not None:
            cos, sin = (_spread(sizes, table, (1, 2)) for table in turn)
            halves = [halves[0] * cos - halves[1] * sin, halves[1] * cos + halves[0] * sin]
        if scale_ref is not None:
            halves, scale = _quantize(sizes, halves, scale_axes=tuple(range(len(scale_ref.shape))))
            mosaic.store(scale_ref.at[rows_out], scale)
        for y, half in enumerate(halves):
            mosaic.store(out_ref.at[rows_out, y], half.astype(out_ref.dtype))


def _quantize(sizes, halves, scale_axes):
    """The numbers as multiples, up to 127, of a scale for each index of `scale_axes`; and the scales."""
    largest = jnp.max(jnp.maximum(jnp.abs(halves[0]), jnp.abs(halves[1])), axis=2)
    if scale_axes == (0,):
        largest = jnp.max(largest, axis=1)
    scale = jnp.maximum(largest, SMALLEST_ABSMAX) / 127.0
    spread = _spread(sizes, scale, scale_axes)
    return [jnp.round(half / spread) for half in halves], scale


def _spread(sizes, x, axes):
    """x along the other axes of four half-heads."""
    shape = (WARPS, *sizes.head[1:])
    return mosaic.layout_cast(jax.lax.broadcast_in_dim(x, shape, axes), sizes.layout)


def pad_rows(num_heads: int) -> int:
    return -(-num_heads // WARPS) * WARPS
