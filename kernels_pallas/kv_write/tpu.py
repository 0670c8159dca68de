"""RoPE and KV write on a TPU: rows of tokens computed by XLA, and put in their places by copies, in place.

XLA fuses the rotation, the rounding and the packing of words with one another and with what comes before
them; a scatter of theirs it would do one by one, after a copy of the pool. So a Pallas kernel moves the rows,
from HBM to HBM: eight tokens with one copy where their places follow one another, as those of a chunk do,
otherwise a copy a token. All are under way together. Padding tokens are written nowhere.

Letters: J rows of a token, L = 128 lanes, F places of the pool (P * S).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.kernels_pallas.kv_pages import KVPages, pack_tokens
from jaxserve.kernels_pallas.kv_write.ref import rotate

TOGETHER = 8  # tokens of one copy


def rope_write(
    kv: KVPages,
    qkv_TAH: jax.Array,
    cos_T1I: jax.Array,
    sin_T1I: jax.Array,
    write_index_T: jax.Array,
    *,
    num_heads: int,
    first_page: jax.Array | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, KVPages]:
    """As ref.rope_write, of a pool of KVPages; page 0, the trash page, is left as it is.

    In a pool of several layers the pages of this one begin at `first_page`, an int32.
    """
    first_v = num_heads + kv.layout.num_kv_heads
    turned_TAH = rotate(qkv_TAH[:, :first_v].astype(jnp.float32), cos_T1I, sin_T1I)
    rows = pack_tokens(turned_TAH[:, num_heads:], qkv_TAH[:, first_v:], kv.layout)
    rows = [rows_TJL for rows_TJL in rows if rows_TJL is not None]
    pools = [pool for pool in (kv.words_PSJL, kv.scales_PSJL) if pool is not None]
    page_size = kv.words_PSJL.shape[1]
    places = [pool.reshape(-1, *pool.shape[2:]) for pool in pools]  # F of them
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    written = pl.pallas_call(
        lambda index_T, first_page_1, *refs: _move_rows(page_size, index_T, first_page_1, refs),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(1,),
            in_specs=[anywhere] * (2 * len(pools)),
            out_specs=[anywhere] * len(pools),
            scratch_shapes=[pltpu.SemaphoreType.DMA],
        ),
        out_shape=[jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in places],
        input_output_aliases={2 + len(pools) + i: i for i in range(len(pools))},
        name="kv_write",
        interpret=interpret,
    )(write_index_T, jnp.int32(0)[None] if first_page is None else first_page[None], *rows, *places)
    words, *scales = (new.reshape(pool.shape) for new, pool in zip(written, pools, strict=True))
    new_kv = KVPages(words, scales[0] if scales else None, kv.layout)
    return turned_TAH[:, :num_heads].astype(qkv_TAH.dtype), new_kv


def _move_rows(page_size: int, index_T: Any, first_page_1: Any, refs: tuple[Any, ...]) -> None:
    """`refs`: the rows of each pool, the pools as they came, the same as they leave, a semaphore."""
    moved = refs[-1]
    num_pools = len(refs) // 3
    rows, pools = refs[:num_pools], refs[2 * num_pools : -1]
    num_tokens = index_T.shape[0]
    num_groups = num_tokens // TOGETHER
    first_place = first_page_1[0] * page_size

    def copies(token, num_together: int) -> list[Any]:
        place = first_place + index_T[token]
        return [
            pltpu.make_async_copy(
                source.at[pl.ds(token, num_together)], target.at[pl.ds(place, num_together)], moved
            )
            for source, target in zip(rows, pools, strict=True)
        ]

    def act_on_token(token, act) -> None:
        @pl.when(index_T[token] >= page_size)
        def _():
            for copy in copies(token, 1):
                act(copy)

    def act_on_group(group, act) -> None:
        token = group * TOGETHER
        first = index_T[token]
        follow = first >= page_size
        for i in range(1, TOGETHER):
            follow &= index_T[token + i] == first + i

        @pl.when(follow)
        def _():
            for copy in copies(token, TOGETHER):
                act(copy)

        @pl.when(jnp.logical_not(follow))
        def _():
            for i in range(TOGETHER):
                act_on_token(token + i, act)

    for act in (lambda copy: copy.start(), lambda copy: copy.wait()):
        jax.lax.fori_loop(0, num_groups, lambda group, _, act=act: act_on_group(group, act), None)
        for token in range(num_groups * TOGETHER, num_tokens):
            act_on_token(token, act)
