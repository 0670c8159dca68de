"""schedule and apply by example: the life of a request, and what a step holds."""

from dataclasses import replace

import pytest

from jaxserve.errors import InvalidRequestError
from jaxserve.scheduler.admit import fill_bucket
from jaxserve.scheduler.plan import DecodeRow, PrefillChunk, SlotInit
from jaxserve.scheduler.schedule import abort, schedule
from jaxserve.scheduler.state import has_work, new_state, num_free_pages, num_waiting
from jaxserve.types import FinishReason
from tests.scheduler.steps import (
    LIMITS,
    PAGE,
    STOP,
    TOKEN,
    finish_step,
    list_rids,
    run_step,
    run_to_end,
    submit,
)


def test_a_request_from_prompt_to_end():
    state = new_state(num_pages=10, page_size=PAGE, max_rows=8)
    submit(state, "a", [10, 11, 12], max_new_tokens=3)
    params = state.waiting[0].params

    plan, (first,) = run_step(state, token_id=20)
    assert plan.inits == (SlotInit(slot=0, params=params, prompt_ids=[10, 11, 12], output_ids=[]),)
    assert plan.chunks == (
        PrefillChunk(slot=0, seq_id=0, epoch=0, start=0, token_ids=[10, 11, 12], page_ids=[1], samples=True),
    )
    assert plan.decode == ()
    assert (first.rid, first.token_ids, first.num_prompt_tokens, first.finish) == ("a", [20], 3, None)

    plan, _ = run_step(state, token_id=21)  # token 20 is fed at position 3, the last place of page 1
    assert plan.decode == (DecodeRow(slot=0, seq_id=0, epoch=0, position=3, page_id=1, token_id=20),)
    plan, (last,) = run_step(state, token_id=22)  # position 4 begins page 2
    assert plan.decode == (DecodeRow(slot=0, seq_id=0, epoch=0, position=4, page_id=2, token_id=21),)
    assert last.token_ids == [22]
    assert last.num_output_tokens == 3
    assert last.finish == FinishReason(kind="length")
    assert not has_work(state)
    assert num_free_pages(state) == 9


def test_a_stop_token_ends_it_and_is_part_of_the_reply():
    state = new_state(num_pages=10, page_size=PAGE, max_rows=8)
    submit(state, "a", [1, 2, 3])
    run_step(state)
    _, (delta,) = run_step(state, token_id=STOP)
    assert delta.token_ids == [STOP]
    assert delta.finish == FinishReason(kind="stop", matched=STOP)


def test_a_stop_token_before_min_new_tokens_is_a_token_like_any_other():
    state = new_state(num_pages=10, page_size=PAGE, max_rows=8)
    submit(state, "a", [1, 2, 3], min_new_tokens=3)
    finishes = [run_step(state, token_id=STOP)[1][0].finish for _ in range(3)]
    assert finishes == [None, None, FinishReason(kind="stop", matched=STOP)]


def test_max_new_tokens_0_computes_the_prompt_and_samples_nothing():
    state = new_state(num_pages=10, page_size=PAGE, max_rows=8)
    submit(state, "a", range(8), max_new_tokens=0)
    plan, (delta,) = run_step(state)
    assert [chunk.samples for chunk in plan.chunks] == [False]
    assert (delta.token_ids, delta.num_output_tokens, delta.finish) == ([], 0, FinishReason(kind="length"))
    assert state.cache.num_cached == 2  # the prompt's whole pages are there for the next request


def test_max_new_tokens_1_never_decodes():
    state = new_state(num_pages=10, page_size=PAGE, max_rows=8)
    submit(state, "a", range(8), max_new_tokens=1)
    plan = schedule(state, LIMITS)
    assert schedule(state, LIMITS).is_empty  # nothing more to ask for, though no result is in yet
    (delta,) = finish_step(state, plan)
    assert (delta.token_ids, delta.finish) == ([TOKEN], FinishReason(kind="length"))


def test_a_reply_is_clipped_to_the_pool_and_a_prompt_that_cannot_fit_is_refused():
    state = new_state(num_pages=4, page_size=PAGE, max_rows=8)  # room for 12 tokens
    with pytest.raises(InvalidRequestError, match=r"12 tokens, but the KV pool holds 12 .* at most 11"):
        submit(state, "too long", range(12))
    with pytest.raises(InvalidRequestError, match="prompt is empty"):
        submit(state, "empty", [])
    submit(state, "a", range(7), max_new_tokens=100)
    with pytest.raises(InvalidRequestError, match="'a' is in use"):
        submit(state, "a", range(7))
    deltas = run_to_end(state)
    assert deltas[-1].num_output_tokens == 5
    assert deltas[-1].finish == FinishReason(kind="length")


def test_decode_rows_come_first_in_order_of_admission_and_prefill_shares_the_step():
    state = new_state(num_pages=50, page_size=PAGE, max_rows=8)
    submit(state, "a", [1, 1, 1])
    submit(state, "b", [2, 2, 2])
    run_step(state)
    submit(state, "c", [3, 3, 3])
    plan, _ = run_step(state)
    assert list_rids(state, plan.decode) == ["a", "b"]
    assert list_rids(state, plan.chunks) == ["c"]
    plan, _ = run_step(state)
    assert list_rids(state, plan.decode) == ["a", "b", "c"]


def test_a_long_prompt_is_computed_in_chunks_and_only_the_last_one_samples():
    state = new_state(num_pages=50, page_size=PAGE, max_rows=8)
    submit(state, "a", range(72))
    chunks = [run_step(state)[0].chunks[0] for _ in range(3)]
    assert [(chunk.start, len(chunk.token_ids), chunk.samples) for chunk in chunks] == [
        (0, 32, False),
        (32, 32, False),
        (64, 8, True),
    ]
    assert [len(chunk.page_ids) for chunk in chunks] == [8, 16, 18]  # pages as they are needed
    assert chunks[2].page_ids[:16] == chunks[1].page_ids


def test_a_prefill_in_progress_goes_before_new_requests():
    state = new_state(num_pages=50, page_size=PAGE, max_rows=8)
    submit(state, "long", range(40))
    submit(state, "short", [50] * 6)
    plan, _ = run_step(state)
    assert list_rids(state, plan.chunks) == ["long"]
    plan, _ = run_step(state)
    assert list_rids(state, plan.chunks) == ["long", "short"]


@pytest.mark.parametrize(
    ("num_tokens", "computed"),
    [
        (0, 0),
        (5, 5),  # below the smallest bucket: all
        (8, 8),
        (9, 8),  # 7 of 16 would be padding: fill 8, leave 1
        (12, 12),  # a quarter of padding is accepted
        (20, 16),
        (24, 24),
        (32, 32),
    ],
)
def test_prefill_fills_a_bucket_or_leaves_the_rest_for_the_next_step(num_tokens, computed):
    assert fill_bucket(num_tokens, [8, 16, 32]) == computed


def test_the_tokens_left_over_by_a_bucket_come_next_and_page_borders_do_not_matter():
    state = new_state(num_pages=50, page_size=PAGE, max_rows=8)
    submit(state, "a", [1] * 6)
    submit(state, "b", [2] * 5)
    submit(state, "c", [3] * 7)
    plan, _ = run_step(state)  # 18 tokens: 16 now; c begins and ends within a page
    assert [len(chunk.token_ids) for chunk in plan.chunks] == [6, 5, 5]
    submit(state, "d", [4])
    plan, _ = run_step(state)
    assert [(chunk.start, len(chunk.token_ids)) for chunk in plan.chunks] == [(5, 2), (0, 1)]


def test_a_request_that_the_bucket_leaves_out_entirely_keeps_its_place_and_holds_nothing():
    state = new_state(num_pages=50, page_size=PAGE, max_rows=8, prefers_cached=False)
    submit(state, "warm", [2] * 5, max_new_tokens=0)
    run_step(state)
    submit(state, "a", [1] * 8)
    submit(state, "b", [2] * 6)  # 4 of them cached; its 2 tokens would need a bucket of 16
    plan, _ = run_step(state)
    assert list_rids(state, plan.chunks) == ["a"]
    assert num_waiting(state) == 1
    plan, _ = run_step(state)
    assert list_rids(state, plan.chunks) == ["b"]
    assert state.running[plan.chunks[0].seq_id].num_cached_tokens == 4


def test_only_ready_buckets_that_the_step_may_hold_are_filled():
    state = new_state(num_pages=50, page_size=PAGE, max_rows=8)
    submit(state, "a", range(40))
    plan, _ = run_step(state, replace(LIMITS, max_chunk_tokens=20))
    assert plan.num_chunk_tokens == 16
    plan, _ = run_step(state, replace(LIMITS, max_chunk_tokens=5))
    assert plan.num_chunk_tokens == 5  # padded to the smallest


def test_who_decodes_waits_for_a_shorter_chunk():
    state = new_state(num_pages=50, page_size=PAGE, max_rows=8)
    limits = replace(LIMITS, max_mixed_tokens=8)
    submit(state, "a", range(40))
    plan, _ = run_step(state, limits)
    assert plan.num_chunk_tokens == 32
    plan, _ = run_step(state, limits)
    assert plan.num_chunk_tokens == 8  # all that is left of it
    submit(state, "b", range(100, 140))
    plan, _ = run_step(state, limits)
    assert (len(plan.decode), plan.num_chunk_tokens) == (1, 8)


def test_admission_is_by_priority_then_arrival_within_slots_and_chunks():
    state = new_state(num_pages=50, page_size=PAGE, max_rows=3)
    for index, (rid, priority) in enumerate([("a", 0), ("b", 0), ("urgent", 5), ("c", 0)]):
        submit(state, rid, [index, 1], priority=priority)
    plan, _ = run_step(state, replace(LIMITS, max_chunks=2))
    assert list_rids(state, plan.chunks) == ["urgent", "a"]
    plan, _ = run_step(state, replace(LIMITS, max_chunks=2))
    assert list_rids(state, plan.chunks) == ["b"]  # the third and last slot
    assert num_waiting(state) == 1


def test_the_head_of_the_queue_waits_for_room_and_nobody_overtakes_it():
    state = new_state(num_pages=10, page_size=PAGE, max_rows=8)
    submit(state, "a", [1] * 12, max_new_tokens=10)
    run_step(state)
    # In the next step a holds 4 of the 9 pages and has a claim on one to grow, which leaves 4.
    submit(state, "big", [2] * 14)  # 4 pages, and one to grow
    submit(state, "small", [3])
    plan, _ = run_step(state)
    assert not plan.chunks
    assert num_waiting(state) == 2
    abort(state, "a")
    plan, _ = run_step(state)
    assert list_rids(state, plan.chunks) == ["big", "small"]
