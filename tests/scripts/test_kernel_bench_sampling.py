"""What sampling and KV write are timed on: that small forms of every case run, and what they count."""

from __future__ import annotations

from dataclasses import replace

import jax
import pytest

from jaxserve.kernels_pallas.kv_write.ref import rope_write
from jaxserve.kernels_pallas.sampling.ref import choose_tokens
from scripts import kernel_bench_rope_write, kernel_bench_sampling
from scripts.kernel_bench_rope_write import ROPE_WRITE_BENCHES
from scripts.kernel_bench_sampling import SAMPLING_BENCHES


@pytest.mark.parametrize("bench", SAMPLING_BENCHES, ids=lambda bench: bench.name)
def test_a_small_form_of_every_batch_runs(bench):
    small = replace(bench, num_rows=3, vocab_size=500)
    token_B, _ = jax.jit(choose_tokens)(*kernel_bench_sampling.make_arguments(small, 0))
    assert ((token_B >= 0) & (token_B < 500)).all()


@pytest.mark.parametrize("bench", ROPE_WRITE_BENCHES, ids=lambda bench: bench.name)
def test_a_small_form_of_every_write_runs(bench):
    small = replace(bench, num_tokens=3, num_pages=2)
    arguments, options = kernel_bench_rope_write.make_arguments(small, jax.random.key(0))
    q_TNH, _ = rope_write(*arguments, **options)
    assert q_TNH.shape == (3, bench.num_heads, bench.head_dim)


def test_the_bytes_are_those_that_must_be_moved():
    assert SAMPLING_BENCHES[0].read_bytes == 256 * 151936 * 4
    assert ROPE_WRITE_BENCHES[0].moved_bytes == 128 * ((28 + 8) * 2 + (28 + 8) * 2)
