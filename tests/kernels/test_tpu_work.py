"""The work of attention that is listed for all layers is that of each, wherever its pages begin."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from jaxserve.kernels_pallas.kv_pages import make_pages
from jaxserve.kernels_pallas.paged_attention.tpu_decode import paged_decode
from jaxserve.kernels_pallas.paged_attention.tpu_plan import CHIPS, choose_decode_blocks
from jaxserve.kernels_pallas.paged_attention.tpu_prefill import (
    choose_blocks,
    paged_prefill,
)
from jaxserve.kernels_pallas.paged_attention.tpu_step import list_step_work
from jaxserve.kernels_pallas.paged_attention.tpu_work import StepWork, list_decode_work, list_prefill_work
from tests.kernels.cases import store
from tests.kernels.pages import to_pages

CHIP = CHIPS["TPU v5 lite"]
PAGE_SIZE, NUM_HEADS, NUM_TOKENS = 128, 14, 64
TABLE_XW = jnp.arange(5 * 3, dtype=jnp.int32).reshape(5, 3)
DECODE = (jnp.array([3, 0, 4]), jnp.array([300, 7, 0]))
PREFILL = (jnp.array([1, 2]), jnp.array([0, 40]), jnp.array([40, 3]), jnp.array([168, 3]))
KV = make_pages(16, PAGE_SIZE, 2, 128, "bfloat16")


def list_work(decode, prefill):
    sizes = {"num_tokens": NUM_TOKENS, "num_heads": NUM_HEADS, "chip": CHIP, "interpret": True}
    return list_step_work(KV, TABLE_XW, decode, prefill, **sizes)


def test_it_is_what_a_layer_lists_for_itself():
    work = list_work(DECODE, PREFILL)
    blocks = choose_decode_blocks(KV.layout, PAGE_SIZE, 1, CHIP)
    decode = list_decode_work(TABLE_XW, *DECODE, blocks=blocks, interpret=True)
    blocks = choose_blocks(KV.layout, PAGE_SIZE, NUM_TOKENS, NUM_HEADS, CHIP)
    prefill = list_prefill_work(TABLE_XW, *PREFILL, num_tokens=NUM_TOKENS, blocks=blocks, interpret=True)
    jax.tree.map(np.testing.assert_array_equal, work, StepWork(decode, prefill))


def test_a_layer_finds_its_pages_behind_those_of_others():
    rng = np.random.default_rng(0)
    pools = rng.standard_normal((2, 2, 16, PAGE_SIZE, 2, 128), np.float32)
    layers = [to_pages(store(pool[0], pool[1], "bfloat16")) for pool in pools]
    both = jax.tree.map(lambda *pages: jnp.concatenate(pages), *layers)
    q_TNH = jnp.asarray(rng.standard_normal((NUM_TOKENS, NUM_HEADS, 128)), jnp.float32)
    sizes: Any = {"scale": 0.1, "chip": CHIP, "interpret": pltpu.InterpretParams(detect_races=True)}

    def attend(kv, work):
        yield paged_decode(q_TNH[:3], kv, TABLE_XW, *DECODE, work=work.decode, **sizes)
        yield paged_prefill(q_TNH, kv, TABLE_XW, *PREFILL, work=work.prefill, **sizes)

    work = list_work(DECODE, PREFILL)
    of_second = work.begin_at(jnp.int32(16))
    for alone, shared in zip(attend(layers[1], work), attend(both, of_second), strict=True):
        assert np.any(alone != 0)
        np.testing.assert_array_equal(alone, shared)


def test_a_step_without_rows_or_chunks_has_no_work_of_them():
    none = jnp.zeros(0, jnp.int32)
    assert list_work((none, none), PREFILL).decode is None
    assert list_work(DECODE, (none, none, none, none)).prefill is None
