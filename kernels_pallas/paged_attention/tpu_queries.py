"""Queries as the TPU's kernels want them, and outputs as they leave them. Plain XLA.

KV heads that lie side by side in a chunk of lanes are attended to as one: a query has zeros in the lanes of
the others, and of its output the lanes of its own head count. Letters: U units, Y query heads of a unit,
A chunks of it, M rows of a unit's queries (Y, padded to a multiple of 8), L = 128 lanes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from jaxserve.kernels_pallas.kv_pages import LANES, PagesLayout
from jaxserve.kernels_pallas.paged_attention.tpu_plan import pad_sublanes


@partial(jax.tree_util.register_dataclass, data_fields=["q_TUAML"], meta_fields=["num_heads"])
@dataclass(frozen=True, slots=True)
class UnitQueries:
    """Queries of T tokens in the order of units, float32. A pytree of one array, whose first axis is T."""

    q_TUAML: jax.Array
    num_heads: int


def count_unit_rows(num_heads: int, layout: PagesLayout) -> int:
    """M, of a token."""
    heads = layout.heads_per_unit * (num_heads // layout.num_kv_heads)
    return pad_sublanes(heads)


def order_queries(q: jax.Array | UnitQueries, layout: PagesLayout) -> UnitQueries:
    """[T, N, H] in the order of units, unless they come so."""
    if isinstance(q, UnitQueries):
        return q
    num_heads = q.shape[1]
    q_TUAYL = _to_units(q, layout).transpose(0, 1, 3, 2, 4)
    padding = count_unit_rows(num_heads, layout) - q_TUAYL.shape[3]
    q_TUAML = jnp.pad(q_TUAYL, ((0, 0), (0, 0), (0, 0), (0, padding), (0, 0)))
    return UnitQueries(q_TUAML, num_heads)


def _to_units(q_TNH: jax.Array, layout: PagesLayout) -> jax.Array:
    """[T, U, Y, A, L]"""
    num_tokens, num_heads, head_dim = q_TNH.shape
    group, together = num_heads // layout.num_kv_heads, layout.heads_per_unit
    missing = layout.num_units * together - layout.num_kv_heads
    q_TNH = jnp.pad(q_TNH.astype(jnp.float32), ((0, 0), (0, missing * group), (0, 0)))
    q_TUKGH = q_TNH.reshape(num_tokens, layout.num_units, together, group, head_dim)
    if together > 1:
        own_KK = jnp.eye(together, dtype=jnp.float32)
        q_TUKGH = q_TUKGH[:, :, :, :, None, :] * own_KK[None, None, :, None, :, None]
    q_TUYC = q_TUKGH.reshape(num_tokens, layout.num_units, together * group, -1)
    padding = layout.chunks_per_unit * LANES - q_TUYC.shape[3]
    q_TUYC = jnp.pad(q_TUYC, ((0, 0), (0, 0), (0, 0), (0, padding)))
    return q_TUYC.reshape(*q_TUYC.shape[:3], layout.chunks_per_unit, LANES)


def from_units(out_TUYAL: jax.Array, num_heads: int, layout: PagesLayout) -> jax.Array:
    """[T, N, H] of outputs."""
    num_tokens, together = len(out_TUYAL), layout.heads_per_unit
    out_TUYC = out_TUYAL.reshape(*out_TUYAL.shape[:3], -1)[..., : together * layout.head_dim]
    shape = (num_tokens, layout.num_units, together, -1, together, layout.head_dim)
    out_TUKGKH = out_TUYC.reshape(shape)
    own = [out_TUKGKH[:, :, k, :, k] for k in range(together)]
    out_TUKGH = jnp.stack(own, axis=2) if together > 1 else own[0]
    return out_TUKGH.reshape(num_tokens, -1, layout.head_dim)[:, :num_heads]
