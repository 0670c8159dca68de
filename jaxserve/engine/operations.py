"""What operators ask of a running engine: pause and go on, give memory back and take it, serve other weights.

Driven by engine/loop.py, which hands every `Call` to `begin` and calls `advance` once an iteration. An
operation is a generator that reads top to bottom: where it waits, for a thread or for requests to end, it
yields, and the loop goes on with steps and heartbeats. Whatever goes wrong with one is its answer; the engine
serves on as before. Knows nothing of steps; the loop asks `may_step` and `admits_new`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from jaxserve.engine.messages import (
    Answer,
    Call,
    FlushCache,
    Pause,
    ReleaseMemory,
    ResumeMemory,
    UpdateWeights,
)
from jaxserve.errors import JaxserveError, UnavailableError
from jaxserve.runner.memory import LostWeightsError, MemoryUse
from jaxserve.scheduler import pause as pausing
from jaxserve.scheduler import schedule as scheduler
from jaxserve.scheduler.integrity import check_integrity
from jaxserve.scheduler.state import SchedulerState, has_work, num_running, num_waiting
from jaxserve.types import KV_CACHE, WEIGHTS, TokenDelta


class BusyError(UnavailableError):
    """Requests that run or wait are in the way of an operation."""

    def __init__(self, state: SchedulerState, *, is_paused: bool):
        running, waiting = num_running(state), num_waiting(state)
        paused = " Generation is paused." if is_paused else ""
        super().__init__(f"Requests are in the way: {running} running, {waiting} waiting.{paused}")
        self.num_requests = max(running + waiting, 1)


T = TypeVar("T")
Progress = Generator[None, None, T]  # yields while it waits

logger = logging.getLogger("jaxserve.engine")


class MemoryRunner(Protocol):
    """What the operations need of a runner. The next four may take long and are called on a thread."""

    def memory_use(self) -> MemoryUse: ...
    def release_memory(self, tags: Collection[str], *, keeps_weights: bool) -> None: ...
    def resume_memory(self, tags: Collection[str]) -> None: ...
    def read_update(self, model_path: str, load_format: str) -> Any: ...
    def install_update(self, update: Any) -> None: ...
    def stop_reading(self) -> None: ...  # what is being read ends with an error


class Operations:
    """`count_in_flight` tells the steps that are launched and not read; `answer` sends, stats first."""

    def __init__(
        self,
        runner: MemoryRunner,
        state: SchedulerState,
        count_in_flight: Callable[[], int],
        answer: Callable[[Answer], None],
    ):
        self._runner = runner
        self._state = state
        self._count_in_flight = count_in_flight
        self._answer = answer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="jaxserve-memory")
        self._under_way: dict[int, Progress[tuple[str, int]]] = {}  # by call_id
        self._memory_call: str | None = None  # the one operation on memory, in words
        self._num_closing = 0  # operations that wait for what runs to end
        self._num_pauses = 0  # pauses and resumes so far, so that one can see the next
        self._era = 0  # how often the cached pages became those of other weights
        self._is_held = False  # memory is on its way
        self.is_paused = False
        self.memory = runner.memory_use()
        self.deltas: list[TokenDelta] = []  # of requests that a pause ended, for the loop to tell

    @property
    def may_step(self) -> bool:
        return not (self.is_paused or self._is_held or self.memory.released)

    @property
    def admits_new(self) -> bool:
        """Whether requests that never ran may begin."""
        return self._num_closing == 0

    @property
    def is_busy(self) -> bool:
        """Whether `advance` has something to do soon."""
        return bool(self._under_way)

    def salt(self, cache_salt: str) -> str:
        """A request's salt for the prefix cache: pages of earlier weights are not found."""
        return pausing.salted(cache_salt, self._era)

    def begin(self, call: Call) -> None:
        """Start an operation, as far as it goes without waiting."""
        self._under_way[call.call_id] = self._choose(call.operation)
        self._continue(call.call_id)

    def advance(self) -> None:
        """Go on with what is under way. Raises LostWeightsError when there is nothing left to serve."""
        for call_id in list(self._under_way):
            self._continue(call_id)

    def close(self) -> None:
        """Let the thread end."""
        self._runner.stop_reading()
        self._thread.shutdown(wait=True)

    def _continue(self, call_id: int) -> None:
        try:
            next(self._under_way[call_id])
            return
        except StopIteration as done:
            message, num_requests = done.value
            answer = Answer(call_id, True, message, num_requests)
        except JaxserveError as error:
            num_requests = error.num_requests if isinstance(error, BusyError) else 0
            answer = Answer(call_id, False, error.message, num_requests)
        del self._under_way[call_id]
        self.memory = self._runner.memory_use()
        self._answer(answer)

    def _choose(self, operation: Any) -> Progress[tuple[str, int]]:
        if isinstance(operation, FlushCache):
            return self._flush()
        if isinstance(operation, Pause):
            return self._pause(operation.mode)
        if isinstance(operation, ReleaseMemory):
            return self._alone("being put to sleep", self._release(operation))
        if isinstance(operation, ResumeMemory):
            return self._alone("being woken up", self._resume_memory(operation))
        if isinstance(operation, UpdateWeights):
            return self._alone("being given other weights", self._update(operation))
        return self._resume()

    def _flush(self) -> Progress[tuple[str, int]]:
        if self._count_in_flight() or not scheduler.flush(self._state):
            raise BusyError(self._state, is_paused=self.is_paused)
        check_integrity(self._state)  # a quiet moment, and somebody who waits: see that no page was lost
        return "Cache flushed.", 0
        yield

    def _pause(self, mode: str) -> Progress[tuple[str, int]]:
        num_requests = num_running(self._state)
        if mode == "wait" and self.is_paused:  # what runs stands still: waiting for its end would be for ever
            return "Generation is paused already.", num_requests
        self._num_pauses += 1
        if mode == "abort":
            rids = list(self._state.by_rid)
            ended = [scheduler.abort(self._state, rid) for rid in rids]
            self.deltas += [delta for delta in ended if delta is not None]
            num_requests = len(ended)
        elif mode == "retract":
            scheduler.retract_all(self._state)
        elif mode == "wait":
            yield from self._let_end(self._num_pauses)
        self.is_paused = True
        logger.info("Generation is paused (%s), #paused-req: %d", mode, num_requests)
        return "Generation is paused.", num_requests

    def _let_end(self, pause: int) -> Progress[None]:
        self._num_closing += 1
        try:
            while pausing.has_begun(self._state) or self._count_in_flight():
                yield
                if self._num_pauses != pause:
                    raise UnavailableError("Another pause or resume came before what ran had ended.")
        finally:
            self._num_closing -= 1

    def _resume(self) -> Progress[tuple[str, int]]:
        self._num_pauses += 1
        self.is_paused = False
        logger.info("Generation goes on.")
        return "Generation goes on.", 0
        yield

    def _alone(self, words: str, operation: Progress[tuple[str, int]]) -> Progress[tuple[str, int]]:
        """One operation on memory at a time."""
        if self._memory_call is not None:
            raise UnavailableError(f"The model is {self._memory_call} already; try again when that is done.")
        self._memory_call = words
        try:
            return (yield from operation)
        finally:
            self._memory_call = None
            self._is_held = False

    def _release(self, operation: ReleaseMemory) -> Progress[tuple[str, int]]:
        if has_work(self._state) or self._count_in_flight():
            raise BusyError(self._state, is_paused=self.is_paused)
        if KV_CACHE in operation.tags:
            scheduler.flush(self._state)
        yield from self._hold(
            lambda: self._runner.release_memory(operation.tags, keeps_weights=operation.keeps_weights)
        )
        logger.info("Gave back the device memory of %s.", " and ".join(operation.tags))
        return "Memory was given back.", 0

    def _resume_memory(self, operation: ResumeMemory) -> Progress[tuple[str, int]]:
        yield from self._hold(lambda: self._runner.resume_memory(operation.tags))
        logger.info("Took the device memory of %s again.", " and ".join(operation.tags))
        return "Memory was taken again.", 0

    def _update(self, operation: UpdateWeights) -> Progress[tuple[str, int]]:
        if WEIGHTS in self.memory.released:
            raise UnavailableError("The weights sleep; wake them up before they are exchanged for others.")
        logger.info("Update weights begin. %s", operation.model_path)
        update = yield from self._on_thread(
            lambda: self._runner.read_update(operation.model_path, operation.load_format)
        )
        self._num_closing += 1
        try:
            while self._count_in_flight() or (pausing.has_begun(self._state) and not self.is_paused):
                yield
        finally:
            self._num_closing -= 1
        num_paused = num_running(self._state) + num_waiting(self._state) if self.is_paused else 0
        yield from self._hold(lambda: self._runner.install_update(update))
        if operation.flushes_cache and not scheduler.flush(self._state):
            self._era += 1
            pausing.forget_cache(self._state, self._era)
        logger.info("Update weights end.")
        return "Succeeded to update model weights.", num_paused

    def _hold(self, work: Callable[[], T]) -> Progress[T]:
        """Do it on the thread while no step runs."""
        self._is_held = True
        try:
            return (yield from self._on_thread(work))
        finally:
            self.memory = self._runner.memory_use()
            self._is_held = False

    def _on_thread(self, work: Callable[[], T]) -> Progress[T]:
        """Wait for it to be done elsewhere; what it raises becomes a sentence."""
        future = self._thread.submit(work)
        while not future.done():
            yield
        error = future.exception()
        if isinstance(error, (LostWeightsError, JaxserveError)):
            raise error
        if error is not None:
            logger.error("An operation failed.", exc_info=error)
            first_line = str(error).partition("\n")[0]
            raise UnavailableError(f"{type(error).__name__}: {first_line}" if first_line else repr(error))
        return future.result()
