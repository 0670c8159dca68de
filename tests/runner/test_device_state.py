"""The pool that is allocated: its bytes are those that sizing counts on, and a fork copies all of a page."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kernels_pallas.kv_pages import make_pages
from jaxserve.runner.device_state import PoolSize, compile_allocation, kv_bytes_per_token
from jaxserve.runner.forks import pack_forks, write_forks
from jaxserve.runner.memory import live_bytes
from jaxserve.scheduler.plan import PageCopy

CFG: Any = SimpleNamespace(
    num_layers=3, num_heads=4, num_kv_heads=2, head_dim=32, vocab_size=11, max_context=64
)
POOL = PoolSize(num_pages=7, page_size=4, num_slots=2, table_width=5)


@pytest.mark.parametrize(
    ("kv_dtype", "head_bytes"), [("float32", 64 * 4), ("bfloat16", 64 * 2), ("int8", 64 + 3 * 4)]
)
def test_a_token_takes_what_sizing_counts(kv_dtype, head_bytes):
    state = compile_allocation(CFG, POOL, jnp.dtype(kv_dtype))()
    per_token = kv_bytes_per_token(CFG, jnp.dtype(kv_dtype))
    assert per_token == 3 * 2 * head_bytes  # layers, heads; K with two scales and V with one
    assert live_bytes(state.kv) == POOL.num_pages * POOL.page_size * per_token


@pytest.mark.parametrize(("kv_dtype", "num_rows"), [("bfloat16", 1), ("int8", 2)])
def test_a_token_of_a_tpu_takes_whole_rows(kv_dtype, num_rows):
    state = compile_allocation(CFG, POOL, jnp.dtype(kv_dtype), make_kv=make_pages)()
    per_token = kv_bytes_per_token(CFG, jnp.dtype(kv_dtype), make_pages)
    assert per_token == 3 * num_rows * 512  # layers, and a row of scales where there are some
    assert live_bytes(state.kv) == POOL.num_pages * POOL.page_size * per_token


def test_a_page_of_an_int8_pool_is_copied_with_its_scales():
    state = compile_allocation(CFG, POOL, jnp.dtype(jnp.int8))()
    leaves, treedef = jax.tree.flatten(state.kv)
    assert len(leaves) == 3 * 4
    rng = np.random.default_rng(0)
    filled = [rng.integers(-127, 128, leaf.shape).astype(leaf.dtype) for leaf in leaves]
    state = state._replace(kv=jax.tree.unflatten(treedef, [jnp.asarray(values) for values in filled]))
    (packed,) = pack_forks([], [PageCopy(source=5, target=2)], POOL.num_slots, POOL.table_width)
    for new, old in zip(jax.tree.leaves(write_forks(state, jnp.asarray(packed)).kv), filled, strict=True):
        want = old.copy()
        want[2] = old[5]
        np.testing.assert_array_equal(new, want)
