"""How often each token is drawn: the exact distribution of the documented order of edits, by chi-square.

The order: penalties, bias and minimum length edit the logits; then temperature; then top-k of all, top-p of
the mass that top-k left, and min-p relative to the best. Seeds are fixed, so a run repeats itself; that the
test has the power to notice a mistake is shown by deliberate ones, each of which it must reject.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from scipy.special import gammaincc

from jaxserve.types import TokenParams
from tests.runner.draws import PROMPT, VOCAB_SIZE, draw, softmax

NUM_DRAWS = 8192
SELDOM = 1e-5  # a right sampler's p-value is below this once in 100,000 choices of the seed
LOGITS = 1.5 * np.random.default_rng(8).standard_normal(VOCAB_SIZE).astype(np.float32)
BEST, SECOND, THIRD = (int(token_id) for token_id in np.argsort(-LOGITS)[:3])


@dataclass(frozen=True)
class Ask:
    """Parameters and the sequence so far."""

    params: TokenParams
    prompt: Sequence[int] = PROMPT
    output: Sequence[int] = ()


def ask(prompt: Sequence[int] = PROMPT, output: Sequence[int] = (), **params: Any) -> Ask:
    return Ask(TokenParams(**{"max_new_tokens": 99, "temperature": 1.0, **params}), prompt, output)


def edit_logits(given: Ask, counted: Sequence[int] | None = None) -> np.ndarray:
    """The logits after penalties, bias and minimum length; `counted` stands in for the output's tokens."""
    params = given.params
    counts_V = np.bincount(list(given.output if counted is None else counted), minlength=VOCAB_SIZE)
    logits_V = LOGITS.astype(np.float64)
    for token_id in {*given.prompt, *given.output}:
        by = params.repetition_penalty
        logits_V[token_id] = logits_V[token_id] / by if logits_V[token_id] > 0 else logits_V[token_id] * by
    logits_V -= params.frequency_penalty * counts_V + params.presence_penalty * (counts_V > 0)
    for token_id, bias in params.logit_bias:
        logits_V[token_id] += bias
    if len(given.output) < params.min_new_tokens:
        logits_V[list(params.stop_ids)] = -np.inf
    return logits_V


def keep_top_k(probability_V: np.ndarray, top_k: int) -> np.ndarray:
    kept_V = np.zeros(VOCAB_SIZE)
    best = np.argsort(-probability_V)[: top_k or VOCAB_SIZE]
    kept_V[best] = probability_V[best]
    return kept_V / kept_V.sum()


def keep_top_p(probability_V: np.ndarray, top_p: float) -> np.ndarray:
    kept_V, mass = np.zeros(VOCAB_SIZE), 0.0
    for token_id in np.argsort(-probability_V):
        if mass >= top_p:
            break
        kept_V[token_id] = probability_V[token_id]
        mass += probability_V[token_id]
    return kept_V / kept_V.sum()


def keep_min_p(probability_V: np.ndarray, min_p: float) -> np.ndarray:
    kept_V = np.where(probability_V >= min_p * probability_V.max(), probability_V, 0.0)
    return kept_V / kept_V.sum()


def exact(given: Ask) -> np.ndarray:
    """What the documentation promises, in float64, with sorts where the sampler bisects."""
    params = given.params
    probability_V = softmax(edit_logits(given) / params.temperature)
    probability_V = keep_top_k(probability_V, params.top_k)
    return keep_min_p(keep_top_p(probability_V, params.top_p), params.min_p)


def count_draws(given: Ask) -> np.ndarray:
    """How often each id comes next, over many seeds."""
    params = [replace(given.params, seed=seed) for seed in range(NUM_DRAWS)]
    position = len(given.prompt) + len(given.output)
    prompts, outputs = [given.prompt] * NUM_DRAWS, [given.output] * NUM_DRAWS
    ids = draw(LOGITS, params, [position] * NUM_DRAWS, prompts, outputs)
    return np.bincount(ids, minlength=VOCAB_SIZE)


def p_value(counts: np.ndarray, probability: np.ndarray) -> float:
    """Pearson's chi-square: how seldom counts fit as badly as these, if that is their distribution.

    Cells that expect fewer than 5 are put together, and a count where nothing can be is never a fit.
    """
    counts, probability = counts.ravel(), probability.ravel()
    if counts[probability == 0].any():
        return 0.0
    expected = probability * counts.sum()
    small = expected < 5
    expected = np.append(expected[~small], expected[small].sum())
    observed = np.append(counts[~small], counts[small].sum())
    filled = expected > 0
    statistic = np.sum((observed[filled] - expected[filled]) ** 2 / expected[filled])
    degrees = np.count_nonzero(filled) - 1
    return float(gammaincc(degrees / 2, statistic / 2)) if degrees else 1.0


ASKS: dict[str, Ask] = {
    "temperature 1": ask(),
    "cold": ask(temperature=0.5),
    "hot": ask(temperature=1.7),
    "top-k": ask(top_k=4),
    "top-k 1 of a hot row": ask(top_k=1, temperature=2.0),
    "top-p": ask(top_p=0.8),
    "a tiny top-p keeps the best": ask(top_p=1e-6),
    "min-p": ask(min_p=0.15),
    "frequency penalty": ask(output=[BEST, BEST, SECOND], frequency_penalty=0.7),
    "negative frequency penalty": ask(output=[BEST, THIRD], frequency_penalty=-1.1),
    "presence penalty": ask(output=[BEST, BEST, SECOND], presence_penalty=1.3),
    "repetition penalty": ask(prompt=[BEST, 0, 1], output=[SECOND, 7, 7], repetition_penalty=1.6),
    "repetition reward": ask(prompt=[BEST, 0, 1], output=[SECOND], repetition_penalty=0.6),
    "bias": ask(logit_bias=((BEST, -1.5), (5, 2.0), (6, -1e9))),
    "a bias that makes one certain": ask(logit_bias=((5, 1e9),)),
    "minimum length": ask(min_new_tokens=3, stop_ids=(BEST, 4), output=[1, 2]),
    "minimum length reached": ask(min_new_tokens=2, stop_ids=(BEST, 4), output=[1, 2]),
    "top-p of what top-k left": ask(top_k=3, top_p=0.6),
    "min-p after temperature": ask(temperature=2.0, min_p=0.3),
    "top-p after temperature": ask(temperature=1.8, top_p=0.7),
    "top-k and min-p": ask(top_k=6, min_p=0.1, temperature=1.4),
    "penalties, then temperature": ask(output=[BEST, SECOND], presence_penalty=1.0, temperature=0.6),
    "penalties, then cuts": ask(output=[BEST, BEST], frequency_penalty=1.2, top_k=5, top_p=0.9),
    "everything": ask(
        prompt=[THIRD, 0], output=[BEST, BEST, SECOND], frequency_penalty=0.4, presence_penalty=0.3,
        repetition_penalty=1.2, logit_bias=((5, 1.0),), temperature=1.3, top_k=9, top_p=0.95, min_p=0.05,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ASKS)
def test_counts_follow_the_documented_distribution(name):
    given = ASKS[name]
    assert p_value(count_draws(given), exact(given)) > SELDOM


def penalties_after_temperature(given: Ask) -> np.ndarray:
    edits_V = edit_logits(given) - LOGITS
    return softmax(LOGITS / given.params.temperature + edits_V)


def top_p_of_the_whole(given: Ask) -> np.ndarray:
    whole_V = softmax(edit_logits(given) / given.params.temperature)
    both_V = np.minimum(keep_top_p(whole_V, given.params.top_p), keep_top_k(whole_V, given.params.top_k))
    return both_V / both_V.sum()


def cuts_before_temperature(given: Ask) -> np.ndarray:
    params = given.params
    kept_V = keep_min_p(keep_top_p(softmax(edit_logits(given)), params.top_p), params.min_p)
    warm_V = np.where(kept_V > 0, softmax(edit_logits(given) / params.temperature), 0)
    return warm_V / warm_V.sum()


def prompt_is_counted_too(given: Ask) -> np.ndarray:
    return softmax(edit_logits(given, counted=[*given.prompt, *given.output]) / given.params.temperature)


def slightly_warmer(given: Ask) -> np.ndarray:
    return softmax(edit_logits(given) / (1.1 * given.params.temperature))


@pytest.mark.parametrize(
    ("given", "mistake"),
    [
        (ASKS["temperature 1"], slightly_warmer),
        (ASKS["penalties, then temperature"], penalties_after_temperature),
        (ASKS["top-p of what top-k left"], top_p_of_the_whole),
        (ASKS["min-p after temperature"], cuts_before_temperature),
        (ASKS["top-p after temperature"], cuts_before_temperature),
        (ask(prompt=[BEST], output=[SECOND], presence_penalty=0.5), prompt_is_counted_too),
        (ask(prompt=[BEST, BEST], output=[SECOND], frequency_penalty=0.3), prompt_is_counted_too),
    ],
)
def test_a_wrong_distribution_is_rejected(given: Ask, mistake: Callable[[Ask], np.ndarray]):
    counts = count_draws(given)
    assert p_value(counts, exact(given)) > SELDOM
    assert p_value(counts, mistake(given)) < SELDOM


@pytest.mark.parametrize("neighbour", ["the next position", "the next seed"])
def test_neighbouring_draws_are_independent(neighbour):
    """Of tokens in a row, and of the n choices of a request, whose seeds follow each other."""
    seeds = [7] * NUM_DRAWS if neighbour == "the next position" else range(NUM_DRAWS)
    positions = range(4, NUM_DRAWS + 4) if neighbour == "the next position" else [4] * NUM_DRAWS
    params = [TokenParams(max_new_tokens=1, temperature=1.0, seed=seed) for seed in seeds]
    ids = draw(LOGITS, params, list(positions))
    pairs = np.zeros((VOCAB_SIZE, VOCAB_SIZE))
    np.add.at(pairs, (ids[:-1], ids[1:]), 1)
    probability_V = softmax(LOGITS.astype(np.float64))
    assert p_value(pairs, np.outer(probability_V, probability_V)) > SELDOM
    echoed = np.outer(probability_V, 0.95 * probability_V) + 0.05 * np.diag(probability_V)
    assert p_value(pairs, echoed) < SELDOM
