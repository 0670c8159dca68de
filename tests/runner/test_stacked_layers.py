"""Programs that loop over stacked layers, as TPUs run them: the tokens of unrolled ones, and no copies."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from jaxserve.kernels_pallas.dispatch import XLA_KERNELS, KernelSet
from jaxserve.kernels_pallas.grouped_matmul.ref import GroupedForm, grouped_matmul
from jaxserve.runner.buckets import Shape, make_ladder
from jaxserve.runner.checkpoint import Checkpoint, read_family
from jaxserve.runner.device_state import PoolSize
from jaxserve.runner.programs import Programs
from jaxserve.runner.runner import ModelRunner
from jaxserve.scheduler.plan import DecodeRow, PrefillChunk, SlotInit, StepPlan
from jaxserve.types import TokenParams
from jaxserve.weights.resolve import resolve_model
from tests.goldens.read import read_tiny_goldens
from tests.tiny import TINY_NAMES, write_tiny_checkpoint

PAGE_SIZE = 8
PAGES = [5, 3, 1, 2, 6, 4]  # of the one sequence; not in order, so that a mixed-up table shows
POOL = PoolSize(num_pages=7, page_size=PAGE_SIZE, num_slots=2, table_width=6, stacks_layers=True)
GREEDY = TokenParams(max_new_tokens=32)


def make_checkpoint(
    folder, name: str, quantization: str = "none", kernels: KernelSet = XLA_KERNELS
) -> Checkpoint:
    files = resolve_model(str(write_tiny_checkpoint(folder, name)), on_progress=lambda *_: None)
    family, cfg = read_family(name, files)
    return Checkpoint(
        files=files,
        family=family,
        cfg=cfg,
        kernels=kernels,
        dtype="float32",
        quantization=quantization,
        stacks_layers=True,
    )


def make_runner(
    folder,
    name: str,
    quantization: str = "none",
    kv_dtype: str = "float32",
    kernels: KernelSet = XLA_KERNELS,
) -> ModelRunner:
    checkpoint = make_checkpoint(folder, name, quantization, kernels)
    model = checkpoint.describe_model()
    ladder = make_ladder(max_rows=1, max_tokens=64, min_rows=1, mixes=False)
    runner = ModelRunner(model, checkpoint.cfg, POOL, jnp.dtype(kv_dtype), ladder, checkpoint)
    runner.load(lambda *_: None)
    runner.warm_up(lambda *_: None)
    return runner


def decode(runner: ModelRunner, prompt_ids: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens behind a prompt that comes in two chunks."""
    init = SlotInit(1, GREEDY, prompt_ids, [])
    head = PrefillChunk(1, 0, 0, 0, prompt_ids[:11], PAGES, samples=False)
    tail = PrefillChunk(1, 0, 0, 11, prompt_ids[11:], PAGES, samples=True)
    runner.step(StepPlan(0, (init,), (), (head,)))
    tokens = runner.step(StepPlan(1, (), (), (tail,))).read().token_ids
    for position in range(len(prompt_ids), len(prompt_ids) + num_tokens - 1):
        row = DecodeRow(1, 0, 0, position, PAGES[position // PAGE_SIZE])
        tokens += runner.step(StepPlan(2, (), (row,), ())).read().token_ids
    return tokens


@pytest.mark.parametrize("name", TINY_NAMES)
def test_a_loop_over_layers_gives_the_golden_tokens(tmp_path, name):
    golden = read_tiny_goldens(name)[33]
    runner = make_runner(tmp_path, name)
    wanted = list(golden.greedy_ids)[:8]
    assert decode(runner, golden.prompt_ids, len(wanted)) == wanted
    runner.close()


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_product_by_experts_finds_those_of_its_layer_in_the_stack(tmp_path, quantization):
    golden = read_tiny_goldens("qwen3_moe")[33]
    form = GroupedForm(grouped_matmul, 4, 8)
    wanted = list(golden.greedy_ids)[:8]
    if quantization != "none":
        runner = make_runner(tmp_path, "qwen3_moe", quantization)
        wanted = decode(runner, golden.prompt_ids, len(wanted))
        runner.close()
    runner = make_runner(
        tmp_path, "qwen3_moe", quantization, kernels=replace(XLA_KERNELS, grouped_matmul=form)
    )
    assert decode(runner, golden.prompt_ids, len(wanted)) == wanted
    runner.close()


def test_quantised_weights_and_an_int8_pool_are_stacked_too(tmp_path):
    golden = read_tiny_goldens("qwen2")[33]
    runner = make_runner(tmp_path, "qwen2", quantization="int8", kv_dtype="int8")
    assert len(decode(runner, golden.prompt_ids, 4)) == 4
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(runner._state.kv))  # layers
    runner.close()


def test_other_weights_are_exchanged_stack_by_stack(tmp_path):
    golden = read_tiny_goldens("qwen2")[33]
    runner = make_runner(tmp_path, "qwen2")
    before = decode(runner, golden.prompt_ids, 6)
    other = write_tiny_checkpoint(tmp_path / "other", "qwen2", seed=1)
    runner.install_update(runner.read_update(str(other), "auto"))
    assert decode(runner, golden.prompt_ids, 6) != before
    runner.install_update(runner.read_update(str(tmp_path), "auto"))
    assert decode(runner, golden.prompt_ids, 6) == before
    runner.close()


def test_the_loop_writes_the_pool_in_place(tmp_path):
    checkpoint = make_checkpoint(tmp_path, "qwen2")
    pool = replace(POOL, num_pages=65537)
    ladder = make_ladder(max_rows=4, max_tokens=64, min_rows=4, mixes=False)
    programs = Programs(checkpoint.describe_model(), checkpoint.cfg, pool, jnp.dtype(jnp.float32), ladder)
    kv_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(programs.allocate.out_info.kv))
    for shape in (Shape(4, 0), Shape(0, 64)):
        programs.compile_one(shape)
        memory = programs.ready[shape].memory_analysis()
        assert memory.alias_size_in_bytes >= kv_bytes
        assert memory.temp_size_in_bytes < kv_bytes / 50
    programs.compiles.close()
