"""An engine loop over the device that models memory: it checks all it can see after every call."""

from __future__ import annotations

from collections import deque

import pytest

from jaxserve.errors import InvalidRequestError
from jaxserve.scheduler.integrity import check_integrity
from jaxserve.scheduler.plan import StepPlan, StepResult
from jaxserve.scheduler.schedule import abort, add, apply, flush, schedule
from jaxserve.scheduler.state import has_work, new_state, num_free_pages, num_running, num_waiting
from jaxserve.types import TokenDelta
from tests.scheduler.memory_device import MemoryDevice, Request

TOKEN_BUCKETS = (4, 8, 16)


class Simulation:
    def __init__(self, page_size, num_usable_pages, limits, depth, use_prefix_cache, max_drafts=0):
        self.state = new_state(
            num_usable_pages + 1, page_size, limits.max_rows, use_prefix_cache, max_drafts=max_drafts
        )
        self.num_usable_pages = num_usable_pages
        self.limits = limits
        self.depth = depth  # steps that may be in flight when the next is planned
        self.requests: list[Request] = []
        self.device = MemoryDevice(page_size, self.requests)
        self.in_flight: deque[tuple[StepPlan, StepResult]] = deque()
        self.deltas: dict[str, list[TokenDelta]] = {}
        self.log: list[object] = []  # every plan and every delta, for the replay

    def add(self, prompt_ids, params, priority=0, cache_salt=""):
        request = Request(f"r{len(self.requests)}", prompt_ids, params, priority, cache_salt)
        wanted = {"prompt_ids": prompt_ids, "params": params, "priority": priority, "cache_salt": cache_salt}
        if params.max_new_tokens and self.count_new_tokens(request) < 1:
            with pytest.raises(InvalidRequestError, match="beam_width"):
                add(self.state, rid=request.rid, **wanted)
        else:
            self.requests.append(request)
            self.deltas[request.rid] = []
            add(self.state, rid=request.rid, **wanted)
        check_integrity(self.state)

    def count_new_tokens(self, request):
        """The tokens a request may have at most, in a pool where nothing is shared between beams."""
        width, num_prompt_tokens = request.params.beam_width, len(request.prompt_ids)
        num_shared_pages = num_prompt_tokens // self.state.page_size if width > 1 else 0
        num_new_tokens = request.params.max_new_tokens if width <= self.limits.max_rows else 0
        while num_new_tokens > 0:
            num_pages = self.state.pages_for(num_prompt_tokens + num_new_tokens)
            if num_shared_pages + width * (num_pages - num_shared_pages) <= self.num_usable_pages:
                break
            num_new_tokens -= 1
        return num_new_tokens

    def abort(self, index):
        rid = self.requests[index % len(self.requests)].rid
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
        waits_for_itself = bool(oldest and oldest.is_search and oldest.num_in_flight)
        plan = schedule(self.state, self.limits)
        # A plan waits for what is in flight because of drafts; then that must end before the next.
        waits_for_drafts = plan.is_empty and bool(self.in_flight) and self.state.max_drafts > 0
        check_integrity(self.state)
        if oldest:
            gets_on = oldest.num_planned > was_planned or oldest.is_fully_planned
            assert gets_on or waits_for_itself or waits_for_drafts, "the oldest gets no further"
        self.log.append(plan)
        self._check_limits(plan)
        if not plan.is_empty:
            self.in_flight.append((plan, self.device.launch(plan)))
        elif self.in_flight:
            self.apply_oldest()
        else:
            assert not has_work(self.state), "nothing is planned and nothing is in flight, yet there is work"

    def apply_oldest(self):
        plan, result = self.in_flight.popleft()
        deltas = apply(self.state, plan, result)
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
        assert delta.num_output_tokens == sum(len(one.token_ids) for one in [*seen, *delta.beams])

    def _check_limits(self, plan):
        limits = self.limits
        assert len(plan.chunks) <= limits.max_chunks
        assert num_running(self.state) <= limits.max_rows
        assert len(plan.decode) <= max(limits.max_rows, *limits.row_buckets, 0)
        num_tokens = plan.num_chunk_tokens
        assert num_tokens <= limits.max_chunk_tokens
        assert not plan.decode or limits.max_mixed_tokens is None or num_tokens <= limits.max_mixed_tokens
        if num_tokens > TOKEN_BUCKETS[0]:
            bucket = min(bucket for bucket in TOKEN_BUCKETS if bucket >= num_tokens)
            assert 4 * (bucket - num_tokens) <= bucket, f"{num_tokens} tokens are padded to {bucket}"

    def _check_reply(self, request):
        deltas = self.deltas[request.rid]
        reply = [token_id for delta in deltas for token_id in delta.token_ids]
        num_new_tokens = self.count_new_tokens(request)
        assert deltas, f"{request.rid} was never answered"
        self._check_scores(request, deltas)
        ended = deltas[-1].finish
        assert ended is not None, f"{request.rid} has not ended"
        if request.params.beam_width > 1 and num_new_tokens:
            beams = request.expect_beams(num_new_tokens) if ended.kind != "abort" else []
            assert (reply, deltas[-1].beams) == ([], beams)
            assert ended.kind == "abort" or ended == beams[0].finish
            return
        expected, finish = request.expect_reply(num_new_tokens)
        if ended.kind == "abort":
            assert reply == expected[: len(reply)]
        else:
            assert (reply, ended) == (expected, finish)

    def _check_scores(self, request, deltas):
        """Each row that is wanted is told once and in order, before anything follows the first token."""
        told = [scores for delta in deltas for scores in delta.prompt_scores]
        expected = request.expect_prompt_scores()
        if deltas[-1].finish.kind == "abort" and len(told) < len(expected):
            assert told == expected[: len(told)]
            assert not any(delta.token_ids or delta.beams for delta in deltas)
        else:
            assert told == expected
        num_tokens = 0
        for delta in deltas:
            assert not (delta.prompt_scores and num_tokens), f"{request.rid} tells of its prompt too late"
            num_tokens += len(delta.token_ids)
        told = [scores for delta in deltas for scores in delta.scores]
        assert told == request.expect_scores(num_tokens)
