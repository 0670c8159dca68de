"""Paged prefill attention on Hopper (sm_90a), in Pallas Mosaic GPU; `ref.paged_prefill` is its specification.

In the manner of FlashAttention-3 (Shah et al. 2024): a block of threads has a producer warpgroup, which
reads page ids and issues one TMA copy a page, and two consumer warpgroups with 64 rows of queries each. The
rows of a tile are those of `heads_per_tile` query heads that share a KV head, so that short runs fill them
and heads read K and V together. A block stays on its multiprocessor and takes tile after tile from the list
of prefill_plan.py, so that the next tile's K and V arrive while the last one is finished.

A consumer, over the blocks of K and V that its tile sees; a line is its turn at the tensor cores, after which
it computes a softmax while the other consumer has its turn:

           S0 = Q K0      softmax, P0
    P0 V0, S1 = Q K1      softmax, P1
    P1 V1, S2 = Q K2      softmax, P2
    P2 V2                 divide, copy out

Both operands of every product are in shared memory: the interpreter runs that, and registers as an operand
are where compilers went wrong. Scores, maxima, sums and outputs are float32, operands bf16. What a page holds
behind its sequence is masked, and cleared where it would be multiplied. Knows nothing of requests or models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.kernels_pallas import mosaic
from jaxserve.kernels_pallas.kv_layer import KVLayer
from jaxserve.kernels_pallas.paged_attention.gpu_prefill_block import run_block
from jaxserve.kernels_pallas.paged_attention.gpu_prefill_consumer import LOG2_E
from jaxserve.kernels_pallas.paged_attention.gpu_prefill_shape import (
    NUM_CONSUMERS,
    OUT_CHANNELS,
    ROWS,
    Memory,
    PrefillShape,
)
from jaxserve.kernels_pallas.paged_attention.prefill_plan import (
    ALIGNMENT,
    TileList,
    find_prefill_limit,
    list_tiles,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillTuning:
    """How the kernel is cut. Block tokens are a multiple of the page size."""

    block_tokens: int  # B: of K and V, in one product
    num_stages: int  # blocks in shared memory
    num_sms: int = mosaic.H200_NUM_SMS


def choose_tuning(head_dim: int) -> PrefillTuning:
    """The largest blocks whose scores fit the registers, and stages that fit shared memory."""
    if head_dim == 256:
        return PrefillTuning(block_tokens=64, num_stages=2)
    return PrefillTuning(block_tokens=128, num_stages=4 if head_dim == 64 else 2)


def paged_prefill(
    q_TNH: jax.Array,
    kv: KVLayer,
    table_XW: jax.Array,
    slot_C: jax.Array,
    token_C: jax.Array,
    len_C: jax.Array,
    kv_len_C: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_N: jax.Array | None = None,
    tuning: PrefillTuning | None = None,
    interpret: Any = None,
) -> jax.Array:
    """`ref.paged_prefill` of a bf16 pool: [T, N, H] float32.

    Queries and the output are rounded to bf16 on the way. `interpret` takes `mosaic.simulate()`. Raises
    ValueError where `find_prefill_limit` names a limit.
    """
    shape = _read_shape(q_TNH, kv, scale, window, soft_cap, tuning, is_simulated=interpret is not None)
    num_tokens = len(q_TNH)
    q_TNH = q_TNH.astype(jnp.bfloat16)
    # A TMA copy is no larger than its array, and takes rows eight at a time.
    padding = max(shape.tile_tokens - num_tokens, -num_tokens % ALIGNMENT)
    if padding:
        q_TNH = jnp.pad(q_TNH, ((0, padding), (0, 0), (0, 0)))
    tiles = list_tiles(token_C, len_C, kv_len_C, slot_C, num_tokens=num_tokens, tile_tokens=shape.tile_tokens)
    sinks = () if sinks_N is None else (sinks_N.astype(jnp.float32) * LOG2_E,)

    def body(q_TNH, k_PSKH, v_PSKH, table_XW, *refs, **scratch):
        *refs, out_TNH = refs
        tile_refs, sinks_refs = refs[: len(TileList._fields)], refs[len(TileList._fields) :]
        sinks_N = sinks_refs[0] if sinks_refs else None
        memory = Memory(q_TNH, k_PSKH, v_PSKH, table_XW, TileList(*tile_refs), sinks_N, out_TNH, **scratch)
        run_block(memory, shape)

    run = mosaic.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q_TNH.shape, jnp.bfloat16),
        scratch_types=_list_scratch(shape),
        grid=(shape.num_sms,),
        grid_names=("sm",),
        num_threads=NUM_CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=mosaic.CompilerParams(approx_math=True),
        kernel_name="paged_prefill",
        interpret=interpret,
    )
    out_TNH = run(q_TNH, kv.k_PSKH, kv.v_PSKH, table_XW, *tiles, *sinks)
    return out_TNH[:num_tokens].astype(jnp.float32)


def _read_shape(
    q_TNH: jax.Array,
    kv: KVLayer,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    tuning: PrefillTuning | None,
    *,
    is_simulated: bool,
) -> PrefillShape:
    _, num_heads, head_dim = q_TNH.shape
    page_size, num_kv_heads = kv.k_PSKH.shape[1:3]
    limit = find_prefill_limit(head_dim, page_size, str(kv.k_PSKH.dtype))
    if limit:
        raise ValueError(f"No kernel attends to this pool: {limit}.")
    tuning = choose_tuning(head_dim) if tuning is None else tuning
    return PrefillShape(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        block_tokens=tuning.block_tokens,
        num_stages=tuning.num_stages,
        num_sms=tuning.num_sms,
        is_simulated=is_simulated,
    )


def _list_scratch(shape: PrefillShape) -> dict[str, Any]:
    """Shared memory and barriers of a block of threads."""
    pages_per_block = shape.block_tokens // shape.page_size
    out_shape = (NUM_CONSUMERS, OUT_CHANNELS // shape.out_part_channels, ROWS, shape.out_part_channels)
    kv_shape = (shape.num_stages, shape.block_tokens, shape.head_dim)

    def filled(num_copies):
        return mosaic.Barrier(num_arrivals=num_copies, num_barriers=shape.num_stages)

    def emptied():
        return mosaic.Barrier(num_arrivals=NUM_CONSUMERS, num_barriers=shape.num_stages)

    return {
        "q_smem": mosaic.swizzled_smem((NUM_CONSUMERS, ROWS, shape.head_dim), jnp.bfloat16),
        "k_smem": mosaic.swizzled_smem(kv_shape, jnp.bfloat16),
        "v_smem": mosaic.swizzled_smem(kv_shape, jnp.bfloat16),
        "p_smem": mosaic.swizzled_smem((NUM_CONSUMERS, ROWS, shape.block_tokens), jnp.bfloat16),
        # Not in tiles of 8 rows: rows leave in any number, from any row on.
        "out_smem": mosaic.SMEM(out_shape, jnp.bfloat16),
        "q_filled": mosaic.Barrier(num_arrivals=NUM_CONSUMERS * shape.heads_per_consumer),
        "q_emptied": mosaic.Barrier(num_arrivals=NUM_CONSUMERS),
        "k_filled": filled(pages_per_block),
        "k_emptied": emptied(),
        "v_filled": filled(pages_per_block),
        "v_emptied": emptied(),
        "v_uncleared": mosaic.Barrier(num_arrivals=pages_per_block),
        "turn": mosaic.Barrier(num_arrivals=1, num_barriers=NUM_CONSUMERS),
    }
