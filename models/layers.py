"""Leaf functions that the families share: rotary embedding, attention over the pool.

Plain functions of arrays; no module state, no configuration objects.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxserve.kernels_pallas.dispatch import KernelSet
from jaxserve.models.interface import KVLayer, StepBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3's stretching of the low rotary frequencies (the rule of "rope_type": "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_context: int


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> tuple[float, ...]:
    """Angular frequency a pair of dimensions, [H / 2], in radians a token.

    Computed on the host in float64: it is a constant of the program.
    """
    frequencies = []
    for i in range(head_dim // 2):
        frequency = theta ** (-2.0 * i / head_dim)
        if scaling is not None:
            wavelength = 2 * math.pi / frequency
            turns = scaling.original_max_context / wavelength
            if turns < scaling.low_freq_factor:
                frequency /= scaling.factor
            elif turns <= scaling.high_freq_factor:
                span = scaling.high_freq_factor - scaling.low_freq_factor
                smooth = (turns - scaling.low_freq_factor) / span
                frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        frequencies.append(frequency)
    return tuple(frequencies)


def rope_tables(positions_T: jax.Array, frequencies: tuple[float, ...]) -> tuple[jax.Array, jax.Array]:
    """cos and sin of position * frequency, float32 [T, 1, H / 2]; computed once a step."""
    angle_TH = positions_T[:, None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)[None, :]
    return _turn(angle_TH)


def axial_rope_tables(
    positions_AT: jax.Array, frequencies: tuple[float, ...], axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """The same for tokens with A positions each: pair i turns with the position on axis `axes[i]`."""
    positions_TH = positions_AT[jnp.asarray(axes), :].T.astype(jnp.float32)
    return _turn(positions_TH * jnp.asarray(frequencies, jnp.float32)[None, :])


def _turn(angle_TH: jax.Array) -> tuple[jax.Array, jax.Array]:
    tables = jnp.cos(angle_TH)[:, None, :], jnp.sin(angle_TH)[:, None, :]
    # XLA would compute them again for every head of every layer.
    return jax.lax.optimization_barrier(tables)


def attend(
    kernels: KernelSet,
    qkv_TF: jax.Array,
    kv: KVLayer,
    batch: StepBatch,
    num_heads: int,
    scale: float,
) -> tuple[jax.Array, KVLayer]:
    """Rotate q and k by the batch's tables, write the step's K and V to the pool, then attend: decode rows
    first, chunks behind them. `qkv_TF` holds `num_heads` heads of q, then those of k and of v.

    The outputs [T, F], head by head; or several such arrays whose sum they are, [C, T, F], where cores of a
    device have some of the rows each: `LayerProducts.multiply` takes both.
    """
    assert batch.rope is not None
    form, is_decode = kernels.attend_rows, not len(batch.chunk_slot_C)
    if form is not None and is_decode and batch.work is not None and form.serves(len(qkv_TF), num_heads, kv):
        work = batch.work if batch.first_page is None else batch.work.begin_at(batch.first_page)
        rows = batch.rope, batch.write_index_T, work.decode
        return form.attend(qkv_TF, kv, *rows, num_heads=num_heads, scale=scale)
    qkv_TAH = qkv_TF.reshape(len(qkv_TF), -1, kv.head_dim)
    batch, layer, decode_work, prefill_work = _find_layer(batch, kv)
    q_TNH, kv = kernels.rope_write(
        kv, qkv_TAH, *batch.rope, batch.write_index_T, num_heads=num_heads, **layer
    )
    num_rows = batch.decode_slot_R.shape[0]  # of q, which kernels may have in an order of their own
    parts = []
    if num_rows:
        parts.append(
            kernels.paged_decode(
                jax.tree.map(lambda q: q[:num_rows], q_TNH),
                kv,
                batch.table_XW,
                batch.decode_slot_R,
                batch.decode_kv_len_R,
                scale=scale,
                **decode_work,
            )
        )
    if batch.chunk_slot_C.shape[0]:
        parts.append(
            kernels.paged_prefill(
                jax.tree.map(lambda q: q[num_rows:], q_TNH),
                kv,
                batch.table_XW,
                batch.chunk_slot_C,
                batch.chunk_token_C - num_rows,
                batch.chunk_len_C,
                batch.chunk_kv_len_C,
                scale=scale,
                **prefill_work,
            )
        )
    o_TNH = jnp.concatenate(parts)
    return o_TNH.reshape(len(o_TNH), -1), kv


def _find_layer(batch: StepBatch, kv: KVLayer) -> tuple[StepBatch, dict, dict, dict]:
    """The batch on the layer's own pages, and what the write, decode and prefill are told beside it.

    Kernels that want their work listed once for all layers are told where this one's pages begin. For others
    the tables are moved there, which is a small operation each.
    """
    first_page = batch.first_page
    if batch.work is not None:
        work = batch.work if first_page is None else batch.work.begin_at(first_page)
        return batch, {"first_page": first_page}, {"work": work.decode}, {"work": work.prefill}
    if first_page is not None:
        page_size = jax.tree.leaves(kv)[0].shape[1]
        batch = batch._replace(
            table_XW=batch.table_XW + first_page, write_index_T=batch.write_index_T + first_page * page_size
        )
    return batch, {}, {}, {}
