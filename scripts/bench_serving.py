"""Latency and throughput of a server under load that does not wait for it (an open loop).

    python scripts/bench_serving.py --base-url http://127.0.0.1:30000 --request-rates 1 2 4 8 \\
        --num-requests 100 --input-tokens 512 --output-tokens 128 --goodput ttft:500 itl:50
    python scripts/bench_serving.py --workload shared-prefix --groups 4 --prefix-tokens 2000
    python scripts/bench_serving.py --workload trace --trace benchmarks/traces/tiny.jsonl --route chat
    python scripts/bench_serving.py --max-concurrency 32            # a closed loop: 32 at a time

Works against any server with /v1/completions, /v1/chat/completions or /generate (--route). Requests come as a
Poisson process of each rate in turn, or at the times of a recording, and are sent whether or not earlier ones
were answered; times count from when a request was due. With --max-concurrency they count from when it was
sent. A request that failed is in no percentile, and is counted by its kind.

    TTFT      time to the first event with text          ITL    time between two events with text
    e2e       time to the end of the reply               goodput  replies a second that met --goodput, whose
                                                                  itl is a reply's mean time between tokens

The last line is one JSON object; `levels` has an entry for each rate. Ctrl-C ends with what was measured; a
second one ends at once. Needs aiohttp.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
from serving_client import PATHS, Outcome, Target, send_request
from serving_workload import (
    Request,
    arrive_at_random,
    make_random,
    make_shared_prefix,
    rate_of,
    read_trace,
    stretch,
)

PERCENTILES = {"p50": 0.50, "p90": 0.90, "p99": 0.99}
LIMITS = ("ttft", "itl", "e2e")
DIGITS = 3
CANCELLED = "cancelled"  # by Ctrl-C: no failure of the server
INTERRUPT_STATUS = 130


def percentile(values: Sequence[float], share: float) -> float:
    """With linear interpolation between ranks; `values` are sorted and not empty."""
    place = (len(values) - 1) * share
    below = math.floor(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (values[above] - values[below]) * (place - below)


def summarise(values_s: Sequence[float]) -> dict[str, float] | None:
    """Percentiles and mean in milliseconds; None of nothing."""
    if not values_s:
        return None
    ordered = sorted(value_s * 1e3 for value_s in values_s)
    found = {name: round(percentile(ordered, share), DIGITS) for name, share in PERCENTILES.items()}
    return found | {"mean": round(sum(ordered) / len(ordered), DIGITS)}


def is_good(outcome: Outcome, limits_s: dict[str, float]) -> bool:
    """Whether a reply kept every limit that was given."""
    figures = {"ttft": outcome.ttft_s, "itl": outcome.tpot_s, "e2e": outcome.e2e_s}
    return all((figures[name] or 0.0) <= limit_s for name, limit_s in limits_s.items())


def report_level(
    rate: float, outcomes: list[Outcome], elapsed_s: float, limits_s: dict[str, float]
) -> dict[str, Any]:
    """The figures of one rate."""
    done = [outcome for outcome in outcomes if outcome.error is None]
    errors = collections.Counter(outcome.error for outcome in outcomes if outcome.error is not None)
    num_cancelled = errors.pop(CANCELLED, 0)
    elapsed_s = max(elapsed_s, 1e-9)
    good = [outcome for outcome in done if is_good(outcome, limits_s)]
    return {
        "request_rate": None if math.isinf(rate) else round(rate, DIGITS),
        "elapsed_s": round(elapsed_s, DIGITS),
        "num_requests": len(outcomes),
        "num_completed": len(done),
        "num_failed": sum(errors.values()),
        "num_cancelled": num_cancelled,
        "errors": dict(errors),
        "requests_per_s": round(len(done) / elapsed_s, DIGITS),
        "input_tokens_per_s": round(sum(outcome.num_prompt_tokens for outcome in done) / elapsed_s, DIGITS),
        "output_tokens_per_s": round(sum(outcome.num_output_tokens for outcome in done) / elapsed_s, DIGITS),
        "ttft_ms": summarise([outcome.ttft_s for outcome in done if outcome.ttft_s is not None]),
        "itl_ms": summarise([gap_s for outcome in done for gap_s in outcome.gaps_s]),
        "tpot_ms": summarise([outcome.tpot_s for outcome in done if outcome.num_output_tokens > 1]),
        "e2e_ms": summarise([outcome.e2e_s for outcome in done]),
        "goodput": round(len(good) / elapsed_s, DIGITS) if limits_s else None,
    }


async def run_level(
    session: aiohttp.ClientSession,
    target: Target,
    requests: list[Request],
    max_concurrency: int | None,
    stop: asyncio.Event,
) -> tuple[list[Outcome], float]:
    """Send every request when it is due; the outcomes, and the seconds from the first to the last."""
    places = asyncio.Semaphore(max_concurrency or len(requests))
    started_s = time.perf_counter()

    async def send_in_time(request: Request) -> Outcome:
        due_s = started_s + request.due_s
        await asyncio.sleep(max(due_s - time.perf_counter(), 0.0))
        async with places:
            begin_s = due_s if max_concurrency is None else time.perf_counter()
            return await send_request(session, target, request, begin_s)

    tasks = [asyncio.create_task(send_in_time(request)) for request in requests]
    stopped = asyncio.create_task(stop.wait())
    everything = asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.wait([stopped, everything], return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    elapsed_s = time.perf_counter() - started_s
    lost = Outcome(begin_s=started_s, error=CANCELLED)
    return [lost if task.cancelled() else task.result() for task in tasks], elapsed_s


def make_requests(arguments: argparse.Namespace, rate: float | None, seed: int) -> list[Request]:
    """The workload of one rate; each has prompts of its own, so that none finds another's in a cache."""
    if arguments.workload == "trace":
        requests = read_trace(arguments.trace, seed)[: arguments.num_requests]
        return requests if rate is None else stretch(requests, rate)
    lengths: dict[str, Any] = {
        "input_tokens": arguments.input_tokens,
        "output_tokens": arguments.output_tokens,
        "spread": arguments.spread,
        "seed": seed,
    }
    num_requests = arguments.num_requests or 100
    if arguments.workload == "random":
        requests = make_random(num_requests, **lengths)
    else:
        shared: dict[str, Any] = {"num_groups": arguments.groups, "prefix_tokens": arguments.prefix_tokens}
        requests = make_shared_prefix(num_requests, **shared, **lengths)
    return arrive_at_random(requests, math.inf if rate is None else rate, seed)


HEADS = ("rate", "done", "failed", "req/s", "in tok/s", "out tok/s", "TTFT ms", "ITL ms", "e2e ms", "goodput")


def describe(level: dict[str, Any]) -> str:
    """One row of the table; of latencies p50 / p90 / p99."""

    def show(figures: dict[str, float] | None) -> str:
        return "-" if figures is None else " / ".join(f"{figures[name]:.4g}" for name in PERCENTILES)

    cells = [
        "at once" if level["request_rate"] is None else f"{level['request_rate']:g}",
        str(level["num_completed"]),
        str(level["num_failed"]),
        f"{level['requests_per_s']:.2f}",
        f"{level['input_tokens_per_s']:.1f}",
        f"{level['output_tokens_per_s']:.1f}",
        *(show(level[name]) for name in ("ttft_ms", "itl_ms", "e2e_ms")),
        "-" if level["goodput"] is None else f"{level['goodput']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


async def run(arguments: argparse.Namespace, target: Target) -> tuple[list[dict[str, Any]], bool]:
    """All rates in turn: their figures, and whether Ctrl-C ended them."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def hear_interrupt() -> None:
        if stop.is_set():
            os._exit(INTERRUPT_STATUS)
        stop.set()

    loop.add_signal_handler(signal.SIGINT, hear_interrupt)
    limits_s = {name: limit_ms / 1e3 for name, limit_ms in arguments.goodput}
    levels: list[dict[str, Any]] = []
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=target.timeout_s)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=1 << 20) as session:
        await check_server(session, target, arguments)
        print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}", flush=True)
        for order, rate in enumerate(arguments.request_rates or [None]):
            if stop.is_set():
                break
            requests = make_requests(arguments, rate, arguments.seed + 1000 * order)
            outcomes, elapsed_s = await run_level(session, target, requests, arguments.max_concurrency, stop)
            level = report_level(rate or rate_of(requests), outcomes, elapsed_s, limits_s)
            levels.append(level)
            print(describe(level), flush=True)
            for kind, count in level["errors"].items():
                print(f"  failed: {count} x {kind}", flush=True)
    return levels, stop.is_set()


async def check_server(session: aiohttp.ClientSession, target: Target, arguments: argparse.Namespace) -> None:
    """One small request first, which nothing counts: a wrong address or route shows at once."""
    request = make_random(1, input_tokens=8, output_tokens=4, spread=0.0, seed=arguments.seed)[0]
    outcome = await send_request(session, target, request, time.perf_counter())
    if outcome.error is not None:
        raise SystemExit(
            f"The first request to {target.base_url}{PATHS[target.route]} failed: {outcome.error}. "
            "Check --base-url, --route, --model and --api-key."
        )


def read_limit(word: str) -> tuple[str, float]:
    name, _, limit_ms = word.partition(":")
    try:
        if name in LIMITS and float(limit_ms) > 0:
            return name, float(limit_ms)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{word!r} must be one of {', '.join(LIMITS)}, a colon and milliseconds")


def read_rate(word: str) -> float:
    rate = float(word)
    if not rate > 0:
        raise argparse.ArgumentTypeError(f"{word} must be above 0 requests a second (inf: all at once)")
    return rate


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base-url", default="http://127.0.0.1:30000", help="[%(default)s]")
    add("--route", choices=PATHS, default="completions", help="[%(default)s]")
    add("--model", help="named in each request [the server's]")
    add("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="[$OPENAI_API_KEY]")
    add("--workload", choices=("random", "shared-prefix", "trace"), default="random", help="[%(default)s]")
    add("--num-requests", type=int, help="for each rate [100, or the whole trace]")
    add("--request-rates", type=read_rate, nargs="+", help="a second, in turn [at once, or as recorded]")
    add("--max-concurrency", type=int, help="most requests open at a time [no limit]")
    add("--input-tokens", type=int, default=512, help="of a prompt, at most, about [%(default)s]")
    add("--output-tokens", type=int, default=128, help="of a reply, at most [%(default)s]")
    add("--spread", type=float, default=0.0, help="lengths from (1 - SPREAD) of the most [%(default)s]")
    add("--groups", type=int, default=4, help="system prompts of shared-prefix [%(default)s]")
    add("--prefix-tokens", type=int, default=1024, help="of each system prompt [%(default)s]")
    add("--trace", type=Path, help="JSON lines: arrival_s, output_tokens, prompt or prompt_tokens")
    add("--goodput", type=read_limit, nargs="+", default=[], metavar="LIMIT", help="ttft:MS itl:MS e2e:MS")
    add("--temperature", type=float, default=0.0, help="[%(default)s]")
    add("--stop-at-eos", action="store_true", help="let the model end its replies early")
    add("--extra-body", type=json.loads, default={}, help="JSON object added to each request")
    add("--timeout", type=float, default=600.0, help="seconds for a request [%(default)s]")
    add("--seed", type=int, default=0, help="[%(default)s]")
    arguments = parser.parse_args(argv)
    if arguments.workload == "trace" and arguments.trace is None:
        parser.error("--workload trace needs --trace FILE")
    if not 0 <= arguments.spread < 1:
        parser.error(f"--spread must be in [0, 1), got {arguments.spread}")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    target = Target(
        base_url=arguments.base_url.rstrip("/"),
        route=arguments.route,
        model=arguments.model,
        api_key=arguments.api_key,
        temperature=arguments.temperature,
        ignores_eos=not arguments.stop_at_eos,
        timeout_s=arguments.timeout,
        extra_body=arguments.extra_body,
    )
    try:
        levels, is_interrupted = asyncio.run(run(arguments, target))
    except (ValueError, OSError) as error:
        print(f"bench_serving: {error}", file=sys.stderr)
        return 2
    settings = {name: value for name, value in vars(arguments).items() if name not in ("api_key", "trace")}
    settings["trace"] = None if arguments.trace is None else arguments.trace.name
    print(json.dumps({"settings": settings, "levels": levels, "interrupted": is_interrupted}))
    return INTERRUPT_STATUS if is_interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
