"""Times what the engine does: throughput, the gap between steps, and the log lines people watch.

Fed by engine/loop.py; with the scheduler's own totals it makes the EngineStats that travel to the HTTP
side: throughput, gaps, and how long requests waited. Owns the clock, so that the scheduler need not have one.
"""

from __future__ import annotations

import bisect
import logging
import time

from jaxserve.engine.costs import StepCosts
from jaxserve.runner.memory import MemoryUse
from jaxserve.scheduler.pause import num_retracted
from jaxserve.scheduler.plan import StepPlan
from jaxserve.scheduler.state import (
    SchedulerState,
    num_free_pages,
    num_running,
    num_waiting,
)
from jaxserve.types import QUEUE_TIME_BUCKETS_S, EngineStats, TokenDelta

DECODE_LOG_INTERVAL_STEPS = 40
THROUGHPUT_WINDOW_S = 1.0
COUNT_INTERVAL_S = 0.25  # between two walks of the queue

logger = logging.getLogger("jaxserve.engine")


class Meter:
    def __init__(self):
        self.costs = StepCosts()
        self.step_gap_s = 0.0
        self.step_busy_s = 0.0
        self.gen_throughput = 0.0
        self._last_done_s: float | None = None  # when the device last ran dry; None before and when resting
        self._busy_since_s = time.perf_counter()
        self._window_start_s = time.perf_counter()
        self._window_tokens = 0
        self._decode_steps_since_log = 0
        self._enqueued_s: dict[str, float] = {}  # by rid, until admitted
        self._queue_time_s = 0.0
        self._queue_time_counts = [0] * (len(QUEUE_TIME_BUCKETS_S) + 1)
        self._num_waiting_tokens = 0
        self._counted_s = 0.0

    def enqueue(self, rid: str) -> None:
        """A request begins to wait."""
        self._enqueued_s[rid] = time.perf_counter()

    def forget(self, rid: str) -> None:
        """It has ended, and waits no longer."""
        self._enqueued_s.pop(rid, None)

    def launch(self, plan: StepPlan, state: SchedulerState, *, is_device_idle: bool) -> None:
        """A step goes to the device. Idle time since the last result counts as gap."""
        now_s = time.perf_counter()
        for chunk in plan.chunks if plan.inits else ():
            self._admit(state.running[chunk.seq_id].rid, now_s)
        if is_device_idle:
            if self._last_done_s is not None:
                self.step_gap_s += now_s - self._last_done_s
                self.costs.add_wait(now_s - self._last_done_s)
            self._busy_since_s = now_s

    def finish(self, plan: StepPlan, deltas: list[TokenDelta], state: SchedulerState) -> None:
        """A step's tokens were read."""
        now_s = time.perf_counter()
        self.step_busy_s += now_s - self._busy_since_s
        if not plan.chunks and not plan.copies and plan.encode is None:
            self.costs.add_step(len(plan.decode), (now_s - self._busy_since_s) / plan.window)
        self._busy_since_s = self._last_done_s = now_s
        self._window_tokens += sum(
            len(found.token_ids) for delta in deltas for found in (delta, *delta.beams)
        )
        window_s = now_s - self._window_start_s
        if window_s >= THROUGHPUT_WINDOW_S:
            self.gen_throughput = self._window_tokens / window_s
            self._window_start_s, self._window_tokens = now_s, 0
        self._log(plan, state)

    def rest(self) -> None:
        """Nothing to do: the time until the next request is no gap."""
        self._last_done_s = None
        self._window_start_s, self._window_tokens = time.perf_counter(), 0
        self.gen_throughput = 0.0

    def stats(
        self, state: SchedulerState, compiles: tuple[int, int, bool], memory: MemoryUse, is_paused: bool
    ) -> EngineStats:
        return EngineStats(
            num_running=num_running(state),
            num_queued=num_waiting(state),
            num_free_pages=num_free_pages(state),
            num_cached_pages=state.cache.num_cached,
            num_steps=state.num_steps,
            num_prompt_tokens=state.num_prompt_tokens,
            num_cached_tokens=state.num_cached_tokens,
            num_computed_tokens=state.num_computed_tokens,
            num_evicted_tokens=state.cache.num_evicted * state.page_size,
            num_generated_tokens=state.num_generated_tokens,
            num_encoded_images=state.num_encoded_images,
            num_drafted_tokens=state.num_drafted,
            num_accepted_tokens=state.num_accepted,
            num_retractions=state.num_retractions,
            num_aborted=state.num_aborted,
            num_finished=state.num_finished,
            num_compiles=compiles[0],
            num_late_compiles=compiles[1],
            is_warm=compiles[2],
            step_gap_s=self.step_gap_s,
            step_busy_s=self.step_busy_s,
            gen_throughput=self.gen_throughput,
            is_paused=is_paused,
            released=memory.released,
            param_bytes=memory.param_bytes,
            kv_bytes=memory.kv_bytes,
            slot_bytes=memory.slot_bytes,
            device_bytes=memory.device_bytes,
            host_param_bytes=memory.host_param_bytes,
            num_retracted=num_retracted(state),
            num_waiting_tokens=self._count_waiting_tokens(state),
            queue_time_s=self._queue_time_s,
            queue_time_counts=tuple(self._queue_time_counts),
        )

    def _admit(self, rid: str, now_s: float) -> None:
        enqueued_s = self._enqueued_s.pop(rid, None)
        if enqueued_s is not None:
            self._queue_time_s += now_s - enqueued_s
            self._queue_time_counts[bisect.bisect_left(QUEUE_TIME_BUCKETS_S, now_s - enqueued_s)] += 1

    def _count_waiting_tokens(self, state: SchedulerState) -> int:
        """A walk of the whole queue, so not at every step."""
        now_s = time.perf_counter()
        if not state.waiting:
            self._num_waiting_tokens = 0
        elif now_s - self._counted_s > COUNT_INTERVAL_S:
            self._counted_s = now_s
            self._num_waiting_tokens = sum(seq.num_known for seq in state.waiting)
        return self._num_waiting_tokens

    def _log(self, plan: StepPlan, state: SchedulerState) -> None:
        if plan.chunks:
            logger.info(
                "Prefill batch, #new-seq: %d, #new-token: %d, #running-req: %d, #queue-req: %d",
                sum(chunk.samples for chunk in plan.chunks),
                plan.num_chunk_tokens,
                num_running(state),
                num_waiting(state),
            )
            return
        self._decode_steps_since_log += 1
        if self._decode_steps_since_log >= DECODE_LOG_INTERVAL_STEPS:
            self._decode_steps_since_log = 0
            logger.info(
                "Decode batch, #running-req: %d, gen throughput (token/s): %.1f, #queue-req: %d",
                num_running(state),
                self.gen_throughput,
                num_waiting(state),
            )
