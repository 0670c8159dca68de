"""Two engines behind one port: the tokens of one, prompts that find their pages, and one that is killed."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests

from jaxserve import LLM, SamplingParams
from tests.e2e.served import Served, serve

SETTINGS = {
    "context_length": 512,
    "max_total_tokens": 2048,
    "max_running_requests": 4,
    "chunked_prefill_size": 64,
}
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
LONG = {"max_new_tokens": 400, "temperature": 0, "ignore_eos": True}
SHORT = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def served():
    with serve("--config", "tiny.yaml", "--dp-size", "2", *FLAGS, "--log-level", "warning") as server:
        yield server


def ask(served: Served, prompt_ids: list[int], **fields: Any) -> requests.Response:
    body = {"input_ids": prompt_ids, "sampling_params": SHORT, **fields}
    return requests.post(f"{served.url}/generate", json=body, timeout=60)


def count_prompts(served: Served) -> list[int]:
    """Prompt tokens that each engine has had."""
    return [state["num_prompt_tokens"] for state in served.info()["internal_states"]]


def test_both_engines_give_the_tokens_of_one_alone(served):
    prompt = list(b"What two say, one says.")
    answers = [ask(served, prompt, routed_dp_rank=rank).json()["output_ids"] for rank in (0, 1)]
    with LLM("configs/tiny", load_format="dummy", tokenizer_path="bytes", dtype="float32", random_seed=0,
             log_level="warning", **SETTINGS) as alone:  # fmt: skip
        single = alone.generate(prompt, SamplingParams(**SHORT))["output_ids"]
    assert answers == [single, single]


def test_prompts_with_one_beginning_land_where_its_pages_are(served):
    for start in (
        10,
        60,
    ):  # one beginning for each engine, since of equals the one that had less is next
        prompt = [start + position % 50 for position in range(200)]
        before = count_prompts(served)
        first, second = ask(served, prompt).json(), ask(served, [*prompt[:150], 3, 2, 1]).json()
        grown = [after - then for after, then in zip(count_prompts(served), before, strict=True)]
        assert sorted(grown) == [0, 353]
        assert first["meta_info"]["cached_tokens"] == 0
        assert second["meta_info"]["cached_tokens"] >= 128


def test_requests_at_once_use_both(served):
    async def scenario() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60) as client:
            bodies = [{"input_ids": [word] * 40, "sampling_params": SHORT} for word in range(4)]
            return await asyncio.gather(
                *(client.post(f"{served.url}/generate", json=body) for body in bodies)
            )

    before = count_prompts(served)
    assert [reply.status_code for reply in asyncio.run(scenario())] == [200] * 4
    assert all(after > then for after, then in zip(count_prompts(served), before, strict=True))


def test_one_engine_that_is_killed_stops_the_service_and_says_so(served):
    launch = Path(f"/proc/{served.process.pid}/task/{served.process.pid}/children")
    engine_ids = list(map(int, launch.read_text().split()))
    assert len(engine_ids) == 2

    async def scenario() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60) as client:
            bodies = [
                {"input_ids": [7, 7, rank], "sampling_params": LONG, "routed_dp_rank": rank}
                for rank in (0, 1)
            ]
            posts = [asyncio.create_task(client.post(f"{served.url}/generate", json=body)) for body in bodies]
            while served.info()["num_running_reqs"] < 2:
                await asyncio.sleep(0.01)
            os.kill(engine_ids[1], signal.SIGKILL)
            return await asyncio.gather(*posts)

    going_on, lost = asyncio.run(scenario())
    assert going_on.status_code == 200
    assert lost.status_code == 503
    assert lost.json()["message"] == "dp_rank 1: The engine process was ended by signal 9."
    health = requests.get(f"{served.url}/health", timeout=5)
    assert health.status_code == 503
    assert "dp_rank 1" in health.json()["message"]
    assert "dp_rank 1" in ask(served, [1]).json()["message"]
