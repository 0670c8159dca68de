"""In which order waiting requests are offered a place: as they came, or first those whose prefix is cached.

Called by admit.py once a step. A pure function of the state; knows nothing of slots, rows or how many pages
a request wants. Longest prefix match (SGLang's `lpm`): what a request finds in the cache it need not compute,
and what is cached now may be evicted before its turn by arrival comes.

Order. Retracted requests first, by arrival; then by priority. Among new requests of one priority, a class,
the longer cached prefix goes first; equal ones by arrival, but those that hang below the same page together.
When nothing is cached for any of them, this is the order of arrival.

Nobody starves. The front of a class is the first of it by arrival. Every admission from the class other than
the front's own counts against the front (`count_pass`), and only as many requests as the front is yet to let
pass, MAX_PASSED in all, stand before their turn; the others follow by arrival, and admit.py lets nobody by
who does not fit. So no front is passed more often than MAX_PASSED times, except while it is held (it waits
for tokens that it would have to compute itself) or its programs are not ready. Let p requests of its class
stand before a request when it arrives. Later ones arrive behind it, so each of the p, and then itself, is
the front at most once; and whoever overtakes it passes the front of that moment. So it is overtaken at most
MAX_PASSED * (p + 1) times, and however long the queue, one admission in MAX_PASSED + 1 goes by arrival.

Cost. Of a class only the first NUM_OLDEST and the last NUM_NEWEST are looked at: the oldest are those whose
turn it is, and the newest go on where replies have just ended (the next turn of a conversation), whose pages
are the last to be evicted. A match is remembered (`Seq.match`), and the next look goes on from there: up, if
pages were evicted, and down, if more are cached by now. At most MAX_LOOKUPS pages are looked up in a step,
beside those of the requests that are admitted.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from itertools import islice

from jaxserve.scheduler.plan import StepLimits
from jaxserve.scheduler.prefix_cache import Node
from jaxserve.scheduler.state import SchedulerState, Seq

MAX_PASSED = 4
NUM_OLDEST = 64
NUM_NEWEST = 64
MAX_LOOKUPS = 1024


def order_queue(state: SchedulerState, limits: StepLimits) -> Iterator[Seq]:
    """The waiting requests that the programs can run, in the order in which they are to be offered a place.

    Lazily, since most steps need few of them; the queue must not change in between. Of a long queue not all
    are listed. New ones are left out while `limits` admits none.
    """
    waiting = state.waiting
    is_by_match = state.prefers_cached and state.cache.is_enabled
    start = 0
    while start < len(waiting):
        seq = waiting[start]
        if seq.epoch == 0 and not limits.admits_new:
            return
        if seq.epoch == 0 and is_by_match:
            end = _find_class(state, seq.priority - 1)
            yield from _order_class(state, _list_candidates(state, limits, start, end), waiting[start])
            start = end
            continue
        if limits.can_run(seq.params.beam_width):
            yield seq
        start += 1


def count_pass(state: SchedulerState, seq: Seq) -> None:
    """The new request `seq`, which is still in the queue, is admitted: count it against its class's front."""
    front = state.waiting[_find_class(state, seq.priority)]
    if front is not seq:
        front.num_passed += 1


def find_match(state: SchedulerState, seq: Seq, max_lookups: int | None = None) -> Node:
    """The end of the cached prefix of a waiting request, by going on from where it was last found.

    With `max_lookups` the search may stop short of it, and goes on the next time.
    """
    cache, known = state.cache, seq.match
    if known is not None and known.is_cached and seq.match_stamp == cache.num_attached:
        return known  # nothing was cached since
    node = cache.match(
        seq.cache_ids, seq.cache_salt, seq.num_cacheable_tokens, known=known, max_lookups=max_lookups
    )
    seq.match = node
    is_certain = max_lookups is None or node.depth - (known.depth if known else 0) < max_lookups
    seq.match_stamp = cache.num_attached if is_certain else -1
    return node


def _find_class(state: SchedulerState, priority: int) -> int:
    """The place in the queue where the new requests of a priority begin, or would."""
    return bisect.bisect_left(state.waiting, (1, -priority), key=lambda seq: seq.queue_key)


def _list_candidates(state: SchedulerState, limits: StepLimits, start: int, end: int) -> list[Seq]:
    """Those of a class that are looked at, by arrival."""
    members = islice(state.waiting, start, end)
    able = (seq for seq in members if limits.can_run(seq.params.beam_width))
    oldest = list(islice(able, NUM_OLDEST))
    last_id = oldest[-1].seq_id if oldest else -1
    newest = state.waiting[max(start, end - NUM_NEWEST) : end]
    return oldest + [seq for seq in newest if seq.seq_id > last_id and limits.can_run(seq.params.beam_width)]


def _order_class(state: SchedulerState, candidates: list[Seq], front: Seq) -> list[Seq]:
    num_early = MAX_PASSED - front.num_passed
    if num_early <= 0:
        return candidates
    num_lookups = MAX_LOOKUPS
    places: dict[int, int] = {}  # by page: of the first that hangs below it
    ranks: list[tuple[int, int, Seq]] = []
    for place, seq in enumerate(candidates):
        known_depth = seq.match.depth if seq.match else 0
        node = find_match(state, seq, num_lookups)
        num_lookups = max(num_lookups - abs(node.depth - known_depth), 0)
        ranks.append((-node.depth, places.setdefault(node.page_id, place), seq))
    if len(places) == 1:
        return candidates
    ranks.sort(key=lambda rank: rank[:2])
    early = [seq for _, _, seq in ranks[:num_early]]
    early_ids = {seq.seq_id for seq in early}
    return early + [seq for seq in candidates if seq.seq_id not in early_ids]
