"""Activations of an int8 product, rotated and rounded to int8: the specification, and the form of XLA.

A few channels of an activation are many times larger than the rest, and as a row has one scale, they leave
the others few steps of the 255. So runs of up to 64 channels are mixed by a Hadamard matrix first, which
spreads what is large over its run: x w^T = (x H)(w H)^T for an orthogonal H. Weights are rotated while they
are loaded, activations here (QuaRot, Ashkboos et al. 2024, with online rotations only), after they are
rounded to bf16: that is a fraction of the step that int8 has. Knows nothing of the product.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.kernels_pallas.rounding import to_bf16

MOST_MIXED = 64  # channels; 32 saves 3 % of a prefill and is a little further from float32
FOUR_CHANNELS = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], np.float32) / 2
SMALLEST_ABSMAX = 1e-12  # of what is all zeros

RoundRows = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def round_rows(x_TD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 [T, D] and float32 scales [T, 1] of x [T, D] of any float type, rotated."""
    return quantize(rotate(to_bf16(x_TD.astype(jnp.float32))), axis=1)


def rotate(x_TD: jax.Array) -> jax.Array:
    """Each run of channels times its Hadamard matrix: [T, D] float32, of float32 or bf16. Twice gives x."""
    h_HH = jnp.asarray(hadamard(x_TD.shape[1]), x_TD.dtype)
    x_RH = x_TD.reshape(-1, h_HH.shape[0])  # R runs of H channels
    y_RH = jnp.matmul(x_RH, h_HH, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return y_RH.reshape(x_TD.shape)


def hadamard(width: int) -> np.ndarray:
    """The symmetric, orthogonal matrix that mixes a run of channels, [H, H] float32: H is the largest power
    of four, up to 64, that divides the width. Of four, so that 1 / sqrt(H) is exact in bf16."""
    h_HH = np.ones((1, 1), np.float32)
    while math.gcd(width, MOST_MIXED) % (4 * h_HH.shape[0]) == 0:
        h_HH = np.kron(FOUR_CHANNELS, h_HH)
    return h_HH


def quantize(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """int8 values and float32 scales, one for all along `axis`: absmax / 127, round to nearest."""
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=axis, keepdims=True), SMALLEST_ABSMAX) / 127.0
    return jnp.round(x / scale).astype(jnp.int8), scale
