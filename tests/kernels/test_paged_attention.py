"""Paged attention, every form of it, against float64 attention over the gathered sequence."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest

from jaxserve.kernels_pallas.dispatch import XLA_KERNELS
from tests.kernels.cases import (
    DECODE_LENGTHS,
    POOLS,
    PREFILL_POOLS,
    PREFILL_RUNS,
    Heads,
    attend_exactly,
    dequantize,
    make_pool,
)

FORMS = [pytest.param(XLA_KERNELS, id="ref")]
# bf16 pools: queries and probabilities are rounded to bf16, too.
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2, "int8": 2e-6}


@pytest.mark.parametrize("kernels", FORMS)
@pytest.mark.parametrize(("heads", "dtype", "page_size"), POOLS, ids=str)
def test_decode(kernels, heads, dtype, page_size):
    decode = jax.jit(kernels.paged_decode, static_argnames="scale")
    for lengths in DECODE_LENGTHS:
        pool = make_pool(heads, lengths, page_size, dtype)
        q_RNH = np.random.default_rng(1).standard_normal(
            (len(lengths), heads.num_heads, heads.head_dim), np.float32
        )
        scale = heads.head_dim**-0.5
        out_RNH = decode(
            q_RNH,
            pool.kv,
            pool.table_XW,
            np.asarray(pool.slots, np.int32),
            np.asarray(lengths, np.int32),
            scale=scale,
        )
        for row, length in enumerate(lengths):
            want = attend_exactly(q_RNH[row], *pool.read(row, length), scale) if length else 0.0
            np.testing.assert_allclose(
                out_RNH[row], want, atol=TOLERANCE[dtype], err_msg=f"{lengths}, row {row}"
            )


@pytest.mark.parametrize("kernels", FORMS)
@pytest.mark.parametrize(("heads", "dtype", "page_size"), PREFILL_POOLS, ids=str)
def test_prefill(kernels, heads, dtype, page_size):
    prefill = jax.jit(kernels.paged_prefill, static_argnames="scale")
    for runs in PREFILL_RUNS:
        pool = make_pool(heads, [kv_len for _, kv_len in runs], page_size, dtype)
        lens = np.asarray([length for length, _ in runs], np.int32)
        firsts = np.cumsum(lens) - lens
        padded = int(lens.sum()) + 5  # tokens of no run yield zeros
        q_TNH = np.random.default_rng(1).standard_normal(
            (padded, heads.num_heads, heads.head_dim), np.float32
        )
        scale = heads.head_dim**-0.5
        out_TNH = np.asarray(
            prefill(
                q_TNH,
                pool.kv,
                pool.table_XW,
                np.asarray(pool.slots, np.int32),
                firsts.astype(np.int32),
                lens,
                np.asarray([kv_len for _, kv_len in runs], np.int32),
                scale=scale,
            )
        )
        for run, (length, kv_len) in enumerate(runs):
            k_AKH, v_AKH = pool.read(run, kv_len)
            for i in range(0, length, 7):
                seen = kv_len - length + i + 1
                token = firsts[run] + i
                want = attend_exactly(q_TNH[token], k_AKH[:seen], v_AKH[:seen], scale)
                np.testing.assert_allclose(
                    out_TNH[token], want, atol=TOLERANCE[dtype], err_msg=f"{runs}, {run}"
                )
        assert not out_TNH[lens.sum() :].any()


@pytest.mark.parametrize("kernels", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_kv_write_touches_only_the_places_it_is_given(kernels, dtype):
    heads = Heads(4, 2, 8)
    pool = make_pool(heads, [40], 8, dtype)
    rng = np.random.default_rng(2)
    k_TKH, v_TKH = (rng.standard_normal((3, 2, 8), np.float32) for _ in "kv")
    k_TKH[1, 0] = 0.0  # a head without a scale
    index_T = np.asarray([17, 3, 30], np.int32)
    qkv_TAH = np.concatenate([np.zeros((3, heads.num_heads, 8), np.float32), k_TKH, v_TKH], axis=1)
    unturned = np.ones((3, 1, 4), np.float32), np.zeros((3, 1, 4), np.float32)
    rope_write = jax.jit(partial(kernels.rope_write, num_heads=heads.num_heads))
    _, kv = rope_write(pool.kv, qkv_TAH, *unturned, index_T)
    rounding = {"float32": 0.0, "bfloat16": 2.0**-8, "int8": 0.5 / 127}[dtype]  # of the largest of the head
    for new, old, written in zip(dequantize(kv), dequantize(pool.kv), (k_TKH, v_TKH), strict=True):
        new, old = new.reshape(-1, 2, 8), old.reshape(-1, 2, 8)
        untouched = np.delete(np.arange(len(old)), index_T)
        np.testing.assert_array_equal(new[untouched], old[untouched])
        largest = np.abs(written).max(-1, keepdims=True)
        assert (np.abs(new[index_T] - written) <= rounding * largest * 1.0001).all()
