"""The shapes that a GPU's prefill is timed on: what they count, and that their arguments fit."""

from __future__ import annotations

from dataclasses import replace

import jax
import pytest

from jaxserve.kernels_pallas.paged_attention.ref import paged_prefill
from scripts.kernel_bench_prefill import PREFILL_BENCHES, PrefillBench, make_arguments


def test_a_causal_prompt_counts_half_of_its_square():
    bench = PREFILL_BENCHES[0]
    assert bench.num_flops == 4 * (8192 * 8193 // 2) * 32 * 128
    assert bench.moved_bytes == 2 * 2 * 8192 * (32 + 8) * 128
    assert replace(bench, kv_dtype="int8").moved_bytes == 8192 * (2 * 2 * 32 * 128 + 8 * (2 * 128 + 4 * 9))


def test_a_window_is_all_that_is_counted():
    assert PrefillBench(name="", run_tokens=3, prefix_tokens=10, window=4).num_scores == 12
    assert PrefillBench(name="", run_tokens=3, num_runs=2).num_scores == 12


@pytest.mark.parametrize("bench", PREFILL_BENCHES, ids=lambda bench: bench.name)
def test_a_small_form_of_every_shape_runs(bench):
    small = replace(bench, run_tokens=5, num_runs=2, prefix_tokens=66, num_heads=2, num_kv_heads=1)
    arguments, options = make_arguments(small, jax.random.key(0))
    out_TNH = jax.jit(lambda *arguments: paged_prefill(*arguments, **options))(*arguments)
    assert out_TNH.shape == (10, 2, bench.head_dim)
    assert bool(jax.numpy.isfinite(out_TNH).all())
