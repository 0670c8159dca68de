"""What the prefix cache saves, over HTTP: time to first token, and a system prompt shared by a crowd.

    python scripts/bench_prefix.py --model-path pypi:qwen2.5-coder-0.5b-instruct --precision int8

Launches a server on loopback. First one request at a time: the time to the first token of a prompt that
nobody sent before, of the same prompt again, and of its first tokens followed by a few others. Then a crowd
at once, whose requests share a system prompt and differ in their last tokens; and a smaller crowd with a
cache_salt each, which share nothing. Prints Markdown tables with what the server itself counted as computed
and as cached; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from typing import Any

import httpx
from bench_engine import make_parser
from bench_http import find_value, launch, read_info, wait_until_warm
from bench_workload import describe_machine, print_table

from jaxserve.utils import find_free_port

NUM_NEW_TOKENS = 16
TIMEOUT_S = 600


class Client:
    """Asks one server, and times the answers."""

    def __init__(self, port: int, max_connections: int):
        self._port = port
        limits = httpx.Limits(max_connections=max_connections)
        self._http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S, limits=limits)

    async def ask(self, prompt_ids: list[int], cache_salt: str = "") -> dict[str, float]:
        """Seconds to the first token and to the last, and the prompt tokens that came from the cache."""
        sampling = {"temperature": 0, "max_new_tokens": NUM_NEW_TOKENS, "ignore_eos": True}
        body = {
            "input_ids": prompt_ids,
            "sampling_params": sampling,
            "stream": True,
            "cache_salt": cache_salt,
        }
        start_s = time.perf_counter()
        first_s, event = 0.0, ""
        async with self._http.stream("POST", "/generate", json=body) as reply:
            reply.raise_for_status()
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    first_s = first_s or time.perf_counter() - start_s
                    event = line
        info = json.loads(event.removeprefix("data: "))["meta_info"]
        return {
            "ttft_s": first_s,
            "e2e_s": time.perf_counter() - start_s,
            "cached_tokens": info["cached_tokens"],
        }

    def count(self) -> dict[str, int]:
        """The server's own totals."""
        info = read_info(self._port)
        names = ("num_prompt_tokens", "num_cached_tokens", "num_computed_tokens", "num_evicted_tokens")
        return {name: int(str(find_value(info, name))) for name in names}


def make_ids(rng: random.Random, vocab_size: int, count: int) -> list[int]:
    return rng.choices(range(vocab_size // 2), k=count)  # the upper half holds special tokens


async def time_one(client: Client, arguments: argparse.Namespace, rng: random.Random) -> dict[str, Any]:
    """Medians of requests that are alone: uncached, again, and with another end."""
    found: dict[str, list[dict[str, float]]] = {"uncached": [], "same prompt": [], "another end": []}
    for _ in range(arguments.repeats):
        prompt = make_ids(rng, arguments.vocab_size, arguments.prompt_tokens)
        found["uncached"].append(await client.ask(prompt))
        for _ in range(3):
            found["same prompt"].append(await client.ask(prompt))
            other = prompt[: -arguments.own_tokens] + make_ids(
                rng, arguments.vocab_size, arguments.own_tokens
            )
            found["another end"].append(await client.ask(other))
    return {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for name, runs in found.items()
    }


async def time_crowd(
    client: Client, arguments: argparse.Namespace, rng: random.Random, num_requests: int, *, shares: bool
) -> dict[str, float]:
    """All at once, after one system prompt that is new."""
    system = make_ids(rng, arguments.vocab_size, arguments.prompt_tokens)
    prompts = [
        system + make_ids(rng, arguments.vocab_size, arguments.own_tokens) for _ in range(num_requests)
    ]
    salt = str(rng.random())
    before = client.count()
    start_s = time.perf_counter()
    runs = await asyncio.gather(
        *(client.ask(prompt, "" if shares else f"{salt}-{index}") for index, prompt in enumerate(prompts))
    )
    elapsed_s = time.perf_counter() - start_s
    await asyncio.sleep(1.0)  # until the last step has told its counts
    after = client.count()
    return {
        "requests": num_requests,
        "elapsed_s": elapsed_s,
        "s_per_request": elapsed_s / num_requests,
        "ttft_s": statistics.median(run["ttft_s"] for run in runs),
        **{name.removeprefix("num_"): after[name] - before[name] for name in after},
    }


async def measure(arguments: argparse.Namespace, port: int) -> dict[str, Any]:
    rng = random.Random(arguments.seed)
    client = Client(port, max(arguments.requests, arguments.requests_apart, 1))
    for count in (16, 64, 256):  # what the first requests of a process pay for is not the question
        await client.ask(make_ids(rng, arguments.vocab_size, count))
    report: dict[str, Any] = {"alone": await time_one(client, arguments, rng), "crowd": {}}
    show_alone(report["alone"])
    for name, count, shares in (
        ("shared", arguments.requests, True),
        ("apart", arguments.requests_apart, False),
    ):
        if count:
            report["crowd"][name] = await time_crowd(client, arguments, rng, count, shares=shares)
    show_crowd(report["crowd"])
    return report


def show_alone(alone: dict[str, dict[str, float]]) -> None:
    whole_s = alone["uncached"]["ttft_s"]
    rows = [
        [name, f"{1e3 * row['ttft_s']:.1f}", f"{row['ttft_s'] / whole_s:.1%}", f"{row['cached_tokens']:.0f}"]
        for name, row in alone.items()
    ]
    print_table(["one request", "TTFT, ms", "of uncached", "cached tokens"], rows)
    print(flush=True)


def show_crowd(crowd: dict[str, dict[str, float]]) -> None:
    names = ("requests", "elapsed_s", "s_per_request", "ttft_s", "computed_tokens", "cached_tokens")
    rows = [
        [name, *(f"{row[key]:.2f}" if isinstance(row[key], float) else str(row[key]) for key in names)]
        for name, row in crowd.items()
    ]
    heads = ["requests at once", "seconds", "seconds a request", "median TTFT, s", "computed", "cached"]
    print_table(["crowd", *heads], rows)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--prompt-tokens", type=int, default=2000, metavar="N")
    parser.add_argument("--own-tokens", type=int, default=32, metavar="N", help="after the shared ones")
    parser.add_argument("--requests", type=int, default=100, metavar="N", help="that share a system prompt")
    parser.add_argument(
        "--requests-apart", type=int, default=10, metavar="N", help="that compute it each for itself"
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument("--vocab-size", type=int, default=32000, metavar="N", help="ids are below half of it")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    port = find_free_port("127.0.0.1")
    server = launch(arguments, port)
    try:
        wait_until_warm(server, port)
        report = asyncio.run(measure(arguments, port))
    finally:
        server.terminate()
        server.wait(timeout=60)
    settings = {key: value for key, value in vars(arguments).items() if key != "model_path"}
    machine = describe_machine(["jax", "jaxlib"])
    print(json.dumps({"machine": machine, "model": arguments.model_path, "settings": settings, **report}))


if __name__ == "__main__":
    sys.exit(main())
