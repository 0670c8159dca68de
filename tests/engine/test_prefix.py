"""The prefix cache in a whole engine: what is shared is computed once, and the tokens are the same."""

from __future__ import annotations

import asyncio

from jaxserve.flags import shipped_configs
from tests.engine.running_engine import start_engine, token_ids

NUM_REQUESTS = 100
SYSTEM = [7 + index % 200 for index in range(2000)]
# The model of tiny.yaml: random weights, and room for 2,000 tokens.
MODEL = str(shipped_configs()["tiny.yaml"].parent / "tiny")
FLAGS = {
    "load_format": "dummy",
    "context_length": 2048,
    "max_total_tokens": 6144,
    "page_size": 8,
    "max_running_requests": 8,
    "chunked_prefill_size": 256,
}


async def ask_all(engine, together: bool) -> list[list[int]]:
    """One system prompt, and three tokens of each request's own; four tokens of reply."""
    tasks = [
        engine.generate(f"r{index}", [*SYSTEM, index % 10, 20, 30 + index % 7], max_new_tokens=4)
        for index in range(NUM_REQUESTS)
    ]
    replies = await asyncio.gather(*tasks) if together else [await task for task in tasks]
    return [token_ids(deltas) for deltas in replies]


def test_a_system_prompt_is_computed_once_for_a_hundred_requests(tmp_path):
    async def scenario():
        programs = {"compilation_cache_dir": str(tmp_path.parent / "programs")}
        async with start_engine(MODEL, **FLAGS, **programs) as engine:
            together = await ask_all(engine, together=True)
            await engine.wait_until_idle()
            stats = engine.client.stats
            # 2,000 tokens are 250 whole pages of 8.
            assert stats.num_computed_tokens == len(SYSTEM) + NUM_REQUESTS * 3
            assert stats.num_cached_tokens == (NUM_REQUESTS - 1) * len(SYSTEM)
            assert stats.num_evicted_tokens == 0
            one_by_one = await ask_all(engine, together=False)
            assert one_by_one == together
            assert engine.client.stats.num_computed_tokens == stats.num_computed_tokens + NUM_REQUESTS * 3

    asyncio.run(asyncio.wait_for(scenario(), 300))
