"""Heads of few tokens within a TPU's kernels: out of a projection's channels, rotated; as words of the pool
and as attention's queries; and attention's outputs back into channels.

The numbers and orders are those that tpu.py and tpu_queries.py would give.

Letters: F channels of all heads, q before k before v, I = H / 2, J rows of a token in the pool, L = 128
lanes; U, A and M of tpu_queries.py, and Z rows of lanes: T * U * A * M of queries, T * J of words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.kernels_pallas.kv_pages import LANES, PagesLayout
from jaxserve.kernels_pallas.paged_attention.tpu_queries import count_unit_rows


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Weights of the rms norm of each head of q and of k, [1, H]."""

    q_1H: jax.Array
    k_1H: jax.Array
    num_heads: int  # of q
    eps: float


@dataclass(frozen=True, slots=True)
class Heads:
    """A block's heads, cut out of its channels. Those of q and k are normed before they are turned, if there
    are `norms`."""

    qkv_TF: Any
    cos_TI: jax.Array
    sin_TI: jax.Array
    head_dim: int
    norms: HeadNorms | None = None

    def read(self, head: int, place: int, *, is_turned: bool) -> list[jax.Array]:
        """Its chunks, float32 [T, L], turned or as they are. One that shares a chunk with others comes in the
        lanes of its `place`, between zeros."""
        if self.head_dim >= LANES:
            first = head * self.head_dim
            chunks = [self._load(first + i) for i in range(0, self.head_dim, LANES)]
            return self._turn(self._normalize(chunks, head)) if is_turned else chunks
        together = LANES // self.head_dim
        chunks = [self._load(head // together * LANES)]
        (x_TL,) = self._turn(self._normalize(chunks, head)) if is_turned else chunks
        shift = (place - head % together) * self.head_dim % LANES
        x_TL = pltpu.roll(x_TL, shift, 1) if shift else x_TL
        return [jnp.where(_lanes(x_TL) // self.head_dim == place, x_TL, 0.0)]

    def _load(self, first: int) -> jax.Array:
        width = min(LANES, self.qkv_TF.shape[1] - first)
        x_TL = self.qkv_TF[:, first : first + width].astype(jnp.float32)
        return x_TL if width == LANES else jnp.pad(x_TL, ((0, 0), (0, LANES - width)))

    def _normalize(self, chunks: list[jax.Array], head: int) -> list[jax.Array]:
        """Of a chunk that heads share the lanes of this one; what is in the others means nothing then."""
        norms = self.norms
        if norms is None:
            return chunks
        weight_1H = norms.q_1H if head < norms.num_heads else norms.k_1H
        squares = [x_TL * x_TL for x_TL in chunks]
        if self.head_dim < LANES:
            together = LANES // self.head_dim
            weight_1H = jnp.concatenate([weight_1H] * together, axis=1)
            is_own_TL = _lanes(squares[0]) // self.head_dim == head % together
            squares = [jnp.where(is_own_TL, squares[0], 0.0)]
        sum_T1 = sum(jnp.sum(x_TL, axis=1, keepdims=True) for x_TL in squares)
        scale_T1 = jax.lax.rsqrt(sum_T1 / self.head_dim + norms.eps)
        return [x_TL * scale_T1 * weight_1H[:, i * LANES :][:, :LANES] for i, x_TL in enumerate(chunks)]

    def _turn(self, chunks: list[jax.Array]) -> list[jax.Array]:
        """Pairs (i, i + H / 2): of two chunks, or within the heads of one."""
        if len(chunks) == 2:
            first, second = chunks
            cos, sin = self.cos_TI, self.sin_TI
            return [first * cos - second * sin, second * cos + first * sin]
        (x_TL,) = chunks
        half = self.head_dim // 2
        cos_TL, sin_TL = (jnp.concatenate([x] * (LANES // half), axis=1) for x in (self.cos_TI, self.sin_TI))
        is_first_TL = _lanes(x_TL) % self.head_dim < half
        partner_TL = jnp.where(is_first_TL, -pltpu.roll(x_TL, LANES - half, 1), pltpu.roll(x_TL, half, 1))
        return [x_TL * cos_TL + partner_TL * sin_TL]


def _lanes(x_TL: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, x_TL.shape, 1)


def spread_queries(heads: Heads, q_ZL: Any, num_heads: int, layout: PagesLayout) -> None:
    """Each head of q into its row of every token, and zeros into those that are nobody's."""
    unit_rows = count_unit_rows(num_heads, layout)
    token_rows = layout.num_chunks * unit_rows
    num_tokens = q_ZL.shape[0] // token_rows
    group = num_heads // layout.num_kv_heads
    left = set(range(token_rows))
    for head in range(num_heads):
        unit, place = divmod(head // group, layout.heads_per_unit)
        for chunk, x_TL in enumerate(heads.read(head, place, is_turned=True)):
            first_row = (unit * layout.chunks_per_unit + chunk) * unit_rows
            row = first_row + place * group + head % group
            q_ZL[pl.ds(row, num_tokens, stride=token_rows), :] = x_TL
            left.remove(row)
    for row in left:
        q_ZL[pl.ds(row, num_tokens, stride=token_rows), :] = jnp.zeros((num_tokens, LANES), jnp.float32)


def pack_words(heads: Heads, words_Z1L: Any, num_heads: int, layout: PagesLayout) -> None:
    """K into the low halves of words and V into the high ones, chunk by chunk, as `pack_tokens` does."""
    chunks: dict[int, tuple[jax.Array, jax.Array]] = {}
    for kv_head in range(layout.num_kv_heads):
        unit, place = divmod(kv_head, layout.heads_per_unit)
        k = heads.read(num_heads + kv_head, place, is_turned=True)
        v = heads.read(num_heads + layout.num_kv_heads + kv_head, place, is_turned=False)
        for i, (k_TL, v_TL) in enumerate(zip(k, v, strict=True)):
            chunk = unit * layout.chunks_per_unit + i
            others = chunks.get(chunk, (jnp.zeros_like(k_TL), jnp.zeros_like(v_TL)))
            chunks[chunk] = (others[0] + k_TL, others[1] + v_TL)
    num_tokens = words_Z1L.shape[0] // layout.num_rows
    for row in range(layout.num_rows):
        words_TL = jnp.zeros((num_tokens, LANES), jnp.int32)
        if row in chunks:
            k_TL, v_TL = map(_round_to_bf16, chunks[row])
            words_TL = ((k_TL >> 16) & 0xFFFF) | (v_TL & -65536)
        words_Z1L[pl.ds(row, num_tokens, stride=layout.num_rows), 0, :] = words_TL


def collect_outputs(out_ZL: Any, out_TF: Any, num_heads: int, layout: PagesLayout) -> None:
    """What attention gives, in the order of `spread_queries`, head by head into the channels of o's input."""
    group, together = num_heads // layout.num_kv_heads, max(LANES // layout.head_dim, 1)
    unit_rows = count_unit_rows(num_heads, layout)
    token_rows = layout.num_chunks * unit_rows
    num_tokens = out_TF.shape[0]
    chunks: dict[int, jax.Array] = {}
    for head in range(num_heads):
        unit, place = divmod(head // group, layout.heads_per_unit)
        for chunk in range(layout.chunks_per_unit):
            first_row = (unit * layout.chunks_per_unit + chunk) * unit_rows
            row = first_row + place * group + head % group
            x_TL = out_ZL[pl.ds(row, num_tokens, stride=token_rows), :]
            target = (head * layout.chunks_per_unit + chunk) // together
            if together > 1:  # of its lanes its own count
                shift = (head % together - place) * layout.head_dim % LANES
                x_TL = pltpu.roll(x_TL, shift, 1) if shift else x_TL
                own_TL = _lanes(x_TL) // layout.head_dim == head % together
                x_TL = jnp.where(own_TL, x_TL, chunks.get(target, 0.0))
            chunks[target] = x_TL
    for target, x_TL in chunks.items():
        out_TF[:, target * LANES : (target + 1) * LANES] = x_TL.astype(out_TF.dtype)


def _round_to_bf16(x_TL: jax.Array) -> jax.Array:
    """Bits whose upper half is the nearest bf16, even on ties."""
    bits_TL = jax.lax.bitcast_convert_type(x_TL, jnp.int32)
    return bits_TL + 0x7FFF + ((bits_TL >> 16) & 1)
