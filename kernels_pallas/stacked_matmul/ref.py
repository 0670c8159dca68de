"""Products of few rows by a layer's matrices where they lie in the stack of all layers, with the residual add
and norm before them and the gate of an MLP behind. The specification; and what a set of kernels has of it.

Called by the models (models/stacked.py). Knows no pool and no sharding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxserve.kernels_pallas.add_norm.ref import add_norm

FLOAT32 = jnp.dtype(jnp.float32)


@dataclass(frozen=True, slots=True)
class StackedForm:
    """The three products of one form, and what it serves: `serves(num_rows, w_LFD)` is of bf16 matrices."""

    serves: Callable[..., bool]
    multiply: Callable[..., jax.Array]
    norm_multiply: Callable[..., tuple[jax.Array, jax.Array]]
    norm_mlp: Callable[..., tuple[jax.Array, jax.Array]]


def multiply(x_TD: jax.Array, w_LFD: jax.Array, layer: jax.Array, *, dtype: jnp.dtype = FLOAT32) -> jax.Array:
    """x, rounded to the matrix' dtype, times the transpose of the layer's matrix: [T, F] in `dtype`."""
    w_FD = jax.lax.dynamic_index_in_dim(w_LFD, layer, keepdims=False)
    dims = (((1,), (1,)), ((), ()))
    x_TD = x_TD.astype(w_FD.dtype)
    return jax.lax.dot_general(x_TD, w_FD, dims, preferred_element_type=jnp.float32).astype(dtype)


def norm_multiply(
    x_TD: jax.Array,
    y_TD: jax.Array,
    norm_LD: jax.Array,
    w_LFD: jax.Array,
    bias_LF: jax.Array | None,
    layer: jax.Array,
    *,
    eps: float,
) -> tuple[jax.Array, jax.Array]:
    """x + y, and the product of its norm, with the bias where there is one: float32 [T, D] and [T, F]. y may
    be bf16."""
    x_TD, h_TD = add_norm(x_TD, y_TD, norm_LD, layer, eps=eps, dtype=w_LFD.dtype)
    y_TF = multiply(h_TD, w_LFD, layer)
    return x_TD, y_TF if bias_LF is None else y_TF + bias_LF[layer]


def norm_mlp(
    x_TD: jax.Array,
    y_TD: jax.Array,
    norm_LD: jax.Array,
    w_gate_up_LFD: jax.Array,
    w_down_LDF: jax.Array,
    layer: jax.Array,
    *,
    eps: float,
    dtype: jnp.dtype = FLOAT32,
) -> tuple[jax.Array, jax.Array]:
    """x + y, float32 [T, D], and the gated MLP of its norm, [T, D] rounded to `dtype`. y may be bf16. Rows of
    gate stand before those of up."""
    x_TD, gate_up_TF = norm_multiply(x_TD, y_TD, norm_LD, w_gate_up_LFD, None, layer, eps=eps)
    gate_TF, up_TF = jnp.split(gate_up_TF, 2, axis=1)
    return x_TD, multiply(jax.nn.silu(gate_TF) * up_TF, w_down_LDF, layer, dtype=dtype)
