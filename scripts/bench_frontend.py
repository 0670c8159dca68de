"""What the HTTP side costs by itself: many streams at once from an engine that computes nothing.

    python scripts/bench_frontend.py --model-path pypi:qwen2.5-coder-0.5b-instruct --step-ms 25.6 12.8

Starts fake_engine.py with the flags that it does not know itself, opens --streams requests at a time, and
reads their events as cheaply as it can, in this process. Three processes take part: this one, the HTTP
server and the engine. What counts is the CPU time of the server, which other work on the machine hardly
changes:

    tokens/s          delivered, from the first event to the last
    us/token          CPU time of the server process for each token, a share of opening the requests included
    tokens/CPU s      what one core could deliver
    events/token      below 1 where the server fell behind and sent several tokens in one event
    added ITL         time between two events of a stream beyond the engine's own step, ms
    client CPU        of this process, as a share of the time: near 1 it would be the limit

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import uvloop
from bench_workload import encode_post

from jaxserve.utils import find_free_port

READY_TIMEOUT_S = 120
PROMPT = "The quick brown fox jumps over the lazy dog, and the dog, being lazy, does not mind at all. " * 3
EVENT = b"data: {"
COUNT = re.compile(rb'"completion_tokens":(\d+)')
TAIL_BYTES = 2048
ROUTES = ("chat", "completions", "generate")
QUANTILES = (("p50", 500), ("p90", 900), ("p99", 990))
HEADS = (
    *("route", "offered/s", "tokens/s", "us/token", "tokens/CPU s", "events/token"),
    *("added ITL p50 / p90 / p99, ms", "client CPU", "failed"),
)


class Stream(asyncio.Protocol):
    """One streamed request on a connection of its own: when its events came, and its last bytes."""

    def __init__(self, request: bytes):
        self._request = request
        self._last_s = 0.0
        self._tail = b""
        self.first_s = 0.0
        self.last_s = 0.0
        self.num_events = 0
        self.gaps_s: list[float] = []
        self.status = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._request)  # uvloop's is one in all but its class

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        if not self.status:
            self.status = int(data[9:12])
        num_events = data.count(EVENT)
        if num_events:
            if self.last_s:
                self.gaps_s.append(now_s - self.last_s)
            else:
                self.first_s = now_s
            self.last_s = now_s
            self.num_events += num_events
        self._tail = data[-TAIL_BYTES:] if len(data) > TAIL_BYTES else self._tail[-TAIL_BYTES:] + data

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)

    @property
    def num_tokens(self) -> int:
        """As the server counted them; 0 if the stream did not end as it should."""
        counts = COUNT.findall(self._tail)
        return int(counts[-1]) if counts and self.status == 200 else 0


def make_request(route: str, num_tokens: int, port: int) -> bytes:
    """A whole HTTP request for one stream."""
    # A special token is shown too: every token makes an event.
    sampling: dict[str, Any] = {"ignore_eos": True, "skip_special_tokens": False}
    body: dict[str, Any]
    if route == "generate":
        path = "/generate"
        body = {"text": PROMPT, "sampling_params": sampling | {"max_new_tokens": num_tokens}}
    elif route == "chat":
        path = "/v1/chat/completions"
        body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": num_tokens}
    else:
        path = "/v1/completions"
        body = {"prompt": PROMPT, "max_tokens": num_tokens}
    if route != "generate":
        body |= sampling | {"stream_options": {"include_usage": True}}
    return encode_post(port, path, body | {"stream": True})


@contextlib.contextmanager
def serve(step_ms: float, num_streams: int, launch_flags: list[str]) -> Iterator[tuple[int, int]]:
    """A server with the fake engine: its port and its process id."""
    port = find_free_port("127.0.0.1")
    script = Path(__file__).with_name("fake_engine.py")
    fake_flags = ("--step-ms", str(step_ms), "--max-rows", str(num_streams))
    server_flags = ("--port", str(port), "--log-level", "warning", "--incremental-streaming-output")
    command = [sys.executable, str(script), *fake_flags, *server_flags, *launch_flags]
    process = subprocess.Popen(command)
    try:
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while not is_ready(port):
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise SystemExit("The server did not become ready; what it said is above.")
            time.sleep(0.1)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait()


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


def read_cpu_s(pid: int) -> float:
    """User and system time of a process's threads, to the nanosecond, from /proc."""
    return (
        sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9
    )


async def load(arguments: argparse.Namespace, port: int, pid: int, step_ms: float) -> dict[str, Any]:
    """One wave of streams, all at once; its figures."""
    loop = asyncio.get_running_loop()
    request = make_request(arguments.route, arguments.tokens, port)
    server_cpu_s, client_cpu_s = read_cpu_s(pid), time.process_time()
    streams = [Stream(request) for _ in range(arguments.streams)]
    for stream in streams:
        await loop.create_connection(lambda stream=stream: stream, "127.0.0.1", port)
    await asyncio.gather(*(stream.done for stream in streams))
    server_cpu_s, client_cpu_s = read_cpu_s(pid) - server_cpu_s, time.process_time() - client_cpu_s
    begin_s = min(stream.first_s for stream in streams)
    elapsed_s = max(stream.last_s for stream in streams) - begin_s
    num_tokens = sum(stream.num_tokens for stream in streams)
    if not num_tokens:
        raise SystemExit(f"No stream came to its end; the first had status {streams[0].status}.")
    added_ms = sorted(gap_s * 1e3 - step_ms for stream in streams for gap_s in stream.gaps_s)
    return {
        "route": arguments.route,
        "step_ms": step_ms,
        "offered_tokens_per_s": round(arguments.streams * 1e3 / step_ms),
        "tokens_per_s": round(num_tokens / elapsed_s),
        "us_per_token": round(server_cpu_s / num_tokens * 1e6, 1),
        "tokens_per_cpu_s": round(num_tokens / server_cpu_s),
        "events_per_token": round(sum(stream.num_events for stream in streams) / num_tokens, 2),
        "added_itl_ms": {
            name: round(added_ms[len(added_ms) * share // 1000], 2) for name, share in QUANTILES
        },
        "client_cpu": round(client_cpu_s / elapsed_s, 2),
        "failed": sum(stream.num_tokens != arguments.tokens for stream in streams),
    }


def describe(row: dict[str, Any]) -> str:
    added = row["added_itl_ms"]
    return (
        f"| {row['route']} | {row['offered_tokens_per_s']} | {row['tokens_per_s']} | {row['us_per_token']} "
        f"| {row['tokens_per_cpu_s']} | {row['events_per_token']} "
        f"| {added['p50']} / {added['p90']} / {added['p99']} | {row['client_cpu']} | {row['failed']} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--step-ms", type=float, nargs="+", default=[25.6, 12.8], help="[%(default)s]")
    parser.add_argument("--streams", type=int, default=256, help="at once [%(default)s]")
    parser.add_argument("--tokens", type=int, default=400, help="of each stream [%(default)s]")
    parser.add_argument("--route", choices=ROUTES, default="chat", help="[%(default)s]")
    arguments, launch_flags = parser.parse_known_args()
    print(f"{arguments.streams} streams of {arguments.tokens} tokens; Python {sys.version.split()[0]}\n")
    print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}", flush=True)
    rows: list[dict[str, Any]] = []
    for step_ms in arguments.step_ms:
        with serve(step_ms, arguments.streams, launch_flags) as (port, pid):
            rows.append(uvloop.run(load(arguments, port, pid, step_ms)))
        print(describe(rows[-1]), flush=True)
    print(json.dumps({"streams": arguments.streams, "tokens": arguments.tokens, "runs": rows}))


if __name__ == "__main__":
    main()
