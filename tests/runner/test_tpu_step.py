"""The whole step of a small model, compiled for a TPU without one: our kernels, no copies, little code.

Two layers of the Llama 3.2 1B shape, as what is asked of one layer is asked of all.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxserve.kernels_pallas.dispatch import KernelSet, KernelTarget, choose_kernels
from jaxserve.kernels_pallas.grouped_matmul.limits import ExpertShape
from jaxserve.models import llama, qwen3_moe
from jaxserve.models.experts import describe_experts
from jaxserve.models.quant import bind_kernels
from jaxserve.runner.batch import packed_size
from jaxserve.runner.buckets import Shape, make_ladder
from jaxserve.runner.device_state import PoolSize, make_state
from jaxserve.runner.programs import Programs, run_step
from jaxserve.runner.xla_flags import chosen_options
from jaxserve.weights.placement import make_placement
from jaxserve.weights.served import describe_params
from jaxserve.weights.stacks import describe_stacks
from tests.kernels.tpu import compile_for_tpu, device_kind, list_devices, lowering_for
from tests.runner.test_h200_step import EXPERTS_BYTES, SHAPES, list_copies

CFG = llama.Config(
    vocab_size=32768,
    width=2048,
    mlp_width=8192,
    num_layers=2,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=None,
    max_context=131072,
    ties_embeddings=True,
)
MOST_NORM_ROWS = 128  # of that width; of more XLA adds and norms
PAGE_SIZE = 128
POOL = PoolSize(num_pages=1025, page_size=PAGE_SIZE, num_slots=64, table_width=1024)


def choose_for_v5e(cfg: Any, kv_dtype: str = "bfloat16", experts: ExpertShape | None = None) -> KernelSet:
    target = KernelTarget(
        platform="tpu",
        head_dim=cfg.head_dim,
        num_kv_heads=cfg.num_kv_heads,
        page_size=PAGE_SIZE,
        kv_dtype=kv_dtype,
        device_kind=device_kind("v5e"),
        experts=experts,
    )
    return choose_kernels(target)


@pytest.mark.parametrize(
    ("shape", "kv_dtype", "quantization"),
    [
        (Shape(64, 0), "bfloat16", "none"),
        (Shape(8, 0), "int8", "int8"),
        (Shape(8, 0, 4), "bfloat16", "none"),
        (Shape(8, 248), "bfloat16", "none"),
    ],
    ids=str,
)
def test_a_step_attends_in_our_kernels_and_copies_neither_weights_nor_pool(shape, kv_dtype, quantization):
    kernels = choose_for_v5e(CFG, kv_dtype=kv_dtype)
    params = describe_params(llama.param_specs(CFG), dtype="bfloat16", quantization=quantization)
    graphdef, weights = nnx.split(llama.Model(CFG, bind_kernels(params, kernels), kernels))
    state = jax.eval_shape(partial(make_state, CFG, POOL, jnp.dtype(kv_dtype), make_kv=kernels.make_kv))
    packed = jax.ShapeDtypeStruct((packed_size(shape, POOL.table_width),), jnp.int32)
    step = partial(run_step, graphdef, shape, PAGE_SIZE)
    options = chosen_options("tpu")
    report = compile_for_tpu("v5e", step, weights, state, packed, donate_argnums=1, compiler_options=options)

    pool_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state.kv))
    assert report.alias_bytes >= pool_bytes
    matrix_bytes = CFG.width * CFG.num_heads * CFG.head_dim * (2 if quantization == "none" else 1)
    # A window of steps is a loop, and the step its body.
    entry = report.hlo if shape.window > 1 else report.hlo[report.hlo.index("\nENTRY") :]
    assert list_copies(entry, matrix_bytes) == []
    forms = 1 + (shape.num_rows > 0) + (shape.num_tokens > 0)  # the write, decode, prefill
    if kv_dtype == "bfloat16" and not shape.num_tokens:
        forms = 1  # the write and decode
    forms += 2 * (shape.num_rows + shape.num_tokens <= MOST_NORM_ROWS)
    num_kernels = forms * CFG.num_layers
    num_kernels += (shape.num_rows > 0) + (shape.num_tokens > 0)  # lists of their work, for all layers
    if quantization == "int8":
        num_kernels += 4 * CFG.num_layers + 1  # the rows of each product, and of the head's
    assert entry.count('custom_call_target="tpu_custom_call"') == num_kernels
    assert report.code_bytes < 16e6  # 6 MB of which are not the layers'
    assert report.temp_bytes < pool_bytes / 8


def test_four_chips_share_the_step_and_each_has_its_rows_of_the_pool():
    devices = list_devices("v5e:2x2")
    placement, division = make_placement(devices), llama.divide(CFG, len(devices))
    target = KernelTarget(
        platform="tpu",
        head_dim=CFG.head_dim,
        num_kv_heads=division.local_cfg.num_kv_heads,
        page_size=PAGE_SIZE,
        kv_dtype="bfloat16",
        num_devices=len(devices),
        device_kind=devices[0].device_kind,
    )
    specs = division.cut_specs(llama.param_specs(CFG))
    params = describe_params(specs, dtype="bfloat16", quantization="none", placement=placement)
    model = llama.Model(division.local_cfg, params, choose_kernels(target))
    ladder = make_ladder(max_rows=64, max_tokens=256, min_rows=64, mixes=True)
    with lowering_for(devices[0]):
        programs = Programs(
            model, division.local_cfg, POOL, jnp.dtype(jnp.bfloat16), ladder, placement=placement
        )
        programs.compile_one(Shape(64, 0))
    programs.compiles.close()
    program = programs.ready[Shape(64, 0)]
    pool = jax.tree.leaves(programs.allocate.out_info.kv)
    own_bytes = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in pool)
    assert own_bytes == CFG.num_layers * POOL.num_pages * PAGE_SIZE * 512  # two heads of 64 are one row
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= own_bytes
    assert memory.temp_size_in_bytes < own_bytes / 8
    text = program.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3 * CFG.num_layers + 1
    assert len(re.findall(rf"= bf16\[64,{CFG.width}\]\S* all-reduce", text)) == 2 * CFG.num_layers + 1


def test_a_loop_over_layers_reads_matrices_where_they_lie_in_their_stack():
    kernels = choose_for_v5e(CFG)
    params = describe_params(llama.param_specs(CFG), dtype="bfloat16", quantization="none")
    params = bind_kernels(describe_stacks(params, CFG.num_layers), kernels)
    graphdef, weights = nnx.split(llama.Model(CFG, params, kernels))
    pool = replace(POOL, stacks_layers=True)
    state = jax.eval_shape(partial(make_state, CFG, pool, jnp.dtype(jnp.bfloat16), make_kv=kernels.make_kv))
    shape = Shape(8, 0)
    packed = jax.ShapeDtypeStruct((packed_size(shape, pool.table_width),), jnp.int32)
    step = partial(run_step, graphdef, shape, PAGE_SIZE)
    options = chosen_options("tpu")
    report = compile_for_tpu("v5e", step, weights, state, packed, donate_argnums=1, compiler_options=options)
    num_kernels = 3  # the list of attention's work; the attention block; norm and MLP
    assert report.hlo.count('custom_call_target="tpu_custom_call"') == num_kernels
    assert report.temp_bytes < 2 * CFG.width * CFG.width  # no matrix is copied


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_loop_over_layers_multiplies_by_experts_where_they_lie_in_their_stack(quantization):
    hf_config = json.loads((SHAPES / "qwen3-30b-a3b" / "config.json").read_text())
    cfg = replace(qwen3_moe.Config.from_hf(hf_config), num_layers=3)
    experts = describe_experts(cfg, dtype="bfloat16", quantization=quantization)
    kernels = choose_for_v5e(cfg, experts=experts)
    params = describe_params(qwen3_moe.param_specs(cfg), dtype="bfloat16", quantization=quantization)
    params = bind_kernels(describe_stacks(params, cfg.num_layers), kernels)
    model = qwen3_moe.Model(cfg, params, kernels)
    graphdef, weights = nnx.split(model)
    pool = replace(POOL, stacks_layers=True)
    state = jax.eval_shape(partial(make_state, cfg, pool, jnp.dtype(jnp.bfloat16), make_kv=kernels.make_kv))
    shape = Shape(64, 0)
    packed = jax.ShapeDtypeStruct((packed_size(shape, pool.table_width),), jnp.int32)
    step = partial(run_step, graphdef, shape, PAGE_SIZE)
    options = chosen_options("tpu")
    report = compile_for_tpu("v5e", step, weights, state, packed, donate_argnums=1, compiler_options=options)
    num_kernels = 7  # the list of work; norm and q, k, v; the write and decode; o; a norm; two products
    if quantization == "int8":  # q, k, v and o are XLA's; rows of 4 products, and of the head's, scored too
        num_kernels += 5
    assert report.hlo.count('custom_call_target="tpu_custom_call"') == num_kernels
    assert report.temp_bytes < EXPERTS_BYTES / 8
