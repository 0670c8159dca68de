"""A model whose layers lie in stacks, by the TPU's kernels in the interpreter: the logits are those of XLA's
forms, step by step, and decode rows take few launches."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve.kernels_pallas.dispatch import XLA_KERNELS, KernelSet, KernelTarget, choose_kernels
from jaxserve.models import llama
from jaxserve.models.interface import StepBatch
from jaxserve.models.quant import bind_kernels
from jaxserve.runner.device_state import PoolSize, make_state
from jaxserve.weights.served import describe_params
from jaxserve.weights.stacks import describe_stacks

PAGE_SIZE = 16
CFG = llama.Config(
    vocab_size=256,
    width=256,
    mlp_width=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    max_context=64,
    ties_embeddings=True,
    has_qkv_bias=True,
)
POOL = PoolSize(num_pages=9, page_size=PAGE_SIZE, num_slots=3, table_width=4, stacks_layers=True)
TABLE = np.asarray([[5, 2, 0, 0], [3, 8, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]], np.int32)


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    described = describe_params(llama.param_specs(CFG), dtype="bfloat16", quantization="none")
    rng = np.random.default_rng(0)
    return {
        path: jnp.asarray(rng.standard_normal(leaf.shape) / 8, leaf.dtype)
        for path, leaf in describe_stacks(described, CFG.num_layers).items()
    }


def choose_for_tpu() -> KernelSet:
    kernels = choose_kernels(
        KernelTarget(
            platform="tpu",
            head_dim=CFG.head_dim,
            num_kv_heads=CFG.num_kv_heads,
            page_size=PAGE_SIZE,
            kv_dtype="bfloat16",
            device_kind="TPU v6 lite",
        )
    )
    assert kernels.name == "pallas"
    return kernels


def make_steps() -> list[StepBatch]:
    """A prompt of 15 and one of 3 tokens, then both decode, the first into its next page; last, one decodes
    while a third prompt comes."""
    lengths = [15, 3]
    steps = [make_step([], [(0, 0, 15), (1, 0, 3)])]
    for _ in range(2):
        lengths = [length + 1 for length in lengths]
        steps.append(make_step([(0, lengths[0]), (1, lengths[1]), (2, 0)], []))
    return [*steps, make_step([(1, 6)], [(0, 17, 4)])]


def make_step(rows: list[tuple[int, int]], chunks: list[tuple[int, int, int]]) -> StepBatch:
    """Decode rows of a slot and a length, 0 for padding; chunks of a slot, a start and a length."""
    positions = [max(length - 1, 0) for _, length in rows]
    slots = [slot for slot, _ in rows]
    for slot, start, length in chunks:
        positions += range(start, start + length)
        slots += [slot] * length
    at = np.asarray(positions, np.int32)
    places = TABLE[slots, at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE
    firsts = np.cumsum([len(rows), *(length for *_, length in chunks)])[:-1]

    def ints(values: Any) -> jax.Array:
        return jnp.asarray(np.asarray(values, np.int32))

    return StepBatch(
        token_ids_T=ints((7 * at + 3 * np.asarray(slots)) % CFG.vocab_size),
        positions_T=ints(at),
        write_index_T=ints(places),
        decode_slot_R=ints([slot for slot, _ in rows]),
        decode_kv_len_R=ints([length for _, length in rows]),
        chunk_slot_C=ints([slot for slot, *_ in chunks]),
        chunk_token_C=ints(firsts),
        chunk_len_C=ints([length for *_, length in chunks]),
        chunk_kv_len_C=ints([start + length for _, start, length in chunks]),
        table_XW=ints(TABLE),
        sample_token_B=ints(range(len(at))),
    )


def list_logits(params: dict[str, Any], kernels: KernelSet) -> list[np.ndarray]:
    """Of every token of each step."""
    graphdef, weights = nnx.split(llama.Model(CFG, bind_kernels(params, kernels), kernels))
    kv: Any = make_state(CFG, POOL, jnp.dtype("bfloat16"), make_kv=kernels.make_kv).kv

    @jax.jit
    def step(weights: Any, batch: StepBatch, kv: Any) -> Any:
        model = nnx.merge(graphdef, weights)
        x_TD, kv = model(batch, kv)
        return model.compute_logits(x_TD), kv

    logits = []
    for batch in make_steps():
        logits_TV, kv = step(weights, batch, kv)
        logits.append(np.asarray(logits_TV))
    return logits


def test_logits_by_the_tpus_kernels_are_those_of_xla(params):
    from jax.experimental.pallas import tpu as pltpu

    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        got = list_logits(params, choose_for_tpu())
    for batch, got_TV, want_TV in zip(make_steps(), got, list_logits(params, XLA_KERNELS), strict=True):
        is_live_T = np.asarray(batch.write_index_T) >= PAGE_SIZE
        error = np.abs(got_TV - want_TV)[is_live_T].max()
        assert error < 0.05 * want_TV[is_live_T].std(), error


def test_a_layer_of_decode_rows_is_two_launches(params):
    kernels = choose_for_tpu()
    graphdef, weights = nnx.split(llama.Model(CFG, bind_kernels(params, kernels), kernels))
    state = make_state(CFG, POOL, jnp.dtype("bfloat16"), make_kv=kernels.make_kv)
    run = jax.jit(lambda weights, batch, kv: nnx.merge(graphdef, weights)(batch, kv))
    names = {"attention_block": 1, "stacked_matmul": 1, "kv_write": 0, "paged_decode": 0, "add_norm": 0}
    text = str(run.trace(weights, make_steps()[1], state.kv).jaxpr)
    assert {name: text.count(f"name={name}\n") for name in names} == names
