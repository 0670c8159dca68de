"""The runner of host 0: does what a ModelRunner does, and has the followers do the same in the same order.

Made by build.py and driven by engine/loop.py in a ModelRunner's place. Which programs a step runs as is
decided here and told, so that no host runs another. Knows nothing of connections.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from jaxserve.errors import WeightError
from jaxserve.hosts.leader import Leader
from jaxserve.hosts.messages import InstallUpdate, ReadUpdate, Rehearse, Release, Step, Take
from jaxserve.runner.memory import LostWeightsError, MemoryUse
from jaxserve.runner.pending import PendingStep
from jaxserve.runner.runner import ModelRunner, Update
from jaxserve.scheduler.plan import StepLimits, StepPlan


class LeadRunner:
    """As engine/loop.py and engine/operations.py want a runner."""

    def __init__(self, runner: ModelRunner, leader: Leader):
        self._runner = runner
        self._leader = leader

    def limits(self) -> StepLimits:
        return self._runner.limits()

    def compile_counts(self) -> tuple[int, int, bool]:
        return self._runner.compile_counts()

    def step(self, plan: StepPlan) -> PendingStep:
        programs = self._runner.choose(plan)
        self._leader.broadcast(Step(plan, programs))
        return self._runner.step_as(plan, programs)

    def rehearse(self) -> bool:
        programs = self._runner.find_unrehearsed()
        if programs is None:
            return False
        self._leader.broadcast(Rehearse(programs))
        self._runner.rehearse_program(programs)
        return True

    def memory_use(self) -> MemoryUse:
        """Of this host; weights and pool are counted whole."""
        return self._runner.memory_use()

    def release_memory(self, tags: Collection[str], *, keeps_weights: bool) -> None:
        message = Release(tuple(tags), keeps_weights)
        self._change(message, lambda: self._runner.release_memory(tags, keeps_weights=keeps_weights))

    def resume_memory(self, tags: Collection[str]) -> None:
        self._change(Take(tuple(tags)), lambda: self._runner.resume_memory(tags))

    def read_update(self, model_path: str, load_format: str) -> Update:
        """Every host reads its part. Raises WeightError if one cannot; then nothing has changed."""
        outcome = self._leader.order(
            ReadUpdate(model_path, load_format), lambda: self._runner.read_update(model_path, load_format)
        )
        if outcome.error is not None:
            raise outcome.error
        for rank, reason in outcome.failures.items():
            raise WeightError(f"Host {rank}: {reason}")
        assert outcome.result is not None, "no weights were read, and nothing was said"
        return outcome.result

    def install_update(self, update: Update) -> None:
        self._change(InstallUpdate(), lambda: self._runner.install_update(update))

    def stop_reading(self) -> None:
        self._runner.stop_reading()
        self._leader.stop_waiting()

    def _change(self, message: Any, work: Callable[[], None]) -> None:
        """What must happen on all hosts or on none; else they begin again."""
        outcome = self._leader.order(message, work)
        if not outcome.is_alike:
            failures = {0: str(outcome.error)} if outcome.error else {}
            reasons = "; ".join(
                f"host {rank}: {text}" for rank, text in {**failures, **outcome.failures}.items()
            )
            raise LostWeightsError(f"Some hosts failed where others did not: {reasons}")
        if outcome.error is not None:
            raise outcome.error
