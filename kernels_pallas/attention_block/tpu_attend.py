"""Rotation, write and attention of decode rows on a TPU, in one launch (Pallas): for steps whose products are
apart, as they read int8, or have many rows, or are shared by two cores of a device.

Two cores leave a part each, in which the other's rows are zeros, so that their sum is the whole: what is
multiplied by o next adds them. It was never run on a TPU. Letters as in tpu_rows.py; C cores.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.kernels_pallas.attention_block.ref import RowsForm
from jaxserve.kernels_pallas.attention_block.tpu_rows import RowAttention, list_rows_scratch, make_shape
from jaxserve.kernels_pallas.kv_pages import LANES, KVPages
from jaxserve.kernels_pallas.paged_attention.tpu_decode_shape import DecodeShape
from jaxserve.kernels_pallas.paged_attention.tpu_plan import VMEM_LIMIT_BYTES, Chip
from jaxserve.kernels_pallas.paged_attention.tpu_queries import count_unit_rows
from jaxserve.kernels_pallas.paged_attention.tpu_work import Work

MOST_ROWS_BYTES = 24 << 20  # of VMEM; pages have the rest


def make_rows_form(chip: Chip) -> RowsForm:
    return RowsForm(_serves, partial(attend_rows, chip=chip))


def _serves(num_rows: int, num_heads: int, kv: Any) -> bool:
    if not isinstance(kv, KVPages) or kv.layout.kv_dtype != "bfloat16":
        return False
    layout = kv.layout
    channels = (num_heads + 2 * layout.num_kv_heads) * layout.head_dim
    row_bytes = 2 * 4 * channels + 2 * 2 * num_heads * layout.head_dim
    # Queries and outputs in rows of lanes, and words of K and V.
    row_bytes += 2 * 4 * LANES * layout.num_chunks * count_unit_rows(num_heads, layout)
    row_bytes += 4 * LANES * layout.num_rows
    is_whole = num_heads * layout.head_dim % LANES == 0
    return is_whole and num_rows * row_bytes <= MOST_ROWS_BYTES


def attend_rows(
    qkv_RF: jax.Array,
    kv: KVPages,
    rope: tuple[jax.Array, jax.Array],
    write_index_R: jax.Array,
    work: Work,
    *,
    num_heads: int,
    scale: float,
    chip: Chip,
    interpret: Any = False,
) -> tuple[jax.Array, KVPages]:
    """What ref.rope_write and ref.paged_decode give, of a pool of KVPages, whose page 0 is left as it is: the
    outputs, bf16 [R, N * H], or [C, R, N * H], whose sum they are; and the pool. `work` is what
    `list_decode_work` gives for the rows, with the layer's first page, from which on its places count."""
    shape = make_shape(kv, num_heads, scale, chip)
    num_rows, num_cores = len(qkv_RF), shape.blocks.num_cores
    pool_Z1L = kv.words_PSJL.reshape(-1, 1, LANES)
    scalars = (work.first_page_1, *work.tiles, write_index_R)
    whole = [pl.BlockSpec(a.shape, lambda i, *_, rank=a.ndim: (0,) * rank) for a in (qkv_RF, *rope)]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    out_CRF = jax.ShapeDtypeStruct((num_cores, num_rows, num_heads * kv.head_dim), jnp.bfloat16)
    words_bytes = 4 * LANES * kv.layout.num_rows * num_rows
    heads_CRF, words = pl.pallas_call(
        partial(_run, shape=shape, num_heads=num_heads),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(num_cores,),
            in_specs=[*whole, anywhere, anywhere],
            out_specs=[pl.BlockSpec((None, *out_CRF.shape[1:]), lambda i, *_: (i, 0, 0)), anywhere],
            scratch_shapes=[list_rows_scratch(shape, num_rows)],
        ),
        out_shape=[out_CRF, jax.ShapeDtypeStruct(pool_Z1L.shape, pool_Z1L.dtype)],
        input_output_aliases={len(scalars) + len(whole) + 1: 1},
        cost_estimate=pl.CostEstimate(
            flops=6 * qkv_RF.size,
            bytes_accessed=num_cores * qkv_RF.nbytes + 2 * out_CRF.size + words_bytes,  # not what it reads
            transcendentals=0,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=VMEM_LIMIT_BYTES,
            disable_bounds_checks=not interpret,
        ),
        name="attend_rows",
        interpret=interpret,
    )(*scalars, qkv_RF, *rope, work.table_C1W, pool_Z1L)
    new_kv = KVPages(words.reshape(kv.words_PSJL.shape), None, kv.layout)
    return heads_CRF[0] if num_cores == 1 else heads_CRF, new_kv


def _run(
    first_page_1: Any,
    tiles_FL: Any,
    cores_2C: Any,
    write_index_R: Any,
    qkv_RF: Any,
    cos_R1I: Any,
    sin_R1I: Any,
    table_R1W: Any,
    _pool: Any,
    out_RF: Any,
    pool_Z1L: Any,
    scratch: dict[str, Any],
    *,
    shape: DecodeShape,
    num_heads: int,
) -> None:
    attention = RowAttention(
        shape=shape,
        num_heads=num_heads,
        tiles_FL=tiles_FL,
        cores_2C=cores_2C,
        first_page_1=first_page_1,
        write_index_R=write_index_R,
        table_R1W=table_R1W,
        pool_Z1L=pool_Z1L,
        scratch=scratch,
    )
    attention.run(attention.announce(), qkv_RF, cos_R1I, sin_R1I, out_RF)
