"""Checkpoints of 4-bit matrices, served as they are packed: the logits and tokens of the same unpacked."""

from __future__ import annotations

import asyncio

import jax
import pytest

from jaxserve.weights.placement import ALONE, make_placement
from tests.engine.running_engine import start_engine, token_ids
from tests.goldens.read import relative_error
from tests.models.forward import compute_logits, load_model
from tests.weights.packed_files import write_packed_model

PROMPT = [(7 * i) % 72 for i in range(40)]


@pytest.fixture(scope="module", params=[("awq", 128), ("gptq", 64)], ids=lambda param: param[0])
def folder(request, tmp_path_factory):
    """A packed checkpoint, and what it unpacks to in the folder "plain" below."""
    method, group_size = request.param
    folder = tmp_path_factory.mktemp(method)
    write_packed_model(folder, method, group_size=group_size, width=256, mlp_width=512)
    return folder


@pytest.mark.parametrize("num_devices", [1, 2])
def test_logits_are_those_of_the_unpacked_checkpoint(folder, num_devices):
    """To what rounding operands to bf16 does."""
    placement = ALONE if num_devices == 1 else make_placement(jax.devices()[:num_devices])
    model = load_model(folder, quantization="int4", placement=placement)
    expected = compute_logits(load_model(folder / "plain"), PROMPT)
    logits = compute_logits(model, PROMPT, placement=placement)
    assert relative_error(logits, expected) < 1e-2
    in_bf16 = compute_logits(load_model(folder / "plain", dtype="bfloat16"), PROMPT)
    assert relative_error(logits, expected) < 1.25 * relative_error(in_bf16, expected)


def test_greedy_tokens_are_those_of_the_unpacked_checkpoint(tmp_path):
    write_packed_model(tmp_path, "awq", group_size=128, width=256, mlp_width=512)

    async def generate(path, **flags):
        settings = {"page_size": 8, "max_running_requests": 2, "max_total_tokens": 256, **flags}
        async with start_engine(str(path), **settings) as engine:
            deltas = await engine.generate("one", PROMPT, max_new_tokens=24)
            return token_ids(deltas), engine.client.stats.param_bytes

    async def scenario():
        packed = await generate(tmp_path, quantization="int4")
        plain = await generate(tmp_path / "plain")
        return packed, plain

    (ids, num_bytes), (expected, plain_bytes) = asyncio.run(asyncio.wait_for(scenario(), 300))
    assert ids == expected
    assert num_bytes < 0.3 * plain_bytes  # the embedding and the head are float32 in both


def test_a_checkpoint_that_is_not_quantised_is_rounded_to_groups(folder):
    plain = folder / "plain"
    expected = compute_logits(load_model(plain), PROMPT)
    logits = compute_logits(load_model(plain, quantization="int4"), PROMPT)
    # Groups of 128 that were packed are found again, and two of 64 are rounded to the steps of one.
    assert relative_error(logits, expected) < (1e-2 if folder.name.startswith("awq") else 0.2)
