"""Runs a family's forward pass directly, without runner or scheduler: one sequence, chunk by chunk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from jaxserve.kernels_pallas.dispatch import XLA_KERNELS
from jaxserve.kernels_pallas.shards import TENSOR, Shards
from jaxserve.models.interface import KVLayer, StepBatch
from jaxserve.models.quant import bind_kernels
from jaxserve.models.registry import find_family
from jaxserve.runner.grouping import find_grouping, mark_groups
from jaxserve.weights.loader import load_params
from jaxserve.weights.placement import ALONE, Placement
from jaxserve.weights.resolve import resolve_model

PAGE_SIZE = 8


def load_model(
    path: Path | str, dtype: str = "float32", quantization: str = "none", placement: Placement = ALONE
) -> Any:
    """The model of a checkpoint, ready to call; a part of it for each device, if `placement` has several."""
    files = resolve_model(str(path), on_progress=lambda *_: None)
    family = find_family(files.hf_config)
    cfg = family.Config.from_hf(files.hf_config)
    division = family.divide(cfg, placement.num_devices)
    specs = family.param_specs(cfg)
    if quantization == "int4":
        specs = mark_groups(specs, find_grouping(files, specs).group_sizes)
    params = load_params(
        files,
        division.cut_specs(specs),
        dtype=dtype,
        quantization=quantization,
        on_progress=lambda *_: None,
        put=placement.put,
    )
    kernels = replace(XLA_KERNELS, shards=Shards(placement.num_devices))
    return family.Model(division.local_cfg, bind_kernels(params, kernels), kernels)


def compute_logits(
    model: Any, token_ids: list[int], chunk_tokens: int | None = None, placement: Placement = ALONE
) -> np.ndarray:
    """Logits at every position of one sequence, float32 [tokens, vocabulary].

    With `chunk_tokens` the sequence is computed in chunks of so many tokens; a chunk of one token is
    fed as a decode row. Pages lie in the pool in reverse order, so that a mixed-up table shows.
    """
    cfg = model.cfg
    num_pages = -(-len(token_ids) // PAGE_SIZE)
    table = np.arange(num_pages, 0, -1, dtype=np.int32)
    shape_PSKH = (num_pages + 1, PAGE_SIZE, cfg.num_kv_heads * placement.num_devices, cfg.head_dim)
    kv = [KVLayer(jnp.zeros(shape_PSKH), jnp.zeros(shape_PSKH)) for _ in range(cfg.num_layers)]
    graphdef, params = nnx.split(model)

    def run(params, batch: StepBatch, kv: list[KVLayer]) -> tuple[jax.Array, list[KVLayer]]:
        model = nnx.merge(graphdef, params)
        x_TD, kv = model(batch, kv)
        return model.kernels.shards.join(model.compute_logits(x_TD))[:, : cfg.vocab_size], kv

    everywhere, by_head = PartitionSpec(), PartitionSpec(None, None, TENSOR)
    param_specs = None if placement.mesh is None else jax.tree.map(lambda x: x.sharding.spec, params)
    step = jax.jit(placement.spread(run, (param_specs, everywhere, by_head), (everywhere, by_head)))
    logits = []
    chunk_tokens = chunk_tokens or len(token_ids)
    for start in range(0, len(token_ids), chunk_tokens):
        ids = token_ids[start : start + chunk_tokens]
        logits_TV, kv = step(params, make_batch(ids, start, table), kv)
        logits.append(np.asarray(logits_TV))
    return np.concatenate(logits)


def make_batch(ids: list[int], start: int, table: np.ndarray) -> StepBatch:
    """A step of one sequence in slot 0: a decode row if it is one token, else a chunk."""
    positions = np.arange(start, start + len(ids), dtype=np.int32)
    is_row = len(ids) == 1
    none = np.zeros(0, np.int32)
    one = np.zeros(1, np.int32)
    return StepBatch(
        token_ids_T=jnp.asarray(ids, jnp.int32),
        positions_T=jnp.asarray(positions),
        write_index_T=jnp.asarray(table[positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE),
        decode_slot_R=jnp.asarray(one if is_row else none),
        decode_kv_len_R=jnp.asarray(one + start + 1 if is_row else none),
        chunk_slot_C=jnp.asarray(none if is_row else one),
        chunk_token_C=jnp.asarray(none if is_row else one),
        chunk_len_C=jnp.asarray(none if is_row else one + len(ids)),
        chunk_kv_len_C=jnp.asarray(none if is_row else one + start + len(ids)),
        table_XW=jnp.asarray(table[None]),
        sample_token_B=jnp.arange(len(ids), dtype=jnp.int32),
    )
