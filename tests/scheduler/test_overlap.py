"""Steps planned before the results of earlier ones are known: late stops, stale rows, dropped results."""

import pytest

from jaxserve.scheduler.schedule import abort, schedule
from jaxserve.scheduler.state import has_work, new_state, num_waiting
from jaxserve.types import FinishReason
from tests.scheduler.steps import LIMITS, PAGE, STOP, finish_step, list_rids, run_step, run_to_end, submit


@pytest.mark.parametrize("num_ahead", [1, 2])
def test_steps_are_planned_before_the_tokens_of_earlier_ones_are_known(num_ahead):
    state = new_state(num_pages=20, page_size=PAGE, max_rows=8)
    submit(state, "a", [1, 2, 3], max_new_tokens=4)
    ahead = [schedule(state, LIMITS) for _ in range(num_ahead + 1)]
    assert [row.position for plan in ahead for row in plan.decode] == list(range(3, 3 + num_ahead))
    deltas = []
    while has_work(state):
        deltas += finish_step(state, ahead.pop(0))
        plan = schedule(state, LIMITS)
        if not plan.is_empty:
            ahead.append(plan)
    assert [delta.num_output_tokens for delta in deltas] == [1, 2, 3, 4]
    assert not ahead  # never more than max_new_tokens, those in flight included


@pytest.mark.parametrize("num_ahead", [1, 2])
def test_a_stop_is_learnt_late_and_the_extra_tokens_are_thrown_away(num_ahead):
    state = new_state(num_pages=20, page_size=PAGE, max_rows=1)
    submit(state, "a", [1, 2, 3])
    submit(state, "b", [4, 5, 6])
    first, *stale = [schedule(state, LIMITS) for _ in range(num_ahead + 1)]
    (delta,) = finish_step(state, first, token_id=STOP)
    assert delta.finish == FinishReason(kind="stop", matched=STOP)
    after = schedule(state, LIMITS)  # b has a's slot and pages at once
    assert list_rids(state, after.chunks) == ["b"]
    assert after.inits[0].slot == first.inits[0].slot
    assert [finish_step(state, plan) for plan in stale] == [[]] * num_ahead
    assert [delta.rid for delta in finish_step(state, after)] == ["b"]


def test_results_from_before_a_retraction_are_dropped_and_sampled_again():
    state = new_state(num_pages=8, page_size=PAGE, max_rows=8)
    submit(state, "a", [1] * 12, max_new_tokens=12)
    submit(state, "b", [2] * 8, max_new_tokens=12)
    in_flight, deltas = [], []
    while has_work(state):
        plan = schedule(state, LIMITS)
        if not plan.is_empty:
            in_flight.append(plan)
        if plan.is_empty or len(in_flight) > 2:
            deltas += finish_step(state, in_flight.pop(0))
    assert state.num_retractions > 0
    for rid in "ab":
        counts = [delta.num_output_tokens for delta in deltas if delta.rid == rid]
        assert counts == list(range(1, 13))


def test_a_chunk_from_before_a_retraction_is_not_taken_for_the_one_after_it():
    state = new_state(num_pages=10, page_size=PAGE, max_rows=8)
    submit(state, "a", [1] * 4, max_new_tokens=20)
    submit(state, "c", [3] * 8, max_new_tokens=20)
    run_step(state)
    submit(state, "b", [2] * 4, max_new_tokens=10)
    plans = []
    while state.num_retractions == 0:
        plans.append(schedule(state, LIMITS))
    abort(state, "c")  # makes room for b to come back at once
    while num_waiting(state) > 0:
        plans.append(schedule(state, LIMITS))
    assert [(chunk.seq_id, chunk.epoch) for plan in plans for chunk in plan.chunks] == [(2, 0), (2, 1)]
    deltas = [delta for plan in plans for delta in finish_step(state, plan)] + run_to_end(state)
    counts = [delta.num_output_tokens for delta in deltas if delta.rid == "b"]
    assert counts == list(range(1, 11))


def test_the_pages_a_stale_row_writes_are_never_cached_ones():
    """a stops with position 7 known but not computed, and a stale row that computes it. The page is full
    then, and may be cached; the next stale position, 8, lies in a page that is given back."""
    state = new_state(num_pages=20, page_size=PAGE, max_rows=8)
    submit(state, "a", [1] * 7)
    plans = [schedule(state, LIMITS) for _ in range(3)]
    assert [row.position for plan in plans for row in plan.decode] == [7, 8]
    finish_step(state, plans[0], token_id=STOP)
    assert state.cache.num_cached == 2
    cached = [node.page_id for node in state.cache.list_nodes()]
    assert plans[1].decode[0].page_id in cached
    assert plans[2].decode[0].page_id not in cached
