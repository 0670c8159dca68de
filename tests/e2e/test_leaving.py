"""Clients that leave: the machine is free within one chunk, and nothing that they held is lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
from sanic import Sanic

from jaxserve.scheduler.plan import StepPlan
from jaxserve.server.app import create_app
from jaxserve.server.settings import TextTools
from jaxserve.text.chat_template import ChatTemplate
from jaxserve.text.tokenizer import byte_tokenizer
from tests.e2e.served import CHUNK_TOKENS, Served
from tests.engine.running_engine import RunningEngine, start_tiny_engine
from tests.fakes import FAKE_SETTINGS
from tests.tiny import tiny_config, write_tiny_checkpoint

pytestmark = pytest.mark.slow

NUM_PROMPT_TOKENS = 4000
NUM_CLIENTS = 500
SOON_S = 1.0


class Turnstile:
    """Stands before the device: a step waits here until it is let through."""

    def __init__(self, engine: RunningEngine):
        self._step = engine.runner.step
        self._permits = threading.Semaphore(0)
        self.num_let_through = 0
        self.is_somebody_waiting = False
        engine.runner.step = self.step

    def step(self, plan: StepPlan) -> Any:
        self.is_somebody_waiting = True
        self._permits.acquire()
        self.is_somebody_waiting = False
        self.num_let_through += 1
        return self._step(plan)

    def let_through(self, num_steps: int) -> None:
        self._permits.release(num_steps)

    def close(self) -> None:
        """Take back what was not used."""
        while self._permits.acquire(blocking=False):
            pass


@contextlib.asynccontextmanager
async def listen(app: Sanic) -> AsyncIterator[int]:
    """The port of an app that is served on the running loop."""
    app.config.TOUCHUP = False
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = await app.create_server(sock=listener)
    assert server is not None
    await server.startup()
    serving = server.start_serving()
    assert serving is not None
    await serving
    try:
        yield listener.getsockname()[1]
    finally:
        server.close()
        await asyncio.sleep(0)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.002)


def write_long_checkpoint(folder: Path) -> None:
    """The tiny qwen2 with room for a long prompt."""
    write_tiny_checkpoint(folder, "qwen2")
    config = tiny_config("qwen2") | {"max_position_embeddings": NUM_PROMPT_TOKENS + 96}
    (folder / "config.json").write_text(json.dumps(config))


def test_a_client_that_leaves_during_a_long_prefill_costs_no_step_more(tmp_path):
    """Steps are let through by hand, so that "within one chunk" is a count and no matter of time."""
    write_long_checkpoint(tmp_path / "model")
    text = TextTools(tokenizer=byte_tokenizer(307), chat_template=ChatTemplate(None, "", ""))
    flags: dict[str, Any] = {
        "max_total_tokens": NUM_PROMPT_TOKENS + 96,
        "chunked_prefill_size": CHUNK_TOKENS,
        "max_running_requests": 2,
    }

    async def scenario() -> None:
        async with (
            start_tiny_engine(tmp_path / "model", **flags) as engine,
            listen(create_app(engine.client, text, FAKE_SETTINGS)) as port,
        ):
            turnstile = Turnstile(engine)
            await check_leaving(engine, turnstile, port, "/generate", {"stream": False})
            await check_leaving(engine, turnstile, port, "/generate", {"stream": True})
            await check_leaving(engine, turnstile, port, "/v1/completions", {"stream": True})

    asyncio.run(asyncio.wait_for(scenario(), 300))


async def check_leaving(
    engine: RunningEngine, turnstile: Turnstile, port: int, path: str, options: dict[str, Any]
) -> None:
    """Leave when five of the 63 chunks have been launched and the sixth stands at the turnstile."""
    prompt = [(turnstile.num_let_through + i) % 250 for i in range(NUM_PROMPT_TOKENS)]
    prompt_field = "input_ids" if path == "/generate" else "prompt"
    num_before, stats = turnstile.num_let_through, engine.client.stats
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(make_request(path, {prompt_field: prompt, **options}))
    turnstile.let_through(5)
    await until(lambda: turnstile.num_let_through == num_before + 5 and turnstile.is_somebody_waiting)
    writer.close()
    await until(lambda: not list(engine.client.live_rids()))
    turnstile.let_through(1)
    await until(lambda: engine.client.stats.num_aborted == stats.num_aborted + 1)
    # A seventh step would stand at the turnstile now; a right request finds it free, and the sixth's pages.
    assert not turnstile.is_somebody_waiting
    assert engine.client.stats.num_running == engine.client.stats.num_queued == 0
    turnstile.let_through(1000)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        body = {"input_ids": prompt, "sampling_params": {"temperature": 0, "ignore_eos": True}}
        reply = (await client.post("/generate", json=body)).json()
    assert len(reply["output_ids"]) == 96
    assert reply["meta_info"]["cached_tokens"] <= 6 * CHUNK_TOKENS
    turnstile.close()


def make_request(path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


def make_long_request(rng: random.Random) -> bytes:
    """Something that would run for a long time: any route, any prompt length, streamed or not."""
    prompt = [rng.randrange(256) for _ in range(rng.choice((1, 9, 30, 60, 200, 3000)))]
    path = rng.choice(("/generate", "/v1/completions", "/v1/chat/completions"))
    body: dict[str, Any] = {"stream": rng.random() < 0.5, "ignore_eos": True, "max_tokens": 1000}
    if path == "/generate":
        sampling = {"max_new_tokens": 1000, "ignore_eos": True, "n": rng.choice((1, 1, 1, 2))}
        body = {"input_ids": prompt, "stream": body["stream"], "sampling_params": sampling}
    elif path == "/v1/completions":
        body["prompt"] = [prompt, prompt[:7]] if rng.random() < 0.2 else prompt
    else:
        body["messages"] = [{"role": "user", "content": "x" * len(prompt)}]
    return make_request(path, body)


async def come_and_go(port: int, rng: random.Random) -> str:
    """One client; says at what moment it left."""
    await asyncio.sleep(rng.uniform(0, 2.5))
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    request = make_long_request(rng)
    moment = rng.choice(
        ("before all is sent", "at once", "after a while", "after a while", "after some bytes")
    )
    whole = moment != "before all is sent"
    writer.write(request if whole else request[: rng.randrange(len(request))])
    await writer.drain()
    if moment == "after a while":
        await asyncio.sleep(rng.uniform(0, 2))
    elif moment == "after some bytes":
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.5):
                await reader.readexactly(rng.choice((1, 50, 500, 5000)))
    if rng.random() < 0.3:  # a reset instead of a farewell
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.close()
    return moment


def test_500_clients_that_drop_at_random_moments_leave_nothing_behind(tiny_server):
    served: Served = tiny_server
    rng = random.Random(20)
    right = {"text": "The right one.", "sampling_params": {"temperature": 0, "max_new_tokens": 20}}
    want = requests.post(f"{served.url}/generate", json=right, timeout=60).json()["output_ids"]
    before = served.engine_state()
    port = int(served.url.rpartition(":")[2])
    seen: list[dict[str, Any]] = []

    async def watch(client: httpx.AsyncClient) -> None:
        while True:
            seen.append((await client.get("/server_info")).json()["internal_states"][0])
            await asyncio.sleep(0.1)

    async def scenario() -> None:
        async with httpx.AsyncClient(base_url=served.url, timeout=30) as client:
            watcher = asyncio.create_task(watch(client))
            clients = [come_and_go(port, random.Random(rng.random())) for _ in range(NUM_CLIENTS)]
            moments = await asyncio.gather(*clients)
            watcher.cancel()
        assert len(set(moments)) == 4

    asyncio.run(scenario())
    deadline_s = time.monotonic() + SOON_S
    while not is_as_before(served.engine_state(), before):
        assert time.monotonic() < deadline_s, f"{served.engine_state()} is not as {before}"
        time.sleep(0.02)
    # It was a crowd: rows were taken, and others waited for theirs.
    assert max(state["num_running_reqs"] for state in seen) >= 8
    assert max(state["num_queue_reqs"] for state in seen) > 0
    reply = requests.post(f"{served.url}/generate", json=right, timeout=60).json()
    assert reply["output_ids"] == want
    # Emptying the cache makes the engine check the owners of every page.
    assert requests.post(f"{served.url}/flush_cache", params={"timeout": 5}, timeout=60).status_code == 200


def is_as_before(state: dict[str, Any], before: dict[str, Any]) -> bool:
    counts = ("num_running_reqs", "num_queue_reqs", "num_free_pages")
    return all(state[count] == before[count] for count in counts)
