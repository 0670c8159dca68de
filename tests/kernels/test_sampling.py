"""Choosing tokens, every form of it, against a float64 oracle that knows which token must be drawn."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kernels_pallas.sampling import ref
from jaxserve.kernels_pallas.sampling.noise import LARGEST_NOISE, gumbel, random_bits, row_keys
from tests.kernels.cases_sampling import (
    BAD_ROWS,
    BATCHES,
    ROWS,
    Row,
    allowed_tokens,
    make_logits,
)
from tests.kernels.h200 import assert_fits, compile_for_h200, require_h200_compiler

FORMS = ["ref", "gpu"]


def choose_tokens(form: str, **tuning: int):
    """The function of a form, jitted; the GPU's is simulated, with a search for races."""
    if form == "ref":
        return jax.jit(ref.choose_tokens)
    if jax.__version_info__ < (0, 11):
        pytest.skip("The GPU kernels need jax 0.11.2 or later.")
    from jaxserve.kernels_pallas import mosaic
    from jaxserve.kernels_pallas.sampling import gpu

    return jax.jit(partial(gpu.choose_tokens, interpret=mosaic.simulate(), **tuning))


def arguments(rows: list[Row], logits_BV: np.ndarray, dtype: str, seeds: list[int]) -> tuple:
    columns = [(row.temperature, row.top_k, row.top_p, row.min_p) for row in rows]
    temperature_B, top_k_B, top_p_B, min_p_B = (np.asarray(column) for column in zip(*columns, strict=True))
    return (
        jnp.asarray(logits_BV).astype(dtype),
        temperature_B.astype(np.float32),
        top_k_B.astype(np.int32),
        top_p_B.astype(np.float32),
        min_p_B.astype(np.float32),
        np.asarray(seeds, np.int32),
        np.arange(len(rows), dtype=np.int32) + 3,
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("vocab_size", "dtype", "which", "tuning"), BATCHES, ids=str)
def test_the_token_is_the_one_that_must_be_drawn(form, vocab_size, dtype, which, tuning):
    rows = ROWS[which] if form == "gpu" else ROWS
    logits_BV = make_logits(rows, vocab_size, dtype)
    choose = choose_tokens(form, **tuning)
    for repeat in range(1 if form == "gpu" else 3):
        seeds = [100 * repeat + b for b in range(len(rows))]
        token_B, largest_B = choose(*arguments(rows, logits_BV, dtype, seeds))
        np.testing.assert_array_equal(largest_B, logits_BV.max(axis=1))
        for b, row in enumerate(rows):
            allowed = allowed_tokens(logits_BV[b], row, seeds[b], b + 3)
            assert len(allowed) <= 3
            assert int(token_B[b]) in allowed, f"row {b}: {row}"


@pytest.mark.parametrize("are_likely", [True, False])
def test_thresholds_lie_among_the_likely_tokens_or_beyond(are_likely):
    """A batch is looked through whole as soon as one row's threshold lies beyond its likely blocks."""
    rows = [Row("peaked", top_k=3), Row("peaked", top_p=0.5), Row("peaked", top_k=30, top_p=0.9), Row("one")]
    if not are_likely:
        rows += [row for row in ROWS if row.logits in ("flat", "equal", "ties")]
    logits_BV = make_logits(rows, 2 * ref.LIKELY_BLOCKS * ref.BLOCK_TOKENS - 3, "float32")
    token_B, _ = choose_tokens("ref")(*arguments(rows, logits_BV, "float32", list(range(len(rows)))))
    for b, row in enumerate(rows):
        assert int(token_B[b]) in allowed_tokens(logits_BV[b], row, b, b + 3), f"row {b}: {row}"


@pytest.mark.parametrize("form", FORMS)
def test_bad_rows_are_told_and_harm_no_others(form):
    rows = [*BAD_ROWS, Row(top_k=5, top_p=0.9), Row()]
    logits_BV = make_logits(rows, 2048, "float32")
    seeds = list(range(len(rows)))
    token_B, largest_B = choose_tokens(form)(*arguments(rows, logits_BV, "float32", seeds))
    assert not np.isfinite(largest_B[: len(BAD_ROWS)]).any()
    for b in range(len(BAD_ROWS), len(rows)):
        assert int(token_B[b]) in allowed_tokens(logits_BV[b], rows[b], seeds[b], b + 3)


def test_the_noise_is_that_of_jax_random():
    seeds, positions = np.asarray([0, 7, 2**31 - 1], np.int32), np.asarray([0, 12, 99999], np.int32)
    keys = row_keys(jnp.asarray(seeds), jnp.asarray(positions))
    index_V = np.arange(5000, dtype=np.uint32)
    for seed, position, key in zip(seeds, positions, keys, strict=True):
        own_key = jax.random.fold_in(jax.random.key(int(seed)), int(position))
        bits_V = random_bits(key[0], key[1], jnp.asarray(index_V))
        np.testing.assert_array_equal(bits_V, jax.random.bits(own_key, (5000,)))
        noise_V = gumbel(key[0], key[1], jnp.asarray(index_V))
        np.testing.assert_array_equal(noise_V, jax.random.gumbel(own_key, (5000,)))
    assert -np.log(-np.log(1 - 2.0**-23)) < LARGEST_NOISE


@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "dtype"),
    [(256, 151936, "float32"), (256, 151936, "bfloat16"), (1, 128256, "float32")],
)
def test_it_compiles_for_an_h200(num_rows, vocab_size, dtype):
    require_h200_compiler()
    from jaxserve.kernels_pallas.sampling import gpu

    logits = jax.ShapeDtypeStruct((num_rows, vocab_size), jnp.dtype(dtype))
    floats, ints = (jax.ShapeDtypeStruct((num_rows,), kind) for kind in (jnp.float32, jnp.int32))
    report = compile_for_h200(gpu.choose_tokens, logits, floats, ints, floats, floats, ints, ints)
    assert_fits(report.kernel("sampling_scan"), max_registers=80, blocks_per_sm=6)
    assert_fits(report.kernel("sampling_choose"), max_registers=128, blocks_per_sm=2)
    assert report.temp_bytes <= 12 * (vocab_size // 128 + 256) * num_rows + 65536  # line statistics only
    assert not any(word in report.hlo for word in (" sort(", " conditional(", " while("))
