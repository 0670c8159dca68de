"""Which form of each kernel is chosen, and that a step for an H200 runs it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxserve.kernels_pallas.dispatch import XLA_KERNELS, KernelTarget, choose_kernels
from jaxserve.kernels_pallas.grouped_matmul.limits import ExpertShape
from jaxserve.kernels_pallas.grouped_matmul.ref import GroupedForm
from jaxserve.kernels_pallas.kv_layer import KVLayer
from jaxserve.kernels_pallas.kv_pages import KVPages
from jaxserve.models.interface import StepBatch
from jaxserve.models.layers import attend
from tests.kernels.h200 import compile_for_h200, require_h200_compiler

H200 = KernelTarget(
    platform="gpu",
    head_dim=128,
    num_kv_heads=8,
    page_size=64,
    kv_dtype="bfloat16",
    compute_capability="9.0",
)
V5E = replace(H200, platform="tpu", page_size=128, compute_capability="", device_kind="TPU v5 lite")
NEEDS_JAX_011 = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="The GPU kernels need jax 0.11.2 or later."
)


def test_on_a_cpu_xla_has_it():
    assert choose_kernels(replace(H200, platform="cpu")) is XLA_KERNELS


@NEEDS_JAX_011
def test_hopper_gets_kernels_of_its_own():
    from jaxserve.kernels_pallas.int4_matmul import gpu as int4_matmul
    from jaxserve.kernels_pallas.kv_write import gpu as kv_write
    from jaxserve.kernels_pallas.paged_attention import gpu_decode, gpu_prefill
    from jaxserve.kernels_pallas.sampling import gpu as sampling

    kernels = choose_kernels(H200)
    assert kernels.int4_matmul is int4_matmul.int4_matmul
    assert kernels.rope_write is kv_write.rope_write
    assert kernels.paged_decode is gpu_decode.paged_decode
    assert kernels.paged_prefill is gpu_prefill.paged_prefill
    assert kernels.choose_tokens is sampling.choose_tokens
    assert kernels.name == "mosaic"


@NEEDS_JAX_011
@pytest.mark.parametrize("kv_dtype", ["int8", "float8_e4m3fn"])
def test_hopper_reads_a_narrow_pool_in_the_same_kernels(kv_dtype):
    assert choose_kernels(replace(H200, kv_dtype=kv_dtype)) == choose_kernels(H200)


@NEEDS_JAX_011
def test_experts_get_a_kernel_or_the_reason():
    from jaxserve.kernels_pallas.grouped_matmul.gpu import grouped_matmul

    def choose(**change):
        return choose_kernels(replace(H200, experts=replace(experts, **change)))

    experts = ExpertShape(width=2048, expert_width=768, weights="bfloat16")
    assert choose().name == "mosaic"
    assert choose().grouped_matmul == GroupedForm(grouped_matmul, 8, 128)
    assert (
        choose(weights="fp8").grouped_matmul
        == choose(weights="int8").grouped_matmul
        == choose().grouped_matmul
    )
    assert choose_kernels(H200).grouped_matmul is choose(weights="float32").grouped_matmul is None
    assert "; xla, as the product by experts wants weights of bfloat16, int8, fp8 or int4, not float32" in (
        choose(weights="float32").name
    )
    assert choose(weights="int4").name == "mosaic"
    assert "wants widths in 128s, not 2048 and 704" in choose(weights="int4", expert_width=704).name
    assert "wants widths in 64s, not 2048 and 96" in choose(expert_width=96).name


def test_a_tpu_has_a_product_by_experts_too():
    from jaxserve.kernels_pallas.grouped_matmul.tpu import grouped_matmul

    experts = ExpertShape(width=2048, expert_width=768, weights="int8")
    for kind, widens in (("TPU v5 lite", False), ("TPU7x", True), ("a chip that nobody knows", True)):
        form = choose_kernels(replace(V5E, experts=experts, device_kind=kind)).grouped_matmul
        assert form is not None
        assert isinstance(form.multiply, partial)
        assert (form.multiply.func, form.multiply.keywords) == (grouped_matmul, {"widens_int8": widens})
        assert (form.least_rows, form.most_rows) == (16, 128)
    kernels = choose_kernels(replace(V5E, experts=replace(experts, expert_width=96)))
    assert kernels.grouped_matmul is None
    assert (
        kernels.name == "pallas; xla, as the product by experts wants widths in 128s and 64s, not 2048 and 96"
    )


def test_another_gpu_gets_xlas_form_and_the_reason():
    kernels = choose_kernels(replace(H200, compute_capability="8.0"))
    assert kernels.paged_decode is XLA_KERNELS.paged_decode
    assert kernels.paged_prefill is XLA_KERNELS.paged_prefill
    assert kernels.int4_matmul is XLA_KERNELS.int4_matmul
    assert "jax" in kernels.name or "compute capability 8.0 is not that of Hopper, 9.0" in kernels.name


@NEEDS_JAX_011
@pytest.mark.parametrize(
    ("change", "operation", "reason"),
    [
        ({"page_size": 16}, "paged_decode", "decode wants pages of 64 tokens, not 16"),
        ({"head_dim": 96}, "paged_decode", "decode wants heads of 64, 128, 256, not 96"),
        ({"page_size": 32}, "paged_prefill", "prefill wants pages of 64 or 128 tokens, not 32"),
        ({"head_dim": 96}, "rope_write", "the KV write wants heads of 64, 128, 256, not 96"),
        (
            {"kv_dtype": "float32"},
            "paged_decode",
            "decode wants pools of bfloat16, int8, float8_e4m3fn, not float32",
        ),
        (
            {"kv_dtype": "int8", "num_kv_heads": 2},
            "rope_write",
            "the KV write wants heads of int8 in fours, not 2",
        ),
    ],
    ids=str,
)
def test_what_a_kernel_does_not_serve_is_named(change, operation, reason):
    kernels = choose_kernels(replace(H200, **change))
    assert getattr(kernels, operation) is getattr(XLA_KERNELS, operation)
    assert f"; xla, as {reason}" in kernels.name


def test_a_tpu_gets_kernels_of_its_own_and_their_pool():
    from jaxserve.kernels_pallas.add_norm import tpu as add_norm
    from jaxserve.kernels_pallas.kv_write import tpu as kv_write
    from jaxserve.kernels_pallas.paged_attention import tpu_decode, tpu_plan, tpu_prefill
    from jaxserve.kernels_pallas.round_rows import tpu as round_rows

    kernels = choose_kernels(V5E)
    assert kernels.name == "pallas"
    assert kernels.rope_write is kv_write.rope_write
    assert kernels.round_rows is round_rows.round_rows
    assert (kernels.begin_sum, kernels.add_norm) == (add_norm.begin_sum, add_norm.add_norm)
    for form, chosen in (
        (tpu_decode.paged_decode, kernels.paged_decode),
        (tpu_prefill.paged_prefill, kernels.paged_prefill),
    ):
        assert isinstance(chosen, partial)
        assert chosen.func is form
        assert chosen.keywords == {"chip": tpu_plan.CHIPS["TPU v5 lite"]}
    assert isinstance(kernels.make_kv(2, 128, 8, 128, "bfloat16"), KVPages)
    assert "no figures of 'TPU v9'" in choose_kernels(replace(V5E, device_kind="TPU v9")).name


@pytest.mark.parametrize(
    ("target", "sends_bf16"),
    [
        (V5E, True),
        (H200, True),
        (replace(V5E, dtype="float32"), False),
        (replace(H200, platform="cpu"), False),
    ],
)
def test_accelerators_send_outputs_of_many_tokens_in_the_dtype_of_the_weights(target, sends_bf16):
    shards = choose_kernels(replace(target, num_devices=2)).shards
    assert shards.output_dtype(8, 8192) == jnp.float32
    assert shards.output_dtype(16, 8192) == (jnp.bfloat16 if sends_bf16 else jnp.float32)
    assert choose_kernels(target).shards.output_dtype(16, 8192) == jnp.float32  # nothing is sent


def test_a_long_prefill_goes_in_halves_on_tpus_that_hide_sums_of_dense_models():
    shared = replace(V5E, num_devices=4)
    assert [choose_kernels(shared).halves(num_tokens) for num_tokens in (0, 1023, 1024)] == [
        False,
        False,
        True,
    ]
    experts = ExpertShape(width=2048, expert_width=768, weights="bfloat16")
    for other in (
        V5E,
        replace(shared, device_kind="TPU v6 lite"),
        replace(shared, device_kind="TPU7x"),  # whose sums do not go on beside products, but those of eight
        replace(shared, experts=experts),
        replace(H200, num_devices=4),
    ):
        assert not choose_kernels(other).halves(4096)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head_dim": 96}, "the TPU's kernels want heads of 64, 128, 256, not 96"),
        ({"page_size": 8}, "the TPU's kernels want pages of 16, 32, 64, 128, 256, 512 tokens, not 8"),
        (
            {"kv_dtype": "float32"},
            "the TPU's kernels want pools of bfloat16, int8, float8_e4m3fn, not float32",
        ),
    ],
    ids=str,
)
def test_what_the_tpus_kernels_do_not_serve_xla_does(change, reason):
    kernels = choose_kernels(replace(V5E, **change))
    assert replace(kernels, name="xla") == XLA_KERNELS
    assert kernels.name == f"xla ({reason})"


def test_an_unknown_platform_is_refused():
    with pytest.raises(ValueError, match="no kernels are known for platform 'abacus'"):
        choose_kernels(replace(H200, platform="abacus"))


def test_a_step_for_an_h200_attends_in_the_kernel_and_in_place():
    """Decode rows alone, and the pool that is given back is the one that was given."""
    require_h200_compiler()
    kernels = choose_kernels(H200)
    num_rows, num_heads, num_kv_heads = 8, 32, 8

    def ints(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def values(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    pool = values(1024, 64, num_kv_heads, 128)
    batch = StepBatch(
        token_ids_T=ints(num_rows),
        positions_T=ints(num_rows),
        write_index_T=ints(num_rows),
        decode_slot_R=ints(num_rows),
        decode_kv_len_R=ints(num_rows),
        chunk_slot_C=ints(0),
        chunk_token_C=ints(0),
        chunk_len_C=ints(0),
        chunk_kv_len_C=ints(0),
        table_XW=ints(num_rows, 64),
        sample_token_B=ints(num_rows),
    )
    turn = jax.ShapeDtypeStruct((num_rows, 1, 64), jnp.float32)
    report = compile_for_h200(
        lambda kv, qkv_TF, rope, batch: attend(
            kernels, qkv_TF, kv, batch._replace(rope=rope), num_heads, 0.1
        ),
        KVLayer(pool, pool),
        values(num_rows, (num_heads + 2 * num_kv_heads) * 128),
        (turn, turn),
        batch,
        donate_argnums=0,
    )
    pool_bytes = 1024 * 64 * num_kv_heads * 128 * 2
    assert [kernel.name.rpartition("_")[0] for kernel in report.kernels] == [
        "combine_partials",
        "paged_decode",
        "rope_write",
    ]
    assert report.alias_bytes == 2 * pool_bytes
    assert report.temp_bytes < pool_bytes / 8
