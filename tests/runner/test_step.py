"""The step programs of a tiny model: what they copy, what they compile, and that padding does no harm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.runner.batch import pack_step, packed_size, slot_params, unpack_step
from jaxserve.runner.buckets import Shape, make_ladder
from jaxserve.runner.device_state import PoolSize
from jaxserve.runner.runner import ModelRunner
from jaxserve.scheduler.plan import DecodeRow, PrefillChunk, SlotInit, StepPlan
from jaxserve.types import TokenParams
from tests.goldens.read import read_tiny_goldens

PAGE_SIZE = 8
POOL = PoolSize(num_pages=4097, page_size=PAGE_SIZE, num_slots=4, table_width=32)
GREEDY = TokenParams(max_new_tokens=32)


@pytest.fixture
def runner(model):
    ladder = make_ladder(max_rows=4, max_tokens=64, min_rows=1, mixes=True)
    runner = ModelRunner(model, model.cfg, POOL, jnp.dtype(jnp.float32), ladder)
    runner.warm_up(lambda *_: None)
    yield runner
    runner.close()


def prefill(slot: int, prompt: list[int], first_page: int) -> StepPlan:
    pages = list(range(first_page, first_page + len(prompt) // PAGE_SIZE + 1))
    return StepPlan(
        step=0,
        inits=(SlotInit(slot, GREEDY, prompt, []),),
        decode=(),
        chunks=(PrefillChunk(slot, slot, 0, 0, prompt, pages, True),),
    )


def row(slot: int, position: int, first_page: int) -> DecodeRow:
    return DecodeRow(slot, slot, 0, position, first_page + position // PAGE_SIZE)


def test_a_step_writes_the_pool_in_place(runner):
    """Every byte of the pool is an alias of the donated input, and no temporary comes near its size."""
    for program in runner.programs.ready.values():
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes >= runner.kv_bytes
        assert memory.temp_size_in_bytes < runner.kv_bytes / 8


def test_greedy_tokens_come_one_a_step_without_the_host_having_seen_them(runner):
    """Steps are launched ahead of the tokens they feed, as the engine's loop does."""
    golden = read_tiny_goldens("qwen2")[33]
    length = len(golden.prompt_ids)
    pending = [runner.step(prefill(2, golden.prompt_ids, first_page=5))]
    for position in range(length, length + 31):
        pending.append(runner.step(StepPlan(0, (), (row(2, position, 5),), ())))
    assert [step.read().token_ids[0] for step in pending] == golden.greedy_ids


def test_a_window_gives_the_tokens_of_its_steps(runner):
    """Three windows of four launched ahead, over the ends of pages; the second sequence leaves in the last
    one, after two steps."""
    goldens = read_tiny_goldens("qwen2")
    long, short = goldens[33], goldens[7]
    runner.programs.compile_one(Shape(4, 0, 4))
    got = [
        runner.step(prefill(0, long.prompt_ids, 1)).read().token_ids,
        runner.step(prefill(3, short.prompt_ids, 9)).read().token_ids,
    ]
    pending = []
    for first in (0, 4, 8):
        rows = [window_row(0, 33 + first, 1, 4), window_row(3, 7 + first, 9, 4 if first < 8 else 2)]
        pending.append(runner.step(StepPlan(0, (), tuple(rows), (), window=4)))
    results = [step.read().token_ids for step in pending]
    assert got[0] + [token for result in results for token in result[:4]] == long.greedy_ids[:13]
    assert got[1] + [token for result in results for token in result[4:]] == short.greedy_ids[:11]
    for slot, position, first_page, golden in ((0, 45, 1, long), (3, 17, 9, short)):  # single steps go on
        step = runner.step(StepPlan(0, (), (row(slot, position, first_page),), ()))
        assert step.read().token_ids == [golden.greedy_ids[position - len(golden.prompt_ids) + 1]]


def window_row(slot: int, position: int, first_page: int, num_steps: int) -> DecodeRow:
    page = first_page + position // PAGE_SIZE
    is_crossing = (position + num_steps - 1) // PAGE_SIZE > position // PAGE_SIZE
    next_page = page + 1 if is_crossing else 0
    return DecodeRow(slot, slot, 0, position, page, num_steps=num_steps, next_page_id=next_page)


def test_neighbours_and_padding_change_nothing(runner):
    """Two sequences of different lengths in one step, then one of them alone."""
    goldens = read_tiny_goldens("qwen2")
    long, short = goldens[33], goldens[7]
    runner.programs.compile_one(Shape(4, 0))
    got = [
        runner.step(prefill(0, long.prompt_ids, 1)).read().token_ids,
        runner.step(prefill(3, short.prompt_ids, 9)).read().token_ids,
    ]
    tokens = {0: got[0], 3: got[1]}
    for step in range(20):
        rows = [row(0, 33 + step, 1), row(3, 7 + step, 9)]
        for slot, token in zip(
            (0, 3), runner.step(StepPlan(0, (), tuple(rows), ())).read().token_ids, strict=True
        ):
            tokens[slot].append(token)
    assert tokens[0] == long.greedy_ids[:21]
    assert tokens[3] == short.greedy_ids[:21]
    assert runner.step(StepPlan(0, (), (row(3, 27, 9),), ())).read().token_ids == [short.greedy_ids[21]]


def test_a_mixed_step_runs_as_one_program_once_it_is_ready(runner):
    goldens = read_tiny_goldens("qwen2")
    long, short = goldens[33], goldens[7]
    plan = prefill(1, short.prompt_ids, 20)
    mixed = StepPlan(0, plan.inits, (row(0, 33, 1),), plan.chunks)

    def run() -> tuple[list[int], int]:
        runner.step(prefill(0, long.prompt_ids, 1)).read()
        step = runner.step(mixed)
        return step.read().token_ids, len(step.launches)

    apart, num_apart = run()
    runner.programs.compile_one(Shape(4, 16))
    together, num_together = run()
    assert (num_apart, num_together) == (2, 1)
    assert apart == together == [long.greedy_ids[1], short.greedy_ids[0]]


def test_limits_grow_with_the_programs_that_are_ready(runner):
    before = runner.limits()
    assert (before.max_rows, before.max_chunk_tokens, before.token_buckets) == (1, 64, (64,))
    for shape in runner.programs.ladder.shapes:
        if shape not in runner.programs.ready:
            runner.programs.compile_one(shape)
    after = runner.limits()
    assert (after.max_rows, after.token_buckets, after.can_fork) == (4, (16, 32, 64), False)
    runner.programs.compile_forks()
    assert runner.limits().can_fork
    assert runner.compile_counts()[2]


def test_once_warm_a_step_compiles_nothing(runner):
    runner.step(prefill(0, [5, 6, 7], 1)).read()
    before = runner.compile_counts()[0]
    runner.compiles.expect_no_more()
    extras = TokenParams(max_new_tokens=4, temperature=0.7, presence_penalty=1.0, logit_bias=((5, 1.0),))
    plan = prefill(0, [5, 6, 7, 8], 1)
    plan = StepPlan(0, (SlotInit(0, extras, [5, 6, 7, 8], []),), (), plan.chunks)
    runner.step(plan).read()
    runner.step(StepPlan(0, (), (row(0, 4, 1),), ())).read()
    assert runner.compile_counts()[:2] == (before, 0)
    jax.jit(lambda x: x * 3.14159)(np.ones(17)).block_until_ready()
    assert runner.compile_counts()[1] == 1  # a compile anywhere in the process is noticed


def test_a_rehearsal_runs_each_program_once_and_leaves_what_is_cached(runner):
    """Sequence 1 keeps its pages from before the rehearsals, in the slot that they use."""
    golden = read_tiny_goldens("qwen2")[33]
    first = runner.step(prefill(0, golden.prompt_ids, first_page=1)).read().token_ids
    runner.programs.compile_one(Shape(4, 16))
    num_run = 0
    while runner.rehearse():
        num_run += 1
    assert num_run == len(runner.programs.ready) - 1  # the prefill program had run
    page_ids = list(range(1, 6))
    chunk = PrefillChunk(0, 0, 0, 33, first, page_ids, True)
    step = runner.step(StepPlan(0, (SlotInit(0, GREEDY, golden.prompt_ids, first),), (), (chunk,)))
    assert first + step.read().token_ids == golden.greedy_ids[:2]
    assert not runner.rehearse()


def test_what_is_packed_is_what_the_program_reads():
    shape = Shape(num_rows=2, num_tokens=8)
    params_XF = np.zeros((4, len(slot_params(GREEDY, 1))), np.int32)
    params_XF[1] = slot_params(TokenParams(max_new_tokens=9, temperature=0.5, seed=77), 3)
    decode = [DecodeRow(slot=1, seq_id=0, epoch=0, position=17, page_id=6)]
    chunks = [PrefillChunk(2, 1, 0, 4, [50, 51, 52], [3, 9], samples=False)]
    packed = pack_step(shape, decode, chunks, params_XF, page_size=4, table_width=5)
    assert packed.shape == (packed_size(shape, 5),)
    last_token_X = jnp.asarray([70, 71, 72, 73])
    step = unpack_step(jnp.asarray(packed), shape, 4, last_token_X, jnp.zeros((4, 5), jnp.int32))
    batch = jax.tree.map(np.asarray, step.batch)
    assert batch.token_ids_T[:5].tolist() == [71, 73, 50, 51, 52]  # row 1 is padding: the trash slot's token
    assert batch.positions_T[:5].tolist() == [17, 0, 4, 5, 6]
    assert batch.write_index_T[:5].tolist() == [6 * 4 + 1, 0, 9 * 4, 9 * 4 + 1, 9 * 4 + 2]
    assert batch.decode_kv_len_R.tolist() == [18, 0]
    assert (batch.chunk_len_C[0], batch.chunk_kv_len_C[0], batch.chunk_token_C[0]) == (3, 7, 2)
    assert batch.table_XW[1].tolist() == [0, 0, 0, 0, 6]
    assert batch.table_XW[2].tolist() == [3, 9, 0, 0, 0]
    assert batch.sample_token_B[:3].tolist() == [0, 1, 4]
    assert step.slot_B[:3].tolist() == [1, 3, 3]  # the chunk does not sample: its token is not remembered
    assert (float(step.rows.temperature[0]), int(step.rows.seed[0])) == (0.5, 77)
    assert step.rows.position[:3].tolist() == [18, 1, 7]
