"""Activations rotated and rounded to int8: XLA's form against float64, and the TPU's kernel against that, in
the interpreter and compiled for every chip."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kernels_pallas.round_rows import ref
from tests.kernels.tpu import TOPOLOGIES, compile_for_tpu

# Tokens, channels: parts of a tile of rows, half of the lanes at the end, several blocks, the last in part.
SHAPES = [(1, 64), (3, 192), (8, 896), (20, 320), (40, 3584), (300, 1856)]


def make_rows(num_tokens: int, width: int) -> jax.Array:
    """What bf16 holds, so that rounding to it has no ties; of very different rows, one of zeros."""
    rng = np.random.default_rng(num_tokens)
    x_TD = rng.standard_normal((num_tokens, width)) * 10.0 ** rng.integers(-3, 4, (num_tokens, 1))
    x_TD[:, 5] *= 100
    x_TD[num_tokens // 2] *= num_tokens == 1
    return jnp.asarray(x_TD, jnp.bfloat16)


@pytest.mark.parametrize(("width", "num_mixed"), [(896, 64), (4864, 64), (96, 16), (20, 4), (7, 1)])
def test_the_rotation_mixes_runs_of_a_power_of_four_and_is_its_own_inverse(width, num_mixed):
    h_HH = ref.hadamard(width)
    assert h_HH.shape == (num_mixed, num_mixed)
    np.testing.assert_array_equal(jnp.asarray(h_HH, jnp.bfloat16), h_HH)
    np.testing.assert_allclose(h_HH @ h_HH, np.eye(num_mixed), atol=1e-6)
    x_TD = np.random.default_rng(0).standard_normal((3, width), np.float32)
    np.testing.assert_allclose(ref.rotate(ref.rotate(jnp.asarray(x_TD))), x_TD, atol=1e-5)


@pytest.mark.parametrize(("num_tokens", "width"), [*SHAPES, (3, 12)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reference(num_tokens, width, dtype):
    x_TD = make_rows(num_tokens, width)
    q_TD, scale_T1 = jax.jit(ref.round_rows)(x_TD.astype(dtype))
    assert (q_TD.dtype, scale_T1.dtype, scale_T1.shape) == (jnp.int8, jnp.float32, (num_tokens, 1))
    h_HH = ref.hadamard(width).astype(np.float64)
    want_TD = (np.asarray(x_TD, np.float64).reshape(-1, len(h_HH)) @ h_HH).reshape(num_tokens, width)
    largest_T1 = np.abs(want_TD).max(axis=1, keepdims=True)
    np.testing.assert_allclose(scale_T1, np.maximum(largest_T1, 1e-12) / 127, rtol=1e-6)
    error_TD = np.abs(np.asarray(q_TD) * np.asarray(scale_T1, np.float64) - want_TD)
    assert (error_TD <= 0.5001 * np.asarray(scale_T1)).all()


@pytest.mark.parametrize(("num_tokens", "width"), SHAPES)
def test_tpu_kernel_simulated(num_tokens, width, capfd):
    from jax.experimental.pallas import tpu as pltpu

    from jaxserve.kernels_pallas.round_rows.tpu import round_rows

    x_TD = make_rows(num_tokens, width)
    want_TD, want_T1 = jax.jit(ref.round_rows)(x_TD)
    interpret: Any = jax.default_backend() != "tpu" and pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan"
    )
    q_TD, scale_T1 = jax.jit(partial(round_rows, interpret=interpret))(x_TD)
    np.testing.assert_allclose(scale_T1, want_T1, rtol=1e-6)
    # The kernel multiplies by 1 / scale, so what lies halfway between two steps may go to the other one.
    differs_TD = np.asarray(q_TD, np.int32) - np.asarray(want_TD, np.int32)
    assert np.abs(differs_TD).max() <= 1
    assert (differs_TD != 0).mean() < 1e-3
    assert "RACE DETECTED" not in capfd.readouterr().out


def test_no_whole_runs_get_xlas_form():
    from jaxserve.kernels_pallas.round_rows.tpu import round_rows

    x_TD = make_rows(2, 96)
    assert "pallas_call" not in str(jax.make_jaxpr(round_rows)(x_TD))
    np.testing.assert_array_equal(jax.jit(round_rows)(x_TD)[0], jax.jit(ref.round_rows)(x_TD)[0])


@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize(
    ("num_tokens", "width", "dtype"),
    [(1, 896, "float32"), (8, 3584, "bfloat16"), (100, 1856, "float32"), (2048, 29568, "float32")],
)
def test_tpu_kernel_compiles(chip, num_tokens, width, dtype):
    from jaxserve.kernels_pallas.round_rows.tpu import round_rows

    report = compile_for_tpu(chip, round_rows, jax.ShapeDtypeStruct((num_tokens, width), dtype))
    assert report.hlo.count('custom_call_target="tpu_custom_call"') == 1
    num_bytes = 2 * num_tokens * width  # in bf16
    assert report.temp_bytes < num_bytes + (1 << 17)
