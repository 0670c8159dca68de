"""Decode windows: when several steps run in one launch, and what a reply takes of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jaxserve.scheduler.plan import NO_TOKEN, StepResult
from jaxserve.scheduler.schedule import apply, schedule
from jaxserve.scheduler.state import new_state, num_free_pages
from jaxserve.types import FinishReason, ScoreParams
from tests.scheduler.steps import LIMITS, PAGE, STOP, TOKEN, finish_step, list_rids, run_step, submit

WINDOWED = replace(LIMITS, window=3, row_buckets=(2, 8), window_rows=(2, 8))


def start(num_requests: int, num_pages: int = 40, max_rows: int = 8, **params):
    """Requests behind their prefill, with one token known."""
    state = new_state(num_pages=num_pages, page_size=PAGE, max_rows=max_rows)
    for index in range(num_requests):
        submit(state, f"r{index}", [1, 2, 3 + index], **params)
    run_step(state)
    return state


def give(plan, *rows):
    assert [len(row) for row in rows] == [row.num_steps for row in plan.decode]
    return StepResult([token_id for row in rows for token_id in row])


def test_a_window_runs_over_the_end_of_a_page_and_is_followed_before_it_is_read():
    state = start(1)
    first = schedule(state, WINDOWED)
    second = schedule(state, WINDOWED)
    (row,) = first.decode
    assert (first.window, row.position, row.num_steps) == (3, 3, 3)
    assert (row.page_id, row.next_page_id) == tuple(next(iter(state.running.values())).page_ids[:2])
    assert (row.token_id, second.decode[0].token_id) == (TOKEN, NO_TOKEN)
    assert (second.decode[0].position, second.decode[0].next_page_id) == (6, state.running[0].page_ids[2])
    (delta,) = apply(state, first, give(first, [7, 8, 9]))
    assert (delta.token_ids, delta.num_output_tokens) == ([7, 8, 9], 4)


def test_a_row_takes_part_until_its_reply_is_full():
    state = start(1, max_new_tokens=9)
    submit(state, "short", [9, 9], max_new_tokens=3)
    run_step(state)
    plan = schedule(state, WINDOWED)
    assert [row.num_steps for row in plan.decode] == [3, 2]
    deltas = apply(state, plan, give(plan, [4, 5, 6], [7, 8]))
    assert [(delta.token_ids, delta.finish) for delta in deltas] == [
        ([4, 5, 6], None),
        ([7, 8], FinishReason(kind="length")),
    ]


def test_what_follows_a_stop_is_dropped_with_the_window_behind_it():
    state = start(1)
    plan, stale = schedule(state, WINDOWED), schedule(state, WINDOWED)
    (delta,) = apply(state, plan, give(plan, [4, STOP, 6]))
    assert (delta.token_ids, delta.finish) == ([4, STOP], FinishReason(kind="stop", matched=STOP))
    assert apply(state, stale, give(stale, [7, 7, 7])) == []
    assert num_free_pages(state) == state.pool.num_usable


def test_logits_that_are_no_numbers_end_a_reply_behind_the_tokens_before_them():
    state = start(1)
    plan = schedule(state, WINDOWED)
    (delta,) = apply(state, plan, give(plan, [4, NO_TOKEN, 6]))
    assert (delta.token_ids, delta.num_output_tokens) == ([4], 2)
    assert delta.finish is not None
    assert delta.finish.http_status == 500
    assert "at output token 3" in delta.finish.message


def test_there_is_none_while_a_prompt_is_in_its_prefill_or_could_enter():
    state = start(1)
    submit(state, "long", [5] * 40)
    mixed = schedule(state, WINDOWED)
    assert (mixed.window, list_rids(state, mixed.chunks)) == (1, ["long"])
    finish_step(state, mixed)
    assert schedule(state, WINDOWED).window == 1  # the rest of the prompt
    assert schedule(state, WINDOWED).window == 3


def test_who_waits_for_a_slot_alone_is_no_obstacle():
    """It could enter no sooner, but for a stop."""
    state = start(3, max_rows=2)
    assert len(state.waiting) == 1
    plan = schedule(state, WINDOWED)
    assert (plan.window, plan.num_waiting) == (3, 1)


def test_nobody_gives_way_for_a_window():
    """Two replies of the same length in a pool that holds a page less than both want at last."""
    state = start(2, num_pages=6, max_new_tokens=8)
    while all(seq.num_planned < 6 for seq in state.running.values()):
        plan = schedule(state, WINDOWED)
        apply(state, plan, StepResult([TOKEN] * sum(row.num_steps for row in plan.decode)))
    assert state.num_retractions == 0
    assert schedule(state, WINDOWED).window == 1


@pytest.mark.parametrize(("num_requests", "window"), [(1, 3), (3, 1)])
def test_only_where_its_program_is_no_larger_than_that_of_a_step(num_requests, window):
    limits = replace(WINDOWED, window_rows=(2,))  # that of 8 rows is not ready yet
    state = start(num_requests)
    assert schedule(state, limits).window == window


def test_the_last_tokens_come_in_single_steps():
    state = start(1, max_new_tokens=6)
    plans = [schedule(state, WINDOWED) for _ in range(3)]
    assert [plan.window for plan in plans] == [3, 1, 1]
    assert schedule(state, WINDOWED).is_empty


def test_a_search_has_none():
    state = start(1)
    submit(state, "search", [9, 9], beam_width=2, scores=ScoreParams(of_output=True, num_top=2))
    assert schedule(state, WINDOWED).chunks
    plan = schedule(state, WINDOWED)
    assert (list_rids(state, plan.decode), plan.window) == (["r0"], 1)
