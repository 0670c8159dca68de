"""Products by the matrices of experts: every form against float64, and the GPU's compiled for an H200."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxserve.kernels_pallas.grouped_matmul import ref
from jaxserve.kernels_pallas.int4_matmul.ref import Int4Matrix
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
    ("tile_rows", "num_outputs", "num_inputs", "dtypes"),
    [
        (4, 64, 64, ("bfloat16", "bfloat16")),
        (8, 96, 64, ("bfloat16", "bfloat16")),
        (8, 64, 96, ("bfloat16", "bfloat16")),
        (8, 64, 64, ("float32", "float32")),
        (8, 64, 64, ("bfloat16", "int8")),
    ],
)
def test_what_the_kernel_does_not_serve_is_refused(tile_rows, num_outputs, num_inputs, dtypes):
    gpu = import_gpu_form()
    x_MD = jnp.zeros((tile_rows, num_inputs), dtypes[0])
    w_EFD = jnp.zeros((2, num_outputs, num_inputs), dtypes[1])
    with pytest.raises(ValueError, match="The GPU's kernel multiplies"):
        gpu.grouped_matmul(x_MD, w_EFD, jnp.zeros(1, jnp.int32), jnp.int32(1))


def describe_arguments(tile_rows: int, num_outputs: int, num_inputs: int, weights: str) -> list[Any]:
    """Of 128 experts, as those of Qwen3-30B-A3B; of 4 bits in groups of 128."""
    if weights == "int4":
        groups = (num_inputs // 128, 128, num_outputs)
        packed: Any = jax.ShapeDtypeStruct((128, num_outputs, num_inputs // 2), jnp.int8)
        scale: Any = jax.ShapeDtypeStruct(groups, jnp.float16)
        zero: Any = jax.ShapeDtypeStruct(groups, jnp.int8)
        matrices: Any = Int4Matrix(packed, scale, zero)
    else:
        matrices = jax.ShapeDtypeStruct((128, num_outputs, num_inputs), weights)
    shapes = [
        jax.ShapeDtypeStruct((160 * tile_rows, num_inputs), "int8" if weights == "int8" else "bfloat16"),
        matrices,
        jax.ShapeDtypeStruct((160,), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
    ]
    if weights in ("int8", "float8_e4m3fn"):
        shapes.append(jax.ShapeDtypeStruct((128, num_outputs), jnp.float32))
    return shapes


# Rows of a tile, outputs, inputs; registers a thread, blocks on one multiprocessor.
COMPILED = [
    ("bfloat16", 8, 1536, 2048, 64, 2),
    ("bfloat16", 32, 2048, 768, 64, 2),
    ("bfloat16", 64, 1536, 2048, 128, 2),
    ("bfloat16", 128, 1536, 2048, 168, 1),
    ("int8", 8, 1536, 2048, 64, 2),
    ("int8", 64, 1536, 2048, 128, 2),
    ("int8", 128, 1536, 2048, 168, 1),
    ("float8_e4m3fn", 8, 1536, 2048, 80, 2),
    ("float8_e4m3fn", 32, 2048, 768, 96, 2),
    ("float8_e4m3fn", 128, 1536, 2048, 128, 1),
    ("int4", 8, 1536, 2048, 96, 2),
    ("int4", 32, 2048, 768, 96, 2),
    ("int4", 128, 1536, 2048, 168, 1),
]


@pytest.mark.parametrize(
    ("weights", "tile_rows", "num_outputs", "num_inputs", "max_registers", "blocks_per_sm"), COMPILED
)
def test_kernel_compiles_for_h200(weights, tile_rows, num_outputs, num_inputs, max_registers, blocks_per_sm):
    require_h200_compiler()
    gpu = import_gpu_form()
    arguments = describe_arguments(tile_rows, num_outputs, num_inputs, weights)
    report = compile_for_h200(gpu.grouped_matmul, *arguments)
    kernel = report.kernel("grouped_matmul")
    assert_fits(kernel, max_registers=max_registers, blocks_per_sm=blocks_per_sm)
    assert report.temp_bytes == 0


@pytest.mark.parametrize(
    ("case", "widens_int8"),
    [
        *((case, False) for case in CASES if case.weights != "int4"),
        next((case, True) for case in CASES if case.weights == "int8"),
    ],
    ids=lambda given: "widened" if given is True else getattr(given, "name", ""),
)
def test_tpu_kernel_simulated(case, widens_int8, capfd):
    from jax.experimental.pallas import tpu as pltpu

    from jaxserve.kernels_pallas.grouped_matmul.tpu import grouped_matmul

    *arguments, want_MF = make_input(case)
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    multiply = jax.jit(partial(grouped_matmul, widens_int8=widens_int8, interpret=interpret))
    assert measure_error(multiply(*arguments), want_MF) < TOLERANCE
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize("weights", ["bfloat16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize(("tile_rows", "num_outputs", "num_inputs"), [(16, 1536, 2048), (128, 2048, 768)])
def test_tpu_kernel_compiles(chip, tile_rows, num_outputs, num_inputs, weights):
    from jaxserve.kernels_pallas.grouped_matmul.tpu import grouped_matmul

    multiply = partial(grouped_matmul, widens_int8=chip == "tpu7x")
    report = compile_for_tpu(chip, multiply, *describe_arguments(tile_rows, num_outputs, num_inputs, weights))
    assert report.hlo.count('custom_call_target="tpu_custom_call"') == 1
    scales_bytes = 0 if weights == "bfloat16" else 2 * 4 * 160 * num_outputs  # those of each tile
    assert report.temp_bytes < 65536 + scales_bytes  # no matrix in another layout
