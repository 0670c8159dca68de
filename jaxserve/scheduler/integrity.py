"""Every invariant that spans requests, slots and pages, checked at once.

Called by tests, and by the engine where somebody waits anyway. Reads the SchedulerState and changes nothing.
"""

from __future__ import annotations

from jaxserve.scheduler.state import Beam, SchedulerState, Seq, SeqStatus


def check_integrity(state: SchedulerState) -> None:
    """Check every invariant that spans requests, slots and pages. Raises AssertionError with a sentence.

    Costs O(pages): for tests and for debugging, not for every step.
    """
    owners = [0] * state.pool.num_pages
    for seq in state.running.values():
        for page_id in seq.page_ids:
            owners[page_id] += 1
        for beam in seq.beams:
            for page_id in beam.page_ids:
                owners[page_id] += 1
    for node in state.cache.list_nodes():
        owners[node.page_id] += 1
    state.pool.check_integrity(owners)
    state.cache.check_integrity()
    if state.features is not None:
        state.features.check_integrity()
    for seq_id, seq in state.running.items():
        assert seq_id == seq.seq_id, f"sequence {seq.seq_id} is filed under {seq_id}"
        _check_running(state, seq)
    for seq in state.waiting:
        where = f"waiting request {seq.rid!r}"
        assert seq.status is SeqStatus.WAITING, f"{where} is {seq.status}"
        assert seq.slot == -1, f"{where} holds slot {seq.slot}"
        assert not seq.page_ids, f"{where} holds pages {seq.page_ids}"
        assert not seq.beam_slots, f"{where} holds slots {seq.beam_slots}"
        assert not seq.beams, f"{where} has beams"
    keys = [seq.queue_key for seq in state.waiting]
    assert keys == sorted(keys), f"the waiting queue is out of order: {keys}"
    used = [slot for seq in state.running.values() for slot in (seq.slot, *seq.beam_slots)]
    slots = sorted(used + state.free_slots)
    assert slots == list(range(state.max_rows)), (
        f"slots in use and free ones do not make {state.max_rows}: {slots}"
    )
    live = [*state.waiting, *state.running.values()]
    assert len(live) == len(state.by_rid), f"{len(live)} live requests, but {len(state.by_rid)} ids"
    for seq in live:
        assert state.by_rid.get(seq.rid) is seq, f"request id {seq.rid!r} leads to another request"


def _check_running(state: SchedulerState, seq: Seq) -> None:
    where = f"running request {seq.rid!r}"
    assert seq.status is SeqStatus.RUNNING, f"{where} is {seq.status}"
    wanted = state.pages_for(seq.num_planned)
    # The oldest is given its next page before it is known whether the step goes to an image of its own.
    spare = int(bool(seq.images) and seq.is_prefilling)
    live = [beam for beam in seq.beams if beam.finish is None]
    for num_pages in [len(seq.page_ids) + len(beam.page_ids) for beam in live] or [len(seq.page_ids)]:
        assert 0 <= num_pages - wanted <= spare, f"{where} holds {num_pages} pages for {wanted}"
    if seq.is_search:
        _check_search(state, seq, live, where)
    assert seq.prefill_end <= seq.num_known, f"{where} lost known tokens"
    assert 0 < seq.num_planned <= seq.num_kv_tokens, (
        f"{where} has {seq.num_planned} positions planned, but no use for more than {seq.num_kv_tokens}"
    )
    assert 0 <= seq.num_drafts_in_flight < max(seq.num_in_flight, 1), f"{where} has drafts only in flight"
    if seq.is_prefilling:
        assert seq.num_in_flight == 0, f"{where} has tokens in flight during its prefill"
    elif seq.params.max_new_tokens > 0:
        num_known = seq.num_known + seq.search_depth
        assert seq.num_planned + 1 == num_known + seq.num_in_flight, (
            f"{where} has {num_known} tokens known, {seq.num_in_flight} in flight, {seq.num_planned} fed"
        )
    path = []
    node = seq.tail
    while node.parent is not None:
        path.append(node.page_id)
        node = node.parent
    assert path[::-1] == seq.page_ids[: len(path)], f"{where} holds other pages than its cached path"


def _check_search(state: SchedulerState, seq: Seq, live: list[Beam], where: str) -> None:
    reserved = [seq.slot, *seq.beam_slots]
    assert len(reserved) == seq.params.beam_width, f"{where} reserves the slots {reserved}"
    assert len(seq.beams) <= seq.params.beam_width, f"{where} has {len(seq.beams)} beams"
    if not seq.beams:
        return
    assert live, f"{where} goes on without a live beam"
    slots = [beam.slot for beam in live]
    assert len(set(slots)) == len(slots), f"{where} has two beams in one of the slots {slots}"
    assert set(slots) <= set(reserved), f"{where} uses the slots {slots} of {reserved}"
    assert len(seq.page_ids) == seq.num_prompt_tokens // state.page_size, (
        f"{where} holds {len(seq.page_ids)} pages for its prompt's full ones"
    )
    assert {beam.length for beam in live} == {seq.search_depth}, f"{where} has live beams of two lengths"
    sums = [beam.cumulative_logprob for beam in seq.beams]
    assert sums == sorted(sums, reverse=True), f"{where} has its beams out of order: {sums}"
    for beam in seq.beams:
        assert beam.finish is None or not beam.page_ids, f"{where} keeps pages for a finished beam"
