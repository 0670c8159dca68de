"""Products by 4-bit matrices in groups: every form against float64, and the GPU's compiled for an H200."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kernels_pallas.int4_matmul import ref
from jaxserve.kernels_pallas.int4_matmul.ref import Int4Matrix
from tests.kernels.cases_int4 import CASES, make_matrix, make_tokens
from tests.kernels.h200 import assert_fits, compile_for_h200, require_h200_compiler


def import_gpu_form() -> Any:
    if jax.__version_info__ < (0, 11):
        pytest.skip("The GPU kernels need jax 0.11.2 or later.")
    from jaxserve.kernels_pallas.int4_matmul import gpu

    return gpu


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference(case):
    w, w_FD = make_matrix(case)
    assert (w.shape, w.group_size) == (w_FD.shape, case.group_size)
    np.testing.assert_allclose(ref.dequantize(w), w_FD, rtol=1e-6)
    x_TD = make_tokens(case)
    want_TF = np.asarray(x_TD).astype(np.float64) @ w_FD.T
    got_TF = ref.int4_matmul(x_TD, w)
    assert got_TF.dtype == jnp.float32
    np.testing.assert_allclose(got_TF, want_TF, atol=4e-3 * np.abs(want_TF).max())  # weights rounded to bf16


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel_simulated(case, capfd):
    gpu = import_gpu_form()
    from jaxserve.kernels_pallas import mosaic

    (w, w_FD), x_TD = make_matrix(case), make_tokens(case)
    multiply = partial(gpu.int4_matmul, num_shares=case.num_shares, interpret=mosaic.simulate())
    want_TF = np.asarray(x_TD).astype(np.float64) @ w_FD.T
    # The values of bytes are exact in bf16, so nothing is rounded but sums.
    np.testing.assert_allclose(jax.jit(multiply)(x_TD, w), want_TF, atol=1e-6 * np.abs(want_TF).max())
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("num_outputs", "num_inputs", "group_size"), [(96, 128, 128), (64, 192, 64), (64, 128, 32)]
)
def test_a_matrix_that_the_kernel_does_not_serve_is_refused(num_outputs, num_inputs, group_size):
    gpu = import_gpu_form()
    parts = (num_outputs, num_inputs // 2), (num_inputs // group_size, num_outputs)
    w = Int4Matrix(
        jnp.zeros(parts[0], jnp.int8), jnp.zeros(parts[1], jnp.float16), jnp.zeros(parts[1], jnp.int8)
    )
    with pytest.raises(ValueError, match="4-bit matrices want"):
        gpu.int4_matmul(jnp.zeros((1, num_inputs)), w)


# Tokens, outputs, inputs, group; registers a thread, blocks on one multiprocessor.
COMPILED = [
    (1, 4608, 3584, 128, 80, 4),
    (16, 3584, 18944, 128, 96, 4),
    (64, 37888, 3584, 128, 168, 1),
    (8, 37888, 3584, 64, 96, 4),
    (128, 3584, 3584, 128, 255, 1),
]


@pytest.mark.parametrize(
    ("num_tokens", "num_outputs", "num_inputs", "group_size", "max_registers", "blocks_per_sm"), COMPILED
)
def test_kernel_compiles_for_h200(
    num_tokens, num_outputs, num_inputs, group_size, max_registers, blocks_per_sm
):
    require_h200_compiler()
    gpu = import_gpu_form()
    groups = (num_inputs // group_size, num_outputs)
    w: Any = Int4Matrix(
        jax.ShapeDtypeStruct((num_outputs, num_inputs // 2), jnp.int8),  # type: ignore[arg-type]
        jax.ShapeDtypeStruct(groups, jnp.float16),  # type: ignore[arg-type]
        jax.ShapeDtypeStruct(groups, jnp.int8),  # type: ignore[arg-type]
    )
    x_TD = jax.ShapeDtypeStruct((num_tokens, num_inputs), jnp.bfloat16)
    report = compile_for_h200(gpu.int4_matmul, x_TD, w)
    assert_fits(report.kernel("int4_matmul"), max_registers=max_registers, blocks_per_sm=blocks_per_sm)
    num_shares = gpu.choose_shares(num_outputs, num_inputs)
    tokens_bytes = 2 * 4 * max(num_tokens, 8) * num_inputs
    results_bytes = 4 * (num_shares + 1) * num_outputs * max(num_tokens, 8)
    assert report.temp_bytes <= results_bytes + tokens_bytes + 65536  # no matrix in bf16


def test_many_tokens_get_a_product_of_bf16():
    require_h200_compiler()
    gpu = import_gpu_form()
    (w, _), x_TD = make_matrix(CASES[0]), jnp.zeros((129, 128), jnp.bfloat16)
    assert "mosaic_gpu" not in compile_for_h200(gpu.int4_matmul, x_TD, w).hlo
