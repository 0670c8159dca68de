"""Random workloads on a device that models memory: whatever the schedule, every reply is the oracle's.

The fake device keeps what each (page, offset) holds: a token, its position, and a hash of everything before
it, as the KV of a real token depends on its whole prefix. A row may only attend to exactly the right
ones; a page that is shared by mistake, stale, leaked or reused too early shows at once. It samples a hash
of the prefix, so that a wrong read would also change the reply.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.scheduler.plan import StepLimits, StepPlan, StepResult
from jaxserve.scheduler.schedule import abort, add, apply, flush, schedule
from jaxserve.scheduler.state import (
    check_integrity,
    has_work,
    new_state,
    num_free_pages,
    num_running,
    num_waiting,
)
from jaxserve.types import FinishReason, TokenDelta, TokenParams

VOCAB = 13
TOKEN_BUCKETS = (4, 8, 16)


def extend_hash(prefix_hash: int, token_id: int) -> int:
    return hash((prefix_hash, token_id))


def sample_token(prefix_hash: int, params: TokenParams, num_output_tokens: int) -> int:
    token_id = ((prefix_hash >> 8) + params.seed) % VOCAB
    while num_output_tokens < params.min_new_tokens and token_id in params.stop_ids:
        token_id = (token_id + 1) % VOCAB
    return token_id


@dataclass
class Request:
    """One request with its oracle: the tokens it would get alone, computed one after the other."""

    rid: str
    prompt_ids: list[int]
    params: TokenParams
    priority: int = 0
    cache_salt: str = ""
    token_ids: list[int] = field(default_factory=list)  # the prompt and the reply, past its stop as well
    hashes: list[int] = field(default_factory=list)  # of the tokens up to and with each position

    @property
    def first_hash(self) -> int:
        """Differs by salt, so that pages shared between salts would be wrong ones."""
        return len(self.cache_salt)

    def entry_at(self, position: int) -> tuple[int, int, int]:
        """What memory must hold for a position."""
        while len(self.hashes) <= position:
            index = len(self.hashes)
            before = self.hashes[-1] if self.hashes else self.first_hash
            num_output_tokens = index - len(self.prompt_ids)
            if num_output_tokens < 0:
                token_id = self.prompt_ids[index]
            else:
                token_id = sample_token(before, self.params, num_output_tokens)
            self.token_ids.append(token_id)
            self.hashes.append(extend_hash(before, token_id))
        return self.token_ids[position], position, self.hashes[position]

    def expect_reply(self, capacity: int) -> tuple[list[int], FinishReason]:
        """The reply, and why it ends, in a pool of `capacity` tokens."""
        num_prompt_tokens = len(self.prompt_ids)
        reply: list[int] = []
        while len(reply) < min(self.params.max_new_tokens, capacity - num_prompt_tokens):
            reply.append(self.entry_at(num_prompt_tokens + len(reply))[0])
            if reply[-1] in self.params.stop_ids and len(reply) >= self.params.min_new_tokens:
                return reply, FinishReason(kind="stop", matched=reply[-1])
        return reply, FinishReason(kind="length")


@dataclass
class Slot:
    params: TokenParams
    known_ids: list[int]
    num_output_tokens: int
    table: list[int] = field(default_factory=list)
    last_token_id: int = -1


@dataclass
class Feed:
    """Tokens that one sequence computes in this step."""

    request: Request
    slot: Slot
    start: int
    token_ids: list[int]
    samples: bool


@dataclass
class FakeDevice:
    page_size: int
    requests: list[Request]  # by seq_id
    slots: dict[int, Slot] = field(default_factory=dict)
    memory: dict[tuple[int, int], tuple[int, int, int]] = field(default_factory=dict)

    def launch(self, plan: StepPlan) -> list[int]:
        """Run a step; returns its sampled tokens, aligned as plan.py says."""
        for init in plan.inits:
            known_ids = init.prompt_ids + init.output_ids
            self.slots[init.slot] = Slot(init.params, known_ids, len(init.output_ids))
        feeds = self._list_feeds(plan)
        # A step may neither rely on, nor be hurt by, the order in which its own rows read and write.
        for feed in feeds:
            self._check_context(feed, feed.start)
        written: dict[tuple[int, int], tuple[int, int, int]] = {}
        for feed in feeds:
            prefix_hash = self._read(feed.slot, feed.start - 1)[2] if feed.start else feed.request.first_hash
            for position, token_id in enumerate(feed.token_ids, start=feed.start):
                prefix_hash = extend_hash(prefix_hash, token_id)
                place = self._place(feed.slot, position)
                assert place not in written, f"two rows of one step write {place}"
                written[place] = (token_id, position, prefix_hash)
        self.memory.update(written)
        for feed in feeds:
            self._check_context(feed, feed.start + len(feed.token_ids))
        return [self._sample(feed) for feed in feeds]

    def _list_feeds(self, plan: StepPlan) -> list[Feed]:
        feeds = []
        for row in plan.decode:
            slot = self.slots[row.slot]
            index = row.position // self.page_size
            slot.table[index:] = [row.page_id]
            feeds.append(Feed(self.requests[row.seq_id], slot, row.position, [slot.last_token_id], True))
        for chunk in plan.chunks:
            slot = self.slots[chunk.slot]
            end = chunk.start + len(chunk.token_ids)
            slot.table = list(chunk.page_ids)
            assert chunk.token_ids == slot.known_ids[chunk.start : end]
            assert chunk.samples == (end == len(slot.known_ids) and slot.params.max_new_tokens > 0)
            feeds.append(Feed(self.requests[chunk.seq_id], slot, chunk.start, chunk.token_ids, chunk.samples))
        return feeds

    def _place(self, slot: Slot, position: int) -> tuple[int, int]:
        page_id = slot.table[position // self.page_size]
        assert page_id != 0, "a real token is to be written to the trash page"
        return page_id, position % self.page_size

    def _read(self, slot: Slot, position: int) -> tuple[int, int, int]:
        return self.memory[self._place(slot, position)]

    def _check_context(self, feed: Feed, num_tokens: int) -> None:
        for position in range(num_tokens):
            held = self._read(feed.slot, position)
            right = feed.request.entry_at(position)
            assert held == right, f"{feed.request.rid} reads {held} at position {position}, expected {right}"

    def _sample(self, feed: Feed) -> int:
        if not feed.samples:
            return -1
        slot = feed.slot
        prefix_hash = self._read(slot, feed.start + len(feed.token_ids) - 1)[2]
        slot.last_token_id = sample_token(prefix_hash, slot.params, slot.num_output_tokens)
        slot.num_output_tokens += 1
        return slot.last_token_id


class Simulation:
    """An engine loop over the fake device that checks everything it can see after every call."""

    def __init__(self, page_size, num_usable_pages, limits, depth, use_prefix_cache):
        self.state = new_state(num_usable_pages + 1, page_size, limits.max_rows, use_prefix_cache)
        self.capacity = num_usable_pages * page_size
        self.limits = limits
        self.depth = depth  # steps that may be in flight when the next is planned
        self.requests: list[Request] = []
        self.device = FakeDevice(page_size, self.requests)
        self.in_flight: deque[tuple[StepPlan, list[int]]] = deque()
        self.deltas: dict[str, list[TokenDelta]] = {}
        self.log: list[object] = []  # every plan and every delta, for the replay

    def add(self, prompt_ids, params, priority=0, cache_salt=""):
        request = Request(f"r{len(self.requests)}", prompt_ids, params, priority, cache_salt)
        self.requests.append(request)
        self.deltas[request.rid] = []
        add(
            self.state,
            rid=request.rid,
            prompt_ids=prompt_ids,
            params=params,
            priority=priority,
            cache_salt=cache_salt,
        )
        check_integrity(self.state)

    def abort(self, index):
        rid = self.requests[index].rid
        is_live = rid in self.state.by_rid
        delta = abort(self.state, rid)
        check_integrity(self.state)
        assert (delta is not None) == is_live
        if delta is not None:
            self._record(delta)

    def step(self):
        """Plan and launch one step; before it, apply what is too old to stay in flight."""
        while len(self.in_flight) > self.depth:
            self.apply_oldest()
        oldest = self.state.running[min(self.state.running)] if self.state.running else None
        was_planned = oldest.num_planned if oldest else 0
        plan = schedule(self.state, self.limits)
        check_integrity(self.state)
        if oldest:
            assert oldest.num_planned > was_planned or oldest.is_fully_planned, "the oldest gets no further"
        self.log.append(plan)
        self._check_limits(plan)
        if not plan.is_empty:
            self.in_flight.append((plan, self.device.launch(plan)))
        elif self.in_flight:
            self.apply_oldest()
        else:
            assert not has_work(self.state), "nothing is planned and nothing is in flight, yet there is work"

    def apply_oldest(self):
        plan, sampled = self.in_flight.popleft()
        deltas = apply(self.state, plan, StepResult(sampled))
        check_integrity(self.state)
        assert len({delta.rid for delta in deltas}) == len(deltas), "two deltas for one request in a step"
        for delta in deltas:
            self._record(delta)

    def drain(self):
        """Run until every request has ended; then nothing may be left anywhere."""
        bound = (
            self.state.num_steps
            + 50
            + 4 * sum(len(request.prompt_ids) + request.params.max_new_tokens for request in self.requests)
        )
        while has_work(self.state):
            self.step()
            assert self.state.num_steps < bound, "the requests do not end"
        assert flush(self.state)
        assert num_free_pages(self.state) == self.state.pool.num_free == self.state.pool.num_usable
        while self.in_flight:
            self.apply_oldest()  # stale rows only
        check_integrity(self.state)
        assert num_running(self.state) == num_waiting(self.state) == 0
        for request in self.requests:
            self._check_reply(request)

    def _record(self, delta):
        seen = self.deltas[delta.rid]
        assert not seen or seen[-1].finish is None, f"{delta.rid} has ended and says more"
        assert not seen or seen[-1].num_cached_tokens == delta.num_cached_tokens
        seen.append(delta)
        self.log.append(delta)
        assert delta.num_output_tokens == sum(len(one.token_ids) for one in seen)

    def _check_limits(self, plan):
        limits = self.limits
        assert len(plan.chunks) <= limits.max_chunks
        assert num_running(self.state) <= limits.max_rows
        num_tokens = plan.num_chunk_tokens
        assert num_tokens <= limits.max_chunk_tokens
        if num_tokens > TOKEN_BUCKETS[0]:
            bucket = min(bucket for bucket in TOKEN_BUCKETS if bucket >= num_tokens)
            assert 4 * (bucket - num_tokens) <= bucket, f"{num_tokens} tokens are padded to {bucket}"

    def _check_reply(self, request):
        deltas = self.deltas[request.rid]
        reply = [token_id for delta in deltas for token_id in delta.token_ids]
        expected, finish = request.expect_reply(self.capacity)
        assert deltas, f"{request.rid} was never answered"
        ended = deltas[-1].finish
        assert ended is not None, f"{request.rid} has not ended"
        if ended.kind == "abort":
            assert reply == expected[: len(reply)]
        else:
            assert (reply, ended) == (expected, finish)


PARAMS = st.builds(
    lambda max_new, min_new, stop_ids, seed: TokenParams(
        max_new_tokens=max_new, min_new_tokens=min(min_new, max_new), stop_ids=stop_ids, seed=seed
    ),
    st.one_of(st.integers(0, 2), st.integers(5, 20)),
    st.integers(0, 3),
    st.sampled_from([(), (3,), (5, 7)]),
    st.integers(0, 2),
)


@st.composite
def prompts(draw):
    """Prompts of three families with long common prefixes, some with an ending of their own."""
    family = draw(st.integers(0, 2))
    shared = [(family + i * i) % VOCAB for i in range(draw(st.integers(1, 20)))]
    return shared + draw(st.lists(st.integers(0, VOCAB - 1), max_size=3))


ADD = st.tuples(
    st.just("add"), prompts(), PARAMS, st.sampled_from([0, 0, 0, 1, -1]), st.sampled_from(["", "", "x"])
)
STEP = st.tuples(st.just("step"), st.integers(1, 5))
ABORT = st.tuples(st.just("abort"), st.integers(0, 30))
SETTLE = st.tuples(st.just("settle"))
OPERATION = st.integers(0, 11).flatmap(lambda kind: ([ADD] * 7 + [STEP] * 3 + [ABORT, SETTLE])[kind])


@st.composite
def workloads(draw):
    page_size = draw(st.sampled_from([1, 2, 4]))
    limits = StepLimits(
        page_size=page_size,
        max_rows=draw(st.integers(1, 5)),
        max_chunks=draw(st.integers(1, 3)),
        max_chunk_tokens=draw(st.sampled_from([3, 4, 9, 16, 20])),
        token_buckets=TOKEN_BUCKETS,
    )
    num_usable_pages = draw(st.integers(28, 48)) // page_size
    settings_of_engine = (page_size, num_usable_pages, limits, draw(st.integers(0, 2)), draw(st.booleans()))
    return settings_of_engine, draw(st.lists(OPERATION, min_size=8, max_size=30))


def run_workload(workload) -> Simulation:
    settings_of_engine, operations = workload
    simulation = Simulation(*settings_of_engine)
    for name, *arguments in operations:
        if name == "add":
            simulation.add(*arguments)
        elif name == "step":
            for _ in range(arguments[0]):
                simulation.step()
        elif name == "abort" and simulation.requests:
            simulation.abort(arguments[0] % len(simulation.requests))
        elif name == "settle":
            while simulation.in_flight:
                simulation.apply_oldest()
    simulation.drain()
    return simulation


@settings(max_examples=400, deadline=None)
@given(workloads())
def test_every_reply_is_the_oracles_and_no_page_is_lost(workload):
    run_workload(workload)


@settings(max_examples=40, deadline=None)
@given(workloads())
def test_the_same_calls_give_the_same_plans(workload):
    first, second = run_workload(workload), run_workload(workload)
    assert first.log == second.log
