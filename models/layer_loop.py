"""The loop over layers; and the two halves in which a long prefill goes through it where chips share layers.

Behind each of a layer's two blocks the devices add up what theirs gave, and until that is done a step has
nothing to multiply. In two halves it has: the sum of one is under way while the other attends or goes through
its MLP. The tokens of the second half attend to those of the first, which are written before.

    first half    attend | sum ........ | mlp    | sum ........ |
    second half   sum .. | attend       | sum .. | mlp          | (its sum is the next turn's)

Knows no family: what a layer is, `Blocks` say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.kernels_pallas.dispatch import KernelSet
from jaxserve.kernels_pallas.shards import Shards
from jaxserve.models.interface import KVLayer, KVPool, StepBatch

# Of the parts of a step, one or two: the residual stream, and what is to be added to it.
Streams = tuple[jax.Array, ...]
Additions = tuple[jax.Array | None, ...]


@dataclass(frozen=True, slots=True)
class Blocks:
    """A layer's blocks. Each is given the residual stream x and what is to be added to it first, y (None:
    nothing), and gives x with y added, and this device's part of what the block adds: [T, D] both.

    `attend(params, x_TD, y_TD, kv, batch)` gives the layer's pool as well, `mlp(params, x_TD, y_TD, batch)`
    does not know it.
    """

    attend: Callable[[Any, jax.Array, Any, KVLayer, StepBatch], tuple[jax.Array, jax.Array, KVLayer]]
    mlp: Callable[[Any, jax.Array, Any, StepBatch], tuple[jax.Array, jax.Array]]


def run_layers(
    blocks: Blocks,
    layers: Any,
    x_TD: jax.Array,
    kv: KVPool,
    batch: StepBatch,
    kernels: KernelSet,
    num_heads: int,
) -> tuple[jax.Array, KVPool]:
    """Every layer in turn: the residual stream behind them, and the pool with what they wrote.

    `layers` and `kv` are lists with an entry a layer, or both stacks with an axis of layers in front. Over
    stacks the program loops: on TPUs that keeps compile time and code apart from the number of layers. Every
    turn is given all parameters, and `batch.layer` says whose are meant, so that kernels can read them where
    they lie. The pool of the loop is one array, in which layer l owns the pages from l * P on.
    """
    shards, num_rows, num_tokens = kernels.shards, len(batch.decode_slot_R), len(x_TD)
    if not kernels.halves(num_tokens - num_rows):
        batch = list_work(kernels, batch, kv, num_heads)
        first_y_TD = kernels.begin_sum(x_TD, shards.output_dtype(*x_TD.shape))
        run = partial(_run_whole, blocks, shards)
        (x_TD,), (y_TD,), kv = _loop(run, layers, (x_TD,), (first_y_TD,), kv, (batch,))
        return x_TD if y_TD is None else x_TD + y_TD, kv
    cut = num_rows + (num_tokens - num_rows) // 2
    parts = tuple(list_work(kernels, part, kv, num_heads) for part in cut_batch(batch, cut))
    xs = (x_TD[:cut], x_TD[cut:])
    # Behind a barrier: XLA for TPUs would choose between zeros that it knows and the loop's own in each turn.
    ys = jax.lax.optimization_barrier(tuple(jnp.zeros_like(x, shards.output_dtype(*x.shape)) for x in xs))
    run = partial(_run_halves, blocks, shards)
    (x_TD, later_x_TD), (sum_TD, later_y_TD), kv = _loop(run, layers, xs, ys, kv, parts)
    return jnp.concatenate([x_TD + sum_TD, later_x_TD + shards.add(later_y_TD)]), kv


def _loop(
    run: Callable[..., tuple[Streams, Additions, KVLayer]],
    layers: Any,
    xs: Streams,
    ys: Additions,
    kv: KVPool,
    parts: tuple[StepBatch, ...],
) -> tuple[Streams, Additions, KVPool]:
    if isinstance(kv, list):
        new_kv = []
        for layer, layer_kv in zip(layers, kv, strict=True):
            xs, ys, layer_kv = run(layer, xs, ys, layer_kv, parts)
            new_kv.append(layer_kv)
        return xs, ys, new_kv
    num_layers, num_pages = jax.tree.leaves(kv)[0].shape[:2]

    def run_next(carry: tuple[Streams, Additions, KVLayer, jax.Array], _: None) -> Any:
        *carry, index = carry
        here = tuple(part._replace(layer=index, first_page=index * num_pages) for part in parts)
        return (*run(layers, *carry, here), index + 1), None

    flat_kv = jax.tree.map(lambda pool: pool.reshape(num_layers * num_pages, *pool.shape[2:]), kv)
    (xs, ys, flat_kv, _), _ = jax.lax.scan(run_next, (xs, ys, flat_kv, jnp.int32(0)), length=num_layers)
    return xs, ys, jax.tree.map(lambda pool: pool.reshape(num_layers, num_pages, *pool.shape[1:]), flat_kv)


def _run_whole(
    blocks: Blocks,
    shards: Shards,
    layer: Any,
    xs: Streams,
    ys: Additions,
    kv: KVLayer,
    parts: tuple[StepBatch, ...],
) -> tuple[Streams, Additions, KVLayer]:
    """The last sum is left to be added with the next norm; where the first y is None it is added at once."""
    (x_TD,), (y_TD,), (batch,) = xs, ys, parts
    adds_at_once = y_TD is None
    x_TD, y_TD, kv = blocks.attend(layer, x_TD, y_TD, kv, batch)
    x_TD, y_TD = blocks.mlp(layer, x_TD, shards.add_outputs(y_TD), batch)
    y_TD = shards.add_outputs(y_TD)
    return ((x_TD + y_TD,), (None,), kv) if adds_at_once else ((x_TD,), (y_TD,), kv)


def _run_halves(
    blocks: Blocks,
    shards: Shards,
    layer: Any,
    xs: Streams,
    ys: Additions,
    kv: KVLayer,
    parts: tuple[StepBatch, ...],
) -> tuple[Streams, Additions, KVLayer]:
    """Of what comes in, the second half's part of the layer before is not added up yet."""
    (x_TD, later_x_TD), (sum_TD, later_y_TD), (batch, later_batch) = xs, ys, parts

    def meet(y_TD: jax.Array, other_sum_TD: jax.Array) -> Any:
        """What a block gave, and the other half's sum that went on beside it. Behind a barrier, which keeps
        the blocks in this order: XLA takes sums to be short, and would mix them."""
        return jax.lax.optimization_barrier((shards.round_outputs(y_TD), other_sum_TD))

    later_sum_TD = shards.add(later_y_TD)
    x_TD, y_TD, kv = blocks.attend(layer, x_TD, sum_TD, kv, batch)
    y_TD, later_sum_TD = meet(y_TD, later_sum_TD)
    sum_TD = shards.add(y_TD)
    later_x_TD, later_y_TD, kv = blocks.attend(layer, later_x_TD, later_sum_TD, kv, later_batch)
    later_y_TD, sum_TD = meet(later_y_TD, sum_TD)
    later_sum_TD = shards.add(later_y_TD)
    x_TD, y_TD = blocks.mlp(layer, x_TD, sum_TD, batch)
    y_TD, later_sum_TD = meet(y_TD, later_sum_TD)
    sum_TD = shards.add(y_TD)
    later_x_TD, later_y_TD = blocks.mlp(layer, later_x_TD, later_sum_TD, later_batch)
    later_y_TD, sum_TD = meet(later_y_TD, sum_TD)
    return (x_TD, later_x_TD), (sum_TD, later_y_TD), kv


def cut_batch(batch: StepBatch, cut: int) -> tuple[StepBatch, StepBatch]:
    """The tokens before `cut` and those from there on, decode rows among the former. A chunk that is in both
    becomes two, of which the second has the first among its context."""
    num_rows = batch.decode_slot_R.shape[0]
    end_C = batch.chunk_token_C + batch.chunk_len_C

    def take(first: int, last: int) -> StepBatch:
        here = slice(first, last)
        own_first_C = jnp.clip(batch.chunk_token_C, first, last)
        own_end_C = jnp.clip(end_C, first, last)
        is_there_C = own_end_C > own_first_C
        num_later_C = end_C - own_end_C  # tokens that another half has
        own_rows = slice(0, num_rows if first == 0 else 0)
        return batch._replace(
            token_ids_T=batch.token_ids_T[here],
            positions_T=batch.positions_T[here],
            write_index_T=batch.write_index_T[here],
            rope=None if batch.rope is None else tuple(table[here] for table in batch.rope),
            decode_slot_R=batch.decode_slot_R[own_rows],
            decode_kv_len_R=batch.decode_kv_len_R[own_rows],
            chunk_token_C=jnp.where(is_there_C, own_first_C - first, 0),
            chunk_len_C=own_end_C - own_first_C,
            chunk_kv_len_C=jnp.where(is_there_C, batch.chunk_kv_len_C - num_later_C, 0),
        )

    return take(0, cut), take(cut, len(batch.token_ids_T))


def list_work(kernels: KernelSet, batch: StepBatch, kv: KVPool, num_heads: int) -> StepBatch:
    """The batch with the work of its attention, where kernels want it: the same for all layers."""
    if kernels.list_step_work is None:
        return batch
    num_rows = batch.decode_slot_R.shape[0]
    prefill = (batch.chunk_slot_C, batch.chunk_token_C - num_rows, batch.chunk_len_C, batch.chunk_kv_len_C)
    work = kernels.list_step_work(
        kv[0] if isinstance(kv, list) else kv,
        batch.table_XW,
        (batch.decode_slot_R, batch.decode_kv_len_R),
        prefill,
        num_tokens=batch.token_ids_T.shape[0] - num_rows,
        num_heads=num_heads,
    )
    return batch._replace(work=work)
