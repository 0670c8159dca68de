"""Decode windows through the whole engine on a tiny model: the very same replies, in fewer launches."""

from __future__ import annotations

import asyncio
from typing import Any

from jaxserve.scheduler.integrity import check_integrity
from tests.engine.crowd import POOL, REQUESTS, ask, assert_same_replies, leave_in_a_crowd, run
from tests.engine.running_engine import start_tiny_engine, token_ids

WINDOWED = {**POOL, "num_continuous_decode_steps": 4}


def test_replies_and_their_scores_are_the_same_with_and_without(tmp_path):
    """Stops, minimum lengths, bias, scores and seeds among them; alone and in a crowd."""

    async def scenario():
        everyone = range(len(REQUESTS))
        async with start_tiny_engine(tmp_path, **POOL) as engine:
            await engine.wait_until_warm()
            plain = await ask(engine, everyone, together=False)
            num_plain_steps = engine.client.stats.num_steps
        async with start_tiny_engine(tmp_path, **WINDOWED) as engine:
            await engine.wait_until_warm()
            alone = await ask(engine, everyone, together=False)
            num_steps = engine.client.stats.num_steps
            crowd = await ask(engine, everyone, together=True)
            await engine.wait_until_idle()
            stats = engine.client.stats
            for deltas in (alone, crowd):
                assert_same_replies(deltas, plain)
            assert num_steps < 0.4 * num_plain_steps
            assert stats.num_retractions > 0
            assert stats.num_late_compiles == 0
            check_integrity(engine.loop.scheduler_state)
            assert stats.num_free_pages == 40

    run(scenario())


def test_penalties_count_the_tokens_of_the_window_itself(tmp_path):
    params: list[dict[str, Any]] = [
        {"frequency_penalty": 1.5},
        {"presence_penalty": 1.5, "temperature": 0.7, "seed": 4},
        {"repetition_penalty": 1.3},
    ]

    async def scenario():
        replies = []
        for settings in (POOL, WINDOWED):
            async with start_tiny_engine(tmp_path, **settings) as engine:
                await engine.wait_until_warm()
                asked = (
                    engine.generate(f"p{i}", [5, 6, 7], max_new_tokens=30, **p) for i, p in enumerate(params)
                )
                replies.append([token_ids(deltas) for deltas in await asyncio.gather(*asked)])
        assert replies[0] == replies[1]

    run(scenario())


def test_drafts_and_windows_take_turns(tmp_path):
    async def scenario():
        async with start_tiny_engine(tmp_path, **POOL) as engine:
            plain = await ask(engine, range(8), together=True)
        settings = {**WINDOWED, "speculative_algorithm": "ngram", "speculative_num_draft_tokens": 5}
        async with start_tiny_engine(tmp_path, **settings) as engine:
            await engine.wait_until_warm()
            deltas = await ask(engine, range(8), together=True)
            assert_same_replies(deltas, plain)
            check_integrity(engine.loop.scheduler_state)

    run(scenario())


def test_listeners_that_leave_in_the_middle_of_a_window_free_everything(tmp_path):
    async def scenario():
        async with start_tiny_engine(tmp_path, **WINDOWED) as engine:
            await engine.wait_until_warm()
            await leave_in_a_crowd(engine)
            await engine.wait_until_idle()
            check_integrity(engine.loop.scheduler_state)
            assert engine.client.stats.num_free_pages == 40

    run(scenario())
