"""Requests that give their pages back before they are done: retraction and abort."""

from dataclasses import replace

import pytest

from jaxserve.scheduler.integrity import check_integrity
from jaxserve.scheduler.schedule import abort, schedule
from jaxserve.scheduler.state import has_work, new_state, num_free_pages, num_waiting
from jaxserve.types import FinishReason
from tests.scheduler.steps import LIMITS, PAGE, TOKEN, finish_step, list_rids, run_step, run_to_end, submit


def run_until_retraction(state):
    while state.num_retractions == 0:
        plan, _ = run_step(state)
    return plan


def test_the_one_with_the_fewest_output_tokens_gives_way_and_loses_nothing():
    state = new_state(num_pages=9, page_size=PAGE, max_rows=8)
    for rid in "abc":  # one after the other: a is ahead of b, and b of c
        submit(state, rid, [ord(rid)] * 4, max_new_tokens=12)
        run_step(state)
    plan = run_until_retraction(state)
    assert list_rids(state, plan.decode) == ["a", "b"]
    (waiting,) = state.waiting
    assert (waiting.rid, waiting.num_output_tokens) == ("c", 5)
    while num_waiting(state) > 0:
        plan, _ = run_step(state)
    (init,), (chunk,) = plan.inits, plan.chunks
    assert (init.prompt_ids, init.output_ids) == ([ord("c")] * 4, [TOKEN] * 5)
    assert (chunk.epoch, chunk.token_ids) == (1, [ord("c")] * 4 + [TOKEN] * 4)
    last = [delta for delta in run_to_end(state) if delta.rid == "c"][-1]
    assert (last.num_output_tokens, last.num_retractions) == (12, 1)
    assert last.num_cached_tokens == 0  # tells of the first admission, whatever came later


def test_among_equals_the_latest_gives_way():
    state = new_state(num_pages=9, page_size=PAGE, max_rows=8)
    for rid in "abc":
        submit(state, rid, [ord(rid)] * 4, max_new_tokens=12)
    run_until_retraction(state)
    assert [seq.rid for seq in state.waiting] == ["c"]


def test_retracted_requests_are_queued_by_arrival_before_those_that_never_ran():
    state = new_state(num_pages=9, page_size=PAGE, max_rows=3)
    for rid in "abc":
        submit(state, rid, [ord(rid)] * 4, max_new_tokens=28)
    run_step(state)
    submit(state, "urgent", [1], priority=9)
    while state.num_retractions < 2:
        run_step(state)
    assert [seq.rid for seq in state.waiting] == ["b", "c", "urgent"]


def test_a_row_planned_for_the_one_that_gives_way_is_taken_out_of_the_step():
    """Its page has another owner in that very step, and the two would write to the same place."""
    state = new_state(num_pages=8, page_size=PAGE, max_rows=8)
    submit(state, "old", [1] * 4)
    run_step(state)
    submit(state, "early", [2] * 4, max_new_tokens=12)
    submit(state, "late", [3] * 3, max_new_tokens=12, priority=1)
    run_step(state)
    assert list_rids(state, state.running.values()) == ["old", "late", "early"]  # rows in this order
    while state.num_retractions == 0:
        page_ids = state.by_rid["late"].page_ids
        plan, _ = run_step(state)
    # late had its row, for position 7. Then early found no page for its position 8, and of the two, who
    # have the same number of output tokens, late arrived later.
    assert list_rids(state, plan.decode) == ["old", "early"]
    assert (plan.decode[1].position, plan.decode[1].page_id) == (8, page_ids[1])
    (waiting,) = state.waiting
    assert (waiting.rid, waiting.num_known) == ("late", 8)


def test_a_request_with_nothing_left_to_plan_gives_way_last():
    state = new_state(num_pages=9, page_size=PAGE, max_rows=8)
    submit(state, "a", [1] * 8, max_new_tokens=12)
    submit(state, "b", [2] * 7, max_new_tokens=12)
    finish_step(state, schedule(state, LIMITS))
    submit(state, "done", [3] * 4, max_new_tokens=1)
    in_flight = []
    while state.num_retractions == 0:
        in_flight.append(schedule(state, LIMITS))
    assert [seq.rid for seq in state.waiting] == ["b"]  # and not "done", which has no output token yet
    deltas = [delta for plan in in_flight for delta in finish_step(state, plan)]
    assert [delta.finish for delta in deltas if delta.rid == "done"] == [FinishReason(kind="length")]


def test_the_oldest_gets_its_next_page_before_anyone_else():
    """A prefill in progress is not stalled by younger sequences whose replies outgrow their claims."""
    state = new_state(num_pages=16, page_size=PAGE, max_rows=8)
    limits = replace(LIMITS, max_chunk_tokens=4, token_buckets=(4,))
    submit(state, "long", range(40), max_new_tokens=2)
    submit(state, "x", [50], max_new_tokens=24, priority=1)
    submit(state, "y", [60], max_new_tokens=24, priority=1)
    starts = []
    for _ in range(11):
        plan, _ = run_step(state, limits)
        starts += [chunk.start for chunk in plan.chunks if chunk.seq_id == 0]
    # 2 tokens beside the prompts of x and y, then 4 in every step; at 34 two, since the page ends there
    # and no other is free; but never none.
    assert starts == [0, *range(2, 35, 4), 36]
    assert [seq.rid for seq in state.waiting] == ["y"]


def reach_waiting(state):
    submit(state, "a", range(40))


def reach_mid_prefill(state):
    submit(state, "a", range(40))
    run_step(state)


def reach_decoding(state):
    submit(state, "a", range(4))
    run_step(state)
    run_step(state)


def reach_in_flight(state):
    submit(state, "a", range(4))
    state_plans = [schedule(state, LIMITS) for _ in range(3)]
    assert [plan.is_empty for plan in state_plans] == [False] * 3


def reach_retracted(state):
    submit(state, "first", [70] * 30, max_new_tokens=30)
    submit(state, "a", range(4), max_new_tokens=30)
    while state.num_retractions == 0:
        run_step(state)
    abort(state, "first")


@pytest.mark.parametrize(
    "reach", [reach_waiting, reach_mid_prefill, reach_decoding, reach_in_flight, reach_retracted]
)
def test_abort_gives_everything_back_at_once_at_every_stage(reach):
    state = new_state(num_pages=14, page_size=PAGE, max_rows=2)
    reach(state)
    seq = state.by_rid["a"]
    delta = abort(state, "a")
    check_integrity(state)
    assert delta is not None
    assert delta.finish is not None
    assert (delta.rid, delta.token_ids, delta.finish.kind) == ("a", [], "abort")
    assert delta.num_output_tokens == seq.num_output_tokens
    assert not has_work(state)
    assert num_free_pages(state) == 13
    assert abort(state, "a") is None


def test_results_for_an_aborted_request_are_dropped():
    state = new_state(num_pages=14, page_size=PAGE, max_rows=2)
    submit(state, "a", range(4))
    submit(state, "b", range(50, 54))
    plan = schedule(state, LIMITS)
    abort(state, "a")
    submit(state, "a", range(4))  # the same name again is another request
    assert [delta.rid for delta in finish_step(state, plan)] == ["b"]
