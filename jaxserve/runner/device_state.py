"""What the device remembers between steps: the paged KV pool and a few arrays indexed by slot.

Allocated by the runner in the sizes that sizing.py chose, donated to every step and replaced by what the
step returns. Knows nothing of requests; a slot is a row number to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.kernels_pallas.kv_layer import make_layer
from jaxserve.kernels_pallas.shards import ONE_DEVICE, Shards
from jaxserve.models.interface import KVPool, ModelConfig
from jaxserve.runner.sampler import COUNT_MASK, IN_PROMPT, IS_STOP
from jaxserve.types import MAX_WATCHED_IDS, TokenParams
from jaxserve.weights.placement import ALONE, Placement, make_spec

LARGEST_BIAS = 1e30  # leaves room for a division by the smallest temperature


class DeviceState(NamedTuple):
    """X slots, the last of which is trash: padded rows read and write it."""

    kv: KVPool  # page 0 is trash likewise
    last_token_X: jax.Array  # int32, the token that the slot's next decode row feeds
    table_XW: jax.Array  # int32, block tables
    edits_XV: jax.Array  # int32, see runner/sampler.py
    bias_XV: jax.Array  # float32, logit bias
    watched_XM: jax.Array  # int32, ids whose log-probabilities are told; of slots that ask for some


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSize:
    """How many pages of how many tokens, for how many sequences."""

    num_pages: int  # trash page included
    page_size: int
    num_slots: int  # running sequences; one more is kept as trash
    table_width: int  # pages of the longest sequence
    stacks_layers: bool = False  # one array for all layers, with an axis of them in front


def state_specs(pool: PoolSize) -> DeviceState:
    """How devices share the state (jax.shard_map's terms): the pool by KV heads, what is per id by ids."""
    layers = (None,) if pool.stacks_layers else ()
    return DeviceState(
        kv=make_spec((*layers, None, None, "kv_heads")),  # type: ignore[arg-type]  # of every leaf
        last_token_X=make_spec(()),  # type: ignore[arg-type]
        table_XW=make_spec(()),  # type: ignore[arg-type]
        edits_XV=make_spec((None, "vocab")),  # type: ignore[arg-type]
        bias_XV=make_spec((None, "vocab")),  # type: ignore[arg-type]
        watched_XM=make_spec(()),  # type: ignore[arg-type]
    )


def kv_bytes_per_token(cfg: ModelConfig, kv_dtype: jnp.dtype, make_kv: Callable = make_layer) -> int:
    """What a token takes in the pools of all layers, scales and padding included."""
    token = jax.eval_shape(partial(make_kv, 1, 1, cfg.num_kv_heads, cfg.head_dim, jnp.dtype(kv_dtype).name))
    return cfg.num_layers * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(token))


def compile_allocation(
    cfg: ModelConfig,
    pool: PoolSize,
    kv_dtype: jnp.dtype,
    placement: Placement = ALONE,
    make_kv: Callable = make_layer,
) -> Callable[[], DeviceState]:
    """The program that makes a zeroed DeviceState: at the start, and after a sleep."""
    make = partial(make_state, cfg, pool, kv_dtype, Shards(placement.num_devices), make_kv)
    return jax.jit(placement.spread(make, in_specs=(), out_specs=state_specs(pool))).lower().compile()


def make_state(
    cfg: ModelConfig,
    pool: PoolSize,
    kv_dtype: jnp.dtype,
    shards: Shards = ONE_DEVICE,
    make_kv: Callable = make_layer,
) -> DeviceState:
    """Empty slots and pages, these as `make_kv` of the chosen kernels makes them: one device's part, if
    several share the state. `cfg` is that of the part."""
    num_slots = pool.num_slots + 1
    num_ids = shards.count_own(cfg.vocab_size)
    return DeviceState(
        kv=_make_pool(cfg, pool, kv_dtype, make_kv),
        last_token_X=jnp.zeros(num_slots, jnp.int32),
        table_XW=jnp.zeros((num_slots, pool.table_width), jnp.int32),
        edits_XV=jnp.zeros((num_slots, num_ids), jnp.int32),
        bias_XV=jnp.zeros((num_slots, num_ids), jnp.float32),
        watched_XM=jnp.zeros((num_slots, MAX_WATCHED_IDS), jnp.int32),
    )


def _make_pool(cfg: ModelConfig, pool: PoolSize, kv_dtype: jnp.dtype, make_kv: Callable) -> KVPool:
    """Zeroed pages of all layers, in one array or in one each."""
    make = partial(
        make_kv,
        page_size=pool.page_size,
        num_kv_heads=cfg.num_kv_heads,
        head_dim=cfg.head_dim,
        kv_dtype=jnp.dtype(kv_dtype).name,
    )
    if not pool.stacks_layers:
        return [make(pool.num_pages) for _ in range(cfg.num_layers)]
    shape = (cfg.num_layers, pool.num_pages)
    return jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), make(math.prod(shape)))


def edit_rows(
    vocab_size: int, params: TokenParams, prompt_ids: list[int], output_ids: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The edits row (int32 [V]) and bias row (float32 [V]) of a slot's new sequence."""
    edits_V = np.bincount(output_ids, minlength=vocab_size).astype(np.int32) & COUNT_MASK
    edits_V[np.asarray(prompt_ids, np.int64)] |= IN_PROMPT
    edits_V[np.asarray(params.stop_ids, np.int64)] |= IS_STOP
    bias_V = np.zeros(vocab_size, np.float32)
    for token_id, bias in params.logit_bias:
        bias_V[token_id] = np.clip(bias, -LARGEST_BIAS, LARGEST_BIAS)
    return edits_V, bias_V


def write_slot(state: DeviceState, slot: jax.Array, edits_V: jax.Array, bias_V: jax.Array) -> DeviceState:
    """The state with a slot's edits and bias rows in place; a program of its own, which donates `state`."""
    return state._replace(
        edits_XV=state.edits_XV.at[slot].set(edits_V), bias_XV=state.bias_XV.at[slot].set(bias_V)
    )


def watched_row(watched_ids: tuple[int, ...]) -> np.ndarray:
    """The watched row (int32 [M]) of a slot's new sequence; token 0 fills what it does not use."""
    watched_M = np.zeros(MAX_WATCHED_IDS, np.int32)
    watched_M[: len(watched_ids)] = watched_ids
    return watched_M


def write_watched(watched_XM: jax.Array, slot: jax.Array, watched_M: jax.Array) -> jax.Array:
    """The array with a slot's watched ids in place; a program of its own, which donates it."""
    return watched_XM.at[slot].set(watched_M)
