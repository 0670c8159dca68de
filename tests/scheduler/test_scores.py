"""Scores by example: each prompt row that is wanted is computed once and told once; NaN ends one request.

The device of these tests scores a row with its position and the token that follows: so it is known again.
"""

from dataclasses import replace

import pytest

from jaxserve.scheduler.integrity import check_integrity
from jaxserve.scheduler.plan import NO_TOKEN, StepResult
from jaxserve.scheduler.schedule import apply, schedule
from jaxserve.scheduler.state import has_work, new_state
from jaxserve.types import ScoreParams, TokenScores
from tests.scheduler.steps import LIMITS, PAGE, TOKEN, list_rids, run_step, run_to_end, submit


def want(*rows, of_output=False):
    return ScoreParams(of_output=of_output, prompt_rows=rows)


def list_rows(chunk):
    """The rows that a chunk scores, with the tokens they are scored for."""
    rows = [chunk.start + place for place in chunk.score_places]
    return list(zip(rows, chunk.score_targets, strict=True))


def finish_scored(state, plan, token_ids=None):
    """Apply a plan; every sampled token is scored with its own id."""
    num_results = len(plan.decode) + len(plan.chunks)
    token_ids = [TOKEN] * num_results if token_ids is None else token_ids
    prompt_scores = [
        [TokenScores(float(row), [target], [], []) for row, target in list_rows(chunk)]
        for chunk in plan.chunks
        if chunk.score_places
    ]
    scores: list[TokenScores | None] = [TokenScores(float(token_id), [], [], []) for token_id in token_ids]
    deltas = apply(state, plan, StepResult(token_ids, scores, prompt_scores))
    check_integrity(state)
    return deltas


def run_scored(state, limits=LIMITS):
    """To the end; the deltas and the plans."""
    deltas, plans = [], []
    while has_work(state):
        plans.append(schedule(state, limits))
        deltas += finish_scored(state, plans[-1])
    return deltas, plans


def told_rows(deltas, rid="a"):
    return [
        (int(scores.logprob), scores.top_ids[0])
        for delta in deltas
        if delta.rid == rid
        for scores in delta.prompt_scores
    ]


def test_rows_are_scored_with_the_chunk_that_holds_them_for_the_token_that_follows():
    state = new_state(num_pages=50, page_size=PAGE, max_rows=8)
    prompt = [100 + position for position in range(72)]
    submit(state, "a", prompt, max_new_tokens=2, scores=want(0, 31, 32, 50, 70))
    deltas, plans = run_scored(state)
    assert [list_rows(plan.chunks[0]) for plan in plans[:3]] == [
        [(0, 101), (31, 132)],  # the token that follows row 31 belongs to the next chunk
        [(32, 133), (50, 151)],
        [(70, 171)],
    ]
    assert told_rows(deltas) == [(0, 101), (31, 132), (32, 133), (50, 151), (70, 171)]
    assert [len(delta.prompt_scores) for delta in deltas] == [2, 2, 1, 0]  # all before the second token
    assert [delta.scores for delta in deltas] == [[]] * 4  # those of the output were not asked for


def test_the_output_is_scored_token_by_token():
    state = new_state(num_pages=50, page_size=PAGE, max_rows=8)
    submit(state, "a", [1, 2, 3], max_new_tokens=3, scores=want(of_output=True))
    submit(state, "b", [4, 5], max_new_tokens=3)
    deltas, _ = run_scored(state)
    scores = {rid: [delta.scores for delta in deltas if delta.rid == rid] for rid in "ab"}
    assert scores["a"] == [[TokenScores(float(TOKEN), [], [], [])]] * 3
    assert scores["b"] == [[]] * 3


def test_a_prompt_can_be_scored_and_nothing_sampled():
    state = new_state(num_pages=50, page_size=PAGE, max_rows=8)
    submit(state, "a", range(40), max_new_tokens=0, scores=want(3, 35))
    deltas, plans = run_scored(state)
    assert told_rows(deltas) == [(3, 4), (35, 36)]
    assert [chunk.samples for plan in plans for chunk in plan.chunks] == [False, False]
    assert deltas[-1].finish is not None
    assert deltas[-1].finish.kind == "length"


@pytest.mark.parametrize(("first_row", "num_cached"), [(0, 0), (3, 0), (4, 4), (10, 8), (22, 20)])
def test_a_cached_prefix_is_used_up_to_the_page_of_the_first_row_and_said_to_be_so(first_row, num_cached):
    state = new_state(num_pages=50, page_size=PAGE, max_rows=8)
    submit(state, "warm", range(24), max_new_tokens=1)
    run_to_end(state)
    submit(state, "a", range(24), max_new_tokens=1, scores=want(first_row, 22))
    deltas, plans = run_scored(state)
    assert plans[0].chunks[0].start == num_cached
    assert deltas[-1].num_cached_tokens == num_cached
    assert told_rows(deltas)[0] == (first_row, first_row + 1)
    assert told_rows(deltas)[-1] == (22, 23)
    assert state.num_cached_tokens == num_cached


def test_output_scores_alone_use_the_whole_cached_prefix():
    state = new_state(num_pages=50, page_size=PAGE, max_rows=8)
    submit(state, "warm", range(24), max_new_tokens=1)
    run_to_end(state)
    submit(state, "a", range(24), max_new_tokens=1, scores=want(of_output=True))
    deltas, _ = run_scored(state)
    assert deltas[-1].num_cached_tokens == 20


def test_after_a_retraction_told_rows_are_not_computed_again_and_the_others_are():
    """An older request's growth takes the pages of a prefill, two of whose chunks are still in flight."""
    limits = replace(LIMITS, max_chunk_tokens=4, token_buckets=(4,))
    state = new_state(num_pages=16, page_size=PAGE, max_rows=8)
    submit(state, "old", [1] * 3, max_new_tokens=40)
    finish_scored(state, schedule(state, limits))
    prompt = [100 + position for position in range(48)]
    rows = (17, 18, 25, 33, 34, 46)
    submit(state, "a", prompt, max_new_tokens=2, scores=want(*rows))
    deltas, waiting_plans, first_chunks = [], [], []
    while state.num_retractions == 0:
        plan = schedule(state, limits)
        first_chunks += plan.chunks
        if waiting_plans or (plan.chunks and plan.chunks[0].start == 32):
            waiting_plans.append(plan)  # from here on nothing is applied
        else:
            deltas += finish_scored(state, plan)
    scored_before = [row for chunk in first_chunks for row, _ in list_rows(chunk)]
    assert scored_before == [17, 18, 25, 33, 34]
    for plan in waiting_plans:
        deltas += finish_scored(state, plan)
    assert [row for row, _ in told_rows(deltas)] == [17, 18, 25]  # the others came too late
    later_deltas, plans = run_scored(state, limits)
    again = [chunk for plan in plans for chunk in plan.chunks if chunk.seq_id == 1]
    assert again[0].start == 16  # some of its pages were evicted: rows 17 to 25 are computed, and not scored
    assert [row for chunk in again for row, _ in list_rows(chunk)] == [33, 34, 46]
    deltas += later_deltas
    assert told_rows(deltas) == [(row, prompt[row + 1]) for row in rows]


def test_a_prefill_that_scores_is_shared_like_any_other():
    """Followers wait for it and then take its pages; but who scores the shared part computes it himself."""
    state = new_state(num_pages=100, page_size=PAGE, max_rows=8)
    prefix = list(range(200, 240))
    submit(state, "leader", [*prefix, 1], max_new_tokens=2, scores=want(0, 39))
    submit(state, "follower", [*prefix, 2], max_new_tokens=2)
    submit(state, "late row", [*prefix, 3], max_new_tokens=2, scores=want(39))
    submit(state, "early row", [*prefix, 4], max_new_tokens=2, scores=want(1))
    plan = schedule(state, LIMITS)
    assert list_rids(state, plan.chunks) == ["leader"]  # 32 tokens: the step is full
    deltas = finish_scored(state, plan)
    plan = schedule(state, LIMITS)
    assert list_rids(state, plan.chunks) == ["leader", "early row"]
    deltas += finish_scored(state, plan)
    later_deltas, _ = run_scored(state)
    deltas += later_deltas
    cached = {delta.rid: delta.num_cached_tokens for delta in deltas}
    assert cached == {"leader": 0, "follower": 40, "late row": 36, "early row": 0}
    assert [row for row, _ in told_rows(deltas, "leader")] == [0, 39]
    assert told_rows(deltas, "late row") == [(39, 3)]
    assert told_rows(deltas, "early row") == [(1, 202)]


def test_a_row_without_a_token_ends_its_own_request_with_a_reason():
    state = new_state(num_pages=20, page_size=PAGE, max_rows=8)
    submit(state, "a", [1] * 5, scores=want(of_output=True))
    submit(state, "b", [2] * 5)
    run_step(state)
    plan = schedule(state, LIMITS)
    stale = schedule(state, LIMITS)  # launched before the result is known
    spoilt, fine = finish_scored(state, plan, [NO_TOKEN, TOKEN])
    assert (spoilt.rid, spoilt.token_ids, spoilt.num_output_tokens) == ("a", [], 1)
    assert spoilt.finish is not None
    assert (spoilt.finish.kind, spoilt.finish.http_status) == ("abort", 500)
    assert "NaN" in spoilt.finish.message
    assert (fine.rid, fine.token_ids, fine.finish) == ("b", [TOKEN], None)
    assert [delta.rid for delta in finish_scored(state, stale, [NO_TOKEN, TOKEN])] == ["b"]
    assert state.num_aborted == 1
    assert run_to_end(state)[-1].num_output_tokens == 8
    assert state.cache.num_available == 19


@pytest.mark.parametrize(("max_new_tokens", "num_chunks"), [(4, 2), (0, 2), (4, 1)])
def test_a_chunk_without_a_token_ends_its_request_whether_it_samples_or_not(max_new_tokens, num_chunks):
    state = new_state(num_pages=20, page_size=PAGE, max_rows=8)
    submit(state, "a", range(40), max_new_tokens=max_new_tokens, scores=want(2, 35))
    for _ in range(num_chunks - 1):
        finish_scored(state, schedule(state, LIMITS))
    (delta,) = finish_scored(state, schedule(state, LIMITS), [NO_TOKEN])
    assert delta.prompt_scores == []
    assert delta.finish is not None
    assert (delta.finish.kind, delta.finish.http_status) == ("abort", 500)
    assert not has_work(state)
    assert state.cache.num_available == 19
