"""Requests that share a prefix: what is cached, what it saves, and who waits for whom."""

import pytest

from jaxserve.scheduler.plan import StepLimits
from jaxserve.scheduler.schedule import abort, flush
from jaxserve.scheduler.state import new_state
from tests.scheduler.steps import PAGE, TOKEN, list_rids, run_step, run_to_end, submit


@pytest.mark.parametrize("page_size", [1, 16, 64, 128])
def test_cached_tokens_are_exactly_the_whole_pages_of_the_longest_known_prefix(page_size):
    state = new_state(num_pages=50_000 // page_size, page_size=page_size, max_rows=8)
    limits = StepLimits(page_size, 8, 4, 4096, (1024, 4096))
    expectations = [(100, 0), (10_000, 100), (10_000, 9_999), (1_000, 999), (11_000, 10_000)]
    for num_tokens, num_cached in expectations:
        submit(state, "a", [1000 + index for index in range(num_tokens)], max_new_tokens=4)
        deltas = run_to_end(state, limits)
        assert deltas[-1].num_cached_tokens == num_cached // page_size * page_size


def test_replies_are_cached_too_except_the_last_token_which_was_never_fed():
    state = new_state(num_pages=50, page_size=PAGE, max_rows=8)
    submit(state, "a", [1, 2, 3], max_new_tokens=5)
    run_to_end(state)
    conversation = [1, 2, 3] + [TOKEN] * 5
    submit(state, "b", [*conversation, 4, 5])
    assert run_to_end(state)[-1].num_cached_tokens == 4  # 7 of the 8 tokens were computed


def test_a_burst_with_a_common_prefix_computes_it_once():
    state = new_state(num_pages=100, page_size=PAGE, max_rows=8)
    prefix = [7] * 40
    for rid in ("a", "b", "c"):
        submit(state, rid, [*prefix, ord(rid)])
    submit(state, "other", [8] * 5)
    plan, _ = run_step(state)
    assert list_rids(state, plan.chunks) == ["a"]  # 32 tokens: the step is full
    plan, _ = run_step(state)
    assert list_rids(state, plan.chunks) == ["a", "other"]  # b and c are passed over, and lose nothing
    plan, _ = run_step(state)
    assert [(chunk.start, len(chunk.token_ids)) for chunk in plan.chunks] == [(40, 1), (40, 1)]
    assert run_to_end(state)[-1].num_cached_tokens == 40


def test_a_hold_lapses_when_the_leader_goes_away():
    state = new_state(num_pages=100, page_size=PAGE, max_rows=8)
    submit(state, "a", [7] * 40)
    submit(state, "b", [7] * 40)
    run_step(state)
    abort(state, "a")
    plan, _ = run_step(state)
    assert [(chunk.start, len(chunk.token_ids)) for chunk in plan.chunks] == [(32, 8)]  # of b


def test_flush_empties_the_cache_when_idle_and_refuses_otherwise():
    state = new_state(num_pages=50, page_size=PAGE, max_rows=8)
    submit(state, "a", range(9))
    assert not flush(state)
    run_to_end(state)
    assert state.cache.num_cached > 0
    assert flush(state)
    assert state.cache.num_cached == 0
    assert state.pool.num_free == 49
