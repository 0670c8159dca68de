"""A seed reproduces its tokens in float32: alone, in a crowd, in chunks, from the prefix cache, streamed."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx
import pytest
import requests

from tests.e2e.served import CHUNK_TOKENS, Served

pytestmark = pytest.mark.slow

NUM_OTHERS = 32
SAMPLING = {
    "temperature": 0.8,
    "top_p": 0.9,
    "frequency_penalty": 0.3,
    "presence_penalty": 0.2,
    "repetition_penalty": 1.1,
    "max_new_tokens": 48,
    "ignore_eos": True,
}
PROMPTS = {"short": list(b"Once upon a time"), "long": [(i * i) % 251 for i in range(10 * CHUNK_TOKENS + 7)]}


def make_body(prompt: list[int], **changes: Any) -> dict[str, Any]:
    return {"input_ids": prompt, "sampling_params": {**SAMPLING, "sampling_seed": 1234, **changes}}


def ask(served: Served, body: dict[str, Any]) -> Any:
    response = requests.post(f"{served.url}/generate", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


def make_others(seed: int) -> list[dict[str, Any]]:
    """What the rest of the batch may be: any length, greedy or sampled, with or without penalties."""
    rng = random.Random(seed)
    bodies = []
    for _ in range(NUM_OTHERS):
        prompt = [rng.randrange(256) for _ in range(rng.choice((1, 5, 40, 150, 400)))]
        changes = {"max_new_tokens": rng.randrange(20, 120), "sampling_seed": rng.randrange(2**31)}
        if rng.random() < 0.3:
            changes["temperature"] = 0
        if rng.random() < 0.3:
            changes |= {"top_k": rng.randrange(1, 50), "min_p": 0.05, "frequency_penalty": 0}
        bodies.append(make_body(prompt, **changes))
    return bodies


async def ask_in_a_crowd(served: Served, body: dict[str, Any], seed: int) -> tuple[dict[str, Any], int]:
    """The reply to `body`, sent in the middle of the others, and the most requests seen running at once."""
    others = make_others(seed)
    bodies = [*others[: NUM_OTHERS // 2], body, *others[NUM_OTHERS // 2 :]]
    limits = httpx.Limits(max_connections=NUM_OTHERS + 2)
    async with httpx.AsyncClient(base_url=served.url, timeout=120, limits=limits) as client:
        tasks = [asyncio.create_task(client.post("/generate", json=body)) for body in bodies]
        most_running = 0
        while not all(task.done() for task in tasks):
            state = (await client.get("/server_info")).json()["internal_states"][0]
            most_running = max(most_running, state["num_running_reqs"])
            await asyncio.sleep(0.02)
        replies = [await task for task in tasks]
    assert [reply.status_code for reply in replies] == [200] * len(bodies)
    return replies[NUM_OTHERS // 2].json(), most_running


@pytest.fixture(scope="module")
def alone(tiny_server) -> dict[str, list[int]]:
    """The tokens of each prompt when nothing else runs and nothing is cached."""
    requests.post(f"{tiny_server.url}/flush_cache", params={"timeout": 5}, timeout=60)
    replies = {name: ask(tiny_server, make_body(prompt)) for name, prompt in PROMPTS.items()}
    assert [reply["meta_info"]["cached_tokens"] for reply in replies.values()] == [0, 0]
    assert all(len(set(reply["output_ids"])) > 10 for reply in replies.values())  # sampled, not repeated
    return {name: reply["output_ids"] for name, reply in replies.items()}


@pytest.mark.parametrize("name", PROMPTS)
def test_the_same_tokens_inside_a_batch_of_others(tiny_server, alone, name):
    for seed in (1, 2):
        body = {**make_body(PROMPTS[name]), "cache_salt": f"a cache of its own, {seed}"}
        reply, most_running = asyncio.run(ask_in_a_crowd(tiny_server, body, seed))
        assert reply["output_ids"] == alone[name]
        assert most_running > NUM_OTHERS // 4


def test_the_same_tokens_from_the_prefix_cache(tiny_server, alone):
    reply = ask(tiny_server, make_body(PROMPTS["long"]))
    assert reply["meta_info"]["cached_tokens"] > 9 * CHUNK_TOKENS
    assert reply["output_ids"] == alone["long"]
    crowded, _ = asyncio.run(ask_in_a_crowd(tiny_server, make_body(PROMPTS["long"]), seed=3))
    assert crowded["meta_info"]["cached_tokens"] > 9 * CHUNK_TOKENS
    assert crowded["output_ids"] == alone["long"]


def test_the_same_tokens_streamed_and_continued(tiny_server, alone):
    """The draw at a position depends on the seed and the position alone: a reply can be taken up half way."""
    body = {**make_body(PROMPTS["short"]), "stream": True}
    response = requests.post(f"{tiny_server.url}/generate", json=body, timeout=120)
    frames = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert json.loads(frames[-2])["output_ids"] == alone["short"]
    # Frequency and presence count output only, so that what is now prompt no longer weighs; leave them out.
    plain = {"frequency_penalty": 0, "presence_penalty": 0}
    whole = ask(tiny_server, make_body(PROMPTS["short"], **plain))["output_ids"]
    rest = ask(tiny_server, make_body([*PROMPTS["short"], *whole[:20]], **plain, max_new_tokens=28))
    assert rest["output_ids"] == whole[20:]


def test_without_a_seed_two_runs_differ_and_so_do_the_choices_of_one(tiny_server, alone):
    unseeded = make_body(PROMPTS["short"], sampling_seed=None)
    assert ask(tiny_server, unseeded)["output_ids"] != ask(tiny_server, unseeded)["output_ids"]
    choices = ask(tiny_server, make_body(PROMPTS["short"], n=3))
    assert choices[0]["output_ids"] == alone["short"]
    assert len({tuple(choice["output_ids"]) for choice in choices}) == 3
    again = ask(tiny_server, make_body(PROMPTS["short"], n=3))
    assert [choice["output_ids"] for choice in again] == [choice["output_ids"] for choice in choices]


def test_the_openai_routes_keep_the_seed_too(tiny_server):
    body = {"prompt": PROMPTS["short"], "temperature": 0.8, "top_p": 0.9, "seed": 1234, "max_tokens": 48}
    url = f"{tiny_server.url}/v1/completions"
    texts = [requests.post(url, json=body, timeout=60).json()["choices"][0]["text"] for _ in range(2)]
    other = requests.post(url, json={**body, "seed": 1235}, timeout=60).json()["choices"][0]["text"]
    assert texts[0] == texts[1] != other
