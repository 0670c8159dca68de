"""Beam search in the scheduler: what is kept, whose pages it lives in, and that nothing is lost."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace

import pytest

from jaxserve.errors import InvalidRequestError
from jaxserve.scheduler.integrity import check_integrity
from jaxserve.scheduler.plan import NO_TOKEN, PageCopy, StepLimits, StepPlan, StepResult
from jaxserve.scheduler.schedule import abort, add, apply, schedule
from jaxserve.scheduler.state import has_work, new_state, num_free_pages
from jaxserve.types import FinishReason, ScoreParams, TokenParams, TokenScores
from tests.scheduler.memory_device import VOCAB, extend_hash, rate_tokens
from tests.scheduler.simulation import TOKEN_BUCKETS, Simulation
from tests.scheduler.steps import LIMITS, PAGE, STOP, TOKEN, list_rids, run_step, submit


def searching(width, max_new_tokens, num_top=None, stop_ids=(STOP,)):
    scores = ScoreParams(of_output=True, num_top=width if num_top is None else num_top)
    return TokenParams(
        max_new_tokens=max_new_tokens, beam_width=width, scores=scores, stop_ids=tuple(stop_ids)
    )


def submit_search(state, rid, prompt_ids, width=3, max_new_tokens=8, **params):
    add(state, rid=rid, prompt_ids=list(prompt_ids), params=searching(width, max_new_tokens, **params))


def row_of(**alternatives):
    """A row's scores; each alternative is t<id>=logprob, best first."""
    top_ids = [int(name[1:]) for name in alternatives]
    return TokenScores(-99.0, top_ids, list(alternatives.values()), [])


def answer(state, plan, *rows):
    """Apply a step that only a search takes part in."""
    deltas = apply(state, plan, StepResult([TOKEN] * len(rows), list(rows)))
    check_integrity(state)
    return deltas


def advance(state, *rows):
    plan = schedule(state, LIMITS)
    check_integrity(state)
    return plan, answer(state, plan, *rows)


def start_three_beams(state):
    """A search of width 3 after a prompt of one full page and two tokens; its first beams are 10, 11, 12."""
    submit_search(state, "a", range(6))
    plan, _ = advance(state, row_of(t10=-1.0, t11=-1.5, t12=-2.0))
    (chunk,) = plan.chunks
    return chunk.page_ids


EVEN = row_of(t10=-1.0, t11=-1.0, t12=-1.0)


def test_a_page_is_copied_for_all_that_share_it_but_the_last_and_only_when_it_is_written():
    state = new_state(num_pages=20, page_size=PAGE, max_rows=8)
    first, second = start_three_beams(state)
    plan, _ = advance(state, EVEN, EVEN, EVEN)
    assert [(row.position, row.token_id) for row in plan.decode] == [(6, 10), (6, 11), (6, 12)]
    assert len({row.slot for row in plan.decode}) == 3
    pages = [row.page_id for row in plan.decode]
    assert plan.copies == (PageCopy(second, pages[0]), PageCopy(second, pages[1]))
    assert pages[2] == second
    # The first child lives in its parent's slot, whose table needs no more than what its row says.
    assert [(table.slot, table.page_ids) for table in plan.tables] == [
        (plan.decode[1].slot, [first, pages[1]]),
        (plan.decode[2].slot, [first, second]),
    ]
    # All three are children of the first beam now: it keeps its page, shared, and two slots change hands.
    plan, _ = advance(state, EVEN, EVEN, EVEN)
    assert (len(plan.copies), len(plan.tables)) == (2, 2)
    assert {copy.source for copy in plan.copies} == {pages[0]}
    # The next position begins a page: each takes a new one, and the full one behind them stays shared.
    plan, _ = advance(state, row_of(t10=-1.0), row_of(t10=-1.5), row_of(t10=-2.0))
    assert plan.decode[0].position == 8
    assert plan.copies == ()
    assert len({row.page_id for row in plan.decode}) == 3


def test_a_finished_beam_keeps_competing_with_its_sum_and_holds_nothing():
    state = new_state(num_pages=20, page_size=PAGE, max_rows=8)
    submit_search(state, "a", range(6), width=2, max_new_tokens=3)
    advance(state, row_of(t901=-2.0, t10=-2.5))
    plan, _ = advance(state, row_of(t20=-0.25, t21=-0.5))
    assert [row.token_id for row in plan.decode] == [10]  # the finished one takes no row
    assert not plan.copies  # and no page
    _, deltas = advance(state, row_of(t30=-0.25, t901=-3.0))
    (delta,) = deltas
    assert [(beam.token_ids, beam.cumulative_logprob) for beam in delta.beams] == [
        ([STOP], -2.0),
        ([10, 20, 30], -3.0),
    ]
    assert [beam.finish for beam in delta.beams] == [
        FinishReason(kind="stop", matched=STOP),
        FinishReason(kind="length"),
    ]
    assert delta.finish == delta.beams[0].finish
    assert (delta.token_ids, delta.num_output_tokens, state.num_generated_tokens) == ([], 4, 4)
    assert delta.beams[1].scores == [
        TokenScores(-2.5, [STOP, 10], [-2.0, -2.5], []),
        TokenScores(-0.25, [20, 21], [-0.25, -0.5], []),
        TokenScores(-0.25, [30, STOP], [-0.25, -3.0], []),
    ]
    assert num_free_pages(state) == 19
    assert not has_work(state)


def test_a_finished_beam_can_be_pushed_out_by_better_ones():
    state = new_state(num_pages=20, page_size=PAGE, max_rows=8)
    submit_search(state, "a", range(6), width=2, max_new_tokens=2)
    advance(state, row_of(t10=-1.0, t901=-5.0))
    _, (delta,) = advance(state, row_of(t20=-1.0, t21=-2.0))
    assert [beam.token_ids for beam in delta.beams] == [[10, 20], [10, 21]]


def test_equal_sums_go_by_the_parents_rank_and_then_by_token_id():
    state = new_state(num_pages=20, page_size=PAGE, max_rows=8)
    submit_search(state, "a", range(6), width=4, max_new_tokens=2)
    advance(state, row_of(t7=-1.0, t901=-1.0, t950=-1.0))  # of these three, the second is finished
    _, (delta,) = advance(state, row_of(t30=0.0, t31=-0.5), row_of(t5=0.0, t6=0.0))
    found = [(beam.token_ids, beam.cumulative_logprob) for beam in delta.beams]
    assert found == [([7, 30], -1.0), ([STOP], -1.0), ([950, 5], -1.0), ([950, 6], -1.0)]


def test_fewer_alternatives_than_beams_are_all_kept():
    state = new_state(num_pages=20, page_size=PAGE, max_rows=8)
    submit_search(state, "a", range(6), width=5, max_new_tokens=2)
    advance(state, row_of(t1=-0.5, t2=-1.0))
    _, (delta,) = advance(state, row_of(t1=-0.5, t2=-1.0), row_of(t1=-0.25, t2=-1.0))
    assert [beam.token_ids for beam in delta.beams] == [[1, 1], [2, 1], [1, 2], [2, 2]]


def test_results_tell_as_many_alternatives_as_are_wanted():
    state = new_state(num_pages=50, page_size=PAGE, max_rows=8)
    params = searching(2, max_new_tokens=1)
    assert params.scores is not None
    params = replace(params, scores=replace(params.scores, num_told=1))
    add(state, rid="a", prompt_ids=[1] * 5, params=params)
    _, deltas = advance(state, row_of(t3=-0.5, t7=-1.5))
    found = [(beam.token_ids, beam.scores[0].logprob, beam.scores[0].top_ids) for beam in deltas[0].beams]
    assert found == [([3], -0.5, [3]), ([7], -1.5, [3])]


def test_a_row_without_numbers_ends_the_search_and_nobody_else():
    state = new_state(num_pages=40, page_size=PAGE, max_rows=8)
    start_three_beams(state)
    submit(state, "b", range(50, 54))
    plan = schedule(state, LIMITS)
    deltas = apply(state, plan, StepResult([TOKEN, NO_TOKEN, TOKEN, TOKEN], [EVEN, EVEN, EVEN, None]))
    check_integrity(state)
    assert [delta.rid for delta in deltas] == ["a", "b"]
    assert deltas[0].finish is not None
    assert (deltas[0].finish.kind, deltas[0].finish.http_status) == ("abort", 500)
    assert "at output token 2" in deltas[0].finish.message
    assert list(state.by_rid) == ["b"]


def test_abort_gives_all_slots_and_pages_back_though_rows_are_in_flight():
    state = new_state(num_pages=20, page_size=PAGE, max_rows=3)
    start_three_beams(state)
    plan = schedule(state, LIMITS)
    assert schedule(state, LIMITS).is_empty  # what comes next depends on what is in flight
    abort(state, "a")
    check_integrity(state)
    assert (len(state.free_slots), num_free_pages(state)) == (3, 19)
    assert answer(state, plan, EVEN, EVEN, EVEN) == []


def test_max_new_tokens_0_is_a_prefill_of_one_row():
    state = new_state(num_pages=20, page_size=PAGE, max_rows=2)
    submit_search(state, "a", range(6), width=3, max_new_tokens=0)
    _, (delta,) = run_step(state)
    assert (delta.finish, delta.beams) == (FinishReason(kind="length"), [])


def test_a_search_waits_for_all_its_slots_and_is_not_overtaken():
    state = new_state(num_pages=40, page_size=PAGE, max_rows=4)
    for rid in "xy":
        submit(state, rid, [ord(rid)] * 3, max_new_tokens=3)
    run_step(state)
    submit_search(state, "a", range(6))
    submit(state, "z", [70] * 3)
    plan, _ = run_step(state)
    assert list_rids(state, plan.decode) == ["x", "y"]
    assert not plan.chunks
    run_step(state)  # x and y end
    plan = schedule(state, LIMITS)
    assert list_rids(state, plan.chunks) == ["a", "z"]
    assert len(plan.inits) == 4


@pytest.mark.parametrize("limits", [replace(LIMITS, can_fork=False), replace(LIMITS, max_rows=2)])
def test_a_search_whose_programs_are_not_ready_is_passed_over(limits):
    state = new_state(num_pages=40, page_size=PAGE, max_rows=4)
    submit_search(state, "a", range(6))
    submit(state, "z", [70] * 3, max_new_tokens=1)
    plan, _ = run_step(state, limits)
    assert [chunk.token_ids for chunk in plan.chunks] == [[70] * 3]
    plan = schedule(state, LIMITS)
    assert list_rids(state, plan.chunks) == ["a"]


def test_the_oldest_search_takes_the_pages_of_its_step_from_those_who_had_them_first():
    state = new_state(num_pages=11, page_size=PAGE, max_rows=8)  # 10 can be used
    submit_search(state, "old", range(4), max_new_tokens=9)
    for rid in "xy":
        submit(state, rid, [ord(rid)] * 4, max_new_tokens=12, priority=1)
    rows = [row_of(t10=-1.0, t11=-1.5, t12=-2.0), row_of(t10=-1.0), row_of(t10=-1.0), row_of(t10=-1.0)]
    for _ in range(5):
        plan = schedule(state, LIMITS)
        num_others = len(plan.chunks) or 2
        apply(
            state,
            plan,
            StepResult([TOKEN] * 5, [None] * 2 + rows[1:])
            if plan.decode
            else StepResult([TOKEN] * num_others, [None, None, rows[0]]),
        )
    # x and y are planned first and take the last two pages; then old wants three.
    assert num_free_pages(state) == 2
    plan = schedule(state, LIMITS)
    check_integrity(state)
    assert list_rids(state, plan.decode) == ["x", "old", "old", "old"]
    assert [seq.rid for seq in state.waiting] == ["y"]


def test_what_can_never_run_is_refused_and_what_is_too_long_is_clipped():
    state = new_state(num_pages=11, page_size=PAGE, max_rows=4)
    with pytest.raises(InvalidRequestError, match=r"beam_width must be at most 4.*got 5.*--max-running"):
        submit_search(state, "a", range(6), width=5)
    with pytest.raises(InvalidRequestError, match=r"prompt of 28 tokens needs 11 pages.*pool holds 10"):
        submit_search(state, "a", range(28), width=4)
    with pytest.raises(InvalidRequestError, match=r"beam_width 3 needs the unscaled.*at least 3"):
        submit_search(state, "a", range(6), width=3, num_top=2)
    submit_search(state, "a", range(6), width=3, max_new_tokens=100)
    # One page of the prompt is shared; of the other nine each beam may fill three, from position 4 on.
    assert state.by_rid["a"].params.max_new_tokens == 16 - 6


def test_a_search_as_wide_as_the_vocabulary_is_exhaustive():
    """Width 169 keeps every text of two tokens, so of three tokens it finds the best 169 that exist."""
    width = VOCAB**2
    limits = StepLimits(PAGE, max_rows=width, max_chunks=1, max_chunk_tokens=16, token_buckets=TOKEN_BUCKETS)
    simulation = Simulation(PAGE, 600, limits, 1, True)
    simulation.add([1, 2, 3, 4, 5], searching(width, 3, stop_ids=(3,)))
    simulation.drain()
    prompt_hash = simulation.requests[0].entry_at(4)[2]
    sums = {}
    for text in itertools.product(range(VOCAB), repeat=3):
        end = text.index(3) + 1 if 3 in text else 3
        prefix_hash, total = prompt_hash, 0.0
        for token_id in text[:end]:
            total += rate_tokens(prefix_hash)[token_id]
            prefix_hash = extend_hash(prefix_hash, token_id)
        sums[text[:end]] = total
    beams = simulation.deltas["r0"][-1].beams
    found = {tuple(beam.token_ids): beam.cumulative_logprob for beam in beams}
    assert list(found.values()) == sorted(sums.values(), reverse=True)[:width]
    assert all(sums[text] == total for text, total in found.items())


def run_crowd(seed) -> Simulation:
    """Plain requests and searches in a tight pool, some aborted; the simulation checks them all."""
    rng = random.Random(seed)
    page_size = rng.choice([1, 2, 4])
    max_rows = rng.choice([4, 6, 10])
    limits = StepLimits(page_size, max_rows, 3, rng.choice([4, 9, 16]), TOKEN_BUCKETS)
    num_pages = rng.choice([44, 56]) // page_size
    simulation = Simulation(page_size, num_pages, limits, rng.randrange(3), rng.random() < 0.7)
    for _ in range(14):
        prompt = [(rng.randrange(3) + i) % VOCAB for i in range(rng.randrange(1, 9))]
        params = TokenParams(max_new_tokens=rng.randrange(1, 30), seed=seed)
        if rng.random() < 0.5:
            stop_ids = rng.choice([(), (3,), (0, 5)])
            params = searching(rng.randrange(2, 5), rng.randrange(1, 20), stop_ids=stop_ids)
        simulation.add(prompt, params)
        for _ in range(rng.choice([0, 0, 1, 4])):
            simulation.step()
        if rng.random() < 0.1:
            simulation.abort(rng.randrange(99))
    simulation.drain()
    return simulation


def test_searches_in_a_crowd_find_what_they_find_alone():
    seen: Counter[str] = Counter()
    for simulation in map(run_crowd, range(60)):
        seen["copies"] += simulation.device.num_copies
        for plan in simulation.log:
            if isinstance(plan, StepPlan):
                groups = {row.seq_id for row in plan.decode if row.token_id != NO_TOKEN}
                seen["steps of two searches"] += len(groups) > 1
        for request in simulation.requests:
            if request.params.beam_width > 1:
                last = simulation.deltas[request.rid][-1]
                seen["aborted"] += last.finish is not None and last.finish.kind == "abort"
                seen["retracted"] += last.num_retractions > 0
    assert len(seen) == 4
    assert min(seen.values()) > 10, seen
