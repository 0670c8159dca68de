"""The residual add and the norm behind it: XLA's form against float64, and the TPU's kernel against that too,
in the interpreter and compiled for every chip."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kernels_pallas.add_norm import ref
from tests.kernels.tpu import TOPOLOGIES, compile_for_tpu

EPS = 1e-5
# Tokens, channels, layers: one row, a part of a tile, several with a rest, more layers than a tile has rows.
SHAPES = [(1, 128, 1), (3, 256, 5), (8, 384, 11), (40, 128, 8)]


def make_case(num_tokens: int, width: int, num_layers: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(num_tokens)
    shapes = ((num_tokens, width), (num_tokens, width), (num_layers, width))
    x_TD, y_TD, weight_LD = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    return x_TD * 10, y_TD, weight_LD


def norm_exactly(x_TD: Any, weight_D: Any) -> np.ndarray:
    x_TD = np.asarray(x_TD, np.float64)
    return x_TD / np.sqrt((x_TD**2).mean(axis=1, keepdims=True) + EPS) * np.asarray(weight_D, np.float64)


@pytest.mark.parametrize("adds", [True, False])
def test_reference(adds):
    x_TD, y_TD, weight_LD = make_case(3, 20, 4)
    add_norm = jax.jit(partial(ref.add_norm, eps=EPS, dtype=jnp.dtype(jnp.float32)))
    sum_TD, h_TD = add_norm(x_TD, y_TD if adds else None, weight_LD, jnp.int32(2))
    np.testing.assert_array_equal(sum_TD, x_TD + y_TD if adds else x_TD)
    np.testing.assert_allclose(h_TD, norm_exactly(sum_TD, weight_LD[2]), rtol=2e-6, atol=1e-6)
    of_one_layer = add_norm(x_TD, y_TD if adds else None, weight_LD[2], None)
    np.testing.assert_array_equal(of_one_layer[1], h_TD)


@pytest.mark.parametrize(("num_tokens", "width", "num_layers"), SHAPES)
@pytest.mark.parametrize(("dtype", "y_dtype"), [("float32",) * 2, ("bfloat16", "float32"), ("bfloat16",) * 2])
def test_tpu_kernel_simulated(num_tokens, width, num_layers, dtype, y_dtype, capfd):
    from jax.experimental.pallas import tpu as pltpu

    from jaxserve.kernels_pallas.add_norm import tpu

    x_TD, y_TD, weight_LD = make_case(num_tokens, width, num_layers)
    y_TD = y_TD.astype(y_dtype)
    interpret: Any = jax.default_backend() != "tpu" and pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan"
    )
    add_norm = jax.jit(partial(tpu.add_norm, eps=EPS, dtype=jnp.dtype(dtype), interpret=interpret))
    for layer in {0, num_layers - 1}:
        sum_TD, h_TD = add_norm(x_TD, y_TD, weight_LD, jnp.int32(layer))
        np.testing.assert_array_equal(sum_TD, x_TD + y_TD)
        assert h_TD.dtype == dtype
        want_TD = norm_exactly(x_TD + y_TD, weight_LD[layer])
        rtol = {"float32": 2e-6, "bfloat16": 2.0**-8}[dtype]
        np.testing.assert_allclose(np.asarray(h_TD, np.float64), want_TD, rtol=rtol, atol=1e-6)
    alone = add_norm(x_TD, y_TD, weight_LD[num_layers - 1], None)
    np.testing.assert_array_equal(alone[1], h_TD)
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize(("num_tokens", "width"), [(2, 96), (2048, 8192)])
def test_what_the_kernel_does_not_serve_is_added_at_once(num_tokens, width):
    from jaxserve.kernels_pallas.add_norm import tpu

    x_TD = jnp.zeros((num_tokens, width))
    assert tpu.begin_sum(x_TD, x_TD.dtype) is None
    add_norm = partial(tpu.add_norm, eps=EPS, dtype=jnp.dtype(jnp.bfloat16))
    for y_TD in (None, x_TD):
        assert "pallas_call" not in str(jax.make_jaxpr(add_norm)(x_TD, y_TD, x_TD[0], None))


@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize(
    ("num_tokens", "width", "dtype", "y_dtype"),
    [
        (1, 896, "bfloat16", "float32"),
        (8, 3584, "bfloat16", "float32"),
        (100, 896, "float32", "bfloat16"),
        (32, 8192, "bfloat16", "bfloat16"),
    ],
)
def test_tpu_kernel_compiles(chip, num_tokens, width, dtype, y_dtype):
    from jaxserve.kernels_pallas.add_norm import tpu

    x_TD = jax.ShapeDtypeStruct((num_tokens, width), jnp.float32)
    y_TD = jax.ShapeDtypeStruct(x_TD.shape, y_dtype)
    weight_LD = jax.ShapeDtypeStruct((28, width), jnp.float32)
    layer = jax.ShapeDtypeStruct((), jnp.int32)
    assert tpu.begin_sum(jnp.zeros(x_TD.shape), x_TD.dtype) is not None
    add_norm = partial(tpu.add_norm, eps=EPS, dtype=jnp.dtype(dtype))
    report = compile_for_tpu(chip, add_norm, x_TD, y_TD, weight_LD, layer, donate_argnums=0)
    assert report.hlo.count('custom_call_target="tpu_custom_call"') == 1
    assert report.alias_bytes >= 4 * num_tokens * width
    assert report.temp_bytes < 1 << 17
