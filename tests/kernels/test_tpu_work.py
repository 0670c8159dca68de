"""The work of attention that is listed for all layers is what each layer would have listed for itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.kernels_pallas.kv_pages import make_pages
from jaxserve.kernels_pallas.paged_attention.tpu_decode import list_decode_work
from jaxserve.kernels_pallas.paged_attention.tpu_plan import CHIPS, choose_decode_blocks
from jaxserve.kernels_pallas.paged_attention.tpu_prefill import choose_blocks, list_prefill_work
from jaxserve.kernels_pallas.paged_attention.tpu_step import list_step_work

CHIP = CHIPS["TPU v5 lite"]
PAGE_SIZE, NUM_HEADS, NUM_TOKENS = 128, 14, 64
TABLE_XW = jnp.arange(5 * 3, dtype=jnp.int32).reshape(5, 3)
DECODE = (jnp.array([3, 0, 4]), jnp.array([300, 7, 0]))
PREFILL = (jnp.array([1, 2]), jnp.array([0, 40]), jnp.array([40, 3]), jnp.array([168, 3]))
KV = make_pages(16, PAGE_SIZE, 2, 128, "bfloat16")


def list_work(decode, prefill):
    sizes = {"num_tokens": NUM_TOKENS, "num_heads": NUM_HEADS, "chip": CHIP}
    return list_step_work(KV, TABLE_XW, decode, prefill, **sizes)


def test_moved_to_a_layers_pages_it_is_that_layers_work():
    work = list_work(DECODE, PREFILL).move(jnp.int32(16))
    blocks = choose_decode_blocks(KV.layout, PAGE_SIZE, 1, CHIP)
    decode = list_decode_work(TABLE_XW + 16, *DECODE, blocks=blocks)
    blocks = choose_blocks(KV.layout, PAGE_SIZE, NUM_TOKENS, NUM_HEADS, CHIP)
    prefill = list_prefill_work(TABLE_XW + 16, *PREFILL, num_tokens=NUM_TOKENS, blocks=blocks)
    for ours, theirs in ((work.decode, decode), (work.prefill, prefill)):
        assert ours is not None
        jax.tree.map(np.testing.assert_array_equal, ours.tiles, theirs.tiles)
        width = TABLE_XW.shape[1]  # behind it is padding, which nobody reads
        np.testing.assert_array_equal(ours.table_C1W[..., :width], theirs.table_C1W[..., :width])


def test_a_step_without_rows_or_chunks_has_no_work_of_them():
    none = jnp.zeros(0, jnp.int32)
    assert list_work((none, none), PREFILL).decode is None
    assert list_work(DECODE, (none, none, none, none)).prefill is None
