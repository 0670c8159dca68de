"""Rows of 4-bit values: packed as the kernels read them, and made of rows of float32."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxserve.kernels_pallas.int4_matmul import ref
from jaxserve.weights.int4_rows import GroupedRows, dequantize, pack_runs, quantize_rows

GROUP_SIZE = 64


def test_packed_values_are_those_that_the_products_unpack():
    rng = np.random.default_rng(0)
    q_FD = rng.integers(0, 16, (5, 256), np.uint8)
    scale_FG, zero_FG = rng.uniform(0.5, 1, (5, 4)).astype(np.float16), rng.integers(0, 16, (5, 4), np.uint8)
    expected_FD = dequantize(GroupedRows(q_FD, scale_FG.astype(np.float32), zero_FG))
    parts = pack_runs(q_FD), scale_FG.T, zero_FG.T.astype(np.int8)
    np.testing.assert_array_equal(ref.dequantize(ref.Int4Matrix(*map(jnp.asarray, parts))), expected_FD)


def test_a_weight_is_moved_by_half_a_step_of_its_group_at_most_or_one_at_its_ends():
    w_FD = np.random.default_rng(1).standard_normal((6, 256), np.float32)
    w_FD[1] *= 1e-3  # a row of its own scale
    w_FD[2, :GROUP_SIZE] = 0
    w_FD[3, :GROUP_SIZE] = np.abs(w_FD[3, :GROUP_SIZE]) + 1  # of one sign: zero is kept
    rows = quantize_rows(w_FD, GROUP_SIZE)
    error_FGD = np.abs(dequantize(rows) - w_FD).reshape(6, -1, GROUP_SIZE)
    # The ends of a group may lie half a step further: its zero is rounded too.
    assert (error_FGD <= 1.01 * rows.scale_FG[:, :, None] + 1e-7).all()
    assert np.median(error_FGD / np.maximum(rows.scale_FG[:, :, None], 1e-9)) < 0.3
    assert not dequantize(rows)[2, :GROUP_SIZE].any()


def test_values_that_four_bits_hold_are_kept():
    rng = np.random.default_rng(2)
    q_FD = rng.integers(0, 16, (4, 128)).astype(np.uint8)
    q_FD[:, :2], q_FD[:, GROUP_SIZE : GROUP_SIZE + 2] = (0, 15), (0, 15)  # each group has its ends
    scale_FG = rng.uniform(0.01, 0.03, (4, 2)).astype(np.float16).astype(np.float32)
    zero_FG = rng.integers(0, 16, (4, 2)).astype(np.uint8)
    made = quantize_rows(dequantize(GroupedRows(q_FD, scale_FG, zero_FG)), GROUP_SIZE)
    for got, expected in zip(made[:3], (q_FD, scale_FG, zero_FG), strict=True):
        np.testing.assert_array_equal(got, expected)
