"""Decode windows: when several steps of the same rows run in one launch, and what is taken of the results.

Called by schedule.py. Pure functions over SchedulerState; knows nothing of devices, clocks or text.

In a window each step feeds what the one before it sampled, without a word from the host, which plans,
launches and reads once for all of them. That helps where a step takes the device less time than the host
needs for one. The price: a stop, a new request or one that is dropped is noticed only when the window has
run. A row runs on behind the end of its reply, in pages of its own and in vain, for as long as the window.

So there is a window only where nobody could come in earlier: no prompt is in its prefill, and nobody waits
for anything but a slot. All rows must have their pages, so nobody gives way for one. Searches and drafts
have none, for what they feed next is decided here.
"""

from __future__ import annotations

from jaxserve.scheduler.plan import NO_TOKEN, StepLimits, StepPlan, StepResult
from jaxserve.scheduler.state import Sampled, SchedulerState, Seq, find_end


def choose_window(state: SchedulerState, limits: StepLimits) -> int:
    """How many steps the next launch has: `limits.window`, or 1."""
    window = limits.window
    if window == 1 or (state.waiting and state.free_slots):
        return 1
    seqs = state.running.values()
    if any(seq.is_prefilling or seq.is_search for seq in seqs):
        return 1
    seqs = [seq for seq in seqs if seq.can_decode]
    # A program for more rows than a single step would run in may take longer than it saves.
    bucket = next((rows for rows in limits.row_buckets if rows >= len(seqs)), None)
    if bucket not in limits.window_rows:
        return 1
    most_steps = max((seq.num_kv_tokens - seq.num_planned for seq in seqs), default=0)
    if most_steps < window:
        return 1
    num_missing = 0
    for seq in seqs:
        end = min(seq.num_planned + window, seq.num_kv_tokens)
        num_missing += state.pages_for(end) - len(seq.page_ids)
    return window if num_missing <= state.cache.num_available else 1


def read_window(state: SchedulerState, plan: StepPlan, result: StepResult) -> list[tuple[Seq, list[Sampled]]]:
    """What each row gave that still is of use, up to the end of its reply."""
    num_results = sum(row.num_steps for row in plan.decode)
    assert len(result.token_ids) == num_results, f"step {plan.step} has {num_results} results"
    results = list(zip(result.token_ids, result.scores or [None] * num_results, strict=True))
    found = []
    first = 0
    for row in plan.decode:
        here = slice(first, first + row.num_steps)
        seq = state.running.get(row.seq_id)
        if seq is not None and seq.epoch == row.epoch:
            assert row.position == len(seq.token_ids) - 1, f"step {plan.step} is applied out of order"
            found.append((seq, _cut_reply(seq, results[here])))
        first = here.stop
    return found


def _cut_reply(seq: Seq, results: list[Sampled]) -> list[Sampled]:
    """Up to the last token of the reply, or to what is no token."""
    for index, (token_id, _) in enumerate(results):
        num_output_tokens = seq.num_output_tokens + index + 1
        if token_id == NO_TOKEN or find_end(seq.params, token_id, num_output_tokens) is not None:
            return results[: index + 1]
    return results
