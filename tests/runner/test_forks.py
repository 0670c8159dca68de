"""Forks: block tables and pages change on the device exactly as the plan says, in place."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kernels_pallas.kv_layer import KVLayer
from jaxserve.runner.buckets import make_ladder
from jaxserve.runner.device_state import PoolSize
from jaxserve.runner.forks import MAX_FORKS, pack_forks, write_forks
from jaxserve.runner.runner import ModelRunner
from jaxserve.scheduler.plan import DecodeRow, PageCopy, PageTable, PrefillChunk, SlotInit, StepPlan
from jaxserve.types import TokenParams
from tests.goldens.read import read_tiny_goldens

PAGE_SIZE = 8
POOL = PoolSize(num_pages=2049, page_size=PAGE_SIZE, num_slots=12, table_width=32)
GREEDY = TokenParams(max_new_tokens=32)


@pytest.fixture(scope="module")
def runner(model):
    ladder = make_ladder(max_rows=2, max_tokens=64, min_rows=2, mixes=False)
    runner = ModelRunner(model, model.cfg, POOL, jnp.dtype(jnp.float32), ladder)
    runner.warm_up(lambda *_: None)
    runner.programs.compile_forks()
    yield runner
    runner.close()


def test_a_fork_writes_the_pool_in_place(runner):
    """Every byte of the pool is an alias of the donated input, and temporaries are pages, not pools."""
    memory = runner.programs.write_forks.memory_analysis()
    assert memory.alias_size_in_bytes >= runner.kv_bytes
    assert memory.temp_size_in_bytes < runner.kv_bytes / 50


def test_a_page_of_stacked_layers_is_copied_in_every_layer():
    pool_LPSKH = jax.random.normal(jax.random.key(0), (3, 6, 2, 1, 4))
    kv = KVLayer(pool_LPSKH, -pool_LPSKH)
    state = SimpleNamespace(kv=kv, table_XW=jnp.zeros((2, 4), jnp.int32), _replace=lambda **fields: fields)
    (packed,) = pack_forks([], [PageCopy(source=5, target=2)], 1, 4)
    copied = write_forks(state, jnp.asarray(packed))["kv"]  # type: ignore[arg-type]
    want = np.array(pool_LPSKH)
    want[:, 2] = want[:, 5]
    np.testing.assert_array_equal(copied.k_PSKH, want)
    np.testing.assert_array_equal(copied.v_PSKH, -want)


def test_tables_and_copies_of_several_launches_are_those_of_the_plan(runner):
    count = MAX_FORKS + 3
    state = jax.tree.map(
        lambda x: (
            jax.random.uniform(jax.random.key(x.ndim), x.shape, jnp.float32).astype(x.dtype)
            if jnp.issubdtype(x.dtype, jnp.floating)
            else jnp.ones_like(x)
        ),
        runner._state,
    )
    before = jax.tree.map(np.asarray, state)
    tables = [PageTable(slot, list(range(slot, 3 * slot))) for slot in range(1, count)]
    copies = [PageCopy(source=5 + i // 2, target=100 + i) for i in range(count)]  # each source twice
    launches = pack_forks(tables, copies, POOL.num_slots, POOL.table_width)
    assert len(launches) == 2
    for packed in launches:
        state = jax.jit(write_forks)(state, packed)
    for old, new in zip(jax.tree.leaves(before.kv), jax.tree.leaves(state.kv), strict=True):
        want_PSKH = np.array(old)
        for copy in copies:
            want_PSKH[copy.target] = old[copy.source]
        np.testing.assert_array_equal(new, want_PSKH)
    want_XW = np.array(before.table_XW)
    want_XW[POOL.num_slots] = 0  # trash
    for table in tables:
        want_XW[table.slot] = np.pad(table.page_ids, (0, POOL.table_width - len(table.page_ids)))
    np.testing.assert_array_equal(state.table_XW, want_XW)
    same = [name for name in before._fields if name not in ("kv", "table_XW")]
    for name in same:
        np.testing.assert_array_equal(getattr(state, name), getattr(before, name))


def test_copies_that_depend_on_their_order_are_not_taken():
    with pytest.raises(AssertionError, match="depend on their order"):
        pack_forks([], [PageCopy(3, 4), PageCopy(4, 5)], 12, 32)


def test_a_forked_slot_goes_on_where_its_parent_was(runner):
    """The parent feeds another token at the same position, into a page of its own: neither sees the other."""
    golden = read_tiny_goldens("qwen2")[33]
    prompt, first_id = golden.prompt_ids, golden.greedy_ids[0]
    chunk = PrefillChunk(0, 0, 0, 0, prompt, [1, 2, 3, 4, 5], True)
    runner.step(StepPlan(0, (SlotInit(0, GREEDY, prompt, []),), (), (chunk,))).read()
    runner.compiles.expect_no_more()
    parent = DecodeRow(0, 0, 0, 33, 5, token_id=77)
    child = DecodeRow(1, 0, 0, 33, 9, token_id=first_id)
    plan = StepPlan(
        1,
        (SlotInit(1, GREEDY, [], []),),
        (parent, child),
        (),
        tables=(PageTable(1, [1, 2, 3, 4, 9]),),
        copies=(PageCopy(5, 9),),
    )
    other_id, second_id = runner.step(plan).read().token_ids
    assert second_id == golden.greedy_ids[1]
    # What the parent fed is its own: the device's memory of its last token goes on from there.
    alone = PrefillChunk(2, 1, 0, 0, [*prompt, 77], [11, 12, 13, 14, 15], True)
    (want_id,) = runner.step(StepPlan(2, (SlotInit(2, GREEDY, prompt, []),), (), (alone,))).read().token_ids
    assert other_id == want_id
    rows = (DecodeRow(1, 0, 0, 34, 9), DecodeRow(0, 0, 0, 34, 5))
    third_id, _ = runner.step(StepPlan(3, (), rows, ())).read().token_ids
    assert third_id == golden.greedy_ids[2]
    assert runner.compile_counts()[1] == 0
