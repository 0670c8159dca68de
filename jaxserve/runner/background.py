"""Work that may take its time while the engine serves: on a thread of low priority, with rests.

Made for compiling. A lower priority is not enough to leave running requests alone: what compiles evicts the
steps' caches, takes memory bandwidth and, while a program is traced, Python's lock. So while steps run, each
piece of work is followed by a rest that is longer than it was. There is no rest on a machine that is idle,
and none while requests wait for a place: the next program may have one for them. Knows nothing of programs or
requests.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable

NICENESS = 15  # of the thread, and of those that XLA starts from it
REST_RATIO = 2.5  # of a rest to the work before it
IDLE_S = 1.0  # without a new step, and nobody is disturbed
LOOK_S = 0.05  # between two looks


class Background:
    """One thread, started once; `note_step` may be called from any other."""

    def __init__(self):
        self._disturbed_s = float("-inf")
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def note_step(self, *, is_pressed: bool = False) -> None:
        """A step runs now; pressed means that there are requests for which it has no place."""
        self._disturbed_s = float("-inf") if is_pressed else time.monotonic()

    def start(self, pieces: Iterable[Callable[[], None]], on_end: Callable[[bool], None]) -> None:
        """Do the pieces in turn, then call `on_end` with whether none was left; also if one raises, which
        ends the thread."""

        def work() -> None:
            _give_way()
            is_done = False
            try:
                is_done = self._work_through(pieces)
            finally:
                on_end(is_done)

        self._thread = threading.Thread(target=work, name="jaxserve-background", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Let the thread end after the piece at hand."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def _work_through(self, pieces: Iterable[Callable[[], None]]) -> bool:
        for do_piece in pieces:
            if self._stopping.is_set():
                return False
            start_s = time.monotonic()
            do_piece()
            self._rest(REST_RATIO * (time.monotonic() - start_s))
        return True

    def _rest(self, most_s: float) -> None:
        end_s = time.monotonic() + most_s
        while time.monotonic() < end_s and time.monotonic() - self._disturbed_s < IDLE_S:
            if self._stopping.wait(LOOK_S):
                return


def _give_way() -> None:
    """Lower the priority of the calling thread and of those that it starts. Linux only: elsewhere it would be
    the whole process's."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
