"""Products by quantised weights: close to float32 for any number of rows, and with outliers among them."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kernels_pallas.dispatch import XLA_KERNELS
from jaxserve.kernels_pallas.round_rows.ref import rotate, round_rows
from jaxserve.models.quant import Matrix, QuantizedMatrix, bind_kernels, embed, gated_mlp, matmul

WIDTH = 192


def make_weight(w_FD: np.ndarray, dtype: str) -> Matrix:
    if dtype == "int8":
        return quantise(w_FD)
    if dtype == "fp8":
        scale_F = np.abs(w_FD).max(axis=1) / 448
        return QuantizedMatrix(jnp.asarray(w_FD / scale_F[:, None], jnp.float8_e4m3fn), jnp.asarray(scale_F))
    return jnp.asarray(w_FD, dtype)


def quantise(w_FD: np.ndarray) -> QuantizedMatrix:
    rotated_FD = np.asarray(rotate(jnp.asarray(w_FD)))
    scale_F = np.abs(rotated_FD).max(axis=1) / 127
    return QuantizedMatrix(
        jnp.asarray(np.rint(rotated_FD / scale_F[:, None]), jnp.int8), jnp.asarray(scale_F)
    )


def relative_error(actual: jax.Array, expected: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(actual) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("num_rows", [1, 2, 16, 17, 40])
@pytest.mark.parametrize(
    ("dtype", "limit"), [("float32", 1e-6), ("bfloat16", 5e-3), ("int8", 2e-2), ("fp8", 4e-2)]
)
def test_products_are_those_of_float32(num_rows: int, dtype: str, limit: float):
    rng = np.random.default_rng(num_rows)
    x_TD = rng.standard_normal((num_rows, WIDTH), np.float32)
    w_FD = rng.standard_normal((48, WIDTH), np.float32)
    y_TF = jax.jit(matmul)(jnp.asarray(x_TD), make_weight(w_FD, dtype))
    assert y_TF.dtype == jnp.float32
    assert y_TF.shape == (num_rows, 48)
    assert relative_error(y_TF, x_TD.astype(np.float64) @ w_FD.T) < limit


def test_activations_are_rounded_in_the_form_that_was_chosen():
    rng = np.random.default_rng(3)
    x_TD, w_FD = jnp.asarray(rng.standard_normal((2, WIDTH), np.float32)), rng.standard_normal((48, WIDTH))
    params = {dtype: make_weight(w_FD.astype(np.float32), dtype) for dtype in ("float32", "int8", "fp8")}

    def round_twice_as_large(x_TD: jax.Array) -> tuple[jax.Array, jax.Array]:
        q_TD, scale_T1 = round_rows(x_TD)
        return q_TD, 2 * scale_T1

    bound = bind_kernels(params, replace(XLA_KERNELS, round_rows=round_twice_as_large))
    for dtype, times in (("float32", 1), ("int8", 2), ("fp8", 1)):
        np.testing.assert_allclose(matmul(x_TD, bound[dtype]), times * matmul(x_TD, params[dtype]), rtol=1e-6)


@pytest.mark.parametrize("num_tokens", [1, 16, 17, 64, 65])
@pytest.mark.parametrize(
    ("dtype", "limit"), [("float32", 1e-6), ("bfloat16", 7e-3), ("int8", 3e-2), ("fp8", 6e-2)]
)
def test_a_gated_mlp_is_that_of_float32(num_tokens: int, dtype: str, limit: float):
    rng = np.random.default_rng(num_tokens)
    x_TD = rng.standard_normal((num_tokens, WIDTH), np.float32)
    gate_FD, up_FD = rng.standard_normal((2, 320, WIDTH), np.float32) / np.sqrt(WIDTH)
    w_DF = rng.standard_normal((WIDTH, 320), np.float32)
    w_gate_up_FD = make_weight(np.concatenate([gate_FD, up_FD]), dtype)
    y_TD = jax.jit(gated_mlp)(jnp.asarray(x_TD), w_gate_up_FD, make_weight(w_DF, dtype))
    gate_TF = x_TD.astype(np.float64) @ gate_FD.T
    expected_TD = (gate_TF / (1 + np.exp(-gate_TF)) * (x_TD @ up_FD.T)) @ w_DF.T
    assert relative_error(y_TD, expected_TD) < limit


def test_a_channel_a_hundred_times_as_large_takes_no_precision_from_the_others():
    rng = np.random.default_rng(1)
    x_TD = rng.standard_normal((8, WIDTH), np.float32)
    x_TD[:, 5] = 100
    w_FD = rng.standard_normal((48, WIDTH), np.float32)
    w_FD[:, 5] = 0  # what is left is what the others say
    # In steps of 100 / 127 most of the others would be 0 or 1, and this about 0.23.
    assert relative_error(matmul(jnp.asarray(x_TD), quantise(w_FD)), x_TD @ w_FD.T) < 0.1


@pytest.mark.parametrize(
    ("dtype", "limit"), [("float32", 0), ("bfloat16", 5e-3), ("int8", 2e-2), ("fp8", 4e-2)]
)
def test_embeddings_are_rows_of_the_matrix(dtype: str, limit: float):
    w_VD = np.random.default_rng(2).standard_normal((10, WIDTH), np.float32)
    x_TD = embed(jnp.asarray([3, 7]), make_weight(w_VD, dtype))
    assert x_TD.dtype == jnp.float32
    assert relative_error(x_TD, w_VD[[3, 7]]) <= limit
