"""Products of few rows by matrices in their stack: the TPU's kernel against float64, in the interpreter, and
compiled for every chip."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kernels_pallas.paged_attention.tpu_plan import CHIPS
from jaxserve.kernels_pallas.stacked_matmul import ref
from tests.kernels.tpu import TOPOLOGIES, compile_for_tpu, device_kind

EPS = 1e-5
BF16_STEP = 2.0**-8
NUM_LAYERS = 3
# Rows, width, MLP channels, outputs of the product alone: several steps of a visit, and of two cores one
# has a visit more.
SHAPE = (3, 1024, 256, 1152)


def make_case(
    num_rows: int, width: int, channels: int, outputs: int, y_dtype: Any = jnp.float32
) -> dict[str, jax.Array]:
    rng = np.random.default_rng(width)

    def draw(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    bf16 = jnp.bfloat16
    return {
        "x": draw(num_rows, width) * 10,
        "y": draw(num_rows, width, dtype=y_dtype),  # that the last product of a block has as well
        "norm": draw(NUM_LAYERS, width),
        "w": draw(NUM_LAYERS, outputs, width, dtype=bf16),
        "bias": draw(NUM_LAYERS, outputs),
        "gate_up": draw(NUM_LAYERS, 2 * channels, width, dtype=bf16) / 16,
        "down": draw(NUM_LAYERS, width, channels, dtype=bf16),
    }


def round_bf16(x: np.ndarray) -> np.ndarray:
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)


def norm_exactly(case: dict[str, jax.Array], layer: int) -> np.ndarray:
    x = np.asarray(case["x"], np.float64) + np.asarray(case["y"], np.float64)
    h = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + EPS) * np.asarray(case["norm"][layer], np.float64)
    return round_bf16(h)


def assert_close(got: Any, want: np.ndarray) -> None:
    """Within what a step of bf16 in a few inputs makes of a sum of them, and half a step of its own."""
    rtol = BF16_STEP / 2 if got.dtype == jnp.bfloat16 else 0
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=2 * BF16_STEP * want.std(), rtol=rtol)


def run_all(form: Any, case: dict[str, jax.Array], layer: int) -> list[jax.Array]:
    at = jnp.int32(layer)
    x, y, norm = case["x"], case["y"], case["norm"]
    product = jax.jit(partial(form.multiply, dtype=y.dtype))(x, case["w"], at)
    normed = jax.jit(partial(form.norm_multiply, eps=EPS))(x, y, norm, case["w"], None, at)
    biased = jax.jit(partial(form.norm_multiply, eps=EPS))(x, y, norm, case["w"], case["bias"], at)
    mlp = jax.jit(partial(form.norm_mlp, eps=EPS, dtype=y.dtype))(
        x, y, norm, case["gate_up"], case["down"], at
    )
    for added, _ in (normed, biased, mlp):
        np.testing.assert_array_equal(added, x + y)
    assert product.dtype == mlp[1].dtype == y.dtype
    return [product, normed[1], biased[1], mlp[1]]


def run_exactly(case: dict[str, jax.Array], layer: int) -> list[np.ndarray]:
    w, gate_up, down = (np.asarray(case[name][layer], np.float64) for name in ("w", "gate_up", "down"))
    h = norm_exactly(case, layer)
    gate, up = np.split(h @ gate_up.T, 2, axis=1)
    mlp = round_bf16(gate / (1 + np.exp(-gate)) * up) @ down.T
    product = round_bf16(np.asarray(case["x"])) @ w.T
    return [product, h @ w.T, h @ w.T + np.asarray(case["bias"][layer], np.float64), mlp]


@pytest.mark.parametrize("y_dtype", ["float32", "bfloat16"])
def test_reference(y_dtype):
    case = make_case(*SHAPE, y_dtype)
    for got, want in zip(run_all(ref, case, 1), run_exactly(case, 1), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize(
    ("num_cores", "y_dtype"), [(1, "float32"), (2, "float32"), (1, "bfloat16"), (2, "bfloat16")]
)
def test_tpu_kernel_simulated(num_cores, y_dtype, capfd, monkeypatch):
    from jax.experimental.pallas import tpu as pltpu

    from jaxserve.kernels_pallas.stacked_matmul import tpu, tpu_stream

    monkeypatch.setattr(tpu_stream, "MOST_UNDER_WAY", 2)  # so that blocks follow each other in the same place
    interpret: Any = jax.default_backend() != "tpu" and pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan"
    )
    case = make_case(*SHAPE, y_dtype)
    sizes: Any = {"num_cores": num_cores, "buffer_bytes": 1 << 20, "interpret": interpret}
    form = ref.StackedForm(
        serves=partial(tpu.serves, num_cores=num_cores),
        multiply=partial(tpu.multiply, **sizes),
        norm_multiply=partial(tpu.norm_multiply, **sizes),
        norm_mlp=partial(tpu.norm_mlp, **sizes),
    )
    for got, want in zip(run_all(form, case, 2), run_exactly(case, 2), strict=True):
        assert_close(got, want)
    assert "RACE DETECTED" not in capfd.readouterr().out


def describe(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


# Of Llama 3 8B on eight devices, and of about twice that.
@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize(
    ("num_rows", "channels", "outputs", "dtype"), [(8, 1792, 768, "float32"), (32, 3072, 1536, "bfloat16")]
)
def test_tpu_kernel_compiles(chip, num_rows, channels, outputs, dtype):
    from jaxserve.kernels_pallas.stacked_matmul import tpu

    figures = CHIPS[device_kind(chip)]
    form = tpu.make_form(figures.num_cores, figures.bytes_per_s)
    bf16, num_layers, width = jnp.bfloat16, 28, 4096
    x_TD, norm_LD, layer = describe(num_rows, width), describe(num_layers, width), describe(dtype=jnp.int32)
    y_TD = describe(num_rows, width, dtype=dtype)
    w_LFD, bias_LF = describe(num_layers, outputs, width, dtype=bf16), describe(num_layers, outputs)
    gate_up_LFD = describe(num_layers, 2 * channels, width, dtype=bf16)
    down_LDF = describe(num_layers, width, channels, dtype=bf16)
    assert form.serves(num_rows, w_LFD)
    assert form.serves(num_rows, gate_up_LFD, 2)
    assert form.serves(num_rows, down_LDF)

    def run(x_TD, y_TD, norm_LD, w_LFD, bias_LF, gate_up_LFD, down_LDF, layer):
        x_TD, qkv_TF = form.norm_multiply(x_TD, y_TD, norm_LD, w_LFD, bias_LF, layer, eps=EPS)
        y_TD = form.multiply(jnp.tile(qkv_TF, 8)[:, :channels], down_LDF, layer, dtype=y_TD.dtype)
        dtype = y_TD.dtype
        return form.norm_mlp(x_TD, y_TD, norm_LD, gate_up_LFD, down_LDF, layer, eps=EPS, dtype=dtype)

    arguments = x_TD, y_TD, norm_LD, w_LFD, bias_LF, gate_up_LFD, down_LDF, layer
    report = compile_for_tpu(chip, run, *arguments)
    assert report.hlo.count('custom_call_target="tpu_custom_call"') == 2 + figures.num_cores
    assert report.temp_bytes < 4 << 20  # no matrix is copied


@pytest.mark.parametrize(
    ("num_rows", "outputs", "inputs", "dtype", "num_cores"),
    [
        (65, 1024, 1024, "bfloat16", 1),
        (8, 1024, 1024, "float32", 1),
        (8, 1024, 448, "bfloat16", 1),
        (8, 576, 1024, "bfloat16", 2),
    ],
)
def test_what_the_kernel_does_not_serve(num_rows, outputs, inputs, dtype, num_cores):
    from jaxserve.kernels_pallas.stacked_matmul import tpu

    assert tpu.serves(8, describe(2, 1024, 1024, dtype=jnp.bfloat16), num_cores=num_cores)
    assert not tpu.serves(num_rows, describe(2, outputs, inputs, dtype=dtype), num_cores=num_cores)


def test_large_matrices_are_left_to_xla_where_a_chip_has_one_core():
    from jaxserve.kernels_pallas.stacked_matmul import tpu

    w_LFD = describe(2, 16384, 4096, dtype=jnp.bfloat16)
    assert not tpu.serves(8, w_LFD, num_cores=1)
    assert tpu.serves(8, w_LFD, num_cores=2)
