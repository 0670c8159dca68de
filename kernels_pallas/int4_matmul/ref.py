"""Products by matrices of 4-bit values in groups: the specification, and the form that XLA runs.

A weight is scale * (value - zero), values and zeros 0 to 15; a row's inputs share a scale and a zero in
groups. Two values lie in a byte: of each run of 128 inputs, byte j holds that of input j in its low bits, and
that of input j + 64, less 8, in its high ones. So `byte & 15` and `byte & -16` are numbers that bf16 holds
exactly.

    run | 0 .. 63: low bits of bytes 0 .. 63 | 64 .. 127: their high bits |

Letters beside the usual ones: C bytes of a row (D / 2), G groups of a row. Knows nothing of checkpoints.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

RUN = 128  # inputs whose values are packed together
HALF = RUN // 2
MIDDLE = 8  # what high bits are less


class Int4Matrix(NamedTuple):
    """A [output, input] matrix of 4-bit values. Groups come first: the outputs of one lie together."""

    q_FC: jax.Array  # int8, two values each
    scale_GF: jax.Array  # float16
    zero_GF: jax.Array  # int8, 0 to 15

    @property
    def shape(self) -> tuple[int, int]:
        return self.q_FC.shape[0], 2 * self.q_FC.shape[1]

    @property
    def group_size(self) -> int:
        return self.shape[1] // self.scale_GF.shape[0]


def int4_matmul(x_TD: jax.Array, w: Int4Matrix) -> jax.Array:
    """x @ w.T: [T, D] of any float type, rounded to bf16, gives [T, F] float32.

    The matrix is made in bf16 first, which is what many tokens are multiplied by fastest; a few read four
    times what they need.
    """
    w_FD = dequantize(w).astype(jnp.bfloat16)
    return jax.lax.dot_general(
        x_TD.astype(jnp.bfloat16), w_FD, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )


def dequantize(w: Int4Matrix) -> jax.Array:
    """The matrix, float32 [F, D]."""
    num_outputs, num_inputs = w.shape
    q_FRH = w.q_FC.reshape(num_outputs, -1, HALF)
    low_FRH, high_FRH = q_FRH & 15, (q_FRH >> 4) + MIDDLE
    q_FGD = jnp.concatenate([low_FRH, high_FRH], axis=2).reshape(num_outputs, -1, w.group_size)
    scale_FG1, zero_FG1 = (x_GF.T[:, :, None].astype(jnp.float32) for x_GF in (w.scale_GF, w.zero_GF))
    return (scale_FG1 * (q_FGD.astype(jnp.float32) - zero_FG1)).reshape(num_outputs, num_inputs)
