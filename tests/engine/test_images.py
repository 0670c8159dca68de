"""The whole engine on a tiny real model that sees: transformers' tokens, whatever the schedule."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxserve.images import ImagePatches, PlacedImage
from jaxserve.scheduler.integrity import check_integrity
from jaxserve.scheduler.plan import StepPlan
from jaxserve.vision.limits import ImageForm
from jaxserve.vision.patches import make_patches
from tests import tiny_vl
from tests.engine.running_engine import finish_of, start_engine, token_ids
from tests.goldens.read import GOLDENS_DIR
from tests.vision.pictures import draw

CHAT = json.loads((GOLDENS_DIR / "tiny_qwen2_5_vl.json").read_text(encoding="utf-8"))["chat"]
FLAGS = {"page_size": 8, "max_running_requests": 4, "max_total_tokens": 2048, "max_image_pixels": 64 * 784}


def run(test):
    """Each test is one coroutine with a bound on its time."""
    asyncio.run(asyncio.wait_for(test, 300))


@asynccontextmanager
async def start_seeing_engine(folder: Path, **flags: Any):
    if not (folder / "config.json").exists():
        tiny_vl.write_tiny_vl_checkpoint(folder)
    cache = {"compilation_cache_dir": str(folder.parent / "programs")}
    async with start_engine(str(folder), **{**FLAGS, **cache, "chunked_prefill_size": 64, **flags}) as engine:
        yield engine


def read_image(image: Image.Image) -> ImagePatches:
    return make_patches(np.asarray(image), ImageForm(), 3136, 50176)


def place(*parts: bytes | ImagePatches) -> tuple[list[int], tuple[PlacedImage, ...]]:
    prompt_ids: list[int] = []
    images = []
    for part in parts:
        if isinstance(part, bytes):
            prompt_ids += part
        else:
            images.append(PlacedImage(len(prompt_ids), part))
            prompt_ids += [tiny_vl.IMAGE_TOKEN_ID] * part.num_tokens
    return prompt_ids, tuple(images)


def picture() -> tuple[PlacedImage, ...]:
    """That of the golden chat, at its place."""
    image = read_image(Image.open(GOLDENS_DIR / "picture.png").convert("RGB"))
    return (PlacedImage(CHAT["prompt_ids"].index(tiny_vl.IMAGE_TOKEN_ID), image),)


@pytest.mark.parametrize("flags", [{}, {"chunked_prefill_size": 16}, {"tp_size": 2}])
def test_greedy_tokens_are_those_of_transformers(tmp_path, flags):
    """With chunks of 16 tokens the image's 20 are cut apart."""

    async def scenario():
        async with start_seeing_engine(tmp_path / "model", **flags) as engine:
            for name in ("first", "again"):
                deltas = await engine.generate(name, CHAT["prompt_ids"], picture(), max_new_tokens=32)
                assert token_ids(deltas) == CHAT["greedy_ids"]
            assert deltas[-1].num_cached_tokens >= len(CHAT["prompt_ids"]) - 16
            assert engine.loop.scheduler_state.num_encoded_images == 1

    run(scenario())


@pytest.mark.slow
def test_a_crowd_with_images_under_retraction_gets_what_each_would_get_alone(tmp_path):
    """Pages and rows for features are both short; replies are sampled, aborted, guessed at, and of beams."""
    rng = random.Random(3)
    images = [read_image(draw(rng.randrange(30, 180), rng.randrange(30, 180), seed)) for seed in range(5)]
    prompts = [
        place(*(rng.choice([b"What is it? ", b"no", rng.choice(images)]) for _ in range(rng.randrange(1, 5))))
        for _ in range(12)
    ]
    settings: list[dict[str, Any]] = [
        {"max_new_tokens": rng.randrange(1, 30), "temperature": 1.0 if i % 3 == 0 else 0.0, "seed": i}
        for i in range(12)
    ]
    for order in (1, 7):
        settings[order] |= {"beam_width": 2, "max_new_tokens": 8}

    async def ask_all(engine, together: bool):
        asked = [
            engine.generate(f"r{i}", *prompt, **params)
            for i, (prompt, params) in enumerate(zip(prompts, settings, strict=True))
        ]
        return await asyncio.gather(*asked) if together else [await one for one in asked]

    def outcome(deltas):
        return [beam.token_ids for beam in deltas[-1].beams] or token_ids(deltas)

    async def scenario():
        async with start_seeing_engine(tmp_path / "model", disable_radix_cache=True) as engine:
            await engine.wait_until_warm()
            alone = await ask_all(engine, together=False)
        crowded = {"max_total_tokens": 480, "image_cache_tokens": 128, "speculative_algorithm": "ngram"}
        crowded["chunked_prefill_size"] = 16  # so that images are encoded a stage at a time
        plans: list[StepPlan] = []
        async with start_seeing_engine(tmp_path / "model", **crowded) as engine:
            await engine.wait_until_warm()
            num_compiles = engine.runner.compiles.num_compiles
            run_step = engine.runner.step
            engine.runner.step = lambda plan: (plans.append(plan), run_step(plan))[1]
            task = asyncio.create_task(engine.generate("left", *prompts[0], max_new_tokens=100))
            crowd = await ask_all(engine, together=True)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await engine.wait_until_idle()
            assert [outcome(deltas) for deltas in crowd] == [outcome(deltas) for deltas in alone]
            assert engine.runner.compiles.num_compiles == num_compiles
            assert any(plan.encode is not None and plan.encode.first_stage > 0 for plan in plans)
            check_integrity(engine.loop.scheduler_state)

    run(scenario())


def test_images_that_cannot_be_served_are_refused(tmp_path):
    async def scenario():
        async with start_seeing_engine(tmp_path / "model", max_image_pixels=20 * 784) as engine:
            await engine.wait_until_warm()
            too_large = read_image(draw(170, 170))
            finish = finish_of(await engine.generate("a", *place(too_large)))
            assert finish.http_status == 400
            assert "An image has 36 tokens, and this server takes 20 at most." in finish.message

    run(scenario())


def test_sleep_forgets_features(tmp_path):
    async def scenario():
        async with start_seeing_engine(tmp_path / "model") as engine:
            await engine.wait_until_warm()
            for _ in range(2):
                deltas = await engine.generate("a", CHAT["prompt_ids"], picture(), max_new_tokens=32)
                assert token_ids(deltas) == CHAT["greedy_ids"]
                await engine.client.release_memory(
                    ["kv_cache"], keeps_weights=True, mode="wait", timeout_s=10
                )
                assert engine.client.stats.slot_bytes == 0
                await engine.client.resume_memory(["kv_cache"])
            assert engine.loop.scheduler_state.num_encoded_images == 2

    run(scenario())
