"""The whole engine on tiny real models: right tokens whatever the schedule, and nothing lost or leaked."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from jaxserve.errors import InvalidRequestError
from jaxserve.scheduler.integrity import check_integrity
from jaxserve.types import TokenParams
from tests.engine.running_engine import finish_of, start_tiny_engine, token_ids
from tests.goldens.read import read_tiny_goldens
from tests.tiny import TINY_NAMES


def run(test):
    """Each test is one coroutine with a bound on its time."""
    asyncio.run(asyncio.wait_for(test, 300))


@pytest.mark.parametrize("name", TINY_NAMES)
def test_greedy_tokens_are_those_of_transformers_alone_and_together(tmp_path, name):
    async def scenario():
        goldens = read_tiny_goldens(name)
        async with start_tiny_engine(tmp_path, name) as engine:
            for length, golden in goldens.items():
                deltas = await engine.generate(f"alone-{length}", golden.prompt_ids, max_new_tokens=32)
                assert token_ids(deltas) == golden.greedy_ids
            together = await asyncio.gather(
                *(
                    engine.generate(f"{copy}-{length}", golden.prompt_ids, max_new_tokens=32)
                    for copy in range(3)
                    for length, golden in goldens.items()
                )
            )
            for index, deltas in enumerate(together):
                assert token_ids(deltas) == list(goldens.values())[index % len(goldens)].greedy_ids

    run(scenario())


def test_a_crowd_under_retraction_gets_what_each_would_get_alone(tmp_path):
    rng = random.Random(7)
    prompts = [[rng.randrange(4, 300) for _ in range(rng.choice([1, 9, 40, 100]))] for _ in range(24)]
    settings = [
        {"max_new_tokens": rng.randrange(1, 60), "temperature": 1.0 if i % 3 == 0 else 0.0, "seed": i}
        for i in range(24)
    ]

    async def ask_all(engine, together: bool):
        tasks = [
            engine.generate(f"r{i}", prompt, **params)
            for i, (prompt, params) in enumerate(zip(prompts, settings, strict=True))
        ]
        return await asyncio.gather(*tasks) if together else [await task for task in tasks]

    async def scenario():
        async with start_tiny_engine(tmp_path) as engine:
            await engine.wait_until_warm()
            alone = await ask_all(engine, together=False)
        # 40 pages of 8 tokens for 8 rows of up to 160: some must give way.
        async with start_tiny_engine(tmp_path, max_total_tokens=320) as engine:
            await engine.wait_until_warm()
            compiles = engine.runner.compiles.num_compiles
            crowd = await ask_all(engine, together=True)
            await engine.wait_until_idle()
            assert [token_ids(deltas) for deltas in crowd] == [token_ids(deltas) for deltas in alone]
            assert engine.client.stats.num_retractions > 0
            assert sum(deltas[-1].num_retractions for deltas in crowd) == engine.client.stats.num_retractions
            assert engine.runner.compiles.num_compiles == compiles
            assert engine.client.stats.num_late_compiles == 0
            check_integrity(engine.loop.scheduler_state)
            assert engine.client.stats.num_free_pages == 40

    run(scenario())


def test_a_listener_that_leaves_frees_everything_it_held(tmp_path):
    async def leave_early(engine, index: int, patience: int):
        stream = engine.client.generate(f"r{index}", [5 + index] * 30, TokenParams(max_new_tokens=200))
        async with contextlib.aclosing(stream):
            for _ in range(patience):
                await anext(stream)

    async def scenario():
        async with start_tiny_engine(tmp_path) as engine:
            await asyncio.gather(*(leave_early(engine, i, patience=i % 4 + 1) for i in range(20)))
            deltas = await engine.generate("after", [9, 8, 7])
            assert len(token_ids(deltas)) == 8
            await engine.wait_until_idle()
            check_integrity(engine.loop.scheduler_state)
            assert engine.client.stats.num_running == engine.client.stats.num_queued == 0

    run(scenario())


def test_a_stop_id_ends_the_text_and_is_its_last_token(tmp_path):
    golden = read_tiny_goldens("qwen2")[7]
    stop_id = golden.greedy_ids[5]
    first = golden.greedy_ids.index(stop_id)

    async def scenario():
        async with start_tiny_engine(tmp_path) as engine:
            deltas = await engine.generate("r", golden.prompt_ids, max_new_tokens=32, stop_ids=(stop_id,))
            assert token_ids(deltas) == golden.greedy_ids[: first + 1]
            finish = finish_of(deltas)
            assert (finish.kind, finish.matched) == ("stop", stop_id)

    run(scenario())


def test_a_second_prompt_with_the_same_start_reuses_its_pages(tmp_path):
    prompt = list(range(10, 80))

    async def scenario():
        async with start_tiny_engine(tmp_path) as engine:
            cold = await engine.generate("cold", prompt)
            warm = await engine.generate("warm", prompt)
            assert (cold[-1].num_cached_tokens, warm[-1].num_cached_tokens) == (0, 64)
            assert token_ids(cold) == token_ids(warm)
            assert await engine.client.flush_cache(timeout_s=5)
            flushed = await engine.generate("flushed", prompt)
            assert flushed[-1].num_cached_tokens == 0

    run(scenario())


def test_impossible_requests_are_answered_and_the_next_one_is_served(tmp_path):
    async def scenario():
        async with start_tiny_engine(tmp_path, max_total_tokens=64, max_queued_requests=0) as engine:
            too_long = await engine.generate("long", list(range(4, 104)))
            finish = finish_of(too_long)
            assert finish.kind == "abort"
            assert finish.http_status == 400
            assert "KV pool" in finish.message
            running = asyncio.create_task(engine.generate("twin", [5, 6], max_new_tokens=32))
            await asyncio.sleep(0)
            with pytest.raises(InvalidRequestError, match="in use"):
                await engine.generate("twin", [5, 6])
            assert len(token_ids(await running)) == 32

    run(scenario())


def test_a_full_queue_is_told_as_429(tmp_path):
    async def scenario():
        async with start_tiny_engine(tmp_path, max_running_requests=1, max_queued_requests=1) as engine:
            await engine.wait_until_warm()
            answers = await asyncio.gather(
                *(engine.generate(f"r{i}", [5, 6, 7], max_new_tokens=40) for i in range(6))
            )
            statuses = [finish_of(deltas).http_status for deltas in answers]
            assert statuses.count(0) >= 2
            assert set(statuses) == {0, 429}

    run(scenario())


def test_an_id_may_be_used_again_at_once(tmp_path):
    """What is still on its way to a listener that has left is not given to the next one of that name."""

    async def scenario():
        async with start_tiny_engine(tmp_path) as engine:
            want = token_ids(await engine.generate("other", [7, 8, 9]))
            stream = engine.client.generate("same", [5, 6], TokenParams(max_new_tokens=200))
            await anext(stream)
            await stream.aclose()
            again = await engine.generate("same", [7, 8, 9])
            assert finish_of(again).kind == "length"
            assert token_ids(again) == want

    run(scenario())


def test_an_engine_that_is_lost_fails_every_open_request(tmp_path):
    async def scenario():
        async with start_tiny_engine(tmp_path) as engine:
            task = asyncio.create_task(engine.generate("r", [5, 6, 7], max_new_tokens=200))
            while not engine.client.stats.num_running:
                await asyncio.sleep(0.01)
            engine.client.lose("The engine process was ended by signal 9.")
            deltas = await task
            assert finish_of(deltas).http_status == 503
            assert "signal 9" in finish_of(deltas).message
            assert engine.client.status == "dead"

    run(scenario())
