"""Paged attention, the reference: softmax(q k^T) v over K and V that lie in pages.

Two entry points with different shapes of work: `paged_decode` (one query token a row) and
`paged_prefill` (runs of query tokens, causal, behind a cached prefix). Both are the specification that
the Pallas kernels are tested against and the form that XLA runs on the CPU. Their loops run over a list
of live blocks, so the cost grows with the tokens that are attended to and not with the table's width
or the pool. Knows nothing of requests; a row of length 0 is padding and yields zeros.

The block list of a ragged batch, as both functions see it (lengths 5, 0, 9; blocks of 4 tokens):

    item     0      1      2      3      4
    row      0      0      2      2      2
    block    0      1      0      1      2      <- the last one holds 1 live token, the rest is masked

Scores, maxima and sums are float32. The products' operands are bf16 where the pool is, so that queries and
probabilities are rounded to it, and float32 otherwise: an int8 pool is scaled while a block is read.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from jaxserve.kernels_pallas.kv_layer import KVLayer
from jaxserve.kernels_pallas.rounding import to_bf16

# Measured on the CPU (2 cores, AVX-512). One row alone needs no blocks that rows share, so its are larger.
DECODE_BLOCK_TOKENS = 64
DECODE_TRIP_TOKENS = (256, 2048)  # of one row, and of many rows at most
MOST_BUNDLED_WIDTH = 256  # of the KV heads of a token together, see `_bundle_queries`
PREFILL_BLOCK_TOKENS = 128
PREFILL_TILE_TOKENS = 128
# Sums are float32, and so are the products of float32, also where the hardware would round.
einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
MASKED = -1e30  # finite, so that a fully masked block gives exp(0) * 0 and never NaN


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
) -> jax.Array:
    """Attention of one query a row to the first kv_len tokens of its slot's pages: [R, N, H] float32.

    Split-KV in the manner of flash decoding: every block yields a partial (max, sum, output), and the
    partials of a row are combined by their maxima.

    With a `window`, a query sees the last `window` of its tokens; pages further back may hold anything. A
    `soft_cap` makes soft_cap * tanh(score / soft_cap) of a score (Gemma 2), a sink is the score of one more
    key, whose value is zero (gpt-oss). `tokens_per_row` promises that every run of so many rows are
    consecutive tokens of one slot, each a token longer than the one before, those behind the last live one
    of length 0; other forms read such a run's pages once.
    """
    del tokens_per_row
    num_rows, num_heads, head_dim = q_RNH.shape
    page_size, num_kv_heads = kv.k_PSKH.shape[1:3]
    few, many = DECODE_TRIP_TOKENS
    block_tokens = max(1, (few if num_rows == 1 else DECODE_BLOCK_TOKENS) // page_size) * page_size
    items_per_trip = max(1, min(few * num_rows, many) // block_tokens)  # E
    q_RKGH = q_RNH.reshape(num_rows, num_kv_heads, -1, head_dim).astype(jnp.float32) * scale
    is_bundled = num_kv_heads * head_dim <= MOST_BUNDLED_WIDTH
    if is_bundled:
        q_RKGH = _bundle_queries(q_RKGH)
    q_RKGH = _as_operand(q_RKGH, kv)
    table_RW = table_XW[slot_R]
    end_R = jnp.cumsum(_count_blocks(kv_len_R, window, block_tokens))
    first_R = jnp.concatenate([jnp.zeros(1, end_R.dtype), end_R[:-1]])

    def trip(carry):
        index, max_RKG, sum_RKG, out_RKGH = carry
        item_E = index * items_per_trip + jnp.arange(items_per_trip, dtype=jnp.int32)
        row_E, first_E, len_E, live_EB = _find_blocks(item_E, first_R, end_R, kv_len_R, window, block_tokens)
        k_EKBH, v_EKBH = _read_block(kv, table_RW, row_E, first_E, block_tokens, live_EB, is_bundled)
        max_EKG, sum_EKG, out_EKGH = _attend_blocks(q_RKGH[row_E], k_EKBH, v_EKBH, live_EB, soft_cap, kv)
        new_max_RKG = max_RKG.at[row_E].max(max_EKG)
        keep_RKG = jnp.exp(max_RKG - new_max_RKG)
        weight_EKG = jnp.where(len_E[:, None, None] > 0, jnp.exp(max_EKG - new_max_RKG[row_E]), 0.0)
        sum_RKG = (sum_RKG * keep_RKG).at[row_E].add(sum_EKG * weight_EKG)
        out_RKGH = (out_RKGH * keep_RKG[..., None]).at[row_E].add(out_EKGH * weight_EKG[..., None])
        return index + 1, new_max_RKG, sum_RKG, out_RKGH

    zeros_RKG = jnp.zeros(q_RKGH.shape[:3], jnp.float32)
    start = (jnp.int32(0), zeros_RKG + MASKED, zeros_RKG, jnp.zeros(q_RKGH.shape, jnp.float32))
    _, *sums = jax.lax.while_loop(lambda c: c[0] * items_per_trip < end_R[-1], trip, start)
    out_RKGH = _divide(sums, sinks_N)
    if is_bundled:
        out_RKGH = _unbundle(out_RKGH, num_kv_heads)
    return out_RKGH.reshape(num_rows, num_heads, head_dim)


def _count_blocks(kv_len_R, window: int | None, block_tokens: int):
    """Blocks of each row that hold tokens it attends to."""
    num_blocks_R = (kv_len_R + block_tokens - 1) // block_tokens
    if window is not None:
        num_blocks_R -= jnp.maximum(kv_len_R - window, 0) // block_tokens
    return num_blocks_R


def _find_blocks(item_E, first_R, end_R, kv_len_R, window: int | None, block_tokens: int):
    """Row and first position of each item of the block list, the tokens from there on, and which are seen.

    Items behind the end of the list are of length 0.
    """
    num_items = end_R[-1]
    # Compared with all: a binary search is a loop of its own inside the loop.
    row_E = jnp.sum(item_E[:, None] >= end_R[None, :], axis=1, dtype=jnp.int32)
    row_E = jnp.minimum(row_E, len(end_R) - 1)
    first_E = jnp.where(item_E < num_items, item_E - first_R[row_E], 0) * block_tokens
    behind_E = 0
    if window is not None:
        behind_E = jnp.maximum(kv_len_R[row_E] - window, 0)
        first_E += behind_E // block_tokens * block_tokens
    len_E = jnp.where(item_E < num_items, kv_len_R[row_E] - first_E, 0)
    live_EB = jnp.arange(block_tokens) < len_E[:, None]
    if window is not None:
        live_EB &= jnp.arange(block_tokens) >= (behind_E - first_E)[:, None]
    return row_E, first_E, len_E, live_EB


def _divide(sums, sinks_N: jax.Array | None):
    """Weighted sums over the sums of weights, those of the sinks among them."""
    max_RKG, sum_RKG, out_RKGH = sums
    if sinks_N is not None:
        sink_KG = sinks_N.astype(jnp.float32).reshape(max_RKG.shape[1:])
        new_max_RKG = jnp.maximum(max_RKG, sink_KG)
        keep_RKG = jnp.exp(max_RKG - new_max_RKG)
        sum_RKG = sum_RKG * keep_RKG + jnp.exp(sink_KG - new_max_RKG)
        out_RKGH = out_RKGH * keep_RKG[..., None]
    return out_RKGH / jnp.maximum(sum_RKG, 1e-30)[..., None]


def _attend_blocks(q_EKGH, k_EKBH, v_EKBH, live_EB, soft_cap: float | None, kv: KVLayer):
    """Partial softmax of one block an item: maxima and sums [E, K, G], outputs [E, K, G, H]."""
    score_EKGB = einsum("ekgh,ekbh->ekgb", q_EKGH, k_EKBH)
    if soft_cap is not None:
        score_EKGB = soft_cap * jnp.tanh(score_EKGB / soft_cap)
    score_EKGB = jnp.where(live_EB[:, None, None, :], score_EKGB, MASKED)
    max_EKG = jnp.max(score_EKGB, axis=-1)
    p_EKGB = jnp.exp(score_EKGB - max_EKG[..., None])
    out_EKGH = einsum("ekgb,ekbh->ekgh", _as_operand(p_EKGB, kv), v_EKBH)
    return max_EKG, jnp.sum(p_EKGB, axis=-1), out_EKGH


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
) -> jax.Array:
    """Causal attention of C runs of query tokens, each behind its own prefix: [T, N, H] float32.

    Run c is q[token_C[c] : token_C[c] + len_C[c]], at positions kv_len_C[c] - len_C[c] onwards
    (bottom-right causal), and attends to its slot's pages. Runs must not overlap. Tokens of no run
    yield zeros. Flash attention over (query tile, KV block) pairs; blocks above the diagonal are not
    visited.

    With a `window`, a token sees itself and the window - 1 tokens before it; pages further back may hold
    anything. A `soft_cap` makes soft_cap * tanh(score / soft_cap) of a score (Gemma 2), a sink is the score
    of one more key, whose value is zero (gpt-oss).
    """
    num_tokens, num_heads, head_dim = q_TNH.shape
    num_kv_heads = kv.k_PSKH.shape[2]
    group = num_heads // num_kv_heads
    tile = min(PREFILL_TILE_TOKENS, num_tokens)
    end_C = jnp.cumsum((len_C + tile - 1) // tile)
    first_C = jnp.concatenate([jnp.zeros(1, end_C.dtype), end_C[:-1]])
    # One tile of slack behind the last token lets every tile be a whole slice. The output of a tile takes
    # the place of its queries: a buffer of its own would be cleared and copied for every layer.
    x_UNH = jnp.pad(q_TNH.astype(jnp.float32) * scale, ((0, tile), (0, 0), (0, 0)))

    def run_tile(index, x_UNH):
        c = jnp.sum(index >= end_C, dtype=jnp.int32)
        offset = (index - first_C[c]) * tile
        first_token = token_C[c] + offset
        q_tile_INH = jax.lax.dynamic_slice_in_dim(x_UNH, first_token, tile)
        q_KMH = q_tile_INH.reshape(tile, num_kv_heads, group, head_dim).transpose(1, 2, 0, 3)
        q_KMH = _as_operand(q_KMH.reshape(num_kv_heads, group * tile, head_dim), kv)
        pos_I = kv_len_C[c] - len_C[c] + offset + jnp.arange(tile)
        o_KMH = _attend_tile(q_KMH, kv, table_XW[slot_C[c]], pos_I, kv_len_C[c], window, soft_cap, sinks_N)
        o_INH = o_KMH.reshape(num_kv_heads, group, tile, head_dim).transpose(2, 0, 1, 3)
        o_INH = o_INH.reshape(tile, num_heads, head_dim)
        # The last tile of a run reaches into the next run's tokens: leave those as they are.
        live_I = offset + jnp.arange(tile) < len_C[c]
        o_INH = jnp.where(live_I[:, None, None], o_INH, q_tile_INH)
        return jax.lax.dynamic_update_slice_in_dim(x_UNH, o_INH, first_token, axis=0)

    x_UNH = jax.lax.fori_loop(0, end_C[-1], run_tile, x_UNH)
    token_T1 = jnp.arange(num_tokens)[:, None]
    live_T = jnp.any((token_T1 >= token_C) & (token_T1 < token_C + len_C), axis=1)
    return jnp.where(live_T[:, None, None], x_UNH[:num_tokens], 0.0)


def _attend_tile(q_KMH, kv: KVLayer, table_W, pos_I, kv_len, window, soft_cap, sinks_N):
    """One query tile against its pages: [K, M, H], M = G * tile rows ordered (group, token)."""
    num_kv_heads, rows, head_dim = q_KMH.shape
    page_size = kv.k_PSKH.shape[1]
    block_tokens = max(1, PREFILL_BLOCK_TOKENS // page_size) * page_size
    pos_M = jnp.tile(pos_I, rows // pos_I.shape[0])

    def attend_block(index, carry, *, is_masked: bool):
        max_1KM, sum_out_1KMH = carry
        first_1 = (index * block_tokens)[None]
        kv_pos_B = first_1 + jnp.arange(block_tokens)
        live_1B = None
        if is_masked:
            live_1B = (kv_pos_B < kv_len)[None]
            is_seen_MB = kv_pos_B[None, :] <= pos_M[:, None]
            if window is not None:
                live_1B &= kv_pos_B > pos_I[0] - window
                is_seen_MB &= kv_pos_B[None, :] > pos_M[:, None] - window
        row_1 = jnp.zeros(1, jnp.int32)
        k_1KBH, v_1KBH = _read_block(kv, table_W[None], row_1, first_1, block_tokens, live_1B)
        score_1KMB = einsum("ekmh,ekbh->ekmb", q_KMH[None], k_1KBH)
        if soft_cap is not None:
            score_1KMB = soft_cap * jnp.tanh(score_1KMB / soft_cap)
        if is_masked:
            score_1KMB = jnp.where(is_seen_MB[None, None], score_1KMB, MASKED)
        new_max_1KM = jnp.maximum(max_1KM, jnp.max(score_1KMB, axis=-1))
        p_1KMB = _as_operand(jnp.exp(score_1KMB - new_max_1KM[..., None]), kv)
        keep_1KM = jnp.exp(max_1KM - new_max_1KM)
        # A column of ones before V makes the product add up the probabilities, too.
        ones_v_1KBH = jnp.pad(v_1KBH, ((0, 0), (0, 0), (0, 0), (1, 0)), constant_values=1)
        new_1KMH = einsum("ekmb,ekbh->ekmh", p_1KMB, ones_v_1KBH)
        return new_max_1KM, sum_out_1KMH * keep_1KM[..., None] + new_1KMH

    max_1KM = jnp.full((1, num_kv_heads, rows), MASKED, jnp.float32)
    sum_out_1KMH = jnp.zeros((1, num_kv_heads, rows, 1 + head_dim), jnp.float32)
    if sinks_N is not None:  # the softmax begins with the sink
        sink_KG = sinks_N.astype(jnp.float32).reshape(num_kv_heads, -1)
        max_1KM = jnp.repeat(sink_KG, pos_I.shape[0], axis=1)[None]
        sum_out_1KMH = sum_out_1KMH.at[..., 0].set(1.0)
    carry = (max_1KM, sum_out_1KMH)
    # Blocks that every query sees whole need no mask.
    whole_end = jnp.minimum(pos_I[0] + 1, kv_len) // block_tokens
    end = (jnp.minimum(pos_I[-1] + 1, kv_len) + block_tokens - 1) // block_tokens
    whole_first = 0
    if window is not None:
        first = jnp.maximum(pos_I[0] - window + 1, 0) // block_tokens
        whole_first = jnp.maximum(pos_I[-1] - window + block_tokens, 0) // block_tokens
        whole_end = jnp.maximum(whole_end, first)
        whole_first = jnp.minimum(whole_first, whole_end)
        carry = jax.lax.fori_loop(first, whole_first, partial(attend_block, is_masked=True), carry)
    carry = jax.lax.fori_loop(whole_first, whole_end, partial(attend_block, is_masked=False), carry)
    carry = jax.lax.fori_loop(whole_end, end, partial(attend_block, is_masked=True), carry)
    sum_out_KMH = carry[1][0]
    return sum_out_KMH[..., 1:] / jnp.maximum(sum_out_KMH[..., :1], 1e-30)


def _read_block(
    kv: KVLayer, table_RW, row_E, first_E, block_tokens: int, live_EB=None, is_bundled: bool = False
):
    """K and V of B tokens of row `row_E[e]` from position `first_E[e]` on, as operands: [E, K, B, H], which
    a product for each head wants, or bundled [E, 1, B, K * H], as they are stored.

    V is zero where `live_EB` has no token: stale pages may hold anything, and NaN times a probability of zero
    is NaN. Without `live_EB` there must be no such place.
    """
    page_size, num_kv_heads = kv.k_PSKH.shape[1:3]
    page_EJ = first_E[:, None] // page_size + jnp.arange(block_tokens // page_size)
    page_id_EJ = table_RW.at[row_E[:, None], page_EJ].get(mode="clip")
    heads_axis = 2 if is_bundled else 1
    sizes = [len(row_E), block_tokens]
    sizes.insert(heads_axis, num_kv_heads)

    def read(pool):
        x_EJSK = pool.at[page_id_EJ].get(mode="promise_in_bounds")
        if not is_bundled:  # reading is the only copy
            x_EJSK = jnp.moveaxis(x_EJSK, 3, 1)
        return x_EJSK.astype(_operand_dtype(kv)).reshape(*sizes, *pool.shape[3:])

    k_EKBH, v_EKBH = read(kv.k_PSKH), read(kv.v_PSKH)
    if kv.k_scale_PSKQ is not None and kv.v_scale_PSK is not None:
        k_scale_EKBQ = read(kv.k_scale_PSKQ)
        k_EKB2QI = k_EKBH.reshape(*k_EKBH.shape[:3], 2, k_scale_EKBQ.shape[3], -1)  # I pairs a scale
        k_EKBH = (k_EKB2QI * k_scale_EKBQ[..., None, :, None]).reshape(k_EKBH.shape)
        v_EKBH = v_EKBH * read(kv.v_scale_PSK)[..., None]
    if live_EB is not None:
        is_live = jnp.expand_dims(live_EB, (heads_axis, 3))
        v_EKBH = jnp.where(is_live, v_EKBH, jnp.zeros((), v_EKBH.dtype))
    if is_bundled:
        return tuple(x_EBKH.reshape(len(row_E), 1, block_tokens, -1) for x_EBKH in (k_EKBH, v_EKBH))
    return k_EKBH, v_EKBH


def _bundle_queries(q_RKGH):
    """Queries as if all KV heads were one of width K * H, zero where it is not theirs: [R, 1, K * G, K * H].

    Their products with K and V are K times the work, K - 1 of it with zeros, and save copying both head by
    head: with two KV heads the CPU attends in 0.5 to 0.7 of the time.
    """
    num_rows, num_kv_heads, group, head_dim = q_RKGH.shape
    own_KK = jnp.eye(num_kv_heads, dtype=q_RKGH.dtype)
    q_RKGKH = q_RKGH[:, :, :, None, :] * own_KK[None, :, None, :, None]
    return q_RKGKH.reshape(num_rows, 1, num_kv_heads * group, num_kv_heads * head_dim)


def _unbundle(out_R1NW, num_kv_heads: int):
    """Of each query's output the part of its own KV head: [R, K, G, H]."""
    num_rows, _, num_heads, width = out_R1NW.shape
    group, head_dim = num_heads // num_kv_heads, width // num_kv_heads
    out_RKGKH = out_R1NW.reshape(num_rows, num_kv_heads, group, num_kv_heads, head_dim)
    return jnp.stack([out_RKGKH[:, k, :, k] for k in range(num_kv_heads)], axis=1)


def _operand_dtype(kv: KVLayer):
    return jnp.bfloat16 if kv.k_PSKH.dtype == jnp.bfloat16 else jnp.float32


def _as_operand(x, kv: KVLayer):
    return to_bf16(x) if _operand_dtype(kv) == jnp.bfloat16 else x
