"""The batcher loop: receive, schedule, launch, then read the step before. One thread, one device.

Overlap is the only mode: step N + 1 is planned and launched before the tokens of step N are read, so the
device never waits for Python. Whatever ends a sequence is learnt one step late; the scheduler throws
the extra token away. Knows token ids and pages; knows no text and no HTTP.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import msgspec

from jaxserve.engine.messages import (
    Abort,
    Answer,
    Call,
    FromEngine,
    Shutdown,
    StepOutput,
    Submit,
    ToEngine,
)
from jaxserve.engine.meter import Meter
from jaxserve.engine.operations import MemoryRunner, Operations
from jaxserve.errors import InvalidRequestError
from jaxserve.images import PlacedImage
from jaxserve.scheduler import schedule as scheduler
from jaxserve.scheduler.images import check_images
from jaxserve.scheduler.plan import StepLimits, StepPlan, StepResult
from jaxserve.scheduler.state import SchedulerState, has_work, num_waiting
from jaxserve.types import FinishReason, TokenDelta

HEARTBEAT_S = 0.5  # the engine says at least this often that it lives, so that /health can be honest
STEPS_IN_FLIGHT = 2  # launched and not yet read, at most
# The log of the engine tells why.
NO_PROGRAM = "A {} cannot be served: a program that it needs could not be compiled."
POLL_S = 0.01  # how soon the end of an operation, or a program that is ready, is noticed when idle

logger = logging.getLogger("jaxserve.engine")


class PendingStep(Protocol):
    def read(self) -> StepResult: ...


class StepRunner(Protocol):
    """What the loop needs of a runner (runner/runner.py) for its steps."""

    def limits(self) -> StepLimits: ...
    def step(self, plan: StepPlan) -> PendingStep: ...
    def rehearse(self) -> bool: ...  # with nothing in it, a program that never ran; False: all have
    def compile_counts(self) -> tuple[int, int, bool]: ...  # all, late, whether every program is ready


class EngineLink(Protocol):
    """The engine's end of the connection to its clients (engine/transport.py)."""

    def receive(self, timeout_s: float) -> list[ToEngine]: ...  # waits for the first, at most timeout_s
    def send(self, message: FromEngine) -> None: ...


@dataclass(frozen=True, slots=True)
class Launched:
    plan: StepPlan
    pending: PendingStep


class EngineLoop:
    """`memory` is the same runner, as what operations do to its memory sees it."""

    def __init__(
        self,
        runner: StepRunner,
        memory: MemoryRunner,
        state: SchedulerState,
        link: EngineLink,
        *,
        context_length: int,
        max_queued_requests: int | None = None,
    ):
        self._runner = runner
        self.scheduler_state = state
        self._link = link
        self._context_length = context_length
        self._max_queued_requests = max_queued_requests
        self._in_flight: deque[Launched] = deque()
        self._is_stopping = False
        self._has_all_programs = False  # all that there will be
        self._last_report_s = time.perf_counter()
        self.meter = Meter()
        self.operations = Operations(memory, state, lambda: len(self._in_flight), self._tell_answer)

    def run_forever(self) -> None:
        """Serve until a Shutdown message. A failure of the device ends the loop with its exception."""
        has_moved = True
        while not self._is_stopping:
            messages = self._link.receive(self._patience_s(has_moved))
            deltas = self._take(messages) + self._settle_programs()
            self.operations.advance()
            has_moved = self.run_step(deltas) or self._rehearse()
        self.operations.close()

    def _patience_s(self, has_moved: bool) -> float:
        """How long to wait for messages: not at all while there is a step to launch or to read."""
        if self._in_flight:
            return 0.0
        if self._may_plan():
            return 0.0 if has_moved else POLL_S
        self.meter.rest()
        if has_moved:
            return 0.0  # perhaps another program is to be rehearsed
        return POLL_S if self.operations.is_busy else HEARTBEAT_S

    def _rehearse(self) -> bool:
        """While there is nothing to do, let a program have its slow first run. Returns whether one had."""
        is_idle = not has_work(self.scheduler_state) and self.operations.may_step
        return is_idle and self._runner.rehearse()

    def _may_plan(self) -> bool:
        return has_work(self.scheduler_state) and self.operations.may_step

    def run_step(self, deltas: list[TokenDelta]) -> bool:
        """Launch the next step, then read the oldest one; tell `deltas` and what was read. Returns whether
        there was a step."""
        plan = self._plan_step() if self._may_plan() else None
        if plan is not None:
            self.meter.launch(plan, self.scheduler_state, is_device_idle=not self._in_flight)
            self._in_flight.append(Launched(plan, self._runner.step(plan)))
        has_moved = bool(self._in_flight)
        if self._in_flight and (plan is None or len(self._in_flight) >= STEPS_IN_FLIGHT):
            step = self._in_flight.popleft()
            result = step.pending.read()
            deltas = deltas + scheduler.apply(self.scheduler_state, step.plan, result)
            self.meter.finish(step.plan, deltas, self.scheduler_state)
        if deltas or time.perf_counter() - self._last_report_s >= HEARTBEAT_S:
            self._report(deltas)
        return has_moved

    def _plan_step(self) -> StepPlan | None:
        """The next step; None when nothing can be done before an earlier one is read."""
        limits = self._runner.limits()
        if not self.operations.admits_new:
            limits = replace(limits, admits_new=False)
        if self.scheduler_state.max_drafts:
            limits = self.meter.costs.fill(limits)
        plan = scheduler.schedule(self.scheduler_state, limits)
        return None if plan.is_empty else plan

    def _report(self, deltas: list[TokenDelta]) -> None:
        self._last_report_s = time.perf_counter()
        for delta in deltas:
            if delta.finish is not None:
                self.meter.forget(delta.rid)
        operations = self.operations
        stats = self.meter.stats(
            self.scheduler_state, self._runner.compile_counts(), operations.memory, operations.is_paused
        )
        self._link.send(StepOutput(deltas, stats))

    def _tell_answer(self, answer: Answer) -> None:
        """Answer a call, after the state that it left."""
        deltas, self.operations.deltas = self.operations.deltas, []
        self._report(deltas)
        self._link.send(answer)

    def _take(self, messages: list[ToEngine]) -> list[TokenDelta]:
        deltas: list[TokenDelta] = []
        for message in messages:
            if isinstance(message, Submit):
                deltas += self._submit(message)
            elif isinstance(message, Abort):
                delta = scheduler.abort(self.scheduler_state, message.rid)
                if delta is not None:
                    deltas.append(delta)
            elif isinstance(message, Call):
                self.operations.begin(message)
            elif isinstance(message, Shutdown):
                self._is_stopping = True
        return deltas

    def _submit(self, message: Submit) -> list[TokenDelta]:
        """Queue a request, or answer at once with the reason why not."""
        limit = self._max_queued_requests
        if limit is not None and self._num_queued() >= limit:
            reason = f"The request queue is full ({limit} requests wait). Try again later."
            return [_refuse(message, reason, 429)]
        num_tokens = len(message.prompt_ids) + message.params.max_new_tokens
        if num_tokens > self._context_length:  # more than a block table holds
            reason = f"{num_tokens} tokens exceed the context length of {self._context_length}."
            return [_refuse(message, reason, 400)]
        try:
            check_images(self.scheduler_state.features, message.images)
            if self._has_all_programs:
                lack = _find_lack(self._runner.limits(), message.params.beam_width, message.images)
                if lack is not None:
                    return [_refuse(message, lack, 503)]
            scheduler.add(
                self.scheduler_state,
                rid=message.rid,
                prompt_ids=message.prompt_ids,
                params=message.params,
                priority=message.priority,
                cache_salt=self.operations.salt(message.cache_salt),
                images=message.images,
            )
        except InvalidRequestError as error:
            return [_refuse(message, error.message, 400)]
        self.meter.enqueue(message.rid)
        return []

    def _settle_programs(self) -> list[TokenDelta]:
        """When the last program is ready: end the searches that have waited for one that never came."""
        if self._has_all_programs:
            return []
        limits = self._runner.limits()
        if not limits.is_final:
            return []
        self._has_all_programs = True
        deltas = []
        for seq in [*self.scheduler_state.waiting, *self.scheduler_state.running.values()]:
            reason = _find_lack(limits, seq.params.beam_width, seq.images)
            if reason is not None:
                delta = scheduler.abort(self.scheduler_state, seq.rid)
                assert delta is not None
                finish = FinishReason(kind="abort", message=reason, http_status=503)
                deltas.append(msgspec.structs.replace(delta, finish=finish))
        return deltas

    def _num_queued(self) -> int:
        """Requests that wait although every row is taken; the others get theirs in the next step."""
        state = self.scheduler_state
        num_taken_rows = state.max_rows - len(state.free_slots)  # a beam search takes several
        return num_waiting(state) - (self._runner.limits().max_rows - num_taken_rows)


def _find_lack(limits: StepLimits, beam_width: int, images: Sequence[PlacedImage]) -> str | None:
    """Why a request can never run, when all programs are there that will be; None if it can."""
    if not limits.can_run(beam_width):
        return NO_PROGRAM.format(f"search with beam_width {beam_width}")
    largest = max((placed.image.num_patches for placed in images), default=0)
    if largest > limits.max_image_patches:
        return NO_PROGRAM.format(f"request with an image of {largest} patches")
    return None


def _refuse(message: Submit, reason: str, http_status: int) -> TokenDelta:
    return TokenDelta(
        rid=message.rid,
        token_ids=[],
        num_prompt_tokens=len(message.prompt_ids),
        num_cached_tokens=0,
        num_output_tokens=0,
        finish=FinishReason(kind="abort", message=reason, http_status=http_status),
    )
