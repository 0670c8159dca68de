"""Sampling on the device: what may be drawn, how often, and that seeds mean what they say."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.runner.batch import slot_params
from jaxserve.runner.device_state import edit_rows
from jaxserve.runner.sampler import read_params, sample
from jaxserve.types import TokenParams

VOCAB_SIZE = 13
sample_jit = jax.jit(sample)


def draw(logits_BV, params: list[TokenParams], positions: list[int], prompts=None, outputs=None):
    """Sampled ids, one a row; row b is in slot b, with a prompt of 4 tokens unless given."""
    num_rows = len(params)
    prompts = prompts or [[0, 1, 2, 3]] * num_rows
    outputs = outputs or [[]] * num_rows
    params_BF = np.stack([slot_params(p, len(prompt)) for p, prompt in zip(params, prompts, strict=True)])
    rows = read_params(jnp.asarray(params_BF), jnp.asarray(positions, jnp.int32))
    edits, bias = zip(
        *(edit_rows(VOCAB_SIZE, p, i, o) for p, i, o in zip(params, prompts, outputs, strict=True)),
        strict=True,
    )
    slot_B = jnp.arange(num_rows, dtype=jnp.int32)
    logits_BV = jnp.asarray(np.broadcast_to(logits_BV, (num_rows, VOCAB_SIZE)), jnp.float32)
    return np.asarray(sample_jit(logits_BV, rows, slot_B, jnp.asarray(edits), jnp.asarray(bias)))


def frequencies(logits_V, params: TokenParams, num_draws: int = 4096) -> np.ndarray:
    """How often each id comes up over many positions."""
    ids = draw(logits_V, [params] * num_draws, list(range(4, num_draws + 4)))
    return np.bincount(ids, minlength=VOCAB_SIZE) / num_draws


@pytest.fixture
def logits_V():
    return np.random.default_rng(5).standard_normal(VOCAB_SIZE).astype(np.float32) * 2


def softmax(x):
    weight = np.exp(x - x.max())
    return weight / weight.sum()


def test_greedy_takes_the_lowest_id_among_equals():
    logits = np.zeros(VOCAB_SIZE)
    logits[[4, 7]] = 3.0
    assert draw(logits, [TokenParams(max_new_tokens=1)], [4]).tolist() == [4]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_frequencies_follow_the_softmax(logits_V, temperature):
    want = softmax(logits_V / temperature)
    got = frequencies(logits_V, TokenParams(max_new_tokens=1, temperature=temperature, seed=3))
    chi_square = 4096 * np.sum((got - want) ** 2 / want)
    assert chi_square < 34.5  # 12 degrees of freedom: exceeded once in 2,000 seeds


def test_top_k_keeps_the_k_best(logits_V):
    got = frequencies(logits_V, TokenParams(max_new_tokens=1, temperature=1.0, top_k=3))
    assert set(np.flatnonzero(got)) == set(np.argsort(-logits_V)[:3])


def test_top_p_keeps_the_smallest_set_that_reaches_p(logits_V):
    order = np.argsort(-logits_V)
    mass = np.cumsum(softmax(logits_V)[order])
    for p in (0.05, 0.5, 0.9):
        kept = order[: np.searchsorted(mass, p) + 1]
        got = frequencies(logits_V, TokenParams(max_new_tokens=1, temperature=1.0, top_p=p), 8192)
        assert set(np.flatnonzero(got)) <= set(kept)
        assert set(np.flatnonzero(got)) >= {i for i in kept if softmax(logits_V)[i] > 0.01}


def test_top_p_counts_the_mass_that_top_k_left():
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1] + [1e-9] * (VOCAB_SIZE - 4)))
    # Of {0.4, 0.3} the first alone holds 0.57: enough for 0.5, though not of the whole distribution's 0.5.
    got = frequencies(logits, TokenParams(max_new_tokens=1, temperature=1.0, top_k=2, top_p=0.5))
    assert set(np.flatnonzero(got)) == {0}


def test_min_p_is_relative_to_the_best(logits_V):
    probability = softmax(logits_V)
    got = frequencies(logits_V, TokenParams(max_new_tokens=1, temperature=1.0, min_p=0.2), 8192)
    assert set(np.flatnonzero(got)) == set(np.flatnonzero(probability >= 0.2 * probability.max()))


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
