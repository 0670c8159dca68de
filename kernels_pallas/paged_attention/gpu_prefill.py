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
are where compilers went wrong. Scores, maxima, sums and outputs are float32, operands bf16, or float16 where
the pool is fp8; the producer widens int8 and fp8 (gpu_prefill_widen.py). What a page holds behind its
sequence is masked, and cleared where it would be multiplied. Knows nothing of requests or models.
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
    PIECE_CHANNELS,
    ROWS,
    Memory,
    PrefillShape,
)
from jaxserve.kernels_pallas.paged_attention.gpu_prefill_widen import PART_CHANNELS
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
    num_places: int = 0  # pieces of an int8 or fp8 pool on their way there
    num_sms: int = mosaic.H200_NUM_SMS


def choose_tuning(head_dim: int, kv_dtype: str) -> PrefillTuning:
    """The largest blocks whose scores fit the registers, and stages that fit shared memory."""
    is_narrow = kv_dtype != "bfloat16"
    if head_dim == 256:
        return PrefillTuning(block_tokens=64, num_stages=2, num_places=2 if is_narrow else 0)
    num_stages = 4 if head_dim == 64 else 2
    return PrefillTuning(block_tokens=128, num_stages=num_stages, num_places=4 if is_narrow else 0)


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
    """`ref.paged_prefill` of a pool in bf16, int8 with its scales, or fp8 without: [T, N, H] float32.

    Queries, probabilities and the output are rounded to 16 bits on the way. `interpret` takes
    `mosaic.simulate()`. Raises ValueError where `find_prefill_limit` names a limit.
    """
    shape = _read_shape(q_TNH, kv, scale, window, soft_cap, tuning, is_simulated=interpret is not None)
    num_tokens = len(q_TNH)
    q_TNH = q_TNH.astype(shape.operand_dtype)
    # A TMA copy is no larger than its array, and takes rows eight at a time.
    padding = max(shape.tile_tokens - num_tokens, -num_tokens % ALIGNMENT)
    if padding:
        q_TNH = jnp.pad(q_TNH, ((0, padding), (0, 0), (0, 0)))
    tiles = list_tiles(token_C, len_C, kv_len_C, slot_C, num_tokens=num_tokens, tile_tokens=shape.tile_tokens)
    sinks_N = None if sinks_N is None else sinks_N.astype(jnp.float32) * LOG2_E
    arguments = {"q_TNH": q_TNH, **kv._asdict(), "table_XW": table_XW, "sinks_N": sinks_N}
    given = {name: value for name, value in arguments.items() if value is not None}

    def body(*refs, **scratch):
        *refs, out_TNH = refs
        named = dict.fromkeys(arguments) | dict(zip(given, refs, strict=False))
        tile_refs = refs[len(given) :]
        run_block(Memory(**named, tiles=TileList(*tile_refs), out_TNH=out_TNH, **scratch), shape)

    run = mosaic.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q_TNH.shape, q_TNH.dtype),
        scratch_types=_list_scratch(shape),
        grid=(shape.num_sms,),
        grid_names=("sm",),
        num_threads=NUM_CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=mosaic.CompilerParams(approx_math=True),
        kernel_name="paged_prefill",
        interpret=interpret,
    )
    out_TNH = run(*given.values(), *tiles)
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
    kv_dtype = kv.k_PSKH.dtype.name
    limit = find_prefill_limit(head_dim, page_size, kv_dtype)
    if limit:
        raise ValueError(f"No kernel attends to this pool: {limit}.")
    tuning = choose_tuning(head_dim, kv_dtype) if tuning is None else tuning
    return PrefillShape(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        kv_dtype=kv_dtype,
        num_k_scales=0 if kv.k_scale_PSKQ is None else kv.k_scale_PSKQ.shape[3],
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        block_tokens=tuning.block_tokens,
        num_stages=tuning.num_stages,
        num_places=tuning.num_places,
        num_sms=tuning.num_sms,
        is_simulated=is_simulated,
    )


def _list_scratch(shape: PrefillShape) -> dict[str, Any]:
    """Shared memory and barriers of a block of threads."""
    pages_per_block = shape.block_tokens // shape.page_size
    num_copies = 1 if shape.is_narrow else pages_per_block  # that fill a block of K or V, or say so
    out_shape = (NUM_CONSUMERS, shape.out_channels // shape.out_part_channels, ROWS, shape.out_part_channels)
    kv_shape = (shape.num_stages, shape.block_tokens, shape.head_dim)

    def filled():
        return mosaic.Barrier(num_arrivals=num_copies, num_barriers=shape.num_stages)

    def emptied():
        return mosaic.Barrier(num_arrivals=NUM_CONSUMERS, num_barriers=shape.num_stages)

    return {
        "q_smem": mosaic.swizzled_smem((NUM_CONSUMERS, ROWS, shape.head_dim), shape.operand_dtype),
        "k_smem": mosaic.swizzled_smem(kv_shape, shape.operand_dtype),
        "v_smem": mosaic.swizzled_smem(kv_shape, shape.operand_dtype),
        "p_smem": mosaic.swizzled_smem((NUM_CONSUMERS, ROWS, shape.block_tokens), shape.operand_dtype),
        # Not in tiles of 8 rows: rows leave in any number, from any row on.
        "out_smem": mosaic.SMEM(out_shape, shape.operand_dtype),
        "q_filled": mosaic.Barrier(num_arrivals=NUM_CONSUMERS * shape.heads_per_consumer),
        "q_emptied": mosaic.Barrier(num_arrivals=NUM_CONSUMERS),
        "k_filled": filled(),
        "k_emptied": emptied(),
        "v_filled": filled(),
        "v_emptied": emptied(),
        "turn": mosaic.Barrier(num_arrivals=1, num_barriers=NUM_CONSUMERS),
        **_list_own_scratch(shape, num_copies),
    }


def _list_own_scratch(shape: PrefillShape, num_copies: int) -> dict[str, Any]:
    """What the way of K and V needs, which depends on the pool's type."""
    if not shape.is_narrow:
        return {"v_uncleared": mosaic.Barrier(num_arrivals=num_copies)}
    places = shape.num_places
    scratch = {
        "narrow_smem": mosaic.swizzled_smem(
            (places, ROWS, PIECE_CHANNELS), shape.kv_dtype, max_swizzle=PART_CHANNELS
        ),
        "narrow_filled": mosaic.Barrier(num_barriers=places),
    }
    if shape.num_k_scales:
        scratch["scale_smem"] = mosaic.SMEM((places, ROWS, shape.piece_scales), jnp.float32)
        scratch["scale_filled"] = mosaic.Barrier(num_barriers=places)
    return scratch
