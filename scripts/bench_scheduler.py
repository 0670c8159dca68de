"""Time of the scheduler's calls under pressure: a full prefix cache, a long queue, long prompts. No device.

    python scripts/bench_scheduler.py --pages 50000 --page-size 16 --waiting 4000

Fills the cache until every page is taken, queues requests of which some share a prefix, and runs steps of
mixed prefill and decode, so that every page that is handed out is evicted first. Prints how long
`schedule`, `apply` and `abort` take (milliseconds of this thread's CPU time: median, 99th percentile, the
longest), with the garbage collector as it comes; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from jaxserve.scheduler.plan import StepLimits, StepResult
from jaxserve.scheduler.schedule import abort, add, apply, schedule
from jaxserve.scheduler.state import SchedulerState, has_work, new_state
from jaxserve.types import TokenParams

VOCAB = 100_000


class Stopwatch:
    """Seconds of CPU time of every call, by what was called."""

    def __init__(self):
        self.elapsed_s: dict[str, list[float]] = {}

    def time(self, name: str, call: Callable[[], Any]) -> Any:
        start_s = time.thread_time()
        result = call()
        self.elapsed_s.setdefault(name, []).append(time.thread_time() - start_s)
        return result

    def report(self) -> dict[str, dict[str, float]]:
        rows = {}
        for name, values in self.elapsed_s.items():
            ordered = sorted(values)
            rows[name] = {
                "calls": len(values),
                "median_ms": 1e3 * statistics.median(ordered),
                "p99_ms": 1e3 * ordered[int(len(ordered) * 0.99)],
                "max_ms": 1e3 * ordered[-1],
            }
        return rows


def submit(state: SchedulerState, rid: str, prompt_ids: list[int], num_new_tokens: int) -> None:
    add(state, rid=rid, prompt_ids=prompt_ids, params=TokenParams(max_new_tokens=num_new_tokens))


def run_step(state: SchedulerState, limits: StepLimits, watch: Stopwatch) -> int:
    """One step, applied at once; returns the prompt tokens it computed."""
    plan = watch.time("schedule", lambda: schedule(state, limits))
    result = StepResult([1] * (len(plan.decode) + len(plan.chunks)))
    watch.time("apply", lambda: apply(state, plan, result))
    return plan.num_chunk_tokens


def fill_cache(state: SchedulerState, limits: StepLimits, rng: random.Random) -> None:
    """Leave no page free: every one is cached, and unused."""
    ignored = Stopwatch()
    while state.pool.num_free:
        submit(state, f"fill-{state.next_seq_id}", [rng.randrange(VOCAB) for _ in range(4096)], 1)
        while has_work(state):
            run_step(state, limits, ignored)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(0)
    state = new_state(arguments.pages + 1, arguments.page_size, arguments.rows)
    chunk = arguments.chunk_tokens
    limits = StepLimits(arguments.page_size, arguments.rows, 8, chunk, (chunk // 4, chunk // 2, chunk))
    fill_cache(state, limits, rng)
    prefixes = [[rng.randrange(VOCAB) for _ in range(2000)] for _ in range(32)]
    for index in range(arguments.waiting):
        own = [rng.randrange(VOCAB) for _ in range(rng.choice([50, 500, 3000]))]
        submit(state, f"r{index}", prefixes[rng.randrange(32)] * (index % 2) + own, rng.randrange(8, 64))
    watch = Stopwatch()
    num_computed = 0
    for _ in range(arguments.steps):
        num_computed += run_step(state, limits, watch)
    waiting, running = list(state.waiting), list(state.running.values())
    watch.time("abort, waiting", lambda: abort(state, waiting[len(waiting) // 2].rid))
    watch.time("abort, running", lambda: abort(state, running[0].rid))
    for rid in list(state.by_rid):
        abort(state, rid)
    measure_long(state, limits, rng, watch)
    return {"computed_tokens": num_computed, "calls": watch.report()}


def measure_long(state: SchedulerState, limits: StepLimits, rng: random.Random, watch: Stopwatch) -> None:
    """A prompt of a sixth of the pool; then one that is cached as far, and does not fit beside others."""
    num_usable_tokens = state.pool.num_usable * state.page_size
    long_ids = [rng.randrange(VOCAB) for _ in range(num_usable_tokens // 6)]
    submit(state, "long", long_ids, 8)
    own = Stopwatch()
    while state.by_rid["long"].num_output_tokens < 2:
        run_step(state, limits, own)
    watch.elapsed_s["schedule, long prompt"] = own.elapsed_s["schedule"]
    watch.time("abort, long prompt", lambda: abort(state, "long"))
    for index in range(32):
        submit(state, f"short-{index}", [rng.randrange(VOCAB) for _ in range(num_usable_tokens // 100)], 400)
    while state.waiting:
        run_step(state, limits, own)
    submit(state, "blocked", long_ids + [1] * (num_usable_tokens * 2 // 3), 8)
    for index in range(2000):
        submit(state, f"behind-{index}", long_ids[: rng.randrange(1, 4000)], 8)
    state.by_rid["blocked"].num_passed = 10**6  # so that nobody goes before it
    blocked = Stopwatch()
    for _ in range(100):
        run_step(state, limits, blocked)
    watch.elapsed_s["schedule, blocked"] = blocked.elapsed_s["schedule"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pages", type=int, default=50_000)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--chunk-tokens", type=int, default=8192)
    parser.add_argument("--waiting", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--no-gc", action="store_true", help="switch the garbage collector off")
    arguments = parser.parse_args()
    if arguments.no_gc:
        gc.disable()
    report = {"settings": vars(arguments), **measure(arguments)}
    print("| call | calls | median, ms | p99, ms | longest, ms |")
    print("|---|---|---|---|---|")
    for name, row in report["calls"].items():
        figures = " | ".join(f"{row[key]:.3f}" for key in ("median_ms", "p99_ms", "max_ms"))
        print(f"| {name} | {row['calls']} | {figures} |")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
