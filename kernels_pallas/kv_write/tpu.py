"""RoPE and KV write on a TPU, in place: XLA or a kernel computes rows of tokens, and copies put them away.

A pool of bf16 has one kernel for all of it (tpu_fused.py). Of int8 and fp8 XLA computes the rows, as it fuses
rotation, rounding and the packing of words; a scatter of theirs it would do one by one, after a copy of the
pool. So a Pallas kernel moves the rows from HBM to HBM.

Letters: J rows of a token, L = 128 lanes, F places of the pool (P * S).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.kernels_pallas.kv_pages import KVPages, pack_tokens
from jaxserve.kernels_pallas.kv_write import tpu_fused
from jaxserve.kernels_pallas.kv_write.move_rows import RowMoves
from jaxserve.kernels_pallas.kv_write.ref import rotate
from jaxserve.kernels_pallas.paged_attention.tpu_queries import UnitQueries


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
) -> tuple[jax.Array | UnitQueries, KVPages]:
    """As ref.rope_write, of a pool of KVPages; page 0, the trash page, is left as it is.

    In a pool of several layers the pages of this one begin at `first_page`, an int32. q comes as [T, N, H],
    or as the attention kernels want it.
    """
    first_page_1 = jnp.zeros(1, jnp.int32) if first_page is None else first_page[None]
    if kv.layout.kv_dtype == "bfloat16":
        qkv_TF = qkv_TAH.reshape(len(qkv_TAH), -1)
        operands = (qkv_TF, cos_T1I, sin_T1I, write_index_T, first_page_1)
        return tpu_fused.rope_write(kv, *operands, num_heads=num_heads, interpret=interpret)
    first_v = num_heads + kv.layout.num_kv_heads
    turned_TAH = rotate(qkv_TAH[:, :first_v].astype(jnp.float32), cos_T1I, sin_T1I)
    rows = pack_tokens(turned_TAH[:, num_heads:], qkv_TAH[:, first_v:], kv.layout)
    rows = [rows_TJL for rows_TJL in rows if rows_TJL is not None]
    pools = [pool for pool in (kv.words_PSJL, kv.scales_PSJL) if pool is not None]
    places = [pool.reshape(-1, *pool.shape[2:]) for pool in pools]  # F of them
    page_size, count = kv.words_PSJL.shape[1], len(pools)

    def body(index_T, first_page_1, *refs):
        moves = RowMoves(
            sources=refs[:count],
            pools=refs[2 * count : -1],
            index_T=index_T,
            num_tokens=len(write_index_T),
            first_place=first_page_1[0] * page_size,
            page_size=page_size,
            moved=refs[-1],
        )
        moves.start()
        moves.wait()

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    written = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(1,),
            in_specs=[anywhere] * (2 * count),
            out_specs=[anywhere] * count,
            scratch_shapes=[pltpu.SemaphoreType.DMA],
        ),
        out_shape=[jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in places],
        input_output_aliases={2 + count + i: i for i in range(count)},
        name="kv_write",
        interpret=interpret,
    )(write_index_T, first_page_1, *rows, *places)
    words, *scales = (new.reshape(pool.shape) for new, pool in zip(written, pools, strict=True))
    new_kv = KVPages(words, scales[0] if scales else None, kv.layout)
    return turned_TAH[:, :num_heads].astype(qkv_TAH.dtype), new_kv
