"""Who goes next: by arrival, or first those whose prefix is cached; and that nobody waits for ever."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.scheduler.plan import StepLimits
from jaxserve.scheduler.prefix_cache import PrefixCache
from jaxserve.scheduler.queue_order import (
    MAX_LOOKUPS,
    MAX_PASSED,
    NUM_NEWEST,
    NUM_OLDEST,
    find_match,
    order_queue,
)
from jaxserve.scheduler.schedule import abort, schedule
from jaxserve.scheduler.state import new_state
from tests.scheduler.steps import LIMITS, PAGE, finish_step, list_rids, run_step, run_to_end, submit

ONE_BY_ONE = replace(LIMITS, max_rows=1)


def make_state(num_pages=200, prefers_cached=True, cached=()):
    """A state with these prompts in its cache."""
    state = new_state(num_pages, PAGE, max_rows=8, prefers_cached=prefers_cached)
    for prompt in cached:
        submit(state, "before", prompt, max_new_tokens=0)
        run_to_end(state)
    return state


def list_order(state):
    return [seq.rid for seq in order_queue(state, LIMITS)]


def test_the_longest_cached_prefix_goes_first_and_those_that_share_it_go_together():
    state = make_state(cached=[[1] * 12, [2] * 12, [3] * 4])
    for rid, prompt in [
        ("new", [9] * 5),
        ("short", [3] * 9),
        ("one", [1] * 13),
        ("two", [2] * 13),
        ("one too", [1] * 12 + [5] * 9),
        ("new too", [8] * 5),
    ]:
        submit(state, rid, prompt)
    # MAX_PASSED may go before the front, "new"; then it is its turn.
    assert MAX_PASSED == 4
    assert list_order(state) == ["one", "one too", "two", "short", "new", "new too"]


def test_without_the_preference_or_the_cache_the_order_is_that_of_arrival():
    for prefers_cached, use_prefix_cache in ((False, True), (True, False)):
        state = new_state(200, PAGE, 8, use_prefix_cache=use_prefix_cache, prefers_cached=prefers_cached)
        submit(state, "before", [1] * 12, max_new_tokens=0)
        run_to_end(state)
        submit(state, "new", [9] * 5)
        submit(state, "cached", [1] * 13)
        assert list_order(state) == ["new", "cached"]


def test_priority_goes_before_what_is_cached():
    state = make_state(cached=[[1] * 12])
    submit(state, "cached", [1] * 13)
    submit(state, "urgent", [9] * 5, priority=1)
    submit(state, "urgent and cached", [1] * 13, priority=1)
    submit(state, "never mind", [1] * 13, priority=-1)
    assert list_order(state) == ["urgent and cached", "urgent", "cached", "never mind"]


def test_retracted_requests_go_first_whatever_is_cached():
    state = new_state(num_pages=9, page_size=PAGE, max_rows=3)
    for rid in "abc":
        submit(state, rid, [ord(rid)] * 4, max_new_tokens=28)
    while state.num_retractions < 2:
        run_step(state)
    submit(state, "cached", state.by_rid["a"].token_ids[:6])
    assert find_match(state, state.by_rid["cached"]).depth == 1
    assert list_order(state) == ["b", "c", "cached"]


def test_the_front_of_the_queue_is_passed_so_often_and_not_once_more():
    state = make_state(cached=[[1] * 12])
    submit(state, "front", [9] * 5, max_new_tokens=1)
    admitted = []
    for index in range(MAX_PASSED + 3):
        submit(state, f"cached-{index}", [1] * 13, max_new_tokens=1)
        plan, _ = run_step(state, replace(LIMITS, max_chunks=1))
        admitted.append(plan.chunks[0].seq_id)
    front_id = 1  # after the one that filled the cache
    assert admitted.index(front_id) == MAX_PASSED


def test_a_match_is_followed_when_pages_come_and_when_they_go():
    state = make_state(num_pages=8, cached=[[1] * 8])
    submit(state, "a", [1] * 20)
    seq = state.by_rid["a"]
    assert find_match(state, seq).depth == 2
    last = seq.match
    for _ in range(6):  # five free pages, then the last of the two cached ones
        state.cache.allocate()
    assert last is not None
    assert not last.is_cached
    assert find_match(state, seq).depth == 1
    assert seq.match is last.parent

    state = make_state(cached=[[1] * 8])
    submit(state, "a", [1] * 20)
    assert find_match(state, state.by_rid["a"]).depth == 2
    submit(state, "more", [1] * 16, max_new_tokens=0, priority=1)
    run_step(state, ONE_BY_ONE)
    assert find_match(state, state.by_rid["a"]).depth == 4


def test_a_long_queue_costs_no_more_than_its_ends(monkeypatch):
    """5,000 wait, each with 500 cached pages. The ends are looked at, a part of their pages in each step."""
    num_keys = 0
    make_key = PrefixCache._page_key

    def count_key(*arguments):
        nonlocal num_keys
        num_keys += 1
        return make_key(*arguments)

    prompt = list(range(2000))
    state = make_state(num_pages=1000, cached=[prompt])
    for index in range(5000):
        submit(state, f"r{index}", [*prompt, index])
    monkeypatch.setattr(PrefixCache, "_page_key", count_key)
    assert len(list(order_queue(state, LIMITS))) == NUM_OLDEST + NUM_NEWEST
    assert num_keys <= MAX_LOOKUPS
    while len({seq.match and seq.match.depth for seq in order_queue(state, LIMITS)}) > 1:
        pass  # each look goes on where the last one ended
    num_keys = 0
    list(order_queue(state, LIMITS))
    assert num_keys == 0  # all is remembered, and nothing was cached or evicted since
    plan = schedule(state, LIMITS)
    assert [chunk.start for chunk in plan.chunks] == [2000] * 4


class Queue:
    """Counts for every request who overtook it, as the queue stood when they were admitted."""

    def __init__(self, state):
        self.state = state
        self.num_ahead = {}
        self.num_overtaken = {}

    def add(self, rid, prompt, priority, max_new_tokens):
        submit(self.state, rid, prompt, max_new_tokens=max_new_tokens, priority=priority)
        seq = self.state.by_rid[rid]
        ahead = [other for other in self.state.waiting if is_rival(other, seq)]
        self.num_ahead[seq.seq_id] = len(ahead) - 1
        self.num_overtaken[seq.seq_id] = 0

    def step(self, limits):
        before = list(self.state.waiting)
        plan = schedule(self.state, limits)
        entered = {init.slot for init in plan.inits}
        admitted = [chunk.seq_id for chunk in plan.chunks if chunk.slot in entered and chunk.epoch == 0]
        still = [seq for seq in self.state.waiting if seq in before and seq.epoch == 0]
        for seq in still:
            if seq.leader is not None and seq.leader.is_pending:
                self.num_overtaken.pop(seq.seq_id, None)  # it may be passed over as long as it is held
        for seq in before:
            if seq.seq_id in admitted:
                for other in still:
                    if (
                        is_rival(seq, other)
                        and seq.seq_id > other.seq_id
                        and other.seq_id in self.num_overtaken
                    ):
                        self.num_overtaken[other.seq_id] += 1
        finish_step(self.state, plan)
        for seq_id, count in self.num_overtaken.items():
            bound = MAX_PASSED * (self.num_ahead[seq_id] + 1)
            assert count <= bound, f"{seq_id} was overtaken {count} times, at most {bound} are allowed"


def is_rival(seq, other):
    return seq.epoch == other.epoch == 0 and seq.priority == other.priority


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    num_pages=st.integers(14, 60),
    max_rows=st.integers(1, 4),
    max_chunks=st.integers(1, 4),
    arrivals=st.sampled_from([0.3, 1.0, 3.0]),
)
def test_nobody_is_overtaken_more_often_than_the_order_promises(
    seed, num_pages, max_rows, max_chunks, arrivals
):
    """Requests of a few families arrive for ever, some of them cached, faster than they are served."""
    rng = random.Random(seed)
    state = new_state(num_pages, PAGE, max_rows)
    limits = StepLimits(PAGE, max_rows, max_chunks, 16, (4, 8, 16))
    queue = Queue(state)
    for step in range(80):
        for index in range(int(arrivals) + (rng.random() < arrivals % 1)):
            family = rng.choice([1, 1, 1, 2, 3, rng.randrange(10, 1000)])
            prompt = [family] * rng.randrange(1, 24) + [rng.randrange(1000)]
            queue.add(f"{step}-{index}", prompt, rng.choice([0, 0, 0, 1]), rng.randrange(1, 12))
        if state.by_rid and rng.random() < 0.1:
            abort(state, rng.choice(list(state.by_rid)))
        queue.step(limits)


@pytest.mark.parametrize("together", [True, False])
def test_a_system_prompt_is_computed_once_for_a_hundred_requests(together):
    system = [7] * 2000
    state = new_state(num_pages=1000, page_size=16, max_rows=64)
    limits = StepLimits(16, 64, 8, 512, (64, 256, 512))
    num_computed = 0
    for index in range(100):
        submit(state, f"r{index}", [*system, *range(index, index + 20)], max_new_tokens=4)
        while not together and state.by_rid:
            num_computed += run_step(state, limits)[0].num_chunk_tokens
    while state.by_rid:
        num_computed += run_step(state, limits)[0].num_chunk_tokens
    # 2,000 tokens are 125 whole pages, so nothing of them is computed again.
    assert num_computed == state.num_computed_tokens == 2000 + 100 * 20
    assert state.num_cached_tokens == 99 * 2000
    assert list_rids(state, state.running.values()) == []


def play_sessions(prefers_cached):
    """24 conversations of 4 turns, each turn asked as soon as the last is answered; a fifth of them fits the
    pool. Returns the prompt tokens that were computed and those evicted."""
    rng = random.Random(5)
    state = new_state(num_pages=130, page_size=PAGE, max_rows=4, prefers_cached=prefers_cached)
    history = {str(index): [rng.randrange(10**6) for _ in range(60)] for index in range(24)}
    num_asked = dict.fromkeys(history, 1)
    for rid, prompt in history.items():
        submit(state, rid, prompt, max_new_tokens=6)
    while state.by_rid:
        plan = schedule(state, replace(LIMITS, max_rows=4))
        for delta in finish_step(state, plan, token_id=rng.randrange(10**6)):
            history[delta.rid] += delta.token_ids
            if delta.finish is not None and num_asked[delta.rid] < 4:
                num_asked[delta.rid] += 1
                history[delta.rid] += [rng.randrange(10**6) for _ in range(10)]
                submit(state, delta.rid, history[delta.rid], max_new_tokens=6)
    assert state.num_finished == 24 * 4
    return state.num_computed_tokens, state.cache.num_evicted


def test_conversations_in_a_pool_that_is_too_small_compute_less_when_the_cached_go_first():
    by_arrival, num_evicted = play_sessions(prefers_cached=False)
    by_match, num_evicted_by_match = play_sessions(prefers_cached=True)
    assert by_match < by_arrival / 2
    assert num_evicted_by_match < num_evicted
