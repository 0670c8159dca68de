"""Whether a server stays as it was: thousands of mixed requests over HTTP, and what its processes hold.

    python scripts/bench_steady.py --requests 2000 -- --config tiny.yaml
    python scripts/bench_steady.py --longest-prompt 64 -- --model-path model.gguf

What follows `--` are flags of `jaxserve launch`. Requests differ in length, in how they are sampled, in what
they ask for (streams, log-probabilities, several choices, chat, stop strings), and some are wrong, aborted,
or given up by the client. Resident memory of the engine and of the HTTP side is read after a warm-up of the
same mix, and at the end; programs compiled in between are counted. Prints a Markdown table, and one JSON
object as the last line. The exit status is 1 if memory grew by more than --most-growth or a program was
compiled.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from bench_http import find_value, read_info, wait_until_warm
from bench_workload import describe_machine, list_processes, print_table

from jaxserve.utils import find_free_port

TIMEOUT_S = 300
WORDS = (
    "the a of and to in is it that for on with as was at by this from or have an they which one all".split()
)


def read_rss(pid: int) -> dict[str, int]:
    """Resident bytes of the engine, and of all the others together."""
    rss = {"engine": 0, "http": 0}
    for one in list_processes(pid):
        command = Path(f"/proc/{one}/cmdline").read_bytes()
        lines = Path(f"/proc/{one}/status").read_text().splitlines()
        kib = next((int(line.split()[1]) for line in lines if line.startswith("VmRSS")), 0)
        rss["engine" if b"engine_main" in command else "http"] += kib * 1024
    return rss


def make_text(rng: random.Random, arguments: argparse.Namespace) -> str:
    """Words, most texts short; a third begin alike, so that the prefix cache has work too."""
    length = 1 + int(arguments.longest_prompt * rng.random() ** 3)
    shared = ["once"] * rng.randrange(1, arguments.longest_prompt) if rng.random() < 0.3 else []
    text = " ".join(shared + [rng.choice(WORDS) for _ in range(length)])
    return text[: arguments.longest_prompt * 4]


def make_sampling(rng: random.Random, arguments: argparse.Namespace) -> dict[str, Any]:
    sampling: dict[str, Any] = {
        "max_new_tokens": rng.randrange(1, arguments.longest_reply + 1),
        "ignore_eos": rng.random() < 0.5,
    }
    if rng.random() < 0.5:
        return {**sampling, "temperature": 0}
    sampling |= {"temperature": rng.choice([0.5, 1.0, 1.5]), "seed": rng.randrange(100)}
    for name, value in (("top_p", 0.9), ("top_k", 20), ("min_p", 0.05), ("frequency_penalty", 0.5)):
        if rng.random() < 0.3:
            sampling[name] = value
    if rng.random() < 0.2:
        sampling["stop"] = ["the end", "\n\n"]
    return sampling


class Mix:
    """Requests of every kind, in an order that a seed decides."""

    def __init__(self, http: httpx.AsyncClient, arguments: argparse.Namespace):
        self._http = http
        self._arguments = arguments
        self.outcomes: Counter[str] = Counter()

    async def send(self, index: int) -> None:
        rng = random.Random(f"{self._arguments.seed}-{index}")
        kinds = [self.whole] * 4 + [self.stream] * 4 + [self.scored, self.chat, self.choices, self.wrong]
        kinds += [self.leave, self.leave, self.abort]
        kind = rng.choice(kinds)
        body = {
            "text": make_text(rng, self._arguments),
            "sampling_params": make_sampling(rng, self._arguments),
        }
        await kind(rng, body)
        self.outcomes[kind.__name__] += 1

    async def whole(self, rng: random.Random, body: dict[str, Any]) -> None:
        reply = await self._http.post("/generate", json=body)
        assert reply.status_code == 200, reply.text

    async def stream(self, rng: random.Random, body: dict[str, Any], most_events: int = 10**6) -> None:
        async with self._http.stream("POST", "/generate", json={**body, "stream": True}) as reply:
            assert reply.status_code == 200, await reply.aread()
            num_events = 0
            async for line in reply.aiter_lines():
                num_events += line.startswith("data: ")
                if num_events >= most_events:
                    return

    async def leave(self, rng: random.Random, body: dict[str, Any]) -> None:
        """Close the connection after a few events."""
        body["sampling_params"] |= {"max_new_tokens": 4 * self._arguments.longest_reply, "ignore_eos": True}
        await self.stream(rng, body, most_events=rng.randrange(1, 6))

    async def abort(self, rng: random.Random, body: dict[str, Any]) -> None:
        rid = f"abort-{rng.random()}"
        task = asyncio.create_task(self._http.post("/generate", json={**body, "rid": rid}))
        await asyncio.sleep(rng.random() * 0.2)
        await self._http.post("/abort_request", json={"rid": rid})
        await task

    async def scored(self, rng: random.Random, body: dict[str, Any]) -> None:
        wanted = {"return_logprob": True, "top_logprobs_num": rng.randrange(6), "logprob_start_len": 0}
        await self.whole(rng, {**body, **wanted})

    async def choices(self, rng: random.Random, body: dict[str, Any]) -> None:
        body["sampling_params"] |= {"n": 3, "temperature": 1.0}
        await self.whole(rng, body)

    async def chat(self, rng: random.Random, body: dict[str, Any]) -> None:
        sampling = body["sampling_params"]
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": body["text"]}]
        chat = {
            "model": "any",
            "messages": messages,
            "max_tokens": sampling["max_new_tokens"],
            "temperature": sampling["temperature"],
            "logprobs": rng.random() < 0.3,
        }
        reply = await self._http.post("/v1/chat/completions", json=chat)
        assert reply.status_code == 200, reply.text

    async def wrong(self, rng: random.Random, body: dict[str, Any]) -> None:
        body["sampling_params"]["top_p"] = 7
        reply = await self._http.post("/generate", json=body)
        assert reply.status_code == 400, reply.text


async def send_all(mix: Mix, indices: range, num_at_once: int) -> None:
    """`num_at_once` clients, each sending the next request when its last is done."""
    waiting = iter(indices)

    async def work() -> None:
        for index in waiting:
            await mix.send(index)

    await asyncio.gather(*(work() for _ in range(num_at_once)))


def look(server: subprocess.Popen, port: int, num_sent: int) -> dict[str, int]:
    info = read_info(port)
    counts = {name: int(str(find_value(info, name))) for name in ("num_compiles", "num_late_compiles")}
    return {"sent": num_sent, **read_rss(server.pid), **counts}


async def measure(
    arguments: argparse.Namespace, server: subprocess.Popen, port: int
) -> tuple[list[dict[str, int]], Counter[str], float]:
    """What was seen after the warm-up, several times on the way, and at the end."""
    limits = httpx.Limits(max_connections=2 * arguments.at_once)
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S, limits=limits
    ) as http:
        mix = Mix(http, arguments)
        await send_all(mix, range(arguments.warm_up), arguments.at_once)
        await asyncio.sleep(1.0)
        looks = [look(server, port, 0)]
        start_s = time.perf_counter()
        part = -(-arguments.requests // arguments.looks)
        end = arguments.warm_up + arguments.requests
        for first in range(arguments.warm_up, end, part):
            last = min(first + part, end)
            await send_all(mix, range(first, last), arguments.at_once)
            await asyncio.sleep(0.5)
            looks.append(look(server, port, last - arguments.warm_up))
        return looks, mix.outcomes, time.perf_counter() - start_s


def read_flags() -> tuple[argparse.Namespace, list[str]]:
    """Our flags, and after `--` those of the server."""
    words = sys.argv[1:]
    place = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=2000, metavar="N")
    parser.add_argument(
        "--warm-up", type=int, default=500, metavar="N", help="requests before the first look"
    )
    parser.add_argument("--at-once", type=int, default=16, metavar="N", help="clients")
    parser.add_argument("--looks", type=int, default=5, metavar="N", help="at memory, the last at the end")
    parser.add_argument("--longest-prompt", type=int, default=200, metavar="N", help="words, about")
    parser.add_argument("--longest-reply", type=int, default=24, metavar="N", help="tokens")
    parser.add_argument("--most-growth", type=float, default=0.02, metavar="X", help="of resident memory")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(words[:place]), words[place + 1 :] or ["--config", "tiny.yaml"]


def main() -> int:
    arguments, flags = read_flags()
    port = find_free_port("127.0.0.1")
    command = [sys.executable, "-m", "jaxserve", "launch", *flags, f"--port={port}", "--log-level=warning"]
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    try:
        wait_until_warm(server, port)
        looks, outcomes, elapsed_s = asyncio.run(measure(arguments, server, port))
    finally:
        server.terminate()
        server.wait(timeout=60)
    first, last = looks[0], looks[-1]
    growth = {name: last[name] / first[name] - 1 for name in ("engine", "http")}
    rows = [
        [str(seen["sent"]), *(f"{seen[name] / 2**20:.1f}" for name in growth), str(seen["num_compiles"])]
        for seen in looks
    ]
    print_table(["requests", "engine, MiB", "HTTP, MiB", "programs"], rows)
    print(f"growth: {', '.join(f'{name} {share:+.2%}' for name, share in growth.items())}")
    num_compiled = last["num_compiles"] - first["num_compiles"]
    report = {
        "machine": describe_machine(["jax", "jaxlib"]),
        "settings": vars(arguments),
        "flags": flags,
        "elapsed_s": elapsed_s,
        "outcomes": dict(outcomes),
        "growth": growth,
        "compiled": num_compiled,
        "looks": looks,
    }
    print(json.dumps(report))
    return int(max(growth.values()) > arguments.most_growth or num_compiled > 0)


if __name__ == "__main__":
    sys.exit(main())
