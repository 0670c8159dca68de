"""A fake engine whose logprobs say which token they are of: "A" has -1/1024, "B" -2/1024, and so on."""

from __future__ import annotations

from typing import Any

from msgspec import structs

from jaxserve.types import ScoreParams, TokenScores
from tests.fakes import VOCAB_SIZE, FakeEngine, score_by_id


def scored(reply: str = "CAB", **settings: Any) -> FakeEngine:
    return FakeEngine(reply=reply, score=score_by_id, **settings)


def logprob_of(token: str | int) -> float:
    token_id = token if isinstance(token, int) else ord(token)
    return -((token_id - 65) % VOCAB_SIZE + 1) / 1024


def score_as_impossible(ids: list[int], row: int, params: ScoreParams) -> TokenScores:
    return structs.replace(score_by_id(ids, row, params), logprob=float("-inf"))


def scores_asked(engine: FakeEngine, order: int = 0) -> ScoreParams:
    """What the engine was asked for with its i-th request."""
    scores = engine.submitted[order].params.scores
    assert scores is not None
    return scores
