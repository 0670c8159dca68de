"""Speculation through the whole engine on a tiny model: the very same replies, in fewer steps."""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxserve.engine.costs import StepCosts
from jaxserve.scheduler.integrity import check_integrity
from jaxserve.scheduler.plan import StepLimits
from jaxserve.types import ScoreParams, TokenParams
from tests.engine.running_engine import RunningEngine, finish_of, start_tiny_engine, token_ids

# 40 pages of 8 tokens: a crowd has to give way, drafts or not. The same pool everywhere: the same programs.
POOL: dict[str, Any] = {"max_total_tokens": 320}
SPECULATES = {**POOL, "speculative_algorithm": "ngram", "speculative_num_draft_tokens": 5}
SCORES = ScoreParams(of_output=True, num_top=2)


@dataclass(slots=True)
class EagerCosts(StepCosts):
    """Every guess is worth a row, whatever the clock says."""

    def fill(self, limits: StepLimits) -> StepLimits:
        return replace(limits, row_costs=(1.0,) * len(limits.row_buckets), wait_cost=0.0)


def speculate_eagerly(engine: RunningEngine) -> None:
    engine.loop.meter.costs = EagerCosts()


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


def run(test):
    asyncio.run(asyncio.wait_for(test, 300))


def test_replies_and_their_scores_are_the_same_with_and_without(tmp_path):
    async def scenario():
        everyone = range(len(REQUESTS))
        async with start_tiny_engine(tmp_path, **POOL) as engine:
            await engine.wait_until_warm()
            plain = await ask(engine, everyone, together=False)
            num_plain_steps = engine.client.stats.num_steps
            assert engine.client.stats.num_drafted_tokens == 0
        async with start_tiny_engine(tmp_path, **SPECULATES) as engine:
            await engine.wait_until_warm()
            speculate_eagerly(engine)
            alone = await ask(engine, everyone, together=False)
            num_steps = engine.client.stats.num_steps
            crowd = await ask(engine, everyone, together=True)
            await engine.wait_until_idle()
            stats = engine.client.stats
            for deltas in (alone, crowd):
                assert [told(reply) for reply in deltas] == [told(reply) for reply in plain]
                for reply, expected in zip(deltas, plain, strict=True):
                    assert np.allclose(logprobs(reply), logprobs(expected), rtol=0, atol=1e-4)
            assert num_steps < 0.8 * num_plain_steps
            assert 0 < stats.num_accepted_tokens < stats.num_drafted_tokens
            assert stats.spec_accept_length > 1
            assert stats.num_retractions > 0
            assert stats.num_late_compiles == 0
            accepted = sum(reply[-1].num_accepted for reply in (*alone, *crowd))
            assert accepted == stats.num_accepted_tokens
            check_integrity(engine.loop.scheduler_state)
            assert stats.num_free_pages == 40

    run(scenario())


def test_the_engine_learns_what_steps_cost_and_serves_the_same(tmp_path):
    async def scenario():
        indices = range(6)
        async with start_tiny_engine(tmp_path, **POOL) as engine:
            plain = await ask(engine, indices, together=True)
        async with start_tiny_engine(tmp_path, **SPECULATES) as engine:
            await engine.wait_until_warm()
            deltas = await ask(engine, indices, together=True)
            assert [told(reply) for reply in deltas] == [told(reply) for reply in plain]
            limits = engine.loop.meter.costs.fill(engine.runner.limits())
            assert limits.row_buckets == (1, 2, 4, 8)
            assert list(limits.row_costs) == sorted(limits.row_costs)
            assert 1e-6 < limits.row_costs[-1] < 10

    run(scenario())


def test_penalties_are_served_without_drafts_and_a_second_prompt_finds_the_pages_of_one(tmp_path):
    """Only with the right KV in the pages that a draft filled does the second reply go on as the first."""

    async def scenario():
        async with start_tiny_engine(tmp_path, **SPECULATES) as engine:
            await engine.wait_until_warm()
            speculate_eagerly(engine)
            prompt = [5, 6, 7, 8, 9] * 4
            for index, penalty in enumerate(("frequency_penalty", "presence_penalty", "repetition_penalty")):
                await engine.generate(f"p{index}", prompt, max_new_tokens=30, **{penalty: 1.2})
            assert engine.client.stats.num_drafted_tokens == 0
            first = await engine.generate("first", prompt, max_new_tokens=60)
            assert engine.client.stats.num_accepted_tokens > 10
            longer = prompt + token_ids(first)[:45]
            again = await engine.generate("again", longer, max_new_tokens=15)
            assert again[-1].num_cached_tokens == 64
            assert token_ids(again) == token_ids(first)[45:]

    run(scenario())


def test_listeners_that_leave_while_drafts_are_in_flight_free_everything(tmp_path):
    async def leave_early(engine, index: int):
        stream = engine.client.generate(f"r{index}", [5, 6, 7 + index] * 8, TokenParams(max_new_tokens=200))
        async with contextlib.aclosing(stream):
            for _ in range(index % 5 + 1):
                await anext(stream)

    async def scenario():
        async with start_tiny_engine(tmp_path, **SPECULATES) as engine:
            await engine.wait_until_warm()
            speculate_eagerly(engine)
            await asyncio.gather(*(leave_early(engine, index) for index in range(16)))
            await engine.wait_until_idle()
            check_integrity(engine.loop.scheduler_state)
            assert engine.client.stats.num_drafted_tokens > 0
            assert len(token_ids(await engine.generate("after", [9, 8, 7]))) == 8

    run(scenario())
