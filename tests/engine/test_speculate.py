"""Speculation through the whole engine on a tiny model: the very same replies, in fewer steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxserve.engine.costs import StepCosts
from jaxserve.scheduler.integrity import check_integrity
from jaxserve.scheduler.plan import StepLimits
from tests.engine.crowd import POOL, REQUESTS, ask, assert_same_replies, leave_in_a_crowd, run
from tests.engine.running_engine import RunningEngine, start_tiny_engine, token_ids

SPECULATES = {**POOL, "speculative_algorithm": "ngram", "speculative_num_draft_tokens": 5}


@dataclass(slots=True)
class EagerCosts(StepCosts):
    """Every guess is worth a row, whatever the clock says."""

    def fill(self, limits: StepLimits) -> StepLimits:
        return replace(limits, row_costs=(1.0,) * len(limits.row_buckets), wait_cost=0.0)


def speculate_eagerly(engine: RunningEngine) -> None:
    engine.loop.meter.costs = EagerCosts()


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
                assert_same_replies(deltas, plain)
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
            assert_same_replies(deltas, plain)
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
    async def scenario():
        async with start_tiny_engine(tmp_path, **SPECULATES) as engine:
            await engine.wait_until_warm()
            speculate_eagerly(engine)
            await leave_in_a_crowd(engine)
            await engine.wait_until_idle()
            check_integrity(engine.loop.scheduler_state)
            assert engine.client.stats.num_drafted_tokens > 0
            assert len(token_ids(await engine.generate("after", [9, 8, 7]))) == 8

    run(scenario())
