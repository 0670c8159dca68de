"""Products by the matrices of experts: every form against float64, and the GPU's compiled for an H200."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxserve.kernels_pallas.grouped_matmul import ref
from tests.kernels.cases_grouped import CASES, make_input, measure_error
from tests.kernels.h200 import assert_fits, compile_for_h200, require_h200_compiler
from tests.kernels.tpu import TOPOLOGIES, compile_for_tpu

TOLERANCE = 1e-6  # products of bf16 are exact in float32: only sums are rounded


def import_gpu_form() -> Any:
    if jax.__version_info__ < (0, 11):
        pytest.skip("The GPU kernels need jax 0.11.2 or later.")
    from jaxserve.kernels_pallas.grouped_matmul import gpu

    return gpu


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference(case):
    *arguments, want_MF = make_input(case)
    got_MF = jax.jit(ref.grouped_matmul)(*arguments)
    assert got_MF.dtype == jnp.float32
    assert measure_error(got_MF, want_MF) < TOLERANCE


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel_simulated(case, capfd):
    gpu = import_gpu_form()
    from jaxserve.kernels_pallas import mosaic

    *arguments, want_MF = make_input(case)
    multiply = jax.jit(partial(gpu.grouped_matmul, interpret=mosaic.simulate()))
    assert measure_error(multiply(*arguments), want_MF) < TOLERANCE
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("tile_rows", "num_outputs", "num_inputs", "dtype"),
    [
        (4, 64, 64, jnp.bfloat16),
        (8, 96, 64, jnp.bfloat16),
        (8, 64, 96, jnp.bfloat16),
        (8, 64, 64, jnp.float32),
    ],
)
def test_what_the_kernel_does_not_serve_is_refused(tile_rows, num_outputs, num_inputs, dtype):
    gpu = import_gpu_form()
    x_MD, w_EFD = jnp.zeros((tile_rows, num_inputs), dtype), jnp.zeros((2, num_outputs, num_inputs), dtype)
    with pytest.raises(ValueError, match="The GPU's kernel multiplies"):
        gpu.grouped_matmul(x_MD, w_EFD, jnp.zeros(1, jnp.int32), jnp.int32(1))


# Rows of a tile, outputs, inputs; registers a thread, blocks on one multiprocessor. Of Qwen3-30B-A3B.
COMPILED = [
    (8, 1536, 2048, 64, 2),
    (32, 2048, 768, 64, 2),
    (64, 1536, 2048, 128, 2),
    (128, 1536, 2048, 168, 1),
]


@pytest.mark.parametrize(
    ("tile_rows", "num_outputs", "num_inputs", "max_registers", "blocks_per_sm"), COMPILED
)
def test_kernel_compiles_for_h200(tile_rows, num_outputs, num_inputs, max_registers, blocks_per_sm):
    require_h200_compiler()
    gpu = import_gpu_form()
    report = compile_for_h200(
        gpu.grouped_matmul,
        jax.ShapeDtypeStruct((160 * tile_rows, num_inputs), jnp.bfloat16),
        jax.ShapeDtypeStruct((128, num_outputs, num_inputs), jnp.bfloat16),
        jax.ShapeDtypeStruct((160,), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    kernel = report.kernel("grouped_matmul")
    assert_fits(kernel, max_registers=max_registers, blocks_per_sm=blocks_per_sm)
    assert report.temp_bytes == 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tpu_kernel_simulated(case, capfd):
    from jax.experimental.pallas import tpu as pltpu

    from jaxserve.kernels_pallas.grouped_matmul.tpu import grouped_matmul

    *arguments, want_MF = make_input(case)
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    multiply = jax.jit(partial(grouped_matmul, interpret=interpret))
    assert measure_error(multiply(*arguments), want_MF) < TOLERANCE
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize(("tile_rows", "num_outputs", "num_inputs"), [(16, 1536, 2048), (128, 2048, 768)])
def test_tpu_kernel_compiles(chip, tile_rows, num_outputs, num_inputs):
    from jaxserve.kernels_pallas.grouped_matmul.tpu import grouped_matmul

    report = compile_for_tpu(
        chip,
        grouped_matmul,
        jax.ShapeDtypeStruct((160 * tile_rows, num_inputs), jnp.bfloat16),
        jax.ShapeDtypeStruct((128, num_outputs, num_inputs), jnp.bfloat16),
        jax.ShapeDtypeStruct((160,), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    assert report.hlo.count('custom_call_target="tpu_custom_call"') == 1
    assert report.temp_bytes < 65536  # no matrix in another layout
