"""Cutting models over devices: who holds which heads, channels and ids, and that the logits stay the same."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxserve.kernels_pallas import shards
from jaxserve.kernels_pallas.shards import Shards
from jaxserve.models.interface import Cut
from jaxserve.models.sharding import cut_channels, cut_evenly, cut_heads, repeat_cut
from jaxserve.weights.placement import make_placement
from tests.goldens.read import read_tiny_goldens
from tests.models.forward import compute_logits, load_model
from tests.tiny import TINY_NAMES, write_tiny_checkpoint

ZERO = -1


def held(cut: Cut, unit: int = 1) -> list[list[int]]:
    """What each device holds, in heads or other units of the axis; ZERO for zeros."""
    parts = []
    for runs in cut.runs_by_device:
        indices = [ZERO if run.start is None else run.start + i for run in runs for i in range(run.length)]
        parts.append([ZERO if index == ZERO else index // unit for index in indices[::unit]])
    return parts


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "num_devices", "q", "kv"),
    [
        pytest.param(4, 2, 2, [[0, 1], [2, 3]], [[0], [1]], id="heads that divide"),
        pytest.param(4, 2, 1, [[0, 1, 2, 3]], [[0, 1]], id="one device"),
        pytest.param(4, 2, 4, [[0], [1], [2], [3]], [[0], [0], [1], [1]], id="fewer KV heads than devices"),
        pytest.param(
            14,
            2,
            4,
            [[0, 1, 2, 3], [4, 5, 6, ZERO], [7, 8, 9, 10], [11, 12, 13, ZERO]],
            [[0], [0], [1], [1]],
            id="Qwen2.5 0.5B: query heads that do not divide",
        ),
        pytest.param(6, 3, 2, [[0, 1, 2, 3], [4, 5, ZERO, ZERO]], [[0, 1], [2, ZERO]], id="nor KV heads"),
        pytest.param(3, 3, 4, [[0], [1], [2], [ZERO]], [[0], [1], [2], [ZERO]], id="a device with nothing"),
        pytest.param(
            6,
            2,
            8,
            [[0], [1], [2], [ZERO], [3], [4], [5], [ZERO]],
            [[0], [0], [0], [0], [1], [1], [1], [1]],
            id="more devices than heads",
        ),
    ],
)
def test_query_heads_lie_with_the_kv_head_that_they_read(num_heads, num_kv_heads, num_devices, q, kv):
    head_dim = 5
    cuts = cut_heads(num_heads, num_kv_heads, head_dim, num_devices)
    assert held(cuts.heads, head_dim) == q
    k = [[head if head == ZERO else num_heads + head for head in heads] for heads in kv]
    v = [[head if head == ZERO else num_heads + num_kv_heads + head for head in heads] for heads in kv]
    assert held(cuts.qkv, head_dim) == [[*q[i], *k[i], *v[i]] for i in range(num_devices)]
    assert (cuts.num_heads, cuts.num_kv_heads) == (len(q[0]), len(kv[0]))
    own_group = cuts.num_heads // cuts.num_kv_heads
    for heads, kv_heads in zip(q, kv, strict=True):
        for place, head in enumerate(heads):
            assert head == ZERO or head // (num_heads // num_kv_heads) == kv_heads[place // own_group]


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "num_devices", "own_heads"),
    [
        pytest.param(14, 2, 64, 2, 8, id="Qwen2.5 0.5B: seven heads are three and a half times 128 channels"),
        pytest.param(28, 4, 128, 4, 7, id="Qwen2.5 7B: heads of 128"),
        pytest.param(6, 2, 64, 2, 3, id="a third more would be much"),
        pytest.param(14, 2, 5, 2, 7, id="one head more would not do"),
        pytest.param(7, 1, 64, 1, 7, id="one device has the checkpoint's own shapes"),
    ],
)
def test_query_heads_are_filled_up_to_whole_lanes(num_heads, num_kv_heads, head_dim, num_devices, own_heads):
    cuts = cut_heads(num_heads, num_kv_heads, head_dim, num_devices)
    assert cuts.num_heads == own_heads
    assert cuts.heads.own_length == own_heads * head_dim


def test_what_does_not_divide_ends_in_zeros():
    assert held(cut_evenly(5, 2)) == [[0, 1, 2], [3, 4, ZERO]]
    assert held(cut_evenly(5, 4)) == [[0, 1], [2, 3], [4, ZERO], [ZERO, ZERO]]


def test_channels_that_int8_mixes_stay_together():
    assert held(cut_channels(4864, 4), 64) == [list(range(19 * i, 19 * (i + 1))) for i in range(4)]
    assert held(cut_channels(4864, 8), 64)[7] == [*range(70, 76), ZERO, ZERO, ZERO, ZERO]
    assert cut_channels(106, 4).own_length == 27  # nothing of 106 is mixed


def test_gate_and_up_of_a_device_lie_side_by_side():
    assert held(repeat_cut(cut_evenly(5, 2), 5, 2)) == [[0, 1, 2, 5, 6, 7], [3, 4, ZERO, 8, 9, ZERO]]


@pytest.mark.parametrize("num_devices", [2, 4, 8])
@pytest.mark.parametrize("name", TINY_NAMES)
def test_devices_together_compute_the_logits_of_one(tmp_path, name, num_devices):
    """6 query heads with 2 or 3 KV heads, 74 to 106 channels, 307 ids: next to nothing divides by 4 or 8."""
    write_tiny_checkpoint(tmp_path, name)
    placement = make_placement(jax.devices()[:num_devices])
    golden = read_tiny_goldens(name)[33]
    model = load_model(tmp_path, placement=placement)
    logits = compute_logits(model, golden.prompt_ids, placement=placement)
    np.testing.assert_allclose(logits, golden.logits, atol=2e-4)


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe"])
def test_outputs_of_many_tokens_are_added_up_as_bf16(tmp_path, name, monkeypatch):
    """As on accelerators. Each device rounds its part of what a block adds, and nothing else is rounded."""
    monkeypatch.setattr(shards, "MOST_EXACT_NUMBERS", 1024)
    write_tiny_checkpoint(tmp_path, name)
    placement = make_placement(jax.devices()[:4])
    golden = read_tiny_goldens(name)[33]
    model = load_model(tmp_path, placement=placement)
    model.kernels = replace(model.kernels, shards=Shards(4, sends_bf16=True))
    one_by_one = compute_logits(model, golden.prompt_ids, chunk_tokens=1, placement=placement)
    np.testing.assert_allclose(one_by_one, golden.logits, atol=2e-4)  # so few numbers are not rounded
    at_once = compute_logits(model, golden.prompt_ids, placement=placement)
    error = np.sqrt(np.mean(np.square(at_once - golden.logits)))
    assert 1e-3 < error < 0.02 * golden.logits.std()


@pytest.mark.parametrize("num_devices", [2, 4])
def test_int8_loses_no_more_on_several_devices_than_on_one(tmp_path, num_devices):
    """Each device rounds its own channels of an activation, by a scale of their own."""
    write_tiny_checkpoint(tmp_path, "qwen2")
    golden = read_tiny_goldens("qwen2")[33]
    errors = []
    for devices in (jax.devices()[:1], jax.devices()[:num_devices]):
        placement = make_placement(devices)
        model = load_model(tmp_path, quantization="int8", placement=placement)
        logits = compute_logits(model, golden.prompt_ids, placement=placement)
        errors.append(float(np.sqrt(np.mean(np.square(logits - golden.logits)))))
    assert errors[1] < 1.25 * errors[0]
