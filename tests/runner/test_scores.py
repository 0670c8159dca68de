"""Log-probabilities of a tiny model's steps, against those of transformers' logits and NumPy's float64."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from msgspec.structs import astuple

from jaxserve.kernels_pallas.dispatch import XLA_KERNELS
from jaxserve.models import llama
from jaxserve.runner.buckets import Shape, make_ladder
from jaxserve.runner.device_state import PoolSize
from jaxserve.runner.runner import ModelRunner
from jaxserve.runner.scores import ScorePlaces, find_top, read_scores, score_prompts
from jaxserve.scheduler.plan import NO_TOKEN, DecodeRow, PrefillChunk, SlotInit, StepPlan, StepResult
from jaxserve.types import MAX_TOP_LOGPROBS, MAX_WATCHED_IDS, ScoreParams, TokenParams, TokenScores
from tests.goldens.read import read_tiny_goldens
from tests.models.forward import load_model
from tests.tiny import write_tiny_checkpoint

PAGE_SIZE = 8
TABLE_WIDTH = 32
POOL = PoolSize(num_pages=129, page_size=PAGE_SIZE, num_slots=4, table_width=TABLE_WIDTH)
GOLDEN = read_tiny_goldens("qwen2")[130]
# The float32 noise of the tiny model's logits, which are below 10; that of a log-softmax is no more.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def runner(model):
    """Of a tiny model; the prefill of 50 tokens is no multiple of the blocks that prompts are scored in."""
    runner = make_runner(model, Shape(4, 0), Shape(0, 16), Shape(0, 50), Shape(0, 64))
    yield runner
    runner.close()


def make_runner(model, *shapes: Shape) -> ModelRunner:
    ladder = make_ladder(max_rows=4, max_tokens=64, min_rows=1, mixes=True)
    runner = ModelRunner(model, model.cfg, POOL, jnp.dtype(jnp.float32), ladder)
    for shape in shapes:
        runner.programs.compile_one(shape)
    return runner


def list_pages(slot: int) -> list[int]:
    return list(range(1 + slot * TABLE_WIDTH, 1 + (slot + 1) * TABLE_WIDTH))


def plan_chunk(slot: int, ids: list[int], start: int, end: int, rows: tuple[int, ...] = ()) -> PrefillChunk:
    here = [row for row in rows if start <= row < end]
    return PrefillChunk(
        slot=slot,
        seq_id=slot,
        epoch=0,
        start=start,
        token_ids=ids[start:end],
        page_ids=list_pages(slot)[: -(-end // PAGE_SIZE)],
        samples=end == len(ids),
        score_places=[row - start for row in here],
        score_targets=[ids[row + 1] for row in here],
    )


def prefill(runner, slot: int, ids: list[int], params: TokenParams, chunk_tokens: int = 64):
    """Run a prompt chunk by chunk; the scores of its rows, and the last step's result."""
    rows = params.scores.prompt_rows if params.scores else ()
    told: list[TokenScores] = []
    inits: tuple[SlotInit, ...] = (SlotInit(slot, params, ids, []),)
    result = StepResult([])
    for start in range(0, len(ids), chunk_tokens):
        chunk = plan_chunk(slot, ids, start, min(start + chunk_tokens, len(ids)), rows)
        result = runner.step(StepPlan(0, inits, (), (chunk,))).read()
        told += [scores for chunk_scores in result.prompt_scores for scores in chunk_scores]
        inits = ()
    return told, result


def decode(runner, rows: list[tuple[int, int]], ids: list[int] | None = None) -> StepResult:
    """One step of rows (slot, position), which feed what the device sampled, or else ids[position]."""
    planned = [
        DecodeRow(
            slot,
            slot,
            0,
            position,
            list_pages(slot)[position // PAGE_SIZE],
            ids[position] if ids else NO_TOKEN,
        )
        for slot, position in rows
    ]
    return runner.step(StepPlan(0, (), tuple(planned), ())).read()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def expect(logprobs: np.ndarray, target: int, wanted: ScoreParams) -> TokenScores:
    best = np.lexsort((np.arange(len(logprobs)), -logprobs))[: wanted.num_top]
    watched = [float(logprobs[token_id]) for token_id in wanted.watched_ids]
    return TokenScores(float(logprobs[target]), best.tolist(), logprobs[best].tolist(), watched)


def assert_close(got: TokenScores | None, want: TokenScores, tolerance: float = TOLERANCE) -> None:
    assert got is not None
    assert got.top_ids == want.top_ids
    for ours, theirs in zip(astuple(got), astuple(want), strict=True):
        assert np.allclose(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("chunk_tokens", [64, 50, 16, 7])
def test_chosen_rows_of_a_prompt_score_the_token_that_follows(runner, chunk_tokens):
    """However the prompt is cut."""
    rows = (0, 1, 15, 16, 49, 63, 64, 100, 127, 128)
    wanted = ScoreParams(prompt_rows=rows, num_top=5, watched_ids=(7, 7, 306))
    params = TokenParams(max_new_tokens=4, scores=wanted)
    told, result = prefill(runner, 1, GOLDEN.prompt_ids, params, chunk_tokens)
    assert result.token_ids == [GOLDEN.greedy_ids[0]]
    assert result.scores == []  # those of the output were not asked for
    assert len(told) == len(rows)
    for row, scores in zip(rows, told, strict=True):
        assert_close(scores, expect(log_softmax(GOLDEN.logits[row]), GOLDEN.prompt_ids[row + 1], wanted))


def test_prompts_of_one_step_are_scored_each_with_its_own_wishes(runner):
    """The scored chunk stands behind one that is not, and before one that watches other ids."""
    ids = GOLDEN.prompt_ids
    all_rows = ScoreParams(prompt_rows=tuple(range(19)), num_top=1, watched_ids=(3,))
    one_row = ScoreParams(of_output=True, prompt_rows=(4,), num_top=2, watched_ids=(8, 9))
    wanted, lengths = (None, all_rows, one_row), (18, 20, 22)
    inits, chunks = [], []
    for slot, (scores, length) in enumerate(zip(wanted, lengths, strict=True)):
        inits.append(SlotInit(slot, TokenParams(max_new_tokens=2, scores=scores), ids[:length], []))
        rows = scores.prompt_rows if scores else ()
        chunks.append(plan_chunk(slot, ids[:length], 0, length, rows))
    result = runner.step(StepPlan(0, tuple(inits), (), tuple(chunks))).read()
    first, second = result.prompt_scores
    for row, scores in enumerate(first):
        assert_close(scores, expect(log_softmax(GOLDEN.logits[row]), ids[row + 1], all_rows))
    assert_close(second[0], expect(log_softmax(GOLDEN.logits[4]), ids[5], one_row))
    assert result.scores[:2] == [None, None]
    assert_close(result.scores[2], expect(log_softmax(GOLDEN.logits[21]), result.token_ids[2], one_row))


def test_sampled_tokens_are_scored_beside_neighbours_who_want_other_scores_or_none(runner):
    """Four slots decode the golden prompt's continuation from different places."""
    ids = GOLDEN.prompt_ids
    several = ScoreParams(of_output=True, num_top=3, watched_ids=(5,))
    many = ScoreParams(of_output=True, num_top=MAX_TOP_LOGPROBS, watched_ids=tuple(range(100, 228)))
    wanted = {0: several, 1: None, 2: many, 3: ScoreParams(of_output=True)}
    lengths = {0: 33, 1: 60, 2: 100, 3: 16}
    for slot, scores in wanted.items():
        _, result = prefill(runner, slot, ids[: lengths[slot]], TokenParams(max_new_tokens=9, scores=scores))
        if scores is None:
            assert result.scores == []
        else:
            logprobs = log_softmax(GOLDEN.logits[lengths[slot] - 1])
            assert_close(result.scores[0], expect(logprobs, result.token_ids[0], scores))
    result = decode(runner, [(slot, lengths[slot]) for slot in wanted], ids)
    for (slot, scores), token_id, told in zip(wanted.items(), result.token_ids, result.scores, strict=True):
        if scores is None:
            assert told is None
        else:
            assert_close(told, expect(log_softmax(GOLDEN.logits[lengths[slot]]), token_id, scores))
    assert decode(runner, [(1, lengths[1])], ids).scores == []


def test_decode_rows_and_chunks_of_a_step_that_runs_as_two_programs_keep_their_places(runner):
    ids = GOLDEN.prompt_ids
    scores = ScoreParams(of_output=True, prompt_rows=(2,), num_top=1)
    params = TokenParams(max_new_tokens=9, scores=scores)
    prefill(runner, 0, ids[:30], params)
    row = DecodeRow(0, 0, 0, 30, list_pages(0)[30 // PAGE_SIZE], ids[30])
    plan = StepPlan(0, (SlotInit(1, params, ids[:40], []),), (row,), (plan_chunk(1, ids[:40], 0, 40, (2,)),))
    step = runner.step(plan)
    result = step.read()
    assert len(step.launches) == 2
    for told, position, token_id in zip(result.scores, (30, 39), result.token_ids, strict=True):
        assert_close(told, expect(log_softmax(GOLDEN.logits[position]), token_id, scores))
    ((told,),) = result.prompt_scores
    assert_close(told, expect(log_softmax(GOLDEN.logits[2]), ids[3], scores))


def test_scaled_scores_are_of_the_distribution_sampled_from_and_others_of_the_models_own(runner):
    """Penalties, bias and temperature, in any mixture; top-k, which cuts later, changes nothing."""
    ids = GOLDEN.prompt_ids
    length = 40
    logits = GOLDEN.logits[length].astype(np.float64)
    extras = {"presence_penalty": 1.5, "logit_bias": ((9, 4.0),)}
    output = {"of_output": True, "num_top": 4, "watched_ids": (9,), "prompt_rows": (11,)}
    scaled, own = ScoreParams(**output, is_scaled=True), ScoreParams(**output)
    hot = TokenParams(max_new_tokens=9, temperature=0.7, top_k=5, seed=3)
    requests = {
        0: dataclasses.replace(hot, scores=own, **extras),
        1: dataclasses.replace(hot, scores=scaled, **extras),
        2: TokenParams(max_new_tokens=9, scores=scaled, **extras),  # greedy: temperature 1
        3: dataclasses.replace(hot, scores=scaled),
    }
    first_ids = {}
    for slot, params in requests.items():
        (told,), result = prefill(runner, slot, ids[:length], params)
        first_ids[slot] = result.token_ids[0]
        temperature = 0.7 if params.scores is scaled and params.temperature else 1.0
        assert_close(told, expect(log_softmax(GOLDEN.logits[11] / temperature), ids[12], scaled))
    result = decode(runner, [(slot, length) for slot in requests], ids)
    edited = {}
    for slot in (1, 2):
        edited[slot] = logits.copy()
        edited[slot][first_ids[slot]] -= 1.5
        edited[slot][9] += 4.0
    distributions = [logits, edited[1] / 0.7, edited[2], logits / 0.7]
    for told, distribution, token_id in zip(result.scores, distributions, result.token_ids, strict=True):
        assert_close(told, expect(log_softmax(distribution), token_id, scaled))


@pytest.mark.parametrize("vocab_size", [5, 100, 128 * 128, 128 * 128 + 1, 151_936])
def test_the_best_come_first_and_the_lowest_id_among_equals(vocab_size):
    """Few distinct values, so that ties cross the groups that the search is done in; and -inf among them."""
    rng = np.random.default_rng(vocab_size)
    logits = rng.integers(0, 12, (6, vocab_size)).astype(np.float32)
    logits[1] = 1.0
    logits[2] = rng.standard_normal(vocab_size)
    logits[3] = -np.inf
    logits[3, [vocab_size - 1, 2]] = 1.0
    logits[4] = -np.arange(vocab_size)
    values, found = jax.jit(partial(find_top, num_top=MAX_TOP_LOGPROBS))(logits)
    for row in range(6):
        best = np.lexsort((np.arange(vocab_size), -logits[row]))[:MAX_TOP_LOGPROBS]
        assert np.asarray(found)[row, : len(best)].tolist() == best.tolist()
        assert np.array_equal(np.asarray(values)[row, : len(best)], logits[row][best])


@pytest.mark.parametrize("vocab_size", [7, 151_936])
def test_log_probabilities_are_those_of_float64(vocab_size):
    """Rows given as their own logits, to leave the model out; -inf is a value, NaN and +inf spoil a row."""
    rng = np.random.default_rng(1)
    logits = (rng.standard_normal((8, vocab_size)) * 4).astype(np.float32)
    logits[5, 3] = -np.inf
    logits[6, 4] = np.inf
    logits[7, 1] = np.nan
    targets = [0, 6, 2, vocab_size - 1, 5, 3, 0, 0]
    watched = np.zeros((2, MAX_WATCHED_IDS), np.int32)
    watched[1, :3] = 6, 0, 6
    order = np.array([3, 1, 2, 0, 4, 5, 6, 7], np.int32)  # places need not follow the tokens
    places = ScorePlaces(
        count=jnp.int32(8),
        token_Q=jnp.asarray(order),
        target_Q=jnp.asarray(np.array(targets, np.int32)[order]),
        slot_Q=jnp.ones(8, jnp.int32),
        temperature_Q=jnp.ones(8, jnp.float32),
    )
    score = jax.jit(lambda x_TD: score_prompts(x_TD, lambda x_BD: x_BD, places, jnp.asarray(watched)))(logits)
    wanted = ScoreParams(num_top=MAX_TOP_LOGPROBS, watched_ids=(6, 0, 6))
    told = read_scores(np.asarray(score), wanted, vocab_size)
    for scores, row in zip(told[:6], order, strict=False):
        logprobs = log_softmax(logits[row].astype(np.float64))
        assert_close(scores, expect(logprobs, targets[row], wanted), tolerance=4e-6)
    assert len(told[0].top_ids) == min(MAX_TOP_LOGPROBS, vocab_size)
    assert told[5].logprob == -np.inf
    for scores in told[6:]:
        assert np.isnan([scores.logprob, *scores.top_logprobs, *scores.watched_logprobs]).all()


def test_memory_does_not_grow_with_prompt_rows_times_vocabulary(runner):
    """Nor does a program that can score copy anything of the pool or of the sampling state."""
    cfg = llama.Config(
        vocab_size=20_011, width=16, mlp_width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
        norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, max_context=256, ties_embeddings=True,
    )  # fmt: skip
    params = {spec.path: jnp.zeros(spec.shape) for spec in llama.param_specs(cfg)}
    few, many = Shape(0, 64), Shape(0, 512)
    large = make_runner(llama.Model(cfg, params, XLA_KERNELS), few, many)
    memory = {shape: large.programs.ready[shape].memory_analysis() for shape in (few, many)}
    growth = memory[many].temp_size_in_bytes - memory[few].temp_size_in_bytes
    assert growth < 4 * cfg.vocab_size * (many.num_tokens - few.num_tokens) / 10
    assert memory[many].alias_size_in_bytes >= large.kv_bytes + 2 * 4 * cfg.vocab_size * (POOL.num_slots + 1)
    large.close()


def test_logits_that_are_not_numbers_end_their_own_rows_and_nobody_elses(tmp_path):
    """A token's embedding is NaN: whoever reads it is refused, and its pages serve the next owner well."""
    write_tiny_checkpoint(tmp_path, "llama")  # its head is not its embedding
    model = load_model(tmp_path)
    model.embed_VD.set_value(model.embed_VD.get_value().at[300].set(jnp.nan))
    runner = make_runner(model, Shape(4, 0), Shape(0, 64))
    goldens = read_tiny_goldens("llama")
    clean, later = goldens[7], goldens[33]
    spoilt_ids = [5, 6, 7, 8, 300, 9, 10, 11, 12, 13]
    wanted = ScoreParams(of_output=True, prompt_rows=(0, 3, 6), num_top=1)
    params = TokenParams(max_new_tokens=32, scores=wanted, presence_penalty=0.5)
    inits = (
        SlotInit(0, params, spoilt_ids, []),
        SlotInit(1, TokenParams(max_new_tokens=32), clean.prompt_ids, []),
    )
    chunks = (
        plan_chunk(0, spoilt_ids, 0, 10, wanted.prompt_rows),
        plan_chunk(1, clean.prompt_ids, 0, 7),
    )
    result = runner.step(StepPlan(0, inits, (), chunks)).read()
    assert result.token_ids == [NO_TOKEN, clean.greedy_ids[0]]
    tokens = [clean.greedy_ids[0]]
    for step in range(4):  # the refused sequence's stale rows run on beside its neighbour
        result = decode(runner, [(0, 10 + step), (1, 7 + step)])
        assert result.token_ids[0] == NO_TOKEN
        tokens.append(result.token_ids[1])
    assert tokens == clean.greedy_ids[:5]
    # A chunk that samples nothing yields NO_TOKEN as well if a row that it scores is not a number.
    chunk = dataclasses.replace(plan_chunk(3, spoilt_ids, 0, 6, (4,)), samples=False)
    plan = StepPlan(0, (SlotInit(3, params, spoilt_ids, []),), (), (chunk,))
    assert runner.step(plan).read().token_ids == [NO_TOKEN]
    # The next owner of the same slot and pages.
    _, result = prefill(runner, 0, later.prompt_ids, TokenParams(max_new_tokens=32))
    tokens = result.token_ids + [decode(runner, [(0, 33 + step)]).token_ids[0] for step in range(7)]
    assert tokens == later.greedy_ids[:8]
    runner.close()
