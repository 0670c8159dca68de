"""The whole step of a model, compiled for an H200 without one: kernels where they belong, no copies.

Two layers of the Qwen2.5-7B shape, as what is asked of one layer is asked of all; and two of Qwen3-30B-A3B's.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxserve.kernels_pallas.dispatch import KernelTarget, choose_kernels
from jaxserve.models import qwen2, qwen3_moe
from jaxserve.models.experts import describe_experts
from jaxserve.models.quant import bind_kernels
from jaxserve.runner.batch import packed_size
from jaxserve.runner.buckets import Shape
from jaxserve.runner.device_state import PoolSize, make_state
from jaxserve.runner.grouping import group_layers, mark_groups
from jaxserve.runner.programs import run_step
from jaxserve.weights.served import describe_params
from tests.kernels.h200 import CompileReport, compile_for_h200, require_h200_compiler

SHAPES = Path(__file__).parents[2] / "benchmarks" / "shapes"
VOCAB_SIZE = 152064
EXPERTS_BYTES = 128 * 2048 * 768 * 2  # of the smaller matrices of a layer of Qwen3-30B-A3B
PAGE_SIZE = 64
POOL = PoolSize(num_pages=2049, page_size=PAGE_SIZE, num_slots=256, table_width=128)
WEIGHT_BYTES = {"none": 2, "int8": 1, "fp8": 1, "int4": 0.5}
BYTES = {"bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "s8": 1, "f8e4m3fn": 1}


def compile_step(
    shape: Shape, quantization: str = "none", family: Any = qwen2, name: str = "qwen2.5-7b"
) -> tuple[CompileReport, int, int]:
    """The report, the bytes of the pool, and those of the smallest matrix of a layer."""
    require_h200_compiler()
    cfg = replace(
        family.Config.from_hf(json.loads((SHAPES / name / "config.json").read_text())), num_layers=2
    )
    target = KernelTarget(
        platform="gpu",
        head_dim=cfg.head_dim,
        num_kv_heads=cfg.num_kv_heads,
        page_size=PAGE_SIZE,
        kv_dtype="bfloat16",
        compute_capability="9.0",
        experts=describe_experts(cfg, dtype="bfloat16", quantization=quantization),
    )
    specs = family.param_specs(cfg)
    specs = mark_groups(specs, group_layers(specs))
    params = describe_params(specs, dtype="bfloat16", quantization=quantization)
    kernels = choose_kernels(target)
    graphdef, weights = nnx.split(family.Model(cfg, bind_kernels(params, kernels), kernels))
    state = jax.eval_shape(partial(make_state, cfg, POOL, jnp.dtype(jnp.bfloat16)))
    packed = jax.ShapeDtypeStruct((packed_size(shape, POOL.table_width),), jnp.int32)
    step = partial(run_step, graphdef, shape, PAGE_SIZE)
    report = compile_for_h200(step, weights, state, packed, donate_argnums=1)
    pool_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state.kv))
    matrix_bytes = int(cfg.width * cfg.num_heads * cfg.head_dim * WEIGHT_BYTES[quantization])
    return report, pool_bytes, matrix_bytes


def list_copies(hlo: str, least_bytes: int) -> list[str]:
    """Instructions that give a buffer of at least that size and compute nothing."""
    found = []
    for line in hlo.splitlines():
        match = re.search(r"= (\w+)\[([\d,]*)\]\S* (?:copy|transpose|convert|dynamic-slice|slice)\(", line)
        if match and match[1] in BYTES:
            count = math.prod(int(size) for size in match[2].split(",") if size)
            if count * BYTES[match[1]] >= least_bytes and "fused" not in line:
                found.append(line.strip()[:120])
    return found


@pytest.mark.parametrize("quantization", ["none", "int8", "fp8", "int4"])
@pytest.mark.parametrize("shape", [Shape(1, 0), Shape(64, 0), Shape(0, 1024)], ids=str)
def test_a_step_copies_neither_weights_nor_pool(shape, quantization):
    report, pool_bytes, matrix_bytes = compile_step(shape, quantization)
    assert report.alias_bytes >= pool_bytes
    entry = report.hlo[report.hlo.index("\nENTRY") :]
    assert list_copies(entry, matrix_bytes) == []
    if not shape.num_tokens:  # the logits, twice copied where no row wants them edited or scored
        assert report.temp_bytes < matrix_bytes + 3 * 4 * shape.num_rows * VOCAB_SIZE


def test_a_window_copies_neither_weights_nor_pool():
    """Its loop turns a known number of times, so that no turn waits for the host."""
    report, pool_bytes, matrix_bytes = compile_step(Shape(64, 0, 4))
    assert report.alias_bytes >= pool_bytes
    entry = report.hlo[report.hlo.index("\nENTRY") :]
    (loop,) = re.findall(r' while\(.*body=(%[\w.]+).*"known_trip_count":\{"n":"4"\}', entry)
    body = report.hlo[report.hlo.index(f"\n{loop} ") :]
    assert list_copies(entry + body[: body.index("\n}")], matrix_bytes) == []
    assert report.temp_bytes < matrix_bytes + 3 * 4 * 64 * VOCAB_SIZE


def test_a_step_multiplies_by_what_is_packed_in_four_bits():
    """Four products a layer, and no matrix in another type."""
    report, _, _ = compile_step(Shape(64, 0), "int4")
    entry = report.hlo[report.hlo.index("\nENTRY") :]
    assert entry.count("int4_matmul") >= 8
    assert all(kernel.spill_bytes == kernel.stack_bytes == 0 for kernel in report.kernels)
    assert not re.search(r"= bf16\[(37888,3584|3584,18944|4608,3584|3584,3584)\]", report.hlo)


@pytest.mark.parametrize(
    ("shape", "attention"),
    [(Shape(64, 0), {"paged_decode", "combine_partials"}), (Shape(0, 1024), {"paged_prefill"})],
    ids=["decode", "prefill"],
)
def test_a_step_runs_our_kernels_and_loops_over_nothing_else(shape, attention):
    report, _, _ = compile_step(shape)
    names = {kernel.name.rpartition("_")[0] for kernel in report.kernels}
    assert names >= {"rope_write", *attention}
    num_loops = report.hlo[report.hlo.index("\nENTRY") :].count(" while(")
    assert num_loops == (1 if shape.num_tokens else 0)  # that scores prompts: no time round unless asked


@pytest.mark.parametrize(
    ("shape", "quantization"),
    [(Shape(64, 0), "none"), (Shape(0, 1024), "none"), (Shape(0, 1024), "fp8")],
    ids=str,
)
def test_a_step_multiplies_by_all_experts_at_once(shape, quantization):
    """Two launches a layer; no loop, which would wait for the host at every turn, and no expert copied or
    made in another type."""
    report, _, _ = compile_step(shape, quantization, family=qwen3_moe, name="qwen3-30b-a3b")
    entry = report.hlo[report.hlo.index("\nENTRY") :]
    assert entry.count("grouped_matmul") >= 4
    assert list_copies(entry, EXPERTS_BYTES // 4) == []
    experts = r"= \w+\[(?:128,1536,2048|196608,2048|128,2048,768|262144,768)\]\S* (?!parameter|bitcast)"
    assert re.findall(experts, entry) == []
    assert report.hlo.count(" while(") == (1 if shape.num_tokens else 0)  # that scores prompts
    assert report.temp_bytes < EXPERTS_BYTES
