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
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

DECODE_BLOCK_TOKENS = 64
PREFILL_BLOCK_TOKENS = 128
PREFILL_TILE_TOKENS = 64
HIGHEST = jax.lax.Precision.HIGHEST  # float32 products, also where the hardware would round
MASKED = -1e30  # finite, so that a fully masked block gives exp(0) * 0 and never NaN


def paged_decode(
    q_RNH: jax.Array,
    k_PSKH: jax.Array,
    v_PSKH: jax.Array,
    table_XW: jax.Array,
    slot_R: jax.Array,
    kv_len_R: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """Attention of one query a row to the first kv_len tokens of its slot's pages: [R, N, H] float32.

    Split-KV in the manner of flash decoding: every block yields a partial (max, sum, output), and the
    partials of a row are combined by their maxima. All arithmetic is float32.
    """
    num_rows, num_heads, head_dim = q_RNH.shape
    page_size, num_kv_heads = k_PSKH.shape[1:3]
    group = num_heads // num_kv_heads
    pages_per_block = max(1, DECODE_BLOCK_TOKENS // page_size)
    block_tokens = pages_per_block * page_size
    items_per_trip = 4 if num_rows <= 2 else 16  # E: measured on the CPU, see benchmarks/
    q_RKGH = q_RNH.reshape(num_rows, num_kv_heads, group, head_dim).astype(jnp.float32) * scale
    end_R = jnp.cumsum((kv_len_R + block_tokens - 1) // block_tokens)
    first_R = jnp.concatenate([jnp.zeros(1, end_R.dtype), end_R[:-1]])
    num_items = end_R[-1]

    def trip(carry):
        index, max_RKG, sum_RKG, out_RKGH = carry
        item_E = index * items_per_trip + jnp.arange(items_per_trip, dtype=jnp.int32)
        live_E = item_E < num_items
        row_E = jnp.minimum(jnp.searchsorted(end_R, item_E, side="right"), num_rows - 1)
        block_E = jnp.where(live_E, item_E - first_R[row_E], 0)
        k_EBKH, v_EBKH = _read_block(k_PSKH, v_PSKH, table_XW, slot_R[row_E], block_E, pages_per_block)
        pos_EB = block_E[:, None] * block_tokens + jnp.arange(block_tokens)
        live_EB = live_E[:, None] & (pos_EB < kv_len_R[row_E][:, None])
        v_EBKH = jnp.where(live_EB[:, :, None, None], v_EBKH, 0.0)  # stale pages may hold anything
        score_EKGB = jnp.einsum("ekgh,ebkh->ekgb", q_RKGH[row_E], k_EBKH, precision=HIGHEST)
        score_EKGB = jnp.where(live_EB[:, None, None, :], score_EKGB, MASKED)
        max_EKG = jnp.max(score_EKGB, axis=-1)
        p_EKGB = jnp.where(live_EB[:, None, None, :], jnp.exp(score_EKGB - max_EKG[..., None]), 0.0)
        out_EKGH = jnp.einsum("ekgb,ebkh->ekgh", p_EKGB, v_EBKH, precision=HIGHEST)
        new_max_RKG = max_RKG.at[row_E].max(max_EKG)
        keep_RKG = jnp.exp(max_RKG - new_max_RKG)
        weight_EKG = jnp.where(live_E[:, None, None], jnp.exp(max_EKG - new_max_RKG[row_E]), 0.0)
        sum_RKG = (sum_RKG * keep_RKG).at[row_E].add(jnp.sum(p_EKGB, axis=-1) * weight_EKG)
        out_RKGH = (out_RKGH * keep_RKG[..., None]).at[row_E].add(out_EKGH * weight_EKG[..., None])
        return index + 1, new_max_RKG, sum_RKG, out_RKGH

    start = (
        jnp.int32(0),
        jnp.full((num_rows, num_kv_heads, group), MASKED, jnp.float32),
        jnp.zeros((num_rows, num_kv_heads, group), jnp.float32),
        jnp.zeros((num_rows, num_kv_heads, group, head_dim), jnp.float32),
    )
    _, _, sum_RKG, out_RKGH = jax.lax.while_loop(lambda c: c[0] * items_per_trip < num_items, trip, start)
    out_RKGH = out_RKGH / jnp.maximum(sum_RKG, 1e-30)[..., None]
    return out_RKGH.reshape(num_rows, num_heads, head_dim)


def paged_prefill(
    q_TNH: jax.Array,
    k_PSKH: jax.Array,
    v_PSKH: jax.Array,
    table_XW: jax.Array,
    slot_C: jax.Array,
    token_C: jax.Array,
    len_C: jax.Array,
    kv_len_C: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """Causal attention of C runs of query tokens, each behind its own prefix: [T, N, H] float32.

    Run c is q[token_C[c] : token_C[c] + len_C[c]], at positions kv_len_C[c] - len_C[c] onwards
    (bottom-right causal), and attends to its slot's pages. Runs must not overlap. Tokens of no run
    yield zeros. Flash attention over (query tile, KV block) pairs; blocks above the diagonal are not
    visited. All arithmetic is float32.
    """
    num_tokens, num_heads, head_dim = q_TNH.shape
    num_kv_heads = k_PSKH.shape[2]
    group = num_heads // num_kv_heads
    tile = min(PREFILL_TILE_TOKENS, num_tokens)
    end_C = jnp.cumsum((len_C + tile - 1) // tile)
    first_C = jnp.concatenate([jnp.zeros(1, end_C.dtype), end_C[:-1]])
    # One tile of slack behind the last token lets every tile be a whole slice.
    q_UNH = jnp.pad(q_TNH.astype(jnp.float32) * scale, ((0, tile), (0, 0), (0, 0)))

    def run_tile(index, out_UNH):
        c = jnp.searchsorted(end_C, index, side="right")
        offset = (index - first_C[c]) * tile
        first_token = token_C[c] + offset
        q_tile_INH = jax.lax.dynamic_slice_in_dim(q_UNH, first_token, tile)
        q_KMH = q_tile_INH.reshape(tile, num_kv_heads, group, head_dim).transpose(1, 2, 0, 3)
        q_KMH = q_KMH.reshape(num_kv_heads, group * tile, head_dim)
        pos_I = kv_len_C[c] - len_C[c] + offset + jnp.arange(tile)
        o_KMH = _attend_tile(q_KMH, k_PSKH, v_PSKH, table_XW[slot_C[c]], pos_I, kv_len_C[c])
        o_INH = o_KMH.reshape(num_kv_heads, group, tile, head_dim).transpose(2, 0, 1, 3)
        o_INH = o_INH.reshape(tile, num_heads, head_dim)
        # The last tile of a run reaches into the next run's tokens: leave those as they are.
        live_I = offset + jnp.arange(tile) < len_C[c]
        old_INH = jax.lax.dynamic_slice_in_dim(out_UNH, first_token, tile)
        o_INH = jnp.where(live_I[:, None, None], o_INH, old_INH)
        return jax.lax.dynamic_update_slice_in_dim(out_UNH, o_INH, first_token, axis=0)

    out_UNH = jnp.zeros((num_tokens + tile, num_heads, head_dim), jnp.float32)
    out_UNH = jax.lax.fori_loop(0, end_C[-1], run_tile, out_UNH)
    return out_UNH[:num_tokens]


def _attend_tile(q_KMH, k_PSKH, v_PSKH, table_W, pos_I, kv_len):
    """One query tile against its pages: [K, M, H], M = G * tile rows ordered (group, token)."""
    num_kv_heads, rows, head_dim = q_KMH.shape
    pages_per_block = max(1, PREFILL_BLOCK_TOKENS // k_PSKH.shape[1])
    block_tokens = pages_per_block * k_PSKH.shape[1]
    last_pos = jnp.minimum(pos_I[-1] + 1, kv_len)
    pos_M = jnp.tile(pos_I, rows // pos_I.shape[0])

    def attend_block(block, carry):
        max_KM, sum_KM, out_KMH = carry
        zero_1 = jnp.zeros(1, jnp.int32)
        k_1BKH, v_1BKH = _read_block(k_PSKH, v_PSKH, table_W[None], zero_1, block[None], pages_per_block)
        kv_pos_B = block * block_tokens + jnp.arange(block_tokens)
        v_BKH = jnp.where((kv_pos_B < kv_len)[:, None, None], v_1BKH[0], 0.0)
        score_KMB = jnp.einsum("kmh,bkh->kmb", q_KMH, k_1BKH[0], precision=HIGHEST)
        score_KMB = jnp.where(kv_pos_B[None, None, :] <= pos_M[None, :, None], score_KMB, MASKED)
        new_max_KM = jnp.maximum(max_KM, jnp.max(score_KMB, axis=-1))
        p_KMB = jnp.exp(score_KMB - new_max_KM[..., None])
        keep_KM = jnp.exp(max_KM - new_max_KM)
        sum_KM = sum_KM * keep_KM + jnp.sum(p_KMB, axis=-1)
        out_KMH = out_KMH * keep_KM[..., None] + jnp.einsum("kmb,bkh->kmh", p_KMB, v_BKH, precision=HIGHEST)
        return new_max_KM, sum_KM, out_KMH

    start = (
        jnp.full((num_kv_heads, rows), MASKED, jnp.float32),
        jnp.zeros((num_kv_heads, rows), jnp.float32),
        jnp.zeros((num_kv_heads, rows, head_dim), jnp.float32),
    )
    num_blocks = (last_pos + block_tokens - 1) // block_tokens
    _, sum_KM, out_KMH = jax.lax.fori_loop(0, num_blocks, attend_block, start)
    return out_KMH / jnp.maximum(sum_KM, 1e-30)[..., None]


def _read_block(k_PSKH, v_PSKH, table_XW, slot_E, block_E, pages_per_block):
    """K and V of block `block_E[e]` of slot `slot_E[e]`, float32 [E, B, K, H]."""
    page_EJ = block_E[:, None] * pages_per_block + jnp.arange(pages_per_block)
    page_id_EJ = table_XW.at[slot_E[:, None], page_EJ].get(mode="clip")
    shape_EBKH = (slot_E.shape[0], pages_per_block * k_PSKH.shape[1], *k_PSKH.shape[2:])
    k_EBKH = k_PSKH.at[page_id_EJ].get(mode="clip").reshape(shape_EBKH)
    v_EBKH = v_PSKH.at[page_id_EJ].get(mode="clip").reshape(shape_EBKH)
    return k_EBKH.astype(jnp.float32), v_EBKH.astype(jnp.float32)
