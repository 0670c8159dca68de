"""Beam search on a real tiny model: what the engine finds is what a plain search over its logits finds."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve.engine.meter import Meter
from jaxserve.models.interface import KVLayer
from jaxserve.runner.programs import Programs
from jaxserve.scheduler.integrity import check_integrity
from jaxserve.scheduler.plan import StepPlan
from jaxserve.scheduler.state import new_state
from jaxserve.types import BeamResult, FinishReason, ScoreParams, TokenDelta, TokenParams
from tests.engine.running_engine import finish_of, start_tiny_engine, token_ids
from tests.engine.test_engine import run
from tests.models.forward import PAGE_SIZE, load_model, make_batch
from tests.tiny import write_tiny_checkpoint

NAME = "llama"
FEW_PROGRAMS = {"chunked_prefill_size": 16}
NUM_POSITIONS = 64
TOLERANCE = 2e-4  # of a log-probability: float32, summed in another order
RateNext = Callable[[list[int]], np.ndarray]  # log-probabilities of what follows some tokens


def searching(width: int, max_new_tokens: int, stop_ids: tuple[int, ...] = (), num_top: int = 0) -> dict:
    scores = ScoreParams(of_output=True, num_top=max(width, num_top))
    return {
        "max_new_tokens": max_new_tokens,
        "beam_width": width,
        "stop_ids": stop_ids,
        "scores": scores,
    }


@dataclass
class Found:
    """A hypothesis of the plain search."""

    token_ids: list[int]
    sum: float = 0.0
    rows: list[np.ndarray] = field(default_factory=list)  # the log-probabilities that each token came from
    is_finished: bool = False


def search_plainly(
    rate_next: RateNext, prompt_ids: list[int], width: int, max_new_tokens: int, stop_ids: tuple[int, ...]
) -> list[Found]:
    beams = [Found([])]
    while not all(beam.is_finished for beam in beams):
        offers = [beam for beam in beams if beam.is_finished]
        for beam in beams:
            if beam.is_finished:
                continue
            row_V = rate_next(prompt_ids + beam.token_ids)
            for token_id in np.argsort(-row_V, kind="stable")[:width].tolist():
                longer = [*beam.token_ids, token_id]
                is_finished = token_id in stop_ids or len(longer) == max_new_tokens
                rows = [*beam.rows, row_V]
                offers.append(Found(longer, beam.sum + float(row_V[token_id]), rows, is_finished))
        beams = sorted(offers, key=lambda offer: -offer.sum)[:width]
    return beams


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("beams") / NAME, NAME)


@pytest.fixture(scope="module")
def rate_next(folder) -> RateNext:
    """One forward pass over the whole text, padded to one length so that it is compiled once."""
    model = load_model(folder)
    cfg = model.cfg
    graphdef, params = nnx.split(model)
    num_pages = NUM_POSITIONS // PAGE_SIZE
    shape_PSKH = (num_pages + 1, PAGE_SIZE, cfg.num_kv_heads, cfg.head_dim)
    kv = [KVLayer(jnp.zeros(shape_PSKH), jnp.zeros(shape_PSKH)) for _ in range(cfg.num_layers)]
    table = np.arange(1, num_pages + 1, dtype=np.int32)

    @jax.jit
    def compute(params, batch, place):
        model = nnx.merge(graphdef, params)
        x_TD, _ = model(batch, kv)
        return jax.nn.log_softmax(model.compute_logits(x_TD[place][None])[0])

    def rate(token_ids: list[int]) -> np.ndarray:
        padded = token_ids + [0] * (NUM_POSITIONS - len(token_ids))
        return np.asarray(compute(params, make_batch(padded, 0, table), len(token_ids) - 1))

    return rate


def assert_same(beams: list[BeamResult], expected: list[Found], num_top: int) -> None:
    assert [beam.token_ids for beam in beams] == [found.token_ids for found in expected]
    for beam, found in zip(beams, expected, strict=True):
        assert beam.cumulative_logprob == pytest.approx(found.sum, abs=TOLERANCE * len(found.token_ids))
        assert beam.cumulative_logprob == pytest.approx(sum(scores.logprob for scores in beam.scores))
        for token_id, scores, row_V in zip(beam.token_ids, beam.scores, found.rows, strict=True):
            assert scores.logprob == pytest.approx(row_V[token_id], abs=TOLERANCE)
            assert scores.top_ids == np.argsort(-row_V, kind="stable")[:num_top].tolist()
            assert scores.top_logprobs == pytest.approx(row_V[scores.top_ids].tolist(), abs=TOLERANCE)


def test_the_beams_are_those_of_a_plain_search_over_the_models_logits(folder, rate_next):
    rng = random.Random(5)

    async def scenario():
        async with start_tiny_engine(folder, NAME, **FEW_PROGRAMS) as engine:
            for width, length, max_new_tokens, num_top in [(2, 16, 12, 0), (4, 21, 20, 9), (8, 1, 16, 0)]:
                prompt = [rng.randrange(4, 300) for _ in range(length)]
                free = search_plainly(rate_next, prompt, width, max_new_tokens, ())
                # Any of these tokens ends some hypotheses early.
                stop_ids = (free[0].token_ids[4], free[-1].token_ids[2])
                stopped = search_plainly(rate_next, prompt, width, max_new_tokens, stop_ids)
                assert any(beam.token_ids[-1] in stop_ids for beam in stopped)
                for expected, stops in ((free, ()), (stopped, stop_ids)):
                    params = searching(width, max_new_tokens, stops, num_top)
                    deltas = await engine.generate(f"{width}-{len(stops)}", prompt, **params)
                    (delta,) = deltas
                    assert_same(delta.beams, expected, max(width, num_top))
                    assert delta.num_output_tokens == sum(len(beam.token_ids) for beam in expected)
                    kinds = ["stop" if beam.token_ids[-1] in stops else "length" for beam in expected]
                    assert [beam.finish.kind for beam in delta.beams] == kinds
                    assert delta.finish == delta.beams[0].finish
            await engine.wait_until_idle()
            check_integrity(engine.loop.scheduler_state)

    run(scenario())


@pytest.mark.parametrize("missing", ["forks", "rows"])
def test_a_search_whose_program_cannot_be_compiled_is_told_so(folder, missing, monkeypatch):
    may_fail = threading.Event()
    compile_forks, compile_one = Programs.compile_forks, Programs.compile_one

    def fail() -> None:
        assert may_fail.wait(60)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    def compile_forks_or_fail(programs):
        return fail() if missing == "forks" else compile_forks(programs)

    def compile_one_or_fail(programs, shape):
        return fail() if missing == "rows" and shape.num_rows > 1 else compile_one(programs, shape)

    monkeypatch.setattr(Programs, "compile_forks", compile_forks_or_fail)
    monkeypatch.setattr(Programs, "compile_one", compile_one_or_fail)

    async def search(engine, rid: str) -> None:
        finish = finish_of(await engine.generate(rid, [5, 6], **searching(8, 4)))
        assert (finish.kind, finish.http_status) == ("abort", 503)
        assert "beam_width 8 cannot be served" in finish.message

    async def scenario():
        async with start_tiny_engine(folder, NAME, **FEW_PROGRAMS) as engine:
            early = asyncio.create_task(search(engine, "early"))
            assert len(token_ids(await engine.generate("plain", [7, 8], max_new_tokens=4))) == 4
            assert not early.done()
            may_fail.set()
            await early
            await search(engine, "late")
            assert len(token_ids(await engine.generate("after", [7, 8], max_new_tokens=4))) == 4
            check_integrity(engine.loop.scheduler_state)

    run(scenario())


def test_throughput_counts_the_tokens_of_beams():
    meter = Meter()
    meter._window_start_s -= 2.0
    beam = BeamResult(
        token_ids=[5, 6, 7], scores=[], cumulative_logprob=-1.0, finish=FinishReason(kind="length")
    )
    delta = TokenDelta(
        rid="r",
        token_ids=[],
        num_prompt_tokens=2,
        num_cached_tokens=0,
        num_output_tokens=6,
        beams=[beam, beam],
    )
    meter.finish(StepPlan(0, (), (), ()), [delta], new_state(num_pages=4, page_size=8, max_rows=2))
    assert 2.0 < meter.gen_throughput <= 3.0  # 6 tokens in 2 s


def texts_of(deltas: list[TokenDelta]) -> list[list[int]]:
    beams = [beam.token_ids for beam in deltas[-1].beams]
    return beams or [token_ids(deltas)]


def test_searches_in_a_crowd_under_retraction_find_what_they_find_alone(folder):
    rng = random.Random(11)
    shared = [rng.randrange(4, 300) for _ in range(20)]
    prompts = [shared[: rng.choice([0, 8, 20])] + [rng.randrange(4, 300)] * 3 for _ in range(16)]
    settings = [
        searching(rng.choice([2, 3, 5]), rng.randrange(2, 40)) if i % 2 else {"max_new_tokens": 100}
        for i in range(16)
    ]

    async def ask(engine, i: int) -> list[TokenDelta]:
        return await engine.generate(f"r{i}", prompts[i], **settings[i])

    async def scenario():
        async with start_tiny_engine(folder, NAME, **FEW_PROGRAMS) as engine:
            alone = [await ask(engine, i) for i in range(16)]
        # 32 pages of 8 tokens; a search of width 5 may need 30 of them.
        async with start_tiny_engine(folder, NAME, max_total_tokens=256, **FEW_PROGRAMS) as engine:
            await engine.wait_until_warm()
            crowd = await asyncio.gather(*(ask(engine, i) for i in range(16)))
            await engine.wait_until_idle()
            assert [texts_of(deltas) for deltas in crowd] == [texts_of(deltas) for deltas in alone]
            stats = engine.client.stats
            assert stats.num_retractions > 0
            assert stats.num_generated_tokens == sum(deltas[-1].num_output_tokens for deltas in crowd)
            assert (stats.num_free_pages, stats.num_late_compiles) == (32, 0)
            check_integrity(engine.loop.scheduler_state)

    run(scenario())


def test_a_listener_that_leaves_a_search_frees_its_slots_and_pages(folder):
    async def scenario():
        async with start_tiny_engine(folder, NAME, **FEW_PROGRAMS) as engine:
            params = TokenParams(**searching(8, 200))
            stream = engine.client.generate("r", list(range(5, 30)), params)
            async with contextlib.aclosing(stream):
                first = asyncio.ensure_future(anext(stream))
                while engine.client.stats.num_steps < 12:
                    await asyncio.sleep(0.01)
                first.cancel()
                await asyncio.gather(first, return_exceptions=True)
            deltas = await engine.generate("after", [9, 8, 7])
            assert finish_of(deltas).kind == "length"
            await engine.wait_until_idle()
            state = engine.loop.scheduler_state
            check_integrity(state)
            assert (len(state.free_slots), engine.client.stats.num_free_pages) == (8, 128)

    run(scenario())
