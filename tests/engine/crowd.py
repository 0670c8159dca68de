"""A crowd of requests of all sorts for a tiny engine, and what their replies say; for tests of features that
must change no reply."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

import numpy as np

from jaxserve.types import ScoreParams, TokenParams
from tests.engine.running_engine import RunningEngine, finish_of, token_ids

# 40 pages of 8 tokens: a crowd has to give way. The same pool everywhere: the same programs.
POOL: dict[str, Any] = {"max_total_tokens": 320}
SCORES = ScoreParams(of_output=True, num_top=2)


def make_requests() -> list[tuple[list[int], dict[str, Any]]]:
    """Prompts that say things twice, so that there is something to look up; all sorts of parameters."""
    rng = random.Random(5)
    requests = []
    for index in range(20):
        verse = [rng.randrange(4, 300) for _ in range(rng.choice([3, 9, 25]))]
        params: dict[str, Any] = {"max_new_tokens": rng.randrange(20, 70), "seed": index}
        if index % 2:
            params["temperature"] = 0.05  # of a tiny random model's flat distribution: it repeats itself
        if index % 3 == 0:
            params["scores"] = SCORES
        if index % 4 == 0:
            params |= {"min_new_tokens": 12, "stop_ids": tuple(range(0, 300, 3))}
        if index % 5 == 0:
            params["logit_bias"] = tuple((token_id, 3.0) for token_id in verse)
        requests.append(([*verse, 2, *verse], params))
    return requests


REQUESTS = make_requests()


async def ask(engine: RunningEngine, indices, *, together: bool):
    coroutines = [engine.generate(f"r{i}", REQUESTS[i][0], **REQUESTS[i][1]) for i in indices]
    if together:
        return await asyncio.gather(*coroutines)
    return [await coroutine for coroutine in coroutines]


def told(deltas):
    """What a reply says: its tokens, how it ended, and the scores of every token."""
    return (
        token_ids(deltas),
        finish_of(deltas),
        [scores.top_ids for delta in deltas for scores in delta.scores],
    )


def logprobs(deltas):
    return [scores.top_logprobs for delta in deltas for scores in delta.scores]


def assert_same_replies(got, expected):
    """Word for word, and their scores but for rounding."""
    assert [told(reply) for reply in got] == [told(reply) for reply in expected]
    for reply, other in zip(got, expected, strict=True):
        assert np.allclose(logprobs(reply), logprobs(other), rtol=0, atol=1e-4)


def run(test):
    asyncio.run(asyncio.wait_for(test, 300))


async def leave_in_a_crowd(engine: RunningEngine) -> None:
    """Listeners that go away in the middle of their replies."""

    async def leave_early(index: int) -> None:
        stream = engine.client.generate(f"r{index}", [5, 6, 7 + index] * 8, TokenParams(max_new_tokens=200))
        async with contextlib.aclosing(stream):
            for _ in range(index % 5 + 1):
                await anext(stream)

    await asyncio.gather(*(leave_early(index) for index in range(16)))
