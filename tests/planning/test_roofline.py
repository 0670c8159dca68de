"""The arithmetic of traffic and roofline against sums that are done here by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jaxserve.blueprint import ModelSketch
from jaxserve.config import ServerConfig
from jaxserve.planning.fit import SliceFit, fit_slice
from jaxserve.planning.roofline import bound_serving, bound_step, bound_ttft, count_sequences
from jaxserve.planning.shapes import find_model
from jaxserve.planning.slices import list_slices
from jaxserve.planning.traffic import StepWork, count_traffic
from tests.tiny import write_tiny_checkpoint

# Of Llama 3 8B: a layer's matrices, and its head.
LAYER_WEIGHTS = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336
HEAD_WEIGHTS = 128256 * 4096
NORM_BYTES = (2 * 32 + 1) * 4096 * 4
KV_BYTES = 32 * 2 * 8 * 128 * 2  # of a token


def fit(topology: str, model: str = "llama-3-8b", context: int = 1280, **flags) -> SliceFit:
    config = ServerConfig(model_path=model, **flags)
    (where,) = list_slices([topology])
    return fit_slice(config, find_model(config), where, context)


def sketch(topology: str = "v5p:1x1x1", **flags) -> ModelSketch:
    return fit(topology, **flags).sketch


def test_a_decode_step_reads_each_weight_once_and_the_context_of_each_row():
    traffic = count_traffic(sketch(), StepWork(num_rows=3, context=1000))
    embedding_rows = 3 * 4096 * 2
    assert traffic.weight_bytes == 2 * (32 * LAYER_WEIGHTS + HEAD_WEIGHTS) + NORM_BYTES + embedding_rows
    assert traffic.kv_bytes == 3 * (1000 + 1) * KV_BYTES
    assert traffic.matmul_flops == 3 * 2 * (32 * LAYER_WEIGHTS + HEAD_WEIGHTS)
    assert traffic.attention_flops == 3 * 4 * 32 * 32 * 128 * 1000
    assert traffic.num_sums == 0


def test_a_tied_embedding_is_read_as_the_head():
    whole = sketch(model="qwen2.5-0.5b")
    traffic = count_traffic(whole, StepWork(num_rows=1, context=1))
    assert traffic.weight_bytes == whole.param_bytes


def test_of_experts_a_step_takes_those_that_its_tokens_choose(tmp_path):
    model = str(write_tiny_checkpoint(tmp_path, "qwen3_moe"))  # two of five experts a token
    whole = sketch(model=model, context=64, dtype="float32")
    one, many = (count_traffic(whole, StepWork(num_rows=rows, context=1)) for rows in (1, 64))
    expert_bytes = 4 * 3 * 5 * (3 * 38 * 54)  # of three layers
    embedding_bytes = 4 * 63 * 54
    assert many.weight_bytes - one.weight_bytes == pytest.approx(0.6 * expert_bytes + embedding_bytes, abs=9)
    assert many.matmul_flops == pytest.approx(64 * one.matmul_flops)
    layer_weights = 54 * (6 + 2 * 2) * 10 + 6 * 10 * 54 + 5 * 54 + 2 * (3 * 38 * 54)
    assert one.matmul_flops == pytest.approx(2 * (3 * layer_weights + 307 * 54))


def test_a_step_reads_no_vision_encoder():
    work = StepWork(num_rows=1, context=1)
    text, images = (count_traffic(sketch(model=f"qwen2.5-{name}7b"), work) for name in ("", "vl-"))
    assert text == images


def test_a_chunk_multiplies_all_its_tokens_and_one_of_them_with_the_head():
    traffic = count_traffic(sketch(), StepWork(num_rows=0, context=500, num_chunk_tokens=100))
    assert traffic.matmul_flops == 2 * (100 * 32 * LAYER_WEIGHTS + HEAD_WEIGHTS)
    assert traffic.attention_flops == 4 * 32 * 32 * 128 * 100 * (500 + 50)
    assert traffic.kv_bytes == (500 + 100) * KV_BYTES


def test_devices_share_weights_and_sum_after_each_cut_product():
    work = StepWork(num_rows=8, context=1000)
    alone, four = (count_traffic(sketch(topology), work) for topology in ("v5p:1x1x1", "v5p:2x2x1"))
    assert four.weight_bytes == pytest.approx(alone.weight_bytes / 4, rel=1e-2)
    assert four.kv_bytes == alone.kv_bytes // 4
    assert four.num_sums == 2 * 32 + 3
    assert four.sum_bytes == 8 * 4096 * 4
    many = count_traffic(sketch("v5p:2x2x1"), StepWork(num_rows=256, context=1000))
    assert many.sum_bytes == 256 * 4096 * 2


def test_one_sequence_is_bound_by_memory_and_a_long_prompt_by_arithmetic():
    made = fit("v5p:1x1x1")
    decode = bound_step(made.sketch, made.where, StepWork(num_rows=1, context=1024))
    assert decode.step_s == decode.memory_s == pytest.approx(15.2e9 / 2765e9, rel=0.02)
    prefill = bound_step(made.sketch, made.where, StepWork(num_rows=0, context=0, num_chunk_tokens=2048))
    assert prefill.step_s == prefill.compute_s > 2 * 2048 * 32 * LAYER_WEIGHTS / 459e12


def test_a_long_prefill_may_hide_its_sums():
    made = fit("tpu7x:2x2x1")
    short, long = (
        bound_step(made.sketch, made.where, StepWork(num_rows=0, context=0, num_chunk_tokens=num_tokens))
        for num_tokens in (512, 2048)
    )
    assert short.step_s == max(short.memory_s, short.compute_s) + short.sums_s
    assert long.step_s == long.sums_s > long.compute_s > long.memory_s  # eight devices, two links each


def test_a_prompt_of_two_chunks_takes_both():
    made = fit("v5p:1x1x1", chunked_prefill_size=512)
    assert made.blueprint is not None
    one, two = (bound_ttft(made.blueprint, made.where, tokens) for tokens in (512, 1024))
    assert 2 * one < two < 2.1 * one  # the second attends to the first


def test_copies_of_the_model_share_the_sequences():
    made = fit("v5p:2x2x1", model="qwen2.5-0.5b")  # two devices a copy: 14 heads
    assert made.blueprint is not None
    assert made.num_copies == 2
    bound = bound_serving(made.blueprint, made.where, 64, 1280)
    assert bound.rows_per_copy == 32
    assert bound.tokens_per_s == pytest.approx(64 / bound.itl_s)


def test_sequences_are_bounded_by_pages_and_by_rows():
    made = fit("v5e:1x1", quantization="int8")
    assert made.blueprint is not None
    sizes = made.blueprint.sizes
    assert count_sequences(made.blueprint, 8192) == sizes.num_tokens // 8192
    assert count_sequences(made.blueprint, 1) == min(sizes.max_rows, sizes.num_pages - 1)
    few = replace(made.blueprint, sizes=replace(sizes, max_rows=2))
    assert count_sequences(few, 128) == 2


@pytest.mark.parametrize(
    ("topology", "tp_size", "group", "num_links", "hops"),
    [
        ("v5e:2x2", 4, (2, 2), 2, 2),  # of its four links a device uses two
        ("v5e:4x4", 4, (2, 2), 2, 2),
        ("v5e:4x4", 16, (4, 4), 2, 6),
        ("v5e:16x16", 32, (4, 8), 2, 10),  # a slice of its own
        ("v5e:16x16", 256, (16, 16), 4, 16),  # a whole axis of a pod is a ring
        ("v5p:2x2x2", 8, (2, 2, 2), 3, 3),
        ("v5p:4x4x4", 8, (2, 2, 2), 3, 3),
    ],
)
def test_sums_cross_the_grid_of_their_devices_on_the_links_that_it_has(
    topology, tp_size, group, num_links, hops
):
    made = fit(topology, tp_size=tp_size)
    assert made.where.find_part(tp_size).find_group(tp_size) == group
    bound = bound_step(made.sketch, made.where, StepWork(num_rows=512, context=1))
    sent_bytes = 2 * (tp_size - 1) / tp_size * 512 * 4096 * 2
    link_s = sent_bytes / (num_links * made.where.chip.link_bytes_per_s)
    assert bound.sums_s == pytest.approx((2 * 32 + 3) * (link_s + 2 * hops * 1e-6))
