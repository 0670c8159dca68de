"""Scores through the whole engine on a tiny model: transformers' own, and the same whatever the schedule."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from jaxserve.scheduler.integrity import check_integrity
from jaxserve.types import ScoreParams, TokenScores
from tests.engine.running_engine import finish_of, start_tiny_engine, token_ids
from tests.goldens.read import read_tiny_goldens

GOLDEN = read_tiny_goldens("qwen2")[130]
LENGTHS = (40, 70, 100, 130)
# 40 pages of 8 tokens: any request fits alone, a crowd has to give way. Prompts are cut every 16 tokens.
SMALL_POOL: dict[str, Any] = {"max_total_tokens": 320, "max_running_requests": 4, "chunked_prefill_size": 16}
TOLERANCE = 1e-5


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def prompt_scores(deltas) -> list[TokenScores]:
    return [scores for delta in deltas for scores in delta.prompt_scores]


def output_scores(deltas) -> list[TokenScores]:
    return [scores for delta in deltas for scores in delta.scores]


def assert_golden(told: list[TokenScores], rows: range) -> None:
    """Those of transformers for these rows of the golden prompt, with two alternatives."""
    assert len(told) == len(rows)
    for row, scores in zip(rows, told, strict=True):
        logprobs = log_softmax(GOLDEN.logits[row])
        assert scores.logprob == pytest.approx(logprobs[GOLDEN.prompt_ids[row + 1]], abs=TOLERANCE)
        assert scores.top_ids == np.argsort(-logprobs, kind="stable")[:2].tolist()


def assert_same(told: list[TokenScores], others: list[TokenScores]) -> None:
    assert [scores.top_ids for scores in told] == [scores.top_ids for scores in others]
    for field in ("logprob", "top_logprobs", "watched_logprobs"):
        values = [getattr(scores, field) for scores in told]
        assert np.allclose(values, [getattr(scores, field) for scores in others], rtol=0, atol=TOLERANCE)


def test_scores_do_not_depend_on_chunks_cached_prefixes_or_retractions(tmp_path):
    ids = GOLDEN.prompt_ids

    async def ask(engine, name: str, length: int, **params):
        wanted = ScoreParams(
            of_output=True, prompt_rows=tuple(range(length - 1)), num_top=2, watched_ids=(7, 300)
        )
        return await engine.generate(f"{name}-{length}", ids[:length], scores=wanted, **params)

    async def scenario():
        async with start_tiny_engine(tmp_path, **SMALL_POOL) as engine:
            await engine.wait_until_warm()
            alone = {}
            for seed, length in enumerate(LENGTHS):
                sampling = {"max_new_tokens": 50, "temperature": 0.8, "seed": seed}
                alone[length] = await ask(engine, "alone", length, **sampling)
                assert alone[length][-1].num_cached_tokens == 0  # row 0 is wanted, and so all are computed
                assert_golden(prompt_scores(alone[length]), range(length - 1))
            # Hot: only what comes before the first row is taken from the cache.
            late = ScoreParams(prompt_rows=tuple(range(101, 129)), num_top=2)
            deltas = await engine.generate("hot", ids, scores=late, max_new_tokens=0)
            assert (deltas[-1].num_cached_tokens, finish_of(deltas).kind) == (96, "length")
            assert_golden(prompt_scores(deltas), range(101, 129))
            # Together: they take one another's pages, are prefilled again, and tell nothing twice.
            crowd = await asyncio.gather(
                *(
                    ask(engine, "crowd", length, max_new_tokens=50, temperature=0.8, seed=seed)
                    for seed, length in enumerate(LENGTHS)
                )
            )
            await engine.wait_until_idle()
            assert engine.client.stats.num_retractions > 0
            for length, deltas in zip(LENGTHS, crowd, strict=True):
                assert token_ids(deltas) == token_ids(alone[length])
                assert_same(prompt_scores(deltas), prompt_scores(alone[length]))
                assert_same(output_scores(deltas), output_scores(alone[length]))
            # What was told while sampling is what the text scores when it is given as a prompt.
            reply = token_ids(alone[70])
            rows = tuple(range(69, 69 + len(reply)))
            text = ids[:70] + reply
            wanted = ScoreParams(prompt_rows=rows, num_top=2, watched_ids=(7, 300))
            deltas = await engine.generate("again", [*text, 5], scores=wanted, max_new_tokens=0)
            assert_same(prompt_scores(deltas), output_scores(alone[70]))
            check_integrity(engine.loop.scheduler_state)
            assert engine.client.stats.num_late_compiles == 0

    asyncio.run(asyncio.wait_for(scenario(), 300))
