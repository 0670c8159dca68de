"""What pausing and changing the weights need of the scheduler: who has begun, and a cache that is forgotten.

Called by engine/operations.py between two steps. Knows nothing of why the engine pauses.
"""

from __future__ import annotations

import bisect

from jaxserve.scheduler.state import SchedulerState

# Before it in the queue stand those that have run and were sent back (see Seq.queue_key).
_FIRST_NEW = (1,)


def num_retracted(state: SchedulerState) -> int:
    """Waiting requests that have run before."""
    return bisect.bisect_left(state.waiting, _FIRST_NEW, key=lambda seq: seq.queue_key)


def has_begun(state: SchedulerState) -> bool:
    """Whether any request has run and is not at its end."""
    return bool(state.running) or num_retracted(state) > 0


def salted(cache_salt: str, era: int) -> str:
    """The salt under which a request of an era (a count of `forget_cache`) finds cached pages."""
    return f"{era}|{cache_salt}"


def forget_cache(state: SchedulerState, era: int) -> None:
    """From now on nobody finds a page that was cached before, though requests run or wait.

    `era` is one more than the last time. Pages in use stay with those who use them, under the old salt, and
    go when they are not used. Every request must be added under `salted(..., era)`, 0 at first.
    """
    state.clear_caches()
    for seq in state.waiting:
        seq.cache_salt = salted(seq.cache_salt.partition("|")[2], era)
        seq.match, seq.match_stamp = None, -1
