"""A crowd over HTTP: every request gets the tokens that it would get alone, and nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from typing import Any

import httpx
import pytest
import requests

from tests.e2e.served import Served, serve

pytestmark = pytest.mark.slow

NUM_REQUESTS = 64
LONGEST_PROMPT = 3000


@pytest.fixture(scope="module")
def served():
    """Pages for 4,096 tokens, under prompts of up to 3,000 and 32 rows: some must give way."""
    with serve(
        "--config", "tiny.yaml", "--context-length", "4096", "--max-total-tokens", "4096",
        "--max-running-requests", "32", "--log-level", "warning",
    ) as server:  # fmt: skip
        yield server


def make_requests(seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    lengths = [1, 2, 16, 17, LONGEST_PROMPT, *(rng.randrange(1, 400) for _ in range(NUM_REQUESTS - 9))]
    lengths += [rng.randrange(400, LONGEST_PROMPT) for _ in range(4)]
    rng.shuffle(lengths)
    return [
        {
            "input_ids": [rng.randrange(256) for _ in range(length)],
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": rng.randrange(1, 240),
                "ignore_eos": True,
            },
        }
        for length in lengths
    ]


async def post_together(served: Served, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    limits = httpx.Limits(max_connections=len(bodies))
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:
        replies = await asyncio.gather(*(client.post(f"{served.url}/generate", json=body) for body in bodies))
    assert [reply.status_code for reply in replies] == [200] * len(bodies)
    return [reply.json() for reply in replies]


async def post_all_at_once(served: Served, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same, and the first step comes only when all of them wait, however slow the machine is."""
    await asyncio.to_thread(requests.post, f"{served.url}/pause_generation", json={}, timeout=60)
    posting = asyncio.create_task(post_together(served, bodies))
    await asyncio.to_thread(served.wait_until, "num_queue_reqs", len(bodies), timeout_s=60)
    await asyncio.to_thread(requests.post, f"{served.url}/continue_generation", json={}, timeout=60)
    return await posting


def test_a_crowd_gets_what_each_would_get_alone(served):
    bodies = make_requests(seed=1)
    assert requests.post(f"{served.url}/flush_cache", timeout=60).status_code == 200
    before = served.engine_state()
    crowd = asyncio.run(post_all_at_once(served, bodies))
    after = served.engine_state()
    assert sum(reply["meta_info"]["num_retractions"] for reply in crowd) > 0
    assert after["num_retractions"] > before["num_retractions"]
    # No program was compiled under the load, on the serving path or anywhere else in the engine.
    assert after["num_compiles"] == before["num_compiles"]
    assert after["num_late_compiles"] == 0
    alone = [requests.post(f"{served.url}/generate", json=body, timeout=60).json() for body in bodies]
    for body, together, single in zip(bodies, crowd, alone, strict=True):
        assert together["output_ids"] == single["output_ids"]
        assert len(single["output_ids"]) == body["sampling_params"]["max_new_tokens"]
    check_nothing_is_left(served)


def test_clients_that_leave_at_any_moment_leave_nothing_behind(served):
    async def leave(client: httpx.AsyncClient, index: int) -> None:
        body = {
            "input_ids": [index] * (20 * (index % 20) + 1),
            "sampling_params": {"max_new_tokens": 1000, "ignore_eos": True},
            "stream": index % 2 == 0,
        }
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02 + 0.01 * (index % 10)):
                await client.post(f"{served.url}/generate", json=body, timeout=60)

    async def scenario() -> None:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(limits=limits) as client:
            await asyncio.gather(*(leave(client, index) for index in range(100)))

    asyncio.run(scenario())
    check_nothing_is_left(served)


def check_nothing_is_left(served: Served) -> None:
    served.wait_until("num_running_reqs", 0, timeout_s=10)
    served.wait_until("num_queue_reqs", 0, timeout_s=10)
    # The engine checks every page's owners when it flushes, and fails if one was lost.
    assert requests.post(f"{served.url}/flush_cache", params={"timeout": 5}, timeout=60).status_code == 200
    served.wait_until("num_free_pages", served.info()["num_pages"], timeout_s=10)
    assert served.engine_state()["num_cached_pages"] == 0


def test_a_dead_engine_is_told_within_a_second_and_replaced():
    with serve("--config", "tiny.yaml", "--log-level", "error") as served:
        engine_pid = _find_engine(served.process.pid)
        body = {"text": "hello", "sampling_params": {"max_new_tokens": 900, "ignore_eos": True}}

        async def scenario() -> httpx.Response:
            async with httpx.AsyncClient(timeout=60) as client:
                task = asyncio.create_task(client.post(f"{served.url}/generate", json=body))
                while not served.engine_state()["num_running_reqs"]:
                    await asyncio.sleep(0.01)
                os.kill(engine_pid, signal.SIGKILL)
                return await task

        reply = asyncio.run(scenario())
        assert reply.status_code == 503
        assert "signal 9" in reply.json()["message"]
        assert requests.get(f"{served.url}/health", timeout=1).status_code == 503
        deadline_s = time.monotonic() + 120
        while requests.get(f"{served.url}/health", timeout=5).status_code != 200:
            assert time.monotonic() < deadline_s
            time.sleep(0.2)
        body["sampling_params"] = {"max_new_tokens": 3}
        assert requests.post(f"{served.url}/generate", json=body, timeout=60).status_code == 200


def _find_engine(launch_pid: int) -> int:
    """The one child of the launch process (Linux's own list of children)."""
    with open(f"/proc/{launch_pid}/task/{launch_pid}/children") as children:
        (engine_pid,) = map(int, children.read().split())
    return engine_pid
