"""A jaxserve server as a worker of bench_peers.py: the same batches, over HTTP.

    python scripts/bench_http.py --model-path MODEL --precision int8 --set max_running_requests=32

Launches a server on loopback, waits until every program is compiled, and streams each sequence of a batch
from POST /generate on a connection of its own. Tokens arrive when their event does; they are counted by the
server's completion_tokens, found without parsing the event, so that the client takes little of the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import cast

import uvloop
from bench_engine import PRECISIONS, make_config, make_parser
from bench_workload import Arrival, Batch, answer_batches, encode_post

from jaxserve.utils import find_free_port

COUNT = re.compile(rb'"completion_tokens": ?(\d+)')
READY_TIMEOUT_S = 600


class Stream(asyncio.Protocol):
    """One sequence: sends its request, notes when the count of its tokens grows."""

    def __init__(self, request: bytes, sequence: int, start_s: float, arrivals: list[Arrival]):
        self._request = request
        self._sequence = sequence
        self._start_s = start_s
        self._arrivals = arrivals
        self._rest = b""
        self._num_tokens = 0
        self.head = b""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._request)  # uvloop's is one in all but its class

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter() - self._start_s
        self.head = self.head or data[:200]
        data = self._rest + data
        end = data.rfind(b"\n") + 1
        self._rest = data[end:]
        counts = COUNT.findall(data[:end])
        if counts and (num_tokens := int(counts[-1])) > self._num_tokens:
            self._arrivals.append((now_s, self._sequence, num_tokens - self._num_tokens))
            self._num_tokens = num_tokens

    def connection_lost(self, exc: Exception | None) -> None:
        if self._num_tokens == 0:
            self.done.set_exception(RuntimeError(f"a stream gave no token: {self.head!r}"))
        else:
            self.done.set_result(None)


async def run_batch(batch: Batch, port: int) -> list[Arrival]:
    """Open every stream, then wait for the last to end."""
    loop = asyncio.get_running_loop()
    requests = [make_request(batch, sequence, port) for sequence in range(len(batch.prompts))]
    arrivals: list[Arrival] = []
    start_s = time.perf_counter()
    streams = [Stream(request, index, start_s, arrivals) for index, request in enumerate(requests)]
    for stream in streams:
        await loop.create_connection(lambda stream=stream: stream, "127.0.0.1", port)
    await asyncio.gather(*(stream.done for stream in streams))
    return arrivals


def make_request(batch: Batch, sequence: int, port: int) -> bytes:
    """A whole HTTP request. A fresh cache_salt keeps the prefix cache out of it."""
    sampling = {
        "temperature": 0,
        "max_new_tokens": batch.num_new_tokens[sequence],
        "ignore_eos": not batch.stop_ids,
        "stop_token_ids": batch.stop_ids,
    }
    body = {
        "input_ids": batch.prompts[sequence],
        "sampling_params": sampling,
        "stream": True,
        "cache_salt": str(time.perf_counter_ns()),
    }
    return encode_post(port, "/generate", body)


def launch(arguments: argparse.Namespace, port: int) -> subprocess.Popen:
    config = make_config(arguments.model_path, arguments.precision, arguments.settings, {})
    words = [f"--{key.replace('_', '-')}={value}" for key, value in PRECISIONS[arguments.precision].items()]
    words += [f"--{setting}" for setting in arguments.settings]
    command = [sys.executable, "-m", "jaxserve", "launch", "--model-path", config.model_path, *words]
    command += [f"--port={port}", "--log-level=warning", "--incremental-streaming-output"]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)


def read_info(port: int) -> dict:
    """What the server tells of itself; empty as long as there is no answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/get_server_info", timeout=10) as reply:
            return json.loads(reply.read())
    except (urllib.error.URLError, OSError):
        return {}


def wait_until_warm(server: subprocess.Popen, port: int) -> None:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while not find_value(read_info(port), "is_warm"):
        if server.poll() is not None or time.monotonic() > deadline_s:
            raise SystemExit("The server did not become ready; what it said is above.")
        time.sleep(0.2)


def find_value(tree: object, key: str) -> object:
    """The first value under `key`, at any depth."""
    if isinstance(tree, dict):
        if key in tree:
            return tree[key]
        tree = list(tree.values())
    found = [find_value(branch, key) for branch in tree] if isinstance(tree, list) else []
    return next((value for value in found if value is not None), None)


def main() -> None:
    arguments = make_parser(__doc__).parse_args()
    port = find_free_port("127.0.0.1")
    server = launch(arguments, port)
    try:
        wait_until_warm(server, port)
        answer_batches({"route": "/generate"}, lambda batch: uvloop.run(run_batch(batch, port)))
    finally:
        server.terminate()
        server.wait(timeout=60)


if __name__ == "__main__":
    main()
