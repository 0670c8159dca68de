"""The scheduler: `schedule(state, limits) -> StepPlan` and `apply(state, plan, result) -> deltas`.

Called by engine/loop.py, which launches every plan it gets, in order, before it asks for the next. Pure
functions over SchedulerState: the same calls give the same plans. Knows nothing of arrays, devices,
clocks or text.

Overlap. A plan may be made while earlier ones are not applied yet, so a sequence may have tokens in
flight: sampled on the device, and fed there to the next step, without the host having seen them. A stop is
learnt when its step is applied; what was planned for the sequence in between is a stale row. A beam search
has no overlap with itself: what a step gives decides what the next one feeds. Nor has any step with drafts
(speculate.py): until it is applied every plan is empty.

Why pages can be given back at once although stale rows may still be running. The device runs steps in
order of launch. A stale row was launched before the page was given back, so it writes before any later
step writes there for a new owner, and nobody reads a position that a later step has not written. A page
that goes to the prefix cache instead is no exception: it is filled by tokens that are known and whose KV
planned steps compute, and a stale row writes at the position of the last known token or after it, that is
either the very token the page holds there, or past every cached page. So a cached page never changes. Pages
of beams are not cached, and one that beams share is not written (beams.py); copies run in the same order.

Why it ends. `_secure_oldest` gives the oldest running sequence its next page before anyone else, taking
from the others if need be; if it is a beam search, `_plan_decode_rows` gives it all the pages of its next
step, taking from those who got theirs before it too. It is never a victim itself; so as long as it has
anything left to plan it gets at least one token further in every step (a search in every step that finds
none of its rows in flight, a prompt whenever the stages of its next image have run), and it fits by `add`.
Only the admission of a still older one takes this place from it, which happens at most once for each older
request. When it has ended, the same holds for the next oldest; when nothing runs the head of the queue is
admitted. So every request ends, and there is never a lack of pages to raise an error for.
"""

from __future__ import annotations

import bisect
import dataclasses

from jaxserve.errors import InvalidRequestError
from jaxserve.images import PlacedImage
from jaxserve.scheduler import beams
from jaxserve.scheduler.admit import plan_prefill
from jaxserve.scheduler.images import begin_images, check_images
from jaxserve.scheduler.plan import NO_TOKEN, DecodeRow, StepLimits, StepPlan, StepResult
from jaxserve.scheduler.speculate import add_drafts, choose_drafts, is_verifying, settle_draft, verify_row
from jaxserve.scheduler.state import Sampled, SchedulerState, Seq, SeqStatus, find_end, has_work, make_delta
from jaxserve.scheduler.window import choose_window, read_window
from jaxserve.types import FinishReason, TokenDelta, TokenParams, TokenScores


def add(
    state: SchedulerState,
    *,
    rid: str,
    prompt_ids: list[int],
    params: TokenParams,
    priority: int = 0,
    cache_salt: str = "",
    images: tuple[PlacedImage, ...] = (),
) -> None:
    """Queue a request: higher priority first, then by arrival (queue_order.py may prefer cached prefixes).

    `params.max_new_tokens` is clipped so that the request fits the pool when it is alone there. Raises
    InvalidRequestError for an empty prompt, one that the whole pool cannot hold, an id in use, or an image or
    a beam search that can never run.
    """
    capacity = state.pool.num_usable * state.page_size
    num_prompt_tokens = len(prompt_ids)
    if rid in state.by_rid:
        raise InvalidRequestError(f"rid {rid!r} is in use by another request; choose another.", param="rid")
    if num_prompt_tokens == 0:
        raise InvalidRequestError("The prompt is empty; it must hold at least 1 token.", param="prompt")
    if num_prompt_tokens + 1 > capacity:
        raise InvalidRequestError(
            f"The prompt has {num_prompt_tokens} tokens, but the KV pool holds {capacity} tokens in all, "
            f"and one is needed for the reply: at most {capacity - 1} are possible. "
            "Shorten the prompt, or start the server with a larger --max-total-tokens.",
            param="prompt",
        )
    check_images(state.features, images)
    if params.beam_width > 1:
        params = beams.fit_search(state, num_prompt_tokens, params)
    if num_prompt_tokens + params.max_new_tokens > capacity:
        params = dataclasses.replace(params, max_new_tokens=capacity - num_prompt_tokens)
    seq = Seq(
        seq_id=state.next_seq_id,
        rid=rid,
        params=params,
        priority=priority,
        cache_salt=cache_salt,
        num_prompt_tokens=num_prompt_tokens,
        num_kv_tokens=num_prompt_tokens + max(params.max_new_tokens - 1, 0),
        token_ids=list(prompt_ids),
        tail=state.cache.root,
        images=images,
    )
    state.next_seq_id += 1
    state.by_rid[rid] = seq
    _enqueue(state, seq)


def schedule(state: SchedulerState, limits: StepLimits) -> StepPlan:
    """Plan the next step: a row for every decoding sequence, then as much prefill as there is room for.

    The plan is empty when nothing can be done before earlier plans are applied (or nothing is left to
    do); an empty plan has no step number of its own and need not be launched or applied.
    """
    assert limits.page_size == state.page_size, f"page size {limits.page_size}, expected {state.page_size}"
    assert min(limits.max_rows, limits.max_chunks, limits.max_chunk_tokens) >= 1, (
        f"no room for a step: {limits}"
    )
    drafts = None if is_verifying(state) else choose_drafts(state, limits)
    if drafts is None or any(draft.seq.num_in_flight for draft in drafts):
        return StepPlan(step=state.num_steps, inits=(), decode=(), chunks=())
    window = 1 if drafts else choose_window(state, limits)
    _secure_oldest(state)
    rows, searches = _plan_decode_rows(state, window)
    if window > 1:  # nobody is there who could be in a prefill, or enter one
        state.num_steps += 1
        decode, num_waiting = tuple(rows.values()), len(state.waiting)
        return StepPlan(state.num_steps - 1, (), decode, (), num_waiting=num_waiting, window=window)
    decode = add_drafts(state, rows, drafts)
    if limits.max_mixed_tokens is not None and (decode or searches):
        most = min(limits.max_chunk_tokens, limits.max_mixed_tokens)
        limits = dataclasses.replace(limits, max_chunk_tokens=most)
    images = begin_images(state.features, limits, has_rows=bool(decode or searches))
    inits, chunks = plan_prefill(state, limits, images)
    plan = StepPlan(
        step=state.num_steps,
        inits=inits,
        decode=(*decode, *(row for search in searches.values() for row in search.rows)),
        chunks=chunks,
        tables=tuple(table for search in searches.values() for table in search.tables),
        copies=tuple(copy for search in searches.values() for copy in search.copies),
        num_waiting=len(state.waiting),
        encode=None if images is None else images.encode,
    )
    if not plan.is_empty:
        state.num_steps += 1
        state.num_encoded_images += plan.encode is not None and plan.encode.is_last
    return plan


def apply(state: SchedulerState, plan: StepPlan, result: StepResult) -> list[TokenDelta]:
    """Take in what `plan` gave, aligned as plan.py says. Plans are applied in order.

    Results for a sequence that has ended or was retracted since the plan was made are dropped.
    """
    if plan.window > 1:
        return [_append_tokens(state, seq, results) for seq, results in read_window(state, plan, result)]
    num_rows, num_results = len(plan.decode), len(plan.decode) + len(plan.chunks)
    token_ids = result.token_ids
    assert len(token_ids) == num_results, f"step {plan.step} has {num_results} results, got {len(token_ids)}"
    scores = result.scores or [None] * num_results
    deltas: list[TokenDelta] = []
    running = state.running
    searches: dict[int, list[Sampled]] = {}
    verified: dict[int, list[Sampled]] = {}
    for row, token_id, row_scores in zip(plan.decode, token_ids, scores, strict=False):
        seq = running.get(row.seq_id)
        if seq is not None and seq.epoch == row.epoch:
            if seq.beams:
                searches.setdefault(seq.seq_id, []).append((token_id, row_scores))
                continue
            if seq.num_drafts_in_flight:
                verify_row(seq, row, (token_id, row_scores), verified.setdefault(seq.seq_id, []))
                continue
            assert row.position == len(seq.token_ids) - 1, f"step {plan.step} is applied out of order"
            deltas.append(_append_tokens(state, seq, [(token_id, row_scores)]))
    for seq_id, results in searches.items():
        deltas += _advance_search(state, running[seq_id], results)
    for seq_id, results in verified.items():
        settle_draft(state, running[seq_id], len(results) - 1)
        deltas.append(_append_tokens(state, running[seq_id], results))
    told = iter(result.prompt_scores)
    for chunk, token_id, row_scores in zip(plan.chunks, token_ids[num_rows:], scores[num_rows:], strict=True):
        prompt_scores = next(told) if chunk.score_places else []
        seq = running.get(chunk.seq_id)
        if seq is None or seq.epoch != chunk.epoch:
            continue
        seq.num_scored += len(prompt_scores)
        is_last = chunk.start + len(chunk.token_ids) == seq.prefill_end
        if chunk.samples and seq.is_search:
            beams.begin(state, seq)
            deltas += _advance_search(state, seq, [(token_id, row_scores)], prompt_scores)
        elif chunk.samples:
            deltas.append(_append_tokens(state, seq, [(token_id, row_scores)], prompt_scores))
        elif token_id == NO_TOKEN:
            deltas.append(_fail(state, seq))
        elif is_last and seq.params.max_new_tokens == 0:
            _end(state, seq)
            deltas.append(make_delta(seq, [], FinishReason(kind="length"), prompt_scores=prompt_scores))
        elif prompt_scores:
            deltas.append(make_delta(seq, [], prompt_scores=prompt_scores))
    return deltas


def abort(state: SchedulerState, rid: str) -> TokenDelta | None:
    """Drop a request wherever it is; its slot and pages are free on return. None if it is not known."""
    seq = state.by_rid.get(rid)
    if seq is None:
        return None
    if seq.status is SeqStatus.WAITING:
        del state.waiting[bisect.bisect_left(state.waiting, seq.queue_key, key=_get_queue_key)]
    else:
        _release(state, seq)
    seq.status = SeqStatus.FINISHED
    del state.by_rid[rid]
    state.num_aborted += 1
    return make_delta(seq, [], FinishReason(kind="abort", message="The request was aborted."))


def flush(state: SchedulerState) -> bool:
    """Empty the prefix cache, if nothing runs or waits; returns whether it did."""
    if has_work(state):
        return False
    state.clear_caches()
    return True


def retract_all(state: SchedulerState) -> int:
    """Put everything that runs back in the queue, its tokens kept; returns how many that were."""
    for seq in (seqs := list(state.running.values())):
        _retract(state, seq)
    return len(seqs)


def _secure_oldest(state: SchedulerState) -> None:
    """Give the oldest running sequence the page for its next position, before anyone else takes it.

    A beam search past its prefill takes its pages in `_plan_decode_rows`, from those with rows already too.
    """
    if not state.running:
        return
    oldest = state.running[min(state.running)]
    if oldest.is_search and not oldest.is_prefilling:
        return
    if oldest.is_fully_planned or oldest.num_planned < len(oldest.page_ids) * state.page_size:
        return
    while state.cache.num_available == 0:
        _retract(state, _choose_victim(state))
    oldest.page_ids.append(state.cache.allocate())


def _plan_decode_rows(
    state: SchedulerState, window: int
) -> tuple[dict[int, DecodeRow], dict[int, beams.BeamStep]]:
    """One row for every sequence past its prefill, and the rows of every search; both by seq_id."""
    rows: dict[int, DecodeRow] = {}
    searches: dict[int, beams.BeamStep] = {}
    page_size = state.page_size
    for seq in list(state.running.values()):
        if seq.status is not SeqStatus.RUNNING or not seq.can_decode:
            continue  # retracted for a row above, or waiting for results
        position = seq.num_planned
        num_steps = min(window, seq.num_kv_tokens - position)
        index, last_index = position // page_size, (position + num_steps - 1) // page_size
        num_missing = beams.count_step_pages(state, seq) if seq.beams else last_index - len(seq.page_ids) + 1
        # Most rows miss no page: they must not pay for looking.
        while num_missing and state.cache.num_available < num_missing and seq.status is SeqStatus.RUNNING:
            victim = _choose_victim(state)
            # Its rows must not run in the step that gives its pages to others.
            if rows.pop(victim.seq_id, None) or searches.pop(victim.seq_id, None):
                assert window == 1, "a window was planned without the pages for it"
                victim.num_planned -= 1
            _retract(state, victim)
        if seq.status is not SeqStatus.RUNNING:
            continue  # it was the victim itself
        if seq.beams:
            searches[seq.seq_id] = beams.plan_step(state, seq)
            continue
        for _ in range(num_missing):
            seq.page_ids.append(state.cache.allocate())
        token_id = NO_TOKEN if seq.num_in_flight else seq.token_ids[-1]
        page_id, next_page_id = seq.page_ids[index], seq.page_ids[last_index] if last_index > index else 0
        rows[seq.seq_id] = DecodeRow(
            seq.slot, seq.seq_id, seq.epoch, position, page_id, token_id, num_steps, next_page_id
        )
        seq.num_planned = position + num_steps
        seq.num_in_flight += num_steps
    return rows, searches


def _choose_victim(state: SchedulerState) -> Seq:
    """The running sequence with the fewest output tokens, those of all beams counted, and the latest among
    equals; never the oldest.

    Those that have nothing left to plan come last: they end with the steps in flight, and give their
    pages back without losing work.
    """
    oldest_id = min(state.running)
    return min(
        (seq for seq in state.running.values() if seq.seq_id != oldest_id),
        key=lambda seq: (seq.is_fully_planned, beams.count_output_tokens(seq), -seq.seq_id),
    )


def _retract(state: SchedulerState, seq: Seq) -> None:
    """Take slot and pages from a running sequence and queue it again, ahead of those that never ran.

    Known output tokens are kept and later prefilled like a prompt, mostly out of the prefix cache. Those
    in flight are dropped and sampled again; sampling depends on seed and position alone, so they come
    out the same. A beam search starts again from its prompt, and comes out the same too.
    """
    _release(state, seq)
    seq.status = SeqStatus.WAITING
    seq.epoch += 1
    seq.num_planned = seq.num_in_flight = seq.num_drafts_in_flight = seq.prefill_end = 0
    seq.num_score_planned = seq.num_scored
    state.num_retractions += 1
    _enqueue(state, seq)


def _append_tokens(
    state: SchedulerState, seq: Seq, results: list[Sampled], prompt_scores: list[TokenScores] | None = None
) -> TokenDelta:
    """Make sampled tokens known, one or those of a draft or window, and end the sequence if the last of them
    does."""
    has_failed = results[-1][0] == NO_TOKEN
    results = results[:-1] if has_failed else results
    token_ids = [token_id for token_id, _ in results]
    seq.append(token_ids)
    seq.num_in_flight -= len(results)
    state.num_generated_tokens += len(results)
    if has_failed:
        return _fail(state, seq, token_ids)
    finish = find_end(seq.params, token_ids[-1], seq.num_output_tokens)
    if finish is not None:
        _end(state, seq)
    wants_scores = seq.params.scores is not None and seq.params.scores.of_output
    told = [scores for _, scores in results if scores is not None] if wants_scores else None
    return make_delta(seq, token_ids, finish, scores=told, prompt_scores=prompt_scores)


def _advance_search(
    state: SchedulerState,
    seq: Seq,
    results: list[Sampled],
    prompt_scores: list[TokenScores] | None = None,
) -> list[TokenDelta]:
    """Choose the next beams from the results of a row of each live one; tell them when all are finished."""
    if any(token_id == NO_TOKEN for token_id, _ in results):
        return [_fail(state, seq)]
    row_scores = [scores for _, scores in results if scores is not None]
    assert len(row_scores) == len(results), f"the beams of {seq.rid!r} came without scores"
    seq.num_in_flight -= 1
    beams.advance(state, seq, row_scores)
    if not beams.is_over(seq):
        return [make_delta(seq, [], prompt_scores=prompt_scores)] if prompt_scores else []
    found = beams.list_results(seq)
    state.num_generated_tokens += sum(len(beam.token_ids) for beam in found)
    _end(state, seq)
    return [make_delta(seq, [], found[0].finish, prompt_scores=prompt_scores, beams=found)]


def _fail(state: SchedulerState, seq: Seq, token_ids: list[int] | None = None) -> TokenDelta:
    """End a sequence whose logits are not numbers; its neighbours' rows are their own. `token_ids` became
    known in the same step."""
    num_output_tokens = seq.num_output_tokens + seq.search_depth
    seq.num_planned = 0  # its pages hold no numbers either: cache no more of them than is cached already
    _release(state, seq)
    seq.status = SeqStatus.FINISHED
    del state.by_rid[seq.rid]
    state.num_aborted += 1
    message = (
        f"The model's logits were not finite numbers (NaN) at output token {num_output_tokens + 1}; "
        "the request was ended. Its weights may be damaged, or its numbers too large for the dtype."
    )
    return make_delta(seq, token_ids or [], FinishReason(kind="abort", message=message, http_status=500))


def _end(state: SchedulerState, seq: Seq) -> None:
    _release(state, seq)
    seq.status = SeqStatus.FINISHED
    del state.by_rid[seq.rid]
    state.num_finished += 1


def _release(state: SchedulerState, seq: Seq) -> None:
    """Give back the slots and pages of a running sequence; pages full of reusable tokens stay cached."""
    beams.drop_beams(state, seq)
    del state.running[seq.seq_id]
    state.free_slots += [seq.slot, *seq.beam_slots]
    seq.beam_slots = []
    state.cache.release(seq.tail, seq.cache_ids, seq.page_ids, seq.num_reusable_tokens, seq.cache_salt)
    seq.slot, seq.page_ids = -1, []
    seq.tail = state.cache.root


def _enqueue(state: SchedulerState, seq: Seq) -> None:
    bisect.insort(state.waiting, seq, key=_get_queue_key)


def _get_queue_key(seq: Seq) -> tuple[int, int, int]:
    return seq.queue_key
