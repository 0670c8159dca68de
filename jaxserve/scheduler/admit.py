"""The prefill phase of a step: which chunks of which prompts it computes, and who is admitted.

Called by schedule.py after the decode rows are planned. First it gathers offers (prefills in progress,
then requests from the queue), then it settles how many tokens fill a bucket, then it commits. Knows
nothing of decode rows, results or devices.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, replace

from jaxserve.scheduler.beams import count_first_pages, count_soon_pages
from jaxserve.scheduler.images import ImagePass, find_rows
from jaxserve.scheduler.plan import PrefillChunk, SlotInit, StepLimits
from jaxserve.scheduler.prefix_cache import Node
from jaxserve.scheduler.queue_order import count_pass, find_match, order_queue
from jaxserve.scheduler.state import PrefillLead, SchedulerState, Seq, SeqStatus

MAX_HELD = 64  # waiting requests passed over in one step, so that a long queue costs no more than this


@dataclass(slots=True)
class Offer:
    """A prefill that could take part in this step, with the most tokens it could compute."""

    seq: Seq
    num_tokens: int
    node: Node  # the end of the sequence's cached pages: what it computes next hangs below
    page_ids: list[int] | None = None  # of a request to admit: the pages of its cached prefix, locked


def plan_prefill(
    state: SchedulerState, limits: StepLimits, images: ImagePass | None = None
) -> tuple[tuple[SlotInit, ...], tuple[PrefillChunk, ...]]:
    """Plan the step's chunks, oldest prefill first, and the slots given out for them."""
    offers = _gather_offers(state, limits, images)
    usable_buckets = [bucket for bucket in limits.token_buckets if bucket <= limits.max_chunk_tokens]
    num_left = fill_bucket(sum(offer.num_tokens for offer in offers), usable_buckets)
    inits: list[SlotInit] = []
    chunks: list[PrefillChunk] = []
    for offer in offers:
        num_tokens = min(offer.num_tokens, num_left)
        num_left -= num_tokens
        seq = offer.seq
        if num_tokens == 0:  # left for the next step by the bucket
            if offer.page_ids is not None:
                state.cache.release(offer.node, seq.cache_ids, offer.page_ids, 0, seq.cache_salt)
            continue
        if offer.page_ids is not None:
            inits += _admit(state, seq, offer.node, offer.page_ids)
        chunks.append(_plan_chunk(state, seq, num_tokens))
    return tuple(inits), tuple(chunks)


def fill_bucket(num_tokens: int, buckets: list[int]) -> int:
    """How many of `num_tokens` to compute, when the step is padded up to one of `buckets` (ascending).

    All of them where the padding is at most a quarter of the bucket, or there is no smaller bucket;
    otherwise as many as the next smaller bucket holds, and the rest waits for the next step.
    """
    if not buckets or num_tokens <= buckets[0]:
        return num_tokens
    above = next(bucket for bucket in buckets if bucket >= num_tokens)
    if (above - num_tokens) * 4 <= above:
        return num_tokens
    return max(bucket for bucket in buckets if bucket <= num_tokens)


def _gather_offers(state: SchedulerState, limits: StepLimits, images: ImagePass | None) -> list[Offer]:
    budget = limits.max_chunk_tokens
    budget = max((bucket for bucket in limits.token_buckets if bucket <= budget), default=budget)
    offers: list[Offer] = []
    in_progress = [seq for seq in state.running.values() if seq.is_prefilling]
    in_progress.sort(key=lambda seq: seq.seq_id)  # the oldest first: schedule.py secured a page for it
    num_available = state.cache.num_available
    for seq in in_progress[: limits.max_chunks]:
        room = (len(seq.page_ids) + num_available) * state.page_size - seq.num_planned
        num_tokens = min(seq.prefill_end - seq.num_planned, room, budget)
        if images is not None and num_tokens > 0:
            num_tokens = images.limit(seq.images, seq.num_planned, num_tokens)
        if num_tokens > 0:
            num_available -= state.pages_for(seq.num_planned + num_tokens) - len(seq.page_ids)
            budget -= num_tokens
            offers.append(Offer(seq=seq, num_tokens=num_tokens, node=seq.tail))
    if state.waiting:
        _gather_admissions(state, limits, budget, offers, images)
    return offers


def _gather_admissions(
    state: SchedulerState, limits: StepLimits, budget: int, offers: list[Offer], images: ImagePass | None
) -> None:
    """Append the requests that may enter to `offers`, in the order of queue_order.py.

    A request enters if the pages nobody has a claim on hold all its known tokens and one page to grow.
    Running sequences claim what their prefill lacks and one page to grow, so that an admission does not
    bring about a retraction a moment later. When nothing runs nothing is claimed, and the first in that order
    fits: `add` saw to it that any request fits the whole pool. If the first does not fit, nobody after it
    enters. Only a request that is held for another's prefill, or for an image of its own, is passed over.
    """
    max_rows = min(limits.max_rows, state.max_rows)
    num_slots = max_rows - (state.max_rows - len(state.free_slots))
    if num_slots <= 0 or budget == 0 or len(offers) >= limits.max_chunks:
        return
    num_unclaimed = state.cache.num_available - sum(
        _count_claim(state, seq) for seq in state.running.values()
    )
    num_held = 0
    for seq in order_queue(state, limits):
        if num_slots <= 0 or budget == 0 or len(offers) >= limits.max_chunks or num_held == MAX_HELD:
            return
        if seq.leader is not None and seq.leader.is_pending:
            num_held += 1
            continue
        node = find_match(state, seq)
        seq.leader = _find_leader(state, seq, node, offers)
        if seq.leader is not None:
            num_held += 1
            continue
        if seq.params.beam_width > num_slots:
            return
        num_wanted = _count_soon(state, seq, seq.num_known) - node.depth
        if num_wanted <= num_unclaimed:
            num_wanted += state.cache.count_unused(node, most=num_unclaimed - num_wanted)
        if num_wanted > num_unclaimed:
            return
        start = node.depth * state.page_size
        num_tokens = min(seq.num_known - start, budget)
        if images is not None:
            num_tokens = images.limit(seq.images, start, num_tokens)
            if num_tokens == 0:
                num_held += 1
                continue
        num_unclaimed -= num_wanted
        budget -= num_tokens
        num_slots -= seq.params.beam_width
        offers.append(Offer(seq=seq, num_tokens=num_tokens, node=node, page_ids=state.cache.lock(node)))


def _count_soon(state: SchedulerState, seq: Seq, num_tokens: int) -> int:
    """Pages for `num_tokens` tokens of a sequence and one page to grow, if it will ever need it."""
    if seq.is_search:
        return count_first_pages(state, seq)
    return state.pages_for(min(num_tokens + state.page_size, seq.num_kv_tokens))


def _count_claim(state: SchedulerState, seq: Seq) -> int:
    """Pages that a running sequence does not hold yet, and will want soon."""
    if seq.is_fully_planned:
        return 0
    if seq.beams:
        return count_soon_pages(state, seq)
    return _count_soon(state, seq, max(seq.prefill_end, seq.num_planned)) - len(seq.page_ids)


def _find_leader(state: SchedulerState, seq: Seq, node: Node, offers: list[Offer]) -> PrefillLead | None:
    """The prefill of this step whose next page to be cached is also the next that `seq` needs, if any.

    A burst of requests with one long prefix thus computes it once: the first is admitted, the others
    wait until it has computed what they share (and then find it in the cache). They lose nothing by
    waiting, since they would compute the same tokens, and the leader gets on at every step it is given
    pages; when it is retracted or aborted, the hold lapses.
    """
    if not state.cache.is_enabled:
        return None
    size = state.page_size
    for offer in offers:
        if offer.node is not node:
            continue
        leader = offer.seq
        start = end = node.depth * size
        limit = min(seq.num_cacheable_tokens, leader.num_known) // size * size
        while end < limit and seq.cache_ids[end : end + size] == leader.cache_ids[end : end + size]:
            end += size
        if end > start and seq.cache_salt == leader.cache_salt:
            return PrefillLead(seq=leader, epoch=leader.epoch, num_tokens=end)
    return None


def _admit(state: SchedulerState, seq: Seq, node: Node, page_ids: list[int]) -> list[SlotInit]:
    index = bisect.bisect_left(state.waiting, seq.queue_key, key=lambda other: other.queue_key)
    assert state.waiting[index] is seq, f"request {seq.rid!r} is not where the queue's order has it"
    if seq.epoch == 0:
        count_pass(state, seq)
    del state.waiting[index]
    seq.status = SeqStatus.RUNNING
    seq.slot, *seq.beam_slots = [state.free_slots.pop() for _ in range(seq.params.beam_width)]
    seq.tail = node
    seq.match, seq.match_stamp = None, -1
    seq.page_ids = page_ids
    seq.prefill_end = seq.num_known
    seq.num_planned = len(page_ids) * state.page_size
    state.running[seq.seq_id] = seq
    if seq.num_cached_tokens is None:
        seq.num_cached_tokens = seq.num_planned
        state.num_prompt_tokens += seq.num_prompt_tokens
        state.num_cached_tokens += seq.num_cached_tokens
    init = SlotInit(
        slot=seq.slot,
        params=seq.params,
        prompt_ids=seq.token_ids[: seq.num_prompt_tokens],
        output_ids=seq.token_ids[seq.num_prompt_tokens :],
        grids=tuple(placed.image.grid for placed in seq.images),
    )
    if seq.images:  # whose positions every beam goes on from
        return [init, *(replace(init, slot=slot) for slot in seq.beam_slots)]
    return [init, *(SlotInit(slot, seq.params, [], []) for slot in seq.beam_slots)]


def _plan_chunk(state: SchedulerState, seq: Seq, num_tokens: int) -> PrefillChunk:
    start, end = seq.num_planned, seq.num_planned + num_tokens
    for _ in range(state.pages_for(end) - len(seq.page_ids)):
        seq.page_ids.append(state.cache.allocate())
    # The full pages are made known before they are computed. That does no harm: whatever becomes of the
    # request, this plan is launched before any plan made after it. Nor does anyone read in this step
    # what another chunk of it writes, for the matches of this step were made before its chunks.
    seq.tail = state.cache.extend(seq.tail, seq.cache_ids, seq.page_ids, end, seq.cache_salt)
    samples = end == seq.prefill_end and seq.params.max_new_tokens > 0
    score_rows = _take_score_rows(seq, end)
    seq.num_planned = end
    seq.num_in_flight += int(samples)
    state.num_computed_tokens += num_tokens
    return PrefillChunk(
        slot=seq.slot,
        seq_id=seq.seq_id,
        epoch=seq.epoch,
        start=start,
        token_ids=seq.token_ids[start:end],
        page_ids=list(seq.page_ids),
        samples=samples,
        score_places=[row - start for row in score_rows],
        score_targets=[seq.token_ids[row + 1] for row in score_rows],
        feature_rows=find_rows(state.features, seq.images, start, end) if seq.images else [],
    )


def _take_score_rows(seq: Seq, end: int) -> tuple[int, ...]:
    """The prompt rows below `end` that are still to be scored; the prefill computes all of them."""
    if seq.params.scores is None:
        return ()
    rows = seq.params.scores.prompt_rows
    first = seq.num_score_planned
    seq.num_score_planned = bisect.bisect_left(rows, end, lo=first)
    return rows[first : seq.num_score_planned]
