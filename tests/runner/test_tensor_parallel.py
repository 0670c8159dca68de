"""Several devices that share a model do what one does, and tell each other no more than they must."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kernels_pallas.dispatch import KernelTarget, choose_kernels
from jaxserve.kernels_pallas.sampling.ref import choose_tokens
from jaxserve.kernels_pallas.shards import Shards
from jaxserve.runner.buckets import Shape, make_ladder
from jaxserve.runner.checkpoint import Checkpoint, read_family
from jaxserve.runner.device_state import PoolSize
from jaxserve.runner.runner import ModelRunner
from jaxserve.scheduler.plan import DecodeRow, PrefillChunk, SlotInit, StepPlan
from jaxserve.types import KV_CACHE, WEIGHTS, ScoreParams, TokenDelta, TokenParams, TokenScores
from jaxserve.weights.placement import make_placement, make_spec
from jaxserve.weights.resolve import resolve_model
from tests.engine.running_engine import RunningEngine, start_tiny_engine, token_ids
from tests.goldens.read import read_tiny_goldens
from tests.tiny import write_tiny_checkpoint

PAGE_SIZE = 8
NUM_LAYERS = 3
POOL = PoolSize(num_pages=4097, page_size=PAGE_SIZE, num_slots=4, table_width=32)
PROMPT = list(range(10, 50))


def make_runner(
    folder: Path,
    name: str,
    num_devices: int,
    kv_dtype: str = "float32",
    least_halved_tokens: int | None = None,
) -> ModelRunner:
    """Without parameters yet, and without programs."""
    write_tiny_checkpoint(folder, name)
    files = resolve_model(str(folder), on_progress=lambda *_: None)
    family, cfg = read_family(name, files)
    local_cfg = family.divide(cfg, num_devices).local_cfg
    target = KernelTarget(
        platform="cpu",
        head_dim=local_cfg.head_dim,
        num_kv_heads=local_cfg.num_kv_heads,
        page_size=PAGE_SIZE,
        kv_dtype=kv_dtype,
        num_devices=num_devices,
    )
    checkpoint = Checkpoint(
        files=files,
        family=family,
        cfg=cfg,
        kernels=replace(choose_kernels(target), least_halved_tokens=least_halved_tokens),
        dtype="float32",
        quantization="none",
        placement=make_placement(jax.devices()[:num_devices]),
    )
    ladder = make_ladder(max_rows=4, max_tokens=64, min_rows=1, mixes=True)
    return ModelRunner(
        checkpoint.describe_model(), checkpoint.local_cfg, POOL, jnp.dtype(kv_dtype), ladder, checkpoint
    )


@pytest.mark.parametrize(
    ("name", "num_devices", "least_halved_tokens"),
    [
        pytest.param("llama_tied", 2, None, id="a KV head of zeros"),
        pytest.param("qwen2", 4, None, id="KV heads held twice, query heads of zeros"),
        pytest.param("qwen2", 2, 8, id="prefill in halves"),
    ],
)
def test_greedy_tokens_are_those_of_one_device(tmp_path, name, num_devices, least_halved_tokens):
    """Of one request, and of two that begin while it decodes, one of them in two chunks."""
    runner = make_runner(tmp_path, name, num_devices, least_halved_tokens=least_halved_tokens)
    runner.load(lambda *_: None)
    runner.warm_up(lambda *_: None)
    golden = read_tiny_goldens(name)[33]
    prompt, first_id = golden.prompt_ids, golden.greedy_ids[0]
    inits = [SlotInit(slot, TokenParams(max_new_tokens=32), prompt, []) for slot in range(3)]

    def begin(slot: int, start: int, end: int) -> PrefillChunk:
        pages = list(range(5 + 10 * slot, 10 + 10 * slot))
        return PrefillChunk(slot, slot, 0, start, prompt[start:end], pages, end == len(prompt))

    pending = [runner.step(StepPlan(0, (inits[0],), (), (begin(0, 0, 33),)))]
    others = {34: (begin(1, 0, 20), begin(2, 0, 33)), 36: (begin(1, 20, 33),)}
    for position in range(33, 45):
        row = DecodeRow(0, 0, 0, position, 5 + position // PAGE_SIZE)
        chunks = others.get(position, ())
        pending.append(runner.step(StepPlan(0, tuple(inits[1:]) if position == 34 else (), (row,), chunks)))
    runner.programs.compile_one(Shape(1, 0, 4))
    for position in range(45, 61, 4):  # and four steps in a launch
        page = 5 + position // PAGE_SIZE
        row = DecodeRow(0, 0, 0, position, page, num_steps=4, next_page_id=page + 1)
        pending.append(runner.step(StepPlan(0, (), (row,), (), window=4)))
    results = [step.read().token_ids for step in pending]
    assert [results[2].pop(), results[4].pop()] == [first_id, first_id]  # of the others
    results[2].pop()  # of a chunk that does not sample
    assert [token_id for token_ids in results for token_id in token_ids] == golden.greedy_ids[:29]
    runner.close()


def count_collectives(text: str) -> dict[str, int]:
    found = re.findall(
        r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text
    )
    return {name: found.count(name) for name in found}


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_a_step_adds_up_twice_a_layer_and_writes_its_pool_in_place(tmp_path, kv_dtype):
    """Two all-reduces a layer, one for the embedding, and one exchange of the best token of each device. What
    only some requests need (top-k, top-p, scores) stands in branches."""
    runner = make_runner(tmp_path, "qwen2", 4, kv_dtype)
    for shape in (Shape(4, 0), Shape(4, 16)):
        runner.programs.compile_one(shape)
        program = runner.programs.ready[shape]
        entry = program.as_text().partition("\nENTRY ")[2].partition("\n}")[0]
        assert count_collectives(entry) == {"all-reduce": 2 * NUM_LAYERS + 1, "all-gather": 1}
        memory = program.memory_analysis()  # of one device
        own_kv_bytes = runner.kv_bytes // 4
        assert memory.alias_size_in_bytes >= own_kv_bytes
        # Before jax 0.12 XLA copies the pages of one layer where devices are made of a CPU.
        most_copied_bytes = own_kv_bytes / 4 if jax.__version_info__ >= (0, 12) else own_kv_bytes / 2
        assert memory.temp_size_in_bytes < most_copied_bytes
    runner.programs.compile_forks()
    runner.close()


SETTINGS = (
    {},
    {"temperature": 0.9, "seed": 11},
    {"temperature": 0.9, "seed": 12, "top_k": 20},
    {"temperature": 1.1, "seed": 13, "top_p": 0.8, "min_p": 0.01},
    {"temperature": 0.7, "seed": 14, "top_k": 50, "presence_penalty": 1.0, "repetition_penalty": 1.3},
    {"frequency_penalty": 0.5, "logit_bias": ((306, 4.0), (5, -3.0))},
)


async def ask(engine: RunningEngine, name: str, settings=SETTINGS) -> list[list[TokenDelta]]:
    scores = ScoreParams(of_output=True, prompt_rows=(3, 17, 30), num_top=5, watched_ids=(306, 7))
    asked = (
        engine.generate(f"{name}{i}", PROMPT, max_new_tokens=12, scores=scores, **params)
        for i, params in enumerate(settings)
    )
    return [await deltas for deltas in asked]


def start(folder: Path, tp_size: int):
    return start_tiny_engine(
        folder, "llama", tp_size=tp_size, max_running_requests=2, chunked_prefill_size=16
    )


def test_sampling_and_scores_are_those_of_one_device_and_weights_come_and_go(tmp_path):
    """The vocabulary of 307 is cut in the middle of what penalties, bias and watched ids name."""

    greedy = SETTINGS[:1]

    async def scenario():
        async with start(tmp_path / "model", tp_size=1) as engine:
            alone = await ask(engine, "alone")
        async with start(tmp_path / "model", tp_size=2) as engine:
            client = engine.client
            compare(await ask(engine, "shared"), alone)
            await engine.wait_until_warm()
            for keeps_weights in (True, False):
                await client.release_memory(
                    (WEIGHTS, KV_CACHE), keeps_weights=keeps_weights, mode="wait", timeout_s=10.0
                )
                assert (client.stats.param_bytes, client.stats.kv_bytes) == (0, 0)
                await client.resume_memory((WEIGHTS, KV_CACHE))
                compare(await ask(engine, f"awake {keeps_weights}", greedy), alone[:1])
            write_tiny_checkpoint(tmp_path / "other", "llama", seed=1)
            await client.update_weights(str(tmp_path / "other"), "auto", flushes_cache=True)
            (other,) = await ask(engine, "other", greedy)
            assert token_ids(other) != token_ids(alone[0])
            await client.update_weights(str(tmp_path / "model"), "auto", flushes_cache=True)
            compare(await ask(engine, "back"), alone)
            assert client.stats.num_late_compiles == 0

    asyncio.run(asyncio.wait_for(scenario(), 600))


def compare(shared: list[list[TokenDelta]], alone: list[list[TokenDelta]]) -> None:
    for mine, theirs in zip(shared, alone, strict=True):
        assert token_ids(mine) == token_ids(theirs)
        for score, expected in zip(all_scores(mine), all_scores(theirs), strict=True):
            assert score.top_ids == expected.top_ids
            assert score.logprob == pytest.approx(expected.logprob, abs=1e-4)
            assert score.top_logprobs == pytest.approx(expected.top_logprobs, abs=1e-4)
            assert score.watched_logprobs == pytest.approx(expected.watched_logprobs, abs=1e-4)


def all_scores(deltas: list[TokenDelta]) -> list[TokenScores]:
    return [score for delta in deltas for score in (*delta.prompt_scores, *delta.scores)]


def test_devices_choose_the_tokens_that_one_would_choose():
    """Rows of each kind, ties across the cut, and a NaN that only one device sees. Drawn from 50 ids on four
    devices: the last holds 11 of them, and two places of padding."""
    rng = np.random.default_rng(3)
    logits_BV = (3 * rng.standard_normal((8, 50))).astype(np.float32)
    logits_BV[0, [12, 13, 40]] = 20.0  # the lowest id, which ends one device's part
    logits_BV[1, 45] = np.nan
    logits_BV[2, 20] = np.inf
    temperature_B = np.array([0, 0, 0, 1, 1, 1, 0.5, 1], np.float32)
    top_k_B = np.array([0, 0, 0, 0, 5, 0, 10, 1], np.int32)
    top_p_B = np.array([1, 1, 1, 1, 1, 0.7, 0.9, 1], np.float32)
    min_p_B = np.array([0, 0, 0, 0, 0, 0, 0.05, 0], np.float32)
    shards, placement = Shards(4), make_placement(jax.devices()[:4])
    everywhere = make_spec(())

    def choose_own(logits_BV, *rows):
        return choose_tokens(logits_BV, *rows, shards=shards)

    in_specs = (make_spec((None, "vocab")), *[everywhere] * 6)
    together = jax.jit(placement.spread(choose_own, in_specs, (everywhere, everywhere)))
    alone = jax.jit(choose_tokens)
    padded_BV = np.pad(logits_BV, ((0, 0), (0, 2)), constant_values=-np.inf)
    for position in range(40):
        rows = (temperature_B, top_k_B, top_p_B, min_p_B, np.arange(8, dtype=np.int32))
        rows = (*rows, np.full(8, position, np.int32))
        token_B, largest_B = together(padded_BV, *rows)
        expected_B, expected_largest_B = alone(logits_BV, *rows)
        is_finite = np.isfinite(expected_largest_B)
        np.testing.assert_array_equal(np.asarray(token_B)[is_finite], np.asarray(expected_B)[is_finite])
        np.testing.assert_array_equal(largest_B, expected_largest_B)
