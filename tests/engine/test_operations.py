"""Sleep, pause and other weights on a real engine: memory really goes, and the same text comes back."""

from __future__ import annotations

import asyncio
import gc
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve.errors import UnavailableError
from jaxserve.scheduler.integrity import check_integrity
from jaxserve.types import KV_CACHE, WEIGHTS
from tests.engine.running_engine import RunningEngine, finish_of, start_tiny_engine, token_ids
from tests.goldens.read import read_tiny_goldens
from tests.tiny import write_tiny_checkpoint

BOTH = (WEIGHTS, KV_CACHE)
PROMPT = list(range(10, 50))
FEW_BYTES = 10_000  # what the last steps gave goes only when nobody looks at it any longer


def run(test):
    """Each test is one coroutine with a bound on its time."""
    asyncio.run(asyncio.wait_for(test, 300))


def live_bytes() -> int:
    """Of all arrays in this process; those of earlier tests' engines are gone."""
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays() if not array.is_deleted())


def start(folder: Path, **flags):
    """A tiny engine with few programs on the checkpoint in `folder`, below the test's own folder; all tests
    share the compiled programs."""
    few = {"max_running_requests": 4, "chunked_prefill_size": 16}
    cache = str(folder.parent.parent / "few-programs")
    return start_tiny_engine(folder, compilation_cache_dir=cache, **{**few, **flags})


async def sleep(engine: RunningEngine, tags=BOTH, *, keeps_weights=True, mode="wait", timeout_s=10.0) -> None:
    await engine.client.release_memory(tags, keeps_weights=keeps_weights, mode=mode, timeout_s=timeout_s)


async def until_running(engine: RunningEngine, count: int) -> None:
    while engine.client.stats.num_running < count:
        await asyncio.sleep(0.005)


def test_sleep_frees_the_device_and_the_same_text_comes_back(tmp_path):
    async def scenario():
        async with start(tmp_path / "model") as engine:
            await engine.wait_until_warm()
            client = engine.client
            text = token_ids(await engine.generate("awake", PROMPT, max_new_tokens=24))
            awake = client.stats
            assert min(awake.param_bytes, awake.kv_bytes, awake.slot_bytes) > 0
            pool_bytes = awake.kv_bytes + awake.slot_bytes
            for tags, keeps_weights, freed_bytes in (
                (BOTH, True, awake.param_bytes + pool_bytes),
                (BOTH, False, awake.param_bytes + pool_bytes),
                ((KV_CACHE,), True, pool_bytes),
                ((WEIGHTS,), True, awake.param_bytes),
            ):
                before_bytes = live_bytes()
                await sleep(engine, tags, keeps_weights=keeps_weights)
                assert before_bytes - live_bytes() == pytest.approx(freed_bytes, abs=FEW_BYTES)
                asleep = client.stats
                assert (client.status, asleep.released) == ("asleep", tags)
                assert asleep.param_bytes == (0 if WEIGHTS in tags else awake.param_bytes)
                assert asleep.kv_bytes == (0 if KV_CACHE in tags else awake.kv_bytes)
                assert (asleep.host_param_bytes > 0) == (WEIGHTS in tags and keeps_weights)
                with pytest.raises(UnavailableError, match="Model is currently in sleep state"):
                    await engine.generate("asleep", PROMPT)
                await client.resume_memory(tags)
                assert (client.status, client.stats.host_param_bytes) == ("ready", 0)
                again = await engine.generate("again", PROMPT, max_new_tokens=24)
                assert token_ids(again) == text
                assert (again[-1].num_cached_tokens == 0) == (KV_CACHE in tags)
            assert client.stats.num_late_compiles == 0
            check_integrity(engine.loop.scheduler_state)

    run(scenario())


def test_a_light_sleep_may_become_a_deep_one_and_parts_wake_one_by_one(tmp_path):
    async def scenario():
        async with start(tmp_path / "model") as engine:
            text = token_ids(await engine.generate("awake", PROMPT))
            await sleep(engine)
            await sleep(engine, keeps_weights=False)
            assert engine.client.stats.host_param_bytes == 0
            await engine.client.resume_memory([WEIGHTS])
            assert (engine.client.status, engine.client.stats.released) == ("asleep", (KV_CACHE,))
            # As trainers do: the weights are there, so others can take their place before the pool is.
            await engine.client.update_weights(str(tmp_path / "model"), "auto", flushes_cache=True)
            assert engine.client.stats.released == (KV_CACHE,)
            await engine.client.resume_memory([KV_CACHE])
            assert token_ids(await engine.generate("again", PROMPT)) == text

    run(scenario())


def test_weights_that_cannot_be_read_again_leave_the_model_asleep_and_well(tmp_path):
    async def scenario():
        async with start(tmp_path / "model") as engine:
            text = token_ids(await engine.generate("awake", PROMPT))
            await sleep(engine, keeps_weights=False)
            before_bytes = live_bytes()
            weights = tmp_path / "model" / "model.safetensors"
            shutil.move(weights, tmp_path / "elsewhere")
            with pytest.raises(UnavailableError, match="The model was not woken up"):
                await engine.client.resume_memory(BOTH)
            assert engine.client.status == "asleep"
            assert live_bytes() == pytest.approx(before_bytes, abs=FEW_BYTES)
            shutil.move(tmp_path / "elsewhere", weights)
            await engine.client.resume_memory(BOTH)
            assert token_ids(await engine.generate("again", PROMPT)) == text

    run(scenario())


def test_going_to_sleep_waits_refuses_or_ends_what_runs_and_loses_nothing(tmp_path):
    async def scenario():
        async with start(tmp_path / "model") as engine:
            client = engine.client
            whole = token_ids(await engine.generate("alone", PROMPT, max_new_tokens=200))

            running = asyncio.create_task(engine.generate("refuses", PROMPT, max_new_tokens=200))
            await until_running(engine, 1)
            with pytest.raises(
                UnavailableError, match=r"not put to sleep\. Requests are in the way: 1 running"
            ):
                await sleep(engine, mode="refuse")
            assert (client.status, token_ids(await running)) == ("ready", whole)

            running = asyncio.create_task(engine.generate("waits", PROMPT, max_new_tokens=200))
            await until_running(engine, 1)
            sleeping = asyncio.create_task(sleep(engine))
            await asyncio.sleep(0)
            with pytest.raises(UnavailableError, match="going to sleep"):
                await engine.generate("late", PROMPT)
            with pytest.raises(UnavailableError, match="going to sleep"):
                await sleep(engine)
            await sleeping
            assert (client.status, token_ids(await running)) == ("asleep", whole)
            await client.resume_memory(BOTH)

            running = asyncio.create_task(engine.generate("ended", PROMPT, max_new_tokens=200))
            await until_running(engine, 1)
            await sleep(engine, mode="abort")
            finish = finish_of(await running)
            assert (finish.kind, finish.http_status) == ("abort", 503)
            assert finish.message == "The model was put to sleep."
            await client.resume_memory(BOTH)
            assert token_ids(await engine.generate("after", PROMPT, max_new_tokens=200)) == whole
            check_integrity(engine.loop.scheduler_state)

    run(scenario())


def test_a_pause_stands_still_and_what_it_keeps_goes_on_the_same(tmp_path):
    prompts = [[5 + i] * (10 + i) for i in range(6)]
    # By mode: how many it finds, and what runs and waits then, of 4 that run and 2 that wait.
    modes = {"retract": (4, (0, 6)), "in_place": (4, (4, 2)), "wait": (4, (0, 2)), "abort": (6, (0, 0))}

    async def ask_all(engine: RunningEngine, name: str):
        return await asyncio.gather(
            *(engine.generate(f"{name}{i}", prompt, max_new_tokens=150) for i, prompt in enumerate(prompts))
        )

    async def check(engine: RunningEngine, mode: str, alone: list[list[int]]):
        client = engine.client
        num_expected, kept = modes[mode]
        crowd = asyncio.create_task(ask_all(engine, mode))
        await until_running(engine, 4)
        assert await client.pause(mode) == num_expected
        await asyncio.sleep(0.1)  # for the steps that were in flight
        paused = client.stats
        assert (paused.num_running, paused.num_queued) == kept
        late = asyncio.create_task(engine.generate("late", PROMPT))
        await asyncio.sleep(0.7)
        assert client.stats.is_paused
        assert client.stats.num_steps == paused.num_steps
        assert client.heartbeat_age_s < 0.6
        assert await client.pause("wait") == kept[0]  # stands still already: nothing to wait for
        await client.resume()
        answers = await crowd
        if mode == "abort":
            ends = [finish_of(deltas) for deltas in answers]
            assert {(end.kind, end.http_status) for end in ends} == {("abort", 0)}
        else:
            assert [token_ids(deltas) for deltas in answers] == alone
            retracted = sum(deltas[-1].num_retractions for deltas in answers)
            assert retracted == (4 if mode == "retract" else 0)
        assert len(token_ids(await late)) == 8
        await engine.wait_until_idle()
        check_integrity(engine.loop.scheduler_state)

    async def scenario():
        async with start(tmp_path / "model") as engine:
            await engine.wait_until_warm()
            alone = [token_ids(deltas) for deltas in await ask_all(engine, "alone")]
            for mode in modes:
                await check(engine, mode, alone)
            assert engine.client.stats.num_late_compiles == 0

    run(scenario())


def test_other_weights_come_when_what_runs_has_ended_and_serve_what_waits(tmp_path):
    golden = read_tiny_goldens("qwen2")[7]
    old, new = tmp_path / "old", tmp_path / "new"
    write_tiny_checkpoint(old, "qwen2", seed=1)
    write_tiny_checkpoint(new, "qwen2")

    async def scenario():
        async with start(old) as engine:
            client = engine.client
            await engine.wait_until_warm()

            async def ask(name: str, num_tokens: int = 32) -> list[int]:
                return token_ids(await engine.generate(name, golden.prompt_ids, max_new_tokens=num_tokens))

            before = await ask("before", 200)
            running = asyncio.create_task(ask("running", 200))
            await until_running(engine, 1)
            update = asyncio.create_task(client.update_weights(str(new), "auto", flushes_cache=True))
            assert await running == before
            waiting = asyncio.create_task(ask("waiting"))  # most likely queued until the new ones are there
            assert await update == 0
            assert await ask("after") == golden.greedy_ids
            assert await waiting in (golden.greedy_ids, before[:32])

            await sleep(engine, keeps_weights=False)
            await client.resume_memory(BOTH)
            assert await ask("after sleep") == golden.greedy_ids
            assert client.stats.num_late_compiles == 0

    run(scenario())


@pytest.mark.parametrize("flushes_cache", [True, False])
def test_a_paused_engine_takes_other_weights_at_once(tmp_path, flushes_cache):
    """What was computed by the old weights is not found again, unless that is asked for."""
    golden = read_tiny_goldens("qwen2")[7]
    old, new = tmp_path / "old", tmp_path / "new"
    write_tiny_checkpoint(old, "qwen2", seed=1)
    write_tiny_checkpoint(new, "qwen2")
    prompt = golden.prompt_ids * 5

    async def scenario():
        async with start(old) as engine:
            running = asyncio.create_task(engine.generate("running", prompt, max_new_tokens=150))
            while not engine.client.stats.num_generated_tokens:  # then the prompt's pages are in the cache
                await asyncio.sleep(0.005)
            await engine.client.pause("in_place")
            queued = asyncio.create_task(engine.generate("queued", prompt))
            while not engine.client.stats.num_queued:
                await asyncio.sleep(0.01)
            update = engine.client.update_weights(str(new), "auto", flushes_cache=flushes_cache)
            assert await update == 2
            assert engine.client.stats.is_paused
            await engine.client.resume()
            assert len(token_ids(await running)) == 150
            deltas = await queued
            assert (deltas[-1].num_cached_tokens == 0) == flushes_cache
            again = await engine.generate("again", prompt)
            assert (token_ids(again) == token_ids(deltas)) or not flushes_cache
            assert again[-1].num_cached_tokens > 0
            await engine.wait_until_idle()
            check_integrity(engine.loop.scheduler_state)

    run(scenario())


def damage(folder: Path, how: str) -> str:
    """Make the checkpoint of `folder` unfit in one way; returns a part of what should be said."""
    weights = folder / "model.safetensors"
    if how == "other architecture":
        shutil.rmtree(folder)
        write_tiny_checkpoint(folder, "llama")
        return "is a LlamaForCausalLM; this server serves a Qwen2ForCausalLM"
    if how == "other config":
        config = folder / "config.json"
        config.write_text(config.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 2'))
        return "has num_layers 2, the served model has 3"
    if how == "no weights":
        weights.unlink()
        return "has a config.json but no weights"
    if how == "nothing there":
        shutil.rmtree(folder)
        return "does not exist on this machine"
    if how == "cut off":
        weights.write_bytes(weights.read_bytes()[:-1000])
        return "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name].T.copy() if how == "other shape" else np.full_like(tensors[name], np.nan)
    save_file(tensors, weights, metadata={"format": "pt"})
    return "has the shape" if how == "other shape" else "NaN or infinite values"


def test_a_failed_update_says_why_and_the_old_weights_serve_on(tmp_path):
    ways = (
        "other architecture",
        "other config",
        "no weights",
        "nothing there",
        "cut off",
        "other shape",
        "NaN",
    )

    async def scenario():
        async with start(tmp_path / "model") as engine:
            text = token_ids(await engine.generate("before", PROMPT))
            for number, how in enumerate(ways):
                folder = tmp_path / str(number)
                write_tiny_checkpoint(folder, "qwen2", seed=1)
                reason = damage(folder, how)
                with pytest.raises(UnavailableError, match=reason):
                    await engine.client.update_weights(str(folder), "auto", flushes_cache=True)
                assert token_ids(await engine.generate("after", PROMPT)) == text
            await sleep(engine)
            with pytest.raises(UnavailableError, match="sleep; wake them up"):
                await engine.client.update_weights(str(tmp_path / "model"), "auto", flushes_cache=True)

    run(scenario())


def test_a_device_without_room_gets_the_old_weights_back(tmp_path, monkeypatch):
    write_tiny_checkpoint(tmp_path / "new", "qwen2", seed=1)
    put = jax.device_put
    num_puts = 0

    def put_until_full(*args, **kwargs):
        nonlocal num_puts
        num_puts += 1
        if num_puts == 5:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return put(*args, **kwargs)

    async def scenario():
        nonlocal num_puts
        async with start(tmp_path / "model") as engine:
            text = token_ids(await engine.generate("before", PROMPT))
            before_bytes = live_bytes()
            monkeypatch.setattr(jax, "device_put", put_until_full)
            num_puts = 0
            with pytest.raises(UnavailableError, match="RESOURCE_EXHAUSTED"):
                await engine.client.update_weights(str(tmp_path / "new"), "auto", flushes_cache=True)
            assert live_bytes() == pytest.approx(before_bytes, abs=FEW_BYTES)
            assert token_ids(await engine.generate("after", PROMPT)) == text
            await sleep(engine)
            num_puts = 0
            with pytest.raises(UnavailableError, match="RESOURCE_EXHAUSTED"):
                await engine.client.resume_memory(BOTH)
            assert engine.client.status == "asleep"
            await engine.client.resume_memory(BOTH)
            assert token_ids(await engine.generate("again", PROMPT)) == text

    run(scenario())
