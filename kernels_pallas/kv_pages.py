"""One layer's part of the paged pool as the TPU's kernels read and write it: words of 32 bits, 128 a row.

A TPU moves tiles of 128 lanes, and a token must be a whole number of them, so that it can be written alone.
The K channels of a token, head by head, are cut into chunks of 128 lanes, its V channels likewise; a word
holds the same lane of a chunk of K and of V, in two halves, or of two chunks of each, in four bytes:

    bit     0              16              32              0       8       16      24      32
    bf16    | K of chunk j | V of chunk j |        bytes   | K 2j  | K 2j+1| V 2j  | V 2j+1|

One copy thus brings K and V of all heads of a page, and a kernel unpacks them by shifts. Heads narrower than
a chunk lie side by side in it and are attended to together, as a unit; a head of 256 is a unit of two chunks.
Values of int8 have scales in rows of their own: a bf16 for each 8 rotary pairs of K in the low half of a
word, the one of V's head in the high half. Rows are padded to a number that tiles have (1, 2, 4 or eights).

Made and read by the TPU forms of the kernels alone; everything else moves whole pages of whatever leaves
there are. Letters: J rows of a token, L = 128 lanes, A chunks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from jaxserve.kernels_pallas.kv_layer import PAIRS_PER_SCALE
from jaxserve.kernels_pallas.rounding import to_bf16

LANES = 128
SUBLANES = 8
SMALLEST_SCALE = 1e-14  # of what is all zeros


@dataclass(frozen=True, slots=True, kw_only=True)
class PagesLayout:
    """How heads lie in the rows of a token. On several devices: how one device's heads lie in its rows."""

    num_kv_heads: int
    head_dim: int  # 16 to 256, a power of two
    kv_dtype: str  # "bfloat16", "int8" or "float8_e4m3fn"

    @property
    def has_scales(self) -> bool:
        return self.kv_dtype == "int8"

    @property
    def heads_per_unit(self) -> int:
        return min(max(LANES // self.head_dim, 1), self.num_kv_heads)

    @property
    def chunks_per_unit(self) -> int:
        return max(self.head_dim // LANES, 1)

    @property
    def num_units(self) -> int:
        return math.ceil(self.num_kv_heads / self.heads_per_unit)

    @property
    def num_chunks(self) -> int:
        return self.num_units * self.chunks_per_unit

    @property
    def chunks_per_row(self) -> int:
        return 1 if self.kv_dtype == "bfloat16" else 2

    @property
    def num_rows(self) -> int:
        return _pad_rows(math.ceil(self.num_chunks / self.chunks_per_row))

    @property
    def scales_per_unit(self) -> int:
        return self.chunks_per_unit * LANES // (2 * PAIRS_PER_SCALE)

    @property
    def num_scale_rows(self) -> int:
        if not self.has_scales:
            return 0
        return _pad_rows(math.ceil(self.num_units / (LANES // self.scales_per_unit)))


@partial(jax.tree_util.register_dataclass, data_fields=["words_PSJL", "scales_PSJL"], meta_fields=["layout"])
@dataclass(frozen=True, slots=True)
class KVPages:
    """K and V of P * S tokens, int32; with the scales of int8, int32 as well. A pytree of its arrays.

    The axis of rows is that of the KV heads: what a mesh shards.
    """

    words_PSJL: jax.Array
    scales_PSJL: jax.Array | None
    layout: PagesLayout

    @property
    def head_dim(self) -> int:
        return self.layout.head_dim


def make_pages(num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, kv_dtype: str) -> KVPages:
    """Zeroed pages of one layer."""
    layout = PagesLayout(num_kv_heads=num_kv_heads, head_dim=head_dim, kv_dtype=kv_dtype)

    def rows(num_rows: int) -> jax.Array:
        return jnp.zeros((num_pages, page_size, num_rows, LANES), jnp.int32)

    return KVPages(rows(layout.num_rows), rows(layout.num_scale_rows) if layout.has_scales else None, layout)


def pack_tokens(
    k_TKH: jax.Array, v_TKH: jax.Array, layout: PagesLayout
) -> tuple[jax.Array, jax.Array | None]:
    """The rows of T tokens, int32 [T, J, L], and those of their scales.

    int8 values are rounded to 1/127 of the largest that shares their scale, and the scale to bf16 beforehand,
    so that no more is lost by it than the half step that a clipped largest value is off.
    """
    chunks = (_to_chunks(x_TKH, layout) for x_TKH in (k_TKH, v_TKH))
    if layout.kv_dtype == "bfloat16":
        k_TAL, v_TAL = (_bits(x_TAL.astype(jnp.bfloat16), 16) for x_TAL in chunks)
        return _pad_axis(_join([k_TAL, v_TAL], 16), layout.num_rows), None
    k_TAL, v_TAL = chunks
    scales = None
    if layout.has_scales:
        k_scale_TAL, v_scale_TAL = find_scales(k_TAL, v_TAL, layout)
        k_TAL, v_TAL = (
            jnp.clip(jnp.round(x_TAL.astype(jnp.float32) / scale_TAL.astype(jnp.float32)), -127, 127)
            for x_TAL, scale_TAL in ((k_TAL, k_scale_TAL), (v_TAL, v_scale_TAL))
        )
        packed = (_pack_scales(scale_TAL, layout) for scale_TAL in (k_scale_TAL, v_scale_TAL))
        scales = _join([_bits(scale_TJL, 16) for scale_TJL in packed], 16)
    dtype = jnp.dtype(layout.kv_dtype)
    k_TAL, v_TAL = (_bits(_pad_axis(x.astype(dtype), 2 * layout.num_rows), 8) for x in (k_TAL, v_TAL))
    return _join([k_TAL[:, ::2], k_TAL[:, 1::2], v_TAL[:, ::2], v_TAL[:, 1::2]], 8), scales


def find_scales(k_TAL: jax.Array, v_TAL: jax.Array, layout: PagesLayout) -> tuple[jax.Array, jax.Array]:
    """bf16 scales of int8, each repeated at all lanes of the chunks that it is for."""
    heads = layout.num_units * layout.heads_per_unit
    width = min(layout.head_dim, LANES) * layout.chunks_per_unit

    def spread(x_TAL, shape, axes):
        x = jnp.abs(x_TAL.astype(jnp.float32)).reshape(x_TAL.shape[0], layout.num_units, -1)
        padding = x.shape[2] - layout.heads_per_unit * width
        x = x[:, :, : x.shape[2] - padding].reshape(-1, heads, *shape)
        scale = to_bf16(jnp.maximum(jnp.max(x, axis=axes, keepdims=True) / 127.0, SMALLEST_SCALE))
        scale = jnp.broadcast_to(scale, x.shape).reshape(x_TAL.shape[0], layout.num_units, -1)
        scale = jnp.pad(scale, ((0, 0), (0, 0), (0, padding)), constant_values=1)
        return scale.reshape(x_TAL.shape)

    pairs = (2, width // 2 // PAIRS_PER_SCALE, PAIRS_PER_SCALE)
    return spread(k_TAL, pairs, (2, 4)), spread(v_TAL, (width,), (2,))


def scale_of_channel(channel: jax.Array, layout: PagesLayout) -> jax.Array:
    """Which of the scales of a unit is for which of its channels: eight pairs (i, i + H / 2) share one."""
    half = layout.head_dim // 2  # powers of two, so that a kernel can do without divisions
    pair = channel & (half - 1)
    head = channel >> (half.bit_length())
    return head * (half // PAIRS_PER_SCALE) + (pair >> (PAIRS_PER_SCALE.bit_length() - 1))


def _pack_scales(scale_TAL: jax.Array, layout: PagesLayout) -> jax.Array:
    """The scales of units one behind the other, [T, rows, L]: those of the lanes that begin a group."""
    num_tokens = len(scale_TAL)
    scale_TUC = scale_TAL.reshape(num_tokens, layout.num_units, -1)
    half, num_scales = layout.head_dim // 2, layout.scales_per_unit
    per_head = half // PAIRS_PER_SCALE
    first_channels = [
        q // per_head * layout.head_dim + q % per_head * PAIRS_PER_SCALE for q in range(num_scales)
    ]
    channels = jnp.asarray([min(channel, scale_TUC.shape[2] - 1) for channel in first_channels])
    scale_TUQ = scale_TUC[:, :, channels]
    units_per_row = LANES // num_scales
    scale_TUQ = _pad_axis(scale_TUQ, layout.num_scale_rows * units_per_row)
    return scale_TUQ.reshape(num_tokens, layout.num_scale_rows, LANES)


def _to_chunks(x_TKH: jax.Array, layout: PagesLayout) -> jax.Array:
    num_tokens = len(x_TKH)
    x_TKH = _pad_axis(x_TKH, layout.num_units * layout.heads_per_unit)
    x_TUC = x_TKH.reshape(num_tokens, layout.num_units, -1)
    padding = layout.chunks_per_unit * LANES - x_TUC.shape[2]
    x_TUC = jnp.pad(x_TUC, ((0, 0), (0, 0), (0, padding)))
    return x_TUC.reshape(num_tokens, layout.num_chunks, LANES)


def _bits(x: jax.Array, num_bits: int) -> jax.Array:
    unsigned = jnp.uint16 if num_bits == 16 else jnp.uint8
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _join(parts: list[jax.Array], num_bits: int) -> jax.Array:
    """Words of their parts, the first one lowest."""
    word = parts[0]
    for index, part in enumerate(parts[1:], 1):
        word = word | (part << jnp.uint32(index * num_bits))
    return jax.lax.bitcast_convert_type(word, jnp.int32)


def _pad_axis(x: jax.Array, length: int) -> jax.Array:
    """x with zeros behind axis 1."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), *((0, 0),) * (x.ndim - 2)))


def _pad_rows(num_rows: int) -> int:
    """The least number that is not smaller, and 1, 2, 4 or a multiple of 8."""
    if num_rows < SUBLANES:
        return 1 << (num_rows - 1).bit_length()
    return math.ceil(num_rows / SUBLANES) * SUBLANES
