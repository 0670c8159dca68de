"""StepCosts: how long steps of each decode program take, and what it costs to wait for one, as measured.

Fed and asked by engine/loop.py when it speculates: the scheduler weighs these times against the tokens that
guesses promise (scheduler/speculate.py). Knows nothing of clocks, devices or plans.
"""

from __future__ import annotations

import bisect
from collections import deque
from dataclasses import dataclass, field, replace

from jaxserve.scheduler.plan import StepLimits

NUM_SAMPLES = 15  # means are over so many, the latest
FEWEST_TO_TRIM = 5  # samples of which the largest is left out
LEAST_SAMPLES = 3  # before that nothing is known
NEXT_TO_NOTHING_S = 1e-9
STALE_STEPS = 128  # decode steps after which a measurement is old: the machine may be busier, or less


@dataclass(slots=True)
class Samples:
    last_step: int = 0
    times_s: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_SAMPLES))
    mean_s: float | None = None

    def add(self, time_s: float, step: int) -> None:
        if step - self.last_step > STALE_STEPS:
            self.times_s.clear()
        self.last_step = step
        self.times_s.append(time_s)
        self.mean_s = self._compute_mean() if len(self.times_s) >= LEAST_SAMPLES else None

    def _compute_mean(self) -> float:
        """Not the median: when the host is late the time of one step is told as that of another."""
        num_left_out = int(len(self.times_s) >= FEWEST_TO_TRIM)
        kept_s = sorted(self.times_s)[: len(self.times_s) - num_left_out]
        return sum(kept_s) / len(kept_s)


@dataclass(slots=True)
class StepCosts:
    """A program of unknown cost is taken for no dearer than the smaller ones that are known: then it is
    tried, and known. If none of those is known either it is next to free, so that no larger one is
    preferred to it: it must run as it is first."""

    num_steps: int = 0
    waits: Samples = field(default_factory=Samples)
    by_bucket: dict[int, Samples] = field(default_factory=dict)
    buckets: tuple[int, ...] = ()

    def add_step(self, num_rows: int, time_s: float) -> None:
        """A step of decode rows alone took so long on the device."""
        self.num_steps += 1
        place = bisect.bisect_left(self.buckets, num_rows)
        if place < len(self.buckets):
            samples = self.by_bucket.setdefault(self.buckets[place], Samples())
            samples.add(time_s, self.num_steps)

    def add_wait(self, time_s: float) -> None:
        """The device had nothing to do for so long, because a plan needed the results of the step before."""
        self.waits.add(time_s, self.num_steps)

    def fill(self, limits: StepLimits) -> StepLimits:
        """The limits with costs in seconds."""
        self.buckets = limits.row_buckets
        known = [self._known_s(self.by_bucket.get(bucket)) for bucket in self.buckets]
        cost_s = NEXT_TO_NOTHING_S
        costs_s = []
        for place, time_s in enumerate(known):
            if time_s is not None:
                # Slower than a larger one: it had bad luck, and must not stand in the way of that one.
                cost_s = max(cost_s, min(other_s for other_s in known[place:] if other_s is not None))
            costs_s.append(cost_s)
        wait_s = self._known_s(self.waits) or 0.0
        return replace(limits, row_costs=tuple(costs_s), wait_cost=wait_s)

    def _known_s(self, samples: Samples | None) -> float | None:
        if samples is None or self.num_steps - samples.last_step > STALE_STEPS:
            return None
        return samples.mean_s
