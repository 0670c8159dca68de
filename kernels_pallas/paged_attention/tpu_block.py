"""Attention of some queries to one block of tokens, on values that a TPU core has at hand.

Shared by the kernels of decode and prefill. Words are unpacked by shifts, and what a block holds beside the
tokens that are seen is cleared, whatever it is. Operands are bf16, in which whole numbers of int8 are exact,
and sums float32. Knows no scales of int8 (tpu_scales.py).

Letters: M query rows, B tokens of a block, L = 128 lanes; a unit of KV heads has one or two chunks of lanes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxserve.kernels_pallas.kv_pages import PagesLayout

MASKED = -1e30  # finite, so that what sees nothing gives exp(0) and never NaN


class Partial(NamedTuple):
    """The softmax of some rows over some tokens: largest scores, sums of weights, weighted sums by chunk. The
    first two are the same in all lanes, which no arithmetic of theirs has to spread again."""

    max_ML: jax.Array
    sum_ML: jax.Array
    out_ML: list[jax.Array]


def load_units(
    words_ref: Any, first_unit: Any, num_units: int, live_B1: jax.Array, layout: PagesLayout
) -> list[list[tuple[jax.Array, jax.Array]]]:
    """K and V of units, chunk by chunk, float32 [B, L]; of int8 without their scales, of the others zero where
    not live.

    The reference is to all rows of a block, token by token. `first_unit` may be traced where it begins a row.
    """
    per_unit, per_row = layout.chunks_per_unit, layout.chunks_per_row
    num_chunks = num_units * per_unit
    first_row = first_unit * per_unit // per_row
    skipped = 0 if per_row == 1 or not isinstance(first_unit, int) else first_unit * per_unit % per_row
    chunks: list[Any] = []
    for row in range(-(-(skipped + num_chunks) // per_row)):
        words_BL = load_rows(words_ref, first_row + row, layout.num_rows, live_B1.shape[0])
        if layout.kv_dtype != "int8":  # which has no NaN
            words_BL = jnp.where(live_B1, words_BL, 0)
        chunks += _unpack(words_BL, layout.kv_dtype)
    chunks = chunks[skipped : skipped + num_chunks]
    return [chunks[i * per_unit : (i + 1) * per_unit] for i in range(num_units)]


def load_rows(ref: Any, row: Any, rows_per_token: int, num_tokens: int) -> jax.Array:
    """One row of every token, int32 [B, L]."""
    return ref[pl.ds(row, num_tokens, stride=rows_per_token), :]


def attend(
    score_MB: jax.Array,
    v_BL: list[jax.Array],
    is_seen_MB: jax.Array,
    soft_cap: float | None,
    v_scale_MB: jax.Array | None = None,
) -> Partial:
    """Scores of queries against one unit, and its V chunk by chunk, each token of it times a scale."""
    if soft_cap is not None:
        score_MB = soft_cap * jnp.tanh(score_MB / soft_cap)
    score_MB = jnp.where(is_seen_MB, score_MB, MASKED)
    max_M1 = jnp.max(score_MB, axis=1, keepdims=True)
    p_MB = jnp.exp(score_MB - max_M1)
    sum_M1 = jnp.sum(p_MB, axis=1, keepdims=True)
    if v_scale_MB is not None:
        p_MB = jnp.where(is_seen_MB, p_MB * v_scale_MB, 0.0)
    p_MB = p_MB.astype(jnp.bfloat16)
    out_ML = [product(p_MB, x_BL, 0) for x_BL in v_BL]
    max_ML, sum_ML = (jnp.broadcast_to(x_M1, out_ML[0].shape) for x_M1 in (max_M1, sum_M1))
    return Partial(max_ML, sum_ML, out_ML)


def score(q_ML: list[jax.Array], k_BL: list[jax.Array]) -> jax.Array:
    """Queries, scaled, by K of one unit, both chunk by chunk: float32 [M, B]."""
    products = [product(q, k, 1) for q, k in zip(q_ML, k_BL, strict=True)]
    return sum(products[1:], products[0])


def merge(one: Partial, other: Partial) -> Partial:
    """The softmax over the tokens of both."""
    max_ML = jnp.maximum(one.max_ML, other.max_ML)
    keep_ML, add_ML = jnp.exp(one.max_ML - max_ML), jnp.exp(other.max_ML - max_ML)
    return Partial(
        max_ML,
        one.sum_ML * keep_ML + other.sum_ML * add_ML,
        [a * keep_ML + b * add_ML for a, b in zip(one.out_ML, other.out_ML, strict=True)],
    )


def see(position_M1: jax.Array, first_token: jax.Array, num_tokens: int, window: int | None) -> jax.Array:
    """Which of the tokens from `first_token` on queries at these positions attend to: [M, B]."""
    token_MB = first_token + jax.lax.broadcasted_iota(jnp.int32, (position_M1.shape[0], num_tokens), 1)
    is_seen_MB = token_MB <= position_M1
    if window is not None:
        is_seen_MB &= token_MB > position_M1 - window
    return is_seen_MB


def find_live(
    kv_len: jax.Array, position: jax.Array, first_token: jax.Array, num_tokens: int, window: int | None
) -> jax.Array:
    """Which tokens of a block any query from `position` on sees: [B, 1]. Others may hold anything."""
    token_B1 = first_token + jax.lax.broadcasted_iota(jnp.int32, (num_tokens, 1), 0)
    is_live_B1 = token_B1 < kv_len
    if window is not None:
        is_live_B1 &= token_B1 > position - window
    return is_live_B1


def product(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """a [M, X] by an axis of b, of bf16, float32."""
    dimensions = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _unpack(words_BL: jax.Array, kv_dtype: str) -> list[tuple[jax.Array, jax.Array]]:
    """K and V of the chunks of a row, float32."""
    if kv_dtype == "bfloat16":
        return [unpack_halves(words_BL)]
    unpack = _unpack_int8 if kv_dtype == "int8" else _unpack_fp8
    return [(unpack(words_BL, byte), unpack(words_BL, byte + 2)) for byte in range(2)]


def unpack_halves(words_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The low and the high 16 bits of words: a bf16 is the upper half of a float32."""
    return _as_float(words_BL << 16), _as_float(words_BL & -65536)


def _unpack_int8(words_BL: jax.Array, byte: int) -> jax.Array:
    return ((words_BL << (24 - 8 * byte)) >> 24).astype(jnp.float32)


def _unpack_fp8(words_BL: jax.Array, byte: int) -> jax.Array:
    """e4m3fn: a sign, 4 bits of exponent with a bias of 7, 3 of mantissa; no infinities, one NaN."""
    bits_BL = words_BL >> (8 * byte)
    size_BL = bits_BL & 0x7F
    normal_BL = _as_float((size_BL << 20) + (120 << 23))
    small_BL = size_BL.astype(jnp.float32) * 2.0**-9  # TPUs have no subnormal float32 to begin with
    value_BL = jnp.where(size_BL < 8, small_BL, normal_BL)
    value_BL = jnp.where(size_BL == 0x7F, jnp.nan, value_BL)
    return jnp.where((bits_BL & 0x80) != 0, -value_BL, value_BL)


def _as_float(words: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(words, jnp.float32)
