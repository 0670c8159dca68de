"""Several engines as one: who gets which request, and what all must agree on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from jaxserve.engine.group import EngineGroup, add_stats
from jaxserve.engine.messages import Abort, FlushCache, StepOutput, Submit, UpdateWeights
from jaxserve.errors import UnavailableError
from jaxserve.types import MEMORY_TAGS, EngineStats, FinishReason, TokenDelta, TokenParams
from tests.engine.test_client import ScriptedEngine, run

PROMPT = list(range(200))
PRESENT = UpdateWeights("present", "auto")


class ScriptedGroup:
    """Two scripted engines and the group of them."""

    def __init__(self):
        self.engines = [ScriptedEngine(0), ScriptedEngine(1)]
        self.group = EngineGroup([engine.client for engine in self.engines], PRESENT)
        self._streams: list[AsyncGenerator] = []  # one that nobody holds would end

    async def open(self, rid: str, prompt_ids: list[int], dp_rank: int | None = None) -> AsyncGenerator:
        """A request that its engine has, and has given a token."""
        stream = self.group.generate(rid, prompt_ids, TokenParams(max_new_tokens=9), dp_rank=dp_rank)
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        engine = next(engine for engine in self.engines if rid in engine.client.live_rids())
        engine.client.handle(StepOutput([make_delta(engine, rid)], engine.stats))
        assert (await waiting).token_ids == [5]
        self._streams.append(stream)
        return stream

    def prompts(self) -> list[list[list[int]]]:
        """What each engine was given."""
        return [
            [message.prompt_ids for message in engine.received if isinstance(message, Submit)]
            for engine in self.engines
        ]


def make_delta(engine: ScriptedEngine, rid: str, finish: FinishReason | None = None) -> TokenDelta:
    wire_id = next(
        message.rid
        for message in reversed(engine.received)
        if isinstance(message, Submit) and message.rid.startswith(f"{rid}/")
    )
    return TokenDelta(
        rid=wire_id,
        token_ids=[5],
        num_prompt_tokens=1,
        num_cached_tokens=0,
        num_output_tokens=1,
        finish=finish,
    )


def test_requests_spread_and_those_with_one_beginning_stay_together():
    async def scenario():
        both = ScriptedGroup()
        longer, other = [*PROMPT, 1, 2], [7, *PROMPT]
        for rid, prompt in (("a", PROMPT), ("b", other), ("c", longer), ("d", other)):
            await both.open(rid, prompt)
        assert both.prompts() == [[PROMPT, longer], [other, other]]

    run(scenario())


def test_a_request_is_aborted_where_it_runs_and_its_load_ends_with_it():
    async def scenario():
        both = ScriptedGroup()
        first, second = both.engines
        kept, left = await both.open("a", PROMPT, dp_rank=1), await both.open("b", PROMPT, dp_rank=1)
        assert sorted(both.group.live_rids()) == ["a", "b"]
        assert (first.client.load_tokens, second.client.load_tokens > 0) == (0, True)
        both.group.abort("a")
        await left.aclose()
        assert [message for message in first.received if isinstance(message, Abort)] == []
        assert len([message for message in second.received if isinstance(message, Abort)]) == 2
        second.client.handle(StepOutput([make_delta(second, "a", FinishReason(kind="abort"))], second.stats))
        assert [delta.finish.kind async for delta in kept] == ["abort"]
        assert second.client.load_tokens == 0

    run(scenario())


def test_an_engine_that_dies_stops_all_until_it_is_back_and_the_others_requests_go_on():
    async def scenario():
        both = ScriptedGroup()
        first, second = both.engines
        running = await both.open("a", PROMPT, dp_rank=0)
        second.client.lose(second.client.sign("The engine process was ended by signal 9."))
        assert both.group.status == "dead"
        assert both.group.status_message == "dp_rank 1: The engine process was ended by signal 9."
        assert both.group.info is None
        with pytest.raises(UnavailableError, match="dp_rank 1: The engine process was ended"):
            both.group.generate("b", PROMPT, TokenParams(max_new_tokens=1))
        first.client.handle(StepOutput([make_delta(first, "a")], first.stats))
        assert (await anext(running)).token_ids == [5]
        second.start()
        assert both.group.status == "ready"

    run(scenario())


def test_an_engine_that_was_started_again_is_not_thought_to_know_anything():
    async def scenario():
        both = ScriptedGroup()
        second = both.engines[1]
        await (await both.open("a", PROMPT, dp_rank=1)).aclose()
        await (await both.open("b", PROMPT)).aclose()
        assert len(both.prompts()[1]) == 2
        second.client.lose("gone")
        second.start()
        await both.open("c", PROMPT)
        assert both.prompts()[0] == [PROMPT]

    run(scenario())


def test_orders_go_to_all():
    async def scenario():
        both = ScriptedGroup()
        assert await both.group.flush_cache(1.0)
        await both.group.pause("retract")
        assert both.group.stats.is_paused
        await both.group.resume()
        await both.group.release_memory(MEMORY_TAGS, keeps_weights=True, mode="wait", timeout_s=1.0)
        assert (both.group.status, both.group.status_message) == (
            "asleep",
            "Model is currently in sleep state.",
        )
        await both.group.resume_memory(MEMORY_TAGS)
        assert both.group.status == "ready"
        for engine in both.engines:
            assert FlushCache() in engine.calls()
            assert len(engine.calls()) == 5

    run(scenario())


def test_an_order_that_one_engine_refuses_is_taken_back_on_the_others():
    async def scenario():
        both = ScriptedGroup()
        await both.open("a", PROMPT, dp_rank=1)
        with pytest.raises(UnavailableError, match=r"dp_rank 1: The model was not put to sleep. 1 running"):
            await both.group.release_memory(MEMORY_TAGS, keeps_weights=True, mode="refuse", timeout_s=0.0)
        assert both.group.status == "ready"
        assert both.group.stats.released == ()

        both.engines[1].refuses = ("other",)
        with pytest.raises(UnavailableError, match="dp_rank 1: no such files: other"):
            await both.group.update_weights("other", "auto", flushes_cache=True)
        assert [engine.client.weights for engine in both.engines] == [PRESENT, None]

    run(scenario())


def test_counts_are_summed_and_flags_are_of_all_or_of_any():
    total = add_stats(
        [
            EngineStats(num_running=2, is_warm=True, gen_throughput=1.5, queue_time_counts=(1, 2)),
            EngineStats(num_running=3, is_paused=True, released=("kv_cache",)),
        ]
    )
    assert (total.num_running, total.gen_throughput, total.queue_time_counts) == (5, 1.5, (1, 2))
    assert (total.is_warm, total.is_paused, total.released) == (False, True, ("kv_cache",))
