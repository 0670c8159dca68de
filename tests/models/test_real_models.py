"""The two real models against transformers in float32: logits after the prompt, 64 greedy tokens, beams."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from jaxserve.types import ScoreParams
from jaxserve.weights.resolve import resolve_model
from tests.engine.running_engine import start_engine, token_ids
from tests.goldens.read import (
    QWEN,
    SMOLLM2,
    projected_relative_error,
    read_beam_goldens,
    read_manifest,
    read_real_goldens,
    relative_error,
    subset_ids,
)
from tests.models.forward import compute_logits, load_model

pytestmark = [pytest.mark.slow, pytest.mark.download]

MODEL_PATHS = {QWEN: "pypi:qwen2.5-coder-0.5b-instruct", SMOLLM2: "pypi:smollm2-135m-instruct"}
LOGIT_TOLERANCE = read_manifest()["tolerances"]["float32_relative_error"]
# The error over the whole vocabulary, estimated from random projections within about 13 %.
PROJECTED_TOLERANCE = 1.3 * LOGIT_TOLERANCE
NUM_LOGIT_PROMPTS = 6


@pytest.fixture(scope="module", params=[QWEN, SMOLLM2])
def real(request):
    """A golden's name, and the file of its model."""
    files = resolve_model(MODEL_PATHS[request.param], on_progress=lambda *_: None)
    return request.param, str(files.files[0])


def test_logits_agree(real):
    name, path = real
    model = load_model(path)
    goldens = list(read_real_goldens(name).values())
    for golden in goldens[:: len(goldens) // NUM_LOGIT_PROMPTS]:
        logits_V = compute_logits(model, golden.prompt_ids)[-1]
        subset = logits_V[subset_ids(len(logits_V))]
        assert relative_error(subset, golden.subset_logits) <= LOGIT_TOLERANCE
        assert projected_relative_error(logits_V, golden) <= PROJECTED_TOLERANCE
        assert np.argmax(logits_V) == golden.top_ids[0]


def test_greedy_continuations_are_identical(real):
    name, path = real
    goldens = read_real_goldens(name)

    async def scenario():
        async with start_engine(path, max_running_requests=32, context_length=512) as engine:
            return await asyncio.gather(
                *(
                    engine.generate(golden.name, golden.prompt_ids, max_new_tokens=64)
                    for golden in goldens.values()
                )
            )

    answers = asyncio.run(asyncio.wait_for(scenario(), 900))
    # Where two ids are closer than float32 can tell (one step of one prompt), either is right.
    near_ties = {tie["prompt"]: tie["step"] for tie in read_manifest()["models"][name]["near_ties"]}
    num_identical = 0
    for golden, deltas in zip(goldens.values(), answers, strict=True):
        same = token_ids(deltas) == golden.greedy_ids
        num_identical += same
        end = near_ties.get(golden.name, 64)
        assert same or token_ids(deltas)[:end] == golden.greedy_ids[:end], golden.name
        assert same or end < 64, golden.name
    assert num_identical >= 20


def test_four_devices_continue_as_one():
    """14 query heads and 2 KV heads on four devices: KV heads are held twice, and query heads filled up."""
    files = resolve_model(MODEL_PATHS[QWEN], on_progress=lambda *_: None)
    goldens = list(read_real_goldens(QWEN).values())[:8]

    async def scenario():
        flags = {"tp_size": 4, "max_running_requests": 8, "context_length": 512}
        async with start_engine(str(files.files[0]), **flags) as engine:
            asked = (engine.generate(golden.name, golden.prompt_ids, max_new_tokens=32) for golden in goldens)
            return await asyncio.gather(*asked)

    answers = asyncio.run(asyncio.wait_for(scenario(), 900))
    for golden, deltas in zip(goldens, answers, strict=True):
        assert token_ids(deltas) == golden.greedy_ids[:32], golden.name


def test_beams_are_those_of_transformers():
    """On prompts where its search and ours have one answer: scripts/make_beam_goldens.py says when."""
    files = resolve_model(MODEL_PATHS[SMOLLM2], on_progress=lambda *_: None)
    golden = read_beam_goldens(SMOLLM2)
    prompts = read_real_goldens(SMOLLM2)
    width = golden["beam_width"]
    params = {
        "max_new_tokens": golden["max_new_tokens"],
        "stop_ids": (golden["stop_id"],),
        "beam_width": width,
        "scores": ScoreParams(of_output=True, num_top=width),
    }

    async def scenario():
        async with start_engine(str(files.files[0]), max_running_requests=16, context_length=512) as engine:
            return await asyncio.gather(
                *(engine.generate(name, prompts[name].prompt_ids, **params) for name in golden["prompts"])
            )

    answers = asyncio.run(asyncio.wait_for(scenario(), 900))
    for expected, deltas in zip(golden["prompts"].values(), answers, strict=True):
        beams = deltas[-1].beams
        assert [beam.token_ids for beam in beams] == [beam["token_ids"] for beam in expected]
        sums = [beam.cumulative_logprob for beam in beams]
        assert sums == pytest.approx([beam["sum"] for beam in expected], abs=1e-3)
        ends = [beam.token_ids[-1] == golden["stop_id"] for beam in beams]
        assert [beam.finish.kind for beam in beams] == ["stop" if end else "length" for end in ends]
