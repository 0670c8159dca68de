"""Where the time of each engine step goes, measured while the engine serves.

Used by bench_engine.py. `StepClock.watch` puts clocks around what the step loop calls; a thread of its own
waits for each step's results and notes when the device was done with them. Nothing is estimated: the device's
time is that from a step's launch (or the end of the step before, if that is later) to its results, the gap
the time in between in which the device had nothing to do. Knows the loop's parts by name, so a renamed part
is an AttributeError here and not a silent zero.
"""

from __future__ import annotations

import dataclasses
import queue
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import jax

import jaxserve.runner.runner as runner_module
from jaxserve.engine.loop import EngineLoop
from jaxserve.runner.runner import ModelRunner
from jaxserve.scheduler import schedule as scheduler

HOST_PARTS = ("receive", "schedule", "pack", "launch", "read", "apply", "send", "other")


@dataclasses.dataclass(slots=True)
class Step:
    """One launch. Seconds of the host are those from this launch to the next, without waiting."""

    program: str
    num_live_rows: int
    begin_s: float
    is_from_rest: bool  # nothing was asked for before it, so the time before it is no gap
    launch_s: float = 0.0  # when the device got it
    done_s: float = 0.0
    device_s: float = 0.0
    gap_s: float = 0.0
    wait_s: float = 0.0
    host_s: dict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))


class StepClock:
    """Collects the steps of a batch, between `start` and `stop`."""

    def __init__(self):
        self._steps: list[Step] = []
        self._is_on = False
        self._current: Step | None = None
        self._last_pack_s = 0.0
        self._launched: queue.SimpleQueue[tuple[Step | None, Any]] = queue.SimpleQueue()
        self._last_done_s = 0.0
        self._watcher = threading.Thread(target=self._watch_device, name="bench-device-watch", daemon=True)
        self._replaced: list[tuple[Any, str, Any]] = []

    def watch(self, engine: EngineLoop, runner: ModelRunner, link: Any) -> None:
        """Put clocks into the loop; call it before the loop runs."""
        self._watcher.start()
        self._time(scheduler, "schedule", "schedule")
        self._time(scheduler, "apply", "apply")
        self._time(runner_module, "pack_step", "pack", self._note_pack)
        self._time(link, "receive", "receive")
        self._time(link, "send", "send")
        step = runner.step

        def timed_step(plan: Any) -> Any:
            now_s = time.perf_counter()
            self._turn_page(now_s)
            is_from_rest = self._current is None
            record = Step("", len(plan.decode), now_s, is_from_rest)
            self._current, self._last_pack_s = record, now_s
            pending = step(plan)
            record.program = " then ".join(str(launch.shape) for launch in pending.launches)
            record.launch_s = self._last_pack_s
            record.host_s["launch"] += time.perf_counter() - now_s - record.host_s["pack"]
            self._launched.put((record, [launch.arrays for launch in pending.launches]))
            return TimedPending(pending, self._note_read)

        self._replace(runner, "step", timed_step)

    def start(self) -> None:
        self._steps, self._is_on, self._current = [], True, None

    def stop(self) -> list[Step]:
        """The steps since `start`, but for the last: what the host did after it was not for a next one."""
        self._is_on = False
        ended = threading.Event()
        self._launched.put((None, ended))
        ended.wait()
        return self._steps

    def close(self) -> None:
        """Put back what was there; call it when the loop has ended."""
        self._launched.put((None, None))
        self._watcher.join()
        for owner, name, function in self._replaced:
            setattr(owner, name, function)

    def _time(self, owner: Any, name: str, part: str, note: Callable[[], None] = lambda: None) -> None:
        function = getattr(owner, name)

        def timed(*args: Any, **words: Any) -> Any:
            start_s = time.perf_counter()
            result = function(*args, **words)
            if self._current is not None:
                self._current.host_s[part] += time.perf_counter() - start_s
            note()
            return result

        self._replace(owner, name, timed)

    def _replace(self, owner: Any, name: str, function: Any) -> None:
        self._replaced.append((owner, name, getattr(owner, name)))
        setattr(owner, name, function)

    def _note_pack(self) -> None:
        self._last_pack_s = time.perf_counter()

    def _note_read(self, wait_s: float, read_s: float) -> None:
        if self._current is not None:
            self._current.wait_s += wait_s
            self._current.host_s["read"] += read_s

    def _turn_page(self, now_s: float) -> None:
        """The step before is complete: what none of its parts took is "other"."""
        if self._current is None:
            return
        told_s = sum(self._current.host_s.values()) + self._current.wait_s
        self._current.host_s["other"] = max(0.0, now_s - self._current.begin_s - told_s)
        if self._is_on:
            self._steps.append(self._current)

    def _watch_device(self) -> None:
        while True:
            step, arrays = self._launched.get()
            if step is None:
                if arrays is None:
                    return
                arrays.set()
                continue
            jax.block_until_ready(arrays)
            step.done_s = time.perf_counter()
            step.device_s = step.done_s - max(self._last_done_s, step.launch_s)
            step.gap_s = 0.0 if step.is_from_rest else max(0.0, step.launch_s - self._last_done_s)
            self._last_done_s = step.done_s


class TimedPending:
    """A launched step that tells how long its reader waited for the device, and read."""

    def __init__(self, pending: Any, note_read: Callable[[float, float], None]):
        self._pending = pending
        self._note_read = note_read

    def read(self) -> Any:
        start_s = time.perf_counter()
        jax.block_until_ready([launch.arrays for launch in self._pending.launches])
        done_s = time.perf_counter()
        result = self._pending.read()
        self._note_read(done_s - start_s, time.perf_counter() - done_s)
        return result


def summarize(steps: Iterable[Step]) -> list[dict[str, Any]]:
    """Median milliseconds by program, those that decode only first; `step` is from launch to launch."""
    by_program: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        by_program[step.program].append(step)
    rows = []
    for program, found in by_program.items():
        host = {part: _median_ms(step.host_s.get(part, 0.0) for step in found) for part in HOST_PARTS}
        rows.append(
            {
                "program": program,
                "num_steps": len(found),
                "num_live_rows": statistics.median(step.num_live_rows for step in found),
                "step_ms": _median_ms(sum(step.host_s.values()) + step.wait_s for step in found),
                "device_ms": _median_ms(step.device_s for step in found),
                "gap_ms": _median_ms(step.gap_s for step in found),
                "gap_share": sum(step.gap_s for step in found)
                / sum(step.gap_s + step.device_s for step in found),
                "host_ms": host,
            }
        )
    return sorted(rows, key=lambda row: ("tokens" in row["program"], row["device_ms"]))


def _median_ms(seconds: Iterable[float]) -> float:
    return 1000 * statistics.median(seconds)
