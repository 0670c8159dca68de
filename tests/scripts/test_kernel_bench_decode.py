"""The shapes that a GPU's kernels are timed on: what they count, and that their arguments fit."""

from __future__ import annotations

from dataclasses import replace

import jax
import pytest

from jaxserve.kernels_pallas.paged_attention.ref import paged_decode
from scripts.kernel_bench_decode import DECODE_BENCHES, make_arguments


def test_the_bytes_of_the_first_shape_are_those_of_its_keys_and_values():
    bench = DECODE_BENCHES[0]
    assert bench.kv_bytes == 32 * 4096 * 8 * 128 * 2 * 2
    assert bench.moved_bytes == bench.kv_bytes + 32 * 32 * 128 * 6
    assert bench.num_flops == 4 * 32 * 4096 * 32 * 128


@pytest.mark.parametrize("bench", DECODE_BENCHES, ids=lambda bench: bench.name)
def test_a_small_form_of_every_shape_runs(bench):
    small = replace(
        bench, num_rows=2, kv_len=70, num_heads=bench.num_heads // bench.num_kv_heads, num_kv_heads=1
    )
    arguments, options = make_arguments(small, jax.random.key(0))
    out_RNH = jax.jit(lambda *arguments: paged_decode(*arguments, **options))(*arguments)
    assert out_RNH.shape == (2 * bench.tokens_per_row, small.num_heads, bench.head_dim)
    assert bool(jax.numpy.isfinite(out_RNH).all())
