"""The scales of an int8 pool, where a TPU's attention needs them.

A prefill reads K and V of a block once for many queries, so it scales them: a product with zeros and ones
spreads scales over the channels, which is exact. Decode has few queries, and scaling K and V would take
longer than all else. There a query's channels that share a scale are a row of their own,

    scale g of a unit:     q of its channels, else 0     x K    = score_g,    score = sum of scale_g * score_g

and V's scales go to the weights of its tokens. Scales come with a token a row; decode wants tokens in lanes,
so that a product with zeros and ones turns them, once for all units. Letters: Q scales of a unit, G = Q * M,
M query rows, B tokens of a block, L = 128 lanes, X scales of all units, Y of V, one for each KV head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxserve.kernels_pallas.kv_pages import LANES, PagesLayout, scale_of_channel
from jaxserve.kernels_pallas.paged_attention.tpu_block import load_rows, product, unpack_halves
from jaxserve.kernels_pallas.paged_attention.tpu_plan import pad_sublanes


class Scales(NamedTuple):
    """The row that holds the scales of a unit, for K and for V, bf16, and the first of its lanes."""

    k_BL: jax.Array
    v_BL: jax.Array
    first_lane: Any


def load_scales(scales_ref: Any, unit: Any, num_tokens: int, layout: PagesLayout) -> Scales:
    """The reference is to all rows of a block, token by token."""
    units_per_row = LANES // layout.scales_per_unit
    row = 0 if layout.num_scale_rows == 1 else unit // units_per_row
    words_BL = load_rows(scales_ref, row, layout.num_scale_rows, num_tokens)
    k_BL, v_BL = (half.astype(jnp.bfloat16) for half in unpack_halves(words_BL))
    return Scales(k_BL, v_BL, unit % units_per_row * layout.scales_per_unit)


def scale_unit(
    chunks: list[tuple[jax.Array, jax.Array]], scales: Scales, live_B1: jax.Array, layout: PagesLayout
) -> list[tuple[jax.Array, jax.Array]]:
    """K and V, float32 [B, L], zero where not live."""
    scaled = []
    for index, chunk in enumerate(chunks):
        lane_LL = jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0) - scales.first_lane
        ones_LL = _as_ones(scale_of_channel(_channels(index, LANES), layout) == lane_LL)
        k_BL, v_BL = (
            jnp.where(live_B1, x_BL * product(s_BL, ones_LL, 0), 0.0)
            for x_BL, s_BL in zip(chunk, (scales.k_BL, scales.v_BL), strict=True)
        )
        scaled.append((k_BL, v_BL))
    return scaled


def count_turned(layout: PagesLayout) -> tuple[int, int]:
    """X and Y, padded to whole tiles of float32."""
    num_scales, num_heads = layout.scales_per_unit, layout.heads_per_unit
    return pad_sublanes(layout.num_units * num_scales), pad_sublanes(layout.num_units * num_heads)


def turn_scales(scales_ref: Any, k_XB: Any, v_YB: Any, layout: PagesLayout) -> None:
    """Of all units of a block, into references."""
    units_per_row = LANES // layout.scales_per_unit
    num_tokens = k_XB.shape[1]
    scales_per_head = layout.scales_per_unit // layout.heads_per_unit
    for first_unit in range(0, layout.num_units, units_per_row):
        scales = load_scales(scales_ref, first_unit, num_tokens, layout)
        for turned, s_BL, step in ((k_XB, scales.k_BL, 1), (v_YB, scales.v_BL, scales_per_head)):
            first = first_unit * layout.scales_per_unit // step
            num_rows = min(LANES // step, turned.shape[0] - first)
            lane_XL = jax.lax.broadcasted_iota(jnp.int32, (num_rows, LANES), 1)
            row_XL = jax.lax.broadcasted_iota(jnp.int32, (num_rows, LANES), 0)
            turned[pl.ds(first, num_rows)] = product(_as_ones(lane_XL == row_XL * step), s_BL, 1)


def score_scaled(
    q_ML: list[jax.Array], k_BL: list[jax.Array], k_XB: Any, unit: Any, layout: PagesLayout
) -> jax.Array:
    """`tpu_block.score` of K without its scales, which are a reference: float32 q, bf16 k."""
    num_scales, num_rows = layout.scales_per_unit, len(q_ML[0])
    scores = []
    for index, (q, k) in enumerate(zip(q_ML, k_BL, strict=True)):
        scale_ML = scale_of_channel(_channels(index, num_rows), layout)
        q_GL = jnp.concatenate([jnp.where(scale_ML == i, q, 0.0) for i in range(num_scales)])
        scores.append(product(q_GL.astype(jnp.bfloat16), k, 1))
    score_GB = sum(scores[1:], scores[0])
    score_QMB = score_GB.reshape(num_scales, num_rows, -1)
    scaled = [score_QMB[i] * k_XB[pl.ds(unit * num_scales + i, 1)] for i in range(num_scales)]
    return sum(scaled[1:], scaled[0])


def spread_v_scales(head_M1: jax.Array, v_YB: Any, unit: Any, layout: PagesLayout) -> jax.Array:
    """V's scale of each token for the rows of queries of these KV heads of the unit: float32 [M or 1, B]."""
    scale_MB = v_YB[pl.ds(unit * layout.heads_per_unit, 1)]
    for head in range(1, layout.heads_per_unit):
        scale_MB = jnp.where(head_M1 == head, v_YB[pl.ds(unit * layout.heads_per_unit + head, 1)], scale_MB)
    return scale_MB


def _channels(chunk: int, num_rows: int) -> jax.Array:
    """Of a unit, by the lanes of one of its chunks."""
    return jax.lax.broadcasted_iota(jnp.int32, (num_rows, LANES), 1) + chunk * LANES


def _as_ones(is_one: jax.Array) -> jax.Array:
    return jnp.where(is_one, 1.0, 0.0).astype(jnp.bfloat16)
