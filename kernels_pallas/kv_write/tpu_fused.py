"""RoPE and KV write of a bf16 pool on a TPU, in one Pallas kernel: from a projection's channels to the pool.

XLA makes six small operations of it, each of a microsecond by its own reckoning: heads cut apart, rotated,
packed into words, queries ordered and padded. Here a block of tokens has its heads rotated in registers,
words of K and V leave VMEM for their places (move_rows of tpu.py), and queries leave in the order in which
the attention kernels want them. The numbers are those that tpu.py and tpu_queries.py would give.

Letters: F channels of all heads, q before k before v, I = H / 2, J rows of a token in the pool, L = 128
lanes; U, A and M of tpu_queries.py, and Z = T * U * A * M rows of queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.kernels_pallas.kv_pages import LANES, KVPages, PagesLayout
from jaxserve.kernels_pallas.kv_write.move_rows import move_rows
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
    places = kv.words_PSJL.reshape(-1, layout.num_rows, LANES)
    written_bytes = 4 * LANES * num_tokens * (token_rows + layout.num_rows)

    def body(index_T, first_page_1, qkv_TF, cos_T1I, sin_T1I, _pool, pool, q_ZL, words_TJL, moved):
        heads = _Heads(qkv_TF, cos_T1I[:, 0], sin_T1I[:, 0], layout.head_dim)
        _order_queries(heads, q_ZL, num_heads, unit_rows, layout)
        _pack_words(heads, words_TJL, num_heads, layout)
        first_token = pl.program_id(0) * block_tokens
        first_place = first_page_1[0] * page_size
        move_rows([words_TJL], [pool], moved, index_T, first_token, first_place, page_size)

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    table = pl.BlockSpec((block_tokens, 1, cos_T1I.shape[2]), lambda i, *_: (i, 0, 0))
    words, q_ZL = pl.pallas_call(
        body,
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
                pltpu.VMEM((block_tokens, layout.num_rows, LANES), jnp.int32),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(places.shape, places.dtype),
            jax.ShapeDtypeStruct((num_tokens * token_rows, LANES), jnp.float32),
        ],
        input_output_aliases={5: 0},
        cost_estimate=pl.CostEstimate(6 * qkv_TF.size, 0, bytes_accessed=qkv_TF.nbytes + written_bytes),
        name="kv_write",
        interpret=interpret,
    )(write_index_T, first_page_1, qkv_TF, cos_T1I, sin_T1I, places)
    q_TUAML = q_ZL.reshape(num_tokens, layout.num_units, layout.chunks_per_unit, unit_rows, LANES)
    return UnitQueries(q_TUAML, num_heads), KVPages(words.reshape(kv.words_PSJL.shape), None, layout)


@dataclass(frozen=True, slots=True)
class _Heads:
    """A block's heads, cut out of its channels."""

    qkv_TF: Any
    cos_TI: jax.Array
    sin_TI: jax.Array
    head_dim: int

    def read(self, head: int, place: int, *, is_turned: bool) -> list[jax.Array]:
        """Its chunks, float32 [T, L], turned or as they are. One that shares a chunk with others comes in the
        lanes of its `place`, between zeros."""
        if self.head_dim >= LANES:
            first = head * self.head_dim
            chunks = [self._load(first + i) for i in range(0, self.head_dim, LANES)]
            return self._turn(chunks) if is_turned else chunks
        together = LANES // self.head_dim
        chunks = [self._load(head // together * LANES)]
        (x_TL,) = self._turn(chunks) if is_turned else chunks
        shift = (place - head % together) * self.head_dim % LANES
        x_TL = pltpu.roll(x_TL, shift, 1) if shift else x_TL
        return [jnp.where(_lanes(x_TL) // self.head_dim == place, x_TL, 0.0)]

    def _load(self, first: int) -> jax.Array:
        width = min(LANES, self.qkv_TF.shape[1] - first)
        x_TL = self.qkv_TF[:, first : first + width].astype(jnp.float32)
        return x_TL if width == LANES else jnp.pad(x_TL, ((0, 0), (0, LANES - width)))

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


def _order_queries(heads: _Heads, q_ZL: Any, num_heads: int, unit_rows: int, layout: PagesLayout) -> None:
    """Each head into its row of every token, and zeros into those that are nobody's."""
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


def _pack_words(heads: _Heads, words_TJL: Any, num_heads: int, layout: PagesLayout) -> None:
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
    for row in range(layout.num_rows):
        if row in chunks:
            k_TL, v_TL = map(_round_to_bf16, chunks[row])
            words_TJL[:, row, :] = ((k_TL >> 16) & 0xFFFF) | (v_TL & -65536)
        else:
            words_TJL[:, row, :] = jnp.zeros((words_TJL.shape[0], LANES), jnp.int32)


def _round_to_bf16(x_TL: jax.Array) -> jax.Array:
    """Bits whose upper half is the nearest bf16, even on ties."""
    bits_TL = jax.lax.bitcast_convert_type(x_TL, jnp.int32)
    return bits_TL + 0x7FFF + ((bits_TL >> 16) & 1)
