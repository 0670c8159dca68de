"""What "auto" comes to, on machines that are not here."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jaxserve.config import ServerConfig
from jaxserve.errors import ConfigError
from jaxserve.runner.sizing import (
    GIB,
    Machine,
    check_devices,
    choose_precision,
    choose_sizes,
    share_machine,
)

LAPTOP = Machine(platform="cpu", num_devices=1, memory_bytes=16 * GIB, free_bytes=10 * GIB)
H200 = Machine(platform="gpu", num_devices=1, memory_bytes=139 * GIB, free_bytes=139 * GIB)
V5E = Machine(platform="tpu", num_devices=1, memory_bytes=16 * GIB, free_bytes=16 * GIB)


def size(machine: Machine, *, param_bytes: int = GIB, checkpoint_bits: int = 16, **flags):
    config = ServerConfig(model_path="m", **flags)
    precision = choose_precision(config, machine, checkpoint_bits)
    return choose_sizes(
        config,
        machine,
        precision,
        model_context=32768,
        param_bytes=param_bytes,
        kv_bytes_per_token=24 * 1024,
        slot_bytes=8 * 151936,
    )


def test_a_quantised_file_is_served_in_int8_on_the_cpu_only():
    config = ServerConfig(model_path="m")
    assert choose_precision(config, LAPTOP, 4.6).quantization == "int8"
    assert choose_precision(config, LAPTOP, 8.6).quantization == "int8"  # Q8_0 and its scales
    assert choose_precision(config, LAPTOP, 16).quantization == "none"
    assert choose_precision(config, H200, 5).quantization == "none"
    unquantised = ServerConfig(model_path="m", quantization="none", dtype="float32")
    assert choose_precision(unquantised, LAPTOP, 5).quantization == "none"


def test_the_pool_has_the_type_of_what_is_not_quantised_unless_it_would_be_copied():
    config = ServerConfig(model_path="m")
    assert choose_precision(config, LAPTOP, 5).kv_dtype == "bfloat16"
    assert choose_precision(config, LAPTOP, 32).kv_dtype == "float32"
    copying = replace(LAPTOP, updates_bf16_in_place=False)
    assert choose_precision(config, copying, 5).kv_dtype == "float32"


def test_pages_rows_and_chunks_suit_the_platform():
    cpu, gpu, tpu = size(LAPTOP), size(H200), size(V5E)
    assert (cpu.page_size, gpu.page_size, tpu.page_size) == (16, 64, 128)
    assert (cpu.mixes, gpu.mixes) == (False, True)
    assert cpu.num_tokens * 24 * 1024 <= 2 * GIB
    assert gpu.num_tokens * 24 * 1024 > 100 * GIB


def test_flags_win_over_what_would_be_chosen():
    sizes = size(LAPTOP, max_total_tokens=20480, max_running_requests=128, page_size=32, context_length=2048)
    assert (sizes.num_tokens, sizes.max_rows, sizes.page_size) == (20480, 128, 32)
    assert sizes.table_width == 64


def test_a_pool_is_never_larger_than_all_rows_can_fill():
    assert size(H200, max_running_requests=2, context_length=1024).num_tokens == 2048
    assert size(V5E, max_running_requests=1, context_length=300).num_tokens == 3 * 128  # whole pages
    assert size(LAPTOP, max_running_requests=1, context_length=16).num_tokens == 2 * 16


def test_memory_that_others_hold_is_left_to_them():
    shared = Machine(platform="gpu", num_devices=1, memory_bytes=139 * GIB, free_bytes=39 * GIB)
    alone = Machine(platform="gpu", num_devices=1, memory_bytes=139 * GIB, free_bytes=139 * GIB)
    lost_bytes = (size(alone).num_tokens - size(shared).num_tokens) * 24 * 1024
    assert abs(lost_bytes - 100 * GIB) < GIB


def test_whole_prompts_in_one_step():
    assert size(LAPTOP, chunked_prefill_size=-1, context_length=4096).chunk_tokens == 4096


def test_on_the_cpu_decoding_waits_for_half_a_chunk_unless_its_size_was_chosen():
    assert (size(LAPTOP).chunk_tokens, size(LAPTOP).mixed_chunk_tokens) == (512, 256)
    chosen = size(LAPTOP, chunked_prefill_size=1024)
    assert (chosen.chunk_tokens, chosen.mixed_chunk_tokens) == (1024, 1024)
    assert size(H200).mixed_chunk_tokens == size(H200).chunk_tokens


def test_a_model_that_leaves_no_room_is_refused_with_what_would_help():
    with pytest.raises(ConfigError, match="raise mem_fraction_static"):
        size(V5E, param_bytes=15 * GIB)


def test_a_pool_asked_for_must_hold_two_pages():
    with pytest.raises(ConfigError, match="must hold at least two pages of 16 tokens, got 8"):
        size(LAPTOP, max_total_tokens=8)


def test_a_context_beyond_the_model_is_refused():
    with pytest.raises(ConfigError, match="at most the model's own, 32768, got 65536"):
        size(LAPTOP, context_length=65536)


def test_more_devices_than_there_are_are_refused_with_what_would_help():
    asked = ServerConfig(model_path="m", tp_size=4)
    with pytest.raises(ConfigError, match=r"tp_size is 4, and JAX finds 1 gpu device\. Lower it"):
        check_devices(asked, H200)
    with pytest.raises(
        ConfigError, match=r"finds 1 cpu device\. .* JAX_NUM_CPU_DEVICES=4 or XLA_FLAGS=--xla"
    ):
        check_devices(asked, LAPTOP)
    check_devices(asked, replace(LAPTOP, num_devices=8))


def test_devices_that_are_one_cpu_share_its_memory():
    shared = share_machine(LAPTOP, 4)
    assert (shared.memory_bytes, shared.free_bytes) == (4 * GIB, 2.5 * GIB)
    assert share_machine(H200, 4) == H200
    assert size(shared, tp_size=4).num_tokens < size(LAPTOP).num_tokens
    assert size(shared, tp_size=2, dp_size=2) == size(shared, tp_size=4)
