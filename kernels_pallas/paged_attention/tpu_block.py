"""Attention of some queries to one block of tokens, on values that a TPU core has at hand.

Shared by the kernels of decode and prefill. Words are unpacked by shifts, and what a block holds beside the
tokens that are seen is cleared, whatever it is. Operands are bf16, in which whole numbers of int8 are exact,
and sums float32. Knows no scales of int8 (tpu_scales.py).

Letters: M query rows, B tokens of a block, L = 128 lanes; a unit of KV heads has one or two chunks of lanes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.kernels_pallas.kv_pages import PagesLayout

MASKED = -1e30  # finite, so that what sees nothing gives exp(0) and never NaN


class Partial(NamedTuple):
    """The softmax of some rows over some tokens: largest scores, sums of weights, weighted sums by chunk. The
    first two are the same in all lanes, which no arithmetic of theirs has to spread again."""

    max_ML: jax.Array
    sum_ML: jax.Array
    out_ML: list[jax.Array]


@dataclass(frozen=True, slots=True)
class Words:
    """The words of a block, and how they are read."""

    rows: Any  # a reference to all rows, token by token
    layout: PagesLayout
    adds_bf16: bool  # whether the chip does

    def load_k(self, first_unit: Any, num_units: int) -> list[list[jax.Array]]:
        """Of units, chunk by chunk, float32 or bf16 [B, L], in the order of `find_tokens`; of int8 without
        scales. `first_unit` may be traced where it begins a row.
        """
        return self._load(first_unit, num_units, is_v=False)

    def load_v(self, first_unit: Any, num_units: int, live_B1: jax.Array) -> list[list[jax.Array]]:
        """The same of V. Zero where not live, or finite at least: bytes are, whatever they hold."""
        return self._load(first_unit, num_units, is_v=True, live_B1=live_B1)

    def _load(self, first_unit, num_units: int, *, is_v: bool, live_B1: Any = None) -> list[list[jax.Array]]:
        layout = self.layout
        per_unit, per_row = layout.chunks_per_unit, layout.chunks_per_row
        num_chunks = num_units * per_unit
        first_row = first_unit * per_unit // per_row
        skipped = 0 if per_row == 1 or not isinstance(first_unit, int) else first_unit * per_unit % per_row
        num_tokens = self.rows.shape[0] // layout.num_rows
        chunks: list[jax.Array] = []
        for row in range(-(-(skipped + num_chunks) // per_row)):
            words_BL = load_rows(self.rows, first_row + row, layout.num_rows, num_tokens)
            if layout.kv_dtype == "bfloat16":
                words_BL = words_BL if live_B1 is None else jnp.where(live_B1, words_BL, 0)
                chunks.append(unpack_halves(words_BL)[is_v])
            elif layout.kv_dtype == "int8":
                chunks += [_unpack_int8(words_BL, byte + 2 * is_v) for byte in range(2)]
            else:
                chunks += _unpack_fp8(words_BL, is_v, self.adds_bf16)
        chunks = chunks[skipped : skipped + num_chunks]
        return [chunks[i * per_unit : (i + 1) * per_unit] for i in range(num_units)]


def load_rows(ref: Any, row: Any, rows_per_token: int, num_tokens: int) -> jax.Array:
    """One row of every token, int32 [B, L]."""
    return ref[pl.ds(row, num_tokens, stride=rows_per_token), :]


def score(q_ML: list[jax.Array], k_BL: list[jax.Array]) -> jax.Array:
    """Queries, scaled, by K of one unit, both chunk by chunk: float32 [M, B]."""
    products = [product(q, k, 1) for q, k in zip(q_ML, k_BL, strict=True)]
    return sum(products[1:], products[0])


class Weights(NamedTuple):
    """Of tokens, for some rows, and the largest of their scores and the sum of what scales are not in."""

    max_M1: jax.Array
    sum_M1: jax.Array
    p_MB: jax.Array  # bf16


def weigh(
    score_MB: jax.Array,
    is_seen_MB: jax.Array,
    soft_cap: float | None,
    v_scale_MB: jax.Array | None = None,
) -> Weights:
    """What scores give the tokens of a block, each times the scale of its V."""
    if soft_cap is not None:
        score_MB = soft_cap * jnp.tanh(score_MB / soft_cap)
    score_MB = jnp.where(is_seen_MB, score_MB, MASKED)
    max_M1 = jnp.max(score_MB, axis=1, keepdims=True)
    p_MB = jnp.exp(score_MB - max_M1)
    sum_M1 = jnp.sum(p_MB, axis=1, keepdims=True)
    if v_scale_MB is not None:
        p_MB = jnp.where(is_seen_MB, p_MB * v_scale_MB, 0.0)
    return Weights(max_M1, sum_M1, p_MB.astype(jnp.bfloat16))


def add_up(weights: Weights, v_BL: list[jax.Array]) -> Partial:
    """Chunk by chunk."""
    out_ML = [product(weights.p_MB, x_BL, 0) for x_BL in v_BL]
    max_ML, sum_ML = (jnp.broadcast_to(x_M1, out_ML[0].shape) for x_M1 in (weights.max_M1, weights.sum_M1))
    return Partial(max_ML, sum_ML, out_ML)


def merge(one: Partial, other: Partial) -> Partial:
    """The softmax over the tokens of both."""
    max_ML = jnp.maximum(one.max_ML, other.max_ML)
    keep_ML, add_ML = jnp.exp(one.max_ML - max_ML), jnp.exp(other.max_ML - max_ML)
    return Partial(
        max_ML,
        one.sum_ML * keep_ML + other.sum_ML * add_ML,
        [a * keep_ML + b * add_ML for a, b in zip(one.out_ML, other.out_ML, strict=True)],
    )


def see(
    position_M1: jax.Array, first_token: jax.Array, num_tokens: int, window: int | None, layout: PagesLayout
) -> jax.Array:
    """Which of the tokens from `first_token` on queries at these positions attend to: [M, B]."""
    index_MB = jax.lax.broadcasted_iota(jnp.int32, (position_M1.shape[0], num_tokens), 1)
    token_MB = first_token + find_tokens(index_MB, num_tokens, layout)
    is_seen_MB = token_MB <= position_M1
    if window is not None:
        is_seen_MB &= token_MB > position_M1 - window
    return is_seen_MB


def find_tokens(index: jax.Array, num_tokens: int, layout: PagesLayout) -> jax.Array:
    """The tokens of a block in the order of `Words`: of fp8 one of the first half, one of the second."""
    if layout.kv_dtype != "float8_e4m3fn":
        return index
    return (index >> 1) + (index & 1) * (num_tokens // 2)


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


def unpack_halves(words_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The low and the high 16 bits of words: a bf16 is the upper half of a float32."""
    return _as_float(words_BL << 16), _as_float(words_BL & -65536)


def _unpack_int8(words_BL: jax.Array, byte: int) -> jax.Array:
    return ((words_BL << (24 - 8 * byte)) >> 24).astype(jnp.float32)


def _unpack_fp8(words_BL: jax.Array, is_v: bool, adds_bf16: bool) -> list[jax.Array]:
    """Of e4m3fn: a sign, 4 bits of exponent with a bias of 7, 3 of mantissa. bf16, two tokens at a time.

    A NaN, which only a number beyond 448 leaves, counts as the 480 that its bits would be.
    """
    half = len(words_BL) // 2
    one, other = words_BL[:half], words_BL[half:]
    if is_v:
        halves = ((one >> 16) & 0xFFFF) | (other & -65536)
    else:
        halves = (one & 0xFFFF) | (other << 16)
    return [_widen_fp8(halves, byte, adds_bf16) for byte in range(2)]


def _widen_fp8(words: jax.Array, byte: int, adds_bf16: bool) -> jax.Array:
    """That byte of the two halves of each word."""
    size = words >> 4 if byte else words << 4
    size = (size & 0x07F007F0) + 0x3C003C00  # with the bias of bf16
    if adds_bf16:
        size = pltpu.bitcast(_lower_smallest(_as_bf16(size)), jnp.int32)
    else:
        low, high = (jax.lax.bitcast_convert_type(_lower_smallest(x), jnp.int32) for x in unpack_halves(size))
        size = (low >> 16) | high
    sign = words if byte else words << 8
    return _as_bf16(size | (sign & -0x7FFF8000))


def _lower_smallest(size: jax.Array) -> jax.Array:
    """The exponent 0 of e4m3fn has no hidden bit: what it was taken for is too much, others too little."""
    return jnp.minimum(size, size + size - jnp.asarray(2.0**-6, size.dtype))


def _as_bf16(words: jax.Array) -> jax.Array:
    """Two rows of each row of words, the one of low halves first."""
    return pltpu.bitcast(words, jnp.bfloat16)


def _as_float(words: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(words, jnp.float32)
