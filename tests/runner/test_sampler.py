"""Sampling on the device: greedy, the edits of logits, seeds. How often: test_distributions.py."""

from __future__ import annotations

import numpy as np
import pytest

from jaxserve.types import TokenParams
from tests.runner.draws import VOCAB_SIZE, draw


@pytest.fixture
def logits_V():
    return np.random.default_rng(5).standard_normal(VOCAB_SIZE).astype(np.float32) * 2


def test_greedy_takes_the_lowest_id_among_equals():
    logits = np.zeros(VOCAB_SIZE)
    logits[[4, 7]] = 3.0
    assert draw(logits, [TokenParams(max_new_tokens=1)], [4]).tolist() == [4]


def test_penalties_and_bias_follow_their_formulas(logits_V):
    """Each is checked by what it takes for the favourite to lose against the runner-up."""
    best, second = np.argsort(-logits_V)[:2]
    gap = float(logits_V[best] - logits_V[second])

    def winner(outputs=(), prompt=(12,), **settings):
        params = TokenParams(max_new_tokens=9, **settings)
        return draw(logits_V, [params], [9], [list(prompt)], [list(outputs)])[0]

    assert gap < 2
    assert winner(outputs=[best], frequency_penalty=gap * 0.9) == best
    assert winner(outputs=[best, best], frequency_penalty=gap * 0.9) == second
    assert winner(outputs=[best, best], presence_penalty=gap * 0.9) == best
    assert winner(outputs=[best], presence_penalty=gap * 1.1) == second
    assert winner(prompt=[best], presence_penalty=gap * 1.1) == best  # only what was generated counts
    ratio = float(logits_V[best] / logits_V[second])
    assert winner(prompt=[best], repetition_penalty=ratio * 0.95) == best
    assert winner(prompt=[best], repetition_penalty=ratio * 1.05) == second
    assert winner(logit_bias=((int(best), -gap * 1.1),)) == second


def test_repetition_penalty_lowers_negative_logits_too():
    logits = np.full(VOCAB_SIZE, -2.0)
    logits[3] = -1.0
    params = TokenParams(max_new_tokens=1, repetition_penalty=2.0)
    assert draw(logits, [params], [4], [[3]])[0] == 0  # -1 * 2 ties with the rest; the lowest id wins


def test_stop_ids_cannot_come_before_the_minimum_length():
    logits = np.zeros(VOCAB_SIZE)
    logits[6], logits[2] = 5.0, 1.0
    params = TokenParams(max_new_tokens=9, min_new_tokens=3, stop_ids=(6,))
    got = draw(logits, [params] * 5, [4, 5, 6, 7, 8])
    assert got.tolist() == [2, 2, 2, 6, 6]


def test_a_seed_reproduces_whatever_the_rest_of_the_batch(logits_V):
    mine = TokenParams(max_new_tokens=1, temperature=1.0, top_p=0.9, seed=77)
    other = TokenParams(max_new_tokens=1, temperature=1.3, min_p=0.1, presence_penalty=1.0, seed=5)
    alone = [draw(logits_V, [mine], [position])[0] for position in range(4, 24)]
    among = [draw(logits_V, [other, mine, other, other], [9, position, 4, 4])[1] for position in range(4, 24)]
    assert alone == among
    assert len(set(alone)) > 1
    other_seed = TokenParams(max_new_tokens=1, temperature=1.0, top_p=0.9, seed=78)
    assert alone != [draw(logits_V, [other_seed], [position])[0] for position in range(4, 24)]


def test_greedy_rows_stay_greedy_beside_sampled_ones(logits_V):
    greedy = TokenParams(max_new_tokens=1)
    hot = TokenParams(max_new_tokens=1, temperature=2.0)
    got = draw(logits_V, [hot, greedy, hot, greedy], [4, 5, 6, 7])
    assert got[1] == got[3] == np.argmax(logits_V)
