"""RoPE and KV write of a bf16 pool on a TPU, in one Pallas kernel: from a projection's channels to the pool.

XLA makes six small operations of it, each of a microsecond by its own reckoning: heads cut apart, rotated,
packed into words, queries ordered and padded. Here a block of tokens has its heads rotated in registers,
words of K and V leave VMEM for their places (move_rows.py), and queries leave in the order in which
the attention kernels want them. The numbers are those that tpu.py and tpu_queries.py would give.

Letters as in tpu_heads.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.kernels_pallas.kv_pages import LANES, KVPages, PagesLayout
from jaxserve.kernels_pallas.kv_write.move_rows import RowMoves
from jaxserve.kernels_pallas.kv_write.tpu_heads import Heads, pack_words, spread_queries
from jaxserve.kernels_pallas.paged_attention.tpu_queries import UnitQueries, count_unit_rows

BLOCK_TOKENS = 64


def rope_write(
    kv: KVPages,
    qkv_TF: jax.Array,
    cos_T1I: jax.Array,
    sin_T1I: jax.Array,
    write_index_T: jax.Array,
    first_page_1: jax.Array,
    *,
    num_heads: int,
    interpret: Any = False,
) -> tuple[UnitQueries, KVPages]:
    """Rotated q, and the bf16 pool with rotated k, and v; otherwise as rope_write of tpu.py."""
    layout, page_size = kv.layout, kv.words_PSJL.shape[1]
    num_tokens, num_channels = qkv_TF.shape
    block_tokens = min(num_tokens, BLOCK_TOKENS)
    if num_tokens % block_tokens:
        write_index_T = jnp.pad(write_index_T, (0, -num_tokens % block_tokens))
    unit_rows = count_unit_rows(num_heads, layout)
    token_rows = layout.num_chunks * unit_rows
    rows_Z1L = kv.words_PSJL.reshape(-1, 1, LANES)
    written_bytes = 4 * LANES * num_tokens * (token_rows + layout.num_rows)

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    table = pl.BlockSpec((block_tokens, 1, cos_T1I.shape[2]), lambda i, *_: (i, 0, 0))
    words, q_ZL = pl.pallas_call(
        partial(_run, num_heads=num_heads, layout=layout, page_size=page_size),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(num_tokens, block_tokens),),
            in_specs=[
                pl.BlockSpec((block_tokens, num_channels), lambda i, *_: (i, 0)),
                table,
                table,
                anywhere,
            ],
            out_specs=[anywhere, pl.BlockSpec((block_tokens * token_rows, LANES), lambda i, *_: (i, 0))],
            scratch_shapes=[
                pltpu.VMEM((block_tokens * layout.num_rows, 1, LANES), jnp.int32),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(rows_Z1L.shape, rows_Z1L.dtype),
            jax.ShapeDtypeStruct((num_tokens * token_rows, LANES), jnp.float32),
        ],
        input_output_aliases={5: 0},
        cost_estimate=pl.CostEstimate(6 * qkv_TF.size, 0, bytes_accessed=qkv_TF.nbytes + written_bytes),
        name="kv_write",
        interpret=interpret,
    )(write_index_T, first_page_1, qkv_TF, cos_T1I, sin_T1I, rows_Z1L)
    q_TUAML = q_ZL.reshape(num_tokens, layout.num_units, layout.chunks_per_unit, unit_rows, LANES)
    return UnitQueries(q_TUAML, num_heads), KVPages(words.reshape(kv.words_PSJL.shape), None, layout)


def _run(
    index_T: Any,
    first_page_1: Any,
    qkv_TF: Any,
    cos_T1I: Any,
    sin_T1I: Any,
    _pool: Any,
    pool_Z1L: Any,
    q_ZL: Any,
    words_Z1L: Any,
    moved: Any,
    *,
    num_heads: int,
    layout: PagesLayout,
    page_size: int,
) -> None:
    heads = Heads(qkv_TF, cos_T1I[:, 0], sin_T1I[:, 0], layout.head_dim)
    pack_words(heads, words_Z1L, num_heads, layout)
    num_tokens = qkv_TF.shape[0]
    moves = RowMoves(
        sources=[words_Z1L],
        pools=[pool_Z1L],
        num_tokens=num_tokens,
        index_T=index_T,
        first_place=first_page_1[0] * page_size,
        page_size=page_size,
        moved=moved,
        first_token=pl.program_id(0) * num_tokens,
    )
    moves.start()
    spread_queries(heads, q_ZL, num_heads, layout)
    moves.wait()
