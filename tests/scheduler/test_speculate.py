"""Drafts: which rows verify guesses, what is accepted of them, and when they are not worth their rows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jaxserve.scheduler.integrity import check_integrity
from jaxserve.scheduler.lookup import Lookup
from jaxserve.scheduler.plan import NO_TOKEN, StepResult
from jaxserve.scheduler.schedule import abort, apply, retract_all, schedule
from jaxserve.scheduler.state import new_state
from jaxserve.types import FinishReason, ScoreParams, TokenParams, TokenScores
from tests.scheduler.simulation import TOKEN_BUCKETS, Simulation
from tests.scheduler.steps import LIMITS, PAGE, STOP, run_to_end, submit

# Rows cost nothing, so that every guess is tried.
FREE = replace(LIMITS, row_buckets=(1, 2, 4, 8, 16), row_costs=(1.0,) * 5)
VERSE = [5, 6, 7, 8, 9, 10, 11, 12]  # what is said twice
REFRAIN = [1, *VERSE, 2, 3, *VERSE[:4]]  # a prompt that breaks off in the middle of the second time


def start(max_drafts=3, num_pages=40, prompt_ids=REFRAIN, first_token=9, **params):
    """A state with one sequence after its prefill: its first token goes on as the verse does."""
    state = new_state(num_pages, PAGE, max_rows=8, max_drafts=max_drafts)
    submit(state, "a", prompt_ids, **params)
    give(state, schedule(state, FREE), [first_token])
    return state


def give(state, plan, token_ids, scores=()):
    deltas = apply(state, plan, StepResult(list(token_ids), list(scores)))
    check_integrity(state)
    return deltas


def fed(plan):
    return [(row.position, row.token_id) for row in plan.decode]


def test_a_draft_feeds_the_last_token_and_the_guesses_after_it_at_the_next_positions():
    state = start()
    plan = schedule(state, FREE)
    position = len(REFRAIN)
    assert fed(plan) == [(position + ahead, token_id) for ahead, token_id in enumerate([9, 10, 11, 12])]
    assert [row.page_id for row in plan.decode] == [
        state.running[0].page_ids[row.position // PAGE] for row in plan.decode
    ]


def test_an_accepted_draft_gives_a_token_more_than_it_has():
    state = start()
    (delta,) = give(state, schedule(state, FREE), [10, 11, 12, 77])
    assert (delta.token_ids, delta.num_output_tokens) == ([10, 11, 12, 77], 5)
    assert (delta.num_drafted, delta.num_accepted) == (3, 3)
    assert (state.num_drafted, state.num_accepted, state.num_generated_tokens) == (3, 3, 5)
    assert fed(schedule(state, FREE))[0] == (len(REFRAIN) + 4, 77)


@pytest.mark.parametrize(
    ("sampled", "accepted"),
    [([77, 11, 12, 13], [77]), ([10, 77, 12, 13], [10, 77]), ([10, 11, 77, 13], [10, 11, 77])],
)
def test_what_follows_a_wrong_guess_is_dropped_and_its_pages_are_given_back(sampled, accepted):
    state = start()
    (delta,) = give(state, schedule(state, FREE), sampled)
    assert delta.token_ids == accepted
    assert delta.num_accepted == len(accepted) - 1
    assert len(state.running[0].page_ids) == state.pages_for(len(REFRAIN) + len(accepted))
    # The next step feeds the token that is known now: which row's token the device keeps is not told.
    assert fed(schedule(state, FREE))[0] == (len(REFRAIN) + len(accepted), accepted[-1])


def test_nothing_is_planned_before_a_draft_is_known_and_then_steps_overlap_again():
    state = start()
    plan = schedule(state, FREE)
    assert schedule(state, FREE).is_empty
    give(state, plan, [77, 0, 0, 0])
    plan = schedule(state, FREE)
    assert [token_id for _, token_id in fed(plan)] == [77, 11, 12]  # the verse, with one word changed
    give(state, plan, [78, 0, 0])
    first, second = schedule(state, FREE), schedule(state, FREE)
    position = len(REFRAIN) + 2
    assert [fed(first), fed(second)] == [[(position, 78)], [(position + 1, NO_TOKEN)]]


def test_guesses_wait_until_the_tokens_in_flight_are_known():
    state = start(prompt_ids=[1, *VERSE, 2, 3, 13], first_token=4)
    plans = [schedule(state, FREE), schedule(state, FREE)]
    give(state, plans[0], [5])
    plans.append(schedule(state, FREE))  # before 6 is known nothing has been said twice
    assert [len(plan.decode) for plan in plans] == [1, 1, 1]
    give(state, plans[1], [6])
    assert schedule(state, FREE).is_empty  # 7 is in flight, if all goes well, and 8 to be guessed after it
    give(state, plans[2], [7])
    assert [token_id for _, token_id in fed(schedule(state, FREE))] == [7, 8, 9, 10]


def test_a_stop_inside_a_draft_ends_the_reply_there():
    state = start(prompt_ids=[1, 5, 6, STOP, 8, 9, 2, 5], first_token=6)
    plan = schedule(state, FREE)
    assert [row.token_id for row in plan.decode] == [6, STOP, 8, 9]
    (delta,) = give(state, plan, [STOP, 8, 9, 2])
    assert delta.token_ids == [STOP]
    assert delta.finish == FinishReason(kind="stop", matched=STOP)
    assert not state.running


def test_a_stop_that_comes_too_early_does_not_end_the_reply():
    state = start(prompt_ids=[1, 5, 6, STOP, 8, 9, 2, 5], first_token=6, min_new_tokens=4)
    (delta,) = give(state, schedule(state, FREE), [STOP, 8, 9, 2])
    assert delta.token_ids == [STOP, 8, 9, 2]
    assert delta.finish is None


def test_no_more_is_guessed_than_the_request_may_still_say():
    state = start(max_new_tokens=3)
    plan = schedule(state, FREE)
    assert [row.token_id for row in plan.decode] == [9, 10]
    (delta,) = give(state, plan, [10, 11])
    assert delta.finish == FinishReason(kind="length")


def test_each_token_of_a_draft_comes_with_its_scores():
    state = start(scores=ScoreParams(of_output=True))
    rows = [TokenScores(-float(index), [], [], []) for index in range(4)]
    (delta,) = give(state, schedule(state, FREE), [10, 11, 77, 0], rows)
    assert delta.scores == rows[:3]


def test_a_page_that_somebody_else_may_want_is_not_taken_for_a_draft():
    num_pages = -(-len(REFRAIN) // PAGE)
    state = start(max_drafts=7, num_pages=num_pages + 3, max_new_tokens=2 * PAGE)  # two beyond the prompt's
    assert len(REFRAIN) % PAGE == PAGE - 1
    plan = schedule(state, FREE)
    assert {row.page_id for row in plan.decode} <= set(state.running[0].page_ids)
    assert len(plan.decode) == 1 + PAGE  # the last free page is left
    give(state, plan, [0] * len(plan.decode))
    run_to_end(state, FREE)


@pytest.mark.parametrize(
    "params", [{"frequency_penalty": 0.5}, {"presence_penalty": 0.5}, {"repetition_penalty": 1.1}]
)
def test_a_request_with_penalties_is_not_drafted(params):
    state = start(**params)
    assert len(schedule(state, FREE).decode) == 1


def test_rows_without_numbers_fail_the_request_only_if_they_were_fed_what_is_known():
    state = start()
    (delta,) = give(state, schedule(state, FREE), [10, NO_TOKEN, NO_TOKEN, NO_TOKEN])
    assert (delta.token_ids, delta.finish) == ([10], None)
    plan = schedule(state, FREE)
    (delta,) = give(state, plan, [NO_TOKEN] * len(plan.decode))
    assert delta.finish is not None
    assert delta.finish.http_status == 500


@pytest.mark.parametrize("leave", [retract_all, lambda state: abort(state, "a")])
def test_results_of_a_draft_are_dropped_when_its_sequence_has_left(leave):
    state = start()
    plan = schedule(state, FREE)
    leave(state)
    check_integrity(state)
    assert give(state, plan, [10, 11, 12, 13]) == []
    run_to_end(state, FREE)
    assert state.pool.num_free + state.cache.num_evictable == state.pool.num_usable


def test_a_larger_program_must_pay_for_itself_and_padding_rows_are_free():
    state = start(max_drafts=7)
    dear = replace(FREE, row_costs=(1.0, 9.0, 9.0, 9.0, 9.0))
    assert len(schedule(state, dear).decode) == 1
    state = start(max_drafts=7)
    padded = replace(FREE, row_buckets=(4, 8), row_costs=(1.0, 9.0))
    assert len(schedule(state, padded).decode) == 4
    state = start(max_drafts=7)
    waits = replace(padded, wait_cost=5.0)  # a step that must be known first takes six times as long
    assert len(schedule(state, waits).decode) == 1


def test_rows_go_to_the_guesses_that_are_likeliest():
    state = new_state(40, PAGE, max_rows=8, max_drafts=7)
    submit(state, "sure", REFRAIN, max_new_tokens=40)
    give(state, schedule(state, FREE), [9])
    submit(state, "unsure", [1, 2, 3, 9, 1], max_new_tokens=40)
    give(state, schedule(state, FREE), [10, 11, 12, 2, 3, 5, 6, 7, 2])
    plan = schedule(state, replace(FREE, row_buckets=(4,), row_costs=(1.0,)))
    assert [row.seq_id for row in plan.decode] == [0, 0, 0, 1]


def test_a_sequence_whose_guesses_fail_is_guessed_for_no_longer():
    """Every second word is the same and the next one never what it was: a match is found at each, in vain."""
    state = new_state(400, PAGE, max_rows=1, max_drafts=3)
    submit(state, "a", [1, 1, 2] * 3, max_new_tokens=300)
    limits = replace(FREE, row_costs=(1.0, 1.2, 1.3, 1.5, 2.0))
    widths = []
    fresh = iter(range(100, 2000))
    while state.running or state.waiting:
        plan = schedule(state, limits)
        position = plan.decode[0].position if plan.decode else 0
        token_ids = [1, 1, 1, next(fresh)]
        reply = [token_ids[(position + 1) % 4]] + [99] * (len(plan.decode) + len(plan.chunks) - 1)
        give(state, plan, reply)
        widths.append(len(plan.decode))
    assert sum(width > 1 for width in widths[-100:]) <= 60
    assert state.num_drafted < 300


def test_a_lookup_reads_a_long_prompt_in_parts_and_guesses_only_at_its_end():
    token_ids = [*range(1000, 1100), *range(1000, 1010)]
    lookup = Lookup()
    assert lookup.read(token_ids, len(token_ids), 64) == 64
    assert lookup.guess(token_ids, 2) == []
    assert lookup.read(token_ids, len(token_ids), 64) == 46
    assert lookup.guess(token_ids, 3) == [1010, 1011, 1012]
    assert lookup.length == 10


def test_a_lookup_takes_the_longest_match_and_goes_on_behind_an_edit():
    token_ids = [1, 2, 3, 4, 50, 9, 2, 3, 4, 60, 1, 2, 3, 4]
    lookup = Lookup()
    lookup.read(token_ids, len(token_ids), 100)
    assert lookup.guess(token_ids, 1) == [50]  # not 60, which followed the same three lately
    token_ids.append(70)
    lookup.read(token_ids, len(token_ids) - 1, 100)
    assert lookup.guess(token_ids, 2) == [9, 2]


def test_a_lookup_repeats_a_text_that_repeats_itself():
    token_ids = [7, 8, 9, 7, 8, 9, 7]
    lookup = Lookup()
    lookup.read(token_ids, len(token_ids), 100)
    assert lookup.guess(token_ids, 6) == [8, 9, 7, 8, 9, 7]


def test_the_rate_of_right_guesses_is_learnt_whether_or_not_they_are_used():
    lookup = Lookup()
    token_ids = [1, 2] * 4
    lookup.read(token_ids, 8, 100)
    before = lookup.rate(0)
    for _ in range(40):
        token_ids += [1, 2]
        lookup.read(token_ids, 8, 100)
    assert lookup.rate(0) > max(before, 0.95)


def test_a_simulated_device_takes_drafts_that_are_right_wrong_and_partly_right():
    """What the random workloads rest on: that they do speculate."""
    limits = replace(FREE, page_size=PAGE, max_chunk_tokens=16, token_buckets=TOKEN_BUCKETS)
    simulation = Simulation(PAGE, 40, limits, depth=1, use_prefix_cache=True, max_drafts=3)
    for seed in (3, 4):
        simulation.add([seed, 1, 2], TokenParams(max_new_tokens=60, seed=seed))
    simulation.drain()
    state = simulation.state
    assert 20 < state.num_accepted < state.num_drafted
    assert state.num_steps < 90
